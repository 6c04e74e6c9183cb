"""Steps/s of the tabletop world on one core: physics alone, with pictures, with resets, and through processes.

    python benchmarks/tabletop.py [--image_size 64] [--num_steps 5000]

Prints one table. The last row steps a VectorEnv of 64 environments in two processes in lock-step, so it contains the
shared-memory traffic and the waiting for the slower process.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ppo.envs.base import ResetRequest
from ppo.envs.tabletop import SUITE, TabletopEnv
from ppo.envs.tabletop_expert import run_expert_episode
from ppo.envs.vector import VectorEnv


@dataclass(frozen=True)
class Args:
    """What to measure."""

    image_size: int = 64
    """Side of the pictures in pixels; the quick start's is 56."""
    num_steps: int = 5000
    """Environment steps of each row."""
    num_processes: int = 2
    """Processes of the last row."""


def random_actions(num: int, seed: int = 0) -> np.ndarray:
    """Actions (num, 7) that move about and open and close at random."""
    return np.random.default_rng(seed).uniform(-1, 1, (num, 7)).astype(np.float32)


def request(index: int) -> ResetRequest:
    """The index-th random episode."""
    return ResetRequest(index % SUITE.num_tasks, None, index)


def physics(args: Args) -> int:
    """Steps without pictures."""
    env, rng = TabletopEnv(args.image_size), np.random.default_rng(0)
    env.reset(request(0))
    for action in random_actions(args.num_steps):
        env.world.move(action, rng)
        env.world.solved(env.task)
    return args.num_steps


def pictures(args: Args) -> int:
    """Whole steps; an episode that ends is reset."""
    env = TabletopEnv(args.image_size)
    env.reset(request(0))
    for index, action in enumerate(random_actions(args.num_steps)):
        result = env.step(action)
        if result.terminated or result.truncated:
            env.reset(request(index))
    return args.num_steps


def operator(args: Args) -> int:
    """Whole episodes of the careful operator."""
    env, num, index = TabletopEnv(args.image_size), 0, 0
    while num < args.num_steps:
        num += len(run_expert_episode(env, request(index), 0.0, np.random.default_rng(0)).actions)
        index += 1
    return num


def vector(args: Args, num_envs: int = 64) -> tuple[int, float]:
    """Steps of a VectorEnv and their seconds, without its start-up."""
    ids = np.arange(num_envs)
    with VectorEnv(
        SUITE.name, num_envs, num_processes=args.num_processes, image_size=args.image_size,
        startup_timeout_s=60.0, step_timeout_s=60.0,
    ) as envs:  # fmt: skip
        envs.reset(ids, [request(int(i)) for i in ids])
        actions = random_actions(args.num_steps // num_envs * num_envs).reshape(-1, num_envs, 7)
        started = time.perf_counter()
        for round_index, action in enumerate(actions):
            envs.send(ids, action, [request(int(i) + num_envs * round_index) for i in ids])
            envs.receive(ids)
        return actions.shape[0] * num_envs, time.perf_counter() - started


def timed(run: Callable[[Args], int], args: Args) -> tuple[int, float]:
    """Steps and seconds of a run."""
    started = time.perf_counter()
    return run(args), time.perf_counter() - started


def main(args: Args) -> None:
    """Measure every row and print the table."""
    rows = {
        "physics, no pictures": timed(physics, args),
        "steps with pictures and resets": timed(pictures, args),
        "the scripted operator's episodes": timed(operator, args),
        f"VectorEnv, 64 environments in {args.num_processes} processes": vector(args),
    }
    table = Table("tabletop", "steps/s", "microseconds a step", title=f"{args.image_size} pixels")
    for name, (steps, seconds) in rows.items():
        table.add_row(name, f"{steps / seconds:,.0f}", f"{1e6 * seconds / steps:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main(tyro.cli(Args))
