"""A model folder of ours has openvla-7b's names, fields and files, and such a folder loads and saves unchanged."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedTokenizerFast,
)

from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig
from prismatic.extern.hf.modeling_prismatic import (
    OpenVLAForActionPrediction,
    load_model,
    register_openvla,
)
from prismatic.extern.hf.processing_prismatic import PrismaticProcessor, load_processor
from prismatic.extern.hf.tiny_prismatic import TinyVLAConfig, build_tiny_vla, sincos_position_2d
from tests.programs import load_program

BFLOAT16_IMAGENET = {
    "mean": [0.484375, 0.455078125, 0.40625],
    "std": [0.228515625, 0.2236328125, 0.224609375],
}
HALVES = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
OPENVLA_7B_CONFIG = {
    "architectures": ["OpenVLAForActionPrediction"],
    "auto_map": {"AutoConfig": "configuration_prismatic.OpenVLAConfig"},
    "arch_specifier": "no-align+fused-gelu-mlp",
    "hf_llm_id": "meta-llama/Llama-2-7b-hf",
    "image_resize_strategy": "resize-naive",
    "image_sizes": [224, 224],
    "llm_backbone_id": "llama2-7b-pure",
    "llm_max_length": 2048,
    "model_type": "openvla",
    "n_action_bins": 256,
    "norm_stats": {
        "bridge_orig": {
            "action": {
                "q01": [-0.02872725307941437],
                "q99": [0.028309678435325586],
                "mask": [True],
            },
            "num_transitions": 2135463,
        }
    },
    "output_projector_states": False,
    "pad_to_multiple_of": 64,
    "pad_token_id": 32000,
    "text_config": {
        "model_type": "llama",
        "pad_token_id": 32000,
        "torch_dtype": "bfloat16",
        "vocab_size": 32064,
    },
    "timm_model_ids": ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"],
    "timm_override_act_layers": [None, None],
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "use_fused_vision_backbone": True,
    "vision_backbone_id": "dinosiglip-vit-so-224px",
}
OPENVLA_7B_PREPROCESSOR = {
    "auto_map": {"AutoImageProcessor": "processing_prismatic.PrismaticImageProcessor"},
    "image_processor_type": "PrismaticImageProcessor",
    "image_resize_strategy": "resize-naive",
    "input_sizes": [[3, 224, 224], [3, 224, 224]],
    "interpolations": ["bicubic", "bicubic"],
    "means": [[0.485, 0.456, 0.406], [0.5, 0.5, 0.5]],
    "processor_class": "PrismaticProcessor",
    "stds": [[0.229, 0.224, 0.225], [0.5, 0.5, 0.5]],
    "tvf_crop_params": [{"output_size": [224, 224]}] * 2,
    "tvf_do_letterbox": False,
    "tvf_letterbox_fill": None,
    "tvf_normalize_params": [{"inplace": False, **BFLOAT16_IMAGENET}, {"inplace": False, **HALVES}],
    "tvf_resize_params": [
        {"antialias": True, "interpolation": 3, "max_size": None, "size": [224, 224]}
    ]
    * 2,
    "use_fused_vision_backbone": True,
}


def pairs(*names: str) -> list[str]:
    return [f"{name}.{part}" for name in names for part in ("weight", "bias")]


def openvla_names(dinov2_depth: int, siglip_depth: int, llm_depth: int) -> set[str]:
    """Write out openvla-7b's parameter names at these depths, from OPENVLA.md's facts."""
    block = pairs("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    dinov2 = ["cls_token", "reg_token", "pos_embed", *pairs("patch_embed.proj", "norm")]
    dinov2 += [
        f"blocks.{i}.{n}"
        for i in range(dinov2_depth)
        for n in [*block, "ls1.scale_factor", "ls2.scale_factor"]
    ]
    siglip = ["pos_embed", *pairs("patch_embed.proj", "norm"), "attn_pool.latent"]
    siglip += pairs(
        *(f"attn_pool.{name}" for name in ("q", "kv", "proj", "norm", "mlp.fc1", "mlp.fc2"))
    )
    siglip += [f"blocks.{i}.{n}" for i in range(siglip_depth) for n in block]
    layer = [f"self_attn.{name}_proj" for name in "qkvo"] + [
        f"mlp.{name}_proj" for name in ("gate", "up", "down")
    ]
    layer += ["input_layernorm", "post_attention_layernorm"]
    llama = ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"]
    llama += [f"model.layers.{i}.{n}.weight" for i in range(llm_depth) for n in layer]
    return {
        *(f"vision_backbone.featurizer.{name}" for name in dinov2),
        *(f"vision_backbone.fused_featurizer.{name}" for name in siglip),
        *(f"projector.{name}" for name in pairs("fc1", "fc2", "fc3")),
        *(f"language_model.{name}" for name in llama),
    }


def names_in(model_dir: Path) -> set[str]:
    with safe_open(model_dir / "model.safetensors", "pt") as weights:
        return set(weights.keys())


@pytest.fixture
def openvla_7b_dir(tmp_path: Path, tiny_model_dir: Path) -> Path:
    """A folder with openvla-7b's configuration files, the 7B replaced by a tiny one, in its names and dtype."""
    folder = tmp_path / "openvla"
    folder.mkdir()
    tiny = json.loads((tiny_model_dir / "config.json").read_text())
    small = {
        name: tiny["text_config"][name]
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers")
    }
    text_config = {**OPENVLA_7B_CONFIG["text_config"], **small, "num_attention_heads": 2}
    fields = {
        **OPENVLA_7B_CONFIG,
        "text_config": text_config,
        "timm_model_kwargs": tiny["timm_model_kwargs"],
    }
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "preprocessor_config.json").write_text(json.dumps(OPENVLA_7B_PREPROCESSOR))
    model = OpenVLAForActionPrediction(OpenVLAConfig.from_pretrained(folder)).bfloat16()
    save_file(
        {name: value.contiguous() for name, value in model.state_dict().items()},
        folder / "model.safetensors",
    )
    return folder


