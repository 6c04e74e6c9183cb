"""The PPO update of one FSDP rank: old log-probs and values, GAE, then epochs over minibatches.

Knows torch and torch.distributed, neither Ray nor vLLM. All ranks call the same methods in the same order; whatever
decides how often a collective runs is either equal on all ranks or all-reduced first.
Shapes: N samples of this rank (T steps x B environments, flattened), K truncated episodes, L prompt tokens, A action
tokens, V action vocabulary, P patches, D hidden.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ppo.gae import gae
from ppo.losses import (
    action_logprobs,
    entropy,
    explained_variance_of_moments,
    kl_k3,
    moments,
    normalize,
    policy_loss,
    value_loss,
    weighted_mean,
)
from ppo.rollout import Rollout, minibatches
from prismatic.vla.action_tokenizer import ActionTokenizer
from utils import fsdp_utils
from utils.logging_utils import PhaseTimer


@dataclass
class Batch:
    """One rank's rollout as N samples, with what the update needs; every tensor is indexed by sample."""

    prompt_ids_NL: Tensor
    prompt_mask_NL: Tensor
    images_NHWC: Tensor  # uint8
    action_ids_NA: Tensor
    old_logprob_NA: Tensor
    weight_N: Tensor  # 1, or 0 for samples of a dropped episode
    features_NPD: Tensor | None = None  # vision features, where the vision backbone is frozen
    hidden_ND: Tensor | None = None  # the policy's prompt features, for the shared critic
    ref_logprob_NA: Tensor | None = None
    old_value_N: Tensor | None = None
    advantage_N: Tensor | None = None
    return_N: Tensor | None = None

    def __getitem__(self, index: Tensor | slice) -> "Batch":
        """The samples at `index`."""
        taken: dict[str, Any] = {name: value[index] for name, value in self._tensors().items()}
        return dataclasses.replace(self, **taken)

    def _tensors(self) -> dict[str, Tensor]:
        """The fields that are there."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in fields.items() if value is not None}

    def to(self, device: torch.device) -> "Batch":
        """Everything but the images on `device`; those follow micro-batch by micro-batch."""
        moved: dict[str, Any] = {n: v.to(device) for n, v in self._tensors().items() if n != "images_NHWC"}
        return dataclasses.replace(self, **moved)

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.action_ids_NA)


class Averages:
    """Weighted means, and maxima, of named scalars over every minibatch and every rank."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._maxima: dict[str, float] = {}

    def add(self, values: dict[str, Tensor | float], weight: float = 1.0) -> None:
        """Add one observation of each value; weight 0 only makes the name known (names must agree on all ranks)."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + (float(value) * weight if weight else 0.0)
            self._sums[f"{name}#"] = self._sums.get(f"{name}#", 0.0) + weight

    def add_shares(self, shares: dict[str, Tensor], is_last: bool) -> None:
        """Add a micro-batch's shares of its minibatch's means; the last micro-batch closes the observation."""
        for name, share in shares.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(share.detach())
            self._sums[f"{name}#"] = self._sums.get(f"{name}#", 0.0) + float(is_last)

    def add_maximum(self, name: str, value: Tensor | float) -> None:
        """Keep the largest value seen under `name`."""
        self._maxima[name] = max(self._maxima.get(name, -math.inf), float(value))

    def reduce(self, device: torch.device) -> dict[str, float | None]:
        """Means and maxima over all ranks (collectives); None where nothing was added anywhere."""
        sums = fsdp_utils.all_reduce_sums(self._sums, device)
        names = sorted(self._maxima)
        maxima = torch.tensor([self._maxima[n] for n in names], dtype=torch.float64, device=device)
        if names:
            dist.all_reduce(maxima, dist.ReduceOp.MAX)
        means = {n: sums[n] / sums[f"{n}#"] if sums[f"{n}#"] else None for n in sums if not n.endswith("#")}
        return means | dict(zip(names, maxima.tolist(), strict=True))


class PPOArgs(Protocol):
    """The flags that the update reads; the driver's `Args` documents each."""

    seed: int
    temperature: float
    num_epochs: int
    num_value_epochs: int | None
    local_mini_batch_size: int
    per_device_train_batch_size: int
    per_device_forward_batch_size: int | None
    max_grad_norm: float
    cliprange: float
    cliprange_high: float | None
    ratio_level: Literal["action", "token"]
    gamma: float
    lam: float
    norm_adv: bool
    bootstrap_truncated: bool
    entropy_coef: float
    beta: float
    max_approx_kl: float | None
    old_logprobs: Literal["recompute", "engine"]
    value_model_type: Literal["shared", "vla"]
    value_init_steps: int
    cliprange_value: float
    vf_coef: float
    freeze_vision_backbone: bool


