"""Whether PPO on LIBERO runs in every layout that scripts/train_libero.sh has for four GPUs, and which GPUs draw.

    python benchmarks/libero_layouts.py --output runs/layouts                 on a node with four GPUs, 7 to 8 minutes
    python benchmarks/libero_layouts.py --gpus 0 1 --output runs/layouts      the layouts that two GPUs hold

Each layout is a short run of scripts/train_libero_spatial.sh with a small random policy, a few environments and three
training steps; only the placement is of interest. Layouts that need few GPUs run side by side. A layout is ok if it
ends well with all steps and draws on the GPUs that it should draw on: `told` are the numbers in the run's log, `mapped`
those whose device memory the environment processes were seen to map (/proc/PID/maps). Logs are in the output folder.
"""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import tyro
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils.gpu_sampling import read_samples, sampling  # noqa: E402
from utils.logging_utils import get_logger, read_metrics  # noqa: E402

logger = get_logger(__name__)

NUM_TRAINING_STEPS = 3


@dataclass(frozen=True)
class Args:
    """What to run."""

    output: Path = Path("runs/libero_layouts")
    """Folder for the logs, the runs and `layouts.json`."""
    gpus: tuple[int, ...] = (0, 1, 2, 3)
    """GPUs to use, by nvidia-smi's numbers."""
    only: tuple[str, ...] = ()
    """Names of layouts to run, as in the table. Default: all that fit."""
    num_envs: int = 12
    """Environments of each engine; must divide among 1, 2, 3 and 4 trainers."""
    num_steps: int = 8
    """Environment steps of each environment and training step."""
    limit_s: float = 560.0
    """Time for everything; layouts that have not started by then are not run."""
    run_limit_s: float = 170.0
    """Time for one layout."""
    vla_path: Path | None = None
    """Model folder with action statistics for libero_spatial. Default: a random one of 25 M parameters."""
    flags: str = ""
    """More flags of the driver for all layouts, as one word: --flags="--num_env_processes 4"."""


@dataclass(frozen=True)
class Layout:
    """A way to share GPUs.

    Attributes:
        kind: LAYOUT of train_libero.sh.
        num_gpus: GPUs it is given.
        trainers: expected number of trainers.
        engines: expected number of engines.
        flags: more flags of the driver; `{first}`, `{last}` and `{all}` stand for GPU numbers.
        draws: `engines`: as many of the GPUs as there are engines; else the GPU numbers, as in `flags`.
    """

    name: str
    kind: str
    num_gpus: int
    trainers: int
    engines: int
    flags: str = ""
    draws: str = "engines"


LAYOUTS = (
    Layout("colocate 4", "colocate", 4, 4, 4),
    Layout("separate 3|1", "separate", 4, 3, 1),
    Layout("separate 2|2", "separate", 4, 2, 2, "--actor_num_gpus_per_node [2] --vllm_num_engines 2"),
    Layout("colocate 3", "colocate", 3, 3, 3),
    Layout("colocate 1", "colocate", 1, 1, 1),
    Layout("separate 2|1", "separate", 3, 2, 1),
    Layout("colocate 1, GPU given", "colocate", 1, 1, 1, "--env_gpu_id {all}", "{all}"),
    Layout("colocate 2", "colocate", 2, 2, 2),
    Layout("separate 1|1", "separate", 2, 1, 1),
    Layout("colocate 2, first GPU", "colocate", 2, 2, 2, "--env_gpu_id {first}", "{first}"),
    Layout("separate 1|1, both", "separate", 2, 1, 1, "--env_gpu_id {all}", "{all}"),
)  # fmt: skip


@dataclass
class Run:
    """A layout on certain GPUs, under way or finished."""

    layout: Layout
    gpus: tuple[int, ...]
    folder: Path
    process: "subprocess.Popen[bytes]"
    started_s: float = field(default_factory=time.time)
    ended_s: float = 0.0
    code: int | None = None
    mapped: dict[int, set[int]] = field(
        default_factory=dict
    )  # environment process -> device minors


def fill(text: str, gpus: Sequence[int]) -> str:
    """`{first}`, `{last}` and `{all}` replaced by GPU numbers."""
    return text.format(first=gpus[0], last=gpus[-1], all=" ".join(map(str, gpus)))


