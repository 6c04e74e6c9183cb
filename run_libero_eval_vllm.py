"""Stand-alone evaluation of a policy: every fixed initial state of a suite's tasks, with vLLM as the engine.

    python run_libero_eval_vllm.py --pretrained_checkpoint DIR --task_suite_name tabletop
    python run_libero_eval_vllm.py --pretrained_checkpoint DIR --task_ids 0 3 --num_trials_per_task 10 \
        --temperature 0.5 --save_video all --max_videos_per_task 1

Writes a new folder under --local_log_dir: `eval.log`, `results.json` (per task and overall: successes, episodes, rate,
95 % Wilson interval, mean length; every episode) and, on request, `videos/*.mp4` with a contact sheet. Nothing is ever
overwritten. `evaluate(args)` does the same from Python. The engine runs in this process, the environments in others.
"""

# torch, transformers and vllm are imported where they are used: --help and bad flags answer at once.
import contextlib
import datetime
import json
import logging
import os
import platform
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from ppo.arguments import world_flags
from ppo.env_sizes import shortage_message
from ppo.envs.base import ResetRequest, TaskSuite, get_suite, split_options
from ppo.envs.sizing import EnvSizes, choose_sizes, memory_shortage
from ppo.evaluation import (
    EVALUATION_SEED,
    EpisodeResult,
    evaluation_requests,
    run_episodes,
    summarize_run,
)
from utils.command_line import (
    REFUSED,
    Bound,
    CommandLineError,
    Effect,
    bound_problems,
    cut_name,
    folder_name_problems,
    idle_flags,
    parse_engine_options,
    path_problems,
    repeated_problems,
)
from utils.hub import ModelPath, fetch_models, hub_flags, model_name, recorded_flags, recorded_path
from utils.logging_utils import get_logger
from utils.machine import available_memory_gib, num_cores
from utils.output_folders import place_problems
from utils.progress import ProgressReport
from utils.reports.videos import EpisodeRecorder

logger = get_logger(__name__)

TaskIds = tuple[int, ...]

# Every number that a flag takes, with the reason for a limit that its meaning does not set.
BOUNDS: dict[str, Bound] = {
    "num_trials_per_task": Bound(1, 1_000_000, reason="each initial state is visited once"),
    "temperature": Bound(0, 2, reason="0 is greedy; vLLM's limits are 0.01 and 2"),
    "seed": Bound(0, 1e12, reason="the engine and the simulators take so many"),
    "max_env_length": Bound(1, 1_000_000, reason="in environment steps"),
    "num_steps_wait": Bound(0, 10_000, reason="in environment steps, after every reset"),
    "env_gpu_id": Bound(0, 1023, reason="numbers of GPUs, from 0 on"),
    "task_ids": Bound(0, 1e6, reason="tasks of the suite, from 0 on"),
    "num_envs": Bound(1, 4096, reason="each environment is a simulator in memory"),
    "num_processes": Bound(1, 4096, reason="processes, which take memory"),
    "startup_timeout_s": Bound(1, 1e6, reason="in seconds; a simulator starts in 1 to 60"),
    "step_timeout_s": Bound(0.1, 1e6, reason="in seconds; a step of LIBERO takes up to 0.1"),
    "max_videos_per_task": Bound(1, 1_000_000, reason="videos"),
    "video_fps": Bound(0, 100, above=True, reason="frames a second"),
    "vllm_tensor_parallel_size": Bound(1, 64, reason="more GPUs than a node has"),
    "gpu_memory_utilization": Bound(0, 1, above=True),
}
# Flags that need another one to do anything.
EFFECTS = (
    Effect("max_videos_per_task", lambda a: a.save_video != "none", "--save_video"),
    Effect("video_fps", lambda a: a.save_video != "none" or a.video_episodes, "--save_video or --video_episodes"),
)  # fmt: skip