@dataclass(frozen=True)
class Reference:
    """The initial policy: `model`, evaluated inside `context()` (which switches a fresh adapter off, or nothing)."""

    model: Any
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext


@dataclass
class Trainable:
    """A sharded model with what trains it: `parameters` are those with requires_grad."""

    model: Any
    parameters: list[torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    scheduler: Any


class PPOLearner:
    """Runs PPO updates on one rank.

    Args:
        args: the flags.
        policy: an OpenVLAForActionPrediction (sharded, LoRA injected or not) and its optimizer.
        critic: a ValueHead (`value_model_type` shared) or VLACritic, and its optimizer.
        processor: prompts and images of the model.
        reference: the initial policy, needed where `beta` > 0.
        dtype: compute precision of the images.
    """

    def __init__(
        self,
        args: PPOArgs,
        policy: Trainable,
        critic: Trainable,
        processor: Any,
        *,
        reference: Reference | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.args, self.policy, self.critic, self.processor = args, policy, critic, processor
        self.reference, self.dtype = reference, dtype
        self.device = next(policy.model.parameters()).device
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.first_action_id = int(ActionTokenizer.from_config(policy.model.config).action_token_ids[0])
        self.timer = PhaseTimer()

    def update(self, rollout: Rollout, step: int) -> dict[str, float | None]:
        """One training step (counted from 1) on this rank's environments.

        Returns metrics averaged over all minibatches and ranks; None where nothing was measured.

        Raises:
            FloatingPointError: a gradient is not finite; raised on every rank before the optimizer steps.
        """
        averages = Averages()
        with self.timer.phase("prepare"):
            batch = self.prepare(rollout, averages)
        with self.timer.phase("value"), training_mode(self.critic.model):
            self.update_value(batch, step, averages)
        if step > self.args.value_init_steps:
            with self.timer.phase("policy"), training_mode(self.policy.model):
                self.update_policy(batch, step, averages)
        metrics = averages.reduce(self.device)
        metrics["train/learning_rate"] = self.policy.scheduler.get_last_lr()[0]
        metrics["train/value_learning_rate"] = self.critic.scheduler.get_last_lr()[0]
        return metrics | {f"time/trainer_{k}_s": v for k, v in self.timer.pop().items()}

    def _micro_batches(self, batch: Batch, size: int) -> Iterator[Batch]:
        """Consecutive micro-batches without padding beyond their longest prompt."""
        for start in range(0, len(batch), size):
            micro = batch[slice(start, start + size)]
            longest = int(micro.prompt_mask_NL.sum(1).max())
            micro.prompt_ids_NL = micro.prompt_ids_NL[:, :longest]
            micro.prompt_mask_NL = micro.prompt_mask_NL[:, :longest]
            yield micro

    def _pixels(self, micro: Batch) -> Tensor:
        return self.processor.image_processor.normalize(micro.images_NHWC.to(self.device), self.dtype)

    def _forward(self, model: Any, micro: Batch, *, with_actions: bool = True) -> Any:
        """`forward_actions` of a policy on a micro-batch, from cached vision features where there are any."""
        vision = {"vision_features": micro.features_NPD} if micro.features_NPD is not None else {}
        return model.forward_actions(
            micro.prompt_ids_NL,
            micro.prompt_mask_NL,
            micro.action_ids_NA if with_actions else None,
            **(vision or {"pixel_values": self._pixels(micro)}),
        )

    def _logprobs(self, logits_BAV: Tensor, micro: Batch) -> Tensor:
        index_BA = micro.action_ids_NA - self.first_action_id
        return action_logprobs(logits_BAV, index_BA, self.args.temperature)

    @torch.no_grad()
    def prepare(self, rollout: Rollout, averages: Averages) -> Batch:
        """Old log-probs, values, GAE and normalised advantages of this rank's rollout, as flat samples."""
        num_samples = rollout.num_steps * rollout.num_envs
        batch = self._flatten(rollout)
        engine_logprob_NA = batch.old_logprob_NA[:num_samples]
        self._evaluate(batch)
        assert batch.old_value_N is not None
        rest = (rollout.num_envs, len(rollout.final_t_K))
        values = batch.old_value_N.cpu()[: num_samples + sum(rest)].split((num_samples, *rest))
        value_TB = values[0].view(rollout.num_steps, rollout.num_envs)
        next_value_TB = rollout.next_values(value_TB, values[1], values[2])
        ends_TB = rollout.terminated_TB if self.args.bootstrap_truncated else rollout.done_TB
        advantage_TB, return_TB = gae(
            rollout.reward_TB, value_TB, next_value_TB, ends_TB, rollout.done_TB, self.args.gamma, self.args.lam
        )
        batch = batch[slice(0, num_samples)]
        batch.return_N = return_TB.flatten().to(self.device)
        batch.advantage_N = self._normalise(advantage_TB.flatten(), batch.weight_N.cpu()).to(self.device)
        self._log_prepared(batch, engine_logprob_NA, averages)
        return batch

    def _flatten(self, rollout: Rollout) -> Batch:
        """Samples of the rollout, then each environment's last observation, then the truncated episodes' final ones.

        Every rank gets the same number of rows (the last is repeated), so that all make the same collective calls.
        """
        num_samples, num_final = rollout.num_steps * rollout.num_envs, len(rollout.final_t_K)
        most = torch.tensor(num_final, device=self.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        final_task_K = rollout.task_id_TB[rollout.final_t_K, rollout.final_b_K]
        task_N = torch.cat([rollout.task_id_TB.flatten(), rollout.last_task_id_B, final_task_K])
        images_NHWC = torch.cat(
            [rollout.images_TBHWC.flatten(0, 1), rollout.last_images_BHWC, rollout.final_images_KHWC]
        )
        row_N = torch.arange(len(task_N) + int(most) - num_final).clamp(max=len(task_N) - 1)
        # what has no action of its own (observations after the rollout) borrows the first one and has weight 0
        action_N = torch.where(row_N < num_samples, row_N, 0)
        prompt_ids, prompt_mask = self.processor.collate_prompts(rollout.prompts)
        batch = Batch(
            prompt_ids_NL=prompt_ids[task_N[row_N]],
            prompt_mask_NL=prompt_mask[task_N[row_N]],
            images_NHWC=images_NHWC[row_N],
            action_ids_NA=rollout.action_ids_TBA.flatten(0, 1)[action_N],
            old_logprob_NA=rollout.logprob_TBA.flatten(0, 1)[action_N],
            weight_N=rollout.valid_TB.flatten()[action_N].float() * (row_N < num_samples),
        )
        return batch.to(self.device)

    def _evaluate(self, batch: Batch) -> None:
        """Fill vision features, prompt features, old (and reference) log-probs and values, without gradients."""
        args, size = self.args, self.args.per_device_forward_batch_size or self.args.per_device_train_batch_size
        if args.freeze_vision_backbone:
            features = [self.policy.model.encode_vision(self._pixels(m)) for m in self._micro_batches(batch, size)]
            batch.features_NPD = torch.cat(features)
        recompute = args.old_logprobs == "recompute"
        hidden, logprobs = [], []
        for micro in self._micro_batches(batch, size):
            out = self._forward(self.policy.model, micro, with_actions=recompute)
            hidden.append(out.prompt_hidden_BD.float())
            if recompute:
                logprobs.append(self._logprobs(out.logits_BAV, micro))
        batch.hidden_ND = torch.cat(hidden)
        if recompute:
            batch.old_logprob_NA = torch.cat(logprobs)
        if args.beta:
            micros = self._micro_batches(batch, size)
            batch.ref_logprob_NA = torch.cat([self._reference_logprobs(m) for m in micros])
        batch.old_value_N = torch.cat([self._values(m).detach() for m in self._micro_batches(batch, size)])

    def _reference_logprobs(self, micro: Batch) -> Tensor:
        assert self.reference is not None
        with self.reference.context():
            return self._logprobs(self._forward(self.reference.model, micro).logits_BAV, micro)

    def _values(self, micro: Batch) -> Tensor:
        if self.args.value_model_type == "shared":
            return self.critic.model(micro.hidden_ND)
        return self.critic.model(micro.prompt_ids_NL, micro.prompt_mask_NL, pixel_values=self._pixels(micro))

    def _normalise(self, advantage_N: Tensor, weight_N: Tensor) -> Tensor:
        """Advantages with mean 0 and deviation 1 over the valid samples of all ranks (`norm_adv`)."""
        if not self.args.norm_adv:
            return advantage_N
        moments_3 = moments(advantage_N, weight_N > 0).to(self.device)
        dist.all_reduce(moments_3)
        return normalize(advantage_N, moments_3)

    def _log_prepared(self, batch: Batch, engine_logprob_NA: Tensor, averages: Averages) -> None:
        valid = batch.weight_N > 0
        count = float(valid.sum())
        old_value_N, return_N = batch.old_value_N, batch.return_N
        assert old_value_N is not None and return_N is not None
        difference_NA = (engine_logprob_NA - batch.old_logprob_NA).abs()
        for name, x_N in (
            ("train/engine_logprob_abs_diff", difference_NA.mean(1)),
            ("train/value_mean", old_value_N),
            ("train/return_mean", return_N),
        ):
            averages.add({name: x_N[valid].mean()}, count)
        averages.add_maximum("train/engine_logprob_max_diff", difference_NA.max())
        explained = self._explained_variance(old_value_N[valid], return_N[valid])
        averages.add({"train/explained_variance": explained}, float(math.isfinite(explained)))

    def _explained_variance(self, value_N: Tensor, return_N: Tensor) -> float:
        """1 - Var(R - V) / Var(R) over the valid samples of all ranks; NaN where the returns are all equal."""
        sums_23 = torch.stack([moments(return_N - value_N), moments(return_N)]).to(self.device)
        dist.all_reduce(sums_23)
        return explained_variance_of_moments(sums_23[0], sums_23[1])

    def update_value(self, batch: Batch, step: int, averages: Averages) -> None:
        """`num_value_epochs` passes of the critic's optimizer over the rollout."""
        args = self.args
        for indices in self._minibatch_indices(len(batch), step, args.num_value_epochs or args.num_epochs, "value"):
            minibatch = batch[indices]
            normalizer = self._normalizer(minibatch)
            for micro, is_last in with_last(self._micro_batches(minibatch, args.per_device_train_batch_size)):
                fsdp_utils.set_gradient_sync(self.critic.model, is_last)
                assert micro.old_value_N is not None and micro.return_N is not None
                result = value_loss(
                    self._values(micro), micro.old_value_N, micro.return_N, args.cliprange_value or None,
                    weight_B=micro.weight_N, normalizer=normalizer,
                )  # fmt: skip
                (args.vf_coef * result.loss).backward()
                shares = {"train/value_loss": result.loss, "train/value_clip_fraction": result.clip_fraction}
                averages.add_shares(shares, is_last)
            self._optimizer_step("critic", self.critic, step, averages)

    def update_policy(self, batch: Batch, step: int, averages: Averages) -> None:
        """`num_epochs` passes of clipped PPO over the rollout, or fewer where `max_approx_kl` is exceeded."""
        args = self.args
        for number, indices in enumerate(self._minibatch_indices(len(batch), step, args.num_epochs, "policy")):
            minibatch = batch[indices]
            normalizer = self._normalizer(minibatch)
            approx_kl = torch.zeros((), dtype=torch.float64, device=self.device)
            for micro, is_last in with_last(self._micro_batches(minibatch, args.per_device_train_batch_size)):
                fsdp_utils.set_gradient_sync(self.policy.model, is_last)
                loss, shares, ratio_dev = self._policy_loss(micro, normalizer)
                loss.backward()
                averages.add_shares(shares, is_last)
                averages.add_maximum("train/ratio_max_abs_dev", ratio_dev)
                if number == 0:
                    averages.add_maximum("train/first_minibatch_ratio_max_abs_dev", ratio_dev)
                approx_kl += shares["train/approx_kl_k3"]
            self._optimizer_step("policy", self.policy, step, averages)
            if args.max_approx_kl is not None and self._mean_over_ranks(approx_kl) > args.max_approx_kl:
                averages.add({"train/stopped_by_kl": 1.0})
                return
        averages.add({"train/stopped_by_kl": 0.0})

    def _policy_loss(self, micro: Batch, normalizer: float) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Loss and statistics of a micro-batch, as shares of its minibatch's, and its largest |ratio - 1|."""
        args = self.args
        logits_BAV = self._forward(self.policy.model, micro).logits_BAV
        logprob_BA = self._logprobs(logits_BAV, micro)
        assert micro.advantage_N is not None
        result = policy_loss(
            logprob_BA, micro.old_logprob_NA, micro.advantage_N, clip_low=args.cliprange,
            clip_high=args.cliprange_high if args.cliprange_high is not None else args.cliprange,
            level=args.ratio_level, weight_B=micro.weight_N, normalizer=normalizer,
        )  # fmt: skip
        entropy_share = weighted_mean(entropy(logits_BAV, args.temperature).sum(1), micro.weight_N, normalizer)
        loss = result.loss - args.entropy_coef * entropy_share
        shares = {
            "train/policy_loss": result.loss, "train/entropy": entropy_share,
            "train/clip_fraction": result.clip_fraction, "train/approx_kl_k3": result.approx_kl_k3,
            "train/ratio_mean": result.ratio_mean,
        }  # fmt: skip
        if args.beta:
            assert micro.ref_logprob_NA is not None
            kl = weighted_mean(kl_k3(logprob_BA, micro.ref_logprob_NA).sum(1), micro.weight_N, normalizer)
            loss = loss + args.beta * kl
            shares["train/ref_kl_k3"] = kl
        return loss, {name: share.detach() for name, share in shares.items()}, result.ratio_max_abs_dev

    def _mean_over_ranks(self, value: Tensor) -> float:
        """The same number on every rank, so that every rank takes the same branch."""
        dist.all_reduce(value)
        return float(value) / self.world_size

    def _minibatch_indices(self, num_samples: int, step: int, num_epochs: int, purpose: str) -> Iterator[Tensor]:
        """Index tensors of every minibatch of every epoch, a fresh permutation each epoch."""
        for epoch in range(num_epochs):
            yield from minibatches(
                num_samples, self.args.local_mini_batch_size,
                seed=(self.args.seed, self.rank, step, epoch, purpose == "value"),
            )  # fmt: skip

    def _normalizer(self, minibatch: Batch) -> float:
        """Valid samples of this minibatch per rank: sums divided by it, averaged over ranks, are the global mean.

        FSDP averages the gradients over the ranks, hence the division by their number.
        """
        total = fsdp_utils.all_reduce_sums({"n": float(minibatch.weight_N.sum())}, self.device)["n"]
        return max(total, 1.0) / self.world_size

    def _optimizer_step(self, group: str, trained: Trainable, step: int, averages: Averages) -> None:
        """Clip and step; a non-finite gradient raises (the norm is global, so every rank raises)."""
        norm = fsdp_utils.clip_gradients(trained.parameters, self.args.max_grad_norm)
        if not math.isfinite(norm):
            where = f"at training step {step}, rank {self.rank}"
            raise FloatingPointError(f"the gradient norm of the {group} is {norm} {where}")
        averages.add({f"train/{group}_grad_norm": norm})
        trained.optimizer.step()
        trained.optimizer.zero_grad(set_to_none=True)
        trained.scheduler.step()


@contextlib.contextmanager
def training_mode(model: torch.nn.Module) -> Iterator[None]:
    """Let dropout and activation checkpointing act inside the block; old log-probs and values are without them."""
    model.train()
    try:
        yield
    finally:
        model.eval()


def with_last(items: Iterator[Batch]) -> Iterator[tuple[Batch, bool]]:
    """Pair each item with whether it is the last one."""
    previous = next(items)
    for item in items:
        yield previous, False
        previous = item
    yield previous, True
