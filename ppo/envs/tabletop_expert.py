"""The scripted operator of the tabletop world, careful or rushing, and whole episodes of it.

The careful operator moves above the object, goes all the way down, takes hold, carries it above the receptacle, goes
down again and lets go. A rushing one saves the way down: it takes hold at half height (the hold is loose and may
slip on the way) and lets go at half height (the object may roll off). `imperfection` is the chance that it rushes,
drawn anew at every moment where it could. Its actions take the values 0, +-0.5 and +-1 only.
"""

from dataclasses import dataclass

import numpy as np

from ppo.envs.base import ACTION_DIM, ResetRequest
from ppo.envs.tabletop import TabletopEnv
from ppo.envs.tabletop_world import CONTACT_HEIGHT, FIRM_HEIGHT, MOVE_STEP, Item, Task, World

HOVER_HEIGHT, TRAVEL_HEIGHT = 0.2, 0.4
ALIGNED = 0.055
"""Per axis, table units: closer than this the operator does not correct its position any more."""
NEAR, NEAR_PUSHING = 0.3, 0.15
"""Per axis: from here on it comes down to HOVER_HEIGHT; closed fingers stay high longer, to touch nothing else."""
OPEN, CLOSE = -1.0, 1.0


@dataclass
class Episode:
    """What one episode of an operator recorded, before each action (n steps).

    Attributes:
        images: n images, (H, W, 3) uint8.
        actions: (n, 7) float32, LIBERO's raw convention.
        rewards: (n,) float32, of the step taken.
        success: the task was solved.
        states: (n, 8) float32: gripper position, three zero rotations, the two finger positions.
        joint_states: (n, 7) float32: the table has no joints; gripper position and opening, padded with zeros.
    """

    images: list[np.ndarray]
    actions: np.ndarray
    rewards: np.ndarray
    success: bool
    states: np.ndarray
    joint_states: np.ndarray


def _toward(delta: float) -> float:
    """The action component, a multiple of 0.5, that best covers `delta` table units."""
    return float(np.clip(np.round(2.0 * delta / MOVE_STEP) / 2.0, -1.0, 1.0)) + 0.0  # never -0.0


def _action(world: World, goal_xy: np.ndarray, goal_z: float, gripper: float) -> np.ndarray:
    delta_xy = goal_xy - world.gripper[:2]
    action = np.zeros(ACTION_DIM, dtype=np.float32)
    action[:2] = [_toward(delta) if abs(delta) > ALIGNED else 0.0 for delta in delta_xy]
    action[2] = _toward(goal_z - world.gripper[2])
    action[6] = gripper
    return action


class TabletopExpert:
    """Solves the task of an environment from its true state.

    Args:
        env: the environment it looks at.
        imperfection: chance in [0, 1] to rush at each moment where that is possible; 0 is careful.
        rng: draws those chances.
        task: what it tries to do; None: the environment's task (another one shows what a wrong instruction gives).
    """

    def __init__(
        self,
        env: TabletopEnv,
        imperfection: float,
        rng: np.random.Generator,
        task: Task | None = None,
    ):
        if not 0.0 <= imperfection <= 1.0:
            raise ValueError(f"imperfection {imperfection}: must be a probability in [0, 1]")
        self.env, self.imperfection, self.rng, self.task = env, imperfection, rng, task

    def act(self) -> np.ndarray:
        """The next action, (7,) float32 in LIBERO's raw convention."""
        world, task = self.env.world, self.task or self.env.task
        target, receptacle = world.item(task.target), world.item(task.receptacle)
        if task.verb == "push":
            return self._push(world, target, receptacle)
        return self._pick(world, target, receptacle)

    def _rushes(self) -> bool:
        return bool(self.rng.random() < self.imperfection)

    def _above(
        self, world: World, item: Item, gripper: float, height: float, near: float
    ) -> np.ndarray | None:
        """The action that brings the gripper above an item, or None when it is there and low enough to decide."""
        offset = np.abs(item.position - world.gripper[:2]).max()
        if offset <= ALIGNED and world.gripper[2] <= CONTACT_HEIGHT:
            return None
        if offset < near:
            height = (
                HOVER_HEIGHT
                if world.held is not None
                else min(HOVER_HEIGHT, float(world.gripper[2]))
            )
        return _action(world, item.position, height, gripper)

    def _pick(self, world: World, target: Item, receptacle: Item) -> np.ndarray:
        holding = world.held is target
        goal, grip, change = (receptacle, CLOSE, OPEN) if holding else (target, OPEN, CLOSE)
        approach = self._above(world, goal, grip, HOVER_HEIGHT if holding else TRAVEL_HEIGHT, NEAR)
        if approach is not None:
            return approach
        if world.gripper[2] <= FIRM_HEIGHT or self._rushes():
            return _action(world, world.gripper[:2], world.gripper[2], change)
        return _action(world, world.gripper[:2], 0.0, grip)

    def _push(self, world: World, target: Item, receptacle: Item) -> np.ndarray:
        if world.held is not target:
            if world.held is not None or not world.closed:
                return _action(
                    world, target.position, TRAVEL_HEIGHT, CLOSE if world.held is None else OPEN
                )
            approach = self._above(world, target, CLOSE, TRAVEL_HEIGHT, NEAR_PUSHING)
            return (
                approach if approach is not None else _action(world, world.gripper[:2], 0.0, CLOSE)
            )
        if not world.pressed:
            return _action(world, world.gripper[:2], HOVER_HEIGHT, OPEN)
        arrived = np.abs(receptacle.position - world.gripper[:2]).max() <= ALIGNED
        if arrived:
            return _action(world, world.gripper[:2], TRAVEL_HEIGHT, CLOSE)
        goes_down = not world.firm and not self._rushes()
        if goes_down:
            return _action(world, world.gripper[:2], 0.0, CLOSE)
        return _action(world, receptacle.position, float(world.gripper[2]), CLOSE)


def run_expert_episode(
    env: TabletopEnv,
    request: ResetRequest,
    imperfection: float,
    rng: np.random.Generator,
    task: Task | None = None,
) -> Episode:
    """Let the operator play one episode, successful or not, and return what it recorded."""
    images, actions, rewards, states = [env.reset(request)], [], [], []
    expert = TabletopExpert(env, imperfection, rng, task)
    while True:
        states.append(_state(env.world))
        actions.append(expert.act())
        result = env.step(actions[-1])
        rewards.append(result.reward)
        if result.terminated or result.truncated:
            break
        images.append(result.image)
    state_T8 = np.stack(states)
    joint_T7 = np.zeros((len(states), 7), dtype=np.float32)
    joint_T7[:, :4] = state_T8[:, [0, 1, 2, 6]]
    return Episode(
        images,
        np.stack(actions),
        np.asarray(rewards, dtype=np.float32),
        result.success,
        state_T8,
        joint_T7,
    )


def _state(world: World) -> np.ndarray:
    finger = 0.0 if world.closed else 0.04
    return np.asarray([*world.gripper, 0.0, 0.0, 0.0, finger, -finger], dtype=np.float32)
