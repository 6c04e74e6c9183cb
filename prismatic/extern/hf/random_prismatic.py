"""Model folders with random weights of a given size: `tiny`, `small` (25 M) and `7b`, openvla-7b's exact shape.

The 7B is for speed and agreement, which do not depend on what the weights know. Its tensors are made and written one
file at a time, on the GPU where there is one, so no more than two files of weights are ever in memory.
"""

import dataclasses
import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig
from prismatic.extern.hf.modeling_prismatic import OpenVLAForActionPrediction
from prismatic.extern.hf.processing_prismatic import (
    EMPTY_PIECE,
    PrismaticImageProcessor,
    PrismaticProcessor,
)
from prismatic.extern.hf.tiny_prismatic import (
    CONTROL_PIECES,
    MEANS,
    STDS,
    TinyVLAConfig,
    assemble_tokenizer,
    save_tiny_vla,
    word_pieces,
)

SIZES = ("tiny", "small", "7b")
# The policy of the LIBERO experiments in docs/LIBERO.md.
SMALL = TinyVLAConfig(
    image_size=140, vision_dim=256, vision_depth=7, vision_heads=4, llm_dim=384, llm_depth=6, llm_heads=6,
    llm_mlp_dim=1024,
)  # fmt: skip
NUM_LLAMA_PIECES = 32000
LLAMA_EMPTY_PIECE_ID = 29871
SHARD_BYTES = 2 * 10**9
NUM_WRITERS = 4
# Logits with a standard deviation of 64 x 0.03 = 1.9: the 256 action tokens then span about ten nats.
HEAD_STD = 0.03
# The suites' own ranges are within LIBERO's -1 to 1; the gripper is kept as it is.
IDENTITY_ACTION: dict[str, Any] = {
    "q01": [-1.0] * 6 + [0.0],
    "q99": [1.0] * 7,
    "min": [-1.0] * 6 + [0.0],
    "max": [1.0] * 7,
    "mask": [True] * 6 + [False],
}
STATISTICS = {"tabletop": {"action": IDENTITY_ACTION, "num_transitions": 0, "num_trajectories": 0}}


def save_random_vla(size: str, output_dir: str | Path, seed: int = 0) -> int:
    """Write a complete folder of `size` with statistics for tabletop; return its number of parameters.

    Raises ValueError when the size is not one of `SIZES`.
    """
    if size not in SIZES:
        raise ValueError(f"size is {size!r}: use one of {', '.join(SIZES)}")
    if size == "7b":
        num_parameters = save_openvla_7b(output_dir, seed)
    else:
        config = dataclasses.replace(TinyVLAConfig() if size == "tiny" else SMALL, seed=seed)
        model = save_tiny_vla(config, output_dir)
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
    (Path(output_dir) / "dataset_statistics.json").write_text(
        json.dumps(STATISTICS, indent=1) + "\n"
    )
    return num_parameters


def openvla_7b_config() -> OpenVLAConfig:
    """Return openvla-7b's configuration: two ViTs at 224 pixels and Llama-2-7B with 64 padding rows."""
    return OpenVLAConfig(
        image_resize_strategy="resize-naive",
        architectures=["OpenVLAForActionPrediction"],
        dtype="bfloat16",
        text_config={
            "vocab_size": NUM_LLAMA_PIECES + 64,
            "pad_token_id": NUM_LLAMA_PIECES,
            "dtype": "bfloat16",
        },
    )


