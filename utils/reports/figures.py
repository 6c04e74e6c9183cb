"""Success rates as figures: learning curves with greedy evaluations, and bars with intervals.

Figures are drawn with matplotlib on a transparent background, in colours that are readable on a
light and on a dark page.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, PercentFormatter

SMOOTHING_STEPS = 5
BEFORE, AFTER, INK, GRID = "#8d8b84", "#2a78d6", "#7a7972", "#9a998f"
COLOURS = (
    "#2a78d6", "#eb6834", "#1baf7a", "#c98500", "#d55181", "#008300", "#7a6ae0", "#e34948",
)  # fmt: skip


@dataclass(frozen=True)
class Rate:
    """A success rate with its count and 95 % interval."""

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
    """Success of the sampled training episodes that ended in one training step.

    Attributes:
        env_steps: environment steps so far.
        success_rate: 0..1.
        num_episodes: episodes behind the rate.
        seconds: training time so far.
    """

    env_steps: int
    success_rate: float
    num_episodes: int
    seconds: float = 0.0


@dataclass(frozen=True)
class Series:
    """One run's learning curve with its greedy evaluations, each as (x, rate, colour)."""

    label: str
    colour: str
    points: tuple[CurvePoint, ...]
    greedy: tuple[tuple[float, Rate, str], ...] = ()


@dataclass(frozen=True)
class Axis:
    """The x axis of a learning curve."""

    title: str
    value: Callable[[CurvePoint], float]


ENV_STEPS = Axis("environment steps", lambda point: float(point.env_steps))
MINUTES = Axis("minutes of training, without start-up", lambda point: point.seconds / 60)


def percent(rate: float) -> str:
    """Format 0.934 as `93.4 %`."""
    return f"{100 * rate:.1f} %"


def series_colour(index: int) -> str:
    """Return the colour of the index-th series; grey when the palette is used up."""
    return COLOURS[index] if index < len(COLOURS) else BEFORE


def smooth(
    points: Sequence[CurvePoint], window: int, axis: Axis = ENV_STEPS
) -> list[tuple[float, float]]:
    """Return (x, rate) averaged over each point and the `window - 1` before it.

    The mean is weighted by episodes. Steps in which no episode ended are skipped.
    """
    smoothed = []
    for i, point in enumerate(points):
        recent = points[max(0, i + 1 - window) : i + 1]
        episodes = sum(p.num_episodes for p in recent)
        if episodes and point.num_episodes:
            rate = sum(p.success_rate * p.num_episodes for p in recent) / episodes
            smoothed.append((axis.value(point), rate))
    return smoothed


def learning_curves(
    series: Sequence[Series],
    *,
    axis: Axis = ENV_STEPS,
    max_x: float = 1.0,
    warmup_x: float = 0.0,
    window: int = SMOOTHING_STEPS,
) -> Figure:
    """Plot success rates over environment steps or time.

    Args:
        series: the curves. With a single one, each training step's own rate is drawn as a dot.
        axis: the x axis.
        max_x: the axis reaches at least this far, and to every point and evaluation.
        warmup_x: only the critic trains up to here; this part is shaded.
        window: training steps in the moving average.
    """
    figure, ax = _new_figure(8, 3.4)
    draw_learning_curves(ax, series, axis=axis, max_x=max_x, warmup_x=warmup_x, window=window)
    return figure


def draw_learning_curves(
    ax: Axes,
    series: Sequence[Series],
    *,
    axis: Axis = ENV_STEPS,
    max_x: float = 1.0,
    warmup_x: float = 0.0,
    window: int = SMOOTHING_STEPS,
) -> None:
    """Draw `learning_curves` into existing axes."""
    if warmup_x > 0:
        ax.axvspan(0, warmup_x, color=GRID, alpha=0.2, lw=0)
    for one in series:
        line = smooth(one.points, window, axis)
        if len(series) == 1:
            dots = [p for p in one.points if p.num_episodes]
            x, y = [axis.value(p) for p in dots], [p.success_rate for p in dots]
            ax.plot(x, y, ".", color=one.colour, alpha=0.45, ms=5)
        ax.plot([x for x, _ in line], [y for _, y in line], color=one.colour, label=one.label)
        for at, rate, colour in one.greedy:
            error = [[rate.value - rate.low], [rate.high - rate.value]]
            ax.errorbar(at, rate.value, yerr=error, fmt="o", color=colour, ms=7, clip_on=False)
    ends = [axis.value(p) for one in series for p in one.points]
    ends += [x for one in series for x, _, _ in one.greedy]
    ax.set_xlim(0, 1.01 * max([max_x, *ends]))
    ax.set_xlabel(axis.title)
    if axis is ENV_STEPS:
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))


def rate_bars(rates: Sequence[Rate], colours: Sequence[str]) -> Figure:
    """Plot success rates as bars with their 95 % intervals."""
    figure, ax = _new_figure(max(8.0, 1.3 * len(rates)), 3.4)
    draw_rate_bars(ax, rates, colours)
    return figure


def draw_rate_bars(ax: Axes, rates: Sequence[Rate], colours: Sequence[str]) -> None:
    """Draw `rate_bars` into existing axes."""
    for i, (rate, colour) in enumerate(zip(rates, colours, strict=True)):
        ax.bar(i, rate.value, width=0.5, color=colour)
        error = [[rate.value - rate.low], [rate.high - rate.value]]
        ax.errorbar(i, rate.value, yerr=error, color=INK, capsize=3)
        ax.text(i, min(rate.high + 0.02, 1.0), percent(rate.value), ha="center", color=INK)
    ax.set_xticks(range(len(rates)), [rate.name for rate in rates])
    ax.set_xlim(-0.6, max(len(rates), 4) - 0.4)


def comparison(
    rates: Sequence[Rate], colours: Sequence[str], series: Sequence[Series], window: int
) -> Figure:
    """Plot bars and learning curves side by side, for a README."""
    figure, (left, right) = _new_figure(11, 3.8, columns=2)
    episodes = rates[0].episodes if rates else 0
    left.set_title(f"greedy success on {episodes} fixed episodes", color=INK)
    draw_rate_bars(left, rates, colours)
    right.set_title("success while training (sampled actions)", color=INK)
    draw_learning_curves(right, series, window=window)
    return figure


def to_svg(figure: Figure, label: str) -> str:
    """Return the figure as an `<svg>` element that scales with the page and needs no other file.

    Args:
        figure: what to write.
        label: description for screen readers.
    """
    buffer = io.StringIO()
    # No date and a fixed salt for ids: the same data give the same bytes.
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Title": label})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _new_figure(width: float, height: float, columns: int = 1) -> tuple[Figure, Any]:
    """Return a figure of this size in inches with rate axes 0..100 %."""
    import matplotlib

    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "ppo-vla"})
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns)
    for ax in [axes] if columns == 1 else axes:
        ax.set_ylim(0, 1)
        ax.yaxis.set_major_formatter(PercentFormatter(1.0))
        ax.grid(axis="y", color=GRID, alpha=0.3)
        ax.tick_params(colors=INK, length=0)
        ax.xaxis.label.set_color(INK)
        for spine in ax.spines.values():
            spine.set_visible(False)
    return figure, axes
