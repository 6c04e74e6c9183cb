"""The from-scratch run's page, figure and grid of videos, from what `ppo.scratch_results` reads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppo.run_results import choose_columns, outcomes, ppo_phases, read_evaluation
from ppo.scratch_results import MAIN, SUPERVISED, ScratchRun
from utils.logging_utils import format_duration
from utils.plots import (
    ENV_STEPS,
    MINUTES,
    Axis,
    CurvePlot,
    Rate,
    Series,
    bars,
    percent,
    series_colour,
    shifted,
    standalone,
    svg,
)
from utils.report import (
    curve_block,
    legend,
    page,
    section,
    settings_section,
    table,
    tasks_section,
    tile,
    time_block,
    video_tag,
)
from utils.video_grid import Column, distinct_words, read_video, save_grid

NUM_COLUMNS = 5
WINDOW = 10  # training steps that a curve's line is a mean of
CURVE_WIDTH, FIGURE_HEIGHT = 580, 300


@dataclass(frozen=True)
class Grid:
    """The grid of videos: the mp4, and what must be said about how its episodes were chosen."""

    file: Path
    note: str


def shown_variant(run: ScratchRun) -> str | None:
    """The PPO run that is compared in full: the first evaluated one."""
    return next((name for name in run.variants if (name, MAIN) in run.evaluations), None)


# ---------------------------------------------------------------------------------------------- grid


def make_grid(run: ScratchRun, file: Path) -> Grid | None:
    """Write the grid of videos; None without a policy to compare, or without videos of the same episodes."""
    variant = shown_variant(run)
    if variant is None or (SUPERVISED, MAIN) not in run.evaluations:
        return None
    names = (SUPERVISED, variant)
    videos = [run.videos(name) for name in names]
    before, after = results = [run.evaluations[name, MAIN] for name in names]
    recorded = videos[0].keys() & videos[1].keys()
    chosen = choose_columns(before, after, set(recorded), NUM_COLUMNS)
    if not chosen:
        return None
    episodes = [
        {(e["task_id"], e["init_state_id"]): e for e in result["episodes"]} for result in results
    ]
    captions = distinct_words([task["instruction"] for task in before["per_task"]])
    caption_of = {
        task["task_id"]: text for task, text in zip(before["per_task"], captions, strict=True)
    }
    columns = [
        Column(
            f"{caption_of[key[0]]}, state {key[1]}",
            tuple(
                read_video(v[key], e[key]["length"] + 1)
                for v, e in zip(videos, episodes, strict=True)
            ),
            tuple(e[key]["success"] for e in episodes),
        )
        for key in chosen
    ]
    save_grid(file, columns, (SUPERVISED, f"after PPO ({variant})"))
    return Grid(file, grid_note(chosen, outcomes(before), outcomes(after), len(recorded)))


def grid_note(
    chosen: Sequence[tuple[int, int]],
    before: Mapping[tuple[int, int], bool],
    after: Mapping[tuple[int, int], bool],
    num_recorded: int,
) -> str:
    """How the grid's episodes were chosen, in words."""
    turned = sum(after[key] and not before[key] for key in chosen)
    return (
        "Each column is one task and one of its fixed initial states, the same in both rows: what the policy sees, as "
        f"recorded in the two evaluations. Chosen, not typical: of the {num_recorded} states that both evaluations "
        "recorded (each task's first ones, and some more where they happen to coincide), one per task, and such that "
        f"turned from failure to success where there is one ({turned} of these {len(chosen)}). The table has the rates."
    )


# ---------------------------------------------------------------------------------------------- plots


def make_series(run: ScratchRun, axis: Axis) -> list[Series]:
    """Every variant's learning curve with its greedy evaluations before and after."""
    made = []
    for i, name in enumerate(run.variants):
        points = run.curve(name)
        end, greedy = axis.value(points[-1]) if points else 0.0, []
        for policy, at in ((SUPERVISED, 0.0), (name, end)):
            if (policy, MAIN) in run.evaluations:
                rate = read_evaluation(policy, run.evaluations[policy, MAIN]).overall
                greedy.append(
                    (at, rate, "var(--before)" if policy == SUPERVISED else series_colour(i))
                )
        made.append(Series(name, series_colour(i), points, tuple(greedy)))
    return made


def curve(run: ScratchRun, width: int, height: int, axis: Axis = ENV_STEPS) -> CurvePlot:
    """The learning curves."""
    return CurvePlot(make_series(run, axis), width, height, axis=axis, window=WINDOW)


