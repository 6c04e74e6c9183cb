"""What limits a rollout on LIBERO: the simulators alone, the engine alone, and both together as PPO collects.

    python benchmarks/libero_rollout.py --env_gpu_id 0 --num_processes 16 32 --qualities none fast eval
    python benchmarks/libero_rollout.py --vla_path SFT --env_gpu_id 0       with the engine on that GPU
    CUDA_VISIBLE_DEVICES=1 python benchmarks/libero_rollout.py --vla_path SFT --env_gpu_id 0       and on another one

The simulators alone are given random actions at once, so they are never waited for; they step as in training (quick
physics, episodes of random tasks with their resets, two groups that take turns). The engine alone acts on the images of
a first reset. Together they are `ppo.collector.Collector`. Ratios are to the smaller of the two alone. Every number is
taken after `--num_warmup` steps, in which each process makes its tasks' simulators.
"""

import os
import sys
import time
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import tyro
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ppo.collector import Collector  # noqa: E402
from ppo.envs.base import get_suite  # noqa: E402
from ppo.envs.vector import VectorEnv  # noqa: E402

Quality = Literal["none", "fast", "eval"]
NUM_ACTION_TOKENS = 7
TIME_LIMIT = 140
ALL_CORES = os.sched_getaffinity(0)


@dataclass(frozen=True)
class Args:
    """What to measure."""

    task_suite_name: str = "libero_spatial"
    """Suite."""
    vla_path: str | None = None
    """Model folder of the engine. Default: only the simulators."""
    num_envs: int = 128
    """Environments."""
    num_groups: int = 2
    """Groups that take turns: one steps while the policy acts for another."""
    num_processes: tuple[int, ...] = (16, 32)
    """Numbers of processes to try."""
    qualities: tuple[Quality, ...] = ("none", "eval")
    """Drawings to try, none: black images. With the engine the last one counts."""
    num_warmup: int = 64
    """Steps of each environment that are not timed."""
    num_steps: int = 64
    """Steps of each environment that are timed."""
    image_size: int = 140
    """Side of the images in pixels; the model's with --vla_path."""
    env_gpu_id: tuple[int, ...] = ()
    """GPUs whose turns it is to draw (EGL's numbers). Default: what MUJOCO_GL says, else osmesa."""
    gpu_memory_utilization: float = 0.1
    """The engine's share of its GPU."""
    num_reserved_cores: int = 0
    """So many of the cores are for this process, the engine's, alone; two threads of a core are two."""


@dataclass(frozen=True)
class Actions:
    """A `ppo.collector.Generation`."""

    token_ids: np.ndarray
    logprobs: np.ndarray


