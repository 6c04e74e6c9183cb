"""LIBERO from files of this repository alone: demonstrations, a random model, fine-tuning, PPO, evaluations, report.

    bash scripts/libero_spatial_from_scratch.sh --run_dir runs/libero_spatial --time_limit_s 580
    bash scripts/libero_spatial_from_scratch.sh --variants base seed1 --gpus 1 --set ppo.learning_rate=3e-4

does the set-up and calls this. Every stage is a command that works by itself; its output goes to RUN_DIR/logs, its
marker (command line, seconds over all pieces) to RUN_DIR/stages. The same line goes on after an interruption: what is
done is not repeated, recording and PPO go on from where they were. Exit codes: 0 everything is done; 75 --time_limit_s
ran out, give the same line again; 2 flags that cannot work; 1 a stage failed; 130, 143 interrupted.
"""

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ppo.scratch_report import figure, make_grid, render_page
from ppo.scratch_results import MAIN, SUPERVISED, Paths, ScratchRun, read_json, summarize_run
from utils.command_line import (
    REFUSED,
    Bound,
    bound_problems,
    path_problems,
    raise_problems,
    repeated_problems,
)
from utils.gpu_sampling import sampling
from utils.logging_utils import format_duration, get_logger
from utils.output_folders import place_problems
from utils.pipeline import Stage, StageError, TimeLimit, flags
from utils.stage_ledger import Ledger, OutOfTimeError, StageBusyError, run_stage, write_json

logger = get_logger(__name__)

ROOT = Path(__file__).resolve().parents[1]
SUITE = "libero_spatial"

# Every setting that decides a result, by stage; --set STAGE.FLAG=VALUE changes one. The flags are the programs' own.
RECIPE: dict[str, dict[str, Any]] = {
    "demos": {
        "num_episodes": 1500, "imperfection": 0.2, "haste": 0.9, "max_env_length": 120, "wrist_camera": False,
        "quick_physics": True, "seed": 0,
    },
    "model": {
        "image_size": 140, "vision_dim": 256, "vision_depth": 7, "vision_heads": 4,
        "llm_dim": 384, "llm_depth": 6, "llm_heads": 6, "llm_mlp_dim": 1024, "seed": 0,
    },
    "sft": {
        "max_steps": 4000, "per_device_train_batch_size": 256, "learning_rate": 6e-4, "lr_scheduler_type": "cosine",
        "warmup_steps": 300, "weight_decay": 0.05, "save_dtype": "bfloat16", "save_freq": 0, "log_freq": 200, "seed": 0,
    },
    "ppo": {
        "center_crop": True, "use_lora": True, "lora_rank": 16, "total_episodes": 327_680, "max_env_length": 120,
        "local_rollout_batch_size": 128, "num_steps": 32, "num_epochs": 2, "local_mini_batch_size": 1024,
        "per_device_train_batch_size": 512, "learning_rate": 7e-4, "policy_lr_scheduler_type": "linear",
        "policy_lr_warmup_steps": 4, "value_learning_rate": 1e-3, "value_init_steps": 4, "num_value_epochs": 6,
        "cliprange_value": 0.0, "cliprange_high": 0.28, "gamma": 0.99, "max_approx_kl": 0.1, "save_freq": 20,
        "keep_last": 1, "seed": 0,
    },
    "eval": {"num_trials_per_task": 50, "center_crop": True, "render_quality": "eval"},
}  # fmt: skip

# PPO's placement by the number of GPUs. An engine and a trainer that work on one GPU at the same time take turns there,
# and the engine's calls last twice as long; of two the simulators draw on the trainer's.
TURNS: dict[str, Any] = {
    "colocate": True,
    "vllm_enable_sleep": False,
    "gpu_memory_utilization": 0.1,
}
LAYOUTS: dict[int | str, dict[str, Any]] = {
    0: {},
    1: TURNS,
    2: {"async_depth": 1, "gpu_memory_utilization": 0.5},
    "colocated": {**TURNS, "actor_num_gpus_per_node": "[2]", "vllm_num_engines": 2},
}
DIVIDED = ("local_rollout_batch_size", "local_mini_batch_size")  # among engines and trainers

