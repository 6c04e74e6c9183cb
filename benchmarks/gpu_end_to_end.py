"""End-to-end PPO on GPUs: environment steps/s of each layout and where the time goes; or a whole run that learns.

    python benchmarks/gpu_end_to_end.py --size 7b --cases lockstep groups sleep async      on one GPU: all colocated
    python benchmarks/gpu_end_to_end.py --size 7b --num_gpus 2 --cases lockstep async sleep    on two GPUs
    python benchmarks/gpu_end_to_end.py --vla_path runs/quickstart/sft --cases learn       the quick start's PPO
    python benchmarks/gpu_end_to_end.py --size tiny --device cpu --cases lockstep groups async

The driver itself runs on the tabletop, so that the simulator is not the limit. Cases:
    lockstep  generate, step all environments, generate, ...; then the update
    groups    two groups of environments: one is stepped while the engine generates for the other; then the update
    sleep     groups, a trainer and an engine on every GPU, the engine giving its memory back during the update
    async     groups, and the next rollout is collected during the update (--async_depth 1)
    learn     the flags of scripts/train_tabletop_cpu.sh on the GPU, with the final evaluation
With several GPUs one has the engine and the others train, but for `sleep`. Environments, samples and minibatches are
the same in all cases. Figures are medians over the training steps after the second; "GPUs busy" is the share of all
GPUs' time in which an engine generates or a trainer updates; the ratio is to `lockstep`.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu_common import describe_hardware, ensure_model, print_table, write_json  # noqa: E402
from utils.logging_utils import read_metrics  # noqa: E402

Case = Literal["lockstep", "groups", "sleep", "async", "learn"]
PHASES = ("sync", "collect", "generate", "wait_env", "update")
BUSY = ("trainer_busy_fraction", "worker_busy_fraction", "engine_busy_fraction")
NUM_SKIPPED_STEPS = 2  # compilation and first allocations


@dataclass(frozen=True)
class Args:
    """Measure training steps of the driver."""

    size: Literal["tiny", "small", "7b"] = "tiny"
    """Random weights of this size, made if --vla_path is not given."""
    vla_path: str = ""
    """Model folder (default: made in --work_dir)."""
    work_dir: str = "runs/gpu_end_to_end"
    """Where models and runs go."""
    cases: tuple[Case, ...] = ("lockstep", "groups", "async")
    """What to run, see above."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Where trainers and engine run."""
    num_gpus: int = 1
    """1: trainer and engine share it (--colocate). More: see above."""
    num_envs: int = 64
    """Environments, all engines together."""
    rollout_steps: int = 16
    """Actions per environment and training step."""
    train_steps: int = 6
    """Training steps of each case (not of `learn`)."""
    mini_batch_size: int = 256
    """Samples per optimizer step, all ranks together."""
    micro_batch_size: int = 32
    """Samples per forward and backward pass."""
    gpu_memory_utilization: float = 0.4
    """The engine's share of a shared GPU."""
    extra: str = ""
    """Further flags of the driver for every case, as typed."""
    output: str = ""
    """JSON file for the results."""


def layout(args: Args, case: Case) -> tuple[int, int]:
    """Trainers and engines of a case."""
    if args.device == "cpu" or args.num_gpus == 1:
        return 1, 1
    return (args.num_gpus, args.num_gpus) if case == "sleep" else (args.num_gpus - 1, 1)


def layout_flags(args: Args, case: Case) -> dict[str, Any]:
    """Flags of the device and its processes."""
    trainers, engines = layout(args, case)
    flags: dict[str, Any] = {
        "actor_num_gpus_per_node": f"[{trainers}]",
        "vllm_num_engines": engines,
    }
    if args.device == "cpu":
        return flags | {"device": "cpu"}
    if trainers + engines > args.num_gpus:
        flags |= {"colocate": True, "gpu_memory_utilization": args.gpu_memory_utilization}
    return flags


def script_flags() -> dict[str, Any]:
    """The flags of the quick start's launch script; True for those without a value."""
    script = (ROOT / "scripts/train_tabletop_cpu.sh").read_text()
    words = re.findall(r"^    --(\w+)(?: (\S+))? \\$", script, flags=re.M)
    return {name: value.strip('"') or True for name, value in words}