@dataclass(frozen=True)
class Args:
    """Evaluate a checkpoint on the fixed initial states of a task suite."""

    pretrained_checkpoint: Annotated[ModelPath, tyro.conf.arg(aliases=("--vla_path",))]
    """Model folder in openvla-7b's format, or its id on the Hugging Face hub (an adapter must be merged first:
    vla-scripts/merge.py)."""
    revision: str | None = None
    """Branch, tag or commit of --pretrained_checkpoint where that is a hub id. Default: main."""
    task_suite_name: str = "tabletop"
    """Task suite, or package.module:ATTRIBUTE of one of your own."""
    task_ids: TaskIds = ()
    """Tasks to evaluate; none given: all of the suite."""
    num_trials_per_task: int = 50
    """Fixed initial states per task, from the first on; each is visited once."""
    temperature: float = 0.0
    """0: greedy; above: sampled from the softmax over the action tokens at this temperature."""
    seed: int = EVALUATION_SEED
    """Seed of the sampling and of whatever is random in an episode; the default is that of the driver's evaluations."""
    unnorm_key: str | None = None
    """Key of the action statistics; default: the suite's name, else {suite}_no_noops."""
    center_crop: bool = False
    """Show the policy the central 0.9 of the image's area: for policies trained with random resized crops."""
    max_env_length: int | None = None
    """Time limit in environment steps; default: the suite's."""
    num_steps_wait: int | None = None
    """Settling steps after each reset, not counted in the limit; default: the suite's (LIBERO: 10)."""
    env_gpu_id: tuple[int, ...] = ()
    """GPUs that draw the simulators with EGL, by nvidia-smi's numbers whatever CUDA_VISIBLE_DEVICES says; environment
    processes take turns on them. Default: with MUJOCO_GL=egl those in CUDA_VISIBLE_DEVICES, else the CPU (OSMesa)."""
    render_quality: Literal["eval", "fast"] | None = None
    """LIBERO: eval (the default) is its own drawing, fast leaves out multisampling and reflections."""
    num_envs: int | None = None
    """Environments, stepped in two halves that overlap with the engine; default: 64, for LIBERO two per core."""
    num_processes: int | None = None
    """Processes that they run in; default: one per core, for LIBERO fewer if memory is short."""
    startup_timeout_s: float = 300.0
    """Seconds that an environment process may take to start."""
    step_timeout_s: float = 120.0
    """Seconds after which an environment process that does not answer is replaced and its episodes run again."""
    save_video: Literal["none", "failures", "successes", "all"] = "none"
    """Which episodes become mp4 files; they show what the policy sees."""
    max_videos_per_task: int = 5
    """At most this many successes and this many failures per task become mp4 files."""
    video_episodes: tuple[str, ...] = ()
    """Episodes that become mp4 files whatever --save_video says, as TASK:STATE (state: from 0): 0:3 1:7."""
    video_fps: float = 10.0
    """Environment steps shown per second."""
    local_log_dir: Path = Path("experiments/logs")
    """Where the new folder is made."""
    run_id_note: str | None = None
    """Text appended to the new folder's name."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """The engine's type; auto: bfloat16 on a GPU, float32 on a CPU."""
    vllm_tensor_parallel_size: int = 1
    """GPUs that the engine shards the model over."""
    vllm_enforce_eager: bool = True
    """No CUDA graphs and no compilation: starts faster, generates slower. Always so on a CPU."""
    gpu_memory_utilization: float = 0.9
    """Share of each GPU's memory that the engine may take; unused on a CPU."""
    engine_args: str = "{}"
    """More vLLM engine arguments as a JSON object, e.g. '{"max_num_batched_tokens": 4096}'."""


def find_problems(args: Args) -> list[str]:
    """Everything that keeps `args` from running; reads folders and weights, starts nothing."""
    from utils.checkpoint_utils import check_model_dir, check_model_values

    problems = path_problems("--pretrained_checkpoint", args.pretrained_checkpoint)
    problems = problems or check_model_dir(args.pretrained_checkpoint)
    problems = problems or check_model_values(args.pretrained_checkpoint)
    return problems + flag_problems(args, has_model=not problems)


def flag_problems(args: Args, *, has_model: bool) -> list[str]:
    """Everything wrong with `args` except the model folder, which is read for its statistics if it is `has_model`."""
    problems: list[str] = []
    suite: TaskSuite | None = None
    try:
        suite = get_suite(args.task_suite_name)
    except (ValueError, ImportError) as error:
        problems.append(f"--task_suite_name: {error}")
    else:
        problems += _task_problems(args, suite) + (_unnorm_problems(args) if has_model else [])
        options, unknown = split_options(suite, **world_flags(args))
        problems += unknown + suite.find_problems(**options)
    problems += _range_problems(args) + _engine_problems(args, suite, is_model=has_model)
    if problems or suite is None:
        return problems
    return memory_problems(args, suite, num_cores(), available_memory_gib())


