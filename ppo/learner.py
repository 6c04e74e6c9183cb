"""The PPO update of one FSDP rank: old log-probs and values, GAE, then epochs over minibatches.

Knows torch and torch.distributed, neither Ray nor vLLM. All ranks call the same methods in the same order; whatever
decides how often a collective runs is either equal on all ranks or all-reduced first.
Shapes: N samples of this rank (T steps x B environments, flattened), K truncated episodes, L prompt tokens, A action
tokens, V action vocabulary, P patches, D hidden.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ppo.batch import Averages, Batch, to_device, with_last
from ppo.finite import require_finite, require_finite_step
from ppo.gae import gae
from ppo.losses import (
    action_logprobs,
    entropy,
    explained_variance_of_moments,
    kl_k3,
    moments,
    normalize,
    policy_loss,
    truncated_importance_weight,
    value_loss,
    weighted_mean,
)
from ppo.outcomes import EpisodeOutcomes
from ppo.progress import Purpose, UpdateProgress, UpdateStopped
from ppo.rollout import Rollout, minibatches
from prismatic.vla.action_tokenizer import ActionTokenizer
from utils import fsdp_utils
from utils.logging_utils import PhaseTimer

NUM_ACTION_TOKENS = 7


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
    async_depth: Literal[0, 1]
    importance_weight_cap: float
    compile: bool
    sharding_strategy: Literal["full-shard", "shard-grad-op"]


@dataclass(frozen=True)
class Reference:
    """The initial policy: `model`, evaluated inside `context()` (which switches a fresh adapter off, or nothing)."""

    model: Any
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext


@dataclass
class Trainable:
    """A sharded model, its parameters with requires_grad, their optimizer and their learning rate.

    `learning_rate` maps the place of a minibatch in the run to a rate. The place counts all minibatches before it,
    those that `max_approx_kl` skipped included, so that skipping does not delay the schedule.
    """

    model: Any
    parameters: list[torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    learning_rate: Callable[[int], float]

    def set_learning_rate(self, place: int) -> None:
        """Give the optimizer the learning rate of the minibatch at `place`."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(place)


