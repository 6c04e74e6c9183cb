"""The from-scratch run's page, figure and grid of videos, from what `ppo.scratch_results` reads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppo.run_results import choose_columns, outcomes, ppo_phases, read_evaluation
from ppo.scratch_results import MAIN, SUPERVISED, ScratchRun
from utils.logging_utils import format_duration
from utils.reports import figures
from utils.reports.figures import ENV_STEPS, MINUTES, Axis, Rate, Series, percent, series_colour
from utils.reports.page import (
    Block,
    Clip,
    Clips,
    Key,
    Page,
    Plot,
    Section,
    Table,
    TaskRates,
    Tile,
    TimeSplit,
    rate_tiles,
    render,
    settings_table,
)
from utils.reports.videos import Column, distinct_words, read_video, save_grid

NUM_COLUMNS = 5
WINDOW = 10  # training steps in a curve's moving average


@dataclass(frozen=True)
class Grid:
    """The grid of videos, and how its episodes were chosen."""

    file: Path
    note: str


def shown_variant(run: ScratchRun) -> str | None:
    """The PPO run that is compared in full: the first evaluated one."""
    return next((name for name in run.variants if (name, MAIN) in run.evaluations), None)


# ------------------------------------------------------------------------------------------- grid


def make_grid(run: ScratchRun, file: Path) -> Grid | None:
    """Write the grid of videos; None without two policies that have videos of the same episodes."""
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
    episodes = [{(e["task_id"], e["init_state_id"]): e for e in r["episodes"]} for r in results]
    captions = distinct_words([task["instruction"] for task in before["per_task"]])
    tasks = zip(before["per_task"], captions, strict=True)
    caption_of = {task["task_id"]: caption for task, caption in tasks}
    columns = []
    for key in chosen:
        pairs = list(zip(videos, (e[key] for e in episodes), strict=True))
        frames = tuple(read_video(files[key], e["length"] + 1) for files, e in pairs)
        successes = tuple(e["success"] for _, e in pairs)
        columns.append(Column(f"{caption_of[key[0]]}, state {key[1]}", frames, successes))
    save_grid(file, columns, (SUPERVISED, f"after PPO ({variant})"))
    return Grid(file, grid_note(chosen, outcomes(before), outcomes(after), len(recorded)))


def grid_note(
    chosen: Sequence[tuple[int, int]],
    before: Mapping[tuple[int, int], bool],
    after: Mapping[tuple[int, int], bool],
    num_recorded: int,
) -> str:
    """Say how the grid's episodes were chosen."""
    turned = sum(after[key] and not before[key] for key in chosen)
    return (
        "Each column shows one task from one of its fixed initial states, the same in both rows, "
        "as the policy sees it. The columns are chosen, not typical: one per task from the "
        f"{num_recorded} states that both evaluations recorded, preferring states that PPO turned "
        f"from failure to success ({turned} of these {len(chosen)}). The table has the rates."
    )


# ------------------------------------------------------------------------------------------ plots


def make_series(run: ScratchRun, axis: Axis) -> list[Series]:
    """Every variant's learning curve with its greedy evaluations before and after."""
    made = []
    for i, name in enumerate(run.variants):
        points = run.curve(name)
        end, greedy = axis.value(points[-1]) if points else 0.0, []
        for policy, at in ((SUPERVISED, 0.0), (name, end)):
            if (policy, MAIN) in run.evaluations:
                rate = read_evaluation(policy, run.evaluations[policy, MAIN]).overall
                colour = figures.BEFORE if policy == SUPERVISED else series_colour(i)
                greedy.append((at, rate, colour))
        made.append(Series(name, series_colour(i), points, tuple(greedy)))
    return made


def policy_rates(run: ScratchRun) -> tuple[list[Rate], list[str]]:
    """Greedy success of the supervised policy and all variants, and their colours."""
    names = [name for name in (SUPERVISED, *run.variants) if (name, MAIN) in run.evaluations]
    rates = [read_evaluation(name, run.evaluations[name, MAIN]).overall for name in names]
    colours = {name: series_colour(i) for i, name in enumerate(run.variants)}
    return rates, [colours.get(name, figures.BEFORE) for name in names]


def figure(run: ScratchRun) -> str:
    """Return an SVG file for a README: success before and after as bars, and the curves."""
    rates, colours = policy_rates(run)
    plot = figures.comparison(rates, colours, make_series(run, ENV_STEPS), WINDOW)
    return figures.to_svg(plot, "success before and after PPO, and while training")


