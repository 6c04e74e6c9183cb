"""Record a scripted expert and write its episodes as an RLDS directory with LIBERO's features.

    python vla-scripts/make_demos.py --task_suite_name tabletop --output_dir data --num_episodes 500 --seed 0

writes `data/tabletop_no_noops/1.0.0`, which `vla-scripts/finetune.py --data_root_dir data --dataset_name tabletop`
reads. Layouts are random: the fixed initial states that evaluation uses never occur. As in LIBERO's data sets, no-op
steps are dropped and, unless `--keep_failures`, an unsuccessful episode is replaced by another one of its task. The
directory appears under its name only when it is complete.
"""

import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ppo.envs.base import ResetRequest, TaskSuite, get_suite
from prismatic.vla.datasets.mixtures import dataset_dir
from prismatic.vla.datasets.statistics import dataset_statistics
from prismatic.vla.datasets.transforms import get_transform
from prismatic.vla.datasets.writer import Demonstration, drop_noops, write_dataset
from utils.checkpoint_utils import atomic_directory
from utils.logging_utils import get_logger

logger = get_logger(__name__)

# Suites with a scripted expert: the module that has run_expert_episode.
EXPERTS = {"tabletop": "ppo.envs.tabletop_expert"}
# Keeps the layouts apart from other random streams made of the same seed.
_LAYOUTS = 601
# An expert that fails this often in a row cannot supply successful episodes.
MAX_ATTEMPTS = 100
# JPEG's artefacts are as large as the objects below this size.
SMALLEST_JPEG = 160


@dataclass(frozen=True)
class Args:
    """Record a scripted expert and write its episodes as an RLDS directory with LIBERO's features."""

    task_suite_name: str = "tabletop"
    """Task suite to record; it must have a scripted expert (tabletop)."""
    output_dir: str = "data"
    """Data root: the episodes go to OUTPUT_DIR/<task_suite_name>_no_noops/1.0.0."""
    num_episodes: int = 500
    """Episodes to write, >= 1, shared out evenly over the tasks."""
    task_ids: tuple[int, ...] = ()
    """Tasks to record (indices into the suite's instructions); none given: all of them."""
    seed: int = 0
    """Decides layouts, noise and the expert's mistakes; >= 0."""
    imperfection: float = 0.0
    """How badly the expert acts, in [0, 1]; 0 is the best it can. What it means is the expert's to say."""
    image_size: int = 256
    """Side of the recorded images in pixels, 16 to 1024. LIBERO's is 256; a small policy's own size saves resizing."""
    image_format: Literal["auto", "jpeg", "png"] = "auto"
    """How frames are stored: jpeg (LIBERO's; quality 95, 4:4:4), png (exact), or auto: png below 160 pixels."""
    max_env_length: int | None = None
    """Time limit of an episode in environment steps, >= 1; None: the suite's own."""
    keep_failures: bool = False
    """Also write episodes that did not solve their task (False: replace them, as in LIBERO's data)."""
    overwrite: bool = False
    """Replace an existing directory of that name."""


def validate(args: Args) -> list[str]:
    """All problems of the arguments, each naming the value, the rule and the fix; empty if they can work."""
    problems = []
    if args.task_suite_name not in EXPERTS:
        problems.append(
            f"--task_suite_name {args.task_suite_name}: no scripted expert; use one of {', '.join(EXPERTS)}"
        )
    elif bad := [i for i in args.task_ids if not 0 <= i < get_suite(args.task_suite_name).num_tasks]:
        num_tasks = get_suite(args.task_suite_name).num_tasks
        problems.append(f"--task_ids {bad}: {args.task_suite_name} has the tasks 0..{num_tasks - 1}")
    if args.num_episodes < 1:
        problems.append(f"--num_episodes {args.num_episodes} must be at least 1")
    if args.seed < 0:
        problems.append(f"--seed {args.seed} must not be negative")
    if not 0.0 <= args.imperfection <= 1.0:
        problems.append(f"--imperfection {args.imperfection} must lie in [0, 1]")
    if not 16 <= args.image_size <= 1024:
        problems.append(f"--image_size {args.image_size} must lie in 16..1024")
    if args.max_env_length is not None and args.max_env_length < 1:
        problems.append(f"--max_env_length {args.max_env_length} must be at least 1, or left out")
    return problems


