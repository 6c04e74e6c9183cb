"""How often LIBERO's scripted expert succeeds, and how many steps it takes: physics only, nothing is drawn.

    python benchmarks/libero_expert.py --min_rate 0.95                          libero_spatial, all fixed initial states
    python benchmarks/libero_expert.py --task_suite_name libero_goal
    python benchmarks/libero_expert.py --init_states random --num_episodes 20   random layouts

Prints one table: a row per task and a total with its 95 % Wilson interval. Exit status 1 if the total is below
--min_rate.
"""

import itertools
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ppo.envs.base import ResetRequest
from ppo.envs.libero import LiberoEnv
from ppo.envs.libero_expert import EXPERT_TASKS, run_expert_episode
from ppo.envs.libero_install import NUM_INIT_STATES, instruction, task_names
from ppo.evaluation import EpisodeResult, summarize

_PUSHES = 733
"""Keeps the pushes of imperfect episodes apart from other random streams made of the same seed."""


@dataclass(frozen=True)
class Args:
    """Count the scripted expert's successes."""

    task_suite_name: Literal["libero_spatial", "libero_goal"] = "libero_spatial"
    """Suite."""
    task_ids: tuple[int, ...] = ()
    """Tasks; none: all that the expert can do."""
    init_states: Literal["fixed", "random"] = "fixed"
    """LIBERO's fixed initial states, or layouts drawn at random."""
    num_episodes: int = NUM_INIT_STATES
    """Episodes of each task; with fixed initial states the first so many of the 50."""
    imperfection: float = 0.0
    """How often the expert is pushed off its way, 0 to 1."""
    haste: float = 0.0
    """How often it drops what it carries short of its place, 0 to 1."""
    seed: int = 0
    """Decides the random layouts, the poses of cabinet and stove, and the pushes."""
    max_env_length: int | None = None
    """Step limit; none: the suite's."""
    exact: bool = False
    """Simulate bit for bit as in evaluation, at a quarter of the speed."""
    num_processes: int = max(1, (os.cpu_count() or 2) // 2)
    """Processes that play episodes."""
    min_rate: float | None = None
    """Exit status 1 if fewer of the episodes than this succeed, 0 to 1."""


def requests_of(args: Args) -> list[ResetRequest]:
    """The episodes, task by task. Raises ValueError for tasks or states that are not there."""
    tasks = args.task_ids or EXPERT_TASKS[args.task_suite_name]
    if args.init_states == "fixed" and args.num_episodes > NUM_INIT_STATES:
        raise ValueError(
            f"--num_episodes {args.num_episodes}: a task has {NUM_INIT_STATES} fixed initial states"
        )
    return [
        ResetRequest(
            task, index if args.init_states == "fixed" else None, args.seed * 100_000 + index
        )
        for task, index in itertools.product(tasks, range(args.num_episodes))
    ]


def play(args: Args, requests: Sequence[ResetRequest]) -> list[EpisodeResult]:
    """Play episodes in this process."""
    quality: Literal["eval", "fast"] = "eval" if args.exact else "fast"
    env = LiberoEnv(
        args.task_suite_name, 16, args.max_env_length, render_quality=quality, images=False
    )
    results = []
    for request in requests:
        rng = np.random.default_rng((_PUSHES, request.task_id, request.seed))
        episode = run_expert_episode(env, request, args.imperfection, rng, haste=args.haste)
        length = len(episode.actions)
        results.append(
            EpisodeResult(
                request.task_id,
                request.init_state_id,
                request.seed,
                episode.success,
                length,
                float(episode.success),
            )
        )
    env.close()
    return results


def play_all(args: Args) -> list[EpisodeResult]:
    """Play all episodes, part of a task at a time in whichever process is free."""
    requests = requests_of(args)
    size = max(1, args.num_episodes // max(1, args.num_processes))
    chunks = [requests[start : start + size] for start in range(0, len(requests), size)]
    if args.num_processes == 1:
        return play(args, requests)
    with multiprocessing.get_context("spawn").Pool(args.num_processes) as pool:
        parts = pool.starmap(play, [(args, chunk) for chunk in chunks], chunksize=1)
    return [result for part in parts for result in part]


def row(results: Sequence[EpisodeResult]) -> tuple[str, ...]:
    """Cells: successes, rate with interval, mean and longest steps of the successes."""
    summary = summarize(results)
    low, high = summary["wilson_95"]
    steps = [result.length for result in results if result.success]
    return (
        f"{summary['successes']}/{summary['episodes']}",
        f"{summary['rate']:.3f} ({low:.3f}-{high:.3f})",
        f"{summary['mean_length_success']:.0f}" if steps else "",
        f"{max(steps)}" if steps else "",
    )


def main(args: Args) -> None:
    """Play, print the table, and leave with the status."""
    started = time.perf_counter()
    results = play_all(args)
    seconds = time.perf_counter() - started
    names = task_names(args.task_suite_name)
    num_steps = sum(result.length for result in results)
    title = f"{args.task_suite_name}, {args.init_states} initial states, imperfection {args.imperfection:g}, "
    title += f"haste {args.haste:g}"
    caption = f"{num_steps} steps in {seconds:.0f} s on {args.num_processes} processes"
    table = Table(
        "task",
        "instruction",
        "successes",
        "rate (95 %)",
        "steps",
        "longest",
        title=title,
        caption=caption,
    )
    for task in sorted({result.task_id for result in results}):
        of_task = [result for result in results if result.task_id == task]
        table.add_row(str(task), instruction(names[task]), *row(of_task))
    table.add_section()
    table.add_row("", "total", *row(results))
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    failed = [
        (r.task_id, r.seed if r.init_state_id is None else r.init_state_id)
        for r in results
        if not r.success
    ]
    if failed:
        Console().print(
            f"failed (task, {'state' if args.init_states == 'fixed' else 'seed'}): {failed}"
        )
    if args.min_rate is not None and summarize(results)["rate"] < args.min_rate:
        sys.exit(1)


if __name__ == "__main__":
    main(tyro.cli(Args))
