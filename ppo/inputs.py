"""Files and folders that a command line names, checked and read before anything starts. `args` is the driver's Args."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from ppo.arguments import raise_problems, world_flags
from ppo.envs.base import get_suite, split_options
from ppo.resume import RunState, find_checkpoint, flag_problems, run_folder_problems
from prismatic.vla.action_normalization import load_norm_stats, resolve_unnorm_key
from utils import checkpoint_utils, peft_utils


def check_files(args: Any, exp_dir: Path) -> None:
    """Check every folder and option named by the flags, weights included. Raises ValueError with all problems."""
    from utils.vllm_utils import validate_engine_options

    suite = get_suite(args.task_suite_name)
    problems = checkpoint_utils.check_model_dir(args.vla_path)
    if not problems:
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
        action_statistics(args)
    except (ValueError, OSError) as error:
        return [str(error)]
    return []


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
