"""A world whose process dies once in a chosen episode; its image holds task, initial state and step."""

import os
from pathlib import Path

import numpy as np

from ppo.envs.base import StepResult, TaskSuite


class DyingEnv:
    def __init__(self, image_size, max_steps=None, seed=0, marker=None):
        self.image_size, self.marker = image_size, Path(marker)

    def image(self):
        pixel = [self.request.task_id, self.request.init_state_id, self.step_index]
        return np.full((self.image_size, self.image_size, 3), pixel, np.uint8)

    def reset(self, request):
        self.request, self.step_index = request, 0
        return self.image()

    def step(self, action):
        self.step_index += 1
        if (self.request.task_id, self.request.init_state_id) == (
            0,
            1,
        ) and not self.marker.exists():
            self.marker.touch()
            os._exit(3)
        return StepResult(
            self.image(), 1.0, terminated=self.step_index == 3, truncated=False, success=True
        )

    def render(self, size):
        return self.image()

    def close(self):
        pass


SUITE = TaskSuite("dying", ("first", "second"), max_steps=3, num_init_states=3, make_env=DyingEnv)