def make_policy(folder: Path) -> Path:
    """A random policy of 25 M parameters with action statistics for libero_spatial."""
    from prismatic.extern.hf.random_prismatic import save_random_vla

    save_random_vla("small", str(folder), 0)
    low, high = [-0.8, -0.8, -0.9, -0.1, -0.2, -0.2, 0.0], [0.9, 0.8, 0.9, 0.1, 0.2, 0.2, 1.0]
    action = {"q01": low, "q99": high, "min": low, "max": high, "mask": [True] * 6 + [False]}
    entry = {"action": action, "num_transitions": 100, "num_trajectories": 10}
    file = folder / "dataset_statistics.json"
    file.write_text(json.dumps({"libero_spatial": entry}))
    return folder


def start(layout: Layout, gpus: tuple[int, ...], vla_path: Path, args: Args) -> Run:
    """Start a layout; its output goes to `log.txt`."""
    folder = args.output.resolve() / re.sub(r"\W+", "_", layout.name)
    folder.mkdir(parents=True, exist_ok=True)
    samples = args.num_envs * args.num_steps * layout.engines
    flags = {
        "run_root_dir": folder, "exp_id": "run", "local_rollout_batch_size": args.num_envs, "num_steps": args.num_steps,
        "local_mini_batch_size": samples // layout.trainers, "per_device_train_batch_size": 8, "value_init_steps": 1,
        "total_episodes": samples * NUM_TRAINING_STEPS, "save_freq": 0,
    }  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "RAY_DEDUP_LOGS": "0",  # lines of several engines that differ in a GPU's number
        "LAYOUT": layout.kind,
        "VLA_PATH": str(vla_path.resolve()),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    command = ["bash", "scripts/train_libero_spatial.sh", ",".join(map(str, gpus)), "0,1", *words]
    command += ["--overwrite", "--vllm_enforce_eager", *fill(layout.flags, gpus).split()]
    command += args.flags.split()
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
        )
    return Run(layout, gpus, folder, process)