# PPO runs from the same supervised policy: what differs from the recipe's `ppo`.
VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "seed1": {"seed": 1},
    "seed2": {"seed": 2},
    "no_critic_warmup": {"value_init_steps": 0},
    "no_curriculum": {"use_curriculum": False},
    "temperature_1.5": {"temperature": 1.5},
    "symmetric_clip": {"cliprange_high": None},
    "token_ratio": {"ratio_level": "token"},
    "one_epoch": {"num_epochs": 1},
}

# Seconds that must be left to begin a stage, on an H100 with 16 cores; demos and ppo, which go on later, need a start.
ESTIMATES_S = {
    "demos": 60,
    "model": 30,
    "sft": 560,
    "eval": 330,
    "ppo": 90,
    "merge": 40,
    "held_out": 150,
}

PROGRAMS = {
    "demos": "vla-scripts/make_demos.py",
    "model": "vla-scripts/make_tiny_vla.py",
    "sft": "vla-scripts/finetune.py",
    "ppo": "ppo_vllm_ray_fsdp_vla.py",
    "merge": "vla-scripts/merge.py",
    "eval": "run_libero_eval_vllm.py",
    "held_out": "vla-scripts/check_held_out.py",
}
# Other kinds of evaluation, on fewer states of each task: what differs from the recipe's `eval`.
CHECKS = {"sampled": {"temperature": 1.0}, "fast": {"render_quality": "fast"}, "seed": {"seed": 8}}
CHECKED_STATES = 20
NUM_RECORDED_STATES = 3  # of each task, whose episodes the grid of videos is chosen from
CHECKED_COMMANDS = "checked_commands.json"
STAGE_FOLDERS = ("model", "sft", "ppo", "merged", "eval")
COLLECTED_FILES = ("summary.json", "report.html", "figure.svg", "grid.mp4")
# Every number that a flag takes, with the reason for a limit that its meaning does not set.
BOUNDS: dict[str, Bound] = {
    "time_limit_s": Bound(0, 1e9, above=True, reason="in seconds; leave it out for no limit"),
    "reserve_s": Bound(0, 1e6, reason="in seconds"),
    "gpus": Bound(0, 1023, reason="nvidia-smi's numbers"),
    "task_ids": Bound(0, 9, reason="the suite has ten tasks"),
    "eval_parts": Bound(1, 10, reason="each has a task at least"),
    "num_envs": Bound(1, 256, reason="as many processes record"),
}
EXIT_OUT_OF_TIME = 75  # sysexits.h: EX_TEMPFAIL, try again


@dataclass(frozen=True)
class Args:
    """Show that PPO improves a supervised policy on LIBERO, from nothing, in pieces if need be."""

    run_dir: Path = Path("runs/libero_spatial_from_scratch")
    """Folder of everything; what is done in it is not repeated."""
    variants: tuple[str, ...] = ("base",)
    """PPO runs to make from the same supervised policy, see VARIANTS; what they name wins over --set. Invocations with
    different ones may run side by side on different GPUs: each stage is run by one of them."""
    time_limit_s: float | None = None
    """End after about so many seconds, with exit code 75 if anything is left to do. Default: no limit."""
    reserve_s: float = 45.0
    """Seconds before the limit at which recording and PPO are asked to save and end."""
    gpus: tuple[int, ...] = ()
    """GPUs (nvidia-smi's numbers): one for everything; or two, of which the engine has the second to itself, and PPO
    collects during the updates. Default: 0 where there is one, unless MUJOCO_GL=osmesa."""
    colocate: bool = False
    """With two GPUs: a trainer and an engine on each, in turns, instead of one each; both draw."""
    sft_dir: Path | None = None
    """Supervised policy to start from, made earlier: demonstrations, model and fine-tuning are left out."""
    task_ids: tuple[int, ...] = ()
    """Tasks of everything. Default: all of the suite."""
    set: tuple[str, ...] = ()
    """Changes of the recipe, STAGE.FLAG=VALUE with a stage of RECIPE: ppo.learning_rate=3e-4 sft.max_steps=100. true
    and false switch a flag, none leaves it out."""
    eval_parts: int = 2
    """Pieces that an evaluation is made in, a share of the tasks each: one that is interrupted is repeated."""
    num_envs: int | None = None
    """Environments of evaluations, and processes that record. Default: one per core; with a GPU eight and two."""
    estimate: tuple[str, ...] = ()
    """Seconds that must be left to begin a stage, STAGE=SECONDS: sft=560 eval=330; see ESTIMATES_S."""
    checks: tuple[Literal["sampled", "fast", "seed", "held_out"], ...] = ()
    """Also evaluate the same policies otherwise, see CHECKS: sampled actions, fast drawing, another evaluation seed;
    held_out shows that training's initial states are none of evaluation's."""
    collect: Path | None = None
    """Folder to fill at the end with what matters of the run: 5 files, none above 15 MiB."""
    collect_models: Path | None = None
    """Folder to fill with the supervised model, adapters, and runs to go on with: models.tar in parts of 15 MiB."""


