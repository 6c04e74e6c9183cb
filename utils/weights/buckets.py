"""How a model's weights lie in flat buckets: the same table on the trainer's and on the engine's side. Torch only.

A bucket is a flat uint8 tensor; every tensor in it is contiguous, whole and of the one dtype of the layout.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

# Bytes. Vectorised copies want 16, matrix products 128.
ALIGNMENT = 256
# Elements of one checksum step: its int64 temporaries stay at 64 MB whatever the tensor's size.
CHECKSUM_CHUNK = 1 << 22


@dataclass(frozen=True)
class Entry:
    """One tensor of a bucket: checkpoint name, whole shape, and offset in bytes."""

    name: str
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class BucketLayout:
    """Every bucket's tensors, in the order in which they are sent, and the dtype of all of them."""

    dtype: torch.dtype
    buckets: tuple[tuple[Entry, ...], ...]

    @classmethod
    def plan(
        cls, shapes: Iterable[tuple[str, Sequence[int]]], dtype: torch.dtype, bucket_bytes: int
    ) -> "BucketLayout":
        """Fill buckets of at most `bucket_bytes` in the given order; a larger tensor gets a bucket of its own."""
        buckets: list[list[Entry]] = []
        end = 0
        for name, shape in shapes:
            size = -(-prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
            if not buckets or (end and end + size > bucket_bytes):
                buckets.append([])
                end = 0
            buckets[-1].append(Entry(name, tuple(shape), end))
            end += size
        return cls(dtype, tuple(tuple(bucket) for bucket in buckets))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "BucketLayout":
        """The layout behind `to_dict`."""
        buckets = (
            tuple(Entry(n, tuple(s), o) for n, s, o in bucket) for bucket in values["buckets"]
        )
        return cls(getattr(torch, values["dtype"]), tuple(buckets))

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and strings, for JSON or an RPC."""
        buckets = [[[e.name, list(e.shape), e.offset] for e in bucket] for bucket in self.buckets]
        return {"dtype": str(self.dtype).removeprefix("torch."), "buckets": buckets}

    @property
    def manifest(self) -> list[tuple[str, tuple[int, ...]]]:
        """Names and shapes of all tensors, in order."""
        return [(entry.name, entry.shape) for bucket in self.buckets for entry in bucket]

    @property
    def payload_bytes(self) -> int:
        """Bytes of all tensors, without padding."""
        return sum(prod(shape) for _, shape in self.manifest) * self.dtype.itemsize

    @property
    def buffer_bytes(self) -> int:
        """Size of a buffer that holds any bucket."""
        return max((self.bucket_bytes(index) for index in range(len(self.buckets))), default=0)

    def bucket_bytes(self, index: int) -> int:
        """Bytes of one bucket, from its start to the end of its last tensor."""
        last = self.buckets[index][-1]
        return last.offset + prod(last.shape) * self.dtype.itemsize

    def views(self, index: int, flat: Tensor) -> list[tuple[str, Tensor]]:
        """(Name, tensor) of every tensor of bucket `index`, as views of its buffer `flat` (uint8, 1-D)."""
        typed = flat[: flat.numel() // self.dtype.itemsize * self.dtype.itemsize].view(self.dtype)
        starts = [(entry, entry.offset // self.dtype.itemsize) for entry in self.buckets[index]]
        return [(e.name, typed[start : start + prod(e.shape)].view(e.shape)) for e, start in starts]


def checksums(tensors: Iterable[Tensor]) -> Tensor:
    """Two int64 sums (num_tensors, 2) over each tensor's bits: of the words, and of word times position.

    Exact integer arithmetic modulo 2**64, so it is the same on every device; the second sum sees exchanged elements.
    Computed on the tensors' device without waiting for it. Tensors must be contiguous and of 2 or 4 bytes an element.
    """
    rows = [_checksum(tensor) for tensor in tensors]
    return torch.stack(rows) if rows else torch.zeros(0, 2, dtype=torch.int64)


def _checksum(tensor: Tensor) -> Tensor:
    bits = tensor.view(-1).view(torch.int16 if tensor.element_size() == 2 else torch.int32)
    positions = torch.arange(1, min(bits.numel(), CHECKSUM_CHUNK) + 1, device=tensor.device)
    total = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    for start in range(0, bits.numel(), CHECKSUM_CHUNK):
        words = bits[start : start + CHECKSUM_CHUNK].long()
        plain = words.sum()
        total[0] += plain
        total[1] += start * plain + (words * positions[: words.numel()]).sum()
    return total
