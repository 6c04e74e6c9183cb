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
