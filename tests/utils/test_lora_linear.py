"""The fused LoRA forward against peft's own, and where it steps aside."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear as PeftLoraLinear
from torch import nn

from utils.lora_linear import FusedLoraLinear, fuse_lora, lora_linear


def lora_pair(
    dtype: torch.dtype, bias: bool = True, dropout: float = 0.0
) -> tuple[nn.Module, nn.Module]:
    """One linear layer with a LoRA that does something, as peft computes it and fused."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20, bias=bias))
    get_peft_model(model, LoraConfig(r=4, lora_alpha=6, lora_dropout=dropout, target_modules=["0"]))
    nn.init.normal_(model[0].lora_B["default"].weight)
    model.to(dtype)
    fused = copy.deepcopy(model)
    fuse_lora(fused)
    assert type(model[0]) is PeftLoraLinear and type(fused[0]) is FusedLoraLinear
    return model, fused


def gradients(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output, and gradients for x and the adapter, of a loss that weighs every output differently."""
    x = x.clone().requires_grad_()
    out = model(x)
    (out.double() * torch.arange(out.numel()).view(out.shape).sin()).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "x": x.grad, **grads}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 0.03)])
def test_output_and_gradients_equal_pefts(dtype, tolerance, bias):
    peft_model, fused = lora_pair(dtype, bias)
    x = torch.randn(2, 5, 12).to(dtype)
    expected, found = gradients(peft_model, x), gradients(fused, x)
    assert found.keys() == expected.keys() and len(found) == 4
    for name, value in expected.items():
        scale = float(value.abs().max())
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance * scale, msg=name)


def test_the_operator_is_what_autograd_and_the_compiler_take_it_for():
    x, weight, bias = (
        torch.randn(2, 3, 6).double().requires_grad_(),
        torch.randn(8, 6).double(),
        torch.randn(8).double(),
    )
    down, up = (torch.randn(*s).double().requires_grad_() for s in ((2, 6), (8, 2)))
    torch.library.opcheck(lora_linear, (x, weight, bias, down, up, 1.5))
    assert torch.autograd.gradcheck(
        lambda *t: lora_linear(t[0], weight, bias, *t[1:], 1.5)[0], (x, down, up)
    )


def test_switched_off_merged_and_dropped_adapters_are_pefts_business():
    peft_model, fused = lora_pair(torch.float32, dropout=0.5)
    x = torch.randn(3, 12)
    for model in (peft_model, fused):
        model.train()
    torch.manual_seed(5)
    expected = peft_model(x)
    torch.manual_seed(5)
    assert torch.equal(fused(x), expected), "dropout acts"
    for model in (peft_model, fused):
        model.eval()[0].enable_adapters(False)
    assert torch.equal(fused(x), peft_model(x)) and torch.equal(fused(x), fused[0].base_layer(x))
    for model in (peft_model, fused):
        model[0].enable_adapters(True)
    plain = fused(x)
    fused[0].merge()
    torch.testing.assert_close(fused(x), plain, rtol=1e-5, atol=1e-5)
