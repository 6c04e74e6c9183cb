"""A faster forward for peft's LoRA on a linear layer: same parameters, names, saved files and arithmetic.

peft computes `base(x) + lora_B(lora_A(dropout(x))) * scaling`: besides the base product five passes over tensors as
large as the output in the forward, and as many in the backward. Here the low-rank products are accumulated in place
by the matrix multiplication itself: y = x W^T + bias, then y += s (x A^T) B^T, with x A^T kept for the backward.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as PeftLoraLinear
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula


# A custom operator and not an autograd.Function: torch.compile then keeps it as one node, in which nothing is copied.
@torch.library.custom_op("ppo_vla::lora_linear", mutates_args=())
def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Return x W^T + bias + scaling (x A^T) B^T, (..., out), and x A^T, (tokens, rank), which the backward reads.

    `x` (..., in), `weight` (out, in), `down` is A (rank, in) and `up` is B (out, rank); all of one dtype.
    """
    x_ND = x.reshape(-1, x.shape[-1])
    out_NO = F.linear(x_ND, weight, bias)
    low_NR = x_ND @ down.T
    out_NO.addmm_(low_NR, up.T, alpha=scaling)
    return out_NO.view(*x.shape[:-1], weight.shape[0]), low_NR


@lora_linear.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    tokens = x.numel() // x.shape[-1]
    return x.new_empty(*x.shape[:-1], weight.shape[0]), x.new_empty(tokens, down.shape[0])


# torch.compile chooses by FLOPs what to compute again under a memory budget; a custom operator would count none.
@register_flop_formula(torch.ops.ppo_vla.lora_linear)
def _(
    x_shape: Any,
    weight_shape: Any,
    bias_shape: Any,
    down_shape: Any,
    *args: Any,
    out_shape: Any = None,
    **kwargs: Any,
) -> int:
    columns, inner = weight_shape
    return 2 * math.prod(x_shape[:-1]) * (columns * inner + down_shape[0] * (columns + inner))


@torch.library.custom_op("ppo_vla::lora_linear_backward", mutates_args=())
def lora_linear_backward(
    grad: Tensor,
    x: Tensor,
    low_NR: Tensor,
    weight: Tensor,
    down: Tensor,
    up: Tensor,
    scaling: float,
    needs_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `lora_linear` for x (empty unless `needs_x`), A and B; the base weight is frozen."""
    x_ND, grad_NO = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    grad_low_NR = (grad_NO @ up).mul_(scaling)
    grad_up = (grad_NO.T @ low_NR).mul_(scaling)
    grad_down = grad_low_NR.T @ x_ND
    if not needs_x:
        return x.new_empty(0), grad_down, grad_up
    grad_x_ND = grad_NO @ weight
    grad_x_ND.addmm_(grad_low_NR, down)
    return grad_x_ND.view(x.shape), grad_down, grad_up


@lora_linear_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    low_NR: Tensor,
    weight: Tensor,
    down: Tensor,
    up: Tensor,
    scaling: float,
    needs_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = x.new_empty(x.shape) if needs_x else x.new_empty(0)
    return grad_x, torch.empty_like(down), torch.empty_like(up)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, down, up, scaling = inputs
    ctx.save_for_backward(x, output[1], weight, down, up)
    ctx.scaling = scaling


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    needs_x = ctx.needs_input_grad[0]
    grad_x, grad_down, grad_up = lora_linear_backward(
        grad, *ctx.saved_tensors, ctx.scaling, needs_x
    )
    return grad_x if needs_x else None, None, None, grad_down, grad_up, None


lora_linear.register_autograd(_backward, setup_context=_save)


class FusedLoraLinear(PeftLoraLinear):
    """peft's LoRA on a linear layer, computed by `lora_linear` where that says the same.

    Everything else goes through peft: adapters switched off, merged or more than one, dropout in training, variants
    (DoRA), biases in the adapter, a base weight that trains or that has another dtype than input and adapter.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output for `x` (..., in)."""
        if args or kwargs or not self._is_plain(x):
            return super().forward(x, *args, **kwargs)
        name = self.active_adapters[0]
        base: Any = self.base_layer
        down, up = self.lora_A[name].weight, self.lora_B[name].weight
        return lora_linear(x, base.weight, base.bias, down, up, float(self.scaling[name]))[0]

    def _is_plain(self, x: Tensor) -> bool:
        names = self.active_adapters
        if (
            self.disable_adapters
            or self.merged
            or len(names) != 1
            or names[0] not in self.lora_A
            or self.lora_variant
        ):
            return False
        name, weight = names[0], self.base_layer.weight
        dropout = self.lora_dropout[name]
        if not isinstance(dropout, nn.Identity) and self.training:
            return False
        down, up = self.lora_A[name], self.lora_B[name]
        if down.bias is not None or up.bias is not None or weight.requires_grad:
            return False
        return (
            x.dtype == weight.dtype == down.weight.dtype == up.weight.dtype
            and not torch.is_autocast_enabled()
        )


def fuse_lora(model: nn.Module) -> None:
    """Make every plain peft LoRA layer inside `model` a `FusedLoraLinear`, in place; parameters stay as they are."""
    for module in model.modules():
        if type(module) is PeftLoraLinear and type(module.base_layer) is nn.Linear:
            # The subclass has no state of its own: only the forward changes.
            module.__class__ = FusedLoraLinear
