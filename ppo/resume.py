"""Going on with a run: what a checkpoint says beside its tensors, which one to take, which flags may differ.

A run's checkpoints are `step_<N>/` after N training steps, and `step_<N>_minibatch_<M>/` where a stop came within the
next step's update. What makes a run go on is in their `training_state/`: `state.json` (below), `rank_<R>.json` and the
tensors. Everything is read before anything starts.
"""

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppo.episodes import RunningEpisode, TrainingEpisode
from ppo.reporting import BestReturn
from ppo.state_checks import read_rank, state_problems
from prismatic.model_files import checksum_problems, is_int, read_json_object
from prismatic.regular_files import file_problems, open_file
from utils.hub import REVISION_FLAGS, identity
from utils.logging_utils import get_logger

logger = get_logger("driver")

FORMAT = 2  # 1 is read, too
STATE_DIR, STATE_FILE = "training_state", "state.json"
# 100,000 steps of 200 metrics.
MAX_METRICS_BYTES = 1 << 30
NAME_PATTERN = re.compile(r"step_(\d+)(?:_minibatch_(\d+))?")

# Flags that a resumed run must have as they were, by what would be wrong.
FIXED_FLAGS = {
    "the saved weights are of it": (
        "vla_path", "load_adapter_checkpoint", "freeze_vision_backbone", "use_lora", "lora_rank", "lora_alpha",
        "value_model_type", "value_use_lora",
    ),
    "the episodes under way were played with it": (
        "task_suite_name", "task_ids", "num_steps_wait", "max_env_length", "render_quality", "center_crop",
    ),
    "actions are decoded with it": ("data_root_dir", "dataset_name"),
    "everything random comes from it": ("seed",),
    "training steps are counted in rollouts of this size": (
        "num_steps", "local_rollout_batch_size", "vllm_num_engines",
    ),
}  # fmt: skip
# Also fixed where the checkpoint is from within an update.
UPDATE_FLAGS = {
    "the update under way is cut by it": (
        "local_mini_batch_size",
        "num_epochs",
        "num_value_epochs",
    ),
}
PATH_FLAGS = ("data_root_dir",)
# Files that a resumed run adds to or writes again.
METRICS_FILE = "metrics.jsonl"
WRITTEN_AGAIN = (METRICS_FILE, "args.json", "log.txt", "curriculum.json", "eval_final.json")
# Differences that mean nothing.
SILENT_FLAGS = (
    "resume", "exp_id", "run_root_dir", "run_id_note", "overwrite",
    *REVISION_FLAGS.values(),  # compared as part of the path that they belong to
)  # fmt: skip


@dataclass(frozen=True)
class Collected:
    """Rollouts of one training step.

    Attributes:
        shards: of each trainer rank, as handed to it; none where the trainers have them already.
        episodes: those that it reports (see `Collector`).
        worker_stats: the workers' statistics.
        metrics: of the weight sync and the evaluation before.
    """

    shards: list[list[Any]]
    episodes: list[TrainingEpisode]
    worker_stats: list[dict[str, float]]
    metrics: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """All but the shards, of plain JSON types."""
        episodes = [dataclasses.asdict(episode) for episode in self.episodes]
        return {"episodes": episodes, "worker_stats": self.worker_stats, "metrics": self.metrics}

    @staticmethod
    def from_json(content: dict[str, Any]) -> "Collected":
        """The result of `to_json`, without shards."""
        episodes = [TrainingEpisode(**episode) for episode in content["episodes"]]
        return Collected([], episodes, content["worker_stats"], content["metrics"])