class PPOLearner:
    """Runs PPO updates on one rank.

    Args:
        args: the flags.
        policy: an OpenVLAForActionPrediction (sharded, LoRA injected or not) and its optimizer.
        critic: a ValueHead (`value_model_type` shared) or VLACritic, and its optimizer.
        processor: prompts and images of the model.
        reference: the initial policy, needed where `beta` > 0.
        counted_tokens: positions of the action tokens that count in ratio, entropy and KL; None: all of them. The
            others neither enter the loss nor get a gradient from it.
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
        counted_tokens: Sequence[int] | None = None,
    ) -> None:
        self.args, self.policy, self.critic, self.processor = args, policy, critic, processor
        self.reference, self.dtype = reference, dtype
        self.device = fsdp_utils.compute_device(policy.model)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.counted_tokens = tuple(
            range(NUM_ACTION_TOKENS) if counted_tokens is None else counted_tokens
        )
        self._counted_index = torch.tensor(self.counted_tokens, device=self.device)
        self.first_action_id = int(
            ActionTokenizer.from_config(policy.model.config).action_token_ids[0]
        )
        self.timer = PhaseTimer()
        self.outcomes = EpisodeOutcomes()
        self.progress: UpdateProgress | None = (
            None  # of the update under way, or of the one that was stopped
        )
        self.stop_requested = False  # may be set by another thread, on any rank
        # 0: not chosen yet, see `ppo.memory.check_memory`
        self.micro_batch_size = args.per_device_train_batch_size or largest_micro_batch(
            args.local_mini_batch_size
        )

    @property
    def forward_batch_size(self) -> int:
        """Samples per pass where no gradient is needed."""
        return self.args.per_device_forward_batch_size or self.micro_batch_size

    def update(self, rollout: Rollout | None, step: int) -> dict[str, float | None] | None:
        """One training step (counted from 1) on this rank's environments; without a rollout the rest of `progress`.

        Returns metrics averaged over all minibatches and ranks; None where nothing was measured. Returns None once a
        rank has `stop_requested`: `progress` then says how far all of them got, or is None if they had not begun.

        Raises:
            FloatingPointError: a reward, advantage, loss or gradient is not finite; raised on every rank before the
                optimizer steps.
        """
        try:
            if rollout is not None:
                averages = Averages()
                with self.timer.phase("prepare"):
                    require_finite({"rewards": rollout.reward_TB}, step)
                    batch = self.prepare(rollout, averages)
                    require_finite(
                        {"advantages": batch.advantage_N, "returns": batch.return_N}, step
                    )
                self.progress = UpdateProgress(batch, averages)
            assert self.progress is not None
            batch, averages = self.progress.batch, self.progress.averages
            with self.timer.phase("value"), training_mode(self.critic.model):
                self.update_value(batch, step, averages)
            if step > self.args.value_init_steps:
                with self.timer.phase("policy"), training_mode(self.policy.model):
                    self.update_policy(batch, step, averages)
        except UpdateStopped:
            fsdp_utils.free_gathered(self.policy.model)
            fsdp_utils.free_gathered(self.critic.model)
            return None
        self.progress = None
        metrics = averages.reduce(self.device)
        policy_place = self._first_place(batch, step + 1, "policy")
        value_place = self._first_place(batch, step + 1, "value")
        metrics["train/learning_rate"] = self.policy.learning_rate(policy_place)
        metrics["train/value_learning_rate"] = self.critic.learning_rate(value_place)
        return metrics | {f"time/trainer_{k}_s": v for k, v in self.timer.pop().items()}

    def check_stop(self) -> None:
        """Raise UpdateStopped on every rank alike, if any has `stop_requested`. A collective over CPU memory."""
        flag = torch.tensor(float(self.stop_requested))
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        if flag:
            raise UpdateStopped

    def _micro_batches(
        self, batch: Batch, size: int, indices: Tensor | None = None
    ) -> Iterator[Batch]:
        # Compiled code wants one shape for all; the template makes up most of a prompt, so the padding is little.
        return batch.micro_batches(size, indices, whole_prompts=self.args.compile)

    def _pixels(self, micro: Batch) -> Tensor:
        assert micro.images_NHWC is not None
        return self.processor.image_processor.normalize(
            to_device(micro.images_NHWC, self.device), self.dtype
        )

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

    def _counted(self, x_BA: Tensor) -> Tensor:
        """The columns (of log-probs, or of logits with a further axis) of the tokens that count."""
        if len(self.counted_tokens) == x_BA.shape[1]:
            return x_BA
        return x_BA[:, self._counted_index]

    @torch.no_grad()
    def prepare(self, rollout: Rollout, averages: Averages) -> Batch:
        """Old log-probs, values, GAE and normalised advantages of this rank's rollout, as flat samples."""
        num_samples = rollout.num_steps * rollout.num_envs
        batch = self._flatten(rollout)
        engine_logprob_NA = batch.old_logprob_NA
        self._evaluate(batch)
        if self.args.async_depth > 0 and self.args.old_logprobs == "recompute":
            batch.importance_weight_N = truncated_importance_weight(
                self._counted(batch.old_logprob_NA),
                self._counted(engine_logprob_NA),
                self.args.importance_weight_cap,
            )
        assert batch.old_value_N is not None
        rest = (rollout.num_envs, len(rollout.final_t_K))
        values = batch.old_value_N.cpu()[: num_samples + sum(rest)].split((num_samples, *rest))
        value_TB = values[0].view(rollout.num_steps, rollout.num_envs)
        next_value_TB = rollout.next_values(value_TB, values[1], values[2])
        ends_TB = rollout.terminated_TB if self.args.bootstrap_truncated else rollout.done_TB
        advantage_TB, return_TB = gae(
            rollout.reward_TB,
            value_TB,
            next_value_TB,
            ends_TB,
            rollout.done_TB,
            self.args.gamma,
            self.args.lam,
        )
        batch = batch[slice(0, num_samples)]
        batch.return_N = return_TB.flatten().to(self.device)
        batch.advantage_N = self._normalise(advantage_TB.flatten(), batch.weight_N.cpu()).to(
            self.device
        )
        self._log_prepared(batch, engine_logprob_NA[:num_samples], averages)
        self._log_outcomes(rollout, value_TB, averages)
        fsdp_utils.free_gathered(self.policy.model)
        fsdp_utils.free_gathered(self.critic.model)
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
        images = [
            rollout.images_TBHWC.flatten(0, 1),
            rollout.last_images_BHWC,
            rollout.final_images_KHWC,
        ]
        num_rows = len(task_N) + int(most) - num_final
        if self.args.compile:  # every forward micro-batch of one size
            num_rows = math.ceil(num_rows / self.forward_batch_size) * self.forward_batch_size
        row_N = torch.arange(num_rows).clamp(max=len(task_N) - 1)
        images += [torch.cat(images[-2:])[-1:]] * (num_rows - len(task_N))
        # what has no action of its own (observations after the rollout) borrows the first one and has weight 0
        action_N = torch.where(row_N < num_samples, row_N, 0)
        prompt_ids, prompt_mask = self.processor.collate_prompts(rollout.prompts)
        batch = Batch(
            prompt_ids_NL=prompt_ids[task_N[row_N]],
            prompt_mask_NL=prompt_mask[task_N[row_N]],
            length_N=prompt_mask.sum(1)[task_N[row_N]],
            images_NHWC=torch.cat(images),
            action_ids_NA=rollout.action_ids_TBA.flatten(0, 1)[action_N],
            old_logprob_NA=rollout.logprob_TBA.flatten(0, 1)[action_N],
            weight_N=rollout.valid_TB.flatten()[action_N].float() * (row_N < num_samples),
        )
        return batch.to(self.device)

    def _evaluate(self, batch: Batch) -> None:
        """Fill vision features, prompt features, old (and reference) log-probs and values, without gradients."""
        args, policy, size = self.args, self.policy.model, self.forward_batch_size
        if args.freeze_vision_backbone:
            for number, micro in enumerate(self._micro_batches(batch, size)):
                features = policy.encode_vision(self._pixels(micro))
                if (
                    batch.features_NPD is None
                ):  # whole at once: a list of pieces would need the memory twice
                    batch.features_NPD = features.new_empty(len(batch), *features.shape[1:])
                batch.features_NPD[number * size : number * size + len(micro)] = features
        recompute = args.old_logprobs == "recompute"
        hidden, logprobs = [], []
        for micro in self._micro_batches(batch, size):
            self.check_stop()
            out = self._forward(policy, micro, with_actions=recompute)
            hidden.append(out.prompt_hidden_BD.float())
            if recompute:
                logprobs.append(self._logprobs(out.logits_BAV, micro))
        batch.hidden_ND = torch.cat(hidden)
        if recompute:
            batch.old_logprob_NA = torch.cat(logprobs)
        if args.beta:
            micros = self._micro_batches(batch, size)
            batch.ref_logprob_NA = torch.cat([self._reference_logprobs(m) for m in micros])
        batch.old_value_N = torch.cat([self._values(m) for m in self._micro_batches(batch, size)])
        if args.freeze_vision_backbone and args.value_model_type == "shared":
            batch.images_NHWC = None

    def _reference_logprobs(self, micro: Batch) -> Tensor:
        assert self.reference is not None
        with self.reference.context():
            return self._logprobs(self._forward(self.reference.model, micro).logits_BAV, micro)

    def _values(self, micro: Batch) -> Tensor:
        if self.args.value_model_type == "shared":
            return self.critic.model(micro.hidden_ND)
        return self.critic.model(
            micro.prompt_ids_NL, micro.prompt_mask_NL, pixel_values=self._pixels(micro)
        )

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
        if batch.importance_weight_N is not None:
            weight_N = batch.importance_weight_N[valid]
            truncated_N = (weight_N >= self.args.importance_weight_cap).float()
            averages.add({"train/importance_weight_mean": weight_N.mean()}, count)
            averages.add({"train/importance_weight_truncated_fraction": truncated_N.mean()}, count)
        explained = self._explained_variance(old_value_N[valid], return_N[valid])
        averages.add({"train/explained_variance": explained}, float(math.isfinite(explained)))

    def _log_outcomes(self, rollout: Rollout, value_TB: Tensor, averages: Averages) -> None:
        """Compare the outcomes of the episodes that ended with the values predicted along them.

        Nothing may stop the update between here and the end of `prepare`: the rollout would be taken in twice.
        """
        ended = self.outcomes.add(rollout, value_TB, self.args.gamma)
        explained = self._explained_variance(ended.value_M, ended.outcome_M)
        num_episodes = torch.tensor(float(ended.num_episodes), device=self.device)
        dist.all_reduce(num_episodes)
        averages.add({"train/num_outcome_episodes": num_episodes})
        is_defined = float(math.isfinite(explained))
        averages.add({"train/explained_variance_outcome": explained}, is_defined)

    def _explained_variance(self, value_N: Tensor, return_N: Tensor) -> float:
        """1 - Var(R - V) / Var(R) over the given samples of all ranks; NaN where the returns are all equal."""
        sums_23 = torch.stack([moments(return_N - value_N), moments(return_N)]).to(self.device)
        dist.all_reduce(sums_23)
        return explained_variance_of_moments(sums_23[0], sums_23[1])

    def _training_passes(
        self, trained: Trainable, batch: Batch, indices: Tensor
    ) -> Iterator[tuple[Batch, bool]]:
        """The micro-batches of a minibatch, each with whether it is the last, and FSDP told so."""
        keep = self.args.sharding_strategy == "shard-grad-op"
        for micro, is_last in with_last(self._micro_batches(batch, self.micro_batch_size, indices)):
            fsdp_utils.set_gradient_sync(trained.model, is_last, keep_gathered=keep)
            yield micro, is_last

    def rehearse(self, prompts: Sequence[list[int]]) -> None:
        """Run the passes of an update on made-up samples with the longest of `prompts`, without an optimizer step.

        Needs as much memory as an update's passes do (the optimizers' states aside). Weights and random state are as
        before afterwards, gradients are dropped.
        """
        size = max(self.micro_batch_size, self.forward_batch_size)
        prompt_ids, prompt_mask = self.processor.collate_prompts(list(prompts))
        longest = int(prompt_mask.sum(1).argmax())
        height, width = self.processor.image_processor.image_size
        batch = Batch(
            prompt_ids_NL=prompt_ids[[longest] * size],
            prompt_mask_NL=prompt_mask[[longest] * size],
            length_N=prompt_mask.sum(1)[[longest] * size],
            images_NHWC=torch.zeros(size, height, width, 3, dtype=torch.uint8),
            action_ids_NA=torch.full((size, NUM_ACTION_TOKENS), self.first_action_id),
            old_logprob_NA=torch.zeros(size, NUM_ACTION_TOKENS),
            weight_N=torch.ones(size),
            advantage_N=torch.zeros(size),
            return_N=torch.zeros(size),
        ).to(self.device)
        indices = torch.arange(2 * self.micro_batch_size) % size
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            with torch.no_grad():
                self._evaluate(batch)
            normalizer = torch.tensor(float(len(indices)), device=self.device)
            for trained, loss_of in (
                (self.critic, self._value_loss),
                (self.policy, self._policy_loss),
            ):
                with training_mode(trained.model):
                    for micro, _ in self._training_passes(trained, batch, indices):
                        loss_of(micro, normalizer)[0].backward()
                trained.optimizer.zero_grad(set_to_none=True)

    def update_value(self, batch: Batch, step: int, averages: Averages) -> None:
        """`num_value_epochs` passes of the critic's optimizer over the rollout."""
        args = self.args
        if args.value_model_type == "shared":  # reads features only
            batch = dataclasses.replace(batch, images_NHWC=None, features_NPD=None)
        first_place = self._first_place(batch, step, "value")
        for number, indices in self._minibatch_indices(
            len(batch), step, self._num_epochs("value"), "value"
        ):
            self.critic.set_learning_rate(first_place + number)
            normalizer = self._normalizer(batch, indices)
            total = torch.zeros((), device=self.device)
            for micro, is_last in self._training_passes(self.critic, batch, indices):
                loss, shares = self._value_loss(micro, normalizer)
                loss.backward()
                total += loss.detach()
                averages.add_shares(shares, is_last)
            self._optimizer_step("critic", self.critic, total, step, averages)

    def _value_loss(self, micro: Batch, normalizer: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and statistics of a micro-batch, as shares of its minibatch's."""
        assert micro.old_value_N is not None and micro.return_N is not None
        result = value_loss(
            self._values(micro), micro.old_value_N, micro.return_N, self.args.cliprange_value or None,
            weight_B=micro.weight_N, normalizer=normalizer,
        )  # fmt: skip
        shares = {
            "train/value_loss": result.loss.detach(),
            "train/value_clip_fraction": result.clip_fraction,
        }
        return self.args.vf_coef * result.loss, shares

    def update_policy(self, batch: Batch, step: int, averages: Averages) -> None:
        """`num_epochs` passes of clipped PPO over the rollout, or fewer where `max_approx_kl` is exceeded."""
        args = self.args
        first_place = self._first_place(batch, step, "policy")
        for number, indices in self._minibatch_indices(
            len(batch), step, self._num_epochs("policy"), "policy"
        ):
            self.policy.set_learning_rate(first_place + number)
            normalizer = self._normalizer(batch, indices)
            total = torch.zeros((), device=self.device)
            approx_kl = torch.zeros((), dtype=torch.float64, device=self.device)
            for micro, is_last in self._training_passes(self.policy, batch, indices):
                loss, shares, ratio_dev = self._policy_loss(micro, normalizer)
                loss.backward()
                total += loss.detach()
                averages.add_shares(shares, is_last)
                averages.add_maximum("train/ratio_max_abs_dev", ratio_dev)
                if number == 0:
                    averages.add_maximum("train/first_minibatch_ratio_max_abs_dev", ratio_dev)
                approx_kl += shares["train/approx_kl_k3"]
            self._optimizer_step("policy", self.policy, total, step, averages)
            if (
                args.max_approx_kl is not None
                and self._mean_over_ranks(approx_kl) > args.max_approx_kl
            ):
                averages.add({"train/stopped_by_kl": 1.0})
                return
        averages.add({"train/stopped_by_kl": 0.0})

    def _policy_loss(
        self, micro: Batch, normalizer: Tensor
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Loss and statistics of a micro-batch, as shares of its minibatch's, and its largest |ratio - 1|."""
        args = self.args
        logits_BAV = self._forward(self.policy.model, micro).logits_BAV
        logprob_BA = self._counted(self._logprobs(logits_BAV, micro))
        assert micro.advantage_N is not None
        result = policy_loss(
            logprob_BA, self._counted(micro.old_logprob_NA), micro.advantage_N, clip_low=args.cliprange,
            clip_high=args.cliprange_high if args.cliprange_high is not None else args.cliprange,
            level=args.ratio_level, importance_weight_B=micro.importance_weight_N, weight_B=micro.weight_N,
            normalizer=normalizer,
        )  # fmt: skip
        entropy_BA = entropy(self._counted(logits_BAV), args.temperature)
        entropy_share = weighted_mean(entropy_BA.sum(1), micro.weight_N, normalizer)
        loss = result.loss - args.entropy_coef * entropy_share
        shares = {
            "train/policy_loss": result.loss, "train/entropy": entropy_share,
            "train/clip_fraction": result.clip_fraction, "train/approx_kl_k3": result.approx_kl_k3,
            "train/ratio_mean": result.ratio_mean,
        }  # fmt: skip
        for place, token in enumerate(self.counted_tokens):
            share = weighted_mean(entropy_BA[:, place].detach(), micro.weight_N, normalizer)
            shares[f"train/entropy_token_{token}"] = share
        if args.beta:
            assert micro.ref_logprob_NA is not None
            kl = weighted_mean(
                kl_k3(logprob_BA, self._counted(micro.ref_logprob_NA)).sum(1),
                micro.weight_N,
                normalizer,
            )
            loss = loss + args.beta * kl
            shares["train/ref_kl_k3"] = kl
        return (
            loss,
            {name: share.detach() for name, share in shares.items()},
            result.ratio_max_abs_dev,
        )

    def _mean_over_ranks(self, value: Tensor) -> float:
        """The same number on every rank, so that every rank takes the same branch."""
        dist.all_reduce(value)
        return float(value) / self.world_size

    def _num_epochs(self, purpose: Purpose) -> int:
        args = self.args
        return args.num_epochs if purpose == "policy" else args.num_value_epochs or args.num_epochs

    def _first_place(self, batch: Batch, step: int, purpose: Purpose) -> int:
        """Place in the run of the first minibatch of training step `step` (see Trainable).

        The policy's places begin after the critic's warm-up.
        """
        steps_before = step - 1 - (self.args.value_init_steps if purpose == "policy" else 0)
        num_minibatches = len(batch) // self.args.local_mini_batch_size
        return max(steps_before, 0) * num_minibatches * self._num_epochs(purpose)

    def _minibatch_indices(
        self, num_samples: int, step: int, num_epochs: int, purpose: Purpose
    ) -> Iterator[tuple[int, Tensor]]:
        """Number and indices of every minibatch of every epoch that is not done; a fresh permutation each epoch.

        Raises UpdateStopped in between, on every rank alike.
        """
        size = self.args.local_mini_batch_size
        done = self.progress.num_done if self.progress else {"value": 0, "policy": 0}
        for epoch in range(num_epochs):
            seed = (self.args.seed, self.rank, step, epoch, purpose == "value")
            for place, indices in enumerate(minibatches(num_samples, size, seed=seed)):
                number = epoch * (num_samples // size) + place
                if number >= done[purpose]:
                    self.check_stop()
                    yield number, indices
                    done[purpose] = number + 1

    def _normalizer(self, batch: Batch, indices: Tensor) -> Tensor:
        """Valid samples of this minibatch per rank: sums divided by it, averaged over ranks, are the global mean.

        FSDP averages the gradients over the ranks, hence the division by their number.
        """
        total = batch.weight_N[to_device(indices, self.device)].sum()
        dist.all_reduce(total)
        return total.clamp(min=1.0) / self.world_size

    def _optimizer_step(
        self, group: str, trained: Trainable, loss: Tensor, step: int, averages: Averages
    ) -> None:
        """Clip and step; raises where loss or gradient is not finite (both are over all ranks, so every rank does)."""
        mean_loss = self._mean_over_ranks(loss)
        norm = fsdp_utils.clip_gradients(trained.parameters, self.args.max_grad_norm)
        require_finite_step(group, mean_loss, norm, trained.model.named_parameters(), step)
        averages.add({f"train/{group}_grad_norm": norm})
        trained.optimizer.step()
        trained.optimizer.zero_grad(set_to_none=True)


def largest_micro_batch(minibatch: int, limit: int = 32) -> int:
    """The largest divisor of `minibatch` that is at most `limit`: every micro-batch of a minibatch has one size."""
    return max(size for size in range(1, min(minibatch, limit) + 1) if minibatch % size == 0)


@contextlib.contextmanager
def training_mode(model: torch.nn.Module) -> Iterator[None]:
    """Let dropout and activation checkpointing act inside the block; old log-probs and values are without them."""
    model.train()
    try:
        yield
    finally:
        model.eval()
