"""Engine actions/s against a plain torch loop with a KV cache over the Hugging Face class, and where the time goes.

    python benchmarks/engine.py [--model_dir DIR] [--batch_sizes 1 8 32] [--num_threads 1]

Both run in this process on the same weights, prompts and images, taking turns, so that other load hits both; the ratio
is what counts. The engine samples at a temperature with a seed for each request and returns log-probs (what a rollout
asks for); the loop is greedy and returns tokens only (what the least code would do). Without `--model_dir` a random
tiny model of `make_tiny_vla.py`'s default size is made. The split is measured apart, with a synchronisation around
each part on GPU; "input preparation" is the model runner's time outside decoder and sampler.
"""

import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

from utils.vllm_utils import ActionEngine, EngineConfig, engine_env

INSTRUCTION = "pick up the red block and place it on the blue plate"
PARTS = (
    "rendering",
    "scheduler",
    "input preparation",
    "vision",
    "decoder",
    "sampler",
    "output",
    "rest",
)


@dataclass
class Args:
    """What to measure."""

    model_dir: str = ""
    """Model folder; empty for a random tiny one."""
    batch_sizes: list[int] = field(default_factory=lambda: [1, 8, 32])
    """Requests in one call."""
    num_repeats: int = 30
    """Calls of each kind and batch size; medians are reported."""
    num_threads: int = 1
    """OpenMP threads on CPU, for both."""
    dtype: str = "float32"
    """float32 (CPU) or bfloat16."""
    enforce_eager: bool = True
    """No compilation and no CUDA graphs in the engine."""
    temperature: float = 1.2
    """Sampling temperature of the engine."""


class Stopwatch:
    """Seconds spent in wrapped methods, by label."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def wrap(self, owner: Any, method: str, label: str) -> None:
        """Replace `owner.method` by itself with its time added to `label`."""
        function = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = now()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[label] += now() - start

        setattr(owner, method, timed)


def now() -> float:
    """Wall clock after everything queued on the GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def watch_engine(engine: ActionEngine) -> Stopwatch:
    """Time the parts of vLLM's in-process engine; tied to vLLM 0.26's attribute names, used here only."""
    watch = Stopwatch()
    llm_engine: Any = engine._llm.llm_engine
    core = llm_engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    watch.wrap(engine, "_request", "rendering")
    watch.wrap(llm_engine, "add_request", "rendering")
    watch.wrap(core.scheduler, "schedule", "scheduler")
    watch.wrap(core.scheduler, "update_from_output", "scheduler")
    watch.wrap(runner, "execute_model", "runner")
    watch.wrap(runner, "sample_tokens", "runner")
    watch.wrap(runner.model, "encode_images", "vision")
    watch.wrap(runner.model, "forward", "decoder")
    watch.wrap(runner.model, "compute_logits", "decoder")
    watch.wrap(runner.sampler, "forward", "sampler")
    watch.wrap(llm_engine.output_processor, "process_outputs", "output")
    return watch


def split_ms(watch: Stopwatch, total_s: float, num_calls: int) -> dict[str, float]:
    """Milliseconds a call of each part; they sum to the call."""
    seconds = dict(watch.seconds)
    inside = sum(seconds.get(part, 0.0) for part in ("decoder", "sampler"))
    seconds["input preparation"] = seconds.pop("runner") - inside
    seconds["rest"] = total_s - sum(seconds.values())
    return {part: 1e3 * seconds.get(part, 0.0) / num_calls for part in PARTS}


def take_turns(calls: dict[str, Callable[[], Any]], num_repeats: int) -> dict[str, float]:
    """Median seconds of each call, alternating between them; two rounds of warm-up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(num_repeats + 2):
        for name, call in calls.items():
            start = now()
            call()
            times[name].append(now() - start)
    return {name: float(np.median(values[2:])) for name, values in times.items()}


def make_calls(
    engine: ActionEngine, model: Any, processor: Any, batch_size: int, temperature: float
) -> dict[str, Any]:
    """Build the two competitors on the same inputs."""
    size = model.config.image_sizes[0]
    images = np.random.default_rng(0).integers(0, 256, (batch_size, size, size, 3), dtype=np.uint8)
    prompts = [processor.prompt_ids(INSTRUCTION)] * batch_size
    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype

    def plain_loop() -> np.ndarray:
        ids, mask = processor.collate_prompts(prompts)
        pixels = processor.image_processor.normalize(torch.from_numpy(images).to(device), dtype)
        return (
            model.generate_actions(ids.to(device), mask.to(device), pixel_values=pixels)
            .cpu()
            .numpy()
        )

    return {
        "engine": lambda: engine.generate(prompts, images, temperature=temperature, seed=0),
        "loop": plain_loop,
    }


def tiny_model_dir() -> str:
    """Write a random tiny model into a temporary folder."""
    from prismatic.extern.hf.tiny_prismatic import TinyVLAConfig, save_tiny_vla

    folder = os.path.join(tempfile.mkdtemp(prefix="tiny_vla_"), "model")
    save_tiny_vla(TinyVLAConfig(), folder)
    return folder


def main(args: Args) -> None:
    """Measure and print one table of rates and one of the split."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    os.environ.update(engine_env(device, args.num_threads))
    from prismatic.extern.hf.modeling_prismatic import load_model
    from prismatic.extern.hf.processing_prismatic import load_processor

    model_dir = args.model_dir or tiny_model_dir()
    config = EngineConfig(
        model_dir,
        dtype=args.dtype,
        max_num_seqs=max(args.batch_sizes),
        num_threads=args.num_threads,
        enforce_eager=args.enforce_eager,
        gpu_memory_utilization=0.5,
    )
    engine = ActionEngine(config)
    model = load_model(model_dir, dtype=getattr(torch, args.dtype), device=device)
    processor = load_processor(model_dir)
    rates = Table(
        "batch",
        "engine actions/s",
        "loop actions/s",
        "engine / loop",
        title=f"{device}, {args.dtype}",
    )
    calls_by_size = {
        size: make_calls(engine, model, processor, size, args.temperature)
        for size in args.batch_sizes
    }
    for size, calls in calls_by_size.items():
        seconds = take_turns(calls, args.num_repeats)
        row = [
            size / seconds["engine"],
            size / seconds["loop"],
            seconds["loop"] / seconds["engine"],
        ]
        rates.add_row(str(size), *(f"{value:.4g}" for value in row))
    split = Table("batch", *PARTS, "total", title="milliseconds of one engine call")
    watch = watch_engine(engine)
    for size, calls in calls_by_size.items():
        calls["engine"]()
        watch.seconds.clear()
        start = now()
        for _ in range(args.num_repeats):
            calls["engine"]()
        total_s = now() - start
        parts = split_ms(watch, total_s, args.num_repeats)
        split.add_row(
            str(size),
            *(f"{parts[p]:.1f}" for p in PARTS),
            f"{1e3 * total_s / args.num_repeats:.1f}",
        )
    console = Console(width=140)
    console.print(rates)
    console.print(split)
    engine.close()


if __name__ == "__main__":
    main(tyro.cli(Args))
