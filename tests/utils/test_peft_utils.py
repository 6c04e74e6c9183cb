"""Adapters of OpenVLA's own recipe in training."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from prismatic.extern.hf.modeling_prismatic import load_model
from tests.adapters import CONVOLUTIONS, OFFICIAL_CONFIG, save_official_adapter
from tests.distributed import in_ranks
from utils import fsdp_utils, merge_utils, peft_utils
from utils.weight_export import WeightExporter

# The fields of LoraConfig in peft 0.11.1, the version that OpenVLA pins. It refuses any other.
FIELDS_OF_PEFT_0_11 = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "fan_in_fan_out",
    "inference_mode", "init_lora_weights", "layer_replication", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "megatron_config",
    "megatron_core", "modules_to_save", "peft_type", "r", "rank_pattern", "revision",
    "target_modules", "task_type", "use_dora", "use_rslora",
}  # fmt: skip
LM_HEAD = "language_model.lm_head"


@pytest.fixture(scope="module")
def official(tiny_model_dir, tmp_path_factory):
    """Folder of an adapter of the official recipe, and the weights of peft's merge."""
    folder = tmp_path_factory.mktemp("official")
    return folder, save_official_adapter(tiny_model_dir, folder)


def batch(rows: slice = slice(4)) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 20, (4, 6), generator=generator)
    pixels = torch.randn(4, 6, 28, 28, generator=generator)
    actions = torch.randint(0, 256, (4, 7), generator=generator)
    mask = torch.ones_like(ids)
    return {"ids": ids[rows], "mask": mask[rows], "actions": actions[rows], "pixels": pixels[rows]}


def action_logits(model, rows: slice = slice(4), dtype=torch.float32) -> torch.Tensor:
    inputs = batch(rows)
    action_ids = inputs["actions"] + model.config.first_action_token_id
    pixels = inputs["pixels"].to(dtype)
    return model.forward_actions(inputs["ids"], inputs["mask"], action_ids, pixel_values=pixels)[0]


def loss_of(model, rows: slice = slice(4), dtype=torch.float32) -> torch.Tensor:
    logits = action_logits(model, rows, dtype)
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch(rows)["actions"].flatten().clamp(max=logits.shape[-1] - 1)
    )


def test_the_official_file_names_every_linear_layer_and_two_convolutions(official):
    adapter = merge_utils.load_adapter(official[0])
    assert {*CONVOLUTIONS, LM_HEAD} <= adapter.scaling.keys()
    assert list(adapter.frozen) == [f"{LM_HEAD}.weight"]
    assert set(json.loads(OFFICIAL_CONFIG.read_text())) == FIELDS_OF_PEFT_0_11


def test_an_official_adapter_loads_and_acts_as_in_peft(tiny_model_dir, official):
    assert peft_utils.check_adapter_fits(official[0], tiny_model_dir) == []
    model = load_model(tiny_model_dir)
    peft_utils.load_lora(model, official[0])
    expected = PeftModel.from_pretrained(load_model(tiny_model_dir), str(official[0]))
    with torch.inference_mode():
        found, wanted = (action_logits(m.eval()) for m in (model, expected.get_base_model()))
        without = action_logits(load_model(tiny_model_dir))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert (found - without).abs().max() > 0.1


def test_a_convolution_of_another_kernel_is_refused(tiny_model_dir, official):
    model = load_model(tiny_model_dir)
    embed = model.vision_backbone.featurizer.patch_embed
    embed.proj = torch.nn.Conv2d(3, embed.proj.out_channels, 7, stride=14)
    with pytest.raises(ValueError, match=r"patch_embed.proj.*does not fit the model"):
        peft_utils.load_lora(model, official[0])


