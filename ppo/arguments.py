"""The driver's flags, checked before anything starts: pure functions of the parsed command line, no file is read.

Every message names the value, the rule and the fix. `args` is the driver's Args.
"""

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from ppo.envs.base import get_suite, known_suites, split_options
from ppo.resume import resume_problems
from prismatic.model_files import is_int
from utils.hub import hub_flags, model_name
from utils.placement import Demand, request_problems

# Flags beyond these are slips of the finger; they must not become loops or sums that never end.
LARGEST_NUMBER, MAX_TRAINERS_PER_NODE, MAX_DIVISOR = 1e12, 1024, 1_000_000


def parse_trainers_per_node(text: str) -> tuple[int, ...]:
    """Read "[8,8]" or "2" as ranks per node. Raises ValueError if it is no list of positive whole numbers."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f'--actor_num_gpus_per_node {text[:80]!r} is not a list such as "[8,8]"'
        ) from error
    counts = value if isinstance(value, list) else [value]
    if not counts or not all(is_int(c, 1, MAX_TRAINERS_PER_NODE) for c in counts):
        raise ValueError(
            f'--actor_num_gpus_per_node {text!r}: give positive whole numbers, "[2]" or "[8,8]"'
        )
    return tuple(counts)


class CommandLineError(ValueError):
    """Flags, files or folders that cannot work; the message lists every problem."""


def raise_problems(problems: Sequence[str]) -> None:
    """Raise CommandLineError with all `problems`, one a line, if there are any."""
    if problems:
        raise CommandLineError(
            f"{len(problems)} problem(s) with this command line:\n- " + "\n- ".join(problems)
        )


def range_problems(args: Any) -> list[str]:
    """Numbers outside their range."""
    positive = "total_episodes num_steps local_rollout_batch_size num_epochs learning_rate"
    positive += " local_mini_batch_size value_learning_rate lora_rank"
    positive += (
        " num_env_processes num_env_groups env_timeout_s vllm_num_engines vllm_tensor_parallel_size"
    )
    positive += " sync_bucket_mib trainer_num_threads engine_num_threads placement_timeout_s num_trials_per_task"
    positive += (
        " per_device_forward_batch_size max_env_length num_value_epochs curriculum_tau cliprange"
    )
    positive += " importance_weight_cap lora_alpha hang_timeout_s"
    not_negative = "save_freq eval_freq value_init_steps policy_lr_warmup_steps max_grad_norm cliprange_value vf_coef"
    not_negative += " entropy_coef beta best_min_delta best_patience curriculum_min_prob num_steps_wait cliprange_high"
    not_negative += " seed per_device_train_batch_size keep_last max_restarts"
    unit, unit_not_zero = (
        "gamma lam activation_memory_budget",
        "curriculum_ema_alpha gpu_memory_utilization",
    )
    unit_not_one = "lora_dropout"
    problems = []
    for names, rule, holds in (
        (positive, "> 0", lambda x: x > 0),
        (not_negative, ">= 0", lambda x: x >= 0),
        (unit, "in [0, 1]", lambda x: 0 <= x <= 1),
        (unit_not_zero, "in (0, 1]", lambda x: 0 < x <= 1),
        (unit_not_one, "in [0, 1)", lambda x: 0 <= x < 1),
    ):
        for name in names.split():
            value = getattr(args, name, None)
            if value is not None and not (abs(value) <= LARGEST_NUMBER and holds(value)):
                limit = "" if abs(value) <= LARGEST_NUMBER else f" and at most {LARGEST_NUMBER:g}"
                problems.append(f"--{name} {value} must be {rule}{limit}")
    problems += gpu_problems(args.env_gpu_id)
    if not 0.01 <= args.temperature <= 2:
        problems.append(f"--temperature {args.temperature} must be in [0.01, 2], vLLM's limits")
    if args.cliprange >= 1:
        problems.append(
            f"--cliprange {args.cliprange} must be < 1: the ratio's lower bound is 1 - cliprange"
        )
    return problems


def choice_problems(args: Any) -> list[str]:
    """Names that do not exist and flags that do not go together."""
    problems = []
    try:
        suite = get_suite(args.task_suite_name)
        wrong = [i for i in args.task_ids if not 0 <= i < suite.num_tasks]
        if wrong:
            problems.append(f"--task_ids {wrong}: {suite.name} has tasks 0..{suite.num_tasks - 1}")
        if (args.num_trials_per_task or 0) > suite.num_init_states:
            problems.append(f"--num_trials_per_task {args.num_trials_per_task}: {suite.name} has "
                            f"{suite.num_init_states} fixed initial states a task")  # fmt: skip
        num_tasks = len(args.task_ids) or suite.num_tasks
        problems += split_options(suite, **world_flags(args))[1]
        if args.curriculum_min_prob * num_tasks > 1:
            problems.append(f"--curriculum_min_prob {args.curriculum_min_prob} x {num_tasks} tasks exceeds 1: "
                            f"use at most {1 / num_tasks:.3g}")  # fmt: skip
    except (ValueError, ImportError) as error:
        problems.append(f"--task_suite_name: {error} (known: {', '.join(known_suites())})")
    if len(set(args.task_ids)) != len(args.task_ids):
        problems.append(f"--task_ids {args.task_ids} names a task twice")
    if args.load_adapter_checkpoint and not args.use_lora:
        problems.append(
            "--load_adapter_checkpoint needs --use_lora (or merge the adapter first: vla-scripts/merge.py)"
        )
    if args.use_wandb and not args.wandb_project:
        problems.append("--use_wandb needs --wandb_project: there is no default project")
    if args.data_root_dir and not args.dataset_name:
        problems.append("--data_root_dir needs --dataset_name: which dataset's statistics to use")
    problems += resume_problems(args)
    if args.exp_id and args.run_id_note:
        problems.append("--run_id_note is appended to the default name only: put it into --exp_id")
    if args.device == "cpu" and args.offload:
        problems.append(
            "--offload moves GPU memory to the CPU: it has no meaning with --device cpu"
        )
    if args.activation_memory_budget < 1 and not args.compile:
        problems.append("--activation_memory_budget is the compiler's: add --compile, or use "
                        "--enable_gradient_checkpointing")  # fmt: skip
    backend, fits = args.vllm_sync_backend, {"nccl": not args.colocate and args.device != "cpu",
                                             "ipc": args.colocate, "gloo": args.device != "cuda"}  # fmt: skip
    if not fits.get(backend, True):
        problems.append(f"--vllm_sync_backend {backend}: nccl is for GPUs of their own, ipc for shared ones "
                        "(--colocate), gloo for --device cpu: leave it at auto")  # fmt: skip
    if args.device == "cpu" and args.vllm_tensor_parallel_size > 1:
        problems.append("--vllm_tensor_parallel_size > 1 needs GPUs")
    return problems


def nearest_divisors(number: int, wanted: int) -> list[int]:
    """The largest divisor of `number` below `wanted` and the smallest above it, where there are such."""
    small = [d for d in range(1, min(math.isqrt(number), MAX_DIVISOR) + 1) if number % d == 0]
    divisors = sorted({*small, *(number // d for d in small)})
    return [d for d in divisors if d < wanted][-1:] + [d for d in divisors if d > wanted][:1]


def gpu_problems(env_gpu_id: Sequence[int]) -> list[str]:
    """Numbers that no GPU has."""
    wrong = [i for i in env_gpu_id if not 0 <= i <= LARGEST_NUMBER]
    return (
        [f"--env_gpu_id {' '.join(map(str, wrong))} must be numbers of GPUs, from 0 on"]
        if wrong
        else []
    )


def world_flags(args: Any) -> dict[str, Any]:
    """The flags that go to the environments."""
    return {
        "num_steps_wait": args.num_steps_wait,
        "env_gpu_id": tuple(args.env_gpu_id) or None,
        "render_quality": args.render_quality,
    }


def evaluation_flags(args: Any) -> dict[str, Any]:
    """The flags that go to the environments of the driver's evaluations: only where to draw.

    The others hold for training. Evaluations have the suite's defaults, as
    `run_libero_eval_vllm.py` does.
    """
    return {"env_gpu_id": tuple(args.env_gpu_id) or None}


def size_problems(args: Any, num_trainers: int) -> list[str]:
    """Batch sizes that do not divide among environments, ranks and minibatches."""
    problems = []
    envs, steps, mini = args.local_rollout_batch_size, args.num_steps, args.local_mini_batch_size
    if min(envs, steps, mini, args.vllm_num_engines, args.vllm_tensor_parallel_size) <= 0:
        return []  # what `range_problems` reports
    if envs % num_trainers:
        lower = envs // num_trainers * num_trainers
        problems.append(f"--local_rollout_batch_size {envs} does not divide among {num_trainers} trainer ranks: use "
                        f"{lower or num_trainers} or {lower + num_trainers}")  # fmt: skip
        return problems
    demand = Demand(parse_trainers_per_node(args.actor_num_gpus_per_node), args.vllm_num_engines,
                    args.vllm_tensor_parallel_size, colocate=args.colocate)  # fmt: skip
    problems += request_problems(demand)
    if args.colocate and args.gpu_memory_utilization > 0.8:
        problems.append(f"--gpu_memory_utilization {args.gpu_memory_utilization} with --colocate leaves the trainer "
                        "nothing: use 0.3 to 0.6")  # fmt: skip
    num_envs = envs * args.vllm_num_engines
    local = steps * num_envs // num_trainers
    if mini > 0 and local % mini:
        near = nearest_divisors(local, mini)
        problems.append(f"--local_mini_batch_size {mini} does not divide the rollout of a rank ({steps} steps x "
                        f"{num_envs} envs / {num_trainers} ranks = {local}): "
                        f"use {' or '.join(map(str, near))}")  # fmt: skip
    micro = args.per_device_train_batch_size
    if micro > 0 and mini > 0 and mini % micro:
        problems.append(
            f"--per_device_train_batch_size {micro} does not divide --local_mini_batch_size {mini}"
        )
    for name in ("num_env_groups", "num_env_processes"):
        if (getattr(args, name) or 0) > envs:
            problems.append(
                f"--{name} {getattr(args, name)} exceeds --local_rollout_batch_size {envs}"
            )
    if args.total_episodes < steps * num_envs:
        problems.append(f"--total_episodes {args.total_episodes} is less than one rollout ({steps} steps x {num_envs} "
                        f"envs = {steps * num_envs})")  # fmt: skip
    return problems


def validate(args: Any) -> None:
    """Check everything that needs no file, GPU or cluster. Raises one ValueError that lists every problem."""
    problems = [*range_problems(args), *choice_problems(args)]
    try:
        num_trainers = sum(parse_trainers_per_node(args.actor_num_gpus_per_node))
    except ValueError as error:
        raise_problems([*problems, str(error)])
    raise_problems([*problems, *size_problems(args, num_trainers)])


def absolute_paths(args: Any) -> Any:
    """Paths as every node of a cluster must see them: actors have another working directory. Hub ids stay."""
    names = ("vla_path", "load_adapter_checkpoint", "run_root_dir", "resume")
    paths = {n: os.path.abspath(p) for n in names if (p := getattr(args, n)) and p != "auto"}
    return dataclasses.replace(args, **paths | hub_flags(args))


def default_exp_id(args: Any) -> str:
    """ppo+<model>+<suite>+<lora rank>+lr...+seed...--time: one folder per run."""
    parts = ["ppo", model_name(args.vla_path), args.task_suite_name.replace(":", "-")]
    parts += [f"lora-r{args.lora_rank}"] if args.use_lora else ["full"]
    parts += [f"lr-{args.learning_rate:g}", f"seed-{args.seed}"]
    note = f"--{args.run_id_note}" if args.run_id_note else ""
    return "+".join(parts) + note + datetime.now().strftime("--%Y%m%d-%H%M%S")
