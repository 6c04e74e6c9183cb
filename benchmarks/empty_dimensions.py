"""What leaving out the tokens of empty action dimensions (`--ignore_empty_dimensions`) does to PPO on tabletop.

    python benchmarks/empty_dimensions.py --vla_path runs/quickstart/sft                        two CPU cores, seed 0
    python benchmarks/empty_dimensions.py --vla_path DIR --gpus 0 1 2 3 --seeds 0 1 2           six runs, four at a time
    python benchmarks/empty_dimensions.py --vla_path DIR --extra="--total_episodes 6144"        shorter

Each variant and seed is one run of the driver with the settings of scripts/train_tabletop_cpu.sh, from the supervised
policy in --vla_path (scripts/quickstart.sh writes one to RUN_DIR/sft). In the demonstrations of tabletop the hand never
turns: the three rotations have q01 = q99, and their 256 tokens all decode to the same action. With --gpus a trainer and
an engine share one GPU in each run.

Prints one table: a row for each run and the mean of each variant. A finished run in --work_dir is not repeated, so that
a long comparison can be done in several calls with more and more seeds.
    greedy success    of the final policy on the 500 fixed initial states
    sampled success   of the training episodes that ended in the last quarter of the steps
    entropy           nats, sum over the tokens that have a range: in the first and in the last policy update
    empty entropy     the same over the tokens of empty dimensions; unknown where they are left out
    KL                mean and largest train/approx_kl_k3 of the policy updates
"""

import json
import os
import queue
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import numpy as np
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import gpu_end_to_end  # noqa: E402
from benchmarks.gpu_common import describe_hardware, print_table, write_json  # noqa: E402
from ppo.envs.base import get_suite  # noqa: E402
from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig  # noqa: E402
from prismatic.vla.action_normalization import (  # noqa: E402
    constant_dimensions,
    load_norm_stats,
    resolve_unnorm_key,
)
from prismatic.vla.action_tokenizer import ActionTokenizer  # noqa: E402
from utils.logging_utils import read_metrics  # noqa: E402

Variant = Literal["all_tokens", "ignore_empty"]
SUITE = "tabletop"
COLUMNS = ("greedy success", "sampled success", "entropy, first", "entropy, last", "empty entropy, first",
           "empty entropy, last", "KL, mean", "KL, largest", "clip fraction", "minutes")  # fmt: skip


@dataclass(frozen=True)
class Args:
    """Compare PPO with and without the tokens of empty action dimensions."""

    vla_path: Path
    """Folder of the supervised policy that every run starts from."""
    work_dir: Path = Path("runs/empty_dimensions")
    """Gets one folder per run."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of PPO."""
    variants: tuple[Variant, ...] = ("all_tokens", "ignore_empty")
    """What to compare."""
    gpus: tuple[int, ...] = ()
    """Indices of the GPUs to use, one run on each at a time. Default: the CPU, one run at a time."""
    gpu_memory_utilization: float = 0.4
    """The engine's share of its GPU."""
    extra: str = ""
    """Further flags of the driver for every run, as typed: --extra="--lam 0.9"."""
    output: str = ""
    """JSON file for the results."""


def run_flags(args: Args, variant: Variant, seed: int) -> list[str]:
    """The driver's flags for one run, as typed."""
    if args.gpus:
        learn = gpu_end_to_end.Args(gpu_memory_utilization=args.gpu_memory_utilization)
        flags = gpu_end_to_end.layout_flags(learn, "learn")
        flags |= gpu_end_to_end.case_flags(learn, "learn") | {"device": "cuda"}
    else:
        flags = gpu_end_to_end.script_flags() | {"eval_final": True}
    flags |= {
        "vla_path": args.vla_path, "run_root_dir": args.work_dir, "exp_id": f"{variant}_{seed}", "seed": seed,
        "ignore_empty_dimensions": variant == "ignore_empty", "overwrite": True,
    }  # fmt: skip
    return [*gpu_end_to_end.command_line(flags), *args.extra.split()]


