"""Replay recorded LIBERO demonstrations from their RLDS directory: how many succeed again, task by task.

    python benchmarks/libero_replay.py --data_root_dir data --dataset_name libero_spatial_no_noops --num_processes 2

Three ways: the stored actions; normalised with the dataset's statistics and back, as a perfect policy's would be; and
also through the 256 values of the action tokens. Physics only, about 2.5 s an episode and way on one core. Exits with
status 1 when fewer than 95 % of the second kind succeed.
"""

import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ppo.envs.replay import Replay, load_replays, play

Way = Literal["stored", "normalised", "tokens"]
WAYS: tuple[Way, ...] = ("stored", "normalised", "tokens")
SMALLEST_RATE = 0.95


@dataclass(frozen=True)
class Args:
    """What to replay."""

    data_root_dir: str = "data"
    """Where the dataset lies: <data_root_dir>/<dataset_name>/1.0.0."""
    dataset_name: str = "libero_spatial_no_noops"
    """Dataset that vla-scripts/make_demos.py wrote."""
    max_episodes: int | None = None
    """Replay the first ones only."""
    ways: tuple[Way, ...] = WAYS
    """Which actions to replay."""
    num_extra_steps: int = 10
    """Repetitions of the last action for `tokens`, whose rounding may make it late."""
    render_quality: Literal["eval", "fast"] = "eval"
    """As the demonstrations were recorded: the two step the physics differently by rounding errors."""
    num_processes: int = 1
    """Processes that replay side by side."""


_environments: dict[str, Any] = {}


def replay(episode: Replay, args: Args) -> dict[str, bool]:
    """Success of one episode for each way; runs in a process that keeps its environment."""
    from ppo.envs.libero import LiberoEnv

    name = episode.suite_name
    if name not in _environments:
        _environments[name] = LiberoEnv(name, 16, images=False, render_quality=args.render_quality)
    actions = dict(
        zip(WAYS, (episode.stored_T7, episode.actions_T7, episode.token_actions_T7), strict=True)
    )
    extra = {"tokens": args.num_extra_steps}
    return {
        way: play(_environments[name], episode.request, actions[way], extra.get(way, 0))
        for way in args.ways
    }


def main(args: Args) -> int:
    """Replay, print the table, and return the exit status."""
    console = Console()
    # By task: a process then needs few simulators.
    episodes = load_replays(args.data_root_dir, args.dataset_name, args.max_episodes)
    episodes.sort(key=lambda episode: episode.request.task_id)
    solved, totals = Counter[tuple[int, str]](), Counter[int]()
    with ProcessPoolExecutor(args.num_processes, mp_context=get_context("spawn")) as pool:
        for episode, successes in zip(
            episodes, pool.map(replay, episodes, [args] * len(episodes)), strict=True
        ):
            task_id = episode.request.task_id
            totals[task_id] += 1
            for way, success in successes.items():
                solved[task_id, way] += success
                if not success:
                    console.print(
                        f"{way}: failed at {episode.request}, {len(episode.stored_T7)} steps"
                    )
    table = Table("task", "episodes", *args.ways)
    for task_id, total in sorted(totals.items()):
        table.add_row(str(task_id), str(total), *[str(solved[task_id, way]) for way in args.ways])
    rates = {way: sum(solved[task, way] for task in totals) / len(episodes) for way in args.ways}
    table.add_row("all", str(len(episodes)), *[f"{rates[way]:.1%}" for way in args.ways])
    console.print(table)
    return int(rates.get("normalised", 1.0) < SMALLEST_RATE)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__, use_underscores=True)))
