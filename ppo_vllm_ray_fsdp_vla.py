"""PPO for OpenVLA-style policies: Ray places the processes, FSDP2 trains, vLLM acts, simulators answer.

    driver (this process)            places everything, runs the loop, logs
     |- CurriculumManager            one Ray actor: which task each episode gets
     |- RolloutWorker x N            one vLLM engine and its environments (processes, shared-memory images)
     `- PolicyTrainer x W            one FSDP rank: policy, critic, their optimizers

One training step: trainers push weights -> workers collect `num_steps` actions in every environment -> each trainer
takes its share of the environments -> values and old log-probs -> GAE -> PPO epochs -> metrics, checkpoints.

Algorithm (Schulman et al. 2017, arXiv:1707.06347; GAE: arXiv:1506.02438), for one action of 7 tokens a_t:
    log pi(a|o)  = sum over the 7 tokens of log softmax(logits[256 action tokens] / temperature)
    delta_t      = r_t + gamma V(o_{t+1}) (1 - terminated_t) - V(o_t)
    A_t          = delta_t + gamma lam (1 - done_t) A_{t+1},      R_t = A_t + V(o_t)
    L_clip       = -mean(min(ratio A, clip(ratio, 1 - cliprange, 1 + cliprange_high) A))
    L_v          = 0.5 mean(max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2)),  c = cliprange_value
    total        = L_clip + vf_coef L_v - entropy_coef H + beta KL(pi || initial policy)
Deviations from the textbook, each for a reason:
    - A time limit is no terminal state: the value of the real last observation bootstraps it (`bootstrap_truncated`).
    - Policy and critic have their own optimizers and schedules. The shared critic reads the policy's features at the
      last prompt token WITHOUT a gradient into the policy; within a training step it trains on the features cached
      while the old log-probs were computed, so its epochs cost almost nothing.
    - The first `value_init_steps` training steps train the critic alone.
    - Old log-probs are recomputed by the trainer (`old_logprobs recompute`), so that the ratio of the first minibatch
      is exactly 1 whatever the engine's arithmetic; the difference to the engine's is logged.

Commands:
    python ppo_vllm_ray_fsdp_vla.py --vla_path DIR --task_suite_name tabletop --use_lora --total_episodes 65536
    python ppo_vllm_ray_fsdp_vla.py --help          every flag;  docs/METRICS.md: every metric
"""

import dataclasses
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

SchedulerType = Literal["constant", "linear", "cosine"]