# ---------------------------------------------------------------------------------------------- recipe


def read_value(text: str) -> Any:
    """`true`, `false` and `none` as such; everything else stays text, which the program itself reads."""
    return {"true": True, "false": False, "none": None}.get(text.lower(), text)


def changed_recipe(changes: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The recipe with STAGE.FLAG=VALUE applied. Raises ValueError with every change that cannot be read."""
    recipe = {stage: dict(values) for stage, values in RECIPE.items()}
    problems = []
    for change in changes:
        name, equals, value = change.partition("=")
        stage, dot, flag = name.partition(".")
        if not (equals and dot and flag and stage in RECIPE):
            problems.append(
                f"--set {change}: give STAGE.FLAG=VALUE with a stage of {', '.join(RECIPE)}"
            )
        else:
            recipe[stage][flag] = read_value(value)
    if problems:
        raise ValueError("\n".join(problems))
    return recipe


def read_estimates(texts: Sequence[str]) -> dict[str, float]:
    """ESTIMATES_S with STAGE=SECONDS applied. Raises ValueError with every one that cannot be read."""
    estimates: dict[str, float] = dict(ESTIMATES_S)
    problems = []
    for text in texts:
        name, _, seconds = text.partition("=")
        try:
            if name not in ESTIMATES_S:
                raise ValueError
            estimates[name] = float(seconds)
            if not 0 <= estimates[name] < 1e9:
                raise ValueError
        except ValueError:
            problems.append(
                f"--estimate {text}: give STAGE=SECONDS with a stage of {', '.join(ESTIMATES_S)}"
            )
    if problems:
        raise ValueError("\n".join(problems))
    return estimates


def variant_flags(recipe: Mapping[str, Mapping[str, Any]], variant: str) -> dict[str, Any]:
    """The driver's flags of a variant."""
    return {**recipe["ppo"], **VARIANTS[variant]}


def choose_gpus(args: Args) -> tuple[int, ...]:
    """The GPUs to use; none: the CPU does it all."""
    if (
        args.gpus
        or os.environ.get("MUJOCO_GL", "egl") == "osmesa"
        or shutil.which("nvidia-smi") is None
    ):
        return args.gpus
    listed = subprocess.run(
        ["nvidia-smi", "-L"], capture_output=True, text=True, check=False
    ).stdout
    return (0,) if listed.startswith("GPU") else ()


# ---------------------------------------------------------------------------------------------- stages


class StageMaker:
    """Makes the stages of a run, with their whole command lines."""

    def __init__(self, args: Args) -> None:
        self.args, self.paths = args, Paths(args.run_dir, args.sft_dir)
        self.recipe, self.estimates = changed_recipe(args.set), read_estimates(args.estimate)
        self.gpus = choose_gpus(args)
        self.cores = len(os.sched_getaffinity(0))
        self.num_envs = args.num_envs or (2 * self.cores if self.gpus else self.cores)
        self.drawing = {"env_gpu_id": self.gpus[0] if self.gpus else None}
        eval_envs = args.num_envs or (8 * self.cores if self.gpus else self.cores)
        self.evaluating = {
            "num_envs": eval_envs,
            "num_processes": min(self.cores, eval_envs),
            **self.drawing,
        }
        self.layout: int | str = "colocated" if args.colocate else len(self.gpus)
        self.tasks = {"task_ids": args.task_ids or None}
        # What is made from a policy that came from elsewhere is not mixed with what is made from another.
        self.origin = {"sft_dir": str(args.sft_dir.resolve())} if args.sft_dir is not None else {}

    def _stage(
        self,
        kind: str,
        name: str,
        title: str,
        settings: Mapping[str, Any],
        machine: Mapping[str, Any],
        **options: Any,
    ) -> Stage:
        """`settings` decide the result, `machine` (paths, numbers of processes) does not."""
        environment = {
            "PYTHONPATH": os.pathsep.join(
                [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
            )
        }
        environment["OMP_NUM_THREADS"] = (
            str(max(1, min(8, self.cores // 2))) if kind == "sft" else "1"
        )
        if self.gpus:
            visible = self.gpus if kind == "ppo" else self.gpus[-1:]
            environment |= {
                "CUDA_VISIBLE_DEVICES": ",".join(map(str, visible)),
                "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
            }
        return Stage(
            name,
            title,
            (sys.executable, str(ROOT / PROGRAMS[kind]), *flags({**settings, **machine})),
            settings={
                flag: str(v) for flag, v in {**settings, **self.origin}.items() if v is not None
            },
            environment=environment,
            needs_s=self.estimates[kind],
            **options,
        )

    def supervised(self) -> list[Stage]:
        """Demonstrations, model, supervised fine-tuning; nothing with --sft_dir."""
        if self.args.sft_dir is not None:
            return []
        paths = self.paths
        return [
            self._stage(
                "demos", "demos", "demonstrations", {"task_suite_name": SUITE, **self.recipe["demos"], **self.tasks},
                {"output_dir": paths.data, "num_processes": self.num_envs, **self.drawing}, stop_signal=signal.SIGINT,
                is_complete=(paths.data / f"{SUITE}_no_noops" / "1.0.0").exists,
            ),
            self._stage(
                "model", "model", "random model", self.recipe["model"], {"output_dir": paths.model}, scrap=paths.model
            ),
            self._stage(
                "sft", "sft", "supervised fine-tuning", {"dataset_name": f"{SUITE}_no_noops", **self.recipe["sft"]},
                {"vla_path": paths.model, "data_root_dir": paths.data, "output_dir": paths.sft, "overwrite": True,
                 "data_num_threads": max(1, min(12, self.cores - 4)), "cache_gib": 16}, after=("demos", "model"),
            ),
        ]  # fmt: skip

    def variant(self, name: str) -> list[Stage]:
        """A PPO run and its merged model."""
        paths, values = self.paths, {**LAYOUTS[self.layout], **variant_flags(self.recipe, name)}
        exp_dir, base = paths.ppo(name), {"vla_path": paths.sft}
        num_envs, num_engines = (
            int(values["local_rollout_batch_size"]),
            values.get("vllm_num_engines", 1),
        )
        values |= {flag: int(values[flag]) // num_engines for flag in DIVIDED}
        # A process steps several environments in turn, which share simulators: more would only take memory.
        machine = {"num_env_processes": max(1, min(self.cores, num_envs) // num_engines)}
        machine["env_gpu_id"] = (self.gpus if self.layout == "colocated" else self.gpus[:1]) or None
        num_steps = int(values["total_episodes"]) // (int(values["num_steps"]) * num_envs)

        def is_complete() -> bool:
            metadata, adapter = exp_dir / "metadata.json", exp_dir / "adapter_model.safetensors"
            return (
                metadata.exists()
                and adapter.exists()
                and read_json(metadata)["training_step"] == num_steps
            )

        return [
            self._stage(
                "ppo", f"ppo.{name}", f"PPO {name}", {"task_suite_name": SUITE, **values, **self.tasks},
                {**base, **machine, "run_root_dir": exp_dir.parent, "exp_id": name, "resume": "auto"},
                stop_signal=signal.SIGTERM, after=("sft",), scrap=exp_dir, is_complete=is_complete,
            ),
            self._stage(
                "merge", f"merge.{name}", f"merge {name}", {},
                {**base, "adapter_dir": exp_dir, "output_dir": paths.policy(name), "overwrite": True},
                after=("sft", f"ppo.{name}"),
            ),
        ]  # fmt: skip

    def evaluation(self, policy: str, kind: str = MAIN, **changes: Any) -> list[Stage]:
        """The parts of an evaluation; `changes` of its flags."""
        count, after = self.args.eval_parts, "sft" if policy == SUPERVISED else f"merge.{policy}"
        num_videos = min(NUM_RECORDED_STATES, int(self.recipe["eval"]["num_trials_per_task"]))
        stages = []
        for part, tasks in enumerate(share_out(self.args.task_ids or tuple(range(10)), count)):
            folder = self.paths.evaluation(policy, kind) / str(part)
            stages.append(self._stage(
                "eval", f"eval.{policy}.{kind}.{part}", f"evaluation {policy}, {kind}, {part + 1} of {count}",
                {"task_suite_name": SUITE, **self.recipe["eval"], **changes, "task_ids": tasks},
                {"pretrained_checkpoint": self.paths.policy(policy), "local_log_dir": folder, **self.evaluating,
                 "gpu_memory_utilization": 0.1, "save_video": "all", "max_videos_per_task": 1, "video_fps": 20,
                 "video_episodes": [f"{t}:{s}" for t in tasks for s in range(num_videos)] if kind == MAIN else None},
                after=(after,), scrap=folder,
            ))  # fmt: skip
        return stages

    def held_out(self) -> Stage:
        """The check that training's initial states are none of evaluation's."""
        data = {"data_root_dir": self.paths.data} if self.args.sft_dir is None else {}
        return self._stage(
            "held_out", "held_out", "check of the initial states",
            {"task_suite_name": SUITE, **self.tasks, "num_envs": self.recipe["ppo"]["local_rollout_batch_size"]},
            {**data, "output": self.paths.held_out}, after=("demos",),
        )  # fmt: skip

    def all(self) -> list[Stage]:
        """All stages of this invocation, in order."""
        stages, checks = self.supervised(), self.args.checks
        for variant in self.args.variants:
            stages += self.variant(variant)
        fewer = {
            "num_trials_per_task": min(
                CHECKED_STATES, int(self.recipe["eval"]["num_trials_per_task"])
            )
        }
        kinds = {MAIN: {}} | {
            kind: {**changes, **fewer} for kind, changes in CHECKS.items() if kind in checks
        }
        for kind, changes in kinds.items():
            for policy in (SUPERVISED, *self.args.variants):
                stages += self.evaluation(policy, kind, **changes)
        return stages + ([self.held_out()] if "held_out" in checks else [])


def share_out(items: Sequence[int], count: int) -> list[tuple[int, ...]]:
    """At most `count` runs of about equal length, none empty: (0, 1, 2), 2 -> (0, 1), (2,)."""
    count = min(count, len(items))
    bounds = [round(i * len(items) / count) for i in range(count + 1)]
    return [tuple(items[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]


# ---------------------------------------------------------------------------------------------- running


def validate(args: Args) -> None:
    """Raise CommandLineError with everything about the flags that keeps the run from starting."""
    problems = [
        f"--variants {v}: use some of {', '.join(VARIANTS)}"
        for v in args.variants
        if v not in VARIANTS
    ]
    problems += bound_problems(args, BOUNDS)
    for flag in ("variants", "task_ids", "checks"):
        problems += repeated_problems(f"--{flag}", getattr(args, flag))
    problems += folder_problems(args)
    if len(args.gpus) not in LAYOUTS or len(set(args.gpus)) != len(args.gpus):
        problems.append(f"--gpus {args.gpus}: give one or two numbers of nvidia-smi")
    if args.colocate and len(args.gpus) != 2:
        problems.append("--colocate is for two GPUs: give --gpus 0 1")
    if args.sft_dir is not None and not path_problems("--sft_dir", args.sft_dir):
        from utils.checkpoint_utils import (
            check_model_dir,
        )  # imports torch: seconds that --help need not take

        problems += check_model_dir(args.sft_dir)
    for read, texts in ((changed_recipe, args.set), (read_estimates, args.estimate)):
        try:
            read(texts)
        except ValueError as error:
            problems.append(str(error))
    if not problems and changed_recipe(args.set)["ppo"].get("use_lora") is not True:
        problems.append("--set ppo.use_lora: the run merges an adapter, PPO must have one")
    raise_problems(problems)


def folder_problems(args: Args) -> list[str]:
    """Folders that cannot be written, or that hold something else which the run would replace."""
    problems = place_problems("--run_dir", args.run_dir)
    if args.sft_dir is not None:
        problems += path_problems("--sft_dir", args.sft_dir)
    # Of these the stages remove what is there before they begin.
    taken = [] if problems else [n for n in STAGE_FOLDERS if os.path.lexists(args.run_dir / n)]
    if taken and not is_run_dir(args.run_dir):
        problems.append(
            f"--run_dir {args.run_dir} holds {', '.join(taken)} and is not a run of this program: choose another"
        )
    for flag in ("collect", "collect_models"):
        folder = getattr(args, flag)
        if folder is not None:
            problems += place_problems(f"--{flag}", folder) or _collection_problems(flag, folder)
    return problems


def is_run_dir(folder: Path) -> bool:
    """Whether this program has begun a run in `folder`."""
    return (folder / CHECKED_COMMANDS).is_file() or any((folder / "stages").glob("*.json"))


def _collection_problems(flag: str, folder: Path) -> list[str]:
    """Files in the way of what is collected, unless an archive shows that they were collected earlier."""
    if any(folder.glob("records.tar.gz*")) or any(folder.glob("models.tar*")):
        return []
    if taken := [name for name in COLLECTED_FILES if os.path.lexists(folder / name)]:
        return [
            f"--{flag} {folder} holds {', '.join(taken)}, which would be replaced: choose another folder"
        ]
    return []


def load_program(file: Path) -> Any:
    """A program as a module, without running it."""
    name = f"program_{file.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def check_commands(stages: Sequence[Stage], file: Path) -> None:
    """Let each program read its command line before the first stage begins, once: `file` remembers them.

    What a program cannot read ends this one with code 2 and the program's own message. Raises ValueError if the driver
    refuses its flags.
    """
    checked = read_json(file) if file.exists() else {}
    for stage in stages:
        if checked.get(stage.name) == list(stage.command):
            continue
        program = load_program(Path(stage.command[1]))
        config = (tyro.conf.FlagConversionOff,) if stage.name == "model" else ()
        arguments = tyro.cli(
            program.Args, args=stage.command[2:], config=config, use_underscores=True
        )
        if stage.name.startswith("ppo."):
            program.validate(arguments)
        checked[stage.name] = list(stage.command)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, checked)


def run_stages(
    stages: Sequence[Stage], maker: StageMaker, ledger: Ledger, limit: TimeLimit
) -> None:
    """Run what is not done, in order, what another invocation is at later. Raises OutOfTimeError or StageError."""
    waiting = dict(enumerate(stages, 1))
    names = {stage.name for stage in stages}
    while waiting:
        for number, stage in waiting.items():
            is_ready = all(ledger.marker(name) for name in stage.after if name in names)
            if is_ready and not ledger.is_busy(stage.name):
                head = f"[{number}/{len(stages)}] {stage.title}"
                with contextlib.suppress(StageBusyError):
                    run_or_skip(stage, head, maker, ledger, limit)
                    del waiting[number]
                    break
        else:
            if limit.left_s < 0:
                raise OutOfTimeError(
                    f"another invocation is still at {next(iter(waiting.values())).title}"
                )
            time.sleep(1.0)


def run_or_skip(
    stage: Stage, head: str, maker: StageMaker, ledger: Ledger, limit: TimeLimit
) -> None:
    """Run a stage that is not done. Raises OutOfTimeError, StageError or StageBusyError, see `run_stage`."""
    if ledger.is_done(stage):
        logger.info("%s: done earlier, %s", head, format_duration(ledger.seconds(stage.name)))
        return
    logger.info("%s%s", head, ": going on" if ledger.is_kept(stage) else "")
    gpus = maker.gpus if stage.name.startswith("ppo.") else ()
    with sampling(gpus, maker.paths.gpu_samples(stage.name.removeprefix("ppo."))):
        run_stage(stage, ledger, maker.paths.logs, limit, maker.args.reserve_s)
    logger.info("%s: done in %s", head, format_duration(ledger.seconds(stage.name)))


def prepare(args: Args) -> tuple[StageMaker, list[Stage], Ledger]:
    """Check everything and make the folders. Raises ValueError before anything is written."""
    validate(args)
    maker = StageMaker(args)
    stages, ledger = maker.all(), Ledger(maker.paths.stages)
    raise_problems([problem for stage in stages for problem in ledger.problems(stage)])
    check_commands(
        [stage for stage in stages if not ledger.pieces(stage.name)],
        args.run_dir / CHECKED_COMMANDS,
    )
    for folder in (maker.paths.stages, maker.paths.logs):
        folder.mkdir(parents=True, exist_ok=True)
    return maker, stages, ledger


def report(maker: StageMaker, stages: Sequence[Stage], ledger: Ledger) -> None:
    """Write summary.json, report.html, figure.svg and grid.mp4 from all that is in the run's folder."""
    with ledger.lock("report", wait=True):
        run = ScratchRun(maker.paths, len(maker.args.task_ids) or 10)
        summary = summarize_run(run, maker.recipe, VARIANTS, [stage.name for stage in stages])
        folder = maker.paths.run_dir
        grid = make_grid(run, folder / "grid.mp4")
        summary["grid"] = grid.note if grid else None
        write_json(folder / "summary.json", summary)
        (folder / "report.html").write_text(render_page(run, summary, grid))
        (folder / "figure.svg").write_text(figure(run))
        if maker.args.collect is not None:
            run.collect(maker.args.collect)
        if maker.args.collect_models is not None:
            run.collect_models(maker.args.collect_models)
    for name, policy in summary["policies"].items():
        logger.info("%s: %d of %d", name, policy["successes"], policy["episodes"])


def main(args: Args) -> int:
    """Do what is left and report. Returns the exit code; raises ValueError before anything starts."""
    limit = TimeLimit(args.time_limit_s)
    maker, stages, ledger = prepare(args)
    logger.info("%s, logs in %s", args.run_dir, args.run_dir / "logs")
    code = 0
    try:
        run_stages(stages, maker, ledger, limit)
    except OutOfTimeError as error:
        logger.info("%s: give the same line again", error)
        code = EXIT_OUT_OF_TIME
    finally:  # also of what failed: its log is among what is collected
        report(maker, stages, ledger)
    return code


if __name__ == "__main__":
    command_line = tyro.cli(Args, description=__doc__, use_underscores=True)
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # an exception, so that the running stage is ended too
    try:
        sys.exit(main(command_line))
    except ValueError as error:
        logger.error("%s", error)
        sys.exit(REFUSED)
    except StageError as error:
        logger.error("%s", error)
        sys.exit(1)
    except KeyboardInterrupt:
        logger.error("interrupted: give the same line again")
        sys.exit(130)
