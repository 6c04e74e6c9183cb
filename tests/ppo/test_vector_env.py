"""The vector of environments, with worlds that count, crash, hang and wait, and with the real tabletop."""

import gc
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from ppo.envs.base import Environment, ResetRequest, StepResult, TaskSuite, get_suite, known_suites
from ppo.envs.vector import VectorEnv
from ppo.envs.vector_process import EnvProcess
from tests.shared_memory import left_in_shared_memory, shared_memory

SIZE = 8
# What the first component of an action makes the toy world do.
RAISE, EXIT, SEGFAULT, HANG, WAIT_FOR_GATE = 100, 101, 102, 103, 104


class ToyEnv:
    """Its image tells task, step and seed; success at action[1] == 1; the reward is action[2]."""

    def __init__(self, image_size, max_steps=None, *, startup="", gate="", image_error=False):
        self.image_size, self.max_steps, self.gate, self.image_error = (
            image_size,
            max_steps or 5,
            gate,
            image_error,
        )
        if startup == "raise":
            raise OSError("no display found")
        if startup == "hang" or (startup == "hang until" and not Path(gate).exists()):
            time.sleep(1000)
        if startup == "slow again" and not _first_time(Path(f"{gate}.first")):
            while not Path(gate).exists():
                time.sleep(0.01)

    def reset(self, request):
        if request.seed == 255:
            raise RuntimeError("the layout of seed 255 is broken")
        self.request, self.num_steps = request, 0
        return self.render(self.image_size)

    def step(self, action):
        match int(action[0]):
            case 100:
                raise RuntimeError("the simulator is unstable")
            case 101:
                print("out of handles", file=sys.stderr, flush=True)
                os._exit(7)
            case 102:
                os.kill(os.getpid(), signal.SIGSEGV)
            case 103:
                time.sleep(1000)
            case 104:
                while not Path(self.gate).exists():
                    time.sleep(0.01)
        self.num_steps += 1
        success = bool(action[1] == 1)
        image = self.render(1 if self.image_error else self.image_size)
        return StepResult(
            image, float(action[2]), success, self.num_steps >= self.max_steps, success
        )

    def render(self, size):
        return np.full(
            (size, size, 3),
            (self.request.task_id, self.num_steps, self.request.seed % 256),
            np.uint8,
        )

    def close(self):
        pass


def _first_time(path):
    """True in the first process that asks."""
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


class DrawingEnv(ToyEnv):
    """Its image is of one colour, the number of the GPU that it draws on; 255: none."""

    def __init__(self, image_size, max_steps=None, *, env_gpu_id=None):
        super().__init__(image_size, max_steps)
        self.colour = 255 if env_gpu_id is None else env_gpu_id

    def render(self, size):
        return np.full((size, size, 3), self.colour, np.uint8)


DRAWING = TaskSuite("drawing", ("draw",), 5, 50, DrawingEnv)
SUITE = TaskSuite("toy", tuple(f"do {i}" for i in range(6)), 5, 50, ToyEnv)
TOY = f"{__name__}:SUITE"


# However busy the machine is, processes that work are in time.
PATIENT = {"startup_timeout_s": 500.0, "step_timeout_s": 500.0, "replacement_wait_s": 500.0}


def toy(num_envs=4, num_processes=2, **options):
    options = {"image_size": SIZE, **PATIENT, **options}
    return VectorEnv(TOY, num_envs, num_processes=num_processes, **options)


def requests(*task_ids, seed=0):
    return [ResetRequest(task_id, None, seed) for task_id in task_ids]


def actions(num, **changes):
    """No-ops; `at2=RAISE` sets the first component of row 2."""
    result = np.zeros((num, 7), dtype=np.float32)
    for name, value in changes.items():
        result[int(name.removeprefix("at")), 0] = value
    return result


def codes(images):
    """(task, step, seed) of each image, which must be of one colour."""
    assert images.dtype == np.uint8 and (images == images[:, :1, :1]).all()
    return [tuple(int(c) for c in image[0, 0]) for image in images]