def run(args: Args, variant: Variant, seed: int, gpus: "queue.Queue[str]") -> Path | None:
    """Run the driver once on the next free device; returns its folder, None if it failed."""
    folder = args.work_dir / f"{variant}_{seed}"
    if (folder / "eval_final.json").exists():
        print(f"== {folder}: finished before", flush=True)
        return folder
    gpu = gpus.get()
    log = args.work_dir / f"{variant}_{seed}.log"
    command = [sys.executable, "ppo_vllm_ray_fsdp_vla.py", *run_flags(args, variant, seed)]
    started = time.perf_counter()
    with log.open("w") as output:
        done = subprocess.run(
            command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": gpu},
        )  # fmt: skip
    gpus.put(gpu)
    minutes = (time.perf_counter() - started) / 60
    print(f"== {folder}: exit code {done.returncode} after {minutes:.1f} minutes", flush=True)
    if done.returncode:
        print("".join(log.read_text().splitlines(keepends=True)[-30:]), flush=True)
        return None
    (folder / "minutes.json").write_text(json.dumps(minutes))
    return folder


def summarize(folder: Path, is_empty: Sequence[bool]) -> dict[str, float | None]:
    """The table's numbers of a finished run, by column."""
    updates = [line for line in read_metrics(folder) if "train/policy_loss" in line]
    steps = [line for line in read_metrics(folder) if "rollout/num_episodes" in line]
    last = [line for line in steps[-max(1, len(steps) // 4) :] if "rollout/success_rate" in line]
    num_episodes = [line["rollout/num_episodes"] for line in last]
    num_successes = [line["rollout/success_rate"] * line["rollout/num_episodes"] for line in last]

    def entropy(line: dict[str, float], empty: bool) -> float | None:
        names = [f"train/entropy_token_{i}" for i, e in enumerate(is_empty) if e == empty]
        return sum(line[name] for name in names) if all(name in line for name in names) else None

    kls = [line["train/approx_kl_k3"] for line in updates]
    values = (
        json.loads((folder / "eval_final.json").read_text())["overall"]["rate"],
        sum(num_successes) / sum(num_episodes) if num_episodes else None,
        entropy(updates[0], False), entropy(updates[-1], False), entropy(updates[0], True), entropy(updates[-1], True),
        fmean(kls), max(kls), fmean(line["train/clip_fraction"] for line in updates),
        json.loads((folder / "minutes.json").read_text()),
    )  # fmt: skip
    return dict(zip(COLUMNS, values, strict=True))


def mean_of(results: Sequence[dict[str, Any]], column: str) -> float | None:
    """Mean of a column over the runs that have it."""
    values = [result[column] for result in results if result[column] is not None]
    return fmean(values) if values else None


def main(args: Args) -> int:
    """Run what is missing and print the table; 1 if a run failed."""
    norm_stats = load_norm_stats(args.vla_path)
    statistics = norm_stats[resolve_unnorm_key(norm_stats, get_suite(SUITE).name)]["action"]
    tokenizer = ActionTokenizer.from_config(OpenVLAConfig.from_pretrained(args.vla_path))
    is_empty = constant_dimensions(tokenizer, statistics).tolist()
    print(f"tokens of empty dimensions: {np.flatnonzero(is_empty).tolist()}", flush=True)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    gpus: queue.Queue[str] = queue.Queue()
    for gpu in args.gpus or ("",):
        gpus.put(str(gpu))
    jobs = [(variant, seed) for seed in args.seeds for variant in args.variants]
    with ThreadPoolExecutor(max(1, len(args.gpus))) as pool:
        folders = list(pool.map(lambda job: run(args, *job, gpus), jobs))
    results: list[dict[str, Any]] = [
        {"variant": variant, "seed": seed, **summarize(folder, is_empty)}
        for (variant, seed), folder in zip(jobs, folders, strict=True)
        if folder is not None
    ]
    rows = []
    for variant in args.variants:
        mine = [result for result in results if result["variant"] == variant]
        rows += [[variant, result["seed"], *(result[name] for name in COLUMNS)] for result in mine]
        rows.append([variant, "mean", *(mean_of(mine, name) for name in COLUMNS)])
    title = f"PPO from {args.vla_path} with and without tokens of empty dimensions; {describe_hardware()}"
    print_table(title, ["variant", "seed", *COLUMNS], rows, width=160)
    write_json(args.output, "empty_dimensions", results)
    return int(None in folders)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__, use_underscores=True)))
