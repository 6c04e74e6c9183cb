"""The fault matrix: each process of a run is killed or stopped in the middle of a training step, and the run ends well.

Real Ray, FSDP, vLLM on CPUs. What is repeated after a fault gives the same metrics and weights as a run without one.
The rows about numbers are in tests/ppo/test_trainer_state.py, those about files in tests/test_malformed_files.py and
tests/utils/test_checkpoint_utils.py.
"""

import dataclasses
import random
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

import ppo_vllm_ray_fsdp_vla as driver
from ppo.resume import checkpoint_problems
from tests.shared_memory import left_in_shared_memory, shared_memory
from tests.test_driver import ROOT, command_line, run_environment
from tests.test_resume_run import NUM_STEPS, assert_equal_runs, run_args
from utils.logging_utils import read_metrics

TIMEOUT_S = 2000
# Environment steps (64 a training step) after which the first and the second step's rollouts are under way or done.
ROLLOUT, UPDATE = 80, 128
# What differs between two equal runs, and what counts the faults.
NOT_COMPARED = ("time/", "mem/", "rollout/num_replaced", "sync/")


@dataclass(frozen=True)
class Fault:
    """One row: which process is hit, when, and what the log says then.

    Attributes:
        process: part of the title or command line; "" is the driver.
        at_env_steps: when it is hit.
        says: in the run's log.
        repeats: whether the run must equal one without the fault.
        action: the signal.
        spare_workers: the run's flag.
    """

    process: str
    at_env_steps: int
    says: str
    repeats: bool = True
    action: signal.Signals = signal.SIGKILL
    spare_workers: bool = False


FAULTS = {
    "an engine, during a rollout": Fault(
        "ray::RolloutWorker", ROLLOUT, "rollout worker 0 is replaced"
    ),
    "an engine with a spare": Fault(
        "ray::RolloutWorker",
        ROLLOUT,
        "the spare of rollout worker 0 takes its place",
        spare_workers=True,
    ),
    "the driver, during a rollout": Fault(
        "", ROLLOUT, "ended with signal SIGKILL: going on from the last checkpoint"
    ),
    "an engine, during an update": Fault(
        "ray::RolloutWorker", UPDATE, "rollout worker 0 is replaced"
    ),
    "a trainer, during an update": Fault(
        "ray::PolicyTrainer", UPDATE, "ended with exit code 1: going on from the last"
    ),
    "the driver, during an update": Fault(
        "", UPDATE, "ended with signal SIGKILL: going on from the last checkpoint"
    ),
    "the curriculum": Fault("ray::CurriculumManager", ROLLOUT, "the curriculum actor died"),
    "an environment process": Fault(
        "ppo.envs.vector_worker", ROLLOUT, "environment", repeats=False
    ),
    "an engine that hangs": Fault(
        "ray::RolloutWorker", ROLLOUT, "(--hang_timeout_s): rollout worker 0", action=signal.SIGSTOP
    ),
    "a trainer that hangs": Fault(
        "ray::PolicyTrainer", UPDATE, "does not answer", action=signal.SIGSTOP
    ),
}


def fault_args(model_dir: Path, folder: Path, name: str, **changes) -> driver.Args:
    return run_args(model_dir, folder, name, **({"max_restarts": 2} | changes))


class Supervised:
    """A run in the background, with its log in a file."""

    def __init__(self, args: driver.Args, folder: Path) -> None:
        self.counter, self.log = folder / f"{args.exp_id}.steps", folder / f"{args.exp_id}.log"
        self.counter.write_bytes(b"")
        environment = {**run_environment(args), "PPO_VLA_TEST_STEPS": str(self.counter)}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command_line(args), cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
        self.seen: dict[
            psutil.Process, str
        ] = {}  # compared by their start, too: the kernel uses numbers again

    def descendants(self) -> list[psutil.Process]:
        """Living ones, noted for `left_behind`."""
        found = psutil.Process(self.process.pid).children(recursive=True)
        for process in found:
            try:
                self.seen[process] = " ".join(process.cmdline()) or self.seen.get(process, "")
            except psutil.Error:
                continue
        return found

    def wait_for_env_steps(self, number: int) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while self.counter.stat().st_size < number:
            assert self.process.poll() is None and time.monotonic() < deadline, (
                self.log.read_text()[-6000:]
            )
            time.sleep(0.01)

    def find(self, title: str) -> psutil.Process:
        """The first descendant whose command line has `title`; the attempt's own process for an empty one."""
        found = self.descendants()
        if not title:
            return psutil.Process(self.process.pid).children()[0]
        return next(process for process in found if title in self.seen.get(process, ""))

    def kill(self, title: str, delay_s: float) -> bool:
        """Kill a process as `find` finds it, at once or `delay_s` after it has appeared; whether there was one."""
        for pause_s in (0.0, *[0.5] * 240):
            time.sleep(pause_s)
            if self.process.poll() is not None:
                return False
            try:
                self.find(title)
            except (StopIteration, IndexError, psutil.Error):
                continue  # between two attempts, or not started yet
            if pause_s:
                time.sleep(delay_s)
            try:
                self.find(title).kill()
                return True
            except (StopIteration, IndexError, psutil.Error):
                continue
        return False

    def finish(self) -> str:
        """Wait for the end and return the log."""
        code = self.process.wait(timeout=TIMEOUT_S)
        output = self.log.read_text()
        assert code == 0, output[-8000:]
        return output

    def left_behind(self) -> list[str]:
        """Descendants seen that still live."""
        return [
            f"{process.pid} {title}" for process, title in self.seen.items() if process.is_running()
        ]


