"""Files and folders that a command line names, checked and read before anything starts. `args` is the driver's Args."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from ppo.arguments import CommandLineError, raise_problems, world_flags
from ppo.envs.base import get_suite, split_options
from ppo.resume import RunState, find_checkpoint, flag_problems, run_folder_problems
from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig
from prismatic.model_files import read_json_object
from prismatic.vla.action_normalization import (
    constant_dimensions,
    load_norm_stats,
    resolve_unnorm_key,
)
from prismatic.vla.action_tokenizer import ActionTokenizer
from utils import checkpoint_utils, hub, peft_utils


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
    """Check every folder and option named by the flags (reads headers only). Raises ValueError with all problems."""
    from utils.vllm_utils import validate_engine_options

    suite = get_suite(args.task_suite_name)
    problems = checkpoint_utils.check_model_dir(args.vla_path)
    if not problems:
        problems += _statistics_problems(args)
    if args.load_adapter_checkpoint:
        adapter_problems = checkpoint_utils.check_adapter_dir(args.load_adapter_checkpoint)
        if not adapter_problems and not problems:
            adapter_problems = peft_utils.check_adapter_fits(
                args.load_adapter_checkpoint, args.vla_path
            )
        problems += adapter_problems
    problems += suite.find_problems(**split_options(suite, **world_flags(args))[0])
    try:
        options = json.loads(args.engine_args)
        problems += validate_engine_options(options)
    except json.JSONDecodeError as error:
        problems.append(f"--engine_args is not JSON: {error}")
    if exp_dir.exists() and any(exp_dir.iterdir()) and not (args.overwrite or args.resume):
        problems.append(
            f"{exp_dir} already holds a run: choose another --exp_id, or pass --overwrite or --resume auto"
        )
    raise_problems(problems)


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
