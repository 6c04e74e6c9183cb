"""Which task the next episodes get: those solved about half of the time teach most.

`Curriculum` is the arithmetic, `CurriculumManager` the class that a Ray actor is made of:
`ray.remote(CurriculumManager).options(num_cpus=0).remote(...)`. This module knows no Ray.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from prismatic.model_files import is_int, is_list_of, is_number, write_whole

# Success rate assumed of a task that was never tried: sampled as often as one solved half of the time.
PRIOR_SUCCESS = 0.5


class Curriculum:
    """Samples task ids by an exponential moving average (EMA) of each task's success.

        weight = exp(-|ema - 0.5| / tau)
        probability = min_prob + (1 - num_tasks * min_prob) * weight / sum of weights

    A result updates ema to (1 - ema_alpha) * ema + ema_alpha * success, from a neutral prior of 0.5.

    Args:
        task_ids: the tasks to choose from, a subset of the suite's; or a number: 0 .. task_ids - 1.
        ema_alpha: weight of the newest result, in (0, 1].
        tau: how sharply tasks near 50 % are preferred, > 0; large: uniform.
        min_prob: least probability of every task; times the number of tasks it must not exceed 1.
        seed: of the sampling.
        uniform: sample all tasks equally (the statistics are kept all the same).

    Raises:
        ValueError: an argument is out of bounds.
    """

    def __init__(
        self,
        task_ids: Sequence[int] | int,
        *,
        ema_alpha: float = 0.1,
        tau: float = 0.2,
        min_prob: float = 0.02,
        seed: int = 0,
        uniform: bool = False,
    ) -> None:
        self.task_ids = (
            list(range(task_ids)) if isinstance(task_ids, int) else [int(i) for i in task_ids]
        )
        self.ema_alpha, self.tau, self.min_prob, self.uniform = ema_alpha, tau, min_prob, uniform
        self._check()
        self._row = {task_id: row for row, task_id in enumerate(self.task_ids)}
        num_tasks = len(self.task_ids)
        self.ema = np.full(num_tasks, PRIOR_SUCCESS)
        self.num_episodes = np.zeros(num_tasks, dtype=np.int64)
        self.num_successes = np.zeros(num_tasks, dtype=np.int64)
        self._rng = np.random.default_rng(seed)

    def _check(self) -> None:
        num_tasks = len(self.task_ids)
        if num_tasks == 0 or len(set(self.task_ids)) != num_tasks:
            raise ValueError(f"task_ids {self.task_ids}: give at least one, each once")
        if not 0 < self.ema_alpha <= 1:
            raise ValueError(f"curriculum_ema_alpha {self.ema_alpha} must lie in (0, 1]")
        if not self.tau > 0:
            raise ValueError(f"curriculum_tau {self.tau} must be positive")
        if self.min_prob < 0 or self.min_prob * num_tasks > 1 + 1e-9:
            raise ValueError(
                f"curriculum_min_prob {self.min_prob} for each of {num_tasks} tasks must be between 0 and 1 in all: "
                f"use at most {1 / num_tasks:.4g}"
            )

    def probabilities(self) -> np.ndarray:
        """Present sampling probability of each task, in the order of `task_ids`; they add up to 1."""
        num_tasks = len(self.task_ids)
        if self.uniform:
            return np.full(num_tasks, 1 / num_tasks)
        distance = np.abs(self.ema - PRIOR_SUCCESS)
        with np.errstate(over="ignore"):  # a tiny tau must not make all of them 0
            weight = np.exp(-(distance - distance.min()) / self.tau)
        probability = (
            self.min_prob + max(1 - num_tasks * self.min_prob, 0.0) * weight / weight.sum()
        )
        return probability / probability.sum()

    def sample(self, num: int) -> list[int]:
        """Draw `num` task ids independently."""
        rows = self._rng.choice(len(self.task_ids), size=num, p=self.probabilities())
        return [self.task_ids[row] for row in rows]

    def update(self, task_ids: Sequence[int], successes: Sequence[bool]) -> None:
        """Take in finished episodes, in their order.

        Raises:
            ValueError: the lengths differ, or a task is not one of the curriculum's; nothing is changed then.
        """
        unknown = sorted({int(i) for i in task_ids} - self._row.keys())
        if unknown or len(task_ids) != len(successes):
            raise ValueError(
                f"{len(task_ids)} results with {len(successes)} successes, unknown tasks {unknown}: "
                f"report one success for each episode of tasks {self.task_ids}"
            )
        for task_id, success in zip(task_ids, successes, strict=True):
            row = self._row[int(task_id)]
            self.num_episodes[row] += 1
            self.num_successes[row] += bool(success)
            self.ema[row] += self.ema_alpha * (float(bool(success)) - self.ema[row])

    def stats(self) -> dict[int, dict[str, float]]:
        """Per task id: probability, num_episodes, num_successes and, once it was tried, success_ema."""
        probability = self.probabilities()
        return {
            task_id: {
                "probability": float(probability[row]),
                "num_episodes": int(self.num_episodes[row]),
                "num_successes": int(self.num_successes[row]),
            }
            | ({"success_ema": float(self.ema[row])} if self.num_episodes[row] else {})
            for row, task_id in enumerate(self.task_ids)
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs, of plain JSON types."""
        return {
            "task_ids": list(self.task_ids),
            "ema": self.ema.tolist(),
            "num_episodes": self.num_episodes.tolist(),
            "num_successes": self.num_successes.tolist(),
            "rng": self._rng.bit_generator.state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`'s result: the same tasks will be sampled as without the interruption.

        Raises:
            ValueError: the state is of other tasks, or is damaged; nothing is changed then.
        """
        if problems := self._state_problems(state):
            raise ValueError("the saved curriculum cannot be continued: " + "; ".join(problems))
        rng = np.random.default_rng(0)
        try:
            rng.bit_generator.state = state["rng"]
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            raise ValueError(
                f"the saved curriculum's random state is damaged: {error!r}"
            ) from error
        self.ema = np.array(state["ema"], dtype=np.float64)
        self.num_episodes = np.array(state["num_episodes"], dtype=np.int64)
        self.num_successes = np.array(state["num_successes"], dtype=np.int64)
        self._rng = rng

    def _state_problems(self, state: Any) -> list[str]:
        if not isinstance(state, dict):
            return ["it is not a JSON object"]
        if state.get("task_ids") != self.task_ids:
            return [
                f"it has tasks {state.get('task_ids')}, this run {self.task_ids}: give the saved run's --task_ids"
            ]
        num_tasks, large = len(self.task_ids), 1 << 62
        episodes, successes = state.get("num_episodes"), state.get("num_successes")
        problems = []
        if not is_list_of(state.get("ema"), lambda x: is_number(x) and 0 <= x <= 1, num_tasks):
            problems.append(f"ema must be {num_tasks} numbers in [0, 1]")
        if not all(
            is_list_of(counts, lambda n: is_int(n, 0, large), num_tasks)
            for counts in (episodes, successes)
        ):
            problems.append(f"num_episodes and num_successes must be {num_tasks} counts")
        elif any(s > n for s, n in zip(successes, episodes, strict=True)):  # type: ignore[arg-type]
            problems.append("it has more successes than episodes")
        return problems


class CurriculumManager:
    """A curriculum that several processes may ask, once it is made a Ray actor; see `Curriculum` for the arguments."""

    def __init__(self, task_ids: Sequence[int] | int, **options: Any) -> None:
        self.curriculum = Curriculum(task_ids, **options)

    def get_batch(self, num: int) -> list[int]:
        """Draw the tasks of the next `num` episodes."""
        return self.curriculum.sample(num)

    def report_results(self, task_ids: Sequence[int], successes: Sequence[bool]) -> None:
        """Take in finished episodes, in their order."""
        self.curriculum.update(task_ids, successes)

    def stats(self) -> dict[int, dict[str, float]]:
        """Statistics by task id; see `Curriculum.stats`."""
        return self.curriculum.stats()

    def state_dict(self) -> dict[str, Any]:
        """See `Curriculum.state_dict`."""
        return self.curriculum.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Curriculum.load_state_dict`."""
        self.curriculum.load_state_dict(state)

    def save(self, path: str) -> None:
        """Write statistics and state as JSON; a reader never sees half a file.

        Raises OSError naming the file that could not be written; the earlier one is unchanged then.
        """
        content = {
            "stats": {str(task_id): values for task_id, values in self.curriculum.stats().items()},
            "state": self.curriculum.state_dict(),
        }
        write_whole(path, json.dumps(content, indent=1) + "\n")
