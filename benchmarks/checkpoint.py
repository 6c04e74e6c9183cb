"""What complete checkpoints cost a running training: steps with one against steps without, in the same run.

    python benchmarks/checkpoint.py                       the quick start's sizes: two ranks, two engines, on CPU
    python benchmarks/checkpoint.py --save_every 5        a checkpoint every five steps instead of every second

Runs the driver. Two things delay training: the copy to CPU memory, for which it waits (time/checkpoint_s of the next
step), and the thread that writes beside the next step. Their sum is given as a share of a step without a checkpoint
and, over all steps, of the training; the bar is 3 %. Steps alternate, so that whatever else the machine does meets both
kinds; on a busy machine the quartiles of the steps without a checkpoint say how much of the difference is noise.
"""

import os
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

from benchmarks.ppo_end_to_end import prepare_model  # noqa: E402
from utils.logging_utils import read_metrics  # noqa: E402


@dataclass(frozen=True)
class Args:
    """Measure the cost of checkpoints."""

    vla_path: str | None = None
    """Model folder. Default: the shipped base model."""
    device: str = "cpu"
    """cpu or cuda."""
    num_steps: int = 14
    """Training steps; the first two are not counted."""
    save_every: int = 2
    """Training steps between checkpoints."""
    num_ranks: int = 2
    """Trainer ranks and engines."""
    num_envs: int = 64
    """Environments in all."""
    rollout_steps: int = 16
    """Actions per environment and training step."""
    full: bool = False
    """Train all weights instead of a LoRA: 12 bytes a parameter instead of a few MiB."""
    extra: str = ""
    """Further flags of the driver, as typed; they win over the benchmark's own."""


def driver_command(args: Args, folder: Path) -> list[str]:
    """The driver's command line; the run's folder is `folder / "run"`."""
    samples, ranks = args.num_envs * args.rollout_steps, args.num_ranks
    flags = {
        "vla_path": args.vla_path or prepare_model(folder), "run_root_dir": folder, "exp_id": "run",
        "task_suite_name": "tabletop", "dataset_name": "tabletop", "device": args.device,
        "actor_num_gpus_per_node": f"[{ranks}]", "vllm_num_engines": ranks, "num_steps": args.rollout_steps,
        "local_rollout_batch_size": args.num_envs // ranks, "total_episodes": samples * args.num_steps,
        "local_mini_batch_size": samples // ranks // 2, "per_device_train_batch_size": 64,
        "save_freq": args.save_every, "keep_last": 2, "num_env_processes": 1,
    }  # fmt: skip
    words = [
        word for name, value in flags.items() for word in (f"--{name}", str(value))
    ] + args.extra.split()
    kind = [] if args.full else ["--use_lora", "--lora_rank", "16", "--freeze_vision_backbone"]
    return [sys.executable, str(ROOT / "ppo_vllm_ray_fsdp_vla.py"), *kind, *words]


def environment(device: str) -> dict[str, str]:
    """The driver's environment: without GPUs for `cpu`."""
    return {**os.environ, **({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})}


def main(args: Args) -> None:
    """Run and print the table."""
    with tempfile.TemporaryDirectory() as name:
        exp_dir = Path(name) / "run"
        subprocess.run(
            driver_command(args, Path(name)), cwd=ROOT, check=True, env=environment(args.device)
        )
        lines = [line for line in read_metrics(exp_dir) if line["step"] > 2]
        state_dir = next(exp_dir.glob("step_*")) / "training_state"
        mib = sum(file.stat().st_size for file in state_dir.iterdir()) / 2**20
    # the step after a checkpoint bears its cost
    after = [line for line in lines if (line["step"] - 1) % args.save_every == 0]
    free = [line["time/step_s"] for line in lines if line not in after]
    waited = statistics.median(line["time/checkpoint_s"] for line in after)
    beside, without = (
        statistics.median(line["time/step_s"] for line in after),
        statistics.median(free),
    )
    low, _, high = statistics.quantiles(free, n=4)
    cost = (waited + beside - without) / without
    columns = (
        "training state",
        "step without (quartiles)",
        "beside the writing",
        "copy",
        "of a step",
        "of training",
    )
    table = Table(*columns)
    table.add_row(
        f"{mib:.0f} MiB", f"{without:.2f} s ({low:.2f} to {high:.2f})", f"{beside:.2f} s", f"{waited:.3f} s",
        f"{100 * cost:+.1f} % ({100 * waited / without:.1f} % waiting)", f"{100 * cost / args.save_every:+.1f} %",
    )  # fmt: skip
    Console(width=160).print(table)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, use_underscores=True))