def official_adapter_trains(rank: int, model_dir: str, adapter_dir: str, out: str) -> None:
    """A step on half of the batch a rank, against peft's own layers on the whole batch in one process."""
    reference = PeftModel.from_pretrained(load_model(model_dir), adapter_dir, is_trainable=True)
    plain = reference.get_base_model()
    loss_of(plain).backward()

    model = load_model(model_dir)
    wrapper = peft_utils.load_lora(model, adapter_dir)
    fsdp_utils.shard_model(fsdp_utils.cast_frozen(model.eval(), torch.float32), min_unit_params=1)
    share = 4 // torch.distributed.get_world_size()
    loss_of(model, slice(rank * share, (rank + 1) * share)).backward()
    trained = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            found = fsdp_utils.full_tensor(trained[name].grad)
            torch.testing.assert_close(found, parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
    for name in CONVOLUTIONS:
        for factor in "AB":
            parameter = plain.get_parameter(f"{name}.lora_{factor}.default.weight")
            assert parameter.grad.abs().max() > 1e-4

    for network in (plain, model):
        torch.optim.SGD(peft_utils.trainable_parameters(network), lr=1.0).step()
    exporter = WeightExporter(model, torch.float32)
    exported = {name: t.clone() for bucket in exporter.buckets() for name, t in bucket}
    gathered = {name: t.clone() for name, t in fsdp_utils.iterate_merged_parameters(model)}
    state = fsdp_utils.full_state_dict(model, trainable_only=True)
    if rank == 0:
        peft_utils.save_adapter(wrapper, state, out)
    expected = dict(reference.merge_and_unload().named_parameters())
    assert exported.keys() == gathered.keys() == expected.keys()
    for name, tensor in expected.items():
        for found in (exported, gathered):
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_official_adapter_trains_syncs_and_is_saved(
    tiny_model_dir, official, tmp_path, world_size
):
    arguments = (str(tiny_model_dir), str(official[0]), str(tmp_path / "saved"))
    in_ranks(world_size, official_adapter_trains, *arguments)
    before, after = (
        load_file(f / "adapter_model.safetensors") for f in (official[0], tmp_path / "saved")
    )
    assert before.keys() - after.keys() == {f"base_model.model.{LM_HEAD}.base_layer.weight"}
    for name in CONVOLUTIONS:
        key = f"base_model.model.{name}.lora_B.weight"
        assert not torch.equal(before[key], after[key])
    assert merge_utils.load_adapter(tmp_path / "saved").scaling.keys() >= set(CONVOLUTIONS)


def frozen_vision_keeps_its_factors(rank: int, model_dir: str, adapter_dir: str, out: str) -> None:
    model = load_model(model_dir, dtype=torch.bfloat16)
    wrapper = peft_utils.load_lora(model, adapter_dir, freeze_vision_backbone=True)
    model.vision_backbone.requires_grad_(False)
    fsdp_utils.cast_frozen(model.eval(), torch.bfloat16)
    fsdp_utils.shard_model(model, param_dtype=torch.bfloat16, min_unit_params=1)
    loss_of(model, dtype=torch.bfloat16).backward()
    torch.optim.SGD(peft_utils.trainable_parameters(model), lr=1.0).step()
    assert all(p.grad is None for p in model.vision_backbone.parameters())
    exporter = WeightExporter(model, torch.float32)
    exported = {name: t.clone() for bucket in exporter.buckets() for name, t in bucket}
    state = fsdp_utils.full_state_dict(model, trainable_only=True)
    assert not any(name.startswith("vision_backbone") for name in state)
    if rank:
        return
    peft_utils.save_adapter(wrapper, state, out)
    adapter = merge_utils.load_adapter(out)
    weights = load_file(Path(model_dir) / "model.safetensors")
    for name in (*CONVOLUTIONS, f"{LM_HEAD}"):
        merged = adapter.apply(f"{name}.weight", weights[f"{name}.weight"].bfloat16())
        torch.testing.assert_close(exported[f"{name}.weight"], merged, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_official_adapter_with_frozen_vision_is_saved_whole(
    tiny_model_dir, official, tmp_path, world_size
):
    """The factors in the ViTs act, do not train, and are saved bit for bit though bfloat16 computes."""
    arguments = (str(tiny_model_dir), str(official[0]), str(tmp_path / "saved"))
    in_ranks(world_size, frozen_vision_keeps_its_factors, *arguments)
    before, after = (
        load_file(f / "adapter_model.safetensors") for f in (official[0], tmp_path / "saved")
    )
    frozen = {name for name in before if ".vision_backbone." in name}
    assert frozen <= after.keys() and all(torch.equal(before[n], after[n]) for n in frozen)
    head = f"base_model.model.{LM_HEAD}.lora_B.weight"
    assert not torch.equal(before[head], after[head])
