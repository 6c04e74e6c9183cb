"""Weights straight from FSDP shards into flat buckets of the engines' dtype, LoRA merged on the way in float32.

Each rank casts (and merges) its own rows first, so that the one all-gather of a bucket moves the wire's bytes and not
the master weights'. The model is never changed and never whole: memory is the bucket, its gathered shards, and one
matrix's rows in float32.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from utils.fsdp_utils import checkpoint_name, full_tensor
from utils.weights.buckets import BucketLayout

DEFAULT_BUCKET_BYTES = 256 << 20
# Elements between the shards of a packed buffer, so that each starts at an aligned address.
SLOT_ALIGNMENT = 64


@dataclass(frozen=True)
class LoraFactors:
    """One adapter of one linear layer or convolution: W + scaling * up @ down."""

    layer: Any
    adapter: str
    down: Tensor
    up: Tensor

    @property
    def scaling(self) -> float:
        """The adapter's alpha / rank (peft may change it at any time)."""
        return self.layer.scaling[self.adapter]

    @property
    def is_active(self) -> bool:
        """Whether the layer's forward pass adds this adapter."""
        return self.adapter in self.layer.active_adapters


@dataclass(frozen=True)
class Source:
    """One exported parameter: its name in the checkpoint, the parameter (a shard or whole) and its adapters."""

    name: str
    parameter: Tensor
    lora: list[LoraFactors] = field(default_factory=list)