def check_output(args: Args) -> list[str]:
    """The problem of an output directory that is there already, if any."""
    target = output_path(args)
    if target.exists() and not args.overwrite:
        return [f"{target} exists: choose another --output_dir, or pass --overwrite to replace it"]
    return []


def output_path(args: Args) -> Path:
    """`<output_dir>/<suite>_no_noops/1.0.0`."""
    return dataset_dir(args.output_dir, f"{args.task_suite_name}_no_noops")


@dataclass
class RecordingStats:
    """What `record` counted on its way."""

    attempts: int = 0
    successes: int = 0
    dropped_steps: int = 0


def record(args: Args, suite: TaskSuite, stats: RecordingStats) -> Iterator[Demonstration]:
    """Yield `num_episodes` demonstrations, tasks in turn.

    Episode i depends on (seed, i) only, so that a longer recording begins with the shorter one. Raises ValueError
    when the expert fails MAX_ATTEMPTS times in a row and failures are not kept.
    """
    expert = importlib.import_module(EXPERTS[suite.name])
    env = suite.make_env(args.image_size, max_steps=args.max_env_length)
    task_ids = args.task_ids or tuple(range(suite.num_tasks))
    for index in range(args.num_episodes):
        task_id = task_ids[index % len(task_ids)]
        for attempt in range(MAX_ATTEMPTS):
            rng = np.random.default_rng((_LAYOUTS, args.seed, index, attempt))
            request = ResetRequest(task_id, init_state_id=None, seed=int(rng.integers(2**31)))
            episode = expert.run_expert_episode(env, request, args.imperfection, rng)
            stats.attempts += 1
            stats.successes += episode.success
            if episode.success or args.keep_failures:
                break
        else:
            raise ValueError(
                f"the expert failed {MAX_ATTEMPTS} times in a row at task {task_id} ({suite.instructions[task_id]!r}) "
                f"with --imperfection {args.imperfection}: lower it, raise --max_env_length, or pass --keep_failures"
            )
        demo = Demonstration(
            episode.images,
            episode.actions,
            episode.states,
            episode.joint_states,
            episode.rewards,
            suite.instructions[task_id],
            f"{suite.name}/seed{args.seed}/episode{index:06d}/task{task_id}",
            terminal=bool(episode.success),
        )
        shorter = drop_noops(demo)
        stats.dropped_steps += len(demo.actions_T7) - len(shorter.actions_T7)
        yield shorter
    env.close()


def main(args: Args) -> None:
    """Record and write. Raises ValueError with all problems of the arguments at once."""
    problems = validate(args) + check_output(args)
    if problems:
        raise ValueError("\n".join(problems))
    suite, target, stats = get_suite(args.task_suite_name), output_path(args), RecordingStats()
    image_format = args.image_format
    if image_format == "auto":
        image_format = "png" if args.image_size < SMALLEST_JPEG else "jpeg"
    description = f"Scripted demonstrations of {suite.name}: {args}"
    with atomic_directory(target, overwrite=args.overwrite) as folder:
        name = target.parent.name
        write_dataset(
            folder,
            name,
            record(args, suite, stats),
            image_size=args.image_size,
            image_format=image_format,
            description=description,
        )
        # Cached in the folder, so that fine-tuning finds it.
        statistics = dataset_statistics(folder, get_transform(name))
    logger.info(
        f"{target}: {statistics['num_trajectories']} episodes, {statistics['num_transitions']} steps "
        f"({stats.dropped_steps} no-op steps dropped); the expert solved {stats.successes} of {stats.attempts}"
    )


if __name__ == "__main__":
    arguments = tyro.cli(Args, description=__doc__, use_underscores=True)
    try:
        main(arguments)
    except ValueError as error:
        logger.error("%s", error)
        sys.exit(2)
