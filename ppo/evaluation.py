"""Evaluation: run a given list of episodes over a vector of environments, and count what came out.

Shapes: B environments of a group, H W image.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np

from ppo.envs.base import ResetRequest
from utils.reports.statistics import wilson_interval

# Everyone who compares success rates must use one seed: it decides an episode's actuation noise.
EVALUATION_SEED = 7

# Policy: images (B, H, W, 3) uint8 and task ids (B,) -> LIBERO's raw actions (B, 7) float32.
Act = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class EpisodeResult:
    """One finished episode; `length` in environment steps, `num_dropped` voided attempts before it."""

    task_id: int
    init_state_id: int | None
    seed: int
    success: bool
    length: int
    episode_return: float
    num_dropped: int = 0


@dataclass
class EvaluationRun:
    """What `run_episodes` gives.

    Attributes:
        episodes: finished episodes in the order they ended.
        void: requests whose every attempt was dropped (the environment died): they count nowhere else.
        num_dropped: dropped attempts, re-run ones included.
        num_env_steps: environment steps of finished episodes.
        act_s, env_s, wall_s: seconds spent in the policy, waiting for environments, and in all.
    """

    episodes: list[EpisodeResult] = field(default_factory=list)
    void: list[ResetRequest] = field(default_factory=list)
    num_dropped: int = 0
    num_env_steps: int = 0
    act_s: float = 0.0
    env_s: float = 0.0
    wall_s: float = 0.0


class EpisodeObserver(Protocol):
    """Sees every image of every episode, for recording."""

    def start(self, env_id: int, request: ResetRequest, image: np.ndarray) -> None:
        """Note the first image (H, W, 3) uint8 of an episode; an unfinished episode of this environment is void."""

    def step(self, env_id: int, image: np.ndarray) -> None:
        """Note the image after a step (the episode's real last image at its end)."""

    def end(self, env_id: int, result: EpisodeResult) -> None:
        """Note that the episode is over."""


class _Group:
    """Environments that are stepped together, and the request and image that each has."""

    def __init__(self, env_ids: Sequence[int]) -> None:
        self.env_ids = list(env_ids)
        self.running: dict[int, ResetRequest] = {}
        self.images: dict[int, np.ndarray] = {}
        self.num_steps: Counter[int] = Counter()
        self.sent: list[int] = []
        self.offered: dict[int, ResetRequest] = {}

    def begin(
        self,
        env_id: int,
        request: ResetRequest,
        image: np.ndarray,
        observer: EpisodeObserver | None,
    ) -> None:
        self.running[env_id] = request
        self.images[env_id] = np.array(
            image
        )  # the vector's buffer is written again by the next step
        self.num_steps[env_id] = 0
        if observer is not None:
            observer.start(env_id, request, self.images[env_id])


class _Evaluation:
    """State of one `run_episodes` call."""

    def __init__(
        self,
        vector_env: Any,
        num_envs: int,
        act: Act,
        requests: Sequence[ResetRequest],
        max_attempts: int,
    ) -> None:
        self.vector_env, self.act, self.max_attempts = vector_env, act, max_attempts
        self.observer: EpisodeObserver | None = None
        self.queue = deque(requests)
        halves = np.array_split(np.arange(min(num_envs, len(requests))), 2)
        self.groups = [_Group(ids.tolist()) for ids in halves if len(ids)]
        self.drops: Counter[ResetRequest] = Counter()
        self.run = EvaluationRun()

    def fill(self, group: _Group) -> None:
        """Give waiting requests to idle environments (at the start, and near the end of the queue)."""
        idle = [i for i in group.env_ids if i not in group.running]
        pairs = [(env_id, self.queue.popleft()) for env_id in idle[: len(self.queue)]]
        if pairs:
            images = self.vector_env.reset([e for e, _ in pairs], [r for _, r in pairs])
            for (env_id, request), image in zip(pairs, images, strict=True):
                group.begin(env_id, request, image, self.observer)

    def send(self, group: _Group) -> None:
        """Act and step. Waiting requests are offered to the environments that have run longest."""
        started = time.perf_counter()
        group.sent = sorted(group.running)
        task_ids = np.array([group.running[i].task_id for i in group.sent])
        actions = self.act(np.stack([group.images[i] for i in group.sent]), task_ids)
        self.run.act_s += time.perf_counter() - started
        by_age = sorted(group.sent, key=lambda i: -group.num_steps[i])
        # What idle environments of the other group can start at once is not offered here.
        num_idle = sum(
            len(other.env_ids) - len(other.running) for other in self.groups if other is not group
        )
        num_offered = max(0, len(self.queue) - num_idle)
        group.offered = {env_id: self.queue.popleft() for env_id in by_age[:num_offered]}
        self.vector_env.send(group.sent, actions, [group.offered.get(i) for i in group.sent])

    def receive(self, group: _Group) -> None:
        """Take the step's results: note ended episodes, start offered ones, hand back what was not used."""
        started = time.perf_counter()
        step = self.vector_env.receive(group.sent)
        self.run.env_s += time.perf_counter() - started
        for row, env_id in enumerate(group.sent):
            request = group.running[env_id]
            done = bool(step.terminated[row] or step.truncated[row])
            if not step.dropped[row]:
                self._note_step(group, env_id, step.final_images[row] if done else step.images[row])
            if step.dropped[row]:
                self._drop(request)
            elif done:
                self._end(env_id, request, step, row)
            if done or step.dropped[row]:
                del group.running[env_id]
            if step.reset_used[row]:
                group.begin(env_id, group.offered.pop(env_id), step.images[row], self.observer)
        # In the order they were offered: an environment is then offered the same request again, which it prepares for.
        self.queue.extendleft(reversed(group.offered.values()))
        group.sent, group.offered = [], {}

    def _note_step(self, group: _Group, env_id: int, image: np.ndarray) -> None:
        group.images[env_id] = np.array(image)
        group.num_steps[env_id] += 1
        if self.observer is not None:
            self.observer.step(env_id, group.images[env_id])

    def _end(self, env_id: int, request: ResetRequest, step: Any, row: int) -> None:
        result = EpisodeResult(
            request.task_id,
            request.init_state_id,
            request.seed,
            bool(step.success[row]),
            int(step.episode_length[row]),
            float(step.episode_return[row]),
            self.drops[request],
        )
        self.run.episodes.append(result)
        self.run.num_env_steps += result.length
        if self.observer is not None:
            self.observer.end(env_id, result)

    def _drop(self, request: ResetRequest) -> None:
        self.run.num_dropped += 1
        self.drops[request] += 1
        if self.drops[request] < self.max_attempts:
            self.queue.append(request)
        else:
            self.run.void.append(request)


def run_episodes(
    vector_env: Any,
    num_envs: int,
    act: Act,
    requests: Sequence[ResetRequest],
    *,
    observer: EpisodeObserver | None = None,
    max_attempts: int = 3,
) -> EvaluationRun:
    """Run every requested episode once, in two groups: one simulates while the policy acts for the other.

    An episode whose environment died is run again, up to `max_attempts` times. With the same arguments (and no deaths)
    the policy sees the same batches in the same order.

    Args:
        vector_env: a `ppo.envs.vector.VectorEnv` (its `reset`, `send` and `receive`).
        num_envs: how many of its environments to use (ids 0 .. num_envs - 1).
        act: images (B, H, W, 3) uint8 and task ids (B,) -> actions (B, 7) float32.
        requests: the episodes, all different.
        observer: sees every image.
        max_attempts: attempts per episode before it is void.
    """
    if len(set(requests)) != len(requests):
        raise ValueError("two requested episodes are the same")
    started = time.perf_counter()
    evaluation = _Evaluation(vector_env, num_envs, act, requests, max_attempts)
    evaluation.observer = observer
    while True:
        for group in evaluation.groups:
            if group.sent:
                evaluation.receive(group)
            evaluation.fill(group)
            if group.running:
                evaluation.send(group)
        if not any(group.sent for group in evaluation.groups):
            break
    evaluation.run.wall_s = time.perf_counter() - started
    return evaluation.run


def evaluation_requests(
    task_ids: Sequence[int], num_trials_per_task: int, seed: int = EVALUATION_SEED
) -> list[ResetRequest]:
    """One request per task and fixed initial state.

    An episode's own seed depends on the task, the state and `seed` only: not on which others run, or where.
    """

    def seed_of(task_id: int, state: int) -> int:
        return int(np.random.SeedSequence([seed, task_id, state]).generate_state(1)[0])

    states = range(num_trials_per_task)
    return [
        ResetRequest(task_id, state, seed_of(task_id, state))
        for task_id in task_ids
        for state in states
    ]


def summarize(episodes: Sequence[EpisodeResult]) -> dict[str, Any]:
    """Counts, rate with interval, and mean lengths in steps; what is undefined (no episode, no success) is absent."""
    successes = [e for e in episodes if e.success]
    summary: dict[str, Any] = {"successes": len(successes), "episodes": len(episodes)}
    if episodes:
        summary["rate"] = len(successes) / len(episodes)
        summary["wilson_95"] = list(wilson_interval(len(successes), len(episodes)))
        summary["mean_length"] = sum(e.length for e in episodes) / len(episodes)
        summary["mean_return"] = sum(e.episode_return for e in episodes) / len(episodes)
    if successes:
        summary["mean_length_success"] = sum(e.length for e in successes) / len(successes)
    return summary


def summarize_run(
    run: EvaluationRun, task_ids: Sequence[int], instructions: Sequence[str]
) -> dict[str, Any]:
    """Per-task and overall summaries, with dropped attempts and void episodes counted beside them.

    `instructions` are the suite's, indexed by task id. Episodes come in task and initial-state order.
    """

    def of_task(task_id: int) -> dict[str, Any]:
        episodes = [e for e in run.episodes if e.task_id == task_id]
        void = [r for r in run.void if r.task_id == task_id]
        return {
            "task_id": task_id,
            "instruction": instructions[task_id],
            **summarize(episodes),
            "void": len(void),
        }

    ordered = sorted(
        run.episodes, key=lambda e: (e.task_id, -1 if e.init_state_id is None else e.init_state_id)
    )
    return {
        "overall": {
            **summarize(run.episodes),
            "void": len(run.void),
            "dropped_attempts": run.num_dropped,
        },
        "per_task": [of_task(task_id) for task_id in task_ids],
        "episodes": [asdict(episode) for episode in ordered],
        "void_episodes": [asdict(request) for request in run.void],
    }
