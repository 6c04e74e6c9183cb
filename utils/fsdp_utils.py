"""FSDP2 for Hugging Face models: process groups, sharding, full state dicts, LoRA merged on the way out.

Everything here works the same over NCCL on GPUs and over gloo on CPUs, with one rank or many. It knows no PPO.
"""

import os
import resource
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

# Blocks that get an FSDP unit of their own, by class name: timm's ViT block and transformers' Llama layer.
UNIT_CLASSES = ("Block", "LlamaDecoderLayer")
# Smaller blocks stay in the root unit: a collective per 100 kB layer costs more latency than it saves memory.
MIN_UNIT_PARAMS = 4_000_000
# An adapter's masters or gradients may stay whole on every rank, those of a whole model may not.
SMALL_BYTES = 2 << 30
FORWARD_METHODS = ("forward_actions", "encode_vision")


@dataclass(frozen=True)
class DistInfo:
    """Place of one process in its group."""

    rank: int
    world_size: int
    device: torch.device


def setup_distributed(timeout_s: float = 1800.0, device_type: str | None = None) -> DistInfo:
    """Start (or find) the default process group from torchrun's variables; alone, make a group of one.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. A GPU process uses NCCL for CUDA tensors and
    gloo for CPU tensors, a CPU process gloo only. `device_type` None: a GPU if there is one.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if device_type == "cuda" or (device_type is None and torch.cuda.is_available()):
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo"
        timeout = timedelta(seconds=timeout_s)
        if world_size == 1 and "MASTER_ADDR" not in os.environ:
            dist.init_process_group(
                backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout
            )
        else:
            dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=timeout)
    return DistInfo(dist.get_rank(), dist.get_world_size(), device)


def data_mesh(device: torch.device) -> DeviceMesh:
    """One-dimensional mesh over all ranks."""
    return init_device_mesh(device.type, (dist.get_world_size(),))


def cast_frozen(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast `model`'s frozen floating-point parameters to `dtype` in place and return it; before `shard_model`.

    Only what trains needs float32 master weights: at 7B with a LoRA this is 15 GB instead of 30, and no cast per pass.
    The factors of a frozen adapter are small. They keep their type, so that the engines get what
    the saved adapter holds.
    """
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            continue
        if not parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return model


def compile_blocks(
    model: nn.Module, backend: str = "inductor", *, memory_budget: float = 1.0
) -> None:
    """Compile the forward of each ViT block and Llama layer in place; parameter names stay as they are.

    `memory_budget` in [0, 1] is the share of a block's activations that are kept for the backward pass; the rest is
    computed again there, what costs least first (0: all but the block's input). It holds for the whole process.

    All blocks of a class share one compilation per shape and mode (gradients or not, for the input too). Hooks (FSDP's)
    stay outside. Call it after `shard_model`: a forward taken before that would not be the outermost one of
    transformers' layers, and those checkpoint only there.
    """
    # Two kinds of ViT, each with and without gradients, its first block apart: more than the default of eight.
    torch._dynamo.config.recompile_limit = 64
    torch._functorch.config.activation_memory_budget = memory_budget
    for module in model.modules():
        if _is_unit(module):
            module.forward = _contiguous_first(torch.compile(module.forward, backend=backend))  # type: ignore[method-assign]


def _is_unit(module: nn.Module) -> bool:
    """Whether `module` is one of UNIT_CLASSES, sharded (FSDP2 makes a subclass) or not."""
    return any(base.__name__ in UNIT_CLASSES for base in type(module).__mro__)


