"""How far a PPO update has got on one rank, so that a stopped one can go on: samples, averages, minibatches done.

N samples of a rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ppo.batch import Averages, Batch

Purpose = Literal["value", "policy"]


class UpdateStopped(Exception):
    """A stop was requested, and every rank leaves the update at the same place."""


@dataclass
class UpdateProgress:
    """One rank's update: its prepared samples, what it has logged, and the minibatches that critic and policy did."""

    batch: Batch
    averages: Averages
    num_done: dict[Purpose, int] = field(default_factory=lambda: {"value": 0, "policy": 0})

    def tensors(self) -> dict[str, Tensor]:
        """The samples' tensors by name."""
        return self.batch.tensors()

    def numbers(self) -> dict[str, Any]:
        """The rest, of plain JSON types."""
        return {"num_done": dict(self.num_done), "averages": self.averages.state_dict()}

    @staticmethod
    def restore(
        tensors: dict[str, Tensor], numbers: dict[str, Any], device: torch.device
    ) -> "UpdateProgress":
        """Continue from `tensors` and `numbers` of a rank, on `device`."""
        averages = Averages.from_state(numbers["averages"], device)
        return UpdateProgress(Batch(**tensors).to(device), averages, dict(numbers["num_done"]))


def parts_of(rank: int, num_ranks: int, num_parts: int) -> range:
    """Which of `num_parts` equal parts of the samples, in order, overlap with this rank's share of them."""
    return range(rank * num_parts // num_ranks, -(-(rank + 1) * num_parts // num_ranks))


def redistribute(
    batches: Sequence[Batch],
    numbers: Sequence[dict[str, Any]],
    rank: int,
    num_ranks: int,
    minibatch: int,
) -> UpdateProgress:
    """Give a rank its share of an update that another number of ranks had begun.

    The epoch that was under way begins again, with new minibatches: its permutations were the old ranks' own. What
    was logged goes to rank 0.

    Args:
        batches: those of the old ranks `parts_of(rank, num_ranks, len(numbers))`, in order, on the learner's device.
        numbers: every old rank's.
        rank: this one.
        num_ranks: among how many now.
        minibatch: samples of a rank's minibatch, before as now.
    """
    num_parts, part_size = len(numbers), len(batches[0])
    share = part_size * num_parts // num_ranks
    begin = rank * share - parts_of(rank, num_ranks, num_parts)[0] * part_size
    batch = Batch.concat(batches)[slice(begin, begin + share)]
    epochs = {
        purpose: count // (part_size // minibatch)
        for purpose, count in numbers[0]["num_done"].items()
    }
    num_done: dict[Purpose, int] = {
        purpose: count * (share // minibatch) for purpose, count in epochs.items()
    }
    logged = [part["averages"] for part in numbers]
    sums = {
        name: sum(part["sums"][name] for part in logged) if rank == 0 else 0.0
        for name in logged[0]["sums"]
    }
    maxima = {name: max(part["maxima"][name] for part in logged) for name in logged[0]["maxima"]}
    averages = Averages.from_state({"sums": sums, "maxima": maxima}, batch.weight_N.device)
    return UpdateProgress(batch, averages, num_done)