def test_a_tiny_folder_has_exactly_openvla_7bs_parameter_names(tiny_model_dir: Path) -> None:
    assert names_in(tiny_model_dir) == openvla_names(3, 3, 2)


def test_the_7b_configuration_has_its_published_names_and_size() -> None:
    """982 tensors and 15,082,474,368 bytes in bfloat16: `total_size` of openvla-7b's index file."""
    with torch.device("meta"):
        model = OpenVLAForActionPrediction(OpenVLAConfig.from_dict(dict(OPENVLA_7B_CONFIG)))
    weights = model.state_dict()
    assert set(weights) == openvla_names(24, 27, 32) and len(weights) == 982
    assert sum(2 * tensor.numel() for tensor in weights.values()) == 15_082_474_368
    shapes = {name: tuple(weights[name].shape) for name in weights}
    assert [shapes[f"projector.fc{i}.weight"] for i in (1, 2, 3)] == [
        (8704, 2176),
        (4096, 8704),
        (4096, 4096),
    ]
    assert shapes["vision_backbone.featurizer.pos_embed"] == (1, 256, 1024)
    assert shapes["vision_backbone.featurizer.reg_token"] == (1, 4, 1024)
    assert shapes["vision_backbone.fused_featurizer.blocks.26.mlp.fc1.weight"] == (4304, 1152)
    assert shapes["language_model.lm_head.weight"] == (32064, 4096)
    assert model.vision_backbone.num_patches == 256
    assert (
        model.config.first_action_token_id == 31744
        and "timm_model_kwargs" not in model.config.to_dict()
    )
    # SigLIP as OpenVLA ran it: the exact GELU, where later SigLIPs of timm have the tanh form.
    assert all(
        isinstance(block.mlp.act, torch.nn.GELU)
        for block in model.vision_backbone.fused_featurizer.blocks
    )
    assert model.vision_backbone.fused_featurizer.blocks[0].mlp.act.approximate == "none"


