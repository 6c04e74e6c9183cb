"""Record a scripted expert and write its episodes as an RLDS directory with LIBERO's features.

    python vla-scripts/make_demos.py --task_suite_name tabletop --output_dir data --num_episodes 500 --seed 0
    python vla-scripts/make_demos.py --task_suite_name libero_spatial --output_dir data --num_processes 16

writes `data/tabletop_no_noops/1.0.0`, which `vla-scripts/finetune.py --data_root_dir data --dataset_name tabletop`
reads. Layouts are random unless `--init_states fixed`: the fixed initial states that evaluation uses never occur. As
in LIBERO's data sets, no-op steps are dropped and, unless `--keep_failures`, an unsuccessful episode is replaced by
another one of its task.

The directory appears under its name only when it is complete. Finished episodes wait in a hidden folder beside it:
after an interruption the same command goes on with them, and the result is what it would have been without, whatever
`--num_processes`. The episodes' `file_path` says how they started (`ppo.envs.recording.parse_episode_path`).
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ppo.envs.base import get_suite
from ppo.envs.recording import EXPERTS, LIBERO_SUITES, RecordingSettings, expert_tasks
from ppo.envs.recording_pool import RecordingError, record_missing
from prismatic.vla.datasets.mixtures import dataset_dir
from prismatic.vla.datasets.statistics import dataset_statistics
from prismatic.vla.datasets.store import EpisodeStore
from prismatic.vla.datasets.transforms import get_transform
from prismatic.vla.datasets.writer import SMALLEST_JPEG, EncodedDemonstration, write_dataset
from utils.checkpoint_utils import atomic_directory
from utils.command_line import (
    REFUSED,
    Bound,
    CommandLineError,
    bound_problems,
    repeated_problems,
)
from utils.logging_utils import get_logger
from utils.machine import available_memory_gib
from utils.output_folders import (
    DEMONSTRATIONS,
    RECORDING,
    holds_something,
    output_problems,
    removal_problems,
)
from utils.progress import ProgressReport

logger = get_logger(__name__)


@dataclass(frozen=True)
class Args:
    """Record a scripted expert and write its episodes as an RLDS directory with LIBERO's features."""

    task_suite_name: str = "tabletop"
    """Task suite to record; it must have a scripted expert (tabletop, libero_spatial, libero_goal)."""
    output_dir: str = "data"
    """Data root: the episodes go to OUTPUT_DIR/<task_suite_name>_no_noops/1.0.0."""
    num_episodes: int = 500
    """Episodes to write, >= 1, shared out evenly over the tasks."""
    task_ids: tuple[int, ...] = ()
    """Tasks to record (indices into the suite's instructions); none given: all that the expert can do."""
    init_states: Literal["random", "fixed"] = "random"
    """Where episodes start: random layouts, or the suite's fixed initial states in turn, which evaluation uses."""
    seed: int = 0
    """Decides layouts, noise and the expert's mistakes; >= 0."""
    imperfection: float = 0.0
    """How badly the expert acts, in [0, 1]; 0 is the best it can. What it means is the expert's to say."""
    haste: float = 0.0
    """LIBERO only: chance, in [0, 1], that it drops what it carries short of its place, at each step where it could."""
    image_size: int = 256
    """Side of the recorded images in pixels, 16 to 1024. LIBERO's is 256; a small policy's own size saves resizing."""
    image_format: Literal["auto", "jpeg", "png"] = "auto"
    """How frames are stored: jpeg (as LIBERO's: quality 95, 4:2:0; 4:4:4 below 160 pixels), png (exact), or auto: png
    below 160 pixels, jpeg from there on."""
    render_quality: Literal["eval", "fast"] = "eval"
    """LIBERO only: eval draws as LIBERO's own evaluation does; fast without multisampling and reflections."""
    wrist_camera: bool = True
    """LIBERO only: record the wrist camera too, a second drawing at each step; without it that image is black."""
    quick_physics: bool = False
    """LIBERO only: simulate as PPO's environments do, in a quarter of the time: states differ by rounding."""
    env_gpu_id: int | None = None
    """LIBERO only: GPU that draws with EGL, >= 0, by nvidia-smi's number. Default: with MUJOCO_GL=egl the GPUs in
    CUDA_VISIBLE_DEVICES, on which processes take turns, else the CPU (OSMesa)."""
    max_env_length: int | None = None
    """Time limit of an episode in environment steps, >= 1; None: the suite's own."""
    keep_failures: bool = False
    """Also write episodes that did not solve their task (False: replace them, as in LIBERO's data)."""
    num_processes: int = 1
    """Processes that record side by side, 1 to 256. LIBERO needs a core and 1.4 (EGL) to 1.9 GiB for each, and more for
    further tasks."""
    overwrite: bool = False
    """Replace an earlier recording of that name, and episodes of an interrupted one with other settings. Datasets that
    this program did not write stay."""