@dataclass
class RunState:
    """`state.json`: everything of a run that is no tensor.

    Attributes:
        format: of this file.
        step: training steps done.
        num_minibatches: of the next step's update that were done (critic's and policy's); None: it had not begun.
        num_trainers: ranks that wrote the tensors.
        flags: the run's, by name.
        best: the state of `BestReturn`.
        curriculum: see `Curriculum.state_dict`.
        worlds: of each rollout worker, see `Collector.state_dict`.
        rollout: of the update under way, see `Collected.to_json`; None without one.
    """

    step: int
    num_minibatches: int | None
    num_trainers: int
    flags: dict[str, Any]
    best: dict[str, Any]
    curriculum: dict[str, Any]
    worlds: list[dict[str, Any]]
    rollout: dict[str, Any] | None
    format: int = FORMAT

    @property
    def name(self) -> str:
        """Of the checkpoint's folder."""
        return f"step_{self.step}" + (
            "" if self.num_minibatches is None else f"_minibatch_{self.num_minibatches}"
        )

    def write(self, folder: Path) -> None:
        """Write `state.json` into `folder`."""
        from utils.training_state import write_json  # imports torch, which --help need not wait for

        write_json(folder / STATE_FILE, dataclasses.asdict(self))

    @staticmethod
    def read(checkpoint: Path) -> "RunState":
        """Read and check a checkpoint's `state.json`. Raises ValueError that names the file and what is wrong."""
        file = checkpoint / STATE_DIR / STATE_FILE
        try:
            content = read_json_object(file)
        except (OSError, ValueError) as error:
            raise ValueError(f"{file} cannot be read: {error}") from error
        if content.get("format") not in (1, FORMAT):
            raise ValueError(f"{file} is not of format 1 or {FORMAT}, which this version reads")
        wanted = {field.name for field in dataclasses.fields(RunState)}
        if content.keys() != wanted:
            raise ValueError(
                f"{file}: {', '.join(sorted(content.keys() ^ wanted))} missing or unknown"
            )
        state = RunState(**content)
        try:
            if state.format == 1:
                state.upgrade()
            state.check()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} is damaged: {type(error).__name__} {error}") from error
        return state

    def upgrade(self) -> None:
        """Bring a state of format 1 to the present one.

        There every episode was reported when it ended, and the EMA of the return began with the
        first ones, which are all successes. That EMA and its best are therefore forgotten: the
        resumed run measures them from here on.
        """
        num_steps = self.flags["num_steps"] * (self.step + (self.rollout is not None))
        for world in self.worlds:
            world |= {"num_steps": num_steps, "ended": []}
        for episode in self.rollout["episodes"] if self.rollout is not None else []:
            # When it ended was not noted.
            episode["start_step"] = max(0, num_steps - episode["length"])
        self.best = BestReturn(0.0, 0).state_dict()
        self.format = FORMAT

    def check(self) -> None:
        """Raise ValueError, KeyError or TypeError if a part is not what it should be."""
        if problems := state_problems(vars(self)):
            more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise ValueError("; ".join(problems[:5]) + more)
        counts = [self.step, self.num_trainers, self.num_minibatches or 0]
        if (
            not all(isinstance(count, int) and count >= 0 for count in counts)
            or self.num_trainers < 1
        ):
            raise ValueError(f"step, num_trainers, num_minibatches are {counts}")
        if (self.num_minibatches is None) != (self.rollout is None):
            raise ValueError("an update under way needs its rollout's results, and only that does")
        for world in self.worlds:
            for content in world["running"] or []:
                RunningEpisode.from_json(content)
        if self.rollout is not None:
            Collected.from_json(self.rollout)
        missing = set(BestReturn.state_names()) ^ self.best.keys()
        missing |= {
            "task_ids",
            "ema",
            "num_episodes",
            "num_successes",
            "rng",
        } ^ self.curriculum.keys()
        if missing:
            raise ValueError(f"{', '.join(sorted(missing))} missing or unknown")


# ---------------------------------------------------------------------------------------------- finding


def run_folder_problems(exp_dir: Path) -> list[str]:
    """Files of a run's folder that a resumed run would write to and that are no regular files."""
    present = [exp_dir / name for name in WRITTEN_AGAIN if os.path.lexists(exp_dir / name)]
    metrics = [file for file in present if file.name == METRICS_FILE]
    problems = file_problems(metrics, MAX_METRICS_BYTES)
    problems += file_problems([file for file in present if file not in metrics])
    return [f"--resume: {problem}" for problem in problems]