def _task_problems(args: Args, suite: TaskSuite) -> list[str]:
    problems = []
    unknown = sorted({i for i in args.task_ids if not 0 <= i < suite.num_tasks})
    if unknown:
        known = "\n".join(f"    {i}: {text}" for i, text in enumerate(suite.instructions))
        problems.append(f"--task_ids {unknown}: {suite.name} has\n{known}")
    problems += repeated_problems("--task_ids", args.task_ids)
    if not 1 <= args.num_trials_per_task <= suite.num_init_states:
        problems.append(
            f"--num_trials_per_task {args.num_trials_per_task}: {suite.name} has {suite.num_init_states} fixed initial "
            f"states per task, each is visited once: use 1 to {suite.num_init_states}"
        )
    try:
        named = parse_episodes(args.video_episodes)
    except ValueError as error:
        return [*problems, str(error)]
    tasks = args.task_ids or range(suite.num_tasks)
    if absent := [
        f"{t}:{s}"
        for t, s in sorted(named)
        if t not in tasks or not 0 <= s < args.num_trials_per_task
    ]:
        problems.append(
            f"--video_episodes {' '.join(absent)}: not among this evaluation's tasks and its states "
            f"0..{args.num_trials_per_task - 1}"
        )
    return problems


def parse_episodes(texts: Sequence[str]) -> set[tuple[int, int]]:
    """("0:3", "1:7") -> {(0, 3), (1, 7)}: task and initial state. Raises ValueError naming what is not of this form."""
    wrong = [text for text in texts if not re.fullmatch(r"\d{1,9}:\d{1,9}", text)]
    if wrong:
        raise ValueError(
            f"--video_episodes {' '.join(wrong)}: give TASK:STATE, two whole numbers each, such as 0:3"
        )
    pairs = (text.split(":") for text in texts)
    return {(int(task), int(state)) for task, state in pairs}


def _unnorm_problems(args: Args) -> list[str]:
    from prismatic.vla.action_normalization import load_norm_stats, resolve_unnorm_key

    try:
        resolve_unnorm_key(
            load_norm_stats(args.pretrained_checkpoint), args.task_suite_name, args.unnorm_key
        )
    except ValueError as error:
        return [f"{args.pretrained_checkpoint}: {error}"]
    return []


def _range_problems(args: Args) -> list[str]:
    problems = bound_problems(args, BOUNDS)
    if 0 < args.temperature < 0.01:
        problems.append(
            f"--temperature {args.temperature} must be 0 (greedy) or in [0.01, 2], vLLM's limits"
        )
    if args.run_id_note is not None:
        problems += folder_name_problems("--run_id_note", args.run_id_note, whole=False)
    return problems + place_problems("--local_log_dir", args.local_log_dir)


def _engine_problems(args: Args, suite: TaskSuite | None, *, is_model: bool) -> list[str]:
    try:
        extra = parse_engine_options(args.engine_args)
    except ValueError as error:
        return [str(error)]
    from utils.vllm_utils import model_length_problems, validate_engine_options

    problems = [f"--engine_args: {problem}" for problem in validate_engine_options(extra)]
    if is_model and suite is not None and not problems:
        problems += model_length_problems(extra, args.pretrained_checkpoint, suite.instructions)
    return problems


def validate(args: Args) -> None:
    """Raise CommandLineError with all of `find_problems(args)` at once."""
    _raise_problems(find_problems(args))


def fetch_checkpoint(args: Args) -> Args:
    """`args` with the folder of the snapshot if the checkpoint is a hub id. Raises CommandLineError.

    The other flags are checked first: nothing is downloaded for a command line that cannot work.
    """
    if hub_flags(args):
        _raise_problems(flag_problems(args, has_model=False))
    return fetch_models(args, {"pretrained_checkpoint": args.revision})


def _raise_problems(problems: list[str]) -> None:
    if problems:
        raise CommandLineError(
            "cannot evaluate:\n" + "\n".join(f"- {problem}" for problem in problems)
        )