# ------------------------------------------------------------------------------------------- page


def gain_cells(gain: Mapping[str, Any]) -> tuple[str, str]:
    """One policy's gain over another in points, and the states that changed."""
    low, high = gain["gain_points_95"]
    turned = f"+{gain['states_turned_to_success']} -{gain['states_turned_to_failure']}"
    return f"{gain['gain_points']:+.1f} ({low:+.1f} to {high:+.1f})", turned


def policy_table(policies: Mapping[str, Mapping[str, Any]], caption: str = "") -> Table:
    """All policies: success with interval, gain over the supervised one, mean episode length."""
    rows = []
    for name, policy in policies.items():
        low, high = policy["wilson_95"]
        gain = gain_cells(policy) if "gain_points" in policy else ("", "")
        rows.append((
            name, f"{policy['successes']} of {policy['episodes']}", percent(policy["rate"]),
            f"{100 * low:.1f} to {100 * high:.1f}", *gain, f"{policy['mean_length']:.0f}",
        ))  # fmt: skip
    head = ("policy", "success", "rate", "95 %", "gain, points (95 %)", "states changed", "steps")
    return Table(tuple(rows), head, caption)


def ppo_table(ppo: Mapping[str, Mapping[str, Any]]) -> Table:
    """All PPO runs: environment steps, time, speed and GPU use."""
    rows = []
    for name, run in ppo.items():
        gpus = run.get("gpu", {}).values()
        use = (
            f"{g['mean_utilization_percent']:.0f} %, {g['peak_memory_gib']:.0f} GiB" for g in gpus
        )
        changes = ", ".join(f"{k}={v}" for k, v in run["changes"].items()) or "the recipe"
        rows.append((
            f"{name}: {changes}", f"{run['env_steps']:,}", format_duration(run["training_s"]),
            f"{format_duration(run['startup_s'])} in {run['num_pieces']}",
            f"{run.get('env_steps_per_s', 0):.0f}", "; ".join(use) or "not sampled",
        ))  # fmt: skip
    head = ("PPO run", "env steps", "training", "start-ups", "env steps/s", "GPU: mean, peak")
    return Table(tuple(rows), head)


CHECK_TITLES = {
    "sampled": "Actions sampled at temperature 1, as in training; otherwise the same.",
    "fast": "Fast drawing without multisampling and reflections; otherwise the same.",
    "seed": "Another evaluation seed, which moves the fixtures that the fixed states do not hold.",
}


def checks_section(checks: Mapping[str, Any]) -> Section:
    """The same policies under other evaluation settings, and the check of the initial states."""
    blocks: list[Block] = [
        policy_table(policies, CHECK_TITLES.get(kind, kind))
        for kind, policies in checks.items()
        if kind != "held_out"
    ]
    note = ""
    if held_out := checks.get("held_out"):
        distance = f"{held_out['smallest_distance_mm']:.1f} mm"
        blocks.append(Table(
            (("random layouts compared", str(held_out["num_layouts"])),
             ("layouts equal to a fixed state", str(held_out["num_equal"])),
             ("distance between the objects of the nearest pair", distance)),
            caption="Training never starts from an evaluation state.",
        ))  # fmt: skip
    return Section("Checks", blocks, note)


def pairs_section(pairs: Sequence[Mapping[str, Any]]) -> Section:
    """The PPO runs compared with each other on the same initial states."""
    rows = tuple(
        (pair["before"], pair["after"], *gain_cells(pair), f"{pair['mcnemar_p']:.2g}")
        for pair in pairs
    )
    head = ("from", "to", "points (95 %)", "states changed", "p")
    note = (
        "p: McNemar's exact test of the states that changed. It does not cover the spread between "
        "seeds."
    )
    return Section("Runs against each other", [Table(rows, head)] if rows else [], note)


