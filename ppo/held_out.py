"""Whether training could meet an evaluation's initial state on LIBERO: distances between random layouts and fixed ones.

Training (demonstrations and PPO) draws a layout of the objects from an episode's seed; evaluation sets one of 50 states
from a file. Two layouts are as far apart as the object whose place differs most, in the horizontal plane; what they may
differ in besides (heights, turns, fixtures, the arm) is not counted, so that the true distance is larger if anything.
N layouts, S fixed states, K movable objects. Metres.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ppo.envs import libero_install
from ppo.envs.base import ResetRequest


def free_joint_addresses(model: Any) -> list[int]:
    """Where in a MuJoCo model's qpos each movable object's place begins (x, y, z, then its turn)."""
    import mujoco

    is_free = model.jnt_type == mujoco.mjtJoint.mjJNT_FREE
    return [int(address) for address in model.jnt_qposadr[is_free]]


def object_places(qpos: np.ndarray, addresses: Sequence[int]) -> np.ndarray:
    """X and y of every movable object, (..., K, 2), from positions (..., nq)."""
    return np.stack([qpos[..., a : a + 2] for a in addresses], axis=-2)


def nearest_distances(layouts_NK2: np.ndarray, states_SK2: np.ndarray) -> np.ndarray:
    """Of each layout the distance to the nearest fixed state, (N,): of the object that is moved farthest."""
    moved_NSK = np.linalg.norm(layouts_NK2[:, None] - states_SK2[None], axis=-1)
    return moved_NSK.max(axis=-1).min(axis=-1)


def check_task(env: Any, task_id: int, seeds: Iterable[int]) -> np.ndarray:
    """Distances (N,) of the layouts that `seeds` give in a task to its nearest fixed states.

    `env`: a `ppo.envs.libero.LiberoEnv`, best with `images=False, num_steps_wait=0`.
    """
    layouts, addresses = [], []
    for seed in seeds:
        env.reset(ResetRequest(task_id, None, seed))
        addresses = free_joint_addresses(env.simulator.model)
        layouts.append(object_places(env.simulator.data.qpos, addresses))
    states = libero_install.load_init_states(env.suite_name, task_id)[
        : libero_install.NUM_INIT_STATES
    ]
    positions = states[:, 1 : 1 + env.simulator.model.nq]  # a state is time, positions, velocities
    return nearest_distances(np.stack(layouts), object_places(positions, addresses))


def summarize_distances(distances: Mapping[int, np.ndarray]) -> dict[str, Any]:
    """Numbers of layouts, and the smallest and middle distances in millimetres, over all tasks and in each."""

    def describe(values: np.ndarray) -> dict[str, Any]:
        smallest, middle = 1000 * float(values.min()), 1000 * float(np.median(values))
        return {
            "num_layouts": len(values),
            "smallest_distance_mm": round(smallest, 3),
            "median_distance_mm": round(middle, 3),
            "num_equal": int((values < 1e-6).sum()),
        }

    per_task = [{"task_id": task_id, **describe(values)} for task_id, values in distances.items()]
    return {**describe(np.concatenate(list(distances.values()))), "per_task": per_task}
