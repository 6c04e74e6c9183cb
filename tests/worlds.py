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


class Sprint(PushRight):
    """Succeeds after as many actions to the right as the seed says: 1, 2, or more than the limit."""

    def step(self, action: np.ndarray) -> StepResult:
        result = super().step(action)
        success = self.num_right == self.num_needed
        truncated = self.num_steps >= self.max_steps and not success
        return StepResult(result.image, float(success), success, truncated, success)

    def reset(self, request: ResetRequest) -> np.ndarray:
        self.num_needed = (1, 2, 9)[request.seed % 3]
        return super().reset(request)


SPRINT_SUITE = TaskSuite("sprint", SUITE.instructions, LENGTH, 5, Sprint)


class Lottery(PushRight):
    """An episode's first action sets its probability of success; lengths are like LIBERO's.

    Whether it succeeds, and after how many steps (72 on average, deviation 14), depends on the seed
    and on that probability. A failure lasts until the time limit.
    """

    def reset(self, request: ResetRequest) -> np.ndarray:
        rng = np.random.default_rng(request.seed)
        self.ticket, self.num_needed = rng.random(), max(1, round(rng.normal(72, 14)))
        return super().reset(request)

    def step(self, action: np.ndarray) -> StepResult:
        if self.num_steps == 0:
            self.wins = self.ticket < action[0]
        self.num_steps += 1
        success = self.wins and self.num_steps == min(self.num_needed, self.max_steps)
        ended = not success and self.num_steps == self.max_steps
        return StepResult(self._image(), float(success), success, ended, success)


LOTTERY_SUITE = TaskSuite("lottery", SUITE.instructions[:1], 220, 5, Lottery)


class Drift(PushRight):
    """The policy and noise push a point: a success at 1. Training is quicker than evaluation."""

    def __init__(
        self, image_size: int, max_steps: int | None = None, seed: int = 0, *, quick: bool = False
    ) -> None:
        super().__init__(image_size, max_steps or 30, seed)
        self.speed = 3.0 if quick else 1.0

    def reset(self, request: ResetRequest) -> np.ndarray:
        self.place = -0.5
        return super().reset(request)

    def step(self, action: np.ndarray) -> StepResult:
        self.num_steps += 1
        self.place += self.speed * (0.05 * float(action[0]) + 0.2 * self.rng.normal())
        success = self.place >= 1.0
        truncated = self.num_steps >= self.max_steps and not success
        return StepResult(self._image(), float(success), success, truncated, success)


DRIFT_SUITE = TaskSuite(
    "drift", SUITE.instructions, 30, 20, Drift,
    training_options=lambda options: {"quick": True, **options},
)  # fmt: skip


def _count_optimizer_step(*_: object) -> None:
    with open(os.environ["PPO_VLA_TEST_UPDATES"], "ab") as file:
        file.write(b".")


# Trainers import this module for the suite's instructions: they add a byte to this file with every optimizer step.
if "PPO_VLA_TEST_UPDATES" in os.environ and "torch" in sys.modules:
    from torch.optim.optimizer import register_optimizer_step_post_hook

    register_optimizer_step_post_hook(_count_optimizer_step)