@dataclass
class Args:
    """PPO fine-tuning of a vision-language-action model. See the module's docstring for the algorithm."""

    # ---- model and data ----
    vla_path: str = "openvla/openvla-7b-finetuned-libero-spatial"
    """Model folder in openvla-7b's format, or its id on the Hugging Face hub: the policy that PPO starts from."""
    revision: str | None = None
    """Branch, tag or commit of --vla_path where that is a hub id. Default: main; when resuming, the run's commit."""
    load_adapter_checkpoint: str | None = None
    """LoRA adapter, a folder or a hub id, to continue training (with --use_lora); its base must be vla_path."""
    adapter_revision: str | None = None
    """Branch, tag or commit of --load_adapter_checkpoint where that is a hub id. Default: as for --revision."""
    data_root_dir: str | None = None
    """Folder of RLDS datasets whose statistics un-normalise actions when the checkpoint has none for dataset_name."""
    dataset_name: str | None = None
    """Key of the action statistics (the checkpoint's, or a dataset under data_root_dir). Default: the suite's own."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute precision of trainers and engines; master weights are always float32. auto: bfloat16 on GPUs."""
    freeze_vision_backbone: bool = False
    """Do not train the two ViTs; their features are then computed once per training step."""

    # ---- run ----
    run_root_dir: str = "runs"
    """Folder that gets one folder per run."""
    exp_id: str | None = None
    """Name of the run's folder in run_root_dir, without '/'. Default: made from the main settings and the time."""
    run_id_note: str | None = None
    """Appended to the default exp_id."""
    overwrite: bool = False
    """Delete an earlier run in the same folder. A folder that is not recognisably a run, or that is an input, stays."""
    seed: int = 0
    """Everything random is derived from it."""
    total_episodes: int = 100_000
    """Environment steps (policy actions) of the whole run, all environments together. The name is the family's."""
    resume: str | None = None
    """Go on from a checkpoint: `auto`, the newest of this exp_id if there is any; a run's folder; or a checkpoint."""
    save_freq: int = 0
    """Training steps between checkpoints `step_<N>/` (0: none but best and final)."""
    save_optimizer: bool = True
    """Write all that --resume needs into each `step_<N>/`, in the background; without it only the policy."""
    keep_last: int = 0
    """Keep only so many `step_<N>/` checkpoints (0: all)."""
    deterministic: bool = False
    """Only deterministic kernels in the trainers: a resumed run on CPU then equals the uninterrupted one to the bit."""
    use_wandb: bool = False
    """Log to Weights & Biases too (TensorBoard and metrics.jsonl are always written)."""
    wandb_project: str | None = None
    """W&B project (required with --use_wandb)."""
    wandb_mode: Literal["online", "offline"] = "online"
    """offline: written to the run's folder, nothing is sent."""

    # ---- world ----
    task_suite_name: str = "tabletop"
    """Task suite."""
    task_ids: tuple[int, ...] = ()
    """Tasks to train on, by index in the suite. Default: all."""
    num_steps_wait: int | None = None
    """Settling steps after each reset in training, for suites with settling. Default: the suite's."""
    num_trials_per_task: int | None = None
    """Fixed initial states per task in evaluations by this driver (--eval_freq, --eval_final). Default: all."""
    max_env_length: int | None = None
    """Time limit of a training episode in steps. Default: the suite's, which evaluations always use."""
    env_gpu_id: tuple[int, ...] = ()
    """GPUs that draw the simulators with EGL, by nvidia-smi's numbers whatever CUDA_VISIBLE_DEVICES says; environment
    processes take turns on them. Default: with MUJOCO_GL=egl each engine's own GPU, else the CPU (OSMesa)."""
    render_quality: Literal["fast", "eval"] | None = None
    """LIBERO, training: eval, its own drawing, is the default where a GPU draws; fast omits
    multisampling and reflections. Evaluations by this driver always use eval."""
    center_crop: bool = False
    """Show the policy the central 0.9 of the image's area: for policies fine-tuned with random resized crops."""
    num_env_processes: int | None = None
    """Environment processes of each rollout worker. Default: 2; for LIBERO one per core, fewer if memory is short."""
    num_env_groups: int = 2
    """Groups of environments per worker: while one is in the simulator the engine generates for another."""
    env_timeout_s: float = 60.0
    """An environment process that takes longer than this for a step is replaced and its episode dropped."""
    save_video: bool = False
    """At every evaluation by this driver write the first success and failure of each task (and worker) as mp4."""
    eval_freq: int = 0
    """Training steps between greedy evaluations on the fixed initial states (0: none)."""
    eval_final: bool = False
    """Evaluate the final policy greedily on the fixed initial states; written to eval_final.json."""

    # ---- rollout ----
    num_steps: int = 128
    """Actions per environment and training step (T)."""
    local_rollout_batch_size: int = 16
    """Environments per rollout worker (engine)."""
    temperature: float = 1.0
    """Sampling temperature of the rollouts; the same in every log-prob of the update."""
    curriculum_ema_alpha: float = 0.1
    """Weight of a new result in a task's success EMA, in (0, 1]."""
    curriculum_tau: float = 0.2
    """Width of the preference for tasks near 50 % success; larger is more uniform."""
    curriculum_min_prob: float = 0.02
    """Smallest sampling probability of a task."""
    use_curriculum: bool = True
    """Sample tasks by their success; without it uniformly."""
    async_depth: Literal[0, 1] = 0
    """0: collect, then update. 1: collect the next rollout during the update, one version behind (off-policy by one
    update, corrected by importance weights)."""

    # ---- PPO ----
    num_epochs: int = 1
    """Passes over each rollout."""
    local_mini_batch_size: int = 256
    """Samples per optimizer step on each trainer rank."""
    per_device_train_batch_size: int = 32
    """Samples per forward/backward pass on each trainer rank (gradient accumulation makes up the minibatch).
    Tried out on a GPU before the run. 0: the largest that its memory holds."""
    per_device_forward_batch_size: int | None = None
    """Samples per pass where no gradient is needed. Default: per_device_train_batch_size."""
    learning_rate: float = 2e-5
    """Peak learning rate of the policy (AdamW)."""
    policy_lr_scheduler_type: SchedulerType = "constant"
    """Schedule of learning_rate over the run, after the warm-up."""
    policy_lr_warmup_steps: int = 0
    """Training steps (not optimizer steps) over which learning_rate rises from 0."""
    max_grad_norm: float = 1.0
    """Gradients of policy and critic are clipped to this global norm (0: not clipped)."""
    cliprange: float = 0.2
    """PPO clip: the ratio's lower bound is 1 - cliprange."""
    cliprange_high: float | None = None
    """Upper bound is 1 + this. Default: cliprange. DAPO: 0.28."""
    ratio_level: Literal["action", "token"] = "action"
    """One ratio per action (its 7 log-probs summed) or one per token."""
    ignore_empty_dimensions: bool = False
    """Leave out of ratio, entropy and KL the tokens of action dimensions with an empty range in the statistics
    (q01 = q99): whichever token is sampled there, the action is the same."""
    gamma: float = 0.99
    """Discount per environment step, in [0, 1]."""
    lam: float = 0.95
    """GAE lambda, in [0, 1]."""
    norm_adv: bool = True
    """Normalise advantages over the whole rollout (all ranks) to mean 0, deviation 1."""
    bootstrap_truncated: bool = True
    """Bootstrap episodes cut by the time limit with the value of their last observation."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    beta: float = 0.0
    """Weight of the KL (k3 estimator) to the initial policy."""
    max_approx_kl: float | None = None
    """Skip the rest of a step's policy updates once the minibatch KL over all ranks exceeds this."""
    old_logprobs: Literal["recompute", "engine"] = "recompute"
    """Where the ratio's denominator comes from."""
    importance_weight_cap: float = 2.0
    """With --async_depth 1: upper bound of pi_old / pi_rollout, which weights an action's loss (as in IMPALA)."""

    # ---- critic ----
    value_model_type: Literal["shared", "vla"] = "shared"
    """shared: a head on the policy's features at the last prompt token; vla: a backbone of its own, from vla_path."""
    value_use_lora: bool = True
    """With value_model_type vla: train a LoRA of lora_rank on the critic's backbone instead of all of it."""
    value_learning_rate: float = 1e-3
    """Peak learning rate of the critic (AdamW)."""
    value_lr_scheduler_type: SchedulerType = "constant"
    """Schedule of value_learning_rate."""
    value_init_steps: int = 0
    """First training steps in which only the critic learns."""
    num_value_epochs: int | None = None
    """Passes of the critic over each rollout. Default: num_epochs."""
    cliprange_value: float = 0.2
    """Value clip around the old value (0: none)."""
    vf_coef: float = 1.0
    """Factor of the value loss."""

    # ---- LoRA ----
    use_lora: bool = False
    """Train a LoRA adapter on all linear layers instead of all weights."""
    lora_rank: int = 32
    """Rank."""
    lora_alpha: float | None = None
    """Scaling is alpha / rank. Default: min(rank, 16), as OpenVLA."""
    lora_dropout: float = 0.0
    """Dropout on the adapter's input during updates (makes the first ratio differ from 1)."""

    # ---- best-return checkpoint ----
    best_min_delta: float = 0.01
    """The EMA of the episodic return must beat its best by more than this."""
    best_patience: int = 10
    """Training steps at least between two best-return checkpoints."""

    # ---- placement ----
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: GPUs if this machine (or the cluster) has any."""
    actor_num_gpus_per_node: str = "[1]"
    """Trainer ranks per node as a list, "[8,8]": one GPU each; on CPU one process each."""
    vllm_num_engines: int = 1
    """Rollout workers, one vLLM engine each."""
    colocate: bool = False
    """Trainer i and engine i share a GPU; the engine takes gpu_memory_utilization of it, the trainer the rest."""
    vllm_tensor_parallel_size: int = 1
    """GPUs per engine."""
    vllm_enforce_eager: bool = False
    """No CUDA graphs and no compilation in the engines (always so on CPU)."""
    vllm_sync_backend: Literal["auto", "nccl", "ipc", "gloo"] = "auto"
    """How weights travel from trainers to engines: nccl between GPUs, ipc on a shared GPU (--colocate), gloo on CPUs.
    auto: the one that fits."""
    verify_weight_sync: bool = False
    """Compare a checksum of every tensor after each sync."""
    vllm_enable_sleep: bool = True
    """With --colocate on GPUs: the engine gives its memory back during the update (not with --async_depth 1)."""
    gpu_memory_utilization: float = 0.9
    """Share of a GPU's memory that its engine takes."""
    engine_args: str = "{}"
    """Further vLLM engine options as JSON, {"max_model_len": 512}; unknown ones are refused."""
    sync_bucket_mib: int = 256
    """Size of the pieces in which weights are sent."""
    sharding_strategy: Literal["full-shard", "shard-grad-op"] = "full-shard"
    """FSDP: gather weights again for the backward pass (ZeRO-3), or keep them (ZeRO-2)."""
    offload: bool = False
    """Keep sharded parameters and optimizer states in CPU memory (GPU trainers)."""
    enable_gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """Compile the ViTs' and the Llama's blocks in the trainers: a minute at the start, a quarter less time after."""
    activation_memory_budget: float = 1.0
    """With --compile: share of the blocks' activations kept for the backward pass; the rest is computed again."""
    trainer_num_threads: int = 1
    """CPU threads of each trainer rank."""
    engine_num_threads: int = 1
    """CPU threads of each engine."""
    ray_address: str | None = None
    """Address of a running Ray cluster ("auto": the one on this machine). Default: start one for this run only."""
    placement_timeout_s: float = 300.0
    """How long to wait for the cluster to place the actors."""
    hang_timeout_s: float = 1800.0
    """A rollout, update or sync that takes longer hangs: engines are replaced, hanging trainers end the attempt."""
    spare_workers: bool = False
    """Beside each rollout worker a process that has imported everything and takes its place if it dies: 1 GiB each."""
    max_restarts: int = 0
    """How often the run may go on from its last checkpoint (--save_freq) after a trainer or the driver died."""


