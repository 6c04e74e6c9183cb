"""Environment steps/s of LIBERO: our vector of processes against as many plain OffScreenRenderEnv, in one run.

    python benchmarks/libero_envs.py --num_processes 1 2                    on a CPU, drawn by osmesa
    python benchmarks/libero_envs.py --num_processes 16 32 --env_gpu_id 0   on a GPU node, drawn by EGL
    python benchmarks/libero_envs.py --parts                                where a training step's time goes instead

Plain is what most scripts do: one process per environment, LIBERO's defaults (both cameras at 256 pixels every step,
hard resets). Ours returns the policy's view (JPEG round trip and Lanczos-3 included). Everybody takes the same actions
from the same fixed states. Two tables: steps/s between resets, their ratio to plain, and memory per process; then
steps/s and the waits for a step when episodes end every `--episode_length` steps and the next one is always of a task
that the process has not made yet, which is the worst case.

With --parts one process steps one task, robosuite's controller and our compiled one taking turns on the same episode.
"""

import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ppo.envs import libero_install
from ppo.envs.base import ResetRequest
from ppo.envs.vector import VectorEnv

RENDER_SIZE = 256


@dataclass(frozen=True)
class Args:
    """What to measure."""

    task_suite_name: str = "libero_spatial"
    """Suite."""
    num_processes: tuple[int, ...] = (1, 2)
    """Numbers of processes, one environment each."""
    num_steps: int = 60
    """Steps of each environment that are timed, after five that are not."""
    num_rounds: int = 3
    """Rounds of the first table, in each of which every kind has its turn; the medians count."""
    episode_length: int = 40
    """Time limit of the episodes in the second table."""
    num_episodes: int = 3
    """Episodes of each environment in the second table, all of different tasks."""
    image_size: int = 224
    """Side of the policy's view in pixels."""
    env_gpu_id: int | None = None
    """GPU that draws (EGL); default: what MUJOCO_GL says, else osmesa."""
    parts: bool = False
    """Only time the parts of a training step, in this process."""