class RowGather:
    """Packs the dim-0 shards of several tensors into one buffer, gathers all ranks' in one collective, unpacks.

    FSDP2 shards rows as `torch.chunk` does: ceil(rows / ranks) each, the last ranks fewer or none. Every rank's slot
    has the largest shard's size.
    """

    def __init__(self, shapes: Sequence[Sequence[int]], group: dist.ProcessGroup) -> None:
        self.group, self.world_size, self.rank = group, group.size(), group.rank()
        self.shapes = [tuple(shape) for shape in shapes]
        self.starts: list[int] = []
        self.num_elements = 0
        for shape in self.shapes:
            self.starts.append(self.num_elements)
            slot = -(-shape[0] // self.world_size) * prod(shape[1:])
            self.num_elements += -(-slot // SLOT_ALIGNMENT) * SLOT_ALIGNMENT

    def rows(self, index: int, rank: int) -> tuple[int, int]:
        """First row and end of `rank`'s shard of tensor `index`."""
        num_rows = self.shapes[index][0]
        chunk = -(-num_rows // self.world_size)
        return min(rank * chunk, num_rows), min((rank + 1) * chunk, num_rows)

    def slots(self, packed: Tensor) -> list[Tensor]:
        """Return this rank's place for each tensor's rows in its buffer `packed` (num_elements,)."""
        slots = []
        for index, shape in enumerate(self.shapes):
            first, end = self.rows(index, self.rank)
            local_shape = (end - first, *shape[1:])
            start = self.starts[index]
            slots.append(packed[start : start + prod(local_shape)].view(local_shape))
        return slots

    def gather(self, packed: Tensor, outputs: Sequence[Tensor] | None) -> None:
        """Fill the whole, contiguous tensors `outputs` from every rank's `packed`; None: only take part."""
        gathered = packed.new_empty(self.world_size, self.num_elements)
        # As bytes: gloo does not know every dtype.
        dist.all_gather_into_tensor(
            gathered.view(-1).view(torch.uint8), packed.view(torch.uint8), group=self.group
        )
        if outputs is None:
            return
        targets, pieces = [], []
        for index, output in enumerate(outputs):
            row_size, flat = prod(self.shapes[index][1:]), output.view(-1)
            for rank in range(self.world_size):
                first, end = self.rows(index, rank)
                if first < end:
                    targets.append(flat[first * row_size : end * row_size])
                    pieces.append(gathered[rank, self.starts[index] :][: (end - first) * row_size])
        if targets:
            torch._foreach_copy_(targets, pieces)


class WeightExporter:
    """The buckets of one (sharded) model on one trainer rank; made once, after sharding.

    `dtype` is what the engines compute in. The parameters are taken now: between forward and backward pass FSDP may
    put gathered copies of a lower precision into the modules, and these would not be the master weights.

    Raises ValueError for parameters that are sharded in another way than FSDP2's rows over one mesh dimension.
    """

    def __init__(
        self, model: nn.Module, dtype: torch.dtype, bucket_bytes: int = DEFAULT_BUCKET_BYTES
    ) -> None:
        self.sources = _find_sources(model)
        shards = [
            p for source in self.sources for p in _parameters_of(source) if isinstance(p, DTensor)
        ]
        problems = {str(p.placements) for p in shards if tuple(p.placements) != (Shard(0),)}
        if problems:
            raise ValueError(
                f"parameters are placed as {', '.join(sorted(problems))}: only (Shard(dim=0),) is exported"
            )
        self.group = shards[0].device_mesh.get_group() if shards else None
        self.world_size = self.group.size() if self.group else 1
        self.device = _compute_device(shards, self.sources)
        self.layout = BucketLayout.plan(
            [(s.name, s.parameter.shape) for s in self.sources], dtype, bucket_bytes
        )
        sources = iter(self.sources)
        self._bucket_sources = [[next(sources) for _ in bucket] for bucket in self.layout.buckets]

    @property
    def manifest(self) -> list[tuple[str, tuple[int, ...]]]:
        """(Checkpoint name, whole shape) of everything that is exported, in order."""
        return self.layout.manifest

    @property
    def num_buckets(self) -> int:
        """How many buckets one export has."""
        return len(self.layout.buckets)

    def new_buffer(self) -> Tensor:
        """A flat uint8 buffer on the compute device that holds any bucket."""
        return torch.empty(self.layout.buffer_bytes, dtype=torch.uint8, device=self.device)

    def buckets(self) -> Iterator[list[tuple[str, Tensor]]]:
        """Yield the named whole tensors of one bucket after the other. A collective.

        They are views of one buffer, valid until the next bucket is asked for.
        """
        buffer = self.new_buffer()
        for index in range(self.num_buckets):
            self.fill(index, buffer)
            yield self.layout.views(index, buffer)

    @torch.no_grad()
    def fill(self, index: int, buffer: Tensor | None) -> None:
        """Write bucket `index` into `buffer` (uint8, on the compute device). A collective.

        None: take part with this rank's shards and keep nothing. Nothing waits for the device.
        """
        sources = self._bucket_sources[index]
        outputs = (
            [] if buffer is None else [tensor for _, tensor in self.layout.views(index, buffer)]
        )
        downs = self._whole_down_factors(sources)
        sharded = [i for i, source in enumerate(sources) if self._is_split(source.parameter)]
        whole = (
            [i for i in range(len(sources)) if i not in set(sharded)] if buffer is not None else []
        )
        self._write([sources[i] for i in whole], [outputs[i] for i in whole], downs)
        if sharded:
            assert self.group is not None
            gather = RowGather([sources[i].parameter.shape for i in sharded], self.group)
            packed = torch.empty(gather.num_elements, dtype=self.layout.dtype, device=self.device)
            self._write([sources[i] for i in sharded], gather.slots(packed), downs)
            gather.gather(packed, None if buffer is None else [outputs[i] for i in sharded])

    def all_agree(self, is_fine: bool) -> bool:
        """Whether `is_fine` is true on every rank. A collective."""
        if self.world_size == 1:
            return is_fine
        flag = torch.tensor([int(is_fine)], device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MIN, group=self.group)
        return bool(flag.item())

    def _is_split(self, parameter: Tensor) -> bool:
        return self.world_size > 1 and isinstance(parameter, DTensor)

    def _local(self, tensor: Tensor) -> Tensor:
        """Return this rank's rows on the compute device (offloaded ones come by a copy that does not wait)."""
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
        return local.to(self.device, non_blocking=True)

    def _write(
        self, sources: Sequence[Source], targets: Sequence[Any], downs: dict[int, Tensor]
    ) -> None:
        """Cast this rank's rows of each source into its target, merged ones in a single rounding."""
        plain_targets, plain_rows = [], []
        for source, target in zip(sources, targets, strict=True):
            adapters = [factors for factors in source.lora if factors.is_active]
            if adapters:
                target.copy_(self._merged_rows(source, adapters, downs))
            elif target.numel():
                plain_targets.append(target)
                plain_rows.append(self._local(source.parameter))
        if plain_targets:
            torch._foreach_copy_(plain_targets, plain_rows)

    def _merged_rows(
        self, source: Source, adapters: list[LoraFactors], downs: dict[int, Tensor]
    ) -> Tensor:
        """Return this rank's rows of W + sum of scaling * up @ down, in float32.

        A convolution's kernel and factors count as matrices with one row per output channel.
        """
        merged = self._local(source.parameter).to(
            torch.float32, copy=True, memory_format=torch.contiguous_format
        )
        for factors in adapters:
            rows = self._rows_of(factors.up, source.parameter).float().flatten(1)
            merged.flatten(1).addmm_(rows, downs[id(factors)].flatten(1), alpha=factors.scaling)
        return merged

    def _rows_of(self, up: Tensor, parameter: Tensor) -> Tensor:
        """The rows of `up` that belong to this rank's rows of `parameter`."""
        if self._is_split(up) == self._is_split(parameter):
            return self._local(up)
        if self._is_split(up):
            return full_tensor(up.detach()).to(self.device)
        assert self.group is not None
        first, end = RowGather([up.shape], self.group).rows(0, self.group.rank())
        return self._local(up)[first:end]

    def _whole_down_factors(self, sources: Sequence[Source]) -> dict[int, Tensor]:
        """Every active adapter's whole `down` (rank, inputs) in float32, by the factors' id; one collective."""
        factors = [f for source in sources for f in source.lora if f.is_active]
        downs = {id(f): self._local(f.down).float() for f in factors if not self._is_split(f.down)}
        split = [f for f in factors if id(f) not in downs]
        if split:
            assert self.group is not None
            gather = RowGather([f.down.shape for f in split], self.group)
            packed = torch.empty(gather.num_elements, dtype=torch.float32, device=self.device)
            for slot, f in zip(gather.slots(packed), split, strict=True):
                slot.copy_(self._local(f.down))
            whole = [
                torch.empty(f.down.shape, dtype=torch.float32, device=self.device) for f in split
            ]
            gather.gather(packed, whole)
            downs |= {id(f): tensor for f, tensor in zip(split, whole, strict=True)}
        return downs


def _find_sources(model: nn.Module) -> list[Source]:
    """Every parameter that a checkpoint has, in the model's order (a tied one once), with its adapters."""
    layers = {
        n: m for n, m in model.named_modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")
    }
    sources = []
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            continue
        layer: Any = (
            layers.get(name.removesuffix(".base_layer.weight"))
            if name.endswith(".weight")
            else None
        )
        lora = [
            LoraFactors(layer, adapter, down.weight, layer.lora_B[adapter].weight)
            for adapter, down in (layer.lora_A.items() if layer is not None else ())
        ]
        sources.append(Source(checkpoint_name(name), parameter, lora))
    return sources


def _parameters_of(source: Source) -> list[Tensor]:
    return [
        source.parameter,
        *(tensor for factors in source.lora for tensor in (factors.down, factors.up)),
    ]


def _compute_device(shards: Sequence[DTensor], sources: Sequence[Source]) -> torch.device:
    """Where collectives run: the mesh's device, which is not the shards' own when these are offloaded."""
    if not shards:
        return sources[0].parameter.device
    device_type = shards[0].device_mesh.device_type
    return (
        torch.device("cuda", torch.cuda.current_device())
        if device_type == "cuda"
        else torch.device(device_type)
    )
