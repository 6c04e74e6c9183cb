"""What the rollout workers hand to the trainers: the Rollout dataclass, its sharding and its minibatches.

Shapes: T steps, B environments, A action tokens, H W image, K truncated episodes.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass
class Rollout:
    """T consecutive steps of B environments; tensors on the CPU, images as uint8.

    Each prompt is stored once per task, and a final observation only where a time limit ended an episode: everywhere
    else the next observation is `images_TBHWC[t + 1]`, or `last_images_BHWC` after the last step.

    Attributes:
        prompts: token ids of every task's prompt, by task id.
        images_TBHWC: (T, B, H, W, 3) uint8, the observations acted on.
        action_ids_TBA: int64 token ids of the actions.
        logprob_TBA: float32, the engine's log-probs of those tokens at the rollout's temperature.
        reward_TB: float32.
        terminated_TB: bool, the episode ended for good at this step.
        truncated_TB: bool, the time limit ended it.
        task_id_TB: int64, the task of the episode that was stepped.
        valid_TB: bool; False for steps of an episode whose environment died, to be given weight 0.
        last_images_BHWC: (B, H, W, 3) uint8, the observations after the last step (after the reset, if one was due).
        last_task_id_B: int64, the tasks that those belong to.
        episode_step_B: int64, steps that the running episodes had taken when the rollout began.
        final_images_KHWC: (K, H, W, 3) uint8, the real last observations of the truncated episodes.
        final_t_K: int64, their steps.
        final_b_K: int64, their environments.
        policy_version: which weights chose the actions; the oldest ones of joined rollouts.
    """

    prompts: list[list[int]]
    images_TBHWC: Tensor
    action_ids_TBA: Tensor
    logprob_TBA: Tensor
    reward_TB: Tensor
    terminated_TB: Tensor
    truncated_TB: Tensor
    task_id_TB: Tensor
    valid_TB: Tensor
    last_images_BHWC: Tensor
    last_task_id_B: Tensor
    episode_step_B: Tensor
    final_images_KHWC: Tensor
    final_t_K: Tensor
    final_b_K: Tensor
    policy_version: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            shape = (self.num_steps, self.num_envs) if "_TB" in field.name else (self.num_envs,)
            if "_K" in field.name:
                shape = (len(self.final_t_K),)
            assert not isinstance(value, Tensor) or value.shape[: len(shape)] == shape, (
                field.name,
                value.shape,
                shape,
            )
        ends = torch.nonzero(self.truncated_TB & self.valid_TB).tolist()
        listed = set(zip(self.final_t_K.tolist(), self.final_b_K.tolist(), strict=True))
        assert all(tuple(end) in listed for end in ends), (
            "a truncated episode lacks its final observation"
        )

    @property
    def num_steps(self) -> int:
        """T."""
        return self.reward_TB.shape[0]

    @property
    def num_envs(self) -> int:
        """B."""
        return self.reward_TB.shape[1]

    @property
    def done_TB(self) -> Tensor:
        """Bool: the episode ended at this step, for whatever reason."""
        return self.terminated_TB | self.truncated_TB

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        values = (getattr(self, field.name) for field in dataclasses.fields(self))
        return sum(v.numel() * v.element_size() for v in values if isinstance(v, Tensor))

    def next_values(self, value_TB: Tensor, last_value_B: Tensor, final_value_K: Tensor) -> Tensor:
        """Return the values of the observations that the steps really led to, (T, B).

        After a truncated step that is the value of the episode's own last observation and not that of the image after
        the reset. After a terminated step the entry belongs to the next episode; `gae` does not use it.

        Args:
            value_TB: values of `images_TBHWC`.
            last_value_B: values of `last_images_BHWC`.
            final_value_K: values of `final_images_KHWC`.
        """
        next_value_TB = torch.cat([value_TB[1:], last_value_B[None]])
        next_value_TB[self.final_t_K, self.final_b_K] = final_value_K.to(next_value_TB.dtype)
        return next_value_TB

    def shard(self, rank: int, world_size: int) -> "Rollout":
        """Return this rank's equal share of the environments (a consecutive block); the tensors are copies.

        Raises:
            ValueError: the environments do not divide among the ranks.
        """
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not among {world_size} ranks")
        if self.num_envs % world_size:
            nearest = max(self.num_envs // world_size, 1) * world_size
            raise ValueError(
                f"a rollout of {self.num_envs} environments does not divide among {world_size} ranks: "
                f"use a multiple of {world_size}, for example {nearest} or {nearest + world_size} environments"
            )
        size = self.num_envs // world_size
        begin, end = rank * size, (rank + 1) * size
        mine_K = (self.final_b_K >= begin) & (self.final_b_K < end)
        shares: dict[str, Tensor] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, Tensor):
                continue
            if "_TB" in field.name:
                shares[field.name] = value[:, begin:end].clone()
            else:
                shares[field.name] = (
                    value[mine_K] if "_K" in field.name else value[begin:end].clone()
                )
        shares["final_b_K"] -= begin
        return dataclasses.replace(self, **shares)  # type: ignore[arg-type]

    @staticmethod
    def concat(rollouts: Sequence["Rollout"], *, mixed_versions: bool = False) -> "Rollout":
        """Return the rollouts side by side as one with all their environments, in order.

        With `mixed_versions` their policy versions may differ, and the result has the oldest. That
        is right where each action is weighted by its own engine log-probs: with `--async_depth 1`,
        where a replaced engine collects again with newer weights than the others had.

        Raises:
            ValueError: none given, or they differ in steps, prompts or (without `mixed_versions`)
                policy version.
        """
        if not rollouts:
            raise ValueError("no rollout to concatenate")
        versions = {r.policy_version for r in rollouts}
        kinds = {(r.num_steps, str(r.prompts)) for r in rollouts}
        if len(kinds) > 1 or (len(versions) > 1 and not mixed_versions):
            described = [(r.num_steps, r.policy_version, len(r.prompts)) for r in rollouts]
            raise ValueError(
                f"rollouts differ in (steps, policy version, prompts), {described}: join those of one training step"
            )
        if len(rollouts) == 1:
            return rollouts[0]
        joined: dict[str, Any] = {"policy_version": min(versions)}
        for field in dataclasses.fields(Rollout):
            values = [getattr(r, field.name) for r in rollouts]
            if isinstance(values[0], Tensor):
                joined[field.name] = torch.cat(values, dim=1 if "_TB" in field.name else 0)
        offsets = np.cumsum([0] + [r.num_envs for r in rollouts[:-1]]).tolist()
        joined["final_b_K"] = torch.cat(
            [r.final_b_K + offset for r, offset in zip(rollouts, offsets, strict=True)]
        )
        return dataclasses.replace(rollouts[0], **joined)


def minibatches(num_samples: int, size: int, *, seed: Sequence[int]) -> Iterator[Tensor]:
    """Yield a permutation of 0 .. num_samples - 1 in consecutive pieces, (size,) int64 each.

    Args:
        num_samples: flattened samples, T * B in the order of `tensor_TB.flatten()`.
        size: samples in a minibatch.
        seed: non-negative integers that together decide the permutation, such as (seed, rank, step, epoch): a fresh
            one for each epoch, and the same in a resumed run.

    Raises:
        ValueError: size does not divide num_samples.
    """
    if size < 1 or num_samples % size:
        raise ValueError(
            f"minibatch size {size} does not divide the {num_samples} samples of a rank: "
            f"use {_nearest(num_samples, size)}"
        )
    permutation = np.random.default_rng([int(s) for s in seed]).permutation(num_samples)
    yield from torch.from_numpy(permutation).split(size)


def _nearest(num_samples: int, size: int) -> str:
    """The divisors of num_samples next to size, for an error message."""
    divisors = [d for d in range(1, num_samples + 1) if num_samples % d == 0]
    below = [d for d in divisors if d < size][-1:]
    above = [d for d in divisors if d > size][:1]
    return " or ".join(str(d) for d in below + above)
