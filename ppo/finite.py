"""Numbers that are not finite end the run before they reach a weight, and the message says where they came from."""

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils import fsdp_utils

NAMED_PARAMETERS = 3


def require_finite(tensors: Mapping[str, Tensor | None], step: int) -> None:
    """Raise the same FloatingPointError on every rank if a value is not finite on any of them. A collective."""
    found = []
    for name, tensor in tensors.items():
        if tensor is not None and (count := int((~torch.isfinite(tensor)).sum())):
            found.append(f"{count} of {tensor.numel()} values of the {name}")
    raise_on_all(" and ".join(found), f"not finite at training step {step}")


def require_finite_step(
    group: str, loss: float, norm: float, named: Iterable[tuple[str, nn.Parameter]], step: int
) -> None:
    """Raise the same FloatingPointError on every rank if loss or gradient norm is not finite.

    Args:
        group: policy or critic.
        loss: mean over the ranks, the same on all of them.
        norm: of the gradient over all ranks.
        named: the group's trained parameters, to name those of this rank whose gradients are not finite.
        step: training step.
    """
    if torch.isfinite(torch.tensor([loss, norm])).all():
        return
    wrong = [name for name, parameter in named if not _is_finite(parameter.grad)]
    rest = f" and {len(wrong) - NAMED_PARAMETERS} more" if len(wrong) > NAMED_PARAMETERS else ""
    found = f"the gradients of {', '.join(wrong[:NAMED_PARAMETERS])}{rest}" if wrong else ""
    what = f"the loss of the {group} is {loss:g}, its gradient norm is {norm:g} at training step {step}"
    raise_on_all(found, what, even_if_none=True)


def raise_on_all(found: str, what: str, *, even_if_none: bool = False) -> None:
    """Raise FloatingPointError with what every rank `found` (empty: nothing), if any did. A collective."""
    everywhere: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(everywhere, found)
    ranks = [f"rank {rank}: {text}" for rank, text in enumerate(everywhere) if text]
    if ranks or even_if_none:
        raise FloatingPointError("; ".join([what, *ranks]))


def _is_finite(tensor: Tensor | None) -> bool:
    return tensor is None or bool(torch.isfinite(fsdp_utils.local_tensor(tensor)).all())