def make_run_dir(args: Args) -> Path:
    """Make and return a folder that did not exist: EVAL-suite-checkpoint-time[-note][-N]. Safe against a race.

    Suite and checkpoint are cut where they are so long that the name would not be possible.
    """
    now = f"{datetime.datetime.now():%Y%m%d_%H%M%S}"
    names = [args.task_suite_name, model_name(args.pretrained_checkpoint.resolve())]
    parts = ["EVAL", *(cut_name(name, 40) for name in names), now, args.run_id_note]
    name = re.sub(r"[^\w.+-]+", "_", "-".join(part for part in parts if part))
    args.local_log_dir.mkdir(parents=True, exist_ok=True)
    for attempt in range(1, 10_000):
        run_dir = args.local_log_dir / (name if attempt == 1 else f"{name}-{attempt}")
        try:
            run_dir.mkdir()
        except FileExistsError:
            continue
        return run_dir
    raise RuntimeError(f"{args.local_log_dir} has ten thousand folders named {name}")


@contextlib.contextmanager
def log_file(file: Path) -> Iterator[None]:
    """Copy what this project logs during the block into `file` too."""
    handler = logging.FileHandler(file)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger("ppo_vla").addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger("ppo_vla").removeHandler(handler)
        handler.close()


class Policy:
    """A checkpoint in a vLLM engine, from images and task ids to environment actions."""

    def __init__(self, args: Args, suite: TaskSuite, max_batch: int) -> None:
        from prismatic.extern.hf.processing_prismatic import load_processor
        from prismatic.vla.action_normalization import load_norm_stats, resolve_unnorm_key
        from prismatic.vla.action_tokenizer import ActionTokenizer
        from utils.vllm_utils import ActionEngine

        folder = args.pretrained_checkpoint
        norm_stats = load_norm_stats(folder)
        self.unnorm_key = resolve_unnorm_key(norm_stats, args.task_suite_name, args.unnorm_key)
        self.stats = norm_stats[self.unnorm_key]["action"]
        self.tokenizer = ActionTokenizer.from_config(load_config(folder))
        processor = load_processor(folder)
        self.prompts = [processor.prompt_ids(text) for text in suite.instructions]
        self.args = args
        self.num_calls = 0
        self.engine = ActionEngine(engine_config(args, max_batch))

    def act(self, images_BHWC: np.ndarray, task_ids: np.ndarray) -> np.ndarray:
        """Return LIBERO's raw actions (B, 7) float32 for images (B, H, W, 3) uint8 at the model's size."""
        from prismatic.vla.action_normalization import tokens_to_env_actions

        greedy = self.args.temperature == 0
        seed = int(
            np.random.SeedSequence([self.args.seed, self.num_calls]).generate_state(1)[0] >> 1
        )
        self.num_calls += 1
        generation = self.engine.generate(
            [self.prompts[i] for i in task_ids],
            images_BHWC,
            temperature=1.0 if greedy else self.args.temperature,
            greedy=greedy,
            seed=seed,
        )
        return tokens_to_env_actions(generation.token_ids, self.tokenizer, self.stats)


def load_config(folder: Path) -> Any:
    """OpenVLAConfig of a model folder."""
    from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig

    return OpenVLAConfig.from_pretrained(str(folder))


def engine_config(args: Args, max_batch: int) -> Any:
    """The engine's configuration for batches of at most `max_batch` images."""
    from utils.vllm_utils import EngineConfig

    device = device_type()
    return EngineConfig(
        model_dir=str(args.pretrained_checkpoint),
        dtype=("bfloat16" if device == "cuda" else "float32")
        if args.dtype == "auto"
        else args.dtype,
        tensor_parallel_size=args.vllm_tensor_parallel_size,
        gpu_memory_utilization=args.gpu_memory_utilization,
        enforce_eager=args.vllm_enforce_eager or device == "cpu",
        max_num_seqs=max_batch,
        seed=args.seed,
        extra=parse_engine_options(args.engine_args),
    )