def headline(summary: Mapping[str, Any], run: ScratchRun, variant: str | None) -> list[Tile]:
    """Success before and after, PPO's cost, and the whole run's."""
    tiles = []
    if variant is not None and (SUPERVISED, MAIN) in run.evaluations:
        tiles += rate_tiles(*_before_and_after(run, variant))
    if variant is not None and variant in summary["ppo"]:
        ppo = summary["ppo"][variant]
        detail = f"{ppo['env_steps']:,} environment steps"
        tiles.append(Tile(format_duration(ppo["training_s"]), "PPO", detail))
    total_s = sum(stage["seconds"] for stage in summary["stages"].values())
    state = "complete" if summary["is_complete"] else "not complete yet"
    stages = f"{len(summary['stages'])} stages, {state}"
    return [*tiles, Tile(format_duration(total_s), "all stages", stages)]


def _before_and_after(run: ScratchRun, variant: str) -> tuple[Any, Any]:
    before, after = (run.evaluations[name, MAIN] for name in (SUPERVISED, variant))
    return read_evaluation(SUPERVISED, before), read_evaluation(f"PPO ({variant})", after)


def times_section(run: ScratchRun, summary: Mapping[str, Any], variant: str | None) -> Section:
    """Seconds of all stages by kind, and of the shown PPO run by phase."""
    seconds: dict[str, float] = {}
    for name, stage in summary["stages"].items():
        kind = name.split(".")[0]
        seconds[kind] = seconds.get(kind, 0.0) + stage["seconds"]
    blocks: list[Block] = [TimeSplit("All stages", seconds)]
    if variant is not None and variant in summary["ppo"]:
        training_s = summary["ppo"][variant]["training_s"]
        phases = ppo_phases(run.metrics(variant), training_s, "saving and stopping")
        blocks.append(TimeSplit(f"PPO ({variant})", phases))
    return Section("Where the time went", [*blocks, ppo_table(summary["ppo"])])


def curves_section(run: ScratchRun) -> Section:
    """The learning curves over environment steps and over time."""
    keys = [Key(name, series_colour(i)) for i, name in enumerate(run.variants)]
    keys.append(Key(f"greedy, {SUPERVISED}", figures.BEFORE, is_dot=True))
    blocks = []
    for axis in (ENV_STEPS, MINUTES):
        plot = figures.learning_curves(make_series(run, axis), axis=axis, window=WINDOW)
        svg = figures.to_svg(plot, f"success while training over {axis.title}")
        blocks.append(Plot(svg, tuple(keys)))
    note = (
        f"Lines: success of the sampled training episodes, averaged over {WINDOW} training steps, "
        "on the tasks that the curriculum chose and under training's time limit. Dots: greedy "
        "evaluations with their intervals."
    )
    return Section("Learning curve", blocks if run.variants else [], note)


def success_section(run: ScratchRun, summary: Mapping[str, Any]) -> Section:
    """Greedy success of all policies."""
    rates, colours = policy_rates(run)
    if not rates:
        return Section("Success", [])
    svg = figures.to_svg(figures.rate_bars(rates, colours), "greedy success of each policy")
    episodes = rates[0].episodes
    note = f"Greedy actions on the same {episodes} fixed episodes, with 95 % Wilson intervals."
    return Section("Success", [Plot(svg), policy_table(summary["policies"])], note)


def render_page(run: ScratchRun, summary: Mapping[str, Any], grid: Grid | None) -> str:
    """Return the page; parts for which there is nothing yet are left out."""
    variant, suite = shown_variant(run), summary["task_suite_name"]
    tasks: list[Block] = []
    if variant is not None and (SUPERVISED, MAIN) in run.evaluations:
        tasks.append(TaskRates(*_before_and_after(run, variant)))
    video: list[Block] = [Clips((Clip(grid.file.read_bytes()),))] if grid else []
    recipe = {
        f"{stage}.{flag}": str(value)
        for stage, values in summary["recipe"].items()
        for flag, value in values.items()
    }
    lead = (
        "A scripted expert's demonstrations, a small model fine-tuned on them from random weights, "
        "then PPO with LoRA, merged and evaluated. "
    )
    return render(
        Page(
            title=f"PPO from scratch on {suite}",
            lead=lead + " ".join(f"{remark}." for remark in summary["remarks"]),
            tiles=headline(summary, run, variant),
            sections=[
                success_section(run, summary),
                curves_section(run),
                Section("Success per task", tasks, "Greedy actions on the fixed initial states."),
                Section("Before and after", video, grid.note if grid else ""),
                checks_section(summary["checks"]),
                pairs_section(summary["pairs"]),
                times_section(run, summary, variant),
                Section("How it was run", [settings_table(recipe)]),
            ],
        )
    )
