"""What a killed process costs a running training: the steps that it dies in against the undisturbed ones of the run.

    python benchmarks/faults.py                          a rollout worker (engine and environments), thrice, on CPU
    python benchmarks/faults.py --spare_workers          the same with a spare beside each
    python benchmarks/faults.py --process environments   one of its environment processes

Runs the driver, with the quick start's sizes unless told otherwise, and kills a process with SIGKILL: by default a
third of a step after a step has begun, near the end of the rollout or soon after. A step that loses its worker has to
wait until another one is started, has its weights and has brought the environments back to where the rollout began, and
then repeats the rollout; the bar is one step of time more.

openvla-7b's shape on two GPUs, killed in a rollout and in an update: bash benchmarks/gpu_node.sh model fault_costs
"""

import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
import tyro
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import checkpoint  # noqa: E402
from utils.logging_utils import read_metrics  # noqa: E402

ENVIRONMENTS = "ppo.envs.vector_worker"
# Title of the process, and the metric that counts those replaced so far.
KINDS = {
    "worker": ("RolloutWorker", "rollout/num_replaced_workers"),
    "environments": (ENVIRONMENTS, "rollout/num_env_replaced"),
}
POLL_S = 0.05


@dataclass(frozen=True)
class Args(checkpoint.Args):
    """Measure the cost of faults."""

    process: Literal["worker", "environments"] = "worker"
    """What is killed."""
    spare_workers: bool = False
    """Keep a process with all imports beside each worker, as the driver's flag of that name."""
    at: tuple[float, ...] = (5.33, 8.33, 11.33)
    """When, in training steps: 5.33 is a third of a step after step 5 has begun. None in the first three."""
    num_steps: int = 13
    """Training steps; the first two are not counted."""
    save_every: int = 0
    """Training steps between checkpoints; 0: none."""


def kill_one(driver: psutil.Process, title: str) -> None:
    """SIGKILL to the first process of the run whose command line has `title`; not to a spare, which has no child."""
    for process in driver.children(recursive=True):
        try:
            if title in " ".join(process.cmdline()) and (
                title == ENVIRONMENTS or process.children()
            ):
                process.kill()
                return
        except psutil.Error:
            continue  # gone meanwhile
    raise RuntimeError(f"the run has no process {title}")


def disturb(run: "subprocess.Popen[bytes]", exp_dir: Path, args: Args) -> None:
    """Kill when `args.at` says, by the time that a step usually takes."""
    driver = psutil.Process(run.pid)
    for at in args.at:
        step = int(at)
        while (
            len(lines := read_metrics(exp_dir) if (exp_dir / "metrics.jsonl").exists() else [])
            < step - 1
        ):
            if run.poll() is not None:
                raise RuntimeError(f"the run ended with {run.returncode} before step {step}")
            time.sleep(POLL_S)
        time.sleep(statistics.median(line["time/step_s"] for line in lines[2:]) * (at - step))
        kill_one(driver, KINDS[args.process][0])


def main(args: Args) -> None:
    """Run and print the table."""
    with tempfile.TemporaryDirectory() as name:
        command, exp_dir = checkpoint.driver_command(args, Path(name)), Path(name) / "run"
        command += ["--spare_workers"] if args.spare_workers else []
        run = subprocess.Popen(command, cwd=ROOT, env=checkpoint.environment(args.device))
        try:
            disturb(run, exp_dir, args)
            if run.wait() != 0:
                raise RuntimeError(f"the run ended with {run.returncode}")
        finally:
            run.terminate()
            run.wait()
        lines = read_metrics(exp_dir)
    steps = {int(line["step"]): line["time/step_s"] for line in lines}
    num_replaced = int(lines[-1][KINDS[args.process][1]])
    if num_replaced != len(args.at):
        raise RuntimeError(f"{num_replaced} were replaced, {len(args.at)} killed")
    # who dies during an update is missed in the next rollout: both steps count as disturbed
    at_steps = [int(at) for at in args.at]
    hit = {step + later for step in at_steps for later in (0, 1)}
    free = [seconds for step, seconds in steps.items() if step > 2 and step not in hit]
    usual = statistics.median(free)
    costs = [steps[step] + steps.get(step + 1, usual) - 2 * usual for step in at_steps]
    # the delay alone: in whichever step it was noticed; the rest is what the new process takes from the others
    at = {int(line["step"]): line["time/collect_s"] + line["time/sync_s"] for line in lines}
    usual_at = statistics.median(
        seconds for step, seconds in at.items() if step > 2 and step not in hit
    )
    delays = [max(at[step], at.get(step + 1, 0.0)) - usual_at for step in at_steps]
    table = Table(
        "killed",
        "step (quartiles)",
        "cost of each",
        "median",
        "in steps",
        "delay of rollout",
        "in steps",
    )
    low, _, high = statistics.quantiles(free, n=4)
    table.add_row(
        args.process, f"{usual:.1f} s ({low:.1f} to {high:.1f})", ", ".join(f"{cost:.1f}" for cost in costs) + " s",
        f"{statistics.median(costs):.1f} s", f"{statistics.median(costs) / usual:.2f}",
        ", ".join(f"{delay:.1f}" for delay in delays) + " s", f"{statistics.median(delays) / usual:.2f}",
    )  # fmt: skip
    Console(width=140).print(table)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, use_underscores=True))