# Every number that a flag takes, with the reason for a limit that its meaning does not set.
BOUNDS: dict[str, Bound] = {
    "num_episodes": Bound(1, 1_000_000, reason="LIBERO-90 has 4,500; one list entry and file each"),
    "seed": Bound(0, 1e12, reason="a larger one is a slip"),
    "imperfection haste": Bound(0, 1),
    "image_size": Bound(16, 1024, reason="in pixels"),
    "max_env_length": Bound(1, 1_000_000, reason="in environment steps"),
    "env_gpu_id": Bound(0, 1023, reason="a GPU's number, from 0 on; leave it out to draw on the CPU"),
    "num_processes": Bound(1, 256, reason="a simulator in memory each"),
    "task_ids": Bound(0, 1e6, reason="tasks of the suite, from 0 on"),
}  # fmt: skip


def validate(args: Args) -> list[str]:
    """All problems of the arguments, each naming the value, the rule and the fix; empty if they can work."""
    problems = _task_problems(args) + bound_problems(args, BOUNDS)
    problems += repeated_problems("--task_ids", args.task_ids)
    if args.haste > 0 and args.task_suite_name not in LIBERO_SUITES:
        problems.append(
            f"--haste {args.haste} is for LIBERO's expert: {args.task_suite_name}'s has --imperfection"
        )
    return problems


def _task_problems(args: Args) -> list[str]:
    if args.task_suite_name not in EXPERTS:
        return [
            f"--task_suite_name {args.task_suite_name}: no scripted expert; use one of {', '.join(EXPERTS)}"
        ]
    if not args.task_ids:  # a simulator that is not installed shows itself when it is needed
        return []
    suite = get_suite(args.task_suite_name)
    if bad := [i for i in args.task_ids if not 0 <= i < suite.num_tasks]:
        return [f"--task_ids {bad}: {suite.name} has the tasks 0..{suite.num_tasks - 1}"]
    if bad := [i for i in args.task_ids if i not in expert_tasks(suite)]:
        return [
            f"--task_ids {bad}: the expert of {suite.name} can do {', '.join(map(str, expert_tasks(suite)))}"
        ]
    return []


def check_output(args: Args) -> list[str]:
    """Why the episodes cannot go where they should; empty when they can."""
    target, recording = output_path(args), recording_path(args)
    problems = output_problems(
        "--output_dir",
        target,
        DEMONSTRATIONS,
        overwrite=args.overwrite,
        instead="choose another --output_dir",
    )
    if not problems and args.overwrite and holds_something(recording):
        problems = removal_problems("--output_dir", recording, RECORDING)
    return problems


def recording_path(args: Args) -> Path:
    """Hidden folder beside the output, where finished episodes wait."""
    target = output_path(args)
    return target.with_name(f".{target.name}.recording")


def memory_problems(args: Args, memory_gib: float) -> list[str]:
    """The problem of processes that cannot all hold their simulators in `memory_gib`, if it is one."""
    suite = get_suite(args.task_suite_name)
    drawing = {} if args.env_gpu_id is None else {"env_gpu_id": args.env_gpu_id}
    cost = suite.memory_cost(drawing)
    num_processes = min(args.num_processes, args.num_episodes)
    if cost is None or num_processes * (each_gib := cost.least_gib(1, 1)) <= memory_gib:
        return []
    fix = f"use --num_processes {n}" if (n := int(memory_gib / each_gib)) else "free memory"
    return [
        f"--num_processes {args.num_processes}: {num_processes} processes of {suite.name} need at least "
        f"{num_processes * each_gib:.1f} GiB of main memory, available are {memory_gib:.1f} GiB: {fix}"
    ]


