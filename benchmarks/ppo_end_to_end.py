"""End-to-end PPO environment steps/s on this machine, and where the time of a training step goes.

    python benchmarks/ppo_end_to_end.py                 the quick start's sizes, two processes of each kind against one
    python benchmarks/ppo_end_to_end.py --num_steps 5   training steps measured (the first one is left out)

Runs the driver itself on the shipped base model (statistics from a made-up range: success does not matter here) in two
layouts: two engines and two FSDP ranks, and one of each with two threads. One table; the last column is the ratio of
environment steps/s to the one-process layout in the same run.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils.logging_utils import read_metrics  # noqa: E402

PHASES = (
    "sync",
    "collect",
    "generate",
    "wait_env",
    "update",
    "trainer_prepare",
    "trainer_value",
    "trainer_policy",
)


@dataclass(frozen=True)
class Args:
    """Measure PPO's training steps in two layouts."""

    num_steps: int = 4
    """Training steps of each layout; the first is not counted."""
    num_envs: int = 64
    """Environments in all."""
    rollout_steps: int = 16
    """Actions per environment and training step."""


def prepare_model(folder: Path) -> Path:
    """A copy of the shipped base model with action statistics, as fine-tuning would leave it."""
    model = folder / "model"
    shutil.copytree(ROOT / "assets" / "tabletop-base", model)
    action = {"q01": [-1.0] * 6 + [0.0], "q99": [1.0] * 7, "mask": [True] * 6 + [False]}
    action |= {"min": action["q01"], "max": action["q99"]}
    content = {"tabletop": {"action": action, "num_transitions": 1, "num_trajectories": 1}}
    (model / "dataset_statistics.json").write_text(json.dumps(content))
    return model


def measure(args: Args, model: Path, folder: Path, processes: int) -> dict[str, float]:
    """Median seconds of each phase over the counted steps of one run."""
    samples = args.num_envs * args.rollout_steps
    flags = {
        "vla_path": model, "run_root_dir": folder, "exp_id": f"processes-{processes}", "task_suite_name": "tabletop",
        "device": "cpu", "actor_num_gpus_per_node": f"[{processes}]", "vllm_num_engines": processes,
        "local_rollout_batch_size": args.num_envs // processes, "num_steps": args.rollout_steps,
        "total_episodes": samples * args.num_steps, "local_mini_batch_size": samples // processes // 2,
        "per_device_train_batch_size": 64, "lora_rank": 16, "trainer_num_threads": 3 - processes,
        "engine_num_threads": 3 - processes, "num_env_processes": 1,
    }  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    command = [
        sys.executable,
        "ppo_vllm_ray_fsdp_vla.py",
        "--use_lora",
        "--freeze_vision_backbone",
        *words,
    ]
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    steps = read_metrics(folder / f"processes-{processes}")[1:]
    names = [f"time/{phase}_s" for phase in PHASES] + ["time/env_steps_per_s"]
    return {name: statistics.median(step.get(name, 0.0) for step in steps) for name in names}


def main(args: Args) -> None:
    """Run both layouts and print the table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = prepare_model(folder)
        results = {n: measure(args, model, folder, n) for n in (1, 2)}
    table = Table(
        "layout",
        *[p.replace("trainer_", "update: ") + " s" for p in PHASES],
        "env steps/s",
        "ratio",
    )
    for processes, result in results.items():
        cells = [f"{result[f'time/{phase}_s']:.2f}" for phase in PHASES]
        rate, reference = result["time/env_steps_per_s"], results[1]["time/env_steps_per_s"]
        label = f"{processes} engine(s), {processes} rank(s)"
        table.add_row(label, *cells, f"{rate:.0f}", f"{rate / reference:.2f}")
    Console(width=180).print(table)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, use_underscores=True))