@pytest.fixture
def log():
    """Messages of the project's logger."""
    messages: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record):
            messages.append(record.getMessage())

    logger = logging.getLogger("ppo_vla")
    handler = Keep()
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


def test_equals_stepping_the_tabletop_serially():
    """5 environments in 2 processes and 2 groups: every array as from 5 environments stepped one after another."""
    num_envs, rng = 5, np.random.default_rng(0)
    serial = [get_suite("tabletop").make_env(SIZE * 4, 4) for _ in range(num_envs)]
    starts = [ResetRequest(i, i if i % 2 else None, 10 * i) for i in range(num_envs)]
    num_ended = 0
    with VectorEnv(
        "tabletop", num_envs, num_processes=2, image_size=SIZE * 4, max_steps=4
    ) as vector:
        images = vector.reset(range(num_envs), starts)
        for env, request, image in zip(serial, starts, images, strict=True):
            np.testing.assert_array_equal(env.reset(request), image)
        for t in range(9):
            action = rng.uniform(-1, 1, (num_envs, 7)).astype(np.float32)
            nexts = [ResetRequest((i + t) % 10, None, 100 * t + i) for i in range(num_envs)]
            for group in ([0, 1, 2], [3, 4]):
                vector.send(group, action[group], [nexts[i] for i in group])
            for group in ([0, 1, 2], [3, 4]):
                step = vector.receive(group)
                for row, i in enumerate(group):
                    result = serial[i].step(action[i])
                    ended = result.terminated or result.truncated
                    num_ended += ended
                    np.testing.assert_array_equal(
                        step.final_images[row], result.image if ended else 0
                    )
                    expected = serial[i].reset(nexts[i]) if ended else result.image
                    np.testing.assert_array_equal(step.images[row], expected)
                    facts = (
                        step.reward,
                        step.terminated,
                        step.truncated,
                        step.success,
                        step.reset_used,
                        step.dropped,
                    )
                    expected_facts = (
                        result.reward,
                        result.terminated,
                        result.truncated,
                        result.success,
                        ended,
                        False,
                    )
                    assert tuple(f[row] for f in facts) == expected_facts
    assert num_ended >= 2 * num_envs


def test_the_request_decides_the_episode_and_results_come_back_for_its_task():
    with toy(max_steps=2) as vector:
        assert codes(vector.reset([0, 1, 2, 3], requests(5, 3, 1, 0, seed=9))) == [
            (t, 0, 9) for t in (5, 3, 1, 0)
        ]
        action = actions(4)
        action[1, 1], action[:, 2] = 1, [1, 2, 3, 4]  # environment 1 succeeds
        vector.send([0, 1, 2, 3], action, requests(0, 1, 2, 3, seed=8))
        step = vector.receive([0, 1, 2, 3])
        assert codes(step.images) == [(5, 1, 9), (1, 0, 8), (1, 1, 9), (0, 1, 9)]
        assert codes(step.final_images) == [(0, 0, 0), (3, 1, 9), (0, 0, 0), (0, 0, 0)]
        assert step.task_ids.tolist() == [
            5,
            3,
            1,
            0,
        ]  # of the episode stepped, not of the one begun
        assert (
            step.reset_used.tolist()
            == step.success.tolist()
            == step.terminated.tolist()
            == [0, 1, 0, 0]
        )
        vector.send([3, 1, 0], action[[3, 1, 0]] * [1, 0, 1, 0, 0, 0, 0], requests(4, 4, 4, seed=7))
        step = vector.receive([3, 1, 0])
        assert step.task_ids.tolist() == [0, 1, 5]
        assert step.truncated.tolist() == step.reset_used.tolist() == [1, 0, 1]
        assert step.episode_return.tolist() == [8.0, 2.0, 2.0]  # 1's second episode began anew
        assert step.episode_length.tolist() == [2, 1, 2]
        assert codes(step.images) == [(4, 0, 7), (1, 1, 8), (4, 0, 7)]
        assert codes(step.final_images) == [(0, 2, 9), (0, 0, 0), (5, 2, 9)]


