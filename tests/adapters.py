"""Adapters as other programs write them."""

import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from prismatic.extern.hf.modeling_prismatic import load_model

# What peft 0.11.1 wrote for OpenVLA's own class with target_modules="all-linear" and rank 4.
OFFICIAL_CONFIG = Path(__file__).parent / "data" / "adapter_config_peft_0.11.1.json"
CONVOLUTIONS = (
    "vision_backbone.featurizer.patch_embed.proj",
    "vision_backbone.fused_featurizer.patch_embed.proj",
)


def save_official_adapter(model_dir: str | Path, folder: str | Path) -> dict[str, torch.Tensor]:
    """Write an adapter of OpenVLA's fine-tuning recipe with random factors.

    Returns the state dict of peft's own merge in float32.
    """
    options = json.loads(OFFICIAL_CONFIG.read_text())
    torch.manual_seed(1)
    config = LoraConfig(
        r=options["r"],
        lora_alpha=options["lora_alpha"],
        target_modules=options["target_modules"],
        init_lora_weights=options["init_lora_weights"],
    )
    wrapper = get_peft_model(load_model(model_dir), config)
    for name, parameter in wrapper.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    # As in the official files, a copy of lm_head is among the tensors.
    wrapper.save_pretrained(str(folder), save_embedding_layers=True)
    (Path(folder) / "adapter_config.json").write_text(OFFICIAL_CONFIG.read_text())
    merged = wrapper.merge_and_unload().state_dict()
    return {name: tensor.detach().clone() for name, tensor in merged.items()}