def note_mapped(run: Run) -> None:
    """Add what the run's environment processes map of /dev/nvidiaN now."""
    try:
        children = psutil.Process(run.process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return
    for child in children:
        try:
            if not any("ppo.envs.vector_worker" in word for word in child.cmdline()):
                continue
            maps = Path(f"/proc/{child.pid}/maps").read_text()
        except (psutil.Error, OSError):
            continue
        minors = {int(n) for n in re.findall(r"/dev/nvidia(\d+)$", maps, flags=re.M)}
        run.mapped.setdefault(child.pid, set()).update(minors)


def end(run: Run) -> None:
    """End a run that takes too long, with all that it started."""
    children = psutil.Process(run.process.pid).children(recursive=True)
    for process in (*children, psutil.Process(run.process.pid)):
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    run.process.wait()


def indices_of_minors() -> dict[int, int]:
    """nvidia-smi's number of each GPU by the N of its /dev/nvidiaN."""
    if shutil.which("nvidia-smi") is None:
        return {}
    listed = subprocess.run(["nvidia-smi", "-q"], capture_output=True, text=True).stdout
    minors = re.findall(r"Minor Number\s*: (\d+)", listed)
    return {int(minor): index for index, minor in enumerate(minors)}


def result_of(run: Run, minors: dict[int, int], args: Args) -> dict[str, Any]:
    """The row of a finished run."""
    log = (run.folder / "log.txt").read_text(errors="replace")
    told = {
        int(gpu)
        for numbers in re.findall(r"processes draw on GPU ([\d, ]+) \(EGL", log)
        for gpu in numbers.split(",")
    }
    mapped = {minors.get(minor, minor) for seen in run.mapped.values() for minor in seen}
    file = run.folder / "run"
    metrics = read_metrics(file) if (file / "metrics.jsonl").exists() else []
    steps = [line for line in metrics if "time/env_steps_per_s" in line]
    problems = []
    if run.code != 0:
        problems.append("over its time" if run.code is None else f"exit code {run.code}")
    if len(steps) != NUM_TRAINING_STEPS:
        problems.append(f"{len(steps)} of {NUM_TRAINING_STEPS} steps")
    if run.layout.draws == "engines":
        is_right, wanted = len(told) == run.layout.engines and told <= set(run.gpus), "own GPUs"
    else:
        wanted = fill(run.layout.draws, run.gpus)
        is_right = told == set(map(int, wanted.split()))
    if not is_right:
        problems.append(f"draws on {sorted(told)}, wanted {wanted}")
    if mapped and not told <= mapped:
        problems.append(f"maps {sorted(mapped)}")
    last = steps[1:] or steps
    samples = run.layout.engines * args.num_envs * args.num_steps
    collect_s = [line["time/collect_s"] for line in last]
    used = [
        s for s in read_samples(args.output / "gpu.csv") if run.started_s <= s.time_s <= run.ended_s
    ]
    peak = {
        gpu: max((s.memory_mib for s in used if s.gpu == gpu), default=0.0) / 1024
        for gpu in run.gpus
    }
    return {
        "layout": run.layout.name,
        "gpus": list(run.gpus),
        "result": "; ".join(problems) or "ok",
        "told": sorted(told),
        "mapped": sorted(mapped),
        "num_env_processes": len(run.mapped),
        "wall_s": run.ended_s - run.started_s,
        "env_steps_per_s": statistics.median(m["time/env_steps_per_s"] for m in last)
        if last
        else None,
        "collect_env_steps_per_s": samples / statistics.median(collect_s) if last else None,
        "environments_gib": max((m["mem/environments_gib"] for m in steps), default=None),
        "gpu_gib": peak,
    }


def run_all(args: Args, layouts: Sequence[Layout], vla_path: Path) -> list[Run]:
    """Run the layouts, each on the lowest free GPUs, largest first; returns the runs that were started."""
    deadline = time.time() + args.limit_s
    waiting, finished = list(layouts), []
    running: list[Run] = []
    while waiting or running:
        free = [gpu for gpu in args.gpus if not any(gpu in run.gpus for run in running)]
        fitting = [layout for layout in waiting if layout.num_gpus <= len(free)]
        if fitting and time.time() < deadline - 30:
            layout = fitting[0]
            waiting.remove(layout)
            running.append(start(layout, tuple(free[: layout.num_gpus]), vla_path, args))
            continue
        if not running:
            break
        time.sleep(1.0)
        for run in list(running):
            note_mapped(run)
            run.code = run.process.poll()
            is_late = time.time() > min(run.started_s + args.run_limit_s, deadline)
            if run.code is None and is_late:
                end(run)
            elif run.code is None:
                continue
            run.ended_s = time.time()
            running.remove(run)
            finished.append(run)
            seconds = run.ended_s - run.started_s
            logger.info(f"{run.layout.name}: exit code {run.code} after {seconds:.0f} s")
    return finished


def main(args: Args) -> None:
    """Run the layouts and print the table; exit code 1 unless all are ok."""
    fitting = [
        x
        for x in LAYOUTS
        if x.num_gpus <= len(args.gpus) and (not args.only or x.name in args.only)
    ]
    args.output.mkdir(parents=True, exist_ok=True)
    vla_path = args.vla_path or make_policy(args.output / f"model-{int(time.time())}")
    memory_file = args.output / "gpu.csv"
    memory_file.unlink(missing_ok=True)
    with sampling(args.gpus, memory_file):
        runs = run_all(args, fitting, vla_path)
    minors = indices_of_minors()
    rows = [result_of(run, minors, args) for run in runs]
    done = {row["layout"] for row in rows}
    (args.output / "layouts.json").write_text(json.dumps(rows, indent=2))
    table = Table(title=f"{args.num_envs} environments x {args.num_steps} steps an engine")
    columns = "layout, GPUs, told, mapped, processes, env steps/s, collecting, envs GiB, GPU GiB, s, result"
    for column in columns.split(", "):
        table.add_column(column)

    def show(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f}"

    for row in rows:
        table.add_row(
            row["layout"], *(" ".join(map(str, row[name])) or "-" for name in ("gpus", "told", "mapped")),
            str(row["num_env_processes"]), show(row["env_steps_per_s"]), show(row["collect_env_steps_per_s"]),
            show(row["environments_gib"]), " ".join(f"{gib:.0f}" for gib in row["gpu_gib"].values()),
            f"{row['wall_s']:.0f}", row["result"],
        )  # fmt: skip
    for layout in fitting:
        if layout.name not in done:
            table.add_row(layout.name, *["-"] * 9, "not run: no time left")
    Console(width=170).print(table)
    sys.exit(0 if len(done) == len(fitting) and all(row["result"] == "ok" for row in rows) else 1)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, use_underscores=True))
