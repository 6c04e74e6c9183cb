"""Files and folders that a command line names, checked and read before anything starts. `args` is the driver's Args."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from ppo.arguments import CommandLineError, raise_problems, world_flags
from ppo.envs.base import get_suite, split_options
from ppo.resume import (
    RunState,
    checkpoints,
    find_checkpoint,
    flag_problems,
    run_folder_problems,
)
from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig
from prismatic.model_files import read_json_object
from prismatic.vla.action_normalization import (
    constant_dimensions,
    load_norm_stats,
    resolve_unnorm_key,
)
from prismatic.vla.action_tokenizer import ActionTokenizer
from utils import checkpoint_utils, hub, peft_utils
from utils.command_line import parse_engine_options
from utils.output_folders import (
    PPO_RUN,
    holds_something,
    output_problems,
    overlap_problems,
    place_problems,
    remove_output,
)
from utils.placement import Demand

# What torch alone takes in each trainer and engine.
PROCESS_BYTES = 512 << 20


def fetch_models(args: Any, exp_dir: Path) -> Any:
    """`args` with every hub id replaced by the folder of its snapshot, downloaded if need be.

    A run that resumes keeps the commits that it began with, unless a revision is given. Raises CommandLineError.
    """
    try:
        if args.resume:
            args = _with_recorded_commits(args, exp_dir)
        return hub.fetch_models(
            args,
            {"vla_path": args.revision, "load_adapter_checkpoint": args.adapter_revision},
        )
    except (ValueError, OSError) as error:
        raise CommandLineError(str(error)) from error


def _with_recorded_commits(args: Any, exp_dir: Path) -> Any:
    """`args` with the revisions of args.json in the run's folder for the hub ids that both have."""
    file = exp_dir / "args.json"
    recorded = read_json_object(file) if file.exists() else {}
    revisions = {}
    for name, hub_id in hub.hub_flags(args).items():
        revision_name = hub.REVISION_FLAGS[name]
        commit = recorded.get(revision_name)
        is_given = getattr(args, revision_name) is not None
        if recorded.get(name) == hub_id and isinstance(commit, str) and not is_given:
            revisions[revision_name] = commit
    return dataclasses.replace(args, **revisions)


def check_files(args: Any, exp_dir: Path) -> None:
    """Check every folder and option named by the flags (weights included). Raises ValueError with all problems."""
    from utils.vllm_utils import model_length_problems, validate_engine_options

    suite = get_suite(args.task_suite_name)
    problems = checkpoint_utils.check_model_dir(args.vla_path)
    is_model = not problems
    if is_model:
        problems += checkpoint_utils.check_model_values(args.vla_path)
        problems += _statistics_problems(args)
    if args.load_adapter_checkpoint:
        adapter_problems = checkpoint_utils.check_adapter_dir(args.load_adapter_checkpoint)
        if not adapter_problems and not problems:
            adapter_problems = peft_utils.check_adapter_fits(
                args.load_adapter_checkpoint, args.vla_path
            )
        problems += adapter_problems
    problems += suite.find_problems(**split_options(suite, **world_flags(args))[0])
    options = parse_engine_options(args.engine_args)
    problems += [f"--engine_args: {problem}" for problem in validate_engine_options(options)]
    if is_model:
        problems += model_length_problems(options, args.vla_path, suite.instructions)
    raise_problems(problems + exp_dir_problems(args, exp_dir))


def process_problems(demand: Demand, available_bytes: int) -> list[str]:
    """Trainers and engines that cannot all live in this machine's free memory, models not counted (CPU runs)."""
    needed = (demand.num_trainers + demand.num_engines) * PROCESS_BYTES
    if demand.device != "cpu" or needed <= available_bytes:
        return []
    return [
        f"{demand.num_trainers} trainers and {demand.num_engines} engines take at least {needed / 2**30:.0f} GiB, "
        f"{available_bytes / 2**30:.1f} are free: lower --actor_num_gpus_per_node or --vllm_num_engines"
    ]


def exp_dir_problems(args: Any, exp_dir: Path) -> list[str]:
    """Why the run cannot use its folder; empty when it can."""
    if problems := place_problems("--run_root_dir", exp_dir.parent):
        return problems
    if args.resume and holds_something(exp_dir):
        return _resume_folder_problems(args, exp_dir)
    instead = "choose another --exp_id, or pass --resume auto to continue it"
    return output_problems(
        "--exp_id", exp_dir, PPO_RUN, inputs=input_folders(args), overwrite=args.overwrite, instead=instead
    )  # fmt: skip


def _resume_folder_problems(args: Any, exp_dir: Path) -> list[str]:
    """A resumed run writes into its folder, and moves later results aside: it must be a run's, and no input."""
    problems = place_problems("--resume", exp_dir)
    problems += overlap_problems("--resume", exp_dir, input_folders(args))
    if not problems and not (PPO_RUN.is_ours(exp_dir) or checkpoints(exp_dir)):
        problems = [f"--resume: {exp_dir} holds no PPO run: choose another --exp_id"]
    return problems


def input_folders(args: Any) -> dict[str, str | None]:
    """Folders that the run reads, by flag: none of them may be removed or written to."""
    return {
        name: getattr(args, name)
        for name in ("vla_path", "load_adapter_checkpoint", "data_root_dir")
    }


def remove_earlier_run(args: Any, exp_dir: Path) -> None:
    """What --overwrite asks for. Raises CommandLineError if the folder is not a run's after all."""
    remove_output("--exp_id", exp_dir, PPO_RUN, input_folders(args))


def choose_checkpoint(args: Any, exp_dir: Path) -> Path | None:
    """The checkpoint to go on from. Raises ValueError if it is damaged or flags differ that may not."""
    if args.resume is None:
        return None
    checkpoint, problems = find_checkpoint(args.resume, exp_dir)
    if checkpoint is not None and not problems:
        problems = flag_problems(RunState.read(checkpoint), dataclasses.asdict(args))
    problems += run_folder_problems(exp_dir)
    raise_problems(problems)
    return checkpoint


def _statistics_problems(args: Any) -> list[str]:
    try:
        counted = counted_tokens(args)
    except (ValueError, OSError) as error:
        return [str(error)]
    if counted == []:
        return [
            "--ignore_empty_dimensions leaves no action token: every dimension of the action statistics has "
            "q01 = q99. Choose other statistics with --dataset_name"
        ]
    return []


def counted_tokens(args: Any) -> list[int] | None:
    """Positions of the action tokens that count in ratio, entropy and KL; None: all of them."""
    statistics = action_statistics(args)
    if not args.ignore_empty_dimensions:
        return None
    tokenizer = ActionTokenizer.from_config(OpenVLAConfig.from_pretrained(args.vla_path))
    return np.flatnonzero(~constant_dimensions(tokenizer, statistics)).tolist()


def action_statistics(args: Any) -> dict[str, Any]:
    """q01/q99 statistics of the actions: the dataset's under data_root_dir if given, else the checkpoint's."""
    if args.data_root_dir and args.dataset_name:
        from prismatic.vla.datasets.statistics import (
            load_dataset_statistics,
        )  # TensorFlow: only where needed

        return load_dataset_statistics(args.data_root_dir, args.dataset_name)["action"]
    norm_stats = load_norm_stats(args.vla_path)
    return norm_stats[resolve_unnorm_key(norm_stats, args.task_suite_name, args.dataset_name)][
        "action"
    ]