def actions(num: int) -> np.ndarray:
    """(num, 7) smooth random motion; the gripper changes now and then."""
    rng = np.random.default_rng(0)
    held = rng.uniform(-0.4, 0.4, (num // 8 + 1, 6)).repeat(8, axis=0)[:num]
    grip = rng.choice([-1.0, 1.0], (num // 8 + 1, 1)).repeat(8, axis=0)[:num]
    return np.concatenate([held, grip], axis=1).astype(np.float32)


def start_of(args: Args, index: int) -> ResetRequest:
    """The index-th environment's episode."""
    return ResetRequest(index % 10, index % libero_install.NUM_INIT_STATES, index)


def plain_process(connection: Connection, args: Args, index: int) -> None:
    """A child: one OffScreenRenderEnv with LIBERO's defaults; says when it is ready, then steps, then its memory."""
    os.environ["MUJOCO_GL"] = libero_install.choose_gl(args.env_gpu_id)
    if args.env_gpu_id is not None:
        os.environ["MUJOCO_EGL_DEVICE_ID"] = str(args.env_gpu_id)
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # robosuite refuses a GPU that is not in it
    libero_install.prepare()
    from libero.libero.envs import OffScreenRenderEnv

    request, suite = start_of(args, index), args.task_suite_name
    env: Any = OffScreenRenderEnv(
        bddl_file_name=str(libero_install.bddl_file(suite, request.task_id)),
        camera_heights=RENDER_SIZE,
        camera_widths=RENDER_SIZE,
    )
    env.seed(request.seed)
    env.reset()
    env.set_init_state(
        libero_install.load_init_states(suite, request.task_id)[request.init_state_id]
    )
    steps = actions(args.num_steps + 5)
    for action in steps[:5]:
        env.step(action)
    connection.send("ready")
    connection.recv()
    for action in steps[5:]:
        env.step(action)
    connection.send("done")
    connection.send(memory_gib(os.getpid()))


def measure_plain(args: Args, num: int) -> tuple[float, float]:
    """Steps/s of `num` plain environments together, and GiB per process."""
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(num)]
    children = [
        context.Process(target=plain_process, args=(pipes[i][1], args, i)) for i in range(num)
    ]
    for child, (_, child_end) in zip(children, pipes, strict=True):
        child.start()
        child_end.close()  # so that a child's death is the end of its pipe
    parents = [parent for parent, _ in pipes]
    for parent in parents:
        parent.recv()
    started = time.perf_counter()
    for parent in parents:
        parent.send("go")
    for parent in parents:
        parent.recv()
    seconds = time.perf_counter() - started
    memory = statistics.mean(parent.recv() for parent in parents)
    for child in children:
        child.join()
    return num * args.num_steps / seconds, memory


def make_vector(args: Args, num: int, quality: str, max_steps: int) -> VectorEnv:
    """Our vector with one environment a process."""
    return VectorEnv(
        args.task_suite_name,
        num,
        num_processes=num,
        image_size=args.image_size,
        max_steps=max_steps,
        startup_timeout_s=300,
        step_timeout_s=300,
        env_kwargs={"render_quality": quality, "env_gpu_id": args.env_gpu_id},
    )


def measure_vector(args: Args, num: int, quality: str) -> tuple[float, float]:
    """Steps/s of our vector between resets, and GiB per process."""
    steps = actions(args.num_steps + 5)
    with make_vector(args, num, quality, max_steps=10_000) as vector:
        ids = range(num)
        vector.reset(ids, [start_of(args, i) for i in ids])

        def play(part: np.ndarray) -> float:
            started = time.perf_counter()
            for action in part:
                vector.send(ids, np.tile(action, (num, 1)), [None] * num)
                vector.receive(ids)
            return time.perf_counter() - started

        play(steps[:5])
        seconds = play(steps[5:])
        memory = statistics.mean(memory_gib(process.pid) for process in vector._processes)
    return num * args.num_steps / seconds, memory


def measure_resets(args: Args, num: int) -> tuple[float, float, float]:
    """With episodes that end: steps/s, and the mean and longest wait for a step in ms.

    Two groups take turns, as in a rollout: while one is in the simulator the policy acts for the other (here: 20 ms).
    Environments start a few steps apart, so that not all end at once.
    """
    num_steps = args.episode_length * args.num_episodes
    waits = []
    with make_vector(args, num, "fast", max_steps=args.episode_length) as vector:
        groups = [g for g in np.array_split(np.arange(num), 2) if len(g)]
        episode = np.zeros(num, dtype=int)

        def request(env_id: int) -> ResetRequest:
            return ResetRequest(
                int(env_id + 3 * episode[env_id]) % 10, None, int(1000 * env_id + episode[env_id])
            )

        def send(group: np.ndarray) -> None:
            offered: list[ResetRequest | None] = [request(i) for i in group]
            vector.send(group, np.zeros((len(group), 7), np.float32), offered)

        vector.reset(range(num), [request(i) for i in range(num)])
        episode += 1
        started = time.perf_counter()
        for step in range(num_steps):
            for group in groups:
                if step > 0:
                    asked = time.perf_counter()
                    result = vector.receive(group)
                    waits.append(time.perf_counter() - asked)
                    episode[group[result.reset_used]] += 1
                time.sleep(0.02)
                send(group)
        for group in groups:
            vector.receive(group)
        seconds = time.perf_counter() - started
    return num * num_steps / seconds, 1e3 * statistics.mean(waits), 1e3 * max(waits)


class TimedArm:
    """An arm of `ppo.envs.libero_arm`; adds up the seconds that it takes."""

    def __init__(self, arm: Any) -> None:
        self.arm, self.num_substeps, self.seconds = arm, arm.num_substeps, 0.0

    def control(self, action: np.ndarray, is_first: bool) -> None:
        """As the arm's."""
        started = time.perf_counter()
        self.arm.control(action, is_first)
        self.seconds += time.perf_counter() - started


def measure_parts(args: Args) -> list[list[str]]:
    """A row for each part of a training step: median ms with robosuite's controller, with ours, and their ratio."""
    from ppo.envs.images import policy_image
    from ppo.envs.libero import LiberoEnv
    from ppo.envs.libero_arm import Arm

    env = LiberoEnv(
        args.task_suite_name, args.image_size, render_quality="fast", env_gpu_id=args.env_gpu_id
    )
    env.reset(start_of(args, 0))
    simulator = env.simulator
    robosuites = Arm(simulator.domain, simulator.model, simulator.data)
    arms = [TimedArm(robosuites), TimedArm(simulator._arm)]
    parts = ["controller", "physics", "simulator's step", "drawing, fast", "JPEG and resize"]
    times: list[list[tuple[float, ...]]] = [[], []]
    for action in actions(args.num_steps + 5):
        for kind, arm in enumerate(arms):
            robosuites.controller.new_update, arm.seconds = True, 0.0
            simulator._arm = arm  # type: ignore[assignment]
            started = time.perf_counter()
            simulator.step(action)
            stepped = time.perf_counter()
            image = env.render(RENDER_SIZE)
            drawn = time.perf_counter()
            policy_image(image, args.image_size)
            step, seen = stepped - started, time.perf_counter() - drawn
            times[kind].append((arm.seconds, step - arm.seconds, step, drawn - stepped, seen))
    env.close()
    rows = []
    for part, name in enumerate(parts):
        before, after = (1e3 * statistics.median(t[part] for t in kind[5:]) for kind in times)
        rows.append([name, f"{before:.2f}", f"{after:.2f}", f"{before / after:.2f}"])
    return rows


def memory_gib(pid: int) -> float:
    """Resident memory of a process in GiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 2**20


def show(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print one table."""
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*row)
    Console(width=110).print(table)


def compare(args: Args) -> list[list[str]]:
    """The first table's rows."""
    rows = []
    measures: list[tuple[str, Callable[[int], tuple[float, float]]]] = [
        ("plain OffScreenRenderEnv", lambda n: measure_plain(args, n)),
        ("ours, eval", lambda n: measure_vector(args, n, "eval")),
        ("ours, fast", lambda n: measure_vector(args, n, "fast")),
    ]
    for num in args.num_processes:
        rounds = [[measure(num) for _, measure in measures] for _ in range(args.num_rounds)]
        for kind, (name, _) in enumerate(measures):
            rate, memory = (statistics.median(r[kind][i] for r in rounds) for i in (0, 1))
            ratio = statistics.median(r[kind][0] / r[0][0] for r in rounds)
            rows.append(
                [
                    str(num),
                    name,
                    f"{rate:.1f}",
                    f"{rate / num:.1f}",
                    f"{ratio:.2f}",
                    f"{memory:.2f}",
                ]
            )
    return rows


def main(args: Args) -> None:
    """Measure and print."""
    backend = libero_install.choose_gl(args.env_gpu_id)
    if args.parts:
        columns = ["ms", "robosuite's controller", "ours", "ratio"]
        show(f"a training step of {args.task_suite_name}, {backend}", columns, measure_parts(args))
        return
    columns = [
        "processes",
        "environment",
        "steps/s",
        "a process",
        "ratio to plain",
        "GiB a process",
    ]
    show(f"{args.task_suite_name}, {backend}, {os.cpu_count()} cores", columns, compare(args))
    rows = []
    for num in args.num_processes:
        rate, mean_ms, longest_ms = measure_resets(args, num)
        rows.append([str(num), f"{rate:.1f}", f"{mean_ms:.0f}", f"{longest_ms:.0f}"])
    title = f"with resets: episodes of {args.episode_length} steps, always another task; fast"
    show(title, ["processes", "steps/s", "mean wait ms", "longest wait ms"], rows)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, use_underscores=True))
