"""Adapters of OpenVLA's own recipe in training, and adapters of ours for other versions of peft."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from prismatic.extern.hf.modeling_prismatic import load_model
from tests.adapters import CONVOLUTIONS, OFFICIAL_CONFIG, save_official_adapter
from tests.distributed import in_ranks
from utils import fsdp_utils, merge_utils, peft_utils
from utils.weights.export import WeightExporter

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


# ------------------------------------------------------------------------- files for other versions


def saved(wrapper: PeftModel, folder: Path) -> dict:
    """What `save_adapter` writes into adapter_config.json."""
    model = wrapper.get_base_model()
    peft_utils.save_adapter(wrapper, dict(model.named_parameters()), folder)
    return json.loads((folder / "adapter_config.json").read_text())


def same_config(folder: Path, expected: LoraConfig) -> None:
    """The installed peft reads the options of `expected`, but for what depends on who reads."""
    fields = [dataclasses.asdict(c) for c in (LoraConfig.from_pretrained(str(folder)), expected)]
    for values in fields:
        values["target_modules"] = set(values["target_modules"])
        for name in ("auto_mapping", "inference_mode", "peft_version"):
            values.pop(name)
    assert fields[0] == fields[1]


def test_saved_options_are_among_those_of_peft_0_11_and_read_back_the_same(
    tiny_model_dir, official, tmp_path
):
    models = [load_model(tiny_model_dir) for _ in range(2)]
    wrappers = {
        "fresh": peft_utils.add_lora(models[0], rank=4, dropout=0.1, base_name="base"),
        "official": peft_utils.load_lora(models[1], official[0]),
    }
    for name, wrapper in wrappers.items():
        options = saved(wrapper, tmp_path / name)
        assert options.keys() <= FIELDS_OF_PEFT_0_11
        assert options.get("auto_mapping") is None
        assert options["target_modules"] == sorted(options["target_modules"])
        same_config(tmp_path / name, wrapper.peft_config["default"])
        peft_utils.load_lora(load_model(tiny_model_dir), tmp_path / name)


def test_options_that_are_set_are_saved(tiny_model_dir, tmp_path):
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=True,
        rank_pattern={"q_proj": 2},
        alpha_pattern={"v_proj": 32},
        target_modules=["q_proj", "v_proj"],
        layers_to_transform=[1],
        bias="lora_only",
    )
    wrapper = get_peft_model(load_model(tiny_model_dir), config)
    options = saved(wrapper, tmp_path / "adapter")
    assert options.keys() <= FIELDS_OF_PEFT_0_11
    same_config(tmp_path / "adapter", wrapper.peft_config["default"])


def test_options_of_later_versions_are_written_in_terms_of_peft_0_11(tiny_model_dir, tmp_path):
    config = LoraConfig(
        r=4,
        target_modules=["fc1"],
        exclude_modules=["projector.fc1"],
        init_lora_weights="orthogonal",
    )
    get_peft_model(load_model(tiny_model_dir), config).save_pretrained(str(tmp_path / "theirs"))
    model = load_model(tiny_model_dir)
    options = saved(peft_utils.load_lora(model, tmp_path / "theirs"), tmp_path / "ours")
    assert options.keys() <= FIELDS_OF_PEFT_0_11 and options["init_lora_weights"] is True
    layers = merge_utils.load_adapter(tmp_path / "theirs").scaling.keys()
    assert options["target_modules"] == sorted(layers) and "projector.fc1" not in layers
    peft_utils.load_lora(load_model(tiny_model_dir), tmp_path / "ours")


def test_adapters_that_we_saved_earlier_still_load(tiny_model_dir, tmp_path):
    """They have every option of the peft that wrote them, and the class that FSDP made."""
    torch.manual_seed(0)
    wrapper = peft_utils.add_lora(load_model(tiny_model_dir), rank=4, base_name="base")
    for parameter in wrapper.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.05)
    saved(wrapper, tmp_path / "adapter")
    mapping = {
        "base_model_class": "FSDPOpenVLAForActionPrediction",
        "parent_library": "torch.distributed.fsdp._fully_shard._fsdp_init",
    }
    config = wrapper.peft_config["default"]
    config.save_pretrained(str(tmp_path / "adapter"), auto_mapping_dict=mapping)
    options = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert options["auto_mapping"] == mapping and not options.keys() <= FIELDS_OF_PEFT_0_11
    assert peft_utils.check_adapter_fits(tmp_path / "adapter", tiny_model_dir) == []
    model = load_model(tiny_model_dir)
    peft_utils.load_lora(model, tmp_path / "adapter")
    trained = dict(wrapper.get_base_model().named_parameters())
    assert all(torch.equal(p, trained[name]) for name, p in model.named_parameters())
