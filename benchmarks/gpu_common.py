"""What the gpu_*.py benchmarks share: the matmul ceiling, OpenVLA's FLOPs, timing on the device, one table and JSON.

FLOPs are of matrix products, two for each multiply-add. Nothing is counted that need not be computed: the ViTs' last
block, logits of other tokens than actions, the last action token (nothing reads what follows it).
"""

import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig
from prismatic.extern.hf.modeling_prismatic import OpenVLAForActionPrediction

NUM_ACTION_TOKENS = 7
# BOS, OpenVLA's template and a LIBERO instruction of average length with Llama's tokenizer; 256 patches make it 290.
NUM_TEXT_TOKENS = 34
# Products of a 7B's prefill (16384 tokens into 4096 or 11008 channels) and the square one that is usually quickest.
CEILING_SHAPES = (
    (8192, 8192, 8192),
    (16384, 4096, 4096),
    (16384, 11008, 4096),
    (16384, 4096, 11008),
)


@dataclass(frozen=True)
class ModelFlops:
    """Forward FLOPs of one OpenVLA.

    vision, projector: of one image. llm_token: one token through all layers' matrices. attention_pair: one query with
    one key, over all layers. head_token: the action rows of the head at one position.
    """

    vision: float
    projector: float
    llm_token: float
    attention_pair: float
    head_token: float
    num_patches: int

    def prefill(self, num_text_tokens: int) -> float:
        """FLOPs of the image and the whole prompt of one request, with the first action token's logits."""
        num_tokens = self.num_patches + num_text_tokens
        return self.vision + self.projector + self.sequence(0, num_tokens) + self.head_token

    def sequence(self, first: int, num_tokens: int) -> float:
        """FLOPs of `num_tokens` positions from position `first` on, each seeing all before it and itself."""
        num_pairs = num_tokens * first + num_tokens * (num_tokens + 1) / 2
        return num_tokens * self.llm_token + num_pairs * self.attention_pair

    def action(self, num_text_tokens: int = NUM_TEXT_TOKENS) -> float:
        """FLOPs of one action: image, prompt, and six of the seven action tokens fed back."""
        first, num_fed = self.num_patches + num_text_tokens, NUM_ACTION_TOKENS - 1
        return (
            self.prefill(num_text_tokens)
            + self.sequence(first, num_fed)
            + num_fed * self.head_token
        )


def model_flops(config: OpenVLAConfig) -> ModelFlops:
    """Count FLOPs from the shapes of the model itself (built without memory)."""
    with torch.device("meta"):
        model = OpenVLAForActionPrediction(config)
    llama = config.text_config
    layers = model.language_model.model.layers
    return ModelFlops(
        vision=sum(_vit_flops(vit) for vit in model.vision_backbone.featurizers),
        projector=2.0 * _matrix_numel(model.projector) * model.vision_backbone.num_patches,
        llm_token=2.0 * _matrix_numel(layers),
        # Scores and weighted values: 2 x 2 FLOPs for each channel of each layer's heads.
        attention_pair=4.0
        * llama.num_hidden_layers
        * llama.num_attention_heads
        * layers[0].self_attn.head_dim,
        head_token=2.0 * config.n_action_bins * llama.hidden_size,
        num_patches=model.vision_backbone.num_patches,
    )


def _matrix_numel(module: nn.Module) -> int:
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))


def _vit_flops(vit: Any) -> float:
    """One image through a timm ViT up to its last block but one."""
    num_patches, num_tokens = (
        vit.patch_embed.num_patches,
        vit.patch_embed.num_patches + vit.num_prefix_tokens,
    )
    blocks = vit.blocks[:-1]
    attention = 4.0 * len(blocks) * num_tokens**2 * vit.embed_dim
    return (
        2.0 * vit.patch_embed.proj.weight.numel() * num_patches
        + 2.0 * _matrix_numel(blocks) * num_tokens
        + attention
    )


def synchronize() -> None:
    """Wait for the GPU; nothing on CPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def device_seconds(
    function: Callable[[], Any], num_repeats: int = 10, num_warmups: int = 2
) -> float:
    """Median seconds of `function` on the device, by CUDA events (on CPU by the clock)."""
    for _ in range(num_warmups):
        function()
    times = []
    for _ in range(num_repeats):
        if torch.cuda.is_available():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            function()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            begin = time.perf_counter()
            function()
            times.append(time.perf_counter() - begin)
    return statistics.median(times)


def wall_seconds(function: Callable[[], Any], num_repeats: int = 5, num_warmups: int = 2) -> float:
    """Median seconds of `function` by the clock, the device idle before and after."""
    for _ in range(num_warmups):
        function()
    times = []
    for _ in range(num_repeats):
        synchronize()
        begin = time.perf_counter()
        function()
        synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


@torch.inference_mode()
def matmul_ceiling(device: str | torch.device = "cuda", num_repeats: int = 20) -> float:
    """Best FLOP/s of a dense matrix product here: bf16 at large shapes on a GPU, float32 at 1024 on CPU."""
    on_gpu = torch.device(device).type == "cuda"
    best = 0.0
    for rows, columns, inner in CEILING_SHAPES if on_gpu else ((1024, 1024, 1024),):
        dtype = torch.bfloat16 if on_gpu else torch.float32
        left = torch.randn(rows, inner, device=device, dtype=dtype)
        right = torch.randn(columns, inner, device=device, dtype=dtype)

        def product(left: torch.Tensor = left, right: torch.Tensor = right) -> torch.Tensor:
            return left @ right.T

        best = max(best, 2.0 * rows * columns * inner / device_seconds(product, num_repeats, 5))
    return best


def peak_memory_gib() -> float | None:
    """Most memory that torch has had allocated on the GPU so far, in GiB; None on CPU."""
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None


def hardware() -> dict[str, Any]:
    """Date, machine and versions that a figure belongs to."""
    from utils.vllm_utils import vllm_version

    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "vllm": vllm_version(),
        "cpu_cores": os.cpu_count(),
        "gpus": [],
    }
    if torch.cuda.is_available():
        devices = [
            torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())
        ]
        facts["gpus"] = [
            f"{device.name}, {device.total_memory / 2**30:.0f} GiB" for device in devices
        ]
    return facts


def describe_hardware() -> str:
    """One line of `hardware` for a table's title."""
    facts = hardware()
    machine = " + ".join(facts["gpus"]) or f"{facts['cpu_cores']} CPU cores"
    return f"{machine}, torch {facts['torch']}, vLLM {facts['vllm']}, {facts['date']}"


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], width: int = 150
) -> None:
    """Print one table; floats with four significant digits, None as a dash."""
    table = Table(*columns)
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    console = Console(width=width)
    console.print(title)
    console.print(table)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def write_json(path: str, name: str, results: Any) -> None:
    """Write `{"benchmark", "hardware", "results"}`; nothing for an empty path."""
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        document = {"benchmark": name, "hardware": hardware(), "results": results}
        Path(path).write_text(json.dumps(document, indent=1, default=_plain) + "\n")


def _plain(value: Any) -> Any:
    """What json does not know: dataclasses and numbers of numpy and torch."""
    return asdict(value) if hasattr(value, "__dataclass_fields__") else value.item()


def ensure_model(model_dir: str, size: str) -> str:
    """Return `model_dir`, made with random weights of `size` (tiny, small, 7b) when it is not there yet."""
    from prismatic.extern.hf.random_prismatic import save_random_vla

    if not (Path(model_dir) / "config.json").exists():
        save_random_vla(size, model_dir)
    return model_dir