class RandomPolicy:
    """Smooth random motion, at no cost."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)

    def generate(self, prompt_ids: list[list[int]], images: np.ndarray) -> Actions:
        """Tokens that nobody decodes."""
        shape = (len(images), NUM_ACTION_TOKENS)
        return Actions(np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.float32))

    def decode(self, token_ids_BA: np.ndarray) -> np.ndarray:
        """Raw actions (B, 7)."""
        actions = self.rng.uniform(-0.4, 0.4, token_ids_BA.shape).astype(np.float32)
        actions[:, 6] = -1.0
        return actions


class EnginePolicy:
    """The vLLM engine, sampling at temperature 1."""

    def __init__(self, args: Args) -> None:
        import torch

        from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig
        from prismatic.extern.hf.processing_prismatic import load_processor
        from prismatic.vla.action_normalization import (
            load_norm_stats,
            resolve_unnorm_key,
            tokens_to_env_actions,
        )
        from prismatic.vla.action_tokenizer import ActionTokenizer
        from utils.vllm_utils import ActionEngine, EngineConfig

        assert args.vla_path is not None
        has_gpu = torch.cuda.is_available()
        self.processor = load_processor(args.vla_path)
        statistics = load_norm_stats(args.vla_path)
        self.statistics = statistics[resolve_unnorm_key(statistics, args.task_suite_name, None)][
            "action"
        ]
        self.tokenizer = ActionTokenizer.from_config(OpenVLAConfig.from_pretrained(args.vla_path))
        self.to_actions = tokens_to_env_actions
        self.engine = ActionEngine(
            EngineConfig(
                model_dir=args.vla_path, dtype="bfloat16" if has_gpu else "float32", enforce_eager=not has_gpu,
                gpu_memory_utilization=args.gpu_memory_utilization, max_num_seqs=args.num_envs,
            )
        )  # fmt: skip

    def generate(self, prompt_ids: list[list[int]], images: np.ndarray) -> Any:
        """Sampled actions."""
        return self.engine.generate(prompt_ids, images, temperature=1.0, seed=0)

    def decode(self, token_ids_BA: np.ndarray) -> np.ndarray:
        """Raw actions (B, 7)."""
        return self.to_actions(token_ids_BA, self.tokenizer, self.statistics)


def collecting(
    args: Args, policy: Any, prompts: list[list[int]], processes: int, quality: Quality
) -> list[float]:
    """Env steps/s, and of a step of all groups the ms in the policy and waiting for simulators."""
    os.sched_setaffinity(0, ALL_CORES)  # what the simulators' processes begin with
    suite = get_suite(args.task_suite_name)
    options: dict[str, Any] = {"images": False}
    if quality != "none":
        options = {"env_gpu_id": args.env_gpu_id or None, "render_quality": quality}
    with VectorEnv(
        args.task_suite_name, args.num_envs, num_processes=processes, image_size=args.image_size, max_steps=TIME_LIMIT,
        startup_timeout_s=300, step_timeout_s=300, env_kwargs=suite.training_options(options),
    ) as vector:  # fmt: skip
        keep_apart(args.num_reserved_cores)
        collector = Collector(
            vector, prompts, policy.generate, policy.decode, num_groups=args.num_groups, seed=(0,),
            time_limit=TIME_LIMIT,
        )  # fmt: skip
        tasks = cycle(range(suite.num_tasks))
        collector.collect(args.num_warmup, tasks)
        started = time.perf_counter()
        collector.collect(args.num_steps, tasks)
        seconds = time.perf_counter() - started
    parts = [1000 * s / args.num_steps for s in (collector.generate_s, collector.wait_env_s)]
    return [args.num_envs * args.num_steps / seconds, *parts]


def keep_apart(num_reserved: int) -> None:
    """Put this process on the first `num_reserved` cores and its children on the others."""
    cores = sorted(os.sched_getaffinity(0))
    if not num_reserved:
        return
    for child in psutil.Process().children(recursive=True):
        child.cpu_affinity(cores[num_reserved:])
    os.sched_setaffinity(0, cores[:num_reserved])


def acting(args: Args, policy: EnginePolicy, prompts: list[list[int]]) -> float:
    """Actions/s of the engine alone, in calls for one group."""
    size = args.num_envs // args.num_groups
    images = np.random.default_rng(0).integers(
        0, 256, (size, args.image_size, args.image_size, 3), dtype=np.uint8
    )
    called = [prompts[i % len(prompts)] for i in range(size)]
    for _ in range(5):
        policy.generate(called, images)
    started = time.perf_counter()
    for _ in range(20):
        policy.generate(called, images)
    return 20 * size / (time.perf_counter() - started)


def main(args: Args) -> None:
    """Measure and print the table."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    suite = get_suite(args.task_suite_name)
    prompts = [[0]] * suite.num_tasks
    table = Table(
        title=f"{args.num_envs} environments in {args.num_groups} groups, {len(ALL_CORES)} cores, "
        f"{args.num_reserved_cores} for the engine alone"
    )
    for column in (
        "what",
        "processes",
        "drawing",
        "env steps/s",
        "ratio",
        "policy ms",
        "waiting ms",
    ):
        table.add_column(column, justify="left" if column == "what" else "right")
    rates = {}
    for quality in args.qualities:
        for processes in args.num_processes:
            rate, *parts = collecting(args, RandomPolicy(), prompts, processes, quality)
            rates[processes] = rate
            cells = [f"{x:.1f}" for x in parts]
            table.add_row("simulators", str(processes), quality, f"{rate:.0f}", "", *cells)
    if args.vla_path is not None:
        policy = EnginePolicy(args)
        args = replace(args, image_size=policy.processor.image_processor.image_size[0])
        prompts = [policy.processor.prompt_ids(text) for text in suite.instructions]
        alone = acting(args, policy, prompts)
        table.add_row(
            "engine", "", "", f"{alone:.0f}", "", f"{1000 * args.num_envs / alone:.1f}", ""
        )
        for processes in args.num_processes:
            rate, *parts = collecting(args, policy, prompts, processes, args.qualities[-1])
            ratio = rate / min(alone, rates[processes])
            cells = [f"{x:.1f}" for x in parts]
            table.add_row(
                "both", str(processes), args.qualities[-1], f"{rate:.0f}", f"{ratio:.2f}", *cells
            )
    Console(width=120).print(table)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, use_underscores=True))
