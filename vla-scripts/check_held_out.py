"""Show that LIBERO training never meets an evaluation's initial state: how far its layouts lie from the fixed ones.

    python vla-scripts/check_held_out.py --task_suite_name libero_spatial --data_root_dir data --output held_out.json

Layouts: those that the recorded demonstrations began from, and those that PPO draws (the seeds of its first episodes,
in every task). No image is made, a CPU suffices: about 0.05 s a layout. Exits with status 1 if a layout equals a state.
"""

import json
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ppo.envs.base import get_suite
from ppo.envs.libero_install import SUITES
from ppo.envs.recording import parse_episode_path
from ppo.held_out import check_task, summarize_distances
from utils.command_line import (
    REFUSED,
    Bound,
    bound_problems,
    path_problems,
    raise_problems,
    repeated_problems,
)
from utils.logging_utils import get_logger
from utils.output_folders import output_file_problems

logger = get_logger(__name__)


@dataclass(frozen=True)
class Args:
    """Compare training's initial states with evaluation's."""

    task_suite_name: str = "libero_spatial"
    """A suite of LIBERO."""
    task_ids: tuple[int, ...] = ()
    """Tasks to check. Default: all."""
    data_root_dir: Path | None = None
    """Where the demonstrations <suite>_no_noops lie; default: only PPO's layouts are checked."""
    num_layouts: int = 64
    """PPO's layouts per task, and at most this many of the demonstrations' per task; >= 1."""
    num_envs: int = 32
    """Environments of the PPO run (--local_rollout_batch_size), which its seeds depend on; >= 1."""
    seed: int = 0
    """Seed of the PPO run; >= 0."""
    output: Path | None = None
    """JSON file to write, or an earlier one of this program to replace; default: only the log."""


# Every number that a flag takes, with the reason for a limit that its meaning does not set.
BOUNDS: dict[str, Bound] = {
    "num_layouts": Bound(1, 100_000, reason="layouts of a task; each takes 0.05 s"),
    "num_envs": Bound(1, 4096, reason="the driver's limit"),
    "seed": Bound(0, 1e12, reason="the driver's limit"),
    "task_ids": Bound(0, 1e6, reason="tasks of the suite, from 0 on"),
}


def validate(args: Args) -> None:
    """Raise CommandLineError with everything that cannot work."""
    problems: list[str] = []
    if args.task_suite_name not in SUITES:
        problems.append(f"--task_suite_name {args.task_suite_name}: use one of {', '.join(SUITES)}")
    elif wrong := [
        i for i in args.task_ids if not 0 <= i < get_suite(args.task_suite_name).num_tasks
    ]:
        problems.append(f"--task_ids {wrong}: {args.task_suite_name} has no such tasks")
    problems += bound_problems(args, BOUNDS) + repeated_problems("--task_ids", args.task_ids)
    if args.data_root_dir is not None:
        problems += path_problems("--data_root_dir", args.data_root_dir)
    if args.output is not None:
        problems += output_file_problems("--output", args.output, "num_layouts", "per_task")
    raise_problems(problems)


def demonstration_seeds(args: Args) -> dict[int, list[int]]:
    """Seeds of the recorded episodes' layouts by task. Raises ValueError if one began from a fixed state instead."""
    seeds: dict[int, list[int]] = defaultdict(list)
    if args.data_root_dir is None:
        return seeds
    from prismatic.vla.datasets.mixtures import dataset_dir
    from prismatic.vla.datasets.rlds import iterate_episodes

    for episode in iterate_episodes(
        dataset_dir(str(args.data_root_dir), f"{args.task_suite_name}_no_noops")
    ):
        _, request = parse_episode_path(episode.file_path or "")
        if request.init_state_id is not None:
            raise ValueError(
                f"{args.data_root_dir}: {episode.file_path} began from a fixed state, as evaluations do"
            )
        seeds[request.task_id].append(request.seed)
    return seeds


def main(args: Args) -> int:
    """Check, log and write; returns the exit status."""
    validate(args)
    from ppo.collector import episode_seed
    from ppo.envs.libero import LiberoEnv

    tasks = args.task_ids or tuple(range(get_suite(args.task_suite_name).num_tasks))
    recorded, distances = demonstration_seeds(args), {}
    env = LiberoEnv(args.task_suite_name, 16, images=False, num_steps_wait=0)
    for task_id in tasks:
        # The episodes of all environments in turn; any of them may get any task.
        drawn = [
            episode_seed((args.seed, 0), i % args.num_envs, i // args.num_envs)
            for i in range(args.num_layouts)
        ]
        distances[task_id] = check_task(
            env, task_id, [*recorded[task_id][: args.num_layouts], *drawn]
        )
    env.close()
    summary = {
        "num_demonstrations": sum(map(len, recorded.values())),
        **summarize_distances(distances),
    }
    for part in summary["per_task"]:
        nearest, count = part["smallest_distance_mm"], part["num_layouts"]
        logger.info("task %d: nearest %.1f mm of %d layouts", part["task_id"], nearest, count)
    if args.output is not None:
        args.output.write_text(json.dumps(summary, indent=2) + "\n")
    logger.info("%d layouts, %d equal a fixed state", summary["num_layouts"], summary["num_equal"])
    return int(summary["num_equal"] > 0)


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Args, description=__doc__, use_underscores=True)))
    except ValueError as error:
        logger.error("%s", error)
        sys.exit(REFUSED)
