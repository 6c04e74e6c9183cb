"""One self-contained HTML page about a run: plain data in, text out. No network, no JavaScript.

The page works on a phone and in light and dark mode; every chart is inline SVG or CSS, every episode an embedded mp4.
"""

import base64
import html
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from utils.logging_utils import format_duration

TEMPLATE = Path(__file__).with_name("report_template.html")
NUM_COLOURS = 8  # --c0 .. --c7 in the template; what is beyond is grey


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
class Evaluation:
    """Greedy success of one policy: overall and per task, tasks in the suite's order."""

    label: str
    overall: Rate
    tasks: tuple[Rate, ...]


@dataclass(frozen=True)
class CurvePoint:
    """Success rate of the sampled training episodes that ended in one training step."""

    env_steps: int
    success_rate: float
    num_episodes: int


@dataclass(frozen=True)
class Clip:
    """One episode to watch: an mp4's bytes (H.264, which every browser plays) with its task and outcome."""

    label: str
    instruction: str
    success: bool
    mp4: bytes


@dataclass(frozen=True)
class ReportData:
    """All that the page shows. Times are in seconds; `ppo_phase_s` splits the PPO stage of `stage_s`."""

    title: str
    lead: str
    before: Evaluation
    after: Evaluation
    merged_success_rate: float
    curve: tuple[CurvePoint, ...]
    warmup_env_steps: int
    ppo_env_steps: int
    stage_s: Mapping[str, float]
    ppo_phase_s: Mapping[str, float]
    clips: tuple[Clip, ...] = ()
    settings: Mapping[str, str] = field(default_factory=dict)


def percent(rate: float) -> str:
    """0.934 -> `93.4 %`."""
    return f"{100 * rate:.1f} %"


def smooth(points: Sequence[CurvePoint], window: int) -> list[tuple[float, float]]:
    """Return (env_steps, rate) averaged over each point and the `window - 1` before it, weighted by episodes."""
    smoothed = []
    for i, point in enumerate(points):
        recent = [p for p in points[max(0, i + 1 - window) : i + 1] if p.num_episodes]
        episodes = sum(p.num_episodes for p in recent)
        if episodes:
            rate = sum(p.success_rate * p.num_episodes for p in recent) / episodes
            smoothed.append((float(point.env_steps), rate))
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


