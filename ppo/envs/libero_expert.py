"""A scripted expert for LIBERO: it solves tasks from the simulator's state, and whole episodes of it are recorded.

It never turns its hand: it picks things up and puts them down elsewhere (all of libero_spatial, most of libero_goal),
and pulls, strikes and pushes (the rest of libero_goal but the middle drawer). `libero_expert_motion` says how it moves,
`libero_expert_plans` what it takes hold of and where. With `imperfection` it is pushed off its way now and then, and
recovers: demonstrations then show that too. With `haste` it drops what it carries short of its place now and then, and
fetches it again if that has failed.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ppo.envs.base import ResetRequest
from ppo.envs.libero_expert_motion import (
    OPEN,
    PickPlace,
    Push,
    is_noop,
    is_pushing,
    make_action,
    may_drop,
    pick_place,
    push,
)
from ppo.envs.libero_expert_plans import make_plan
from ppo.envs.libero_expert_scene import Scene
from ppo.envs.tabletop_expert import Episode as BaseEpisode

EXPERT_TASKS: dict[str, tuple[int, ...]] = {
    "libero_spatial": tuple(range(10)),
    "libero_goal": tuple(range(1, 10)),
}
"""Suite -> the tasks that the expert can do."""

STUCK_STEPS = 40
"""So many steps close to the object without closing the fingers: it tries another grasp."""
STUCK_RADIUS = 0.06
LOST_DISTANCE = 0.05
"""Fingers that open further than this from the place have lost the object."""

BURST_RATE = 0.06
"""Chance per step, at imperfection 1, that a burst of pushes begins."""
BURST_STEPS = (3, 6)
BURST_LOW, BURST_HIGH = np.array([-1.0, -1.0, -0.3]), np.array([1.0, 1.0, 1.0])
"""A burst's constant translation command is drawn between these: seldom and slowly downwards, where things stand."""


@dataclass
class Episode(BaseEpisode):
    """What one episode recorded; `wrist_images` like `images` from the wrist camera, None if not recorded."""

    wrist_images: list[np.ndarray] | None = None


class LiberoExpert:
    """Solves the running episode of an environment from the simulator's state. Made anew after each reset.

    Args:
        domain: `LiberoEnv.domain`.
        imperfection: how often it is pushed off its way, in [0, 1]; 0 is the best it can.
        rng: draws the pushes and the drops; may be None without imperfection and haste.
        haste: chance in [0, 1] of dropping the object, drawn anew at every step at which `may_drop` allows it.

    Raises:
        ValueError: an imperfection or a haste out of range or without generator, or a task that it cannot do.
    """

    def __init__(
        self,
        domain: Any,
        imperfection: float = 0.0,
        rng: np.random.Generator | None = None,
        haste: float = 0.0,
    ) -> None:
        for name, value in (("imperfection", imperfection), ("haste", haste)):
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} {value}: must be in [0, 1]")
            if value and rng is None:
                raise ValueError(f"{name} needs a generator")
        self.scene, self.imperfection, self.haste, self.rng = (
            Scene(domain),
            imperfection,
            haste,
            rng,
        )
        goal, *more = domain.parsed_problem["goal_state"]
        if more:
            raise ValueError(f"the scripted expert cannot do several things: {goal}, {more}")
        self.command = OPEN
        self._attempt = 0
        self._num_tries = 0
        self._burst: list[np.ndarray] = []
        self._task = make_plan(self.scene, goal)

    def act(self) -> np.ndarray:
        """The next action, (7,) float32 in LIBERO's raw convention; never a no-op."""
        hand, task = self.scene.hand(self.command), self._task(self._attempt)
        if isinstance(task, Push):
            action = push(hand, task)
            is_stuck = self._count(is_pushing(hand, task)) > task.patience
        else:
            action = pick_place(hand, task)
            is_open, opens = hand.command == OPEN, action[6] == OPEN
            is_near = np.hypot(*(task.object + task.grasp - hand.position)[:2]) < STUCK_RADIUS
            is_stuck = self._count(bool(is_near and opens)) > STUCK_STEPS
            # The fingers closed on nothing, or lost the object on the way.
            is_stuck |= bool(
                opens and not is_open and np.linalg.norm(task.object - task.place) > LOST_DISTANCE
            )
        if is_stuck:
            self._attempt, self._num_tries = self._attempt + 1, 0
        if isinstance(task, PickPlace) and may_drop(hand, task):
            action = self._hasty(action)
        action = self._pushed(action)
        self.command = float(action[6])
        return action

    def _count(self, is_trying: bool) -> int:
        """For how many steps in a row it has been trying the same."""
        self._num_tries = self._num_tries + 1 if is_trying else 0
        return self._num_tries

    def _hasty(self, action: np.ndarray) -> np.ndarray:
        """The action, or the same movement with opening fingers."""
        if not self.haste:
            return action
        assert self.rng is not None
        return make_action(action[:3], OPEN) if self.rng.random() < self.haste else action

    def _pushed(self, action: np.ndarray) -> np.ndarray:
        """The action, or a push instead of its translation; the gripper goes on as it would."""
        if not self.imperfection:
            return action
        assert self.rng is not None
        if not self._burst and self.rng.random() < BURST_RATE * self.imperfection:
            low, high = BURST_STEPS
            self._burst = [self.rng.uniform(BURST_LOW, BURST_HIGH)] * int(
                self.rng.integers(low, high + 1)
            )
        if self._burst:
            return make_action(self._burst.pop(), float(action[6]))
        return action


def run_expert_episode(
    env: Any,
    request: ResetRequest,
    imperfection: float,
    rng: np.random.Generator,
    record_size: int | None = None,
    haste: float = 0.0,
    wrist_camera: bool = True,
) -> Episode:
    """Let the expert play one episode, successful or not, and return what it recorded.

    Args:
        env: a `ppo.envs.libero.LiberoEnv`.
        request: the episode.
        imperfection: see LiberoExpert.
        rng: draws the pushes and drops.
        record_size: record agentview and wrist camera at this size, as rendered; None: what the policy sees, no wrist.
        haste: see LiberoExpert.
        wrist_camera: without: the agentview alone.
    """
    image = env.reset(request)
    expert = LiberoExpert(env.domain, imperfection, rng, haste)
    images, actions, rewards, states, joint_states, wrist_images = [], [], [], [], [], []
    last_gripper = OPEN
    while True:
        action = expert.act()
        assert not is_noop(action, last_gripper), f"the expert did nothing: {action}"
        last_gripper = float(action[6])
        state, joint_state = env.proprioception()
        states.append(state)
        joint_states.append(joint_state)
        images.append(image if record_size is None else env.render(record_size))
        if record_size is not None and wrist_camera:
            wrist_images.append(env.render(record_size, camera="robot0_eye_in_hand"))
        result = env.step(action)
        image = result.image
        actions.append(action)
        rewards.append(result.reward)
        if result.terminated or result.truncated:
            break
    return Episode(
        images,
        np.stack(actions),
        np.asarray(rewards, dtype=np.float32),
        result.success,
        np.stack(states),
        np.stack(joint_states),
        wrist_images or None,
    )