def policy_rates(run: ScratchRun) -> tuple[list[Rate], list[str]]:
    """Greedy success of the supervised policy and all variants, and their colours."""
    names = [name for name in (SUPERVISED, *run.variants) if (name, MAIN) in run.evaluations]
    rates = [read_evaluation(name, run.evaluations[name, MAIN]).overall for name in names]
    colours = {name: series_colour(i) for i, name in enumerate(run.variants)} | {
        SUPERVISED: "var(--before)"
    }
    return rates, [colours[name] for name in names]


def figure(run: ScratchRun) -> str:
    """An SVG file's text for a README: success before and after as bars, and the learning curves."""
    rates, colours = policy_rates(run)
    split, top = max(320, 60 + 115 * len(rates)), 28
    episodes = rates[0].episodes if rates else 0
    titles = {
        0: f"greedy success on {episodes} fixed episodes",
        split: "success while training (sampled actions)",
    }
    parts = [
        f'<text x="{x + 40}" y="20" class="strong">{text}</text>' for x, text in titles.items()
    ]
    parts.append(shifted(bars(rates, colours, split - 20, FIGURE_HEIGHT), 0, top))
    parts.append(shifted(curve(run, CURVE_WIDTH, FIGURE_HEIGHT).content(), split, top))
    label = f"greedy success on {episodes} fixed episodes before and after PPO, and success while training"
    return standalone(split + CURVE_WIDTH, FIGURE_HEIGHT + top, label, "".join(parts))


# ---------------------------------------------------------------------------------------------- page


def gain_cells(gain: Mapping[str, Any]) -> list[str]:
    """One policy's gain over another in points, and the states that turned."""
    low, high = gain["gain_points_95"]
    turned = f"+{gain['states_turned_to_success']} -{gain['states_turned_to_failure']}"
    return [f"{gain['gain_points']:+.1f} ({low:+.1f} to {high:+.1f})", turned]


def policy_table(policies: Mapping[str, Mapping[str, Any]]) -> str:
    """All policies: success with interval, what they gain over the supervised one, mean length of an episode."""
    rows = []
    for name, policy in policies.items():
        low, high = policy["wilson_95"]
        row = [name, f"{policy['successes']} of {policy['episodes']}", percent(policy["rate"])]
        row += [f"{100 * low:.1f} to {100 * high:.1f}"]
        row += gain_cells(policy) if "gain_points" in policy else ["", ""]
        rows.append([*row, f"{policy['mean_length']:.0f}"])
    head = ("policy", "success", "rate", "95 %", "gain, points (95 %)", "states turned", "steps")
    return table(rows, head)


def pairs_section(pairs: Sequence[Mapping[str, Any]]) -> str:
    """The PPO runs against each other, on the same initial states."""
    if not pairs:
        return ""
    rows = [
        [pair["before"], pair["after"], *gain_cells(pair), f"{pair['mcnemar_p']:.2g}"]
        for pair in pairs
    ]
    note = "p: McNemar's exact test of the states that turned. It says nothing of how much runs differ by their seed."
    return section(
        "Runs against each other",
        table(rows, ("from", "to", "points (95 %)", "states turned", "p")),
        note,
    )


def ppo_table(ppo: Mapping[str, Mapping[str, Any]]) -> str:
    """All PPO runs: what they took."""
    rows = []
    for name, run in ppo.items():
        gpu = run.get("gpu", {})
        changes = ", ".join(f"{k}={v}" for k, v in run["changes"].items()) or "the recipe"
        rows.append([
            f"{name}: {changes}", f"{run['env_steps']:,}", format_duration(run["training_s"]),
            f"{format_duration(run['startup_s'])} in {run['num_pieces']}", f"{run.get('env_steps_per_s', 0):.0f}",
            "; ".join(f"{g['mean_utilization_percent']:.0f} %, {g['peak_memory_gib']:.0f} GiB" for g in gpu.values())
            or "not sampled",
        ])  # fmt: skip
    head = ("PPO run", "env steps", "training", "start-ups", "env steps/s", "each GPU: mean, peak")
    return table(rows, head)


def checks_section(checks: Mapping[str, Any]) -> str:
    """The same policies evaluated otherwise, and the check that training never sees an evaluation's state."""
    if not checks:
        return ""
    titles = {
        "sampled": "Actions sampled at temperature 1, as in training, else the same.",
        "fast": "Drawn fast (no multisampling, no reflections, no redundant physics passes), else the same.",
        "seed": "Another evaluation seed: it moves the fixtures, which the fixed states do not hold; else the same.",
    }
    parts = [
        f"<p>{titles.get(k, k)}</p>{policy_table(v)}" for k, v in checks.items() if k != "held_out"
    ]
    if held_out := checks.get("held_out"):
        parts.append(
            f"<p>Initial states are held out: of {held_out['num_layouts']} random layouts that training drew or may "
            f"draw, none equals one of the fixed states of its task. In the nearest pair an object lies "
            f"{held_out['smallest_distance_mm']:.1f} mm from where the other has it.</p>"
        )
    return section("Checks", "".join(parts))


