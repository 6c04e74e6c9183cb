"""A world in which a random policy is rewarded half of the time, so that a few PPO steps show whether it learns."""

import os
import sys

import numpy as np

from ppo.envs.base import ResetRequest, StepResult, TaskSuite

LENGTH = 4


class PushRight:
    """Reward 1 for each action with dx > 0 (task 0) or dx < 0 (task 1); a success is an episode with 3 of 4 such."""

    def __init__(self, image_size: int, max_steps: int | None = None, seed: int = 0) -> None:
        self.image_size, self.max_steps = image_size, max_steps or LENGTH

    def reset(self, request: ResetRequest) -> np.ndarray:
        self.sign = 1.0 if request.task_id == 0 else -1.0
        self.rng = np.random.default_rng(request.seed)
        self.num_steps = self.num_right = 0
        return self._image()

    def step(self, action: np.ndarray) -> StepResult:
        right = bool(self.sign * action[0] > 0)
        self.num_steps, self.num_right = self.num_steps + 1, self.num_right + right
        ended = self.num_steps >= self.max_steps
        success = ended and self.num_right >= 3
        return StepResult(self._image(), float(right), success, ended and not success, success)

    def render(self, size: int) -> np.ndarray:
        return np.zeros((size, size, 3), dtype=np.uint8)

    def close(self) -> None:
        pass

    def _image(self) -> np.ndarray:
        return self.rng.integers(0, 256, (self.image_size, self.image_size, 3), dtype=np.uint8)


class Mortal(PushRight):
    """Dies in the third step of every fourth episode or so."""

    def step(self, action: np.ndarray) -> StepResult:
        if self.num_steps == 2 and self.doomed:
            raise RuntimeError("the simulator died")
        return super().step(action)

    def reset(self, request: ResetRequest) -> np.ndarray:
        self.doomed = request.seed % 4 == 0
        return super().reset(request)


SUITE = TaskSuite("push_right", ("push the red block", "pick up the plate"), LENGTH, 5, PushRight)
MORTAL_SUITE = TaskSuite("mortal", SUITE.instructions, LENGTH, 5, Mortal)


class Unseen(PushRight):
    """Which action is rewarded is decided by the seed, and nothing of it shows: every image is the same."""

    def reset(self, request: ResetRequest) -> np.ndarray:
        super().reset(request)
        self.sign = 1.0 if request.seed % 2 else -1.0
        return self._image()

    def _image(self) -> np.ndarray:
        return np.full((self.image_size, self.image_size, 3), 77, dtype=np.uint8)


UNSEEN_SUITE = TaskSuite("unseen", SUITE.instructions, LENGTH, 5, Unseen)


class Counted(PushRight):
    """Adds a byte to the file PPO_VLA_TEST_STEPS with every step, so that a test sees how far a run is."""

    def step(self, action: np.ndarray) -> StepResult:
        with open(os.environ["PPO_VLA_TEST_STEPS"], "ab") as file:
            file.write(b".")
        return super().step(action)


COUNTED_SUITE = TaskSuite("counted", SUITE.instructions, LENGTH, 5, Counted)


def _count_optimizer_step(*_: object) -> None:
    with open(os.environ["PPO_VLA_TEST_UPDATES"], "ab") as file:
        file.write(b".")


# Trainers import this module for the suite's instructions: they add a byte to this file with every optimizer step.
if "PPO_VLA_TEST_UPDATES" in os.environ and "torch" in sys.modules:
    from torch.optim.optimizer import register_optimizer_step_post_hook

    register_optimizer_step_post_hook(_count_optimizer_step)