def position(folder: Path) -> tuple[int, int] | None:
    """Training steps and minibatches that a checkpoint's name says were done; None for another name."""
    match = NAME_PATTERN.fullmatch(folder.name)
    return (int(match[1]), int(match[2] or -1)) if match else None


def step_folders(exp_dir: Path) -> list[Path]:
    """Folders `step_<N>` of a run, with or without a training state, oldest first."""
    if not os.path.isdir(exp_dir):
        return []
    return sorted(
        (p for p in exp_dir.glob("step_*") if position(p) and p.is_dir()),
        key=lambda p: position(p) or (0, 0),
    )


def checkpoints(exp_dir: Path) -> list[Path]:
    """Those that hold a training state, oldest first."""
    return [p for p in step_folders(exp_dir) if os.path.lexists(p / STATE_DIR / STATE_FILE)]


def checkpoint_problems(checkpoint: Path) -> list[str]:
    """What keeps a checkpoint from being resumed, whatever the flags; reads all of it for its checksums."""
    # These import torch, for which --help need not wait.
    from ppo.batch import required_tensors
    from utils.training_state import saved_shapes, tensor_problems

    if problems := checksum_problems(checkpoint):
        return problems
    try:
        state = RunState.read(checkpoint)
    except ValueError as error:
        return [str(error)]
    if state.name != checkpoint.name:
        return [
            f"{checkpoint / STATE_DIR / STATE_FILE} is of {state.name}: give the folder its name back"
        ]
    folder = checkpoint / STATE_DIR
    problems = tensor_problems(folder)
    for rank in range(state.num_trainers):
        try:
            content = read_rank(folder, rank)
        except (OSError, ValueError) as error:
            return [*problems, str(error)]
        done = None if content["update"] is None else sum(content["update"]["num_done"].values())
        if done != state.num_minibatches:
            problems.append(
                f"{folder}/rank_{rank}.json has done {done} minibatches, {STATE_FILE} says {state.num_minibatches}"
            )
    if problems or state.num_minibatches is None:
        return problems
    saved = saved_shapes(folder)
    wanted = [f"rank_{r}.update.{n}" for r in range(state.num_trainers) for n in required_tensors()]
    return [f"{folder} has no tensor {name}" for name in wanted if name not in saved][:3]


def resumed_exp_dir(resume: str | None) -> Path | None:
    """The run's folder that `--resume PATH` goes on with; None for `auto`, which says no folder."""
    if resume in (None, "auto"):
        return None
    path = Path(str(resume))
    return path.parent if position(path) else path