def device_type() -> str:
    """`cuda` where a GPU is visible, else `cpu`."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def recorder_for(args: Args, folder: Path, instructions: tuple[str, ...] = ()) -> EpisodeRecorder:
    """The recorder that --save_video and --video_episodes ask for; `instructions` label its contact sheet."""
    outcomes = {
        "none": (),
        "failures": ("failure",),
        "successes": ("success",),
        "all": ("success", "failure"),
    }
    return EpisodeRecorder(
        folder,
        outcomes[args.save_video],
        args.max_videos_per_task,
        args.video_fps,
        instructions=instructions,
        named=parse_episodes(args.video_episodes),
    )


class ShownEpisodes:
    """An observer of episodes that passes everything on to the recorder and shows how many are finished."""

    def __init__(self, recorder: EpisodeRecorder, progress: ProgressReport) -> None:
        self.recorder, self.progress, self.num_successes = recorder, progress, 0

    def start(self, env_id: int, request: ResetRequest, image: np.ndarray) -> None:
        """Record the first image of an episode."""
        self.recorder.start(env_id, request, image)

    def step(self, env_id: int, image: np.ndarray) -> None:
        """Record the image after a step."""
        self.recorder.step(env_id, image)

    def end(self, env_id: int, result: EpisodeResult) -> None:
        """Record the end of an episode and count it."""
        self.recorder.end(env_id, result)
        self.num_successes += result.success
        rate = self.num_successes / (self.progress.num_done + 1)
        self.progress.advance(note=f"success rate so far {rate:.3f}")


def evaluate(args: Args) -> dict[str, Any]:
    """Evaluate and return what `results.json` in the new folder holds (`run_dir` names it).

    Sets vLLM's environment variables in this process: call it before anything imports vllm.

    Raises:
        ValueError: see `find_problems`, all at once, before anything starts.
    """
    args = fetch_checkpoint(args)
    validate(args)
    from utils.vllm_utils import engine_env

    os.environ.update(engine_env(device_type()))
    run_dir = make_run_dir(args)
    with log_file(run_dir / "eval.log"):
        for warning in idle_flags(args, EFFECTS, promises=False):
            logger.warning(warning)
        logger.info("evaluating %s in %s", args.pretrained_checkpoint, run_dir)
        results = _evaluate(args, run_dir)
        (run_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        report(results, run_dir / "eval.log")
    return results


def _evaluate(args: Args, run_dir: Path) -> dict[str, Any]:
    from ppo.envs.vector import VectorEnv

    started = time.perf_counter()
    suite = get_suite(args.task_suite_name)
    task_ids = sorted(args.task_ids) or list(range(suite.num_tasks))
    requests = evaluation_requests(task_ids, args.num_trials_per_task, args.seed)
    num_envs, sizes = choose_env_sizes(args, suite, num_cores(), available_memory_gib())
    recorder = recorder_for(args, run_dir / "videos", suite.instructions)
    with VectorEnv(
        args.task_suite_name,
        num_envs,
        num_processes=sizes.num_processes,
        image_size=load_config(args.pretrained_checkpoint).image_sizes[0],
        max_steps=args.max_env_length,
        startup_timeout_s=args.startup_timeout_s,
        step_timeout_s=args.step_timeout_s,
        center_crop=args.center_crop,
        env_kwargs=split_options(suite, **world_flags(args))[0] | sizes.options,
    ) as vector_env:
        policy = Policy(args, suite, max_batch=(num_envs + 1) // 2)
        startup_s = time.perf_counter() - started
        try:
            with ProgressReport(logger, "episodes", len(requests)) as progress:
                observer = ShownEpisodes(recorder, progress)
                run = run_episodes(vector_env, num_envs, policy.act, requests, observer=observer)
        finally:
            policy.engine.close()
            recorder.save_contact_sheet()
    results = _describe(args, run_dir, policy.unnorm_key) | {"remarks": suite.remarks()}
    results |= summarize_run(run, task_ids, suite.instructions)
    for episode in results["episodes"]:
        episode["video"] = recorder.files.get((episode["task_id"], episode["init_state_id"]))
    results["time"] = {
        "wall_s": time.perf_counter() - started,
        "startup_s": startup_s,
        "episodes_s": run.wall_s,
        "policy_s": run.act_s,
        "environment_wait_s": run.env_s,
        "env_steps_per_s": run.num_env_steps / run.wall_s,
    }
    return results


def choose_env_sizes(
    args: Args, suite: TaskSuite, cores: int, memory_gib: float
) -> tuple[int, EnvSizes]:
    """Environments, and sizes of their processes: as asked for, else what suits suite and machine; none is idle."""
    num_tasks = len(args.task_ids) or suite.num_tasks
    cost = suite.memory_cost(split_options(suite, **world_flags(args))[0])
    num_envs = args.num_envs or (64 if cost is None else 2 * cores)
    num_envs = min(num_envs, num_tasks * args.num_trials_per_task)
    given = min(args.num_processes, num_envs) if args.num_processes else None
    if cost is None:
        return num_envs, EnvSizes(given or min(cores, num_envs))
    return num_envs, choose_sizes(num_envs, num_tasks, cores, memory_gib, cost, given)


def memory_problems(args: Args, suite: TaskSuite, cores: int, memory_gib: float) -> list[str]:
    """The problem of environments that cannot all start in `memory_gib` of available memory, if it is one."""
    num_envs, sizes = choose_env_sizes(args, suite, cores, memory_gib)
    cost = suite.memory_cost(split_options(suite, **world_flags(args))[0])
    num_tasks = len(args.task_ids) or suite.num_tasks
    shortage = memory_shortage(num_envs, sizes.num_processes, num_tasks, memory_gib, cost)
    if shortage is None:
        return []
    available, flags = f"{memory_gib:.1f} GiB", ("--num_envs", "--num_processes")
    return [shortage_message(suite, num_envs, sizes.num_processes, shortage, available, flags)]


def _describe(args: Args, run_dir: Path, unnorm_key: str) -> dict[str, Any]:
    """What was evaluated, with what."""
    from utils.merge_utils import base_fingerprint
    from utils.vllm_utils import vllm_version

    packages = ("torch", "transformers", "numpy")
    checkpoint = recorded_path(args.pretrained_checkpoint.resolve())
    return {
        "checkpoint": checkpoint["path"],
        "checkpoint_revision": checkpoint.get("revision"),
        "checkpoint_fingerprint": base_fingerprint(args.pretrained_checkpoint),
        "task_suite_name": args.task_suite_name,
        "unnorm_key": unnorm_key,
        "seed": args.seed,
        "temperature": args.temperature,
        "greedy": args.temperature == 0,
        "timestamp": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "run_dir": str(run_dir),
        "versions": {"python": platform.python_version(), "vllm": vllm_version()}
        | {n: version(n) for n in packages},
        "args": {
            key: str(value) if isinstance(value, Path) else value
            for key, value in recorded_flags(asdict(args)).items()
        },
    }


def report(results: dict[str, Any], text_log: Path) -> None:
    """Show the table on the console, append it to the text log, and log what needs attention."""
    table = Table(title=f"{results['task_suite_name']}: {results['checkpoint']}")
    for column in ("task", "instruction", "success", "rate", "95 % interval", "mean steps"):
        table.add_column(column)
    for row in [*results["per_task"], {"task_id": "all", "instruction": "", **results["overall"]}]:
        count = f"{row['successes']}/{row['episodes']}"
        rate = f"{row['rate']:.3f}" if "rate" in row else "-"
        interval = "{:.3f} .. {:.3f}".format(*row["wilson_95"]) if "rate" in row else "-"
        length = f"{row['mean_length']:.1f}" if "rate" in row else "-"
        table.add_row(str(row["task_id"]), row["instruction"], count, rate, interval, length)
    Console().print(table)
    with text_log.open("a") as file:
        Console(file=file, width=120).print(table)
    overall = results["overall"]
    if overall["void"] or overall["dropped_attempts"]:
        logger.warning(
            "%d attempts were dropped because an environment died; %d episodes never finished and count nowhere",
            overall["dropped_attempts"],
            overall["void"],
        )
    for remark in results["remarks"]:
        logger.warning(remark)
    logger.info("results in %s", results["run_dir"])


def main() -> None:
    """Command line."""
    if not Path("/dev/nvidiactl").exists():
        # On a CPU vLLM warns of its own memory binding through torch's C++ log, whose level torch reads on import.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        evaluate(tyro.cli(Args, use_underscores=True))
    except CommandLineError as error:
        logger.error("%s", error)
        raise SystemExit(REFUSED) from error


if __name__ == "__main__":
    main()
