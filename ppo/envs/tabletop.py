"""The embedded world `tabletop`: ten language tasks on a drawn table, LIBERO's action, no simulator to install.

`TabletopEnv` is one environment behind `ppo.envs.base.Environment`; `SUITE` is what the registry finds. An episode
of a fixed initial state has a layout that depends on the task and the state's number only; the request's seed decides
the actuation noise. Reward: 1 at the step that solves the task, else 0.
"""

import numpy as np

from ppo.envs.base import ResetRequest, StepResult, TaskSuite, check_request, checked_action
from ppo.envs.tabletop_render import render_world
from ppo.envs.tabletop_world import TASKS, Task, World, random_world

MAX_STEPS = 16
NUM_INIT_STATES = 50
# Keep apart the streams of fixed layouts, random layouts and noise.
_FIXED, _RANDOM, _NOISE = 101, 102, 103


class TabletopEnv:
    """One table (see the module docstring).

    Args:
        image_size: side of the returned images in pixels.
        max_steps: time limit; None: MAX_STEPS.
        seed: added to every request's seed, so that runs can differ.
    """

    def __init__(self, image_size: int, max_steps: int | None = None, seed: int = 0):
        if image_size < 16:
            raise ValueError(f"image_size {image_size}: the table needs at least 16 pixels")
        if max_steps is not None and max_steps < 1:
            raise ValueError(f"max_steps {max_steps}: must be at least 1")
        self.image_size = image_size
        self.max_steps = max_steps or MAX_STEPS
        self.seed = seed
        self.task: Task = TASKS[0]
        self._world: World | None = None
        self._rng = np.random.default_rng(seed)
        self._num_steps = 0

    @property
    def world(self) -> World:
        """The present state, for experts and tests."""
        assert self._world is not None, "reset the environment first"
        return self._world

    def reset(self, request: ResetRequest) -> np.ndarray:
        """Start an episode and return its first image, (H, W, 3) uint8.

        Raises:
            ValueError: unknown task or initial state.
        """
        check_request(request, "tabletop", len(TASKS), NUM_INIT_STATES)
        state_id = request.init_state_id
        seed = abs(request.seed + self.seed)
        layout_key = (
            (_RANDOM, request.task_id, seed)
            if state_id is None
            else (_FIXED, request.task_id, state_id)
        )
        self.task = TASKS[request.task_id]
        self._world = random_world(np.random.default_rng(layout_key), self.task)
        self._rng = np.random.default_rng(
            (_NOISE, request.task_id, seed, 0 if state_id is None else state_id + 1)
        )
        self._num_steps = 0
        return self.render(self.image_size)

    def step(self, action: np.ndarray) -> StepResult:
        """Apply one action, (7,) in [-1, 1]: dx, dy, dz, three unused rotations, gripper (-1 open, +1 close).

        Raises:
            ValueError: an action of another shape, or not finite.
        """
        self.world.move(checked_action(action), self._rng)
        self._num_steps += 1
        success = self.world.solved(self.task)
        truncated = self._num_steps >= self.max_steps and not success
        return StepResult(self.render(self.image_size), float(success), success, truncated, success)

    def render(self, size: int) -> np.ndarray:
        """Draw the present state, (size, size, 3) uint8."""
        return render_world(self.world, size)

    def close(self) -> None:
        """Forget the world."""
        self._world = None


SUITE = TaskSuite(
    name="tabletop",
    instructions=tuple(task.instruction for task in TASKS),
    max_steps=MAX_STEPS,
    num_init_states=NUM_INIT_STATES,
    make_env=TabletopEnv,
)
