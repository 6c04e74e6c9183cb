"""Sharding and gathering over gloo: one rank in this process's children, or two."""

import pytest
import torch
import torch.distributed as dist

from tests.distributed import in_ranks
from utils import fsdp_utils, peft_utils


def lora_model(model_dir: str):
    """A tiny policy with a LoRA whose B is not zero, the same on every rank."""
    from prismatic.extern.hf.modeling_prismatic import load_model

    torch.manual_seed(1)
    model = load_model(model_dir)
    wrapper = peft_utils.add_lora(model, rank=4, alpha=8)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model, wrapper


def merged_equals_peft(rank: int, model_dir: str) -> None:
    model, _ = lora_model(model_dir)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    sharded = fsdp_utils.shard_model(model, min_unit_params=1)
    merged = {n: t.clone() for n, t in fsdp_utils.iterate_merged_parameters(sharded)}
    after = {n: fsdp_utils.full_tensor(p.detach()) for n, p in sharded.named_parameters()}
    assert all(torch.equal(after[n], before[n]) for n in before), "merging changed the model"
    twin, wrapper = lora_model(model_dir)
    expected = {n: p.detach() for n, p in wrapper.merge_and_unload().named_parameters()}
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, rtol=0, atol=1e-6)
    unmerged = before["language_model.model.layers.0.mlp.up_proj.base_layer.weight"]
    assert not torch.allclose(
        merged["language_model.model.layers.0.mlp.up_proj.weight"], unmerged, atol=1e-3
    )


@pytest.mark.parametrize("world_size", [1, 2])
def test_merged_parameters_equal_pefts_merge_and_leave_the_model_alone(tiny_model_dir, world_size):
    in_ranks(world_size, merged_equals_peft, str(tiny_model_dir))


def gradients_equal_unsharded(rank: int, model_dir: str) -> None:
    """Two ranks on half the batch each: averaged gradients are the whole batch's, and the clip norm is global."""
    from prismatic.extern.hf.modeling_prismatic import load_model

    torch.manual_seed(0)
    ids = torch.randint(4, 20, (4, 6))
    pixels = torch.randn(4, 6, 28, 28)
    actions = torch.randint(0, 256, (4, 7))

    def loss_of(model, rows: slice):
        first = model.config.first_action_token_id
        mask = torch.ones_like(ids[rows])
        out = model.forward_actions(
            ids[rows], mask, actions[rows] + first, pixel_values=pixels[rows]
        )
        return out.logits_BAV.log_softmax(-1).gather(-1, actions[rows][..., None]).mean()

    plain = load_model(model_dir)
    loss_of(plain, slice(0, 4)).backward()
    expected_norm = torch.nn.utils.get_total_norm(
        [p.grad for p in plain.parameters() if p.grad is not None]
    )
    sharded = fsdp_utils.shard_model(load_model(model_dir), min_unit_params=1)
    size = 4 // dist.get_world_size()
    loss_of(sharded, slice(rank * size, (rank + 1) * size)).backward()
    norm = fsdp_utils.clip_gradients(sharded.parameters(), 0.0)
    assert norm == pytest.approx(float(expected_norm), rel=1e-5)
    for (name, p), q in zip(plain.named_parameters(), sharded.parameters(), strict=True):
        if p.grad is not None:
            torch.testing.assert_close(
                fsdp_utils.full_tensor(q.grad), p.grad, rtol=1e-4, atol=1e-7, msg=name
            )
    fsdp_utils.clip_gradients(sharded.parameters(), norm / 2)
    assert fsdp_utils.clip_gradients(sharded.parameters(), 0.0) == pytest.approx(norm / 2, rel=1e-3)


@pytest.mark.parametrize("world_size", [1, 2])
def test_sharded_gradients_and_norm_equal_the_unsharded_models(tiny_model_dir, world_size):
    in_ranks(world_size, gradients_equal_unsharded, str(tiny_model_dir))


def sums(rank: int) -> None:
    assert fsdp_utils.all_reduce_sums({"b": rank + 1.0, "a": 2.0}, torch.device("cpu")) == {
        "a": 4.0,
        "b": 3.0,
    }


def test_sums_run_over_all_ranks_by_name():
    in_ranks(2, sums)


def layer_passes(memory_budget: float | None, *, lora: bool) -> tuple[int, dict[str, torch.Tensor]]:
    """Bytes that a small Llama layer keeps for its backward pass (weights apart), and its gradients."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    torch._dynamo.reset()
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=160, num_attention_heads=2, attn_implementation="sdpa"
    )
    model = torch.nn.ModuleList([LlamaDecoderLayer(config, 0)])
    if lora:
        peft_utils.add_lora(model, rank=4)
    if memory_budget is not None:
        fsdp_utils.compile_blocks(model, "aot_eager", memory_budget=memory_budget)
    x = torch.randn(2, 24, 64, requires_grad=True)
    positions = LlamaRotaryEmbedding(config)(x, torch.arange(24)[None])
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = model[0](x, position_embeddings=positions)
    out.pow(2).sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return sum(kept.values()), {"x": x.grad, **grads}


@pytest.mark.parametrize("lora", [False, True])
def test_a_memory_budget_keeps_less_and_gives_the_same_gradients(lora):
    _, expected = layer_passes(None, lora=lora)
    sizes = []
    for budget in (1.0, 0.5, 0.1):
        size, grads = layer_passes(budget, lora=lora)
        sizes.append(size)
        assert grads.keys() == expected.keys()
        for name, grad in grads.items():
            torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-4, msg=name)
    assert sizes[1] < 0.75 * sizes[0] and sizes[2] < 0.4 * sizes[0], sizes