def _tiles(summary: Mapping[str, Any], variant: str | None) -> str:
    policies = summary["policies"]
    parts = []
    for name in filter(None, (SUPERVISED, variant)):
        if name in policies:
            policy = policies[name]
            gain = f"{policy['gain_points']:+.1f} points, " if "gain_points" in policy else ""
            label = name if name == SUPERVISED else f"after PPO ({name})"
            parts.append(
                tile(
                    percent(policy["rate"]),
                    label,
                    f"{gain}{policy['successes']} of {policy['episodes']}",
                )
            )
    if variant in summary["ppo"]:
        ppo = summary["ppo"][variant]
        parts.append(
            tile(
                format_duration(ppo["training_s"]), "PPO", f"{ppo['env_steps']:,} environment steps"
            )
        )
    total_s = sum(stage["seconds"] for stage in summary["stages"].values())
    state = "complete" if summary["is_complete"] else "not complete yet"
    parts.append(
        tile(format_duration(total_s), "all stages", f"{len(summary['stages'])} of them, {state}")
    )
    return "".join(parts)


def _times(run: ScratchRun, summary: Mapping[str, Any], variant: str | None) -> str:
    seconds: dict[str, float] = {}
    for name, stage in summary["stages"].items():
        kind = name.split(".")[0]
        seconds[kind] = seconds.get(kind, 0.0) + stage["seconds"]
    blocks = time_block("All stages", seconds)
    if variant is not None and variant in summary["ppo"]:
        training_s = summary["ppo"][variant]["training_s"]
        blocks += time_block(
            f"PPO ({variant})", ppo_phases(run.metrics(variant), training_s, "saving and stopping")
        )
    return section(
        "Where the time went", f'<div class="two">{blocks}</div>{ppo_table(summary["ppo"])}'
    )


def _curves(run: ScratchRun) -> str:
    keys = [("", series_colour(i), name) for i, name in enumerate(run.variants)]
    keys.append(("dot", "var(--before)", f"greedy, {SUPERVISED}"))
    parts = [
        curve_block(
            legend(keys), curve(run, 800, 320, axis).svg(), curve(run, 360, 270, axis).svg()
        )
        for axis in (ENV_STEPS, MINUTES)
    ]
    note = (
        f"Lines: success of the sampled training episodes, a mean of {WINDOW} training steps, on the tasks that the "
        "curriculum chose and under training's time limit. Dots: greedy evaluations, with their intervals."
    )
    return section("Learning curve", "".join(parts), note)


def render_page(run: ScratchRun, summary: Mapping[str, Any], grid: Grid | None) -> str:
    """The whole page; parts for which there is nothing yet are left out."""
    variant, suite = shown_variant(run), summary["task_suite_name"]
    rates, colours = policy_rates(run)
    sections = []
    if rates:
        plot = svg(800, 300, "greedy success of each policy", bars(rates, colours, 800, 300))
        note = f"Greedy actions on the same {rates[0].episodes} fixed episodes; intervals are Wilson's."
        sections.append(section("Success", plot + policy_table(summary["policies"]), note))
    if run.variants:
        sections.append(_curves(run))
    if variant is not None and (SUPERVISED, MAIN) in run.evaluations:
        before, after = (run.evaluations[name, MAIN] for name in (SUPERVISED, variant))
        sections.append(
            tasks_section(
                read_evaluation(SUPERVISED, before), read_evaluation(f"PPO ({variant})", after)
            )
        )
    if grid is not None:
        sections.append(
            section("Before and after", video_tag(grid.file.read_bytes(), "grid"), grid.note)
        )
    sections += [
        checks_section(summary["checks"]),
        pairs_section(summary["pairs"]),
        _times(run, summary, variant),
    ]
    settings = {
        f"{stage}.{flag}": str(v)
        for stage, values in summary["recipe"].items()
        for flag, v in values.items()
    }
    sections.append(settings_section(settings))
    lead = (
        "A scripted expert's demonstrations, a small model from random weights fine-tuned on them, then PPO with LoRA, "
        "merged and evaluated. " + " ".join(f"{remark}." for remark in summary["remarks"])
    )
    return page(f"PPO from scratch on {suite}", lead, _tiles(summary, variant), sections)
