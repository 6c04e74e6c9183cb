"""Episodes in LIBERO's simulator that several test modules play and compare."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ppo.envs.base import ResetRequest

SIZE, NUM_WAIT = 64, 2
SUITE = "libero_spatial"
# Bowls in the drawer, and on the cabinet: their places depend on where the furniture stands.
DRAWER_TASK, CABINET_TASK = 4, 9
FIXED = ResetRequest(CABINET_TASK, 2, 3)
RANDOM = ResetRequest(CABINET_TASK, None, 5)
DRAWER = ResetRequest(DRAWER_TASK, 3, 8)


def make_env(suite: str = SUITE, **options: Any) -> Any:
    """Quick drawing and physics, little settling, unless told otherwise."""
    from ppo.envs.libero import LiberoEnv

    defaults: dict[str, Any] = {"render_quality": "fast", "num_steps_wait": NUM_WAIT}
    return LiberoEnv(suite, SIZE, **(defaults | options))


def random_actions(num: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    actions = rng.uniform(-1, 1, (num, 7)).astype(np.float32)
    actions[:, 6] = np.where(np.arange(num) % 5 < 3, 1.0, -1.0)
    return actions


ACTIONS = random_actions(6)


@dataclass
class Played:
    """One episode: S + 1 images and states, S rewards."""

    images: np.ndarray
    qpos: np.ndarray
    rewards: list[float]


def play(
    env, request: ResetRequest, actions: np.ndarray = ACTIONS, between: Callable = lambda: None
) -> Played:
    images, rewards = [env.reset(request)], []
    qpos = [env.simulator.data.qpos.copy()]
    for action in actions:
        between()
        result = env.step(action)
        images.append(result.image)
        rewards.append(result.reward)
        qpos.append(env.simulator.data.qpos.copy())
    return Played(np.stack(images), np.stack(qpos), rewards)


def assert_same(played: Played, expected: Played) -> None:
    np.testing.assert_array_equal(played.qpos, expected.qpos)
    np.testing.assert_array_equal(played.images, expected.images)
    assert played.rewards == expected.rewards


def leave_traces(env, request: ResetRequest) -> None:
    """An episode that ends with closed fingers, a moved arm, open drawers and the stove turned on."""
    import mujoco

    env.reset(request)
    for _ in range(5):
        env.step(np.array([0.5, -0.5, -0.3, 0, 0, 0.2, 1], np.float32))
    model, data = env.simulator.model, env.simulator.data
    for joint in range(model.njnt):
        name = mujoco.mj_id2name(model, mujoco.mjtObj.mjOBJ_JOINT, joint)
        if name.startswith(("wooden_cabinet", "flat_stove")):
            low, high = model.jnt_range[joint]
            data.qpos[model.jnt_qposadr[joint]] = low if -low > high else high
    env.step(np.array([0, 0, 0, 0, 0, 0, 1], np.float32))