def case_flags(args: Args, case: Case) -> dict[str, Any]:
    """Flags of one case."""
    if case == "learn":
        flags = script_flags()
        # One trainer and one engine on a GPU do what two of each do there: the same samples in the same minibatches.
        mini, envs, processes = (
            int(flags["local_mini_batch_size"]),
            int(flags["local_rollout_batch_size"]),
            2,
        )
        gone = ("device", "actor_num_gpus_per_node", "vllm_num_engines", "num_env_processes")
        flags = {name: value for name, value in flags.items() if name not in gone}
        trainers, engines = layout(args, case)
        flags |= {"local_mini_batch_size": mini * processes // trainers}
        flags |= {"local_rollout_batch_size": envs * processes // engines}
        return flags | {
            "per_device_train_batch_size": 128,
            "num_env_processes": 4,
            "eval_final": True,
        }
    samples, (trainers, engines) = args.num_envs * args.rollout_steps, layout(args, case)
    return {
        "total_episodes": samples * args.train_steps, "num_steps": args.rollout_steps,
        "local_rollout_batch_size": args.num_envs // engines, "num_env_processes": 4,
        "local_mini_batch_size": args.mini_batch_size // trainers,
        "per_device_train_batch_size": args.micro_batch_size, "value_init_steps": 0,
        "use_lora": True, "lora_rank": 32, "freeze_vision_backbone": True,
        "num_env_groups": 1 if case == "lockstep" else 2, "async_depth": int(case == "async"),
        "vllm_enable_sleep": case == "sleep",
    }  # fmt: skip


def command_line(flags: dict[str, Any]) -> list[str]:
    """{"lr": 0.1, "use_lora": True, "offload": False} -> --lr 0.1 --use_lora --no_offload."""
    words = []
    for name, value in flags.items():
        words += (
            [f"--{'' if value else 'no_'}{name}"]
            if isinstance(value, bool)
            else [f"--{name}", str(value)]
        )
    return words


def run_case(args: Args, case: Case, model: str) -> dict[str, Any]:
    """Run the driver once and return its medians; the whole log is in the run's folder."""
    flags = {
        "vla_path": model,
        "run_root_dir": args.work_dir,
        "exp_id": case,
        "task_suite_name": "tabletop",
    }
    words = command_line(flags | layout_flags(args, case) | case_flags(args, case)) + [
        "--overwrite",
        *args.extra.split(),
    ]
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as log:
        done = subprocess.run(
            [sys.executable, "ppo_vllm_ray_fsdp_vla.py", *words], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        log.seek(0)
        output = log.read()
    folder = Path(args.work_dir) / case
    if done.returncode != 0:
        return {"case": case, "error": output[-3000:]}
    (folder / "output.txt").write_text(output)
    metrics = [line for line in read_metrics(folder) if "time/step_s" in line]
    counted = metrics[NUM_SKIPPED_STEPS:] or metrics
    names = (
        [f"time/{p}_s" for p in ("step", *PHASES)]
        + [f"time/{b}" for b in BUSY]
        + ["time/env_steps_per_s"]
    )
    names += ["train/engine_logprob_abs_diff", "train/ratio_mean", "mem/trainer_peak_gib"]
    result: dict[str, Any] = {
        "case": case,
        "wall_s": time.perf_counter() - started,
        "num_steps": len(counted),
    }
    result |= {
        n: statistics.median(m[n] for m in counted if n in m)
        for n in names
        if any(n in m for m in counted)
    }
    trainers, engines = layout(args, case)
    busy = (
        trainers * result["time/trainer_busy_fraction"]
        + engines * result["time/engine_busy_fraction"]
    )
    result["gpus_busy_fraction"] = busy / args.num_gpus
    if case == "learn":
        overall = json.loads((folder / "eval_final.json").read_text())["overall"]
        result |= {"success_rate": overall["rate"], "num_episodes": overall["episodes"]}
        result["curve"] = [
            (m["time/env_steps_total"], m.get("rollout/success_rate")) for m in metrics
        ]
    return result


def main(args: Args) -> int:
    """Run every case and print the table; 1 if a case failed."""
    model = args.vla_path or ensure_model(
        str(Path(args.work_dir) / f"model_{args.size}"), args.size
    )
    results = [run_case(args, case, model) for case in args.cases]
    rates = {r["case"]: r["time/env_steps_per_s"] for r in results if "error" not in r}
    rows = []
    for r in results:
        if "error" in r:
            print(f"== {r['case']} failed:\n{r['error']}", flush=True)
            continue
        seconds = [r[f"time/{phase}_s"] for phase in PHASES]
        busy = [*(r[f"time/{name}"] for name in BUSY), r["gpus_busy_fraction"]]
        ratio = rates[r["case"]] / rates["lockstep"] if "lockstep" in rates else None
        agreement = [r.get("train/engine_logprob_abs_diff"), r["mem/trainer_peak_gib"]]
        rows.append(
            [
                r["case"],
                *seconds,
                *busy,
                r["time/env_steps_per_s"],
                ratio,
                *agreement,
                r.get("success_rate"),
            ]
        )
    columns = [f"{phase} s" for phase in PHASES] + [
        "trainer busy",
        "worker busy",
        "engine busy",
        "GPUs busy",
    ]
    title = (
        f"{model}, {args.num_envs} environments x {args.rollout_steps} steps; {describe_hardware()}"
    )
    print_table(
        title,
        ["case", *columns, "env steps/s", "ratio", "|d log-prob|", "peak GiB", "success"],
        rows,
        width=180,
    )
    write_json(args.output, "gpu_end_to_end", results)
    return int(any("error" in r for r in results))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__, use_underscores=True)))