def _contiguous_first(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function` of a contiguous first argument: the first block of a ViT gets patches strided by the convolution."""

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return function(x.contiguous(), *args, **kwargs)

    return forward


def shard_model(
    model: nn.Module,
    *,
    param_dtype: torch.dtype = torch.float32,
    offload: bool = False,
    reshard_after_forward: bool = True,
    min_unit_params: int = MIN_UNIT_PARAMS,
) -> nn.Module:
    """Shard `model` in place with FSDP2 and return it.

    Parameters keep their own dtype (float32 master weights); `param_dtype` is what compute and all-gathers use,
    gradients are reduced in float32. `reshard_after_forward=False` keeps the gathered weights for the backward pass
    (ZeRO-2). `forward_actions` and `encode_vision`, where the model has them, run with gathered weights too.

    A single rank keeps frozen parameters that have the compute dtype already (see `cast_frozen`) outside FSDP, which
    would only hold a second copy of them: they are plain tensors then; and it never casts a small set of trained ones
    twice in a pass. `offload` keeps everything on the CPU.
    """
    mesh = data_mesh(next(model.parameters()).device)
    lower = None if param_dtype == torch.float32 else param_dtype
    policy = MixedPrecisionPolicy(
        param_dtype=lower, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    offload_policy = CPUOffloadPolicy() if offload else OffloadPolicy()
    ignored: set[nn.Parameter] = set()
    if mesh.size() == 1 and not offload:
        ignored = {p for p in model.parameters() if not p.requires_grad and p.dtype == param_dtype}
        reshard_after_forward = reshard_after_forward and trained_bytes(model) > SMALL_BYTES

    def shard(module: nn.Module) -> None:
        fully_shard(
            module,
            mesh=mesh,
            mp_policy=policy,
            offload_policy=offload_policy,
            reshard_after_forward=reshard_after_forward,
            ignored_params=ignored,
        )

    units: dict[str, list[FSDPModule]] = {}
    for name, module in list(model.named_modules()):
        size = sum(p.numel() for p in module.parameters() if p not in ignored)
        if not _is_unit(module) or size < min_unit_params:
            continue
        parent = name.rpartition(".")[0]
        siblings = list(model.get_submodule(parent).children())
        # OpenVLA never computes the last block of a ViT; a unit that runs no forward breaks gradient accumulation.
        if not (type(module).__name__ == "Block" and siblings[-1] is module):
            shard(module)
            units.setdefault(parent, []).append(cast(FSDPModule, module))
    shard(model)
    _prefetch_neighbours(units.values())
    for method in FORWARD_METHODS:
        if hasattr(model, method):
            register_fsdp_forward_method(model, method)
    return model


def _prefetch_neighbours(chains: Iterable[list[FSDPModule]]) -> None:
    """Gather each unit's weights while its neighbour computes: the next one in the forward, the previous one after."""
    for chain in chains:
        for earlier, later in pairwise(chain):
            earlier.set_modules_to_forward_prefetch([later])
            later.set_modules_to_backward_prefetch([earlier])


def set_gradient_sync(
    model: nn.Module, is_last_micro_batch: bool, *, keep_gathered: bool = False
) -> None:
    """Tell FSDP where in a minibatch the next backward pass is.

    Gradients are reduced only in the last micro-batch where the unsharded ones are small; else in every one. Skipping
    the reduction keeps each rank's full gradients between micro-batches: nothing for an adapter, 28 GB for the full
    7B. Both orders give the same sum. `keep_gathered`: the gathered (and cast) weights stay from one micro-batch to the
    next, for models sharded with `reshard_after_forward=False`.
    """
    if isinstance(model, FSDPModule):
        small = trained_bytes(model) <= SMALL_BYTES
        model.set_requires_gradient_sync(is_last_micro_batch or not small)
        keep = keep_gathered or (small and dist.get_world_size() == 1)
        model.set_reshard_after_backward(is_last_micro_batch or not keep)


def trained_bytes(model: nn.Module) -> int:
    """Bytes of the float32 master weights of what trains, over all ranks."""
    return 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)


def free_gathered(model: nn.Module) -> None:
    """Go back to the shards everywhere, after passes without a backward that would have done it."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor behind a DTensor shard (a collective), or the tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def compute_device(model: nn.Module) -> torch.device:
    """Where `model` computes, which with `offload` is not where its parameters are."""
    parameter = next(model.parameters())
    if isinstance(parameter, DTensor) and parameter.device_mesh.device_type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return parameter.device


def local_tensor(tensor: Tensor) -> Tensor:
    """Return this rank's part of a DTensor, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def checkpoint_name(name: str) -> str:
    """Parameter name in the checkpoint for a name inside a (LoRA-wrapped, checkpointed) module."""
    for part in ("base_model.model.", "_checkpoint_wrapped_module."):
        name = name.replace(part, "")
    return name.replace(".base_layer.", ".")


def iterate_merged_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield (checkpoint name, full tensor) of every parameter, LoRA added in float32 into a new tensor.

    The model itself is never changed. A collective: every rank must exhaust the iterator. Memory: one full matrix at
    a time. Tensors are detached, on the parameter's device, in the parameter's dtype.
    """
    lora_layers = {
        name: m
        for name, m in model.named_modules()
        if hasattr(m, "lora_A") and hasattr(m, "base_layer")
    }
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            continue
        weight = full_tensor(parameter.detach())
        owner = name.removesuffix(".base_layer.weight")
        if owner != name and owner in lora_layers:
            weight = _merge_lora(weight, lora_layers[owner])
        yield checkpoint_name(name), weight


def _merge_lora(weight: Tensor, layer: nn.Module) -> Tensor:
    """W + sum over active adapters of scaling * B @ A, accumulated in float32.

    A convolution's kernel and factors count as matrices with one row per output channel.
    """
    merged = weight.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    lora: Any = layer
    for adapter in lora.active_adapters:
        down = full_tensor(lora.lora_A[adapter].weight.detach()).float().flatten(1)
        up = full_tensor(lora.lora_B[adapter].weight.detach()).float().flatten(1)
        merged.flatten(1).add_(up @ down, alpha=lora.scaling[adapter])
    return merged.to(weight.dtype)


def full_state_dict(model: nn.Module, *, trainable_only: bool = False) -> dict[str, Tensor]:
    """Gather `model`'s parameters and persistent buffers to rank 0's CPU memory; {} on the other ranks.

    Names are the module's own (LoRA parameters included, nothing merged). A collective.
    """
    wanted = {n for n, p in model.named_parameters() if p.requires_grad} if trainable_only else None
    state: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if wanted is not None and name not in wanted:
            continue
        whole = full_tensor(value.detach())
        if dist.get_rank() == 0:
            state[name] = whole.to("cpu", copy=True)
    return state


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """Clip the global L2 norm of the gradients over all ranks in place and return the norm before clipping.

    `max_norm <= 0` only measures. FSDP shards and plain (replicated) parameters must not be mixed.
    """
    grads = [p for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([cast(Tensor, p.grad) for p in grads])
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(grads, max_norm, norm)
    return float(full_tensor(norm))


def all_reduce_sums(values: dict[str, float], device: torch.device) -> dict[str, float]:
    """Sum each value over the ranks (one collective; the keys must be the same everywhere)."""
    names = sorted(values)
    packed = torch.tensor([values[n] for n in names], dtype=torch.float64, device=device)
    dist.all_reduce(packed)
    return dict(zip(names, packed.tolist(), strict=True))


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this process in GiB: the allocator's on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