def assert_complete(exp_dir: Path, num_steps: int = NUM_STEPS) -> None:
    """Every step is logged once, and the last checkpoint and the final policy are there and whole."""
    assert [m["step"] for m in read_metrics(exp_dir)] == list(range(1, num_steps + 1))
    assert checkpoint_problems(exp_dir / f"step_{num_steps}") == []
    assert (exp_dir / "adapter_model.safetensors").exists()
    assert not list(exp_dir.glob(".*partial*"))


def run_through(faults: list[Fault], args: driver.Args, folder: Path) -> None:
    """Run with `faults` and check that it ends well and leaves no process behind."""
    args = dataclasses.replace(args, spare_workers=any(fault.spare_workers for fault in faults))
    if any(fault.action == signal.SIGSTOP for fault in faults):
        args = dataclasses.replace(
            args, hang_timeout_s=90.0
        )  # else as long as a busy machine takes
    run = Supervised(args, folder)
    try:
        for fault in faults:
            run.wait_for_env_steps(fault.at_env_steps)
            if fault.at_env_steps == UPDATE:
                time.sleep(1.0)  # it takes several seconds
            run.find(fault.process).send_signal(fault.action)
        output = run.finish()
    finally:
        for process in run.descendants() if run.process.poll() is None else []:
            process.kill()
        run.process.kill()
    for fault in faults:
        assert fault.says in output, output[-6000:]
    assert_complete(folder / args.exp_id)
    assert run.left_behind() == []


def survive(faults: list[Fault], straight: Path, model_dir: Path, folder: Path) -> None:
    """The run must also equal an undisturbed one where it repeats what was lost, and leave no shared memory."""
    before = shared_memory()
    run_through(faults, fault_args(model_dir, folder, "run"), folder)
    if all(fault.repeats for fault in faults):
        assert_equal_runs(straight, folder / "run", NUM_STEPS, NOT_COMPARED)
    assert left_in_shared_memory(before) == set()


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_run_survives(
    name: str, straight_run: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    survive([FAULTS[name]], straight_run, tiny_model_dir, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("num_engines", [1, 2])
def test_a_rollout_that_died_with_its_engine_is_collected_again(
    num_engines: int, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Its engine collects ahead of the update and dies after it has reported: the images have died with it.

    With two engines the one that lives has collected with the version before, and the two rollouts
    are joined.
    """
    fault = Fault("ray::RolloutWorker", UPDATE, "is replaced; it failed while the trainers update")
    changes = {"vllm_num_engines": num_engines, "local_rollout_batch_size": 8 // num_engines}
    args = fault_args(tiny_model_dir, tmp_path, "run", async_depth=1, **changes)
    run_through([fault], args, tmp_path)
    assert "going on from" not in (tmp_path / "run.log").read_text()
    lags = [m["train/policy_lag"] for m in read_metrics(tmp_path / "run")]
    # What the only engine collects again is of the present version. Of two, the other's is older.
    assert lags.count(0) == (2 if num_engines == 1 else 1) and set(lags) == {0, 1}


@pytest.mark.timeout(
    2400
)  # 210 s alone, with the undisturbed run; 510 s were seen beside other work
def test_a_run_survives_an_engine_and_then_the_driver(
    straight_run: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    rows = [FAULTS["an engine with a spare"], FAULTS["the driver, during an update"]]
    survive(rows, straight_run, tiny_model_dir, tmp_path)


NUM_KILLS, NUM_LONG_STEPS = 25, 60
# Not the environments: an episode whose process died is dropped, and the run another one from there.
KILLED = (
    "ray::RolloutWorker",
    "ray::PolicyTrainer",
    "ray::CurriculumManager",
    "raylet/raylet",
    "gcs_server",
    "",
)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_kills_at_random_moments(tiny_model_dir: Path, tmp_path: Path) -> None:
    """25 kills of any process, Ray's own included: the run ends as one that nobody disturbed."""
    changes = {
        "num_epochs": 1, "local_mini_batch_size": 32, "per_device_train_batch_size": 16, "save_freq": 2, "keep_last": 2,
        "task_suite_name": "tabletop", "max_env_length": None, "total_episodes": NUM_LONG_STEPS * 64,
    }  # fmt: skip
    straight = Supervised(run_args(tiny_model_dir, tmp_path, "straight", **changes), tmp_path)
    straight.finish()
    args = run_args(tiny_model_dir, tmp_path, "killed", max_restarts=NUM_KILLS, **changes)
    run, chance, killed = Supervised(args, tmp_path), random.Random(0), []
    while len(killed) < NUM_KILLS and run.process.poll() is None:
        title, pause_s, delay_s = (
            chance.choice(KILLED),
            chance.uniform(1.0, 25.0),
            chance.uniform(0.0, 10.0),
        )
        time.sleep(pause_s)
        if run.kill(title, delay_s):
            killed.append(title or "driver")
    output = run.finish()
    events = (
        "going on from the last checkpoint",
        "rollout worker 0 is replaced",
        "the curriculum actor died",
    )
    print(f"killed {killed}; " + ", ".join(f"{output.count(event)} x {event}" for event in events))
    assert len(killed) == NUM_KILLS, f"the run was over after {len(killed)} kills"
    assert_complete(tmp_path / "killed", NUM_LONG_STEPS)
    assert_equal_runs(tmp_path / "straight", tmp_path / "killed", NUM_LONG_STEPS, NOT_COMPARED)
    assert run.left_behind() == []