class CurvePlot:
    """The learning curve as SVG of a given size in pixels: x environment steps, y success rate 0..1."""

    def __init__(self, data: ReportData, width: int, height: int) -> None:
        self.data, self.width, self.height = data, width, height
        self.left, self.right, self.top, self.bottom = 40, width - 14, 12, height - 40
        self.max_x = max([data.ppo_env_steps, *(p.env_steps for p in data.curve), 1])

    def x(self, env_steps: float) -> float:
        """Horizontal position of a number of environment steps."""
        return self.left + (self.right - self.left) * env_steps / self.max_x

    def y(self, rate: float) -> float:
        """Vertical position of a success rate."""
        return self.bottom - (self.bottom - self.top) * rate

    def axes(self) -> str:
        """Grid lines, tick labels and the axis title."""
        parts = []
        for rate in (0.0, 0.25, 0.5, 0.75, 1.0):
            y = self.y(rate)
            parts.append(f'<path d="M{self.left} {y:.1f}H{self.right}" stroke="var(--grid)"/>')
            parts.append(f'<text x="{self.left - 6}" y="{y + 4:.1f}" text-anchor="end">{rate:.0%}</text>')
        step, tick = axis_step(self.max_x, 6 if self.width > 500 else 4), 0.0
        while tick <= self.max_x:
            parts.append(
                f'<text x="{self.x(tick):.1f}" y="{self.bottom + 17}" text-anchor="middle">{short_number(tick)}</text>'
            )
            tick += step
        middle = (self.left + self.right) / 2
        parts.append(f'<text x="{middle:.1f}" y="{self.height - 6}" text-anchor="middle">environment steps</text>')
        return "".join(parts)

    def warmup(self) -> str:
        """Shade the steps in which only the critic learns."""
        if self.data.warmup_env_steps <= 0:
            return ""
        width = self.x(self.data.warmup_env_steps) - self.left
        return (
            f'<rect x="{self.left}" y="{self.top}" width="{width:.1f}" height="{self.bottom - self.top}" '
            'fill="var(--shade)"><title>critic warm-up: the policy does not change</title></rect>'
        )

    def line(self, window: int) -> str:
        """Draw each step's rate as a faint dot and the running mean as a line."""
        dots = "".join(
            f'<circle cx="{self.x(p.env_steps):.1f}" cy="{self.y(p.success_rate):.1f}" r="2" fill="var(--c1)" '
            f'opacity=".45"><title>{p.env_steps} steps: {percent(p.success_rate)} of {p.num_episodes} episodes</title>'
            "</circle>"
            for p in self.data.curve
            if p.num_episodes
        )
        points = " ".join(f"{self.x(steps):.1f},{self.y(rate):.1f}" for steps, rate in smooth(self.data.curve, window))
        return f'{dots}<polyline points="{points}" fill="none" stroke="var(--c1)" stroke-width="2"/>'

    def greedy(self, env_steps: float, rate: Rate, colour: str) -> str:
        """Draw one greedy evaluation with its interval."""
        x, label = self.x(env_steps), f"{rate.name}: {percent(rate.value)} of {rate.episodes} episodes"
        return (
            f'<path d="M{x:.1f} {self.y(rate.low):.1f}V{self.y(rate.high):.1f}" stroke="{colour}" stroke-width="2"/>'
            f'<circle cx="{x:.1f}" cy="{self.y(rate.value):.1f}" r="5" fill="{colour}" stroke="var(--card)" '
            f'stroke-width="2"><title>{html.escape(label)}</title></circle>'
        )

    def svg(self, window: int = 5) -> str:
        """Return the whole plot."""
        before, after = self.data.before.overall, self.data.after.overall
        return (
            f'<svg viewBox="0 0 {self.width} {self.height}" role="img" aria-label="success rate by environment steps">'
            + self.warmup()
            + self.axes()
            + self.line(window)
            + self.greedy(0, before, "var(--before)")
            + self.greedy(self.data.ppo_env_steps, after, "var(--after)")
            + "</svg>"
        )


def curve_legend(data: ReportData) -> str:
    """Keys of the learning curve."""
    keys = [
        ("dot", "--before", f"greedy, {data.before.label}"),
        ("dot", "--after", f"greedy, {data.after.label}"),
        ("", "--c1", "sampled, while training"),
    ]
    return "".join(
        f'<span><i class="key {shape}" style="background:var({colour})"></i>{html.escape(text)}</span>'
        for shape, colour, text in keys
    )


def tile(value: str, label: str, detail: str) -> str:
    """One headline figure."""
    value, label, detail = (html.escape(text) for text in (value, label, detail))
    return f'<div class="tile"><span>{label}</span><b>{value}</b><small>{detail}</small></div>'


def tiles(data: ReportData) -> str:
    """Headline figures: success before, after and merged, and what it took."""
    before, after = data.before.overall, data.after.overall
    gain = 100 * (after.value - before.value)
    wall_s = sum(data.stage_s.values())
    return (
        tile(percent(before.value), data.before.label, f"{before.successes} of {before.episodes} episodes")
        + tile(percent(after.value), data.after.label, f"{gain:+.1f} points, {after.successes} of {after.episodes}")
        + tile(percent(data.merged_success_rate), "merged model", "as a plain model folder")
        + tile(format_duration(wall_s), "whole run", f"{data.ppo_env_steps:,} environment steps of PPO")
    )


def task_row(before: Rate, after: Rate) -> str:
    """One task: name, both rates on a 0-100 % track, and the figures."""

    def marks(rate: Rate, kind: str) -> str:
        width = 100 * (rate.high - rate.low)
        return (
            f'<i class="whisker {kind}" style="left:{100 * rate.low:.1f}%;width:{width:.1f}%"></i>'
            f'<i class="mark {kind}" style="left:{100 * rate.value:.1f}%" '
            f'title="{rate.successes} of {rate.episodes}"></i>'
        )

    return (
        f'<div class="task"><span>{html.escape(before.name)}</span>'
        f'<div class="track"><i class="mid"></i>{marks(before, "b")}{marks(after, "a")}</div>'
        f'<span class="rates"><i>{before.value:.0%} →</i> {after.value:.0%}</span></div>'
    )


