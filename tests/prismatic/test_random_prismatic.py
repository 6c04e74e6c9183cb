"""Random model folders of a size: openvla-7b's shape (here with fewer layers) loads, and its weights are usable."""

import json
from pathlib import Path

import pytest
import torch

from prismatic.extern.hf import random_prismatic
from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig
from prismatic.extern.hf.modeling_prismatic import load_model
from prismatic.extern.hf.processing_prismatic import load_processor
from prismatic.extern.hf.random_prismatic import (
    build_llama_sized_tokenizer,
    openvla_7b_config,
    save_openvla_7b,
    save_random_vla,
)
from prismatic.model_files import weight_files
from tests.programs import load_program
from utils.checkpoint_utils import check_model_dir, read_shapes

INSTRUCTION = "pick up the red block and place it on the blue plate"


def narrow_7b() -> OpenVLAConfig:
    """openvla-7b's configuration with narrow, shallow networks on its images and vocabulary."""
    fields = openvla_7b_config().to_dict()
    vit = {"embed_dim": 32, "depth": 3, "num_heads": 2, "mlp_ratio": 4.0}
    small = {
        "hidden_size": 256,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    fields["text_config"] = {
        **fields["text_config"],
        **small,
        "num_key_value_heads": 2,
        "head_dim": 128,
    }
    return OpenVLAConfig.from_dict({**fields, "timm_model_kwargs": [vit, vit]})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A narrow folder in several files."""
    output_dir = tmp_path_factory.mktemp("random") / "model"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(random_prismatic, "SHARD_BYTES", 20_000_000)
        patch.setattr(random_prismatic, "openvla_7b_config", narrow_7b)
        save_random_vla("7b", output_dir, seed=3)
    return output_dir


def test_the_configuration_is_openvla_7bs() -> None:
    config = openvla_7b_config()
    assert config.first_action_token_id == 31744 and config.pad_token_id == 32000
    assert "empty_piece_token_id" not in config.to_diff_dict()  # the class's 29871
    assert (config.image_sizes, config.text_config.vocab_size) == ([224, 224], 32064)
    assert (config.text_config.hidden_size, config.text_config.num_hidden_layers) == (4096, 32)


def test_the_tokenizer_has_llamas_ids_and_spells_the_prompt_as_words() -> None:
    tokenizer = build_llama_sized_tokenizer()
    ids = {
        text: tokenizer.convert_tokens_to_ids(text)
        for text in ("<s>", "▁", "<action_0>", "<action_255>", "<PAD>")
    }
    assert ids == {"<s>": 1, "▁": 29871, "<action_0>": 31744, "<action_255>": 31999, "<PAD>": 32000}
    prompt = f"In: What action should the robot take to {INSTRUCTION}?\nOut:"
    spelled = tokenizer(prompt, add_special_tokens=False).input_ids
    assert tokenizer.decode(spelled) == prompt
    # In : What ... plate ? \n Out : - as in OpenVLA's published ids 512 29901 1724 ... 29973 13 3744 29901.
    assert len(spelled) == 25


def test_the_folder_is_complete_and_in_shards(folder: Path) -> None:
    assert check_model_dir(folder) == [] and len(weight_files(folder)) > 1
    model, processor = load_model(folder, dtype=torch.bfloat16), load_processor(folder)
    state = model.state_dict()
    assert read_shapes(folder) == {name: tuple(tensor.shape) for name, tensor in state.items()}
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(2 * tensor.numel() for tensor in state.values())
    assert list(model.norm_stats) == ["tabletop"]
    assert processor.empty_piece_token_id == model.config.empty_piece_token_id == 29871
    assert processor.prompt_ids(INSTRUCTION)[-1] == 29871


def test_the_weights_give_a_spread_policy_that_sees_the_image(folder: Path) -> None:
    model, processor = load_model(folder), load_processor(folder)
    ids, mask = processor.collate_prompts([processor.prompt_ids(INSTRUCTION)] * 2)
    images = torch.randint(
        0, 256, (2, 224, 224, 3), generator=torch.Generator().manual_seed(0)
    ).byte()
    images[1, 60:180, 40:200] = 255
    actions = torch.randint(
        31744, 32000, (1, 7), generator=torch.Generator().manual_seed(0)
    ).repeat(2, 1)
    with torch.no_grad():
        pixels = processor.image_processor.normalize(images)
        features = model.encode_vision(pixels)
        logits = model.forward_actions(ids, mask, actions, pixel_values=pixels).logits_BAV
    assert 0.3 < features.std() < 10
    # 16 = sqrt(256): the narrow model's normalised hidden state; 64 at the 7B's width.
    assert logits.std().item() == pytest.approx(16 * random_prismatic.HEAD_STD, rel=0.3)
    logprobs = logits.log_softmax(-1)
    assert (
        logprobs[0] - logprobs[1]
    ).abs().mean() > 0.005  # two narrow layers; bfloat16 changes it by a tenth of that


def test_seeds_and_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_prismatic, "SHARD_BYTES", 10_000_000)
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        save_openvla_7b(tmp_path / name, seed, narrow_7b())
    files = [weight_files(tmp_path / name)[1].read_bytes() for name in ("first", "again", "other")]
    assert files[0] == files[1] != files[2]
    with pytest.raises(ValueError, match="size is 'large': use one of tiny, small, 7b"):
        save_random_vla("large", tmp_path / "large")


def test_small_is_the_libero_policy_and_refuses_other_sizes(tmp_path: Path) -> None:
    make_tiny_vla = load_program("make_tiny_vla")
    small = {"output_dir": str(tmp_path / "small"), "size": "small"}
    with pytest.raises(ValueError, match="remove --llm_dim"):
        make_tiny_vla.main(make_tiny_vla.Args(**small, llm_dim=64))
    make_tiny_vla.main(make_tiny_vla.Args(**small))
    model = load_model(tmp_path / "small")
    assert 24e6 < sum(parameter.numel() for parameter in model.parameters()) < 27e6
    assert model.config.image_sizes == [140, 140] and list(model.norm_stats) == ["tabletop"]