def test_without_a_next_request_an_environment_waits_for_reset():
    with toy(2, 1, max_steps=1) as vector:
        vector.reset([0, 1], requests(1, 2))
        vector.send([0, 1], actions(2), [None, requests(3)[0]])
        step = vector.receive([0, 1])
        assert step.truncated.all() and step.reset_used.tolist() == [False, True]
        assert codes(step.images) == [(1, 1, 0), (3, 0, 0)]
        with pytest.raises(
            ValueError, match=r"environments \[0\] have no running episode: reset them first"
        ):
            vector.send([0], actions(1), [None])
        assert codes(vector.reset([0], requests(4))) == [(4, 0, 0)]
        vector.send([0], actions(1), [None])
        assert vector.receive([0]).task_ids.tolist() == [4]


def test_groups_do_not_wait_for_each_other(tmp_path):
    gate = tmp_path / "gate"
    with toy(4, 2, env_kwargs={"gate": str(gate)}) as vector:
        vector.reset(range(4), requests(0, 1, 2, 3))
        vector.send([0, 1], actions(2), [None] * 2)
        vector.send([2, 3], actions(2, at0=WAIT_FOR_GATE, at1=WAIT_FOR_GATE), [None] * 2)
        assert codes(vector.receive([0, 1]).images) == [
            (0, 1, 0),
            (1, 1, 0),
        ]  # though 2 and 3 still step
        vector.send([0, 1], actions(2), [None] * 2)  # queues behind them
        gate.touch()
        assert codes(vector.receive([0, 1]).images) == [(0, 2, 0), (1, 2, 0)]
        assert codes(vector.receive([2, 3]).images) == [(2, 1, 0), (3, 1, 0)]


def test_the_memory_of_all_processes_is_known_and_none_is_left_of_ended_ones():
    with toy(4, 2) as vector:
        vector.reset(range(4), requests(0, 1, 2, 3))
        resident = sum(psutil.Process(p.pid).memory_info().rss for p in vector._processes) / 2**30
        assert vector.memory_gib() == pytest.approx(resident, rel=0.05) and resident > 0.02
    assert vector.memory_gib() == 0.0


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (RAISE, "RuntimeError: the simulator is unstable"),
        (EXIT, "exited with status 7\nout of handles"),
        (SEGFAULT, "died by SIGSEGV"),
        (HANG, "made no progress for 1 s"),
    ],
)
def test_a_process_that_fails_is_replaced_and_only_its_episodes_are_void(log, failure, reason):
    with toy(4, 2) as vector:
        vector.reset(range(4), requests(0, 1, 2, 3))
        vector.send(range(4), actions(4), requests(4, 4, 4, 4))
        vector.receive(range(4))
        if failure == HANG:  # the other process may take its time on a busy machine
            vector._processes[0].step_timeout_s = 1.0
        vector.send(
            range(4), actions(4, at2=failure), [*requests(4), None, *requests(5, 4)]
        )  # takes 0 along
        step = vector.receive(range(4))
        vector._processes[0].step_timeout_s = 500.0
        assert step.dropped.tolist() == [True, False, True, False]
        assert not step.done.any() and not step.success.any()
        assert step.task_ids.tolist() == [0, 1, 2, 3]
        assert step.reset_used.tolist() == [True, False, True, False]
        assert codes(step.images) == [(4, 0, 0), (1, 2, 0), (5, 0, 0), (3, 2, 0)]
        assert vector.num_replaced == 1
        (message,) = log
        assert reason in message
        assert "stepping environment 2 at step 1 of its episode, ResetRequest(task_id=2" in message
        assert "episodes of environments (0, 2) are void" in message
        if failure in (RAISE, SEGFAULT, HANG):
            assert "test_vector_env.py" in message and "in step" in message  # where in the code
        vector.send(range(4), actions(4), [None] * 4)
        step = vector.receive(range(4))
        assert not step.dropped.any()
        assert codes(step.images) == [(4, 1, 0), (1, 3, 0), (5, 1, 0), (3, 3, 0)]
        assert step.episode_length.tolist() == [1, 3, 1, 3]


