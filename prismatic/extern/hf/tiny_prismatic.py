"""A whole OpenVLA model folder at a few million parameters: the architecture, names and files of openvla-7b."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from prismatic.extern.hf.configuration_prismatic import DINOSIGLIP_TIMM_IDS, OpenVLAConfig
from prismatic.extern.hf.modeling_prismatic import OpenVLAForActionPrediction
from prismatic.extern.hf.processing_prismatic import (
    EMPTY_PIECE,
    PROMPT_TEMPLATE,
    PrismaticImageProcessor,
    PrismaticProcessor,
)

PADDING_ROWS = 64
CONTROL_PIECES = ("<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)))
# What DINOv2 and SigLIP were trained with; openvla-7b's preprocessor_config.json has the same.
MEANS = [[0.485, 0.456, 0.406], [0.5, 0.5, 0.5]]
STDS = [[0.229, 0.224, 0.225], [0.5, 0.5, 0.5]]

# The words of the tabletop's and LIBERO's instructions. Any other word is spelled in bytes, so nothing is refused.
WORDS = """
a above adjust alphabet and apple arrange at away back ball banana basil basket bbq beside between big black block
blocks blue book both bottle bottom bowl box brown burner butter button by cabinet caddy can carrot center cheese
chocolate close closed closer compartment container cookie cookies corner cover cream cross cube cucumber cup cyan
cylinder dark desk dish disk down drawer dressing drop edge empty far find first flat flip from front frying gather
gently get give glass go gold grasp gray green grey gripper hand handle height hexagon high hold hollow house hover
how in insert inside into is it item juice keep ketchup knob large left lemon lid lift light low lower lowered magenta
make mark marker mat microwave middle milk move mug mugs navy near next object of off olive on onto open or orange
other out outside over pad pan peach pen pepper pick picture pin pink place plate point popcorn position pot press
pudding pull purple push put rack raised ramekin reach rear red release remote remove right ring robot rotate round
salad sauce screen second set shape shelf side sink slide small soup spoon square stack stacked star stick stone
storage stove table take target tea teal that the then thing third tile tip to tomato top touch toward towards tower
tray triangle turn two under up upper violet wall where which white wine with wooden yellow zone
"""


@dataclass(frozen=True)
class TinyVLAConfig:
    """Sizes of a tiny policy. The defaults have about three million parameters and 16 patches."""

    seed: int = 0
    """Seed of the random weights."""
    image_size: int = 56
    """Side of the square image in pixels; a multiple of `patch_size`."""
    patch_size: int = 14
    """Side of a ViT patch in pixels; the language model sees (image_size / patch_size)^2 patches."""
    vision_dim: int = 96
    """Width of each of the two ViTs; a multiple of 4 and of `vision_heads`."""
    vision_depth: int = 4
    """Blocks of each ViT; the last one is never computed, as in OpenVLA. At least 2."""
    vision_heads: int = 3
    """Attention heads of each ViT."""
    llm_dim: int = 192
    """Width of the Llama; a multiple of `llm_heads` with an even quotient."""
    llm_depth: int = 4
    """Layers of the Llama."""
    llm_heads: int = 4
    """Attention heads of the Llama."""
    llm_mlp_dim: int = 512
    """Width of the Llama's MLP."""
    extra_words: tuple[str, ...] = ()
    """Words, beside the built-in ones of tabletop and LIBERO, that get one token each; others are spelled in bytes."""


# Largest sizes, each beyond openvla-7b's: larger numbers are slips, and would fill the memory.
SIZE_LIMITS = {
    "image_size": 1024, "patch_size": 1024, "vision_dim": 8192, "vision_depth": 256, "vision_heads": 1024,
    "llm_dim": 8192, "llm_depth": 256, "llm_heads": 1024, "llm_mlp_dim": 65_536,
}  # fmt: skip
# 4 GB in float32, and as much again while they are written.
MAX_WEIGHTS = 1e9


def validate_tiny(config: TinyVLAConfig) -> None:
    """Raise ValueError listing every size that cannot work, one a line."""
    problems = [
        f"{name} {getattr(config, name)} must be from 1 to {limit}"
        for name, limit in SIZE_LIMITS.items()
        if not 1 <= getattr(config, name) <= limit
    ]
    if problems:
        raise ValueError("\n".join(problems))
    if config.image_size % config.patch_size:
        problems.append(
            f"image_size {config.image_size} is not a multiple of patch_size {config.patch_size}"
        )
    if config.vision_dim % config.vision_heads or config.vision_dim % 4:
        problems.append(
            f"vision_dim {config.vision_dim} is not a multiple of vision_heads {config.vision_heads} and 4"
        )
    if config.llm_dim % (2 * config.llm_heads):
        problems.append(
            f"llm_dim {config.llm_dim} is not a multiple of twice llm_heads {config.llm_heads}"
        )
    if config.vision_depth < 2 or config.llm_depth < 1:
        problems.append(
            f"vision_depth is {config.vision_depth} (at least 2), llm_depth {config.llm_depth} (1)"
        )
    llama = config.llm_depth * config.llm_dim * (4 * config.llm_dim + 3 * config.llm_mlp_dim)
    num_weights = llama + 2 * config.vision_depth * 12 * config.vision_dim**2
    if num_weights > MAX_WEIGHTS:
        problems.append(
            f"these sizes have about {num_weights:.3g} weights: at most {MAX_WEIGHTS:g} are made in memory"
        )
    if problems:
        raise ValueError("\n".join(problems))


