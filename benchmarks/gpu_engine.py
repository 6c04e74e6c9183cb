"""Is the engine near the GPU's limit, is it quicker than Hugging Face, and does it agree with the trainer?

    python benchmarks/gpu_engine.py [--model_dir DIR] [--cases default eager_vision] [--profile] [--output FILE]
    python benchmarks/gpu_engine.py --size tiny --device cpu

The engine samples 7 action tokens with log-probs for images and prompts of 34 tokens. "of ceiling" is its FLOP/s,
counted over vision, prompt and action tokens, against the best matrix product measured in this run. The baseline is
our Hugging Face model with transformers' batched `generate` on the same weights, images and prompts. The parts:
prefill is a call for one token (vision and prompt), vision is measured alone, decode is the rest; busy is the share of
a call in which the GPU runs a kernel. The agreement compares the engine's log-probs with `forward_actions` as the
trainer calls it, in the same dtype, and both with float32.
"""

import cProfile
import os
import pstats
import re
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from gpu_common import (
    NUM_TEXT_TOKENS,
    ModelFlops,
    describe_hardware,
    device_seconds,
    ensure_model,
    matmul_ceiling,
    model_flops,
    print_table,
    synchronize,
    wall_seconds,
    write_json,
)

from utils.vllm_utils import ActionEngine, EngineConfig, engine_env

INSTRUCTIONS = (
    "pick up the red block and place it on the blue plate",
    "open the drawer",
    "push the white mug to the left of the stove and then put the bowl on top of it",
    "close the cabinet",
)
# What is changed in the engine; the first of a run is measured in full, the others by their rates.
CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "eager_vision": {"compilation_config": {"compile_mm_encoder": False}},
    "batched_tokens_8192": {"max_num_batched_tokens": 8192},
    "batched_tokens_32768": {"max_num_batched_tokens": 32768},
    "sync_scheduling": {"async_scheduling": False},
}
# Kernel names by what they do, tried in this order.
CATEGORIES = (
    ("attention", r"flash|fmha|attention|attn"),
    ("matmul", r"gemm|nvjet|cutlass|cublas|wgmma|splitk"),
    ("copy", r"memcpy|memset|copy"),
    ("sampling", r"gumbel|softmax|topk|_ranks|temperature|sample"),
    (
        "element-wise",
        r"triton|elementwise|norm|act_and_mul|rotary|reshape_and_cache|cat|reduce|index|fill",
    ),
)


@dataclass
class Args:
    """What to measure."""

    model_dir: str = ""
    """Model folder, made when it does not exist; empty for /dev/shm/vla-SIZE."""
    size: Literal["tiny", "small", "7b"] = "7b"
    """Size of the folder when it has to be made."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Where all of it runs; on CPU in float32 without compilation."""
    batch_sizes: list[int] = field(default_factory=lambda: [8, 16, 32, 64, 128])
    """Requests in one engine call."""
    hf_batch_sizes: list[int] = field(default_factory=lambda: [32, 64])
    """Requests in one call of transformers' generate."""
    cases: list[str] = field(default_factory=lambda: ["default"])
    """Engines to compare, of: default, eager_vision, batched_tokens_8192, batched_tokens_32768, sync_scheduling."""
    num_repeats: int = 5
    """Calls of each kind; medians are reported."""
    num_text_tokens: int = NUM_TEXT_TOKENS
    """Prompt tokens beside the image."""
    num_agreement_actions: int = 256
    """Sampled actions whose log-probs are compared; 0 for none."""
    profile: bool = False
    """Also list the kernels of one call at the largest batch, and Python's functions at the smallest."""
    gpu_memory_utilization: float = 0.5
    """The engine's share of the GPU; the Hugging Face model stays beside it."""
    output: str = ""
    """JSON file to write."""


def make_inputs(
    config: Any, batch_size: int, num_text_tokens: int
) -> tuple[list[list[int]], np.ndarray]:
    """Random prompts of one length (BOS first) and smooth random images (B, H, W, 3) uint8."""
    random = np.random.default_rng(batch_size)
    # Ids of bytes and words in every tokenizer here.
    prompts = [
        [1, *random.integers(3, 300, num_text_tokens - 1).tolist()] for _ in range(batch_size)
    ]
    return prompts, smooth_images(random, batch_size, config.image_sizes[0])


