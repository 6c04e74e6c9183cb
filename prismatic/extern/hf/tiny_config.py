"""Sizes of a tiny policy, apart from what builds it: flags are made of them, and --help need not import torch."""

from dataclasses import dataclass


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


def validate_tiny(config: TinyVLAConfig) -> None:
    """Raise ValueError listing every size that cannot work."""
    problems = []
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
    if problems:
        raise ValueError("; ".join(problems))
