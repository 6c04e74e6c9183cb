"""Success rates as inline SVG of our own: learning curves with greedy evaluations, and bars with intervals.

Colours are the report's CSS variables; `standalone` puts in their values, for use as a file.
"""

import html
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

SMOOTHING_STEPS = 5
# The report's light colours, for files of their own.
PALETTE = {
    "--grid": "#e8e7e1", "--muted": "#6f6e69", "--card": "#fcfcfb", "--ink": "#0b0b0b", "--before": "#8d8b84",
    "--after": "#2a78d6", "--shade": "#f2f2ef", "--c0": "#2a78d6", "--c1": "#eb6834", "--c2": "#1baf7a",
    "--c3": "#eda100", "--c4": "#e87ba4", "--c5": "#008300", "--c6": "#4a3aa7", "--c7": "#e34948",
}  # fmt: skip
NUM_COLOURS = 8  # --c0 .. --c7; what is beyond is grey


@dataclass(frozen=True)
class Rate:
    """A success rate with its count and 95 % interval, all from the evaluation's own results."""

    name: str
    successes: int
    episodes: int
    low: float
    high: float

    @property
    def value(self) -> float:
        """Successes per episode, 0..1."""
        return self.successes / self.episodes


@dataclass(frozen=True)
class CurvePoint:
    """Success rate of the sampled training episodes that ended in one training step, `seconds` of training so far."""

    env_steps: int
    success_rate: float
    num_episodes: int
    seconds: float = 0.0


@dataclass(frozen=True)
class Series:
    """One run's learning curve, and its greedy evaluations as (x, rate, colour)."""

    label: str
    colour: str
    points: tuple[CurvePoint, ...]
    greedy: tuple[tuple[float, Rate, str], ...] = ()


def percent(rate: float) -> str:
    """0.934 -> `93.4 %`."""
    return f"{100 * rate:.1f} %"


@dataclass(frozen=True)
class Axis:
    """What a curve's points are plotted over."""

    title: str
    value: Callable[[CurvePoint], float]


ENV_STEPS = Axis("environment steps", lambda point: float(point.env_steps))
MINUTES = Axis("minutes of training, start-ups left out", lambda point: point.seconds / 60)


def smooth(
    points: Sequence[CurvePoint], window: int, axis: Axis = ENV_STEPS
) -> list[tuple[float, float]]:
    """Return (x, rate) averaged over each point and the `window - 1` before it, weighted by episodes."""
    smoothed = []
    for i, point in enumerate(points):
        recent = [p for p in points[max(0, i + 1 - window) : i + 1] if p.num_episodes]
        episodes = sum(p.num_episodes for p in recent)
        if episodes:
            rate = sum(p.success_rate * p.num_episodes for p in recent) / episodes
            smoothed.append((axis.value(point), rate))
    return smoothed


def axis_step(maximum: float, num_ticks: int = 5) -> float:
    """Return a round distance (1, 2 or 5 times a power of ten) that gives at most `num_ticks` steps up to `maximum`."""
    step = 1.0
    while step * 10 * num_ticks <= maximum:
        step *= 10
    return next(m * step for m in (1, 2, 5, 10, 20, 50) if m * step * num_ticks >= maximum)


def short_number(value: float) -> str:
    """12000 -> `12k`, 500 -> `500`."""
    return f"{value / 1000:g}k" if value >= 1000 else f"{value:g}"


def series_colour(index: int) -> str:
    """The colour of the index-th of several things."""
    return f"var(--c{index})" if index < NUM_COLOURS else "var(--before)"