def smooth_images(random: np.random.Generator, num_images: int, size: int) -> np.ndarray:
    """Images of random patches in random colours: unlike noise, no two look alike to a ViT."""
    coarse = random.integers(0, 256, (num_images, 7, 7, 3), dtype=np.uint8)
    repeats = -(-size // 7)
    return np.ascontiguousarray(
        coarse.repeat(repeats, axis=1).repeat(repeats, axis=2)[:, :size, :size]
    )


def build_engine(model_dir: str, case: str, args: Args) -> tuple[ActionEngine, float]:
    """Return the engine of one case and the seconds it took to start."""
    on_gpu = args.device == "cuda"
    started = time.perf_counter()
    engine = ActionEngine(
        EngineConfig(
            model_dir,
            dtype="bfloat16" if on_gpu else "float32",
            enforce_eager=not on_gpu,
            max_num_seqs=max(args.batch_sizes),
            gpu_memory_utilization=args.gpu_memory_utilization,
            extra=CASES[case],
        )
    )
    return engine, time.perf_counter() - started


def measure_engine(
    engine: ActionEngine, config: Any, flops: ModelFlops, ceiling: float, args: Args
) -> list[dict]:
    """Rates and parts of the engine at every batch size."""
    rows = []
    for batch_size in args.batch_sizes:
        prompts, images = make_inputs(config, batch_size, args.num_text_tokens)

        def call(prompts: list[list[int]] = prompts, images: np.ndarray = images) -> Any:
            return engine.generate(prompts, images, temperature=1.0)

        seconds = wall_seconds(call, args.num_repeats)
        with one_token(engine):
            prefill_s = wall_seconds(call, args.num_repeats)
        achieved = batch_size * flops.action(args.num_text_tokens) / seconds
        busy_s = sum(kernel_seconds(call).values()) if args.device == "cuda" else None
        rows.append(
            {
                "batch": batch_size,
                "actions_per_s": batch_size / seconds,
                "tflops": achieved / 1e12,
                "of_ceiling": achieved / ceiling,
                "call_ms": 1e3 * seconds,
                "vision_ms": 1e3 * vision_seconds(engine, images, args.num_repeats),
                "prefill_ms": 1e3 * prefill_s,
                "prefill_of_ceiling": batch_size
                * flops.prefill(args.num_text_tokens)
                / prefill_s
                / ceiling,
                "decode_step_ms": 1e3 * (seconds - prefill_s) / 6,
                "busy": None if busy_s is None else busy_s / seconds,
            }
        )
    return rows


class one_token:  # noqa: N801
    """Context in which an engine ends every request after its first action token."""

    def __init__(self, engine: ActionEngine) -> None:
        self.engine, self.original = engine, engine._sampling_params

    def __enter__(self) -> None:
        def shortened(*args: Any) -> Any:
            params = self.original(*args)
            for one in params:
                one.max_tokens = 1
            return params

        self.engine._sampling_params = shortened  # type: ignore[method-assign]

    def __exit__(self, *_: Any) -> None:
        self.engine._sampling_params = self.original  # type: ignore[method-assign]


def runner_of(engine: ActionEngine) -> Any:
    """Return vLLM's model runner in this process."""
    return engine._llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


@torch.inference_mode()
def vision_seconds(engine: ActionEngine, images: np.ndarray, num_repeats: int) -> float:
    """Seconds of the ViTs and the projector alone, with the images' way to the device."""
    model, pixels = runner_of(engine).model, torch.from_numpy(images)
    return device_seconds(lambda: model.encode_images(pixels), num_repeats)


def kernel_seconds(call: Callable[[], Any]) -> dict[str, float]:
    """Seconds of each GPU kernel in one call, by name."""
    from torch.profiler import ProfilerActivity, profile

    synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        synchronize()
    seconds: dict[str, float] = defaultdict(float)
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            seconds[event.name] += event.device_time_total / 1e6
    return seconds


def print_kernels(engine: ActionEngine, config: Any, args: Args) -> dict[str, Any]:
    """Print where the GPU's time of one call at the largest batch goes, and return it."""
    batch_size = max(args.batch_sizes)
    prompts, images = make_inputs(config, batch_size, args.num_text_tokens)
    kernels = kernel_seconds(lambda: engine.generate(prompts, images, temperature=1.0))
    categories: dict[str, float] = defaultdict(float)
    for name, seconds in kernels.items():
        categories[
            next((c for c, p in CATEGORIES if re.search(p, name, re.IGNORECASE)), "other")
        ] += seconds
    total = sum(kernels.values())
    top = sorted(kernels.items(), key=lambda item: -item[1])[:20]
    by_category = sorted(categories.items(), key=lambda item: -item[1])
    rows = [[name, 1e3 * s, s / total] for name, s in by_category]
    print_table(
        f"GPU time of one call at batch {batch_size} by category", ["category", "ms", "share"], rows
    )
    rows = [[name[:110], 1e3 * s, s / total] for name, s in top]
    print_table("its longest kernels", ["kernel", "ms", "share"], rows)
    return {"batch": batch_size, "categories": dict(by_category), "kernels": dict(top)}


def print_python(engine: ActionEngine, config: Any, args: Args) -> None:
    """Print the functions in which Python spends a call at the smallest batch (waiting for the GPU included)."""
    prompts, images = make_inputs(config, min(args.batch_sizes), args.num_text_tokens)
    profiler = cProfile.Profile()
    with profiler:
        for _ in range(args.num_repeats):
            engine.generate(prompts, images, temperature=1.0)
    calls = sorted(pstats.Stats(profiler).stats.items(), key=lambda item: -item[1][2])[:25]  # type: ignore[attr-defined]
    rows = [
        [
            f"{Path(file).name}:{line} {name}"[:90],
            count // args.num_repeats,
            1e3 * own / args.num_repeats,
        ]
        for (file, line, name), (_, count, own, _, _) in calls
    ]
    print_table(
        f"Python at batch {min(args.batch_sizes)}", ["function", "calls", "own ms a call"], rows
    )


def measure_hf(
    model: Any, processor: Any, flops: ModelFlops, ceiling: float, args: Args
) -> list[dict]:
    """Rates of transformers' batched generate, vision included."""
    rows = []
    for batch_size in args.hf_batch_sizes:
        prompts, images = make_inputs(model.config, batch_size, args.num_text_tokens)
        ids = torch.tensor(prompts, device=model.device)
        pixels = torch.from_numpy(images)

        @torch.inference_mode()
        def call(ids: torch.Tensor = ids, pixels: torch.Tensor = pixels) -> torch.Tensor:
            normalized = processor.image_processor.normalize(pixels.to(model.device), model.dtype)
            embeddings = model._embed(ids, model.encode_vision(normalized))
            return model.language_model.generate(
                inputs_embeds=embeddings,
                attention_mask=torch.ones(
                    embeddings.shape[:2], dtype=torch.long, device=model.device
                ),
                max_new_tokens=7,
                min_new_tokens=7,
                do_sample=True,
                pad_token_id=model.config.pad_token_id,
            )

        assert call().shape == (batch_size, 7)
        seconds = wall_seconds(call, max(args.num_repeats // 2, 2), 1)
        achieved = batch_size * flops.action(args.num_text_tokens) / seconds
        rate = {
            "batch": batch_size,
            "actions_per_s": batch_size / seconds,
            "of_ceiling": achieved / ceiling,
        }
        rows.append(rate | {"call_ms": 1e3 * seconds})
    return rows


@torch.inference_mode()
def trainer_logprobs(
    model: Any,
    processor: Any,
    prompts: list[list[int]],
    images: np.ndarray,
    tokens: np.ndarray,
    temperature: float,
) -> np.ndarray:
    """Log-probs (B, 7) of the tokens as the trainer computes them, in micro-batches of 32."""
    first, parts = model.config.first_action_token_id, []
    for start in range(0, len(prompts), 32):
        rows = slice(start, start + 32)
        ids, mask = (tensor.to(model.device) for tensor in processor.collate_prompts(prompts[rows]))
        pixels = torch.from_numpy(images[rows]).to(model.device)
        normalized = processor.image_processor.normalize(pixels, model.dtype)
        actions = torch.from_numpy(tokens[rows]).to(model.device)
        logits = model.forward_actions(ids, mask, actions, pixel_values=normalized).logits_BAV
        logprobs = (logits / temperature).log_softmax(-1)
        parts.append(
            logprobs.gather(-1, (actions - first)[..., None])[..., 0].float().cpu().numpy()
        )
    return np.concatenate(parts)


def sample_actions(
    engine: ActionEngine, processor: Any, config: Any, args: Args
) -> dict[float, tuple]:
    """Actions of the engine for real prompts of several lengths, by temperature."""
    random = np.random.default_rng(0)
    num = args.num_agreement_actions
    prompts = [
        processor.prompt_ids(INSTRUCTIONS[index % len(INSTRUCTIONS)]) for index in range(num)
    ]
    images = smooth_images(random, num, config.image_sizes[0])
    return {
        t: (prompts, images, engine.generate(prompts, images, temperature=t)) for t in (1.0, 1.5)
    }


def agreement(model: Any, processor: Any, samples: dict[float, tuple]) -> list[dict]:
    """Engine against trainer and both against float32. Leaves `model` in float32."""
    trainer = {
        t: trainer_logprobs(model, processor, p, i, g.token_ids, t)
        for t, (p, i, g) in samples.items()
    }
    model.float()
    rows = []
    for temperature, (prompts, images, generation) in samples.items():
        exact = trainer_logprobs(
            model, processor, prompts, images, generation.token_ids, temperature
        )
        pairs = {
            "engine - trainer": (generation.logprobs, trainer[temperature]),
            "engine - float32": (generation.logprobs, exact),
            "trainer - float32": (trainer[temperature], exact),
        }
        rows += [
            {"temperature": temperature, "pair": name, **compare(*pair)}
            for name, pair in pairs.items()
        ]
    return rows


def compare(first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    """Distribution of the absolute differences per token, and the PPO ratio exp(sum(second - first)) per action."""
    difference = np.abs(first - second)
    ratio = np.exp((second - first).sum(axis=1, dtype=np.float64))
    median, p99 = np.quantile(difference, [0.5, 0.99])
    return {
        "mean_abs": float(difference.mean()),
        "median_abs": float(median),
        "p99_abs": float(p99),
        "max_abs": float(difference.max()),
        "mean_logprob": float(first.mean()),
        "ratio_mean": float(ratio.mean()),
        "ratio_std": float(ratio.std()),
    }


def run_case(
    model_dir: str, case: str, config: Any, flops: ModelFlops, ceiling: float, args: Args
) -> dict[str, Any]:
    """Build the engine of one case, measure it, print its table, and close it."""
    from prismatic.extern.hf.processing_prismatic import load_processor

    engine, start_s = build_engine(model_dir, case, args)
    result: dict[str, Any] = {
        "start_s": start_s,
        "rows": measure_engine(engine, config, flops, ceiling, args),
    }
    columns = list(result["rows"][0])
    print_table(
        f"engine, case {case} (started in {start_s:.0f} s)",
        columns,
        [list(r.values()) for r in result["rows"]],
    )
    if case == args.cases[0]:
        if args.num_agreement_actions:
            result["samples"] = sample_actions(engine, load_processor(model_dir), config, args)
        if args.profile and args.device == "cuda":
            result["profile"] = print_kernels(engine, config, args)
            print_python(engine, config, args)
    engine.close()
    return result


def compare_with_hf(
    rows: list[dict], model: Any, processor: Any, flops: ModelFlops, ceiling: float, args: Args
) -> Any:
    """Measure the baseline, print both with their ratio, and return the baseline's rows."""
    hf_rows = measure_hf(model, processor, flops, ceiling, args)
    rates = {row["batch"]: row["actions_per_s"] for row in rows}
    table = []
    for row in hf_rows:
        row["engine_over_hf"] = (
            rates[row["batch"]] / row["actions_per_s"] if row["batch"] in rates else None
        )
        table.append(list(row.values()))
    print_table("transformers' generate on the same weights", list(hf_rows[0]), table)
    return hf_rows


def main(args: Args) -> None:
    """Measure, print the tables and write the JSON."""
    os.environ.update(engine_env(args.device))
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from prismatic.extern.hf.modeling_prismatic import load_model
    from prismatic.extern.hf.processing_prismatic import load_processor

    started = time.perf_counter()
    model_dir = ensure_model(args.model_dir or f"/dev/shm/vla-{args.size}", args.size)
    make_s = time.perf_counter() - started
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    model = load_model(model_dir, dtype=dtype, device=args.device)
    processor = load_processor(model_dir)
    flops, ceiling = model_flops(model.config), matmul_ceiling(args.device)
    action_tflop = flops.action(args.num_text_tokens) / 1e12
    load_s = time.perf_counter() - started - make_s
    print_table(
        f"{describe_hardware()}; model made in {make_s:.0f} s, loaded in {load_s:.0f} s",
        [
            "matmul ceiling TFLOP/s",
            "TFLOP an action",
            "of it vision + projector",
            "actions/s at the ceiling",
        ],
        [
            [
                ceiling / 1e12,
                action_tflop,
                (flops.vision + flops.projector) / 1e12,
                ceiling / 1e12 / action_tflop,
            ]
        ],
    )
    results: dict[str, Any] = {
        "args": args,
        "make_model_s": make_s,
        "ceiling_tflops": ceiling / 1e12,
        "flops": flops,
    }
    results["cases"] = {}
    for case in args.cases:
        # A process for each: what an engine leaves on the GPU after `close` would be too much for the next one.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            inputs = (model_dir, case, model.config, flops, ceiling, args)
            results["cases"][case] = pool.submit(run_case, *inputs).result()
    first = results["cases"][args.cases[0]]
    samples = first.pop("samples", None)
    results["ceiling_after_tflops"] = matmul_ceiling(args.device) / 1e12
    write_json(args.output, "gpu_engine", results)
    if args.hf_batch_sizes:
        results["hf"] = compare_with_hf(first["rows"], model, processor, flops, ceiling, args)
        write_json(args.output, "gpu_engine", results)
    if samples:
        results["agreement"] = agreement(model, processor, samples)
        rows = [list(row.values()) for row in results["agreement"]]
        title = f"log-probs of {args.num_agreement_actions} sampled actions; ratio = exp(sum(second - first))"
        print_table(title, list(results["agreement"][0]), rows)
    write_json(args.output, "gpu_engine", results)


if __name__ == "__main__":
    main(tyro.cli(Args))