if __name__ == "__main__":
    # Here, because the imports below take ten seconds, and --help and mistyped flags need none of them.
    flags = tyro.cli(Args, description=__doc__, use_underscores=True)


import numpy as np
import ray
import torch

from ppo import trainer_state
from ppo.arguments import (
    CommandLineError,
    absolute_paths,
    default_exp_id,
    evaluation_flags,
    parse_trainers_per_node,
    raise_problems,
    validate,
    warnings,
    world_flags,
)
from ppo.collector import Collector
from ppo.env_sizes import env_memory_problems, plan_env_sizes
from ppo.envs.base import ResetRequest, get_suite, split_options
from ppo.envs.vector import VectorEnv
from ppo.episodes import TrainingEpisode
from ppo.evaluation import EvaluationRun, evaluation_requests, run_episodes
from ppo.inputs import (
    action_statistics,
    check_files,
    choose_checkpoint,
    counted_tokens,
    fetch_models,
    process_problems,
    remove_earlier_run,
)
from ppo.learner import PPOLearner
from ppo.memory import check_memory
from ppo.models import ModelBuilder, make_trainable
from ppo.reporting import rollout_metrics, time_metrics
from ppo.resume import STATE_DIR, Collected, RunState, remove_old, resumed_exp_dir
from ppo.rollout import Rollout
from ppo.run import Run
from ppo.utils.curriculum import CurriculumManager
from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig
from prismatic.extern.hf.processing_prismatic import load_processor
from prismatic.vla.action_normalization import tokens_to_env_actions
from prismatic.vla.action_tokenizer import ActionTokenizer
from utils import checkpoint_utils, fsdp_utils, peft_utils, ray_utils, training_state
from utils.actors import (
    ActorFailure,
    ActorPool,
    RevivableActor,
    ask_where,
    wait_all,
    where_others_are,
)
from utils.attempts import run_attempt, run_attempts, same_command
from utils.command_line import REFUSED
from utils.logging_utils import PhaseTimer, add_log_file, get_logger
from utils.machine import available_memory_gib
from utils.placement import Demand, Node, placement_problems
from utils.reports.videos import EpisodeRecorder
from utils.signals import StopRequested, StopSignal
from utils.spares import SpareActors, spare_class
from utils.training_state import BackgroundWriter
from utils.vllm_utils import engine_env, import_engine
from utils.weights.export import WeightExporter
from utils.weights.sender import WeightSender

logger = get_logger("driver")


@dataclass(frozen=True)
class Plan:
    """Sizes derived from the flags, once."""

    exp_dir: str
    device: str
    dtype: str
    demand: Demand
    env_options: dict[str, Any]
    sync_backend: str
    task_ids: tuple[int, ...]
    num_trainers: int
    num_envs: int
    samples_per_step: int
    num_minibatches: int
    num_training_steps: int
    engines_sleep: bool
    policy_optimizer_steps: int
    value_optimizer_steps: int


def make_plan(args: Args, *, has_gpus: bool, nodes: Sequence[Node] = ()) -> Plan:
    """Derive the run's sizes from validated flags.

    `has_gpus`: this machine has GPUs, or the cluster's nodes do. `nodes`: where the run will be; their cores and memory
    decide how many environment processes an engine gets.
    """
    per_node = parse_trainers_per_node(args.actor_num_gpus_per_node)
    num_trainers, num_envs = sum(per_node), args.local_rollout_batch_size * args.vllm_num_engines
    suite, device = get_suite(args.task_suite_name), args.device
    if device == "auto":
        device = "cuda" if has_gpus else "cpu"
    local_samples = args.num_steps * num_envs // num_trainers
    num_minibatches = local_samples // args.local_mini_batch_size
    num_training_steps = args.total_episodes // (args.num_steps * num_envs)
    value_epochs = args.num_value_epochs or args.num_epochs
    demand = Demand(
        per_node,
        args.vllm_num_engines,
        args.vllm_tensor_parallel_size,
        colocate=args.colocate,
        device=device,
    )
    env_sizes = plan_env_sizes(args, demand, nodes)
    fitting_backend = "gloo" if device == "cpu" else "ipc" if args.colocate else "nccl"
    return Plan(
        exp_dir=str(
            resumed_exp_dir(args.resume)
            or Path(args.run_root_dir) / (args.exp_id or default_exp_id(args))
        ),
        device=device,
        dtype=("bfloat16" if device == "cuda" else "float32")
        if args.dtype == "auto"
        else args.dtype,
        demand=dataclasses.replace(demand, num_env_processes=env_sizes.num_processes),
        env_options=env_sizes.options,
        sync_backend=fitting_backend
        if args.vllm_sync_backend == "auto"
        else args.vllm_sync_backend,
        task_ids=args.task_ids or tuple(range(suite.num_tasks)),
        num_trainers=num_trainers,
        num_envs=num_envs,
        samples_per_step=args.num_steps * num_envs,
        num_minibatches=num_minibatches,
        num_training_steps=num_training_steps,
        engines_sleep=args.colocate
        and args.vllm_enable_sleep
        and not args.async_depth
        and device == "cuda",
        policy_optimizer_steps=max(1, num_training_steps - args.value_init_steps)
        * num_minibatches
        * args.num_epochs,
        value_optimizer_steps=num_training_steps * num_minibatches * value_epochs,
    )