def build_llama_sized_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with Llama-2's 32000 ids that spells OpenVLA's prompt in about as many tokens.

    Llama's own pieces cannot be shipped. BOS, EOS, the bytes, the empty piece, the 256 action tokens and PAD have
    Llama's ids; the words of the template and of the instructions are one token each.
    """
    template = [
        EMPTY_PIECE + word
        for word in ("In", "What", "action", "should", "the", "robot", "take", "to")
    ]
    words = [word for word in word_pieces() if word not in template]
    pieces = [*CONTROL_PIECES, *template, *words, ":", "?", "Out"]
    pieces += [f"<unused_{index}>" for index in range(len(pieces), NUM_LLAMA_PIECES - 256)]
    pieces += [f"<action_{index}>" for index in range(256)]
    pieces[LLAMA_EMPTY_PIECE_ID] = EMPTY_PIECE
    return assemble_tokenizer(pieces)


def save_openvla_7b(
    output_dir: str | Path, seed: int = 0, config: OpenVLAConfig | None = None
) -> int:
    """Write a folder in openvla-7b's shape (or `config`'s) with random bfloat16 weights; return the parameter count."""
    config = config or openvla_7b_config()
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    size = config.image_sizes[0]
    image_processor = PrismaticImageProcessor(
        use_fused_vision_backbone=True,
        image_resize_strategy="resize-naive",
        input_sizes=[[3, size, size]] * 2,
        interpolations=["bicubic", "bicubic"],
        means=MEANS,
        stds=STDS,
    )
    PrismaticProcessor(image_processor, build_llama_sized_tokenizer()).save_pretrained(folder)
    with torch.device("meta"):
        shapes = {
            name: tuple(t.shape)
            for name, t in OpenVLAForActionPrediction(config).state_dict().items()
        }
    _write_shards(folder, shapes, seed, config.text_config.num_hidden_layers)
    return sum(math.prod(shape) for shape in shapes.values())


def _write_shards(
    folder: Path, shapes: dict[str, tuple[int, ...]], seed: int, num_layers: int
) -> None:
    """Write the tensors of `shapes` as safetensors files with an index, several at a time."""
    shards = list(_split(shapes))
    names = [
        f"model-{index:05d}-of-{len(shards):05d}.safetensors" for index in range(1, len(shards) + 1)
    ]

    def write(index: int) -> None:
        # A generator of its own for each file, so that the threads' order does not matter.
        device = "cuda" if torch.cuda.is_available() else "cpu"
        generator = torch.Generator(device).manual_seed(1000 * seed + index)
        tensors = {
            name: random_tensor(name, shapes[name], generator, num_layers).cpu()
            for name in shards[index]
        }
        save_file(tensors, folder / names[index], {"format": "pt"})

    # One after another on CPU: a file's tensors are 2 GB, and so is the copy that is written.
    with ThreadPoolExecutor(NUM_WRITERS if torch.cuda.is_available() else 1) as pool:
        list(pool.map(write, range(len(shards))))
    weight_map = {name: names[index] for index, shard in enumerate(shards) for name in shard}
    total_size = sum(2 * math.prod(shape) for shape in shapes.values())
    index_fields = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_fields, indent=1) + "\n")


def _split(shapes: dict[str, tuple[int, ...]]) -> Iterator[list[str]]:
    """Names in groups of at most SHARD_BYTES (in bfloat16)."""
    group: list[str] = []
    num_bytes = 0
    for name, shape in shapes.items():
        if group and num_bytes + 2 * math.prod(shape) > SHARD_BYTES:
            yield group
            group, num_bytes = [], 0
        group.append(name)
        num_bytes += 2 * math.prod(shape)
    yield group


def random_tensor(
    name: str, shape: tuple[int, ...], generator: torch.Generator, num_layers: int
) -> Tensor:
    """Return a bfloat16 tensor on the generator's device, scaled so that activations stay near one.

    Norms' weights and LayerScale are 1 and biases 0. The ViTs' and the projector's matrices keep the variance of their
    input; positions are as large as patches. Llama's matrices have its own 0.02, those that write into the residual
    stream less by the root of their number (GPT-2's rule), and embeddings are as large as projected patches. With 0.02
    everywhere each layer outshouts what came before, and rounding errors grow from layer to layer as in no trained
    model: two bfloat16 implementations then differ by 0.04 in every log-prob (measured on a H200).
    """
    part = name.rsplit(".", 1)[-1]
    if part == "bias":
        return torch.zeros(shape, dtype=torch.bfloat16, device=generator.device)
    if part == "scale_factor" or len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16, device=generator.device)
    if name.startswith("language_model"):
        std = _llama_std(name, num_layers)
    elif part in ("pos_embed", "cls_token", "reg_token", "latent"):
        std = 0.7
    else:
        std = math.prod(shape[1:]) ** -0.5
    return torch.empty(shape, dtype=torch.bfloat16, device=generator.device).normal_(
        0.0, std, generator=generator
    )


def _llama_std(name: str, num_layers: int) -> float:
    if "lm_head" in name:
        return HEAD_STD
    if "embed_tokens" in name:
        return 1.0
    writes_residual = "o_proj" in name or "down_proj" in name
    return 0.02 / math.sqrt(2 * num_layers) if writes_residual else 0.02
