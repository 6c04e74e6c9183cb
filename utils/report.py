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
from utils.plots import CurvePlot, CurvePoint, Rate, Series, percent, series_colour

TEMPLATE = Path(__file__).with_name("report_template.html")


@dataclass(frozen=True)
class Evaluation:
    """Greedy success of one policy: overall and per task, tasks in the suite's order."""

    label: str
    overall: Rate
    tasks: tuple[Rate, ...]


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


def curve_plot(data: ReportData, width: int, height: int) -> CurvePlot:
    """The learning curve, with the greedy evaluations before and after."""
    before, after = data.before.overall, data.after.overall
    greedy = ((0.0, before, "var(--before)"), (float(data.ppo_env_steps), after, "var(--after)"))
    series = Series("sampled, while training", "var(--c1)", data.curve, greedy)
    return CurvePlot(
        [series], width, height, max_x=data.ppo_env_steps, warmup_x=data.warmup_env_steps
    )


def legend(keys: Sequence[tuple[str, str, str]]) -> str:
    """Keys as (shape: "dot" or "", colour, text)."""
    return "".join(
        f'<span><i class="key {shape}" style="background:{colour}"></i>{html.escape(text)}</span>'
        for shape, colour, text in keys
    )


def curve_legend(data: ReportData) -> str:
    """Keys of the learning curve."""
    return legend([
        ("dot", "var(--before)", f"greedy, {data.before.label}"),
        ("dot", "var(--after)", f"greedy, {data.after.label}"),
        ("", "var(--c1)", "sampled, while training"),
    ])  # fmt: skip


def section(title: str, body: str, note: str = "") -> str:
    """One card of the page; `note` (text) stands below its title."""
    note = f'<p class="note">{html.escape(note)}</p>' if note else ""
    return f"<section><h2>{html.escape(title)}</h2>{note}{body}</section>"


def curve_block(keys: str, wide: str, narrow: str) -> str:
    """A plot in two sizes, of which the page shows the one that fits."""
    return f'<div class="legend">{keys}</div><div class="wide">{wide}</div><div class="narrow">{narrow}</div>'


def table(rows: Sequence[Sequence[str]], head: Sequence[str] = (), kind: str = "") -> str:
    """A table of texts; the first column is the name of the row."""
    lines = (
        [f"<tr>{''.join(f'<th>{html.escape(text)}</th>' for text in head)}</tr>"] if head else []
    )
    lines += [
        f"<tr>{''.join(f'<td>{html.escape(text)}</td>' for text in row)}</tr>" for row in rows
    ]
    return f'<table class="{kind}">{"".join(lines)}</table>'


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
        tile(
            percent(before.value),
            data.before.label,
            f"{before.successes} of {before.episodes} episodes",
        )
        + tile(
            percent(after.value),
            data.after.label,
            f"{gain:+.1f} points, {after.successes} of {after.episodes}",
        )
        + tile(percent(data.merged_success_rate), "merged model", "as a plain model folder")
        + tile(
            format_duration(wall_s), "whole run", f"{data.ppo_env_steps:,} environment steps of PPO"
        )
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
        raise ValueError(
            "the two evaluations are of different tasks: evaluate both on the same suite and task ids"
        )
    scale = '<div class="task"><span></span><div class="scale"><i>0 %</i><i>50 %</i><i>100 %</i></div></div>'
    return "".join(task_row(b, a) for b, a in zip(before.tasks, after.tasks, strict=True)) + scale


def time_block(title: str, seconds: Mapping[str, float]) -> str:
    """One stacked bar with its table: where `title`'s time went."""
    total = sum(seconds.values()) or 1.0
    bar, rows = [], []
    for i, (name, value) in enumerate(seconds.items()):
        colour = series_colour(i)
        label = html.escape(name)
        bar.append(
            f'<div style="flex:{value / total:.4f} 0 0;background:{colour}" title="{label}"></div>'
        )
        rows.append(
            f'<tr><td><i class="key" style="background:{colour}"></i>{label}</td>'
            f"<td>{format_duration(value)}</td><td>{value / total:.0%}</td></tr>"
        )
    return (
        f"<div><p>{html.escape(title)}: {format_duration(sum(seconds.values()))}</p>"
        f'<div class="bar">{"".join(bar)}</div><table>{"".join(rows)}</table></div>'
    )


def video_tag(mp4: bytes, kind: str = "") -> str:
    """An embedded video that plays by itself."""
    source = base64.b64encode(mp4).decode()
    video = f'<video src="data:video/mp4;base64,{source}" autoplay loop muted playsinline controls></video>'
    return f'<div class="{kind}">{video}</div>' if kind else video


def clip_figure(clip: Clip) -> str:
    """One episode with its caption."""
    outcome = (
        '<span class="good">✓ success</span>'
        if clip.success
        else '<span class="bad">✗ failure</span>'
    )
    return (
        f"<figure>{video_tag(clip.mp4)}"
        f"<figcaption>{html.escape(clip.label)}: {outcome}<br>{html.escape(clip.instruction)}</figcaption></figure>"
    )


def clips_section(clips: Sequence[Clip]) -> str:
    """Return the section with the episodes, or nothing if there are none."""
    if not clips:
        return ""
    figures = "".join(clip_figure(clip) for clip in clips)
    note = "The same initial states before and after PPO, greedy actions."
    return section("Episodes", f'<div class="clips">{figures}</div>', note)


def tasks_section(before: Evaluation, after: Evaluation) -> str:
    """Return the section with both policies' success on each task. Raises ValueError if their tasks differ."""
    keys = legend([("dot", "var(--before)", before.label), ("dot", "var(--after)", after.label)])
    note = "Greedy actions on the fixed initial states. The faint bars are 95 % Wilson intervals."
    body = f'<div class="legend">{keys}</div><div class="tasks">{task_rows(before, after)}</div>'
    return section("Success per task", body, note)


def settings_section(settings: Mapping[str, str]) -> str:
    """Return the section with the run's settings."""
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td><code>{html.escape(value)}</code></td></tr>"
        for name, value in settings.items()
    )
    return section("How it was run", f'<table class="settings">{rows}</table>')


def page(title: str, lead: str, tiles_html: str, sections: Sequence[str]) -> str:
    """The whole page as HTML text."""
    return string.Template(TEMPLATE.read_text()).substitute(
        title=html.escape(title),
        lead=html.escape(lead),
        tiles=tiles_html,
        sections="\n".join(filter(None, sections)),
    )


def render_report(data: ReportData) -> str:
    """Return the whole page as HTML text.

    Raises: ValueError if the two evaluations are not of the same tasks.
    """
    times = time_block("Whole run", data.stage_s)
    if data.ppo_phase_s:
        times += time_block("PPO", data.ppo_phase_s)
    warmup = "The shaded steps are the critic's warm-up. " if data.warmup_env_steps > 0 else ""
    note = (
        warmup
        + "Training samples its actions, so its rate is not the greedy one; the line is a mean of 5 steps."
    )
    wide, narrow = curve_plot(data, 800, 320).svg(), curve_plot(data, 360, 270).svg()
    sections = [
        section("Learning curve", curve_block(curve_legend(data), wide, narrow), note),
        tasks_section(data.before, data.after),
        clips_section(data.clips),
        section("Where the time went", f'<div class="two">{times}</div>'),
        settings_section(data.settings),
    ]
    return page(data.title, data.lead, tiles(data), sections)