class Preparer(ToyEnv):
    """Dies once while it prepares the episode of seed 254."""

    def prepare(self, request):
        if request.seed == 254 and _first_time(Path(self.gate)):
            os._exit(9)
        return False


PREPARING_SUITE = TaskSuite("preparing", SUITE.instructions, 5, 50, Preparer)


def test_a_death_while_the_next_episode_is_prepared_names_that_episode(log, tmp_path):
    options = {"image_size": SIZE, "env_kwargs": {"gate": str(tmp_path / "died")}, **PATIENT}
    with VectorEnv(f"{__name__}:PREPARING_SUITE", 1, num_processes=1, **options) as vector:
        vector.reset([0], requests(1))
        vector.send([0], actions(1), requests(2, seed=254))
        assert not vector.receive([0]).dropped.any()
        deadline = time.monotonic() + 500
        while not (tmp_path / "died").exists():  # it prepares when it has nothing else to do
            assert time.monotonic() < deadline, "nothing was prepared"
            time.sleep(0.01)
        vector.send([0], actions(1), requests(3))
        step = vector.receive([0])
        assert step.dropped.all() and codes(step.images) == [(3, 0, 0)]
        (message,) = log
        assert (
            "died while preparing the next episode of environment 0, ResetRequest(task_id=2,"
            in message
        )
        assert "exited with status 9" in message


def test_an_episode_lost_between_two_steps_is_dropped_at_the_next_one():
    """Environment 1 has its observation in hand when its process dies under environment 0."""
    with toy(2, 1) as vector:
        vector.reset([0, 1], requests(0, 1))
        vector.send([0], actions(1, at0=RAISE), [None])
        step = vector.receive([0])
        assert (step.dropped.item(), step.reset_used.item()) == (True, False)
        assert codes(step.images) == [(0, 0, 0)]  # no next request: the same episode again
        vector.send([0, 1], actions(2), requests(2, 3))
        step = vector.receive([0, 1])
        assert step.dropped.tolist() == step.reset_used.tolist() == [False, True]
        assert step.task_ids.tolist() == [0, 1]
        assert codes(step.images) == [(0, 1, 0), (3, 0, 0)]
        vector.send([1], actions(1), [None])
        assert codes(vector.receive([1]).images) == [(3, 1, 0)]


def test_a_result_that_was_ready_before_the_death_is_kept():
    with toy(2, 1, max_steps=1) as vector:
        vector.reset([0, 1], requests(0, 1))
        vector.send([0], actions(1), requests(2))
        vector.send([1], actions(1, at0=EXIT), requests(3))
        assert vector.receive([1]).dropped.all()
        step = vector.receive([0])
        assert (
            step.truncated.all()
            and not step.dropped.any()
            and codes(step.final_images) == [(0, 1, 0)]
        )
        vector.send([0], actions(1), requests(4))  # but the episode of task 2 died with the process
        step = vector.receive([0])
        assert (
            step.dropped.all()
            and step.task_ids.tolist() == [2]
            and codes(step.images) == [(4, 0, 0)]
        )


def test_the_others_go_on_while_a_replacement_starts(tmp_path):
    gate = tmp_path / "gate"  # the replacement starts for as long as it is shut
    options = {"startup": "slow again", "gate": str(gate)}
    with toy(1, 1, replacement_wait_s=0.0, env_kwargs=options) as vector:
        vector.reset([0], requests(1))
        vector.send([0], actions(1, at0=EXIT), requests(2))
        step = vector.receive([0])
        num_void = 0
        while not step.reset_used.any():
            assert step.dropped.all() and step.task_ids.tolist() == [1] and not step.images.any()
            num_void += 1
            if num_void > 1:
                gate.touch()
            time.sleep(0.05)
            vector.send([0], actions(1), requests(2))
            step = vector.receive([0])
        assert num_void > 1
        assert step.dropped.all() and codes(step.images) == [(2, 0, 0)]
        vector.send([0], actions(1), requests(3))
        step = vector.receive([0])
        assert not step.dropped.any() and codes(step.images) == [(2, 1, 0)]
        assert vector.num_replaced == 1


