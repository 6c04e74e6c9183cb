"""What episode i of a recording of scripted demonstrations is, and how it is played.

An episode depends on the settings and its number only: not on the episodes before it, the process that plays it, or
how many there are. T steps of an episode.
"""

import copy
import importlib
import re
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from ppo.envs.base import Environment, ResetRequest, TaskSuite, get_suite
from prismatic.vla.datasets.writer import (
    Demonstration,
    EncodedDemonstration,
    drop_noops,
    encode_demonstration,
)

LIBERO_SUITES = ("libero_spatial", "libero_goal")
# Suites with a scripted expert: the module that has run_expert_episode.
EXPERTS = {
    "tabletop": "ppo.envs.tabletop_expert",
    **dict.fromkeys(LIBERO_SUITES, "ppo.envs.libero_expert"),
}
# Keeps the layouts apart from other random streams made of the same seed.
_LAYOUTS = 601
# An expert that fails this often in a row cannot supply successful episodes.
MAX_ATTEMPTS = 100
_EPISODE_PATH = re.compile(
    r"(?P<suite>[^/]+)/task(?P<task>\d+)/(?:state(?P<state>\d+)/)?seed(?P<seed>\d+)/episode(?P<index>\d+)"
)


@dataclass(frozen=True)
class RecordingSettings:
    """What a recording consists of; the attributes are the flags of `vla-scripts/make_demos.py`.

    Attributes:
        task_ids: tasks in turn, at least one.
        env_gpu_id: which GPU draws (LIBERO with EGL); None: what the world does by itself.
        haste, wrist_camera, quick_physics: LIBERO's only.
    """

    task_suite_name: str
    task_ids: tuple[int, ...]
    init_states: Literal["random", "fixed"]
    seed: int
    imperfection: float
    image_size: int
    image_format: str
    max_env_length: int | None
    keep_failures: bool
    render_quality: Literal["eval", "fast"]
    env_gpu_id: int | None = None
    haste: float = 0.0
    wrist_camera: bool = True
    quick_physics: bool = False

    def identity(self) -> dict[str, Any]:
        """Everything that decides what an episode is."""
        values = asdict(self)
        del values["env_gpu_id"]
        return values

    def task_id(self, index: int) -> int:
        """Task of episode `index`."""
        return self.task_ids[index % len(self.task_ids)]

    def request(
        self, index: int, attempt: int, num_init_states: int, rng: np.random.Generator
    ) -> ResetRequest:
        """How attempt `attempt` at episode `index` starts; draws the seed from `rng`.

        With fixed initial states the episodes of a task take them in turn, and another attempt takes the next one: an
        expert may be unable to solve a state.
        """
        state = None
        if self.init_states == "fixed":
            state = (index // len(self.task_ids) + attempt) % num_init_states
        return ResetRequest(self.task_id(index), state, seed=int(rng.integers(2**31)))


@dataclass(frozen=True)
class RecordedEpisode:
    """One episode, ready to be written, and what it took: attempts, successes, dropped_steps, solved_at_once."""

    demonstration: EncodedDemonstration
    counts: dict[str, int]


class ExpertFailedError(ValueError):
    """The expert cannot supply an episode with these settings."""


def expert_module(suite_name: str) -> Any:
    """The module of a suite's expert; it has `run_expert_episode`."""
    return importlib.import_module(EXPERTS[suite_name])


def expert_tasks(suite: TaskSuite) -> tuple[int, ...]:
    """Tasks that the suite's expert can do."""
    known = getattr(expert_module(suite.name), "EXPERT_TASKS", {})
    return tuple(known.get(suite.name, range(suite.num_tasks)))


def episode_path(suite_name: str, request: ResetRequest, index: int) -> str:
    """An episode's `episode_metadata/file_path`: what recreates its start, and its number."""
    state = "" if request.init_state_id is None else f"state{request.init_state_id}/"
    return f"{suite_name}/task{request.task_id}/{state}seed{request.seed}/episode{index:06d}"


def parse_episode_path(file_path: str) -> tuple[str, ResetRequest]:
    """The suite's name and the request that recreates an episode's start, from `episode_path`.

    Raises ValueError for a path that make_demos.py did not write.
    """
    match = _EPISODE_PATH.fullmatch(file_path)
    if match is None:
        raise ValueError(
            f"file_path {file_path!r} does not say how the episode started: it is not of make_demos.py"
        )
    state = None if match["state"] is None else int(match["state"])
    return match["suite"], ResetRequest(int(match["task"]), state, int(match["seed"]))


class Recorder:
    """Plays episodes in one environment, which it makes when it needs it and keeps."""

    def __init__(self, settings: RecordingSettings) -> None:
        self.settings = settings
        self.suite = get_suite(settings.task_suite_name)
        self._expert = expert_module(settings.task_suite_name)
        self._env: Environment | None = None

    def record(self, index: int) -> RecordedEpisode:
        """Play episode `index` until an attempt succeeds (the first one with keep_failures), without its no-op steps.

        Raises ExpertFailedError when the expert fails MAX_ATTEMPTS times in a row and failures are not kept.
        """
        settings, successes = self.settings, 0
        for attempt in range(MAX_ATTEMPTS):
            rng = np.random.default_rng((_LAYOUTS, settings.seed, index, attempt))
            request = settings.request(index, attempt, self.suite.num_init_states, rng)
            episode = self._play(request, rng)
            successes += bool(episode.success)
            if episode.success or settings.keep_failures:
                break
        else:
            task_id = settings.task_id(index)
            raise ExpertFailedError(
                f"the expert failed {MAX_ATTEMPTS} times in a row at task {task_id} "
                f"({self.suite.instructions[task_id]!r}) with --imperfection {settings.imperfection}: "
                "lower it, raise --max_env_length, or pass --keep_failures"
            )
        demo = self._demonstration(episode, request, index)
        shorter = drop_noops(demo)
        counts = {
            "attempts": attempt + 1,
            "successes": successes,
            "solved_at_once": int(attempt == 0 and successes),
            "dropped_steps": len(demo.actions_T7) - len(shorter.actions_T7),
        }
        return RecordedEpisode(encode_demonstration(shorter, settings.image_format), counts)

    def close(self) -> None:
        """Release the environment. A second call does nothing."""
        if self._env is not None:
            self._env.close()
            self._env = None

    def _play(self, request: ResetRequest, rng: np.random.Generator) -> Any:
        settings = self.settings
        if self._env is None:
            self._env = make_recording_env(settings)
        if settings.task_suite_name not in LIBERO_SUITES:
            return self._expert.run_expert_episode(self._env, request, settings.imperfection, rng)
        if (
            settings.haste and not settings.keep_failures
        ):  # many an attempt fails: that is found out without drawing
            rehearsal = self._expert.run_expert_episode(
                self._env, request, settings.imperfection, copy.deepcopy(rng), haste=settings.haste
            )
            if not rehearsal.success:
                return rehearsal
        return self._expert.run_expert_episode(
            self._env,
            request,
            settings.imperfection,
            rng,
            settings.image_size,
            settings.haste,
            settings.wrist_camera,
        )

    def _demonstration(self, episode: Any, request: ResetRequest, index: int) -> Demonstration:
        return Demonstration(
            episode.images,
            episode.actions,
            episode.states,
            episode.joint_states,
            episode.rewards,
            self.suite.instructions[request.task_id],
            episode_path(self.suite.name, request, index),
            terminal=bool(episode.success),
            wrist_images=getattr(episode, "wrist_images", None),
        )


def make_recording_env(settings: RecordingSettings) -> Environment:
    """The environment that demonstrations are played in.

    LIBERO's draws only what is recorded: its own image of each step would cost a third render.
    """
    suite = get_suite(settings.task_suite_name)
    if settings.task_suite_name not in LIBERO_SUITES:
        return suite.make_env(settings.image_size, max_steps=settings.max_env_length)
    from ppo.envs.libero import LiberoEnv

    class SilentLiberoEnv(LiberoEnv):
        def observe(self, simulator: Any) -> np.ndarray:
            return np.zeros((self.image_size, self.image_size, 3), dtype=np.uint8)

    return SilentLiberoEnv(
        suite.name,
        settings.image_size,
        max_steps=settings.max_env_length,
        env_gpu_id=settings.env_gpu_id,
        render_quality=settings.render_quality,
        exact_physics=False if settings.quick_physics else None,
    )
