"""The driver's flags, checked before anything starts: pure functions of the parsed command line, no file is read.

Every message names the value, the rule and the fix. `args` is the driver's Args.
"""

import dataclasses
import json
import math
import os
from datetime import datetime
from typing import Any

from ppo.envs.base import get_suite, known_suites, split_options
from ppo.resume import resume_problems
from prismatic.model_files import is_int
from utils.command_line import (
    Bound,
    Effect,
    bound_problems,
    folder_name_problems,
    idle_flags,
    parse_engine_options,
    path_problems,
    raise_problems,
    repeated_problems,
)
from utils.command_line import (
    CommandLineError as CommandLineError,  # part of what this module offers
)
from utils.hub import hub_flags, model_name
from utils.placement import Demand, request_problems

MAX_TRAINERS_PER_NODE, MAX_DIVISOR = 1024, 1_000_000
# Samples of one training step. Each is an image in memory: 10 million of 28 pixels take 22 GiB, of 224 1.4 TiB.
MAX_ROLLOUT = 10_000_000

# Every number that a flag takes, with the reason for a limit that its meaning does not set. Limits are generous: beyond
# them a number is a slip, and would fill the memory or the process table before an error showed it.
BOUNDS: dict[str, Bound] = {
    "gamma lam activation_memory_budget curriculum_min_prob": Bound(0, 1),
    "curriculum_ema_alpha gpu_memory_utilization": Bound(0, 1, above=True),
    "lora_dropout": Bound(0, 1, below=True),
    "temperature": Bound(0.01, 2, reason="vLLM's limits"),
    "cliprange": Bound(
        0, 1, above=True, below=True, reason="the ratio's lower bound is 1 - cliprange"
    ),
    "cliprange_high": Bound(0, 100, reason="a ratio of 100 is far beyond any clip"),
    "learning_rate value_learning_rate": Bound(
        0, 1, above=True, reason="AdamW moves every weight by about this much at each step"
    ),
    "max_approx_kl": Bound(0, 1000, above=True, reason="in nats; leave the flag out for no limit"),
    "importance_weight_cap": Bound(0, 1e6, above=True, reason="an upper bound of a ratio"),
    "curriculum_tau": Bound(0, 1000, above=True, reason="from 10 on tasks are drawn uniformly"),
    "cliprange_value vf_coef max_grad_norm": Bound(
        0, 1e6, reason="larger losses and norms overflow"
    ),
    "entropy_coef beta": Bound(0, 1e6, reason="far below that nothing is left of the policy loss"),
    "best_min_delta": Bound(0, 1e6, reason="no return rises by that much"),
    "lora_alpha": Bound(0, 65_536, above=True, reason="larger merged weights overflow"),
    "lora_rank": Bound(1, 4096, reason="the width of the 7B's matrices"),
    "total_episodes": Bound(1, 1e12, reason="1e12 steps would take a century"),
    "num_steps": Bound(1, 1_000_000, reason="images of a rollout stay in memory"),
    "local_rollout_batch_size num_env_groups": Bound(
        1, 4096, reason="each environment is a simulator in memory"
    ),
    "num_env_processes": Bound(1, 4096, reason="one process each"),
    "vllm_num_engines": Bound(1, 1024, reason="one process with the model in memory each"),
    "vllm_tensor_parallel_size": Bound(1, 64, reason="more GPUs than a node has"),
    "local_mini_batch_size": Bound(1, MAX_ROLLOUT, reason="no rollout is larger"),
    "per_device_train_batch_size": Bound(0, 65_536, reason="its activations fill any memory"),
    "per_device_forward_batch_size": Bound(1, 65_536, reason="its activations fill any memory"),
    "num_epochs num_value_epochs": Bound(1, 10_000, reason="passes over one rollout"),
    "max_env_length": Bound(1, 1_000_000, reason="in environment steps"),
    "num_steps_wait": Bound(0, 10_000, reason="in environment steps, after every reset"),
    "num_trials_per_task": Bound(1, 1_000_000, reason="each initial state is visited once"),
    "trainer_num_threads engine_num_threads": Bound(1, 1024, reason="no machine has more cores"),
    "sync_bucket_mib": Bound(
        1, 4096, reason="trainers and engines hold one each; the 7B's largest tensor has 501"
    ),
    "env_timeout_s": Bound(0.1, 1e6, reason="in seconds; a step of LIBERO takes up to 0.1"),
    "placement_timeout_s hang_timeout_s": Bound(1, 1e7, reason="in seconds"),
    "seed": Bound(
        0, 1e12, reason="larger ones leave rank and step no room in a generator's 64 bits"
    ),
    "value_init_steps policy_lr_warmup_steps save_freq eval_freq keep_last best_patience": Bound(
        0, 1e12, reason="in training steps"
    ),
    "max_restarts": Bound(0, 100_000, reason="attempts"),
    "env_gpu_id": Bound(0, 1023, reason="numbers of GPUs, from 0 on"),
    "task_ids": Bound(0, 1e6, reason="tasks of the suite, from 0 on"),
}