def build_tiny_tokenizer(extra_words: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """Return a tokenizer with Llama's layout: unk, BOS, EOS, 256 bytes, pieces, and at the end 256 action tokens.

    The two fixed parts of OpenVLA's prompt are one token each, words are one each (with the leading space that Llama's
    pieces have), everything else falls back to bytes. PAD is the first padding row, as in openvla-7b.
    """
    head, tail = PROMPT_TEMPLATE.split("{instruction}")
    pieces = [*CONTROL_PIECES, head, tail, EMPTY_PIECE, *word_pieces(extra_words)]
    pieces += [f"<unused_{index}>" for index in range(-len(pieces) % 64)]
    pieces += [f"<action_{index}>" for index in range(256)]
    return assemble_tokenizer(pieces, whole=(head, tail))


def word_pieces(extra_words: tuple[str, ...] = ()) -> list[str]:
    """Return the known words, sorted, each with the mark of its leading space."""
    return [
        EMPTY_PIECE + word
        for word in sorted({word.lower() for word in (*WORDS.split(), *extra_words)})
    ]


def assemble_tokenizer(pieces: list[str], whole: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """Return a tokenizer of `pieces`, in the order of their ids; the texts `whole` are never split. PAD comes last."""
    # All pieces cost the same, so the segmentation with the fewest pieces wins: a known word stays whole.
    backend = Tokenizer(
        models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0, byte_fallback=True)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement=EMPTY_PIECE, prepend_scheme="always", split=True
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(Regex(EMPTY_PIECE), " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    backend.add_tokens([AddedToken(text, normalized=False) for text in whole])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<PAD>",
        padding_side="right",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def sincos_position_2d(grid: int, dim: int) -> Tensor:
    """Return the 2-D sine-cosine position embedding (1, grid * grid, dim): half the channels for y, half for x.

    Its root mean square is 0.7, like that of the patches, so that position is visible from the first update
    (from random positions a tiny ViT did not learn where things are: TABLETOP.md). Frequencies: MAE, appendix.
    """
    frequency = 1.0 / 10000.0 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * frequency
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)
    y, x = axis[:, None].expand(grid, grid, -1), axis[None].expand(grid, grid, -1)
    return torch.cat([y, x], dim=-1).reshape(1, grid * grid, dim).float()


def tiny_config(config: TinyVLAConfig, tokenizer: PreTrainedTokenizerFast) -> OpenVLAConfig:
    """Return the model's configuration: openvla-7b's fields with the sizes replaced."""
    vit: dict[str, Any] = {
        "patch_size": config.patch_size,
        "embed_dim": config.vision_dim,
        "depth": config.vision_depth,
        "num_heads": config.vision_heads,
        "mlp_ratio": 4.0,
    }
    return OpenVLAConfig(
        image_resize_strategy="resize-naive",
        timm_model_ids=DINOSIGLIP_TIMM_IDS,
        image_sizes=[config.image_size, config.image_size],
        # DINOv2's LayerScale starts at 1e-5, meant for 24 blocks and a long training: here it would switch blocks off.
        timm_model_kwargs=[{**vit, "init_values": 1.0}, vit],
        pad_token_id=tokenizer.pad_token_id,
        pad_to_multiple_of=PADDING_ROWS,
        empty_piece_token_id=tokenizer.convert_tokens_to_ids(EMPTY_PIECE),
        norm_stats={},
        llm_max_length=512,
        architectures=["OpenVLAForActionPrediction"],
        text_config={
            "vocab_size": tokenizer.pad_token_id + PADDING_ROWS,
            "pad_token_id": tokenizer.pad_token_id,
            "hidden_size": config.llm_dim,
            "intermediate_size": config.llm_mlp_dim,
            "num_hidden_layers": config.llm_depth,
            "num_attention_heads": config.llm_heads,
            "max_position_embeddings": 512,
            # Llama's 0.02 suits a width of 4096; narrow layers need larger weights to pass a signal on.
            "initializer_range": round(0.5 / math.sqrt(config.llm_dim), 4),
        },
    )


def init_positions(model: OpenVLAForActionPrediction) -> None:
    """Write the 2-D sine-cosine embedding into both ViTs."""
    for featurizer in model.vision_backbone.featurizers:
        grid = featurizer.patch_embed.grid_size[0]
        with torch.no_grad():
            featurizer.pos_embed.copy_(sincos_position_2d(grid, featurizer.embed_dim))


def build_tiny_vla(config: TinyVLAConfig) -> tuple[OpenVLAForActionPrediction, PrismaticProcessor]:
    """Return a random tiny policy (float32, reproducible from the seed) and its processor. Checks the sizes first."""
    validate_tiny(config)
    tokenizer = build_tiny_tokenizer(config.extra_words)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = OpenVLAForActionPrediction(tiny_config(config, tokenizer))
    init_positions(model)
    image_processor = PrismaticImageProcessor(
        use_fused_vision_backbone=True,
        image_resize_strategy="resize-naive",
        input_sizes=[[3, config.image_size, config.image_size]] * 2,
        interpolations=["bicubic", "bicubic"],
        means=MEANS,
        stds=STDS,
    )
    return model, PrismaticProcessor(image_processor, tokenizer)


def save_tiny_vla(config: TinyVLAConfig, output_dir: str | Path) -> nn.Module:
    """Write a complete model folder (weights, config, tokenizer, processor, empty statistics); return the model."""
    model, processor = build_tiny_vla(config)
    model.save_pretrained(output_dir)
    processor.save_pretrained(output_dir)
    (Path(output_dir) / "dataset_statistics.json").write_text(json.dumps({}) + "\n")
    return model