def task_rows(before: Evaluation, after: Evaluation) -> str:
    """All tasks, in the suite's order.

    Raises: ValueError if the two evaluations are not of the same tasks.
    """
    if [rate.name for rate in before.tasks] != [rate.name for rate in after.tasks]:
        raise ValueError("the two evaluations are of different tasks: evaluate both on the same suite and task ids")
    scale = '<div class="task"><span></span><div class="scale"><i>0 %</i><i>50 %</i><i>100 %</i></div></div>'
    return "".join(task_row(b, a) for b, a in zip(before.tasks, after.tasks, strict=True)) + scale


def time_block(title: str, seconds: Mapping[str, float]) -> str:
    """One stacked bar with its table: where `title`'s time went."""
    total = sum(seconds.values()) or 1.0
    bar, rows = [], []
    for i, (name, value) in enumerate(seconds.items()):
        colour = f"var(--c{i})" if i < NUM_COLOURS else "var(--before)"
        label = html.escape(name)
        bar.append(f'<div style="flex:{value / total:.4f} 0 0;background:{colour}" title="{label}"></div>')
        rows.append(
            f'<tr><td><i class="key" style="background:{colour}"></i>{label}</td>'
            f"<td>{format_duration(value)}</td><td>{value / total:.0%}</td></tr>"
        )
    return (
        f"<div><p>{html.escape(title)}: {format_duration(sum(seconds.values()))}</p>"
        f'<div class="bar">{"".join(bar)}</div><table>{"".join(rows)}</table></div>'
    )


def clip_figure(clip: Clip) -> str:
    """One episode with its caption."""
    source = base64.b64encode(clip.mp4).decode()
    outcome = '<span class="good">✓ success</span>' if clip.success else '<span class="bad">✗ failure</span>'
    return (
        f'<figure><video src="data:video/mp4;base64,{source}" autoplay loop muted playsinline controls></video>'
        f"<figcaption>{html.escape(clip.label)}: {outcome}<br>{html.escape(clip.instruction)}</figcaption></figure>"
    )


def clips_section(clips: Sequence[Clip]) -> str:
    """Return the section with the episodes, or nothing if there are none."""
    if not clips:
        return ""
    figures = "".join(clip_figure(clip) for clip in clips)
    return (
        "<section><h2>Episodes</h2>"
        '<p class="note">The same initial states before and after PPO, greedy actions.</p>'
        f'<div class="clips">{figures}</div></section>'
    )


def render_report(data: ReportData) -> str:
    """Return the whole page as HTML text.

    Raises: ValueError if the two evaluations are not of the same tasks.
    """
    settings = "".join(
        f"<tr><td>{html.escape(name)}</td><td><code>{html.escape(value)}</code></td></tr>"
        for name, value in data.settings.items()
    )
    times = time_block("Whole run", data.stage_s)
    if data.ppo_phase_s:
        times += time_block("PPO", data.ppo_phase_s)
    warmup = "The shaded steps are the critic's warm-up. " if data.warmup_env_steps > 0 else ""
    return string.Template(TEMPLATE.read_text()).substitute(
        title=html.escape(data.title),
        lead=html.escape(data.lead),
        tiles=tiles(data),
        curve_note=warmup
        + "Training samples its actions, so its rate is not the greedy one; the line is a mean of 5 steps.",
        curve_legend=curve_legend(data),
        curve_wide=CurvePlot(data, 800, 320).svg(),
        curve_narrow=CurvePlot(data, 360, 270).svg(),
        before_label=html.escape(data.before.label),
        after_label=html.escape(data.after.label),
        tasks=task_rows(data.before, data.after),
        clips_section=clips_section(data.clips),
        times=times,
        settings=settings,
    )