def test_reset_waits_for_a_replacement():
    with toy(2, 1, replacement_wait_s=0.0) as vector:
        vector.reset([0, 1], requests(0, 1))
        vector.send([0], actions(1, at0=SEGFAULT), [None])
        vector.receive([0])
        assert codes(vector.reset([1, 0], requests(3, 4))) == [(3, 0, 0), (4, 0, 0)]
        vector.send([0, 1], actions(2), [None] * 2)
        step = vector.receive([0, 1])
        assert not step.dropped.any() and step.task_ids.tolist() == [4, 3]


def test_what_fails_again_and_again_gives_up_with_the_traceback():
    vector = toy(2, 2)
    vector.reset([0, 1], requests(0, 1))
    vector.send([0, 1], actions(2, at1=EXIT), [ResetRequest(2, None, 255)] * 2)
    with pytest.raises(
        RuntimeError,
        match=r"(?s)resetting environment 1, .*seed=255.*is broken.*failure 3 in a row",
    ):
        vector.receive([0, 1])
    with pytest.raises(ValueError, match="closed"):
        vector.reset([0], requests(0))


def test_environments_that_cannot_be_made_say_why():
    with pytest.raises(
        RuntimeError, match=r"(?s)while starting.*in __init__.*OSError: no display found"
    ):
        toy(1, 1, env_kwargs={"startup": "raise"})
    with pytest.raises(
        RuntimeError, match=r"(?s)made no progress for 1 s while starting.*failure 3 in a row"
    ):
        toy(1, 1, startup_timeout_s=1.0, env_kwargs={"startup": "hang"})


def test_a_start_that_hangs_once_is_tried_again(tmp_path, log, monkeypatch):
    gate, start = tmp_path / "gate", EnvProcess.start

    def start_then_be_patient(process):
        if process.startup_timeout_s == 2.0 and hasattr(process, "started_at"):  # again
            process.startup_timeout_s = 500.0
            gate.touch()
        start(process)

    monkeypatch.setattr(EnvProcess, "start", start_then_be_patient)
    options = {"startup": "hang until", "gate": str(gate)}
    with toy(2, 1, startup_timeout_s=2.0, env_kwargs=options) as vector:
        assert codes(vector.reset([0, 1], requests(1, 2))) == [(1, 0, 0), (2, 0, 0)]
        assert vector.num_replaced == 1 and "made no progress for 2 s while starting" in log[0]


def test_an_image_of_the_wrong_size_is_an_error_not_a_broadcast(log):
    with toy(1, 1, env_kwargs={"image_error": True}) as vector:
        vector.reset([0], requests(0))
        vector.send([0], actions(1), requests(1))
        assert vector.receive([0]).dropped.all()
        assert "a uint8 image of shape (1, 1, 3): " in log[0]


def _children():
    return set(Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split())


def test_close_leaves_no_process_no_descriptor_and_no_file():
    gc.collect()
    before, files = (_children(), len(os.listdir("/proc/self/fd"))), shared_memory()
    vector = toy(2, 2)
    vector.reset([0, 1], requests(0, 1))
    assert len(_children()) == len(before[0]) + 2
    vector.send([0], actions(1, at0=HANG), [None])
    started = time.monotonic()
    vector.close()
    vector.close()
    assert time.monotonic() - started < 400.0  # a step that hangs lasts 1000
    del vector
    gc.collect()
    assert (_children(), len(os.listdir("/proc/self/fd"))) == before
    assert left_in_shared_memory(files) == set()


def test_a_forgotten_vector_is_closed_by_garbage_collection():
    before = _children()
    vector = toy(1, 1)
    assert len(_children()) == len(before) + 1
    del vector
    gc.collect()
    assert _children() == before