def output_path(args: Args) -> Path:
    """`<output_dir>/<suite>_no_noops/1.0.0`."""
    return dataset_dir(args.output_dir, f"{args.task_suite_name}_no_noops")


def settings_of(args: Args) -> RecordingSettings:
    """What decides the episodes, with the defaults that depend on the suite."""
    image_format: str = args.image_format
    if image_format == "auto":
        image_format = "png" if args.image_size < SMALLEST_JPEG else "jpeg"
    return RecordingSettings(
        args.task_suite_name,
        args.task_ids or expert_tasks(get_suite(args.task_suite_name)),
        args.init_states,
        args.seed,
        args.imperfection,
        args.image_size,
        image_format,
        args.max_env_length,
        args.keep_failures,
        args.render_quality,
        args.env_gpu_id,
        args.haste,
        args.wrist_camera,
        args.quick_physics,
    )


class RecordingProgress(ProgressReport):
    """Progress in episodes, with the share of attempts that solved their task."""

    def __init__(self, num_finished: int, num_episodes: int) -> None:
        super().__init__(logger, "episodes", num_episodes, num_done=num_finished)
        self.num_steps = self.attempts = self.successes = 0

    def note(self, index: int, num_steps: int, counts: dict[str, int]) -> None:
        """Episode `index` is finished."""
        self.num_steps += num_steps
        self.attempts += counts["attempts"]
        self.successes += counts["successes"]
        self.advance(
            note=f"{self.successes} of {self.attempts} attempts solved, {self.num_steps} steps"
        )


def write(args: Args, settings: RecordingSettings, store: EpisodeStore) -> None:
    """Write the stored episodes as the RLDS directory, with its statistics, and say what it took."""
    target, totals = (
        output_path(args),
        dict.fromkeys(("attempts", "solved_at_once", "dropped_steps"), 0),
    )

    def demonstrations() -> Iterator[EncodedDemonstration]:
        for index in range(args.num_episodes):
            episode = store.load(index)
            for name in totals:
                totals[name] += episode.counts[name]
            yield episode.demonstration

    with atomic_directory(target, overwrite=args.overwrite) as folder:
        name = target.parent.name
        write_dataset(
            folder,
            name,
            demonstrations(),
            image_size=settings.image_size,
            image_format=settings.image_format,
            description=f"Scripted demonstrations: {settings.identity()}",
        )
        # Cached in the folder, so that fine-tuning finds it.
        statistics = dataset_statistics(folder, get_transform(name))
    logger.info(
        f"{target}: {statistics['num_trajectories']} episodes, {statistics['num_transitions']} steps "
        f"({totals['dropped_steps']} no-op steps dropped); {totals['attempts']} attempts, the expert solved "
        f"{totals['solved_at_once']} of {args.num_episodes} at the first"
    )


def main(args: Args) -> None:
    """Record and write.

    Raises ValueError with all problems of the arguments at once, or when the expert cannot supply episodes, and
    RecordingError when a process dies; finished episodes stay for the next call in both cases.
    """
    problems = validate(args) + check_output(args)
    problems = problems or memory_problems(args, available_memory_gib())
    if problems:
        raise CommandLineError("\n".join(problems))
    settings = settings_of(args)
    store = EpisodeStore(recording_path(args), settings.identity())
    if problems := store.problems():
        if not args.overwrite:
            raise CommandLineError("\n".join(problems))
        store.remove()
    with store.opened():
        wanted = set(range(args.num_episodes))
        finished = store.finished() & wanted
        if finished:
            logger.info(
                f"{len(finished)} of {args.num_episodes} episodes are in {store.folder}: going on from there"
            )
        with RecordingProgress(len(finished), args.num_episodes) as progress:
            record_missing(settings, store, wanted - finished, args.num_processes, progress.note)
        write(args, settings, store)
        store.remove()


if __name__ == "__main__":
    arguments = tyro.cli(Args, description=__doc__, use_underscores=True)
    try:
        main(arguments)
    except ValueError as error:
        logger.error("%s", error)
        sys.exit(REFUSED)
    except (RecordingError, BlockingIOError) as error:
        logger.error("%s\nFinished episodes are kept: the same command goes on from there.", error)
        sys.exit(1)
    except KeyboardInterrupt:
        logger.error("interrupted; finished episodes are kept: the same command goes on from there")
        sys.exit(130)
