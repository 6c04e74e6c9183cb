"""The micro-batch is checked against the GPU's memory, or chosen by it, before the run and not by an OOM in hour three.

The learner rehearses: passes at the real shapes with the longest prompt, without an optimizer step. Memory is affine in
the micro-batch size, so two small rehearsals tell what any size needs; the size that will run is rehearsed itself.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ppo.learner import PPOLearner
from utils import fsdp_utils
from utils.logging_utils import get_logger

logger = get_logger("memory")
GIB = 2**30
# A chosen size leaves this share free: holes between blocks, cuBLAS workspaces, NCCL buffers.
HEADROOM = 0.05
LARGEST = 64


@dataclass(frozen=True)
class MemoryCheck:
    """The micro-batch size that runs, and what it needs of what there is, bytes of the fullest rank."""

    micro_batch_size: int
    needed: float
    available: float


def candidate_sizes(minibatch: int, limit: int = LARGEST) -> list[int]:
    """Micro-batch sizes to try, largest first: divisors of `minibatch`, each at most half the one before."""
    sizes: list[int] = []
    for size in range(min(minibatch, limit), 0, -1):
        if minibatch % size == 0 and (not sizes or size <= sizes[-1] // 2):
            sizes.append(size)
    return sizes


def choose_size(
    sizes: Sequence[int],
    rehearse: Callable[[int], float],
    available: float,
    *,
    may_skip: bool,
    options: str,
) -> MemoryCheck:
    """Return the first of `sizes` that fits into `available` bytes; `rehearse(size)` runs it and returns its bytes.

    With `may_skip` sizes that two small rehearsals already rule out are not run; else the first one must fit.
    `options` is what an error message recommends besides a smaller size.

    Raises:
        ValueError: nothing fits. FSDP cannot go on after a pass that an out-of-memory error has cut short, so a size
            that fits by the estimate and fails when rehearsed ends the run too.
    """
    size = 1
    try:
        one, two = rehearse(1), rehearse(2)
        estimates = {size: one + (two - one) * (size - 1) for size in sizes}
        for size in sizes:
            if may_skip and estimates[size] > (1 - HEADROOM) * available:
                continue
            needed = rehearse(size)
            if needed > available:
                break
            return MemoryCheck(size, needed, available)
    except torch.OutOfMemoryError as error:
        if size == 1:
            raise ValueError(
                f"not even one sample fits into {available / GIB:.1f} GiB of GPU memory: use {options}"
            ) from error
    need, there = estimates[size] / GIB, available / GIB
    smaller = [s for s in candidate_sizes(size) if s < size]
    fitting = [s for s in smaller if one + (two - one) * (s - 1) <= (1 - HEADROOM) * available]
    raise ValueError(
        f"--per_device_train_batch_size {size} needs about {need:.1f} GiB, {there:.1f} GiB are free: use "
        + ", ".join([*map(str, fitting[:1]), options])
    )


def check_memory(
    learner: PPOLearner, prompts: Sequence[list[int]], num_samples: int, *, share: float = 1.0
) -> MemoryCheck | None:
    """Check `per_device_train_batch_size`, or choose it where that is 0, and set it in `learner`; None on CPU.

    A collective: the ranks agree on the fullest one. Weights, optimizer states, gradients and random numbers are as
    before afterwards.

    Args:
        learner: as it will run; its optimizers have no states yet.
        prompts: every prompt that will come.
        num_samples: samples in a rank's rollout, whose cached vision features stay in memory.
        share: of the GPU's memory that this process may take (an engine on the same GPU has the rest).

    Raises:
        ValueError: out of memory; says what is needed, what there is, and what to set.
    """
    if learner.device.type != "cuda":
        return None
    args: Any = learner.args
    options = [
        name for name in ("enable_gradient_checkpointing", "offload") if not getattr(args, name)
    ]
    described = " or ".join([*(f"--{name}" for name in options), "more GPUs"])
    reserved = optimizer_bytes(learner) + cached_bytes(learner, num_samples)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(learner.device)
    mine = torch.cuda.memory_reserved(learner.device)
    available = agree(min(free + mine, share * total), learner.device, dist.ReduceOp.MIN)
    chosen = args.per_device_train_batch_size
    sizes = [chosen] if chosen else candidate_sizes(args.local_mini_batch_size)

    def rehearse(size: int) -> float:
        # The small sizes only serve the estimate: what they compile would not be used again.
        stance = (
            torch.compiler.set_stance("force_eager")
            if size < min(3, *sizes)
            else contextlib.nullcontext()
        )
        torch.cuda.reset_peak_memory_stats(learner.device)
        learner.micro_batch_size = size
        with stance:
            learner.rehearse(prompts)
        peak = torch.cuda.max_memory_allocated(learner.device) + reserved
        return agree(peak, learner.device, dist.ReduceOp.MAX)

    check = choose_size(sizes, rehearse, available, may_skip=not chosen, options=described)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(learner.device)
    logger.info(
        f"micro-batches of {check.micro_batch_size} need {check.needed / GIB:.1f} GiB of {available / GIB:.1f} GiB"
    )
    return check


def agree(value: float, device: torch.device, operation: Any) -> float:
    """The least or largest `value` of all ranks."""
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, operation)
    return float(tensor)


def optimizer_bytes(learner: PPOLearner) -> int:
    """Bytes on this rank's device of AdamW's two float32 states, which exist from the first step on."""
    shards = [
        fsdp_utils.local_tensor(parameter)
        for trained in (learner.policy, learner.critic)
        for parameter in trained.parameters
    ]
    return sum(
        2 * 4 * shard.numel() for shard in shards if shard.device.type == learner.device.type
    )


def cached_bytes(learner: PPOLearner, num_samples: int) -> int:
    """Bytes of the features that are kept for every sample of a step: the prompt's end, and frozen vision's patches."""
    model = learner.policy.model
    per_sample = 4 * model.config.text_config.hidden_size
    if learner.args.freeze_vision_backbone:
        backbone = model.vision_backbone
        per_sample += backbone.num_patches * backbone.embed_dim * learner.dtype.itemsize
    return num_samples * per_sample