# ---------------------------------------------------------------------------------------------- training
class PolicyTrainer:
    """One FSDP rank: its shard of policy, critic and optimizer states; `ppo/learner.py` is the update itself."""

    def __init__(
        self, args: Args, plan: Plan, rank: int, counted_tokens: Sequence[int] | None = None
    ) -> None:
        torch.set_num_threads(args.trainer_num_threads)
        self.args, self.plan, self.rank = args, plan, rank
        self.counted_tokens = counted_tokens
        if args.deterministic:
            torch.use_deterministic_algorithms(True)

    def address(self) -> tuple[str, int]:
        """Host and a free port for the process group, asked of rank 0."""
        return ray_utils.node_address(), ray_utils.free_port()

    def setup(self, master_addr: str, master_port: int) -> dict[str, float]:
        """Join the process group, load and shard the models, make the optimizers; returns parameter counts."""
        args, plan = self.args, self.plan
        ray_utils.use_node_interface()
        os.environ |= {
            "MASTER_ADDR": master_addr,
            "MASTER_PORT": str(master_port),
            "LOCAL_RANK": "0",
        }
        os.environ |= {"RANK": str(self.rank), "WORLD_SIZE": str(plan.num_trainers)}
        self.device = fsdp_utils.setup_distributed(device_type=plan.device).device
        self.dtype = getattr(torch, plan.dtype)
        torch.manual_seed(args.seed)  # the same on every rank: what is initialised here must agree
        builder = ModelBuilder(args, self.device, self.dtype)
        policy, self.adapter = builder.policy()
        critic = builder.critic(policy.config.text_config.hidden_size)
        warmup = args.policy_lr_warmup_steps * plan.num_minibatches * args.num_epochs
        self.policy = make_trainable(
            policy,
            args.learning_rate,
            args.policy_lr_scheduler_type,
            warmup,
            plan.policy_optimizer_steps,
        )
        self.critic = make_trainable(
            critic,
            args.value_learning_rate,
            args.value_lr_scheduler_type,
            0,
            plan.value_optimizer_steps,
        )
        self.learner = PPOLearner(
            args, self.policy, self.critic, load_processor(args.vla_path),
            reference=builder.reference(policy, self.adapter), dtype=self.dtype,
            counted_tokens=self.counted_tokens,
        )  # fmt: skip
        prompts = [
            self.learner.processor.prompt_ids(t)
            for t in get_suite(args.task_suite_name).instructions
        ]
        share = (
            1.0 - args.gpu_memory_utilization if args.colocate and not plan.engines_sleep else 1.0
        )
        check_memory(self.learner, prompts, plan.samples_per_step // plan.num_trainers, share=share)
        self.writer = BackgroundWriter()
        torch.manual_seed(args.seed * 1000 + self.rank)
        return {
            "policy parameters": sum(p.numel() for p in policy.parameters()),
            "trained": sum(p.numel() for p in self.policy.parameters),
            "critic parameters": sum(p.numel() for p in critic.parameters()),
        }

    def update(
        self, shard_refs: Sequence[ray.ObjectRef], step: int
    ) -> dict[str, float | None] | None:
        """One training step on this rank's environments; returns metrics averaged over all ranks, None if stopped.

        Without shards an update that was stopped goes on.
        """
        metrics = self.learner.update(
            Rollout.concat(ray.get(list(shard_refs)), mixed_versions=self.args.async_depth > 0)
            if shard_refs
            else None,
            step,
        )
        if metrics is None:
            return None
        metrics["mem/trainer_peak_gib"] = fsdp_utils.peak_memory_gib(self.device)
        if self.plan.engines_sleep:
            torch.cuda.empty_cache()  # what the allocator keeps is what the waking engine needs
        return metrics

    def open_channel(self) -> dict[str, Any] | None:
        """Start listening for the engines; returns what they need to join, None on a rank that does not send."""
        args, backend = self.args, self.plan.sync_backend
        exporter = WeightExporter(self.policy.model, self.dtype, args.sync_bucket_mib << 20)
        receivers = (
            1 if backend == "ipc" else args.vllm_num_engines * args.vllm_tensor_parallel_size
        )
        host = ray_utils.node_address()
        self.sender = WeightSender(
            exporter, backend, rank=self.rank, num_receivers=receivers, host=host
        )
        return self.sender.open()

    def connect(self) -> None:
        """Wait until every engine has joined."""
        self.sender.connect()

    def send_weights(self, version: int) -> int:
        """Send the policy (LoRA merged in float32) to the engines in buckets; returns the number of tensors.

        A collective; returns when every engine has loaded them.
        """
        return self.sender.send(version, verify=self.args.verify_weight_sync).num_params

    @ray.method(concurrency_group="control")
    def request_stop(self) -> None:
        """Let the update end after the minibatch under way; answered while it runs."""
        self.learner.stop_requested = True

    @ray.method(concurrency_group="control")
    def where(self) -> str:
        """What this rank is doing; answered while it does it."""
        return where_others_are()

    def minibatches_done(self) -> int | None:
        """Of an update that was stopped; None without one."""
        progress = self.learner.progress
        return sum(progress.num_done.values()) if progress else None

    def save_policy(self, folder: str, json_files: dict[str, Any], overwrite: bool = False) -> None:
        """Write the adapter (LoRA) or the whole model folder, all or nothing. A collective; rank 0 writes."""
        state = fsdp_utils.full_state_dict(
            self.policy.model, trainable_only=self.adapter is not None
        )
        if self.rank == 0:
            with checkpoint_utils.atomic_directory(folder, overwrite=overwrite) as partial:
                self._write_policy(partial, state)
                checkpoint_utils.write_json_files(partial, json_files)

    def _write_policy(self, folder: Path, state: dict[str, torch.Tensor]) -> None:
        if self.adapter is not None:
            peft_utils.save_adapter(self.adapter, state, folder)
            return
        checkpoint_utils.save_weights(folder, state)
        checkpoint_utils.copy_model_files(self.args.vla_path, folder)

    def begin_checkpoint(self, partial: str, target: str) -> None:
        """Copy the state; a thread writes it and the policy into `partial`, then renames that. A collective."""
        folder = Path(partial)

        def complete() -> (
            None
        ):  # the policy comes from the files just written: nobody waits for it to be gathered
            state = training_state.load_prefixed(folder / STATE_DIR, "policy.weight.")
            if self.adapter is None:
                state |= training_state.read_frozen(self.args.vla_path, state)  # what is frozen
            self._write_policy(folder, state)
            training_state.publish(folder, target)
            remove_old(Path(target).parent, self.args.keep_last)

        after = complete if self.rank == 0 else None
        trainer_state.begin_saving(self.learner, folder / STATE_DIR, self.writer, after)

    def wait_for_checkpoint(self) -> None:
        """Until the last checkpoint begun is on disk; raises if it could not be written."""
        self.writer.wait()

    def load_checkpoint(self, folder: str, num_saved: int, step: int) -> None:
        """Continue from what `num_saved` ranks wrote after training step `step`."""
        trainer_state.load(self.learner, Path(folder), num_saved, seed=(self.args.seed, step))


# ---------------------------------------------------------------------------------------------- rollouts


class RolloutWorker:
    """One vLLM engine and the environments it acts in, in one process: no RPC per environment step."""

    def __init__(self, args: Args, plan: Plan, index: int, statistics: dict[str, Any]) -> None:
        from utils.vllm_utils import (
            ActionEngine,
            EngineConfig,
        )  # imports vLLM, which only this process wants

        self.args, self.plan, self.index = args, plan, index
        self.processor = load_processor(args.vla_path)
        self.statistics = statistics
        ray_utils.use_node_interface()
        self.engine = ActionEngine(
            EngineConfig(
                model_dir=args.vla_path,
                dtype=plan.dtype,
                tensor_parallel_size=args.vllm_tensor_parallel_size,
                gpu_memory_utilization=args.gpu_memory_utilization,
                enforce_eager=args.vllm_enforce_eager or plan.device == "cpu",
                max_num_seqs=args.local_rollout_batch_size,
                seed=args.seed,
                num_threads=args.engine_num_threads,
                weight_transfer_backend=plan.sync_backend,
                enable_sleep_mode=plan.engines_sleep,
                extra=json.loads(args.engine_args),
            )
        )
        self.tokenizer = ActionTokenizer.from_config(OpenVLAConfig.from_pretrained(args.vla_path))
        self.suite = get_suite(args.task_suite_name)
        self.collector = self._build_collector()
        self.sampling_rng = np.random.default_rng((args.seed, index))

    def _build_collector(self) -> Collector:
        args = self.args
        prompts = [self.processor.prompt_ids(text) for text in self.suite.instructions]
        return Collector(
            self._make_training_environments(),
            prompts,
            self._sample,
            self._decode,
            num_groups=args.num_env_groups,
            seed=(args.seed, self.index),
            time_limit=args.max_env_length or self.suite.max_steps,
        )

    def _make_training_environments(self) -> VectorEnv:
        options = split_options(self.suite, **world_flags(self.args))[0]
        return self._make_environments(
            self.args.local_rollout_batch_size,
            self.suite.training_options(options),
            self.args.max_env_length,
        )

    def _make_environments(
        self, num_envs: int, options: dict[str, Any], max_steps: int | None
    ) -> VectorEnv:
        return VectorEnv(
            self.args.task_suite_name,
            num_envs,
            num_processes=min(self.plan.demand.num_env_processes, num_envs),
            image_size=self.processor.image_processor.image_size[0],
            max_steps=max_steps,
            step_timeout_s=self.args.env_timeout_s,
            center_crop=self.args.center_crop,
            env_kwargs=options | self.plan.env_options,
            first_turn=self.index * self.plan.demand.num_env_processes,
        )

    def policy_version(self) -> int:
        """Version of the engine's weights; answers once the engine is ready."""
        return self.engine.policy_version

    def process(self) -> tuple[int, str]:
        """Process id, and this worker's GPUs as CUDA takes them."""
        return os.getpid(), os.environ.get("CUDA_VISIBLE_DEVICES", "")

    def _sample(self, prompt_ids: list[list[int]], images: np.ndarray) -> Any:
        return self.engine.generate(
            prompt_ids,
            images,
            temperature=self.args.temperature,
            seed=int(self.sampling_rng.integers(2**31)),
        )

    def _decode(self, token_ids_BA: np.ndarray) -> np.ndarray:
        return tokens_to_env_actions(token_ids_BA, self.tokenizer, self.statistics)

    def join_channel(self, infos: Sequence[dict[str, Any] | None]) -> None:
        """Connect the engine to the trainer ranks' channels, `infos` by rank, while they wait in `connect`."""
        from utils.weights.receiver import engine_info

        backend = self.plan.sync_backend
        info = engine_info(infos, backend, self.index, self.args.vllm_tensor_parallel_size)
        self.engine.init_weight_transfer(backend, info)

    def receive_weights(self, version: int) -> Any:
        """Load what the trainers send now; returns the engine's report (parameters, bytes, version)."""
        return self.engine.receive_weights(version)

    def collect(
        self, task_ids: list[int], step: int
    ) -> tuple[list[ray.ObjectRef], list[TrainingEpisode], dict[str, float], dict[str, Any]]:
        """Act `num_steps` times in every environment.

        Returns a shard for each trainer, the episodes to report, statistics and the world state.
        """
        self.sampling_rng = np.random.default_rng((self.args.seed, self.index, step))
        start = time.perf_counter()
        rollout, episodes = self.collector.collect(self.args.num_steps, iter(task_ids))
        rollout = dataclasses.replace(rollout, policy_version=self.engine.policy_version)
        stats = {
            "policy_version": float(rollout.policy_version),
            "collect_s": time.perf_counter() - start,
            "num_void_steps": float((~rollout.valid_TB).sum()),
            "mem_gib": fsdp_utils.peak_memory_gib(torch.device("cpu")),
        } | self.collector.statistics()
        shards = [
            ray.put(rollout.shard(rank, self.plan.num_trainers))
            for rank in range(self.plan.num_trainers)
        ]
        return shards, episodes, stats, self.world_state()

    def world_state(self) -> dict[str, Any]:
        """State of the environments and of what gives them episodes."""
        return self.collector.state_dict()

    def load_world(self, state: dict[str, Any]) -> None:
        """Bring the environments to a saved state, by playing their episodes again."""
        self.collector.load_state_dict(state)

    def sleep(self) -> None:
        """Give the engine's GPU memory back; its weights are sent again before it acts."""
        self.engine.sleep(level=2)

    def wake_up(self, what: str) -> None:
        """Take memory again: "weights" before new ones come, "kv_cache" after."""
        self.engine.wake_up([what])

    def evaluate(
        self, requests: list[ResetRequest], video_dir: str | None = None, *, restore: bool = True
    ) -> EvaluationRun:
        """Run each request once, greedily, with the suite's evaluation settings.

        The training environments are closed first, so that memory never holds both kinds. With
        `restore` they are made again afterwards and their running episodes are replayed: training
        continues as if there had been no evaluation. With `video_dir` the first success and the
        first failure of each task are written there as mp4.
        """
        if not requests:
            return EvaluationRun()

        def act(images: np.ndarray, task_ids: np.ndarray) -> np.ndarray:
            prompts = [self.collector.prompts[i] for i in task_ids]
            return self._decode(
                self.engine.generate(prompts, images, temperature=1.0, greedy=True).token_ids
            )

        recorder = None
        if video_dir:
            texts = self.suite.instructions
            recorder = EpisodeRecorder(
                Path(video_dir), ("success", "failure"), max_per_task=1, instructions=texts
            )
        state = self.world_state()
        self.collector.vector.close()
        num_envs = min(self.args.local_rollout_batch_size, len(requests))
        options = split_options(self.suite, **evaluation_flags(self.args))[0]
        with self._make_environments(num_envs, options, max_steps=None) as vector:
            run = run_episodes(vector, num_envs, act, requests, observer=recorder)
            state["num_replaced"] += vector.num_replaced
        if recorder:
            recorder.save_contact_sheet()
        if restore:
            self.collector.vector = self._make_training_environments()
            self.load_world(state)
        return run

    def close(self) -> None:
        """End the environment processes and the engine."""
        self.collector.vector.close()
        self.engine.close()


# ---------------------------------------------------------------------------------------------- driver


class Cluster:
    """Every actor of the run, placed: trainers, rollout workers, curriculum."""

    def __init__(self, args: Args, plan: Plan, stop: StopSignal) -> None:
        self.args, self.plan, self.stop = args, plan, stop
        self._stop_calls: list[ray.ObjectRef] = []
        self._statistics = action_statistics(args)
        self._counted_tokens = counted_tokens(args)
        if self._counted_tokens is not None:
            logger.info(f"action tokens in ratio, entropy and KL: {self._counted_tokens}")
        self._placement = ray_utils.place_on_cluster(plan.demand)
        for line in self._placement.lines:
            logger.info(line)
        self._group = ray_utils.reserve(self._placement, args.placement_timeout_s)
        self._engine_env = engine_env(plan.device, args.engine_num_threads)
        self.version = 0  # of the trainers' policy: updates done
        self.trainers = [self._start_trainer(rank) for rank in range(plan.num_trainers)]
        name, size = "rollout worker", args.vllm_num_engines
        self.spares = SpareActors(
            name, size if args.spare_workers else 0, self._start_spare, self._worker_arguments
        )
        self.pool = ActorPool(
            name, self._start_worker, size, self._restore_workers, ping="policy_version"
        )
        self.workers = self.pool.actors
        self.curriculum = RevivableActor("curriculum actor", self._start_curriculum)

    def _start_trainer(self, rank: int) -> Any:
        args, placement = self.args, self._placement
        env = {"OMP_NUM_THREADS": str(args.trainer_num_threads)}
        env |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"} if args.deterministic else {}
        return ray.remote(concurrency_groups={"control": 1})(PolicyTrainer).options(
            num_cpus=1, num_gpus=placement.trainer_gpus, runtime_env=ray_utils.actor_env(**env),
            scheduling_strategy=ray_utils.in_bundle(self._group, placement.trainer_bundles[rank]),
        ).remote(args, self.plan, rank, self._counted_tokens)  # fmt: skip

    def _start_worker(self, index: int) -> Any:
        if spare := self.spares.take(index):
            return spare
        return self._in_worker_place(RolloutWorker, index, 1, self._placement.engine_gpus).remote(
            *self._worker_arguments(index)
        )

    def _start_spare(self, index: int) -> Any:
        """It asks Ray for nothing, and sees the GPUs of the worker that it is for."""
        pid, devices = ray.get(self.workers[index].process.remote())
        place = self._in_worker_place(
            spare_class(RolloutWorker), index, 0, 0, CUDA_VISIBLE_DEVICES=devices
        )
        return place.remote(import_engine, pid)

    def _in_worker_place(
        self, kind: type, index: int, num_cpus: int, num_gpus: float, **env: str
    ) -> Any:
        return ray.remote(kind).options(
            num_cpus=num_cpus, num_gpus=num_gpus, runtime_env=ray_utils.actor_env(**self._engine_env, **env),
            scheduling_strategy=ray_utils.in_bundle(self._group, self._placement.engine_bundles[index]),
        )  # fmt: skip

    def _worker_arguments(self, index: int) -> tuple[Any, ...]:
        return self.args, self.plan, index, self._statistics

    def _start_curriculum(self) -> Any:
        args = self.args
        return ray.remote(CurriculumManager).options(num_cpus=0).remote(
            list(self.plan.task_ids), ema_alpha=args.curriculum_ema_alpha, tau=args.curriculum_tau,
            min_prob=args.curriculum_min_prob, seed=args.seed, uniform=not args.use_curriculum,
        )  # fmt: skip

    def setup(self) -> dict[str, float]:
        """Start the trainers' process group while the engines load; returns parameter counts.

        Colocated engines load first: they measure the GPU's free memory.
        """
        if self.args.colocate:
            wait_all([w.policy_version.remote() for w in self.workers], "loading the engines")
        self.sleep_engines()
        address = ray.get(self.trainers[0].address.remote())
        counts = wait_all(
            [t.setup.remote(*address) for t in self.trainers], "loading the trainers' models"
        )
        self._connect()
        self._note_worlds()
        self.spares.prepare()
        return counts[0]

    def _connect(self) -> None:
        infos = wait_all(
            [t.open_channel.remote() for t in self.trainers], "opening the weights' channels"
        )
        joining = [t.connect.remote() for t in self.trainers] + [
            w.join_channel.remote(infos) for w in self.workers
        ]
        wait_all(joining, "connecting trainers and engines")

    def _on_trainers(
        self, calls: Sequence[ray.ObjectRef], what: str, poll: Callable[[], None] | None = None
    ) -> list[Any]:
        """Results of a call to each trainer; one that hangs ends the attempt, and is named with what it is doing."""
        return wait_all(
            calls, what, poll=poll, timeout_s=self.args.hang_timeout_s, explain=self._explain
        )

    def _explain(self, index: int) -> str:
        """Who is late and where: trainers are counted first, then workers."""
        if index < len(self.trainers):
            return ask_where(self.trainers[index], f"trainer rank {index}")
        return f"rollout worker {index - len(self.trainers)}"

    def _restore_workers(self, indices: list[int]) -> None:
        """Give new engines the present policy, and their environments the state before the rollout that was lost."""
        ready = [self.workers[i].policy_version.remote() for i in indices]
        wait_all([*self.spares.beginning(), *ready], "loading the engines")
        self._connect()
        self.push_weights(self.version)
        wait_all(
            [self.workers[i].load_world.remote(self.worlds[i]) for i in indices],
            "restoring environments",
        )
        self.spares.prepare()

    def _note_worlds(self) -> None:
        calls = [w.world_state.remote() for w in self.workers]
        self.worlds: list[dict[str, Any]] = wait_all(calls, "asking for the environments' state")
        self.curriculum_state = self.curriculum.state
        self.before_rollout = self.worlds, self.curriculum_state

    def world_states(self, *, is_rollout_used: bool) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """States of the workers' environments and of the curriculum, after the last finished rollout or before it."""
        return (self.worlds, self.curriculum_state) if is_rollout_used else self.before_rollout

    def push_weights(self, version: int) -> dict[str, float]:
        """Send the trainers' weights to every engine and check that each has all of them at this version."""
        self.version = version
        if self.pool.restore_started():  # which sent them to all
            return {}
        what, num_trainers = (
            f"sending weights of version {version} to the engines",
            len(self.trainers),
        )
        self._wake_engines("weights")
        calls = [t.send_weights.remote(version) for t in self.trainers]
        calls += [w.receive_weights.remote(version) for w in self.workers]
        workers = range(num_trainers, len(calls))
        results = wait_all(
            calls,
            what,
            timeout_s=self.args.hang_timeout_s,
            replaceable=workers,
            explain=self._explain,
        )
        num_sent, reports = results[0], results[num_trainers:]
        if any(isinstance(result, ActorFailure) for result in results):
            return self._push_again(version)
        if any(r.num_params != num_sent or r.version != version for r in reports):
            raise RuntimeError(
                f"sent {num_sent} tensors of version {version}, the engines report {reports}"
            )
        self._wake_engines("kv_cache")
        return {"sync/num_tensors": num_sent, "sync/mib": reports[0].num_bytes / 2**20}

    def _push_again(self, version: int) -> dict[str, float]:
        """After a sync that broke off: replace the workers that do not answer; all get their weights with them."""
        calls = [w.policy_version.remote() for w in self.workers]
        answers = wait_all(
            calls, "asking the engines", timeout_s=60.0, replaceable=range(len(calls))
        )
        failed = {i: answer for i, answer in enumerate(answers) if isinstance(answer, ActorFailure)}
        if not failed:
            raise RuntimeError(
                f"weights of version {version} did not reach the engines, though all of them live"
            )
        self.pool.replace(failed, f"receiving weights of version {version}")
        return {}

    def sleep_engines(self) -> None:
        """Let colocated engines give their GPUs' memory to the trainers, until the next `push_weights`."""
        if self.plan.engines_sleep:
            wait_all([w.sleep.remote() for w in self.workers], "letting the engines sleep")

    def _wake_engines(self, what: str) -> None:
        if self.plan.engines_sleep:
            wait_all([w.wake_up.remote(what) for w in self.workers], f"waking the engines' {what}")

    def start_collecting(self, step: int) -> list[ray.ObjectRef]:
        """Let every worker collect the rollout of training step `step`; returns at once."""
        most = self.args.local_rollout_batch_size * (self.args.num_steps + 2)
        self._tasks = [self.curriculum.change("get_batch", most) for _ in self.workers]
        return [self._collect(index, step) for index in range(len(self.workers))]

    def _collect(self, index: int, step: int) -> ray.ObjectRef:
        return self.workers[index].collect.remote(self._tasks[index], step)

    def finish_collecting(self, calls: list[ray.ObjectRef], step: int) -> Collected:
        """Wait for the workers' rollouts and tell the curriculum how their episodes ended."""
        what = f"collecting the rollout of training step {step}"
        limits = {"poll": self.stop.check, "timeout_s": self.args.hang_timeout_s}
        results = self.pool.on_each(lambda index: self._collect(index, step), what, calls, **limits)
        shards = [[result[0][rank] for result in results] for rank in range(self.plan.num_trainers)]
        episodes = [episode for result in results for episode in result[1]]
        if episodes:
            ids, successes = [e.task_id for e in episodes], [e.success for e in episodes]
            self.curriculum.change("report_results", ids, successes)
        self.before_rollout = self.worlds, self.curriculum_state
        self.worlds = [result[3] for result in results]
        self.curriculum_state = self.curriculum.state
        return Collected(shards, episodes, [result[2] for result in results], {})

    def update(self, shards: list[list[ray.ObjectRef]], step: int) -> dict[str, float | None]:
        """The PPO update on every rank; the metrics are averages over all of them.

        Without shards the trainers go on with an update that was stopped. Raises StopRequested when it was stopped.
        """
        calls = [
            t.update.remote(s, step)
            for t, s in zip(self.trainers, shards or [[]] * len(self.trainers), strict=True)
        ]
        results = self._on_trainers(calls, f"updating at training step {step}", self._during_update)
        if results[0] is None:
            self.stop.check()
        self.version = step
        peak = max(r["mem/trainer_peak_gib"] for r in results)
        return results[0] | {"mem/trainer_peak_gib": peak}

    def _during_update(self) -> None:
        if self.stop.requested and not self._stop_calls:
            self._stop_calls = [t.request_stop.remote() for t in self.trainers]
        if not self.args.colocate:  # else the trainers have the memory that a new engine measures
            self.pool.start_for_dead("the trainers update")

    def evaluate(self, video_dir: Path | None, *, restore: bool = True) -> EvaluationRun:
        """Greedy episodes from every fixed initial state, shared among the workers.

        `restore`: bring the training environments back afterwards, see `RolloutWorker.evaluate`.
        """
        num_states = (
            self.args.num_trials_per_task or get_suite(self.args.task_suite_name).num_init_states
        )
        requests = evaluation_requests(self.plan.task_ids, num_states)
        workers = len(self.workers)
        folders = [str(video_dir / f"worker_{i}") if video_dir else None for i in range(workers)]

        def evaluate(index: int) -> ray.ObjectRef:
            return self.workers[index].evaluate.remote(
                requests[index::workers], folders[index], restore=restore
            )

        total = EvaluationRun()
        for run in self.pool.on_each(evaluate, "evaluating", poll=self.stop.check):
            total.episodes += run.episodes
            total.void += run.void
            total.num_dropped += run.num_dropped
        if restore:  # the same states as before, except for episodes whose replay diverged
            calls = [w.world_state.remote() for w in self.workers]
            self.worlds = wait_all(calls, "asking for the environments' state")
        return total

    def save(self, folder: Path, metadata: dict[str, Any], *, overwrite: bool = False) -> None:
        """Write the policy (adapter or whole model folder), its metadata and the curriculum."""
        files = {"metadata.json": metadata}
        wait_all(
            [t.save_policy.remote(str(folder), files, overwrite) for t in self.trainers],
            f"saving {folder}",
        )
        self.save_curriculum(folder / "curriculum.json")

    def begin_checkpoint(self, folder: Path, state: RunState, metadata: dict[str, Any]) -> None:
        """Begin a complete checkpoint; the trainers write it in the background, one at a time, beside its place."""
        self.wait_for_checkpoint()
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        (partial / STATE_DIR).mkdir(parents=True)
        state.write(partial / STATE_DIR)
        checkpoint_utils.write_json_files(partial, {"metadata.json": metadata})
        self.save_curriculum(partial / "curriculum.json")
        calls = [t.begin_checkpoint.remote(str(partial), str(folder)) for t in self.trainers]
        wait_all(calls, f"beginning {folder}")

    def wait_for_checkpoint(self) -> None:
        """Until the last checkpoint begun is on disk."""
        wait_all([t.wait_for_checkpoint.remote() for t in self.trainers], "writing a checkpoint")

    def minibatches_done(self) -> int | None:
        """Of an update that was stopped; None without one."""
        return wait_all(
            [t.minibatches_done.remote() for t in self.trainers], "stopping the update"
        )[0]

    def load(self, folder: Path, state: RunState) -> None:
        """Bring trainers, environments and curriculum to a checkpoint's state."""
        calls = [
            t.load_checkpoint.remote(str(folder), state.num_trainers, state.step)
            for t in self.trainers
        ]
        calls += [
            w.load_world.remote(world) for w, world in zip(self.workers, state.worlds, strict=True)
        ]
        wait_all(calls, f"loading {folder}")
        self.curriculum.change("load_state_dict", state.curriculum)
        self.version = state.step
        self._note_worlds()

    def curriculum_stats(self) -> dict[int, dict[str, float]]:
        """Statistics of every task, by its id."""
        return self.curriculum.ask("stats")

    def save_curriculum(self, path: Path) -> None:
        """Write the curriculum's statistics and state."""
        self.curriculum.ask("save", str(path))

    def close(self) -> None:
        """End the workers' environments and engines; Ray ends the rest."""
        ray.wait(
            [w.close.remote() for w in self.workers], num_returns=len(self.workers), timeout=20
        )


def train(args: Args, plan: Plan, cluster: Cluster, run: Run) -> None:
    """The training loop: push weights, collect, update; `async_depth 1` collects the next rollout meanwhile.

    Raises StopRequested when a signal came.
    """
    ahead: list[ray.ObjectRef] = []
    timer = PhaseTimer()
    for step in range(run.steps_done + 1, plan.num_training_steps + 1):
        cluster.stop.check()
        with timer.phase("step"):
            if (
                run.collected is None
            ):  # else the trainers are within this step's update, from the checkpoint
                with timer.phase(
                    "collect"
                ):  # what was begun during the last update; the engines rest afterwards
                    collected = cluster.finish_collecting(ahead, step) if ahead else None
                with timer.phase("sync"):
                    sync = cluster.push_weights(version=step - 1)
                if args.eval_freq and (step - 1) % args.eval_freq == 0:
                    sync |= run.evaluate(step - 1)
                with timer.phase("collect"):
                    collected = collected or cluster.finish_collecting(
                        cluster.start_collecting(step), step
                    )
                run.collected = dataclasses.replace(collected, metrics=sync)
                is_last = step == plan.num_training_steps
                ahead = (
                    cluster.start_collecting(step + 1) if args.async_depth and not is_last else []
                )
            with timer.phase("update"):
                if run.collected.shards:  # else the engines were not woken since the set-up
                    cluster.sleep_engines()
                update = cluster.update(run.collected.shards, step)
        episodes, stats, seconds = run.collected.episodes, run.collected.worker_stats, timer.pop()
        metrics = rollout_metrics(episodes, stats) | update | run.collected.metrics
        metrics |= time_metrics(seconds, stats, plan.samples_per_step)
        metrics["train/policy_lag"] = step - 1 - min(s["policy_version"] for s in stats)
        metrics["rollout/num_replaced_workers"] = float(cluster.pool.num_replaced)
        run.report(step, metrics, episodes)
        with timer.phase("checkpoint"):
            run.save_if_due()
    run.finish()


def main(args: Args) -> None:
    """Check everything, start the cluster, train, and leave nothing running."""
    validate(args)
    try:
        num_gpus, nodes = torch.cuda.device_count(), []
        if args.ray_address:
            ray_utils.start_ray(
                args.ray_address
            )  # the cluster says what it has; nothing is placed yet
            args = absolute_paths(args)
            nodes = ray_utils.with_machines(ray_utils.cluster_nodes())
        plan = make_plan(
            args,
            has_gpus=any(node.gpus for node in nodes) if nodes else num_gpus > 0,
            nodes=nodes or [ray_utils.any_local_node(num_gpus)],
        )
        exp_dir = Path(plan.exp_dir)
        nodes = nodes or [ray_utils.local_node(num_gpus, plan.demand)]
        raise_problems(
            placement_problems(plan.demand, nodes) + env_memory_problems(args, plan.demand, nodes)
        )
        if not args.ray_address:
            available = int(available_memory_gib() * 2**30)
            raise_problems(process_problems(plan.demand, available))
        args = fetch_models(args, exp_dir)
        check_files(args, exp_dir)
        checkpoint = choose_checkpoint(args, exp_dir)
        if args.ray_address:
            models = [path for path in (args.vla_path, args.load_adapter_checkpoint) if path]
            placement = ray_utils.place_on_cluster(plan.demand)
            raise_problems(ray_utils.node_problems(placement, exp_dir.parent, models))
        if args.overwrite:
            remove_earlier_run(args, exp_dir)
        exp_dir.mkdir(parents=True, exist_ok=True)
        add_log_file(exp_dir / "log.txt")
        for warning in warnings(args):
            logger.warning(warning)
        logger.info(
            f"{plan.num_training_steps} training steps of {plan.samples_per_step} environment steps; {exp_dir}"
        )
        if not args.ray_address:
            ray_utils.start_ray(None, nodes[0].gpus, nodes[0].cpus)
        stop = StopSignal()
        stop.install()
        cluster = Cluster(args, plan, stop)
        counts = cluster.setup()
        logger.info(", ".join(f"{k} {v:,.0f}" for k, v in counts.items()))
        run = Run(args, plan, cluster, checkpoint)
        try:
            train(args, plan, cluster, run)
            cluster.close()
        except StopRequested:
            run.save_stopped()  # the workers may be within a rollout, which nobody waits for
    finally:
        ray.shutdown()


def supervise(args: Args) -> int:
    """Run this command line in a process of its own, and again from its last checkpoint when it dies."""
    try:
        validate(args)
    except CommandLineError as problem:
        logger.error("%s", problem)
        return REFUSED
    folder = resumed_exp_dir(args.resume)
    name = (
        [] if folder else ["--exp_id", args.exp_id or default_exp_id(args), "--run_id_note", "None"]
    )
    again = ["--resume", str(folder or "auto"), "--no_overwrite"]
    first, later = (
        same_command(*name, "--max_restarts", "0"),
        same_command(*name, *again, "--max_restarts", "0"),
    )
    return run_attempts(first, later, args.max_restarts)


if __name__ == "__main__":
    sys.exit(
        supervise(flags)
        if flags.max_restarts > 0
        else run_attempt(lambda: main(flags), CommandLineError)
    )