@pytest.mark.parametrize("how", ["killed", "exits"])
def test_the_processes_end_with_their_parent_even_in_a_step_that_hangs(how):
    program = f"""
import os, signal, sys
from {__name__} import *
vector = toy(2, 2)
vector.reset([0, 1], requests(0, 1))
vector.send([0], actions(1, at0=HANG), [None])
print(*_children(), flush=True)
{"os.kill(os.getpid(), signal.SIGKILL)" if how == "killed" else "sys.exit(0)"}
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}
    result = subprocess.run(
        [sys.executable, "-c", program.replace("import *", "import toy, requests, actions, HANG, _children")],
        env=environment, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    pids = result.stdout.split()
    assert len(pids) == 2, result.stderr
    deadline = time.monotonic() + 400.0
    while any(_is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "environment processes outlive their parent"
        time.sleep(0.1)


def _is_alive(pid):
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_the_processes_ignore_ctrl_c_and_use_one_thread():
    before = _children()
    with toy(1, 1, process_variables={"MUJOCO_GL": "egl"}) as vector:
        (pid,) = _children() - before
        variables = Path(f"/proc/{pid}/environ").read_text().split("\0")
        assert {"OMP_NUM_THREADS=1", "MUJOCO_GL=egl"} <= set(variables)
        os.kill(int(pid), signal.SIGINT)
        assert codes(vector.reset([0], requests(3))) == [(3, 0, 0)]
        assert vector.num_replaced == 0


def test_wrong_calls_are_refused_before_anything_is_sent():
    with pytest.raises(ValueError, match="3 processes for 2 environments: use 1 to 2"):
        toy(2, 3)
    with toy(2, 1) as vector:
        with pytest.raises(ValueError, match=r"\[1\] have no running episode"):
            vector.reset([0], requests(0))
            vector.send([1], actions(1), [None])
        with pytest.raises(ValueError, match=r"task ids \[6\] are not among the suite's: use 0..5"):
            vector.reset([0], requests(6))
        with pytest.raises(ValueError, match="2 requests for 1 environments"):
            vector.reset([0], requests(0, 1))
        with pytest.raises(ValueError, match="at most once"):
            vector.reset([0, 2], requests(0, 1))
        with pytest.raises(ValueError, match=r"actions of shape \(1, 6\)"):
            vector.send([0], actions(1)[:, :6], [None])
        with pytest.raises(ValueError, match="send them first"):
            vector.receive([0])
        vector.send([0], actions(1), [None])
        with pytest.raises(ValueError, match=r"\[0\] are under way"):
            vector.send([0], actions(1), [None])
        assert codes(vector.receive([0]).images) == [(0, 1, 0)]


def test_suites_are_found_by_name_or_by_module():
    assert "tabletop" in known_suites() and get_suite("tabletop").num_tasks == 10
    assert get_suite(TOY).name == "toy"
    assert isinstance(ToyEnv(SIZE), Environment)
    with pytest.raises(ValueError, match="unknown task suite 'kitchen': use one of .*tabletop"):
        get_suite("kitchen")
    with pytest.raises(ValueError, match="is not a TaskSuite"):
        get_suite(f"{__name__}:ToyEnv")


@pytest.mark.parametrize(
    ("given", "first_turn", "expected"),
    [((4, 7), 0, [4, 7, 4]), ((4, 7), 3, [7, 4, 7]), (2, 1, [2, 2, 2]), (None, 1, [255] * 3)],
)
def test_processes_take_turns_on_several_gpus(given, first_turn, expected):
    options = {} if given is None else {"env_gpu_id": given}
    with VectorEnv(
        f"{__name__}:DRAWING", 3, num_processes=3, image_size=SIZE, first_turn=first_turn, env_kwargs=options
    ) as vector:  # fmt: skip
        images = vector.reset(range(3), requests(0, 0, 0))
        assert images[:, 0, 0, 0].tolist() == expected
        assert vector.drawing_gpus == tuple(sorted(set(expected) - {255}))