def test_an_openvla_folder_loads_and_saves_unchanged(openvla_7b_dir: Path, tmp_path: Path) -> None:
    model = load_model(openvla_7b_dir, dtype=torch.bfloat16)
    saved = tmp_path / "saved"
    model.save_pretrained(saved)
    before, after = (load_file(folder / "model.safetensors") for folder in (openvla_7b_dir, saved))
    assert before.keys() == after.keys()
    assert all(
        torch.equal(before[name], after[name]) and after[name].dtype == torch.bfloat16
        for name in before
    )
    config = json.loads((saved / "config.json").read_text())
    original = json.loads((openvla_7b_dir / "config.json").read_text())
    renamed = {"torch_dtype": "dtype"}  # transformers 5's name; it reads both
    for name, value in original.items():
        if name == "text_config":
            kept = {renamed.get(field, field): item for field, item in value.items()}
            assert kept.items() <= config["text_config"].items()
        elif name != "transformers_version":
            assert config[renamed.get(name, name)] == value, name
    assert config.keys() - {"dtype", "tie_word_embeddings"} <= original.keys()


@pytest.mark.parametrize(
    ("given", "theta", "scaling"),
    [
        ({}, 10000.0, None),
        ({"rope_theta": 500000.0}, 500000.0, None),
        ({"rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}}, 500000.0, None),
        ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 500000.0}, 500000.0, None),
        (
            {"rope_theta": 20000.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
            20000.0,
            {"type": "linear", "factor": 2.0},
        ),
    ],
)
def test_transformers_4_finds_the_rotary_embedding_under_its_own_names(
    given: dict, theta: float, scaling: dict | None, tmp_path: Path
) -> None:
    """4.40.1 reads rope_theta and rope_scaling (exactly type and factor), and takes 10000 where they are missing."""
    text_config = OPENVLA_7B_CONFIG["text_config"] | given
    config = OpenVLAConfig.from_dict(OPENVLA_7B_CONFIG | {"text_config": text_config})
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["text_config"]
    assert saved["rope_theta"] == saved["rope_parameters"]["rope_theta"] == theta
    assert saved.get("rope_scaling") == scaling
    read = OpenVLAConfig.from_pretrained(tmp_path).text_config.rope_parameters
    assert read == config.text_config.rope_parameters
    assert read["rope_type"] == ("linear" if scaling else "default")
    assert read.get("factor") == (2.0 if scaling else None)


@pytest.mark.parametrize(
    "older", [{"rope_theta": 10000.0}, {"rope_scaling": {"type": "linear", "factor": 2.0}}]
)
def test_a_rotary_embedding_that_contradicts_itself_is_refused(older: dict) -> None:
    rope_parameters = {"rope_theta": 500000.0, "rope_type": "default"}
    text_config = {"vocab_size": 32064, "rope_parameters": rope_parameters, **older}
    with pytest.raises(ValueError, match=f"{next(iter(older))} is .* contradicts rope_parameters"):
        OpenVLAConfig(text_config=text_config)


def test_openvla_7bs_preprocessor_config_is_saved_as_it_was(
    openvla_7b_dir: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    from prismatic.extern.hf.processing_prismatic import PrismaticImageProcessor

    image_processor = PrismaticImageProcessor.from_pretrained(openvla_7b_dir)
    PrismaticProcessor(image_processor, load_processor(tiny_model_dir).tokenizer).save_pretrained(
        tmp_path / "saved"
    )
    assert (
        json.loads((tmp_path / "saved" / "preprocessor_config.json").read_text())
        == OPENVLA_7B_PREPROCESSOR
    )
    assert not (tmp_path / "saved" / "processor_config.json").exists()


def test_derived_fields_equal_openvla_7bs() -> None:
    from prismatic.extern.hf.processing_prismatic import PrismaticImageProcessor

    given = (
        "image_resize_strategy",
        "input_sizes",
        "interpolations",
        "means",
        "stds",
        "use_fused_vision_backbone",
    )
    derived = PrismaticImageProcessor(
        **{name: OPENVLA_7B_PREPROCESSOR[name] for name in given}
    ).to_dict()
    exact = [
        {"inplace": False, **HALVES, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    ]
    assert derived.pop("tvf_normalize_params") == [*exact, {"inplace": False, **HALVES}]
    expected = {
        name: value
        for name, value in OPENVLA_7B_PREPROCESSOR.items()
        if name not in ("auto_map", "tvf_normalize_params")
    }
    assert derived == expected


def test_the_auto_classes_load_a_folder_without_remote_code(tiny_model_dir: Path) -> None:
    register_openvla()
    register_openvla()  # a second time is harmless
    assert type(AutoConfig.from_pretrained(tiny_model_dir)) is OpenVLAConfig
    assert (
        type(AutoModelForImageTextToText.from_pretrained(tiny_model_dir))
        is OpenVLAForActionPrediction
    )
    assert type(AutoProcessor.from_pretrained(tiny_model_dir)) is PrismaticProcessor


def test_loading_gives_the_saved_weights_and_the_folders_statistics(tiny_model_dir: Path) -> None:
    model = load_model(tiny_model_dir)
    for name, tensor in load_file(tiny_model_dir / "model.safetensors").items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert not model.training and list(model.norm_stats) == ["tabletop"]
    rotary = model.language_model.model.rotary_emb.inv_freq
    torch.testing.assert_close(
        rotary, 10000.0 ** (-torch.arange(0, 32, 2) / 32)
    )  # not in the file: must be rebuilt


@pytest.mark.parametrize("fault", ["missing", "unknown"])
def test_a_folder_with_other_parameters_is_refused(openvla_7b_dir: Path, fault: str) -> None:
    weights = load_file(openvla_7b_dir / "model.safetensors")
    scale = weights.pop("vision_backbone.featurizer.blocks.1.ls2.scale_factor")
    if fault == "unknown":
        weights["vision_backbone.featurizer.blocks.1.ls2.scale_factor"] = scale
        weights["projector.fc4.weight"] = torch.zeros(1)
    save_file(weights, openvla_7b_dir / "model.safetensors")
    with pytest.raises(
        ValueError,
        match="blocks.1.ls2.scale_factor" if fault == "missing" else "projector.fc4.weight",
    ):
        load_model(openvla_7b_dir)


def test_the_seed_decides_the_weights_and_leaves_the_callers_generator_alone() -> None:
    sizes = {
        "image_size": 14,
        "vision_dim": 16,
        "vision_heads": 2,
        "vision_depth": 2,
        "llm_dim": 32,
        "llm_depth": 1,
    }
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, again, other = (
        build_tiny_vla(TinyVLAConfig(seed=seed, **sizes))[0].state_dict() for seed in (0, 0, 1)
    )
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(
        first["language_model.lm_head.weight"], other["language_model.lm_head.weight"]
    )


def test_a_fresh_model_keeps_timms_and_torchs_initialisation_and_sees_positions() -> None:
    model, _ = build_tiny_vla(
        TinyVLAConfig(image_size=28, vision_dim=16, vision_heads=2, vision_depth=2, llm_depth=1)
    )
    for featurizer in model.vision_backbone.featurizers:
        assert torch.equal(featurizer.pos_embed, sincos_position_2d(2, 16))
        assert featurizer.blocks[0].attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert torch.equal(model.vision_backbone.featurizer.blocks[0].ls1.scale_factor, torch.ones(16))
    assert model.projector.fc1.bias.abs().min() > 0  # transformers' own rule would make it zero


def test_make_tiny_vla_writes_a_complete_folder_and_never_over_another(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "vla-scripts" / "make_tiny_vla.py"
    sizes = {
        "image_size": 28,
        "vision_dim": 16,
        "vision_heads": 2,
        "vision_depth": 2,
        "llm_dim": 32,
        "llm_depth": 1,
    }
    flags = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    command = [
        sys.executable,
        str(script),
        "--output_dir",
        str(tmp_path / "tiny"),
        "--seed",
        "3",
        *flags,
    ]
    subprocess.run(command, check=True, capture_output=True)
    files = {path.name for path in (tmp_path / "tiny").iterdir()}
    weights = {"model.safetensors", "config.json", "dataset_statistics.json"}
    assert files >= weights | {
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    model, processor = load_model(tmp_path / "tiny"), load_processor(tmp_path / "tiny")
    assert model.vision_backbone.num_patches == 4 and processor.image_processor.image_size == (
        28,
        28,
    )
    assert model.config.empty_piece_token_id == processor.empty_piece_token_id
    assert model.config.pad_token_id == processor.pad_token_id == model.config.action_vocab_size
    make_tiny_vla = load_program("make_tiny_vla")
    with pytest.raises(ValueError, match="is not empty"):
        make_tiny_vla.main(make_tiny_vla.Args(output_dir=str(tmp_path / "tiny"), **sizes))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vision_backbone_id": "clip"}, "'clip' is unknown"),
        ({"image_sizes": [224]}, "image_sizes.*1"),
        ({"use_fused_vision_backbone": False}, "use_fused_vision_backbone is False"),
        ({"text_config": {"model_type": "gpt2"}}, "'gpt2'"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OpenVLAConfig(**fields)


def test_a_single_vit_has_prismatics_two_layer_projector() -> None:
    vit = {"patch_size": 14, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 4.0}
    llama = {
        "vocab_size": 576,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = OpenVLAConfig(
        "siglip-vit-so400m", timm_model_kwargs=[vit], image_sizes=[28], text_config=llama
    )
    model = OpenVLAForActionPrediction(config)
    assert {name for name in model.state_dict() if name.startswith("projector")} == {
        f"projector.{name}" for name in pairs("fc1", "fc2")
    }
    ids = torch.tensor([[1, 5, 6]])
    actions = torch.full((1, 7), config.first_action_token_id)
    output = model.forward_actions(
        ids, torch.ones_like(ids), actions, pixel_values=torch.randn(1, 3, 28, 28)
    )
    assert output.logits_BAV.shape == (1, 7, 256) and output.logits_BAV.isfinite().all()


def test_a_llama_style_tokenizer_gives_openvlas_prompt(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    """openvla-7b's tokenizer is a BPE with byte fallback that puts "▁" before the text, saved by transformers 4."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors

    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for piece in ["▁", *"In:WhatOu?drop", "▁I", "▁In", "▁d", "▁dr", "▁dro", "▁drop"]:
        vocab.setdefault(piece, len(vocab))
    merges = [("▁", "I"), ("▁I", "n"), ("▁", "d"), ("▁d", "r"), ("▁dr", "o"), ("▁dro", "p")]
    backend = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<PAD>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(tmp_path)
    legacy = {
        **special,
        "tokenizer_class": "LlamaTokenizer",
        "legacy": False,
        "padding_side": "right",
        "model_max_length": 2048,
    }
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({**legacy, "add_bos_token": True, "add_eos_token": False})
    )
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_text((tiny_model_dir / name).read_text())
    processor = load_processor(tmp_path)
    tokens = processor.tokenizer.convert_ids_to_tokens(processor.prompt_ids("drop"))
    assert tokens[:3] == ["<s>", "▁In", ":"], tokens
    assert tokens[-7:] == ["?", "<0x0A>", "O", "u", "t", ":", "▁"] and "▁drop" in tokens, tokens