def find_checkpoint(resume: str, exp_dir: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint that `--resume` means, and problems. Damaged ones are passed over for older ones, unless named.

    `auto` finds none where a run has not saved yet.
    """
    path = Path(resume)
    if resume != "auto" and position(path):
        return path, [f"--resume: {problem}" for problem in checkpoint_problems(path)]
    damage = []
    for checkpoint in reversed(checkpoints(exp_dir)):
        problems = checkpoint_problems(checkpoint)
        if not problems:
            return checkpoint, []
        damage += problems
        logger.warning(f"--resume: {checkpoint} is passed over: {'; '.join(problems)}")
    if damage:
        return None, [f"--resume: no checkpoint of {exp_dir} is whole: {'; '.join(damage)}"]
    if resume == "auto":
        return None, []
    return None, [
        f"--resume {resume}: no checkpoint step_<N>/ with a training state there: give a run's folder or one"
    ]


# ---------------------------------------------------------------------------------------------- flags


def resume_problems(args: Any) -> list[str]:
    """What about `--resume` and the flags that name a run's folder does not go together; no file is read."""
    resume = args.resume
    if resume is None:
        return []
    problems = []
    if args.overwrite:
        problems.append(
            "--overwrite deletes the run that --resume is to go on with: give one of them"
        )
    if resume == "auto" and not args.exp_id:
        problems.append("--resume auto needs --exp_id: the default name is a new one every time")
    exp_dir = resumed_exp_dir(resume)
    if exp_dir is not None and args.exp_id and exp_dir.name != args.exp_id:
        problems.append(f"--resume {resume} goes on in {exp_dir}: leave --exp_id {args.exp_id} out")
    return problems


def flag_problems(state: RunState, flags: Mapping[str, Any]) -> list[str]:
    """A problem for every flag that differs from the checkpoint's and may not."""
    fixed = FIXED_FLAGS | (UPDATE_FLAGS if state.num_minibatches is not None else {})
    changed = changed_flags(state, flags)
    return [
        f"--{name} is {changed[name][1]}, the resumed run has {changed[name][0]}: {why}, give it as it was"
        for why, names in fixed.items()
        for name in names
        if name in changed
    ]


def changed_flags(state: RunState, flags: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Flags that differ, {name: (saved, now)}; a flag that one side does not know is not among them."""
    saved = {name: _comparable(name, state.flags) for name in state.flags}
    now = {name: _comparable(name, flags) for name in flags}
    return {
        name: (saved[name], now[name])
        for name in now
        if name in saved and saved[name] != now[name] and name not in SILENT_FLAGS
    }


def _comparable(name: str, flags: Mapping[str, Any]) -> Any:
    value = flags[name]
    if name in REVISION_FLAGS and value is not None:
        return identity(value, flags.get(REVISION_FLAGS[name]))
    if name in PATH_FLAGS and value is not None:
        return os.path.abspath(value)
    return list(value) if isinstance(value, tuple) else value


# ---------------------------------------------------------------------------------------------- the folder


def remove_old(exp_dir: Path, keep_last: int) -> None:
    """Remove all but the newest `keep_last` checkpoints (0: none), and those within updates that others overtook."""
    found = step_folders(exp_dir)
    old = found[:-keep_last] if keep_last else []
    overtaken = [p for p in found[:-1] if (position(p) or (0, -1))[1] >= 0]
    for folder in {*old, *overtaken}:
        shutil.rmtree(folder)


def remove_partial(exp_dir: Path) -> None:
    """Remove what a crash left half-written."""
    for folder in [*exp_dir.glob(".step_*.partial"), *exp_dir.glob(".step_*.old")]:
        shutil.rmtree(folder)


def cut_after(exp_dir: Path, step: int, kept: Path | None) -> None:
    """Take out of a run's folder what came after `step` (and the checkpoint `kept`), so that it can come again.

    Later checkpoints and metrics go to `cut/<number>/`; nothing is lost.
    """
    newest = (position(kept) or (0, -1)) if kept else (-1, -1)
    later = [p for p in exp_dir.glob("step_*") if (position(p) or newest) > newest]
    keep, cut = _split_metrics(exp_dir / METRICS_FILE, step)
    if not later and not cut:
        return
    aside = exp_dir / "cut" / str(len(list((exp_dir / "cut").glob("*"))) + 1)
    aside.mkdir(parents=True)
    if cut:
        (aside / METRICS_FILE).write_bytes(b"".join(cut))
        partial = exp_dir / ".metrics.jsonl.partial"
        partial.write_bytes(b"".join(keep))
        os.replace(partial, exp_dir / METRICS_FILE)
    for folder in later:
        folder.rename(aside / folder.name)
    logger.info(f"what the run had written after step {step} is in {aside}")


def _split_metrics(file: Path, step: int) -> tuple[list[bytes], list[bytes]]:
    """Lines up to the first of `step`, and the others: later steps, a final evaluation, half a line."""
    lines: list[bytes] = []
    if os.path.lexists(file):
        with open_file(file, MAX_METRICS_BYTES) as data:
            lines = data.readlines()
    keep: list[bytes] = []
    for line in lines:
        if not 0 < _step_of(line) <= step or (keep and _step_of(keep[-1]) >= step):
            break
        keep.append(line)
    return keep, lines[len(keep) :]


def _step_of(line: bytes) -> int:
    """A metric line's step; 0 if it is damaged."""
    try:
        step = json.loads(line)["step"] if line.endswith(b"\n") else 0
    except (ValueError, KeyError, TypeError, RecursionError):
        return 0
    return step if is_int(step, 0, 1 << 53) else 0