# Flags that need another one to do anything.
EFFECTS = (
    Effect("keep_last", lambda a: a.save_freq > 0, "--save_freq (no step_<N>/ is written)", promises=True),
    Effect("save_video", lambda a: a.eval_freq > 0 or a.eval_final,
           "--eval_freq or --eval_final (nothing is evaluated)", promises=True),
    Effect("lora_rank lora_alpha", lambda a: a.use_lora or uses_critic_lora(a),
           "--use_lora (all weights are trained)", promises=True),
    Effect("lora_dropout", lambda a: a.use_lora, "--use_lora (all weights are trained)", promises=True),
    Effect("lora_rank lora_alpha lora_dropout", lambda a: not a.load_adapter_checkpoint or uses_critic_lora(a),
           "a new adapter (--load_adapter_checkpoint keeps its own)"),
    Effect("num_trials_per_task", lambda a: a.eval_freq > 0 or a.eval_final, "--eval_freq or --eval_final"),
    Effect("wandb_project wandb_mode", lambda a: a.use_wandb, "--use_wandb"),
    Effect("save_optimizer", lambda a: a.save_freq > 0, "--save_freq"),
    Effect("importance_weight_cap", lambda a: a.async_depth > 0, "--async_depth 1"),
    Effect("curriculum_ema_alpha curriculum_tau curriculum_min_prob", lambda a: a.use_curriculum,
           "--use_curriculum"),
    Effect("value_use_lora", lambda a: a.value_model_type == "vla", "--value_model_type vla"),
    Effect("vllm_enable_sleep", lambda a: a.colocate, "--colocate"),
)  # fmt: skip


def uses_critic_lora(args: Any) -> bool:
    """Whether the critic has a LoRA adapter, of --lora_rank too."""
    return args.value_model_type == "vla" and args.value_use_lora


def warnings(args: Any) -> list[str]:
    """Sentences about flags that only tune a part of the run that is switched off."""
    return idle_flags(args, EFFECTS, promises=False)


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


def range_problems(args: Any) -> list[str]:
    """Numbers outside their range, and texts that cannot be names or paths."""
    problems = bound_problems(args, BOUNDS)
    for flag in ("vla_path", "load_adapter_checkpoint", "data_root_dir", "run_root_dir", "resume"):
        if getattr(args, flag) is not None:
            problems += path_problems(f"--{flag}", getattr(args, flag))
    if args.exp_id is not None:
        problems += folder_name_problems("--exp_id", args.exp_id)
    if args.run_id_note is not None:
        problems += folder_name_problems("--run_id_note", args.run_id_note, whole=False)
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
    problems += repeated_problems("--task_ids", args.task_ids)
    problems += idle_flags(args, EFFECTS, promises=True)
    if args.use_wandb and not args.wandb_project:
        problems.append("--use_wandb needs --wandb_project: there is no default project")
    try:
        parse_engine_options(args.engine_args)
    except ValueError as error:
        problems.append(str(error))
    if args.load_adapter_checkpoint and not args.use_lora:
        problems.append(
            "--load_adapter_checkpoint needs --use_lora (or merge the adapter first: vla-scripts/merge.py)"
        )
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
    if steps * num_envs > MAX_ROLLOUT:
        problems.append(f"--num_steps {steps} x {num_envs} environments = {steps * num_envs} samples of a training "
                        f"step: at most {MAX_ROLLOUT}, their images must fit into memory")  # fmt: skip
    return problems + schedule_problems(args, args.total_episodes // (steps * num_envs))


def schedule_problems(args: Any, num_training_steps: int) -> list[str]:
    """Phases that do not fit into the run: then the policy would never change, or never reach its learning rate."""
    if num_training_steps < 1:
        return []  # reported already
    init, warmup = args.value_init_steps, args.policy_lr_warmup_steps
    length = (
        f"the run's {num_training_steps} training steps (--total_episodes {args.total_episodes})"
    )
    if init >= num_training_steps:
        return [
            f"--value_init_steps {init} leaves the policy none of {length}: use at most {num_training_steps - 1}"
        ]
    if warmup > num_training_steps - init:
        return [f"--policy_lr_warmup_steps {warmup} is longer than {length} without the {init} of --value_init_steps: "
                f"use at most {num_training_steps - init}"]  # fmt: skip
    return []


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
