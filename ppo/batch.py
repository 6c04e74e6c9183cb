"""One rank's rollout as flat samples for the update, and the averages that it reports.

Shapes: N samples, L prompt tokens, A action tokens, P patches, D hidden.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from utils import fsdp_utils

MAX_DEVICE_IMAGE_BYTES = 1 << 30
"""Of a rank's rollout, uint8: 7,000 images at 224 pixels."""


@dataclass
class Batch:
    """One rank's rollout as N samples, with what the update needs; every tensor is indexed by sample.

    Prompt lengths, and images beyond MAX_DEVICE_IMAGE_BYTES, stay on the CPU; the rest is on the learner's device.
    """

    prompt_ids_NL: Tensor
    prompt_mask_NL: Tensor
    length_N: (
        Tensor  # real prompt tokens; on the CPU, where a micro-batch's longest prompt is looked up
    )
    action_ids_NA: Tensor
    old_logprob_NA: Tensor
    weight_N: Tensor  # 1, or 0 for samples of a dropped episode
    images_NHWC: Tensor | None = None  # uint8; None once nothing reads them
    features_NPD: Tensor | None = None  # vision features, where the vision backbone is frozen
    hidden_ND: Tensor | None = None  # the policy's prompt features, for the shared critic
    ref_logprob_NA: Tensor | None = None
    importance_weight_N: Tensor | None = (
        None  # pi_old / pi_rollout, truncated, where the rollout is a step old
    )
    old_value_N: Tensor | None = None
    advantage_N: Tensor | None = None
    return_N: Tensor | None = None

    def __getitem__(self, index: Tensor | slice) -> "Batch":
        """The samples at `index` (a CPU tensor or a slice)."""
        device = self.action_ids_NA.device
        on_device = index if isinstance(index, slice) else to_device(index, device)
        taken: dict[str, Any] = {
            name: value[on_device if value.device == device else index]
            for name, value in self.tensors().items()
        }
        return dataclasses.replace(self, **taken)

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are there."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in fields.items() if value is not None}

    def to(self, device: torch.device) -> "Batch":
        """Everything but lengths on `device`; images that are too large follow micro-batch by micro-batch."""
        kept = ["length_N"]
        if self.images_NHWC is not None and self.images_NHWC.numel() > MAX_DEVICE_IMAGE_BYTES:
            kept.append("images_NHWC")
        moved: dict[str, Any] = {
            n: v.to(device) for n, v in self.tensors().items() if n not in kept
        }
        return dataclasses.replace(self, **moved)

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.action_ids_NA)

    @staticmethod
    def concat(batches: Sequence["Batch"]) -> "Batch":
        """The batches' samples in order; all have the same fields."""
        parts = [batch.tensors() for batch in batches]
        joined: dict[str, Any] = {
            name: torch.cat([part[name] for part in parts]) for name in parts[0]
        }
        return dataclasses.replace(batches[0], **joined)

    def micro_batches(
        self, size: int, indices: Tensor | None = None, *, whole_prompts: bool = False
    ) -> Iterator["Batch"]:
        """Yield consecutive micro-batches, of all samples or of those at `indices` (CPU), nothing copied twice.

        Prompts are cut to the longest one of the micro-batch; `whole_prompts` keeps the batch's own length, one
        shape for all micro-batches of a size.
        """
        for start in range(0, len(self) if indices is None else len(indices), size):
            piece = slice(start, start + size)
            micro = self[piece if indices is None else indices[piece]]
            if not whole_prompts:
                longest = int(micro.length_N.max())
                micro.prompt_ids_NL = micro.prompt_ids_NL[:, :longest]
                micro.prompt_mask_NL = micro.prompt_mask_NL[:, :longest]
            yield micro


def required_tensors() -> list[str]:
    """Names of the tensors that every batch has."""
    fields = dataclasses.fields(Batch)
    return [field.name for field in fields if field.default is dataclasses.MISSING]


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`, from pinned memory so that the copy to a GPU does not wait for what is queued there."""
    if device.type != "cuda" or tensor.device.type == "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def with_last(items: Iterator[Batch]) -> Iterator[tuple[Batch, bool]]:
    """Pair each item with whether it is the last one."""
    previous = next(items)
    for item in items:
        yield previous, False
        previous = item
    yield previous, True


class Averages:
    """Weighted means, and maxima, of named scalars over every minibatch and every rank.

    Tensors are added where they are and read once, in `reduce`: no micro-batch waits for the device.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor | float] = {}
        self._maxima: dict[str, Tensor] = {}

    def _accumulate(self, name: str, value: Tensor | float, count: float) -> None:
        added = value.detach().double() if isinstance(value, Tensor) else value
        self._sums[name] = self._sums.get(name, 0.0) + added
        self._sums[f"{name}#"] = self._sums.get(f"{name}#", 0.0) + count

    def add(self, values: dict[str, Tensor] | dict[str, float], weight: float = 1.0) -> None:
        """Add one observation of each value; weight 0 only makes the name known (names must agree on all ranks)."""
        for name, value in values.items():
            self._accumulate(name, value * weight if weight else 0.0, weight)

    def add_shares(self, shares: dict[str, Tensor], is_last: bool) -> None:
        """Add a micro-batch's shares of its minibatch's means; the last micro-batch closes the observation."""
        for name, share in shares.items():
            self._accumulate(name, share, float(is_last))

    def add_maximum(self, name: str, value: Tensor) -> None:
        """Keep the largest value seen under `name`."""
        value = value.detach().double()
        known = self._maxima.get(name)
        self._maxima[name] = value if known is None else torch.maximum(known, value)

    def state_dict(self) -> dict[str, dict[str, float]]:
        """What was added so far on this rank, as numbers."""
        return {"sums": _to_floats(self._sums), "maxima": _to_floats(self._maxima)}

    @staticmethod
    def from_state(state: Mapping[str, Mapping[str, float]], device: torch.device) -> "Averages":
        """Averages that go on from `state_dict`'s result, to the last bit: all sums are float64."""
        averages = Averages()
        averages._sums = dict(state["sums"])
        averages._maxima = {
            name: torch.tensor(value, dtype=torch.float64, device=device)
            for name, value in state["maxima"].items()
        }
        return averages

    def reduce(self, device: torch.device) -> dict[str, float | None]:
        """Means and maxima over all ranks (collectives); None where nothing was added anywhere."""
        sums = fsdp_utils.all_reduce_sums(_to_floats(self._sums), device)
        names = sorted(self._maxima)
        known = _to_floats(self._maxima)
        maxima = torch.tensor([known[n] for n in names], dtype=torch.float64, device=device)
        if names:
            dist.all_reduce(maxima, dist.ReduceOp.MAX)
        means = {
            n: sums[n] / sums[f"{n}#"] if sums[f"{n}#"] else None
            for n in sums
            if not n.endswith("#")
        }
        return means | dict(zip(names, maxima.tolist(), strict=True))


def _to_floats(values: Mapping[str, Tensor | float]) -> dict[str, float]:
    """The values as numbers, those on a device read all at once."""
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    numbers = torch.stack(list(tensors.values())).tolist() if tensors else []
    read = dict(zip(tensors, numbers, strict=True))
    return {
        name: read[name] if isinstance(value, Tensor) else value for name, value in values.items()
    }