class CurvePlot:
    """Learning curves as SVG of a given size in pixels: success rate 0..1 over environment steps, or something else.

    Args:
        series: the curves; each step's own rate is drawn too (as faint dots) if there is only one.
        width, height: pixels.
        max_x: where the x axis ends; at least all points and evaluations are on it.
        warmup_x: up to here only the critic learns (shaded); 0: nowhere.
        axis: the x axis.
        window: training steps that the line is a mean of.
    """

    def __init__(
        self, series: Sequence[Series], width: int, height: int, *, max_x: float = 1.0, warmup_x: float = 0.0,
        axis: Axis = ENV_STEPS, window: int = SMOOTHING_STEPS,
    ) -> None:  # fmt: skip
        self.series, self.width, self.height, self.axis = series, width, height, axis
        self.warmup_x, self.window = warmup_x, window
        self.left, self.right, self.top, self.bottom = 40, width - 14, 12, height - 40
        shown = [axis.value(p) for s in series for p in s.points] + [
            at for s in series for at, _, _ in s.greedy
        ]
        self.max_x = max([max_x, 1, *shown])

    def x(self, value: float) -> float:
        """Horizontal position of a value."""
        return self.left + (self.right - self.left) * value / self.max_x

    def y(self, rate: float) -> float:
        """Vertical position of a success rate."""
        return self.bottom - (self.bottom - self.top) * rate

    def axes(self) -> str:
        """Grid lines, tick labels and the axis title."""
        parts = rate_axis(self.left, self.right, self.y)
        step, tick = axis_step(self.max_x, 6 if self.width > 500 else 4), 0.0
        while tick <= self.max_x:
            parts.append(
                f'<text x="{self.x(tick):.1f}" y="{self.bottom + 17}" text-anchor="middle">{short_number(tick)}</text>'
            )
            tick += step
        middle = (self.left + self.right) / 2
        parts.append(
            f'<text x="{middle:.1f}" y="{self.height - 6}" text-anchor="middle">{self.axis.title}</text>'
        )
        return "".join(parts)

    def warmup(self) -> str:
        """Shade the steps in which only the critic learns."""
        if self.warmup_x <= 0:
            return ""
        width = self.x(self.warmup_x) - self.left
        return (
            f'<rect x="{self.left}" y="{self.top}" width="{width:.1f}" height="{self.bottom - self.top}" '
            'fill="var(--shade)"><title>critic warm-up: the policy does not change</title></rect>'
        )

    def dots(self, series: Series) -> str:
        """Draw each step's rate as a faint dot."""
        return "".join(
            f'<circle cx="{self.x(self.axis.value(p)):.1f}" cy="{self.y(p.success_rate):.1f}" r="2" '
            f'fill="{series.colour}" opacity=".45"><title>{p.env_steps} steps: {percent(p.success_rate)} of '
            f"{p.num_episodes} episodes</title></circle>"
            for p in series.points
            if p.num_episodes
        )

    def line(self, series: Series) -> str:
        """Draw the running mean."""
        smoothed = smooth(series.points, self.window, self.axis)
        points = " ".join(f"{self.x(x):.1f},{self.y(rate):.1f}" for x, rate in smoothed)
        return (
            f'<polyline points="{points}" fill="none" stroke="{series.colour}" stroke-width="2">'
            f"<title>{html.escape(series.label)}</title></polyline>"
        )

    def greedy(self, at: float, rate: Rate, colour: str) -> str:
        """Draw one greedy evaluation with its interval."""
        x, label = self.x(at), f"{rate.name}: {percent(rate.value)} of {rate.episodes} episodes"
        return (
            f'<path d="M{x:.1f} {self.y(rate.low):.1f}V{self.y(rate.high):.1f}" stroke="{colour}" stroke-width="2"/>'
            f'<circle cx="{x:.1f}" cy="{self.y(rate.value):.1f}" r="5" fill="{colour}" stroke="var(--card)" '
            f'stroke-width="2"><title>{html.escape(label)}</title></circle>'
        )

    def content(self) -> str:
        """All but the svg tag."""
        parts = [self.warmup(), self.axes()]
        if len(self.series) == 1:
            parts.append(self.dots(self.series[0]))
        parts += [self.line(series) for series in self.series]
        parts += [self.greedy(*mark) for series in self.series for mark in series.greedy]
        return "".join(parts)

    def svg(self) -> str:
        """Return the whole plot."""
        return svg(self.width, self.height, f"success rate by {self.axis.title}", self.content())


def rate_axis(left: float, right: float, y: Callable[[float], float]) -> list[str]:
    """Grid lines and labels of a success rate's axis."""
    parts = []
    for rate in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(f'<path d="M{left} {y(rate):.1f}H{right}" stroke="var(--grid)"/>')
        parts.append(
            f'<text x="{left - 6}" y="{y(rate) + 4:.1f}" text-anchor="end">{rate:.0%}</text>'
        )
    return parts


def svg(width: float, height: float, label: str, content: str, attributes: str = "") -> str:
    """The svg element."""
    label = html.escape(label)
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{label}"{attributes}>{content}</svg>'


def bars(rates: Sequence[Rate], colours: Sequence[str], width: int, height: int) -> str:
    """Success rates as bars with their intervals, each named below and with its rate above: content of an svg."""
    left, top, bottom = 40.0, 12.0, height - 40.0

    def y(rate: float) -> float:
        return bottom - (bottom - top) * rate

    parts, space = rate_axis(left, width, y), (width - left) / max(1, len(rates))
    bar = min(80.0, 0.55 * space)
    for i, (rate, colour) in enumerate(zip(rates, colours, strict=True)):
        x = left + (i + 0.5) * space
        parts.append(
            f'<rect x="{x - bar / 2:.1f}" y="{y(rate.value):.1f}" width="{bar:.1f}" '
            f'height="{bottom - y(rate.value):.1f}" rx="3" fill="{colour}"><title>{html.escape(rate.name)}: '
            f"{rate.successes} of {rate.episodes}</title></rect>"
            f'<path d="M{x:.1f} {y(rate.low):.1f}V{y(rate.high):.1f}" stroke="var(--ink)" stroke-width="1.5"/>'
            f'<text x="{x:.1f}" y="{max(top + 2, y(rate.high) - 6):.1f}" text-anchor="middle" class="strong">'
            f"{percent(rate.value)}</text>"
            f'<text x="{x:.1f}" y="{bottom + 17:.1f}" text-anchor="middle">{html.escape(rate.name)}</text>'
        )
    return "".join(parts)


def standalone(width: float, height: float, label: str, content: str) -> str:
    """An SVG file's text: a drawing with colours and font of its own, and a background; no CSS variables are left."""
    style = (
        f"<style>text{{fill:{PALETTE['--muted']};font:12px system-ui,sans-serif}}"
        f".strong{{fill:{PALETTE['--ink']};font-weight:600}}</style>"
    )
    background = f'<rect width="{width:g}" height="{height:g}" fill="{PALETTE["--card"]}"/>'
    content = re.sub(r"var\((--\w+)\)", lambda match: PALETTE[match[1]], content)
    size = f' xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}"'
    return svg(width, height, label, style + background + content, size) + "\n"


def shifted(content: str, x: float, y: float = 0.0) -> str:
    """Content moved by so many pixels."""
    return f'<g transform="translate({x:g} {y:g})">{content}</g>'
