"""Collecting rollouts and evaluating: one policy, many environments, stepped in groups that overlap.

While one group of environments is in the simulator the policy acts for another. The collector owns no engine: it is
given `generate` (images and prompts -> action tokens) and `decode` (tokens -> the environments' actions).
Shapes: T steps, B environments, A action tokens, H W image, K truncated episodes.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, Protocol

import numpy as np
import torch

from ppo.envs.base import ResetRequest
from ppo.envs.vector import VectorEnv, VectorStep
from ppo.episodes import RunningEpisode, TrainingEpisode, play_again
from ppo.rollout import Rollout
from utils.logging_utils import get_logger

logger = get_logger("collector")


class Generation(Protocol):
    """What a policy returns for B observations."""

    token_ids: np.ndarray  # (B, A) int64
    logprobs: np.ndarray  # (B, A) float32


Generate = Callable[[list[list[int]], np.ndarray], Generation]
Decode = Callable[[np.ndarray], np.ndarray]


def episode_seed(seed: tuple[int, ...], env_id: int, episode: int) -> int:
    """What a training episode draws its layout from: seed of run and worker, its environment, its number there."""
    return int(np.random.SeedSequence((*seed, env_id, episode)).generate_state(1)[0])


class Collector:
    """Steps `vector` with a policy and cuts what happens into rollouts of T steps; episodes go on across rollouts.

    Episodes are reported in the order in which they started. Each waits until `time_limit` steps
    have passed since its start, however early it ended: by then every episode that started at the
    same time has ended, so that the choice does not depend on the outcome. In the order of their
    ends the first episodes would all be successes, because a failure takes the whole time limit.

    Args:
        vector: the environments.
        prompts: token ids of every task's prompt, by task id.
        generate: samples one action per observation, with its tokens' log-probs.
        decode: action tokens (B, A) -> actions (B, 7) in the environments' convention.
        num_groups: how many groups the environments are split into.
        seed: of the episodes' resets; a tuple of integers (run, worker).
        time_limit: most steps of an episode.
    """

    def __init__(
        self,
        vector: VectorEnv,
        prompts: Sequence[list[int]],
        generate: Generate,
        decode: Decode,
        *,
        num_groups: int,
        seed: tuple[int, ...],
        time_limit: int,
    ) -> None:
        self.vector, self.prompts, self.generate, self.decode = (
            vector,
            list(prompts),
            generate,
            decode,
        )
        self.groups = [g for g in np.array_split(np.arange(vector.num_envs), num_groups) if len(g)]
        self.seed, self.time_limit = seed, time_limit
        self._num_episodes = np.zeros(vector.num_envs, dtype=np.int64)
        self.generate_s = self.wait_env_s = 0.0  # of the last collect
        self.num_not_repeated = (
            0  # episodes that a resumed run could not bring to where they had been
        )
        self._images: np.ndarray | None = None  # (B, H, W, 3) next observation to act on
        self._task_id_B = np.zeros(vector.num_envs, dtype=np.int64)
        self._episodes: list[RunningEpisode] = []
        self._num_steps = 0  # of each environment, since the run's start
        self._ended: list[TrainingEpisode] = []  # not reported yet

    def _request(self, env_id: int, tasks: Iterator[int]) -> ResetRequest:
        """The environment's next training episode: a random layout of the next task, with a seed of its own."""
        episode = int(self._num_episodes[env_id])
        self._num_episodes[env_id] += 1
        seed = episode_seed(self.seed, env_id, episode)
        return ResetRequest(task_id=next(tasks), init_state_id=None, seed=seed)

    def _start(self, tasks: Iterator[int]) -> np.ndarray:
        env_ids = range(self.vector.num_envs)
        requests = [self._request(i, tasks) for i in env_ids]
        images = self.vector.reset(list(env_ids), requests)
        self._task_id_B[:] = [r.task_id for r in requests]
        self._episodes = [
            RunningEpisode(r, self._request(i, tasks)) for i, r in enumerate(requests)
        ]
        return images

    def state_dict(self) -> dict[str, Any]:
        """Episodes under way or not reported yet, and counters, as plain JSON types.

        To be called between two calls of `collect`.
        """
        running = None
        if self._images is not None:
            running = [
                e.to_json(image) for e, image in zip(self._episodes, self._images, strict=True)
            ]
        return {
            "num_steps": self._num_steps,
            "num_episodes": self._num_episodes.tolist(),
            "running": running,
            "ended": [asdict(episode) for episode in self._ended],
            "num_replaced": self.vector.num_replaced,
            "num_not_repeated": self.num_not_repeated,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`'s result: the episodes under way are played again up to there.

        One that does not come to the same image begins anew and is counted in `num_not_repeated`.
        """
        self._num_steps = int(state["num_steps"])
        self._num_episodes = np.array(state["num_episodes"], dtype=np.int64)
        self._ended = [TrainingEpisode(**content) for content in state["ended"]]
        self.num_not_repeated = int(state["num_not_repeated"])
        self._images = None
        if state["running"] is not None:
            self._episodes = [RunningEpisode.from_json(content) for content in state["running"]]
            hashes = [content["image"] for content in state["running"]]
            self._images, lost = play_again(self.vector, self._episodes, hashes)
            self._task_id_B[:] = [e.request.task_id for e in self._episodes]
            self.num_not_repeated += len(lost)
            if lost:
                logger.warning(
                    f"the episodes of environments {lost} did not come to the images they had been at: they begin anew"
                )
        self.vector.num_replaced = int(state["num_replaced"])

    def statistics(self) -> dict[str, float]:
        """Of the last `collect`: seconds in the policy and waiting for environments; what was lost so far; memory."""
        return {
            "generate_s": self.generate_s,
            "wait_env_s": self.wait_env_s,
            "num_replaced": float(self.vector.num_replaced),
            "num_not_repeated": float(self.num_not_repeated),
            "envs_gib": self.vector.memory_gib(),
        }

    def collect(
        self, num_steps: int, tasks: Iterator[int]
    ) -> tuple[Rollout, list[TrainingEpisode]]:
        """Act `num_steps` times in every environment; `tasks` yields the task of each new episode.

        Returns:
            The rollout, and the episodes whose time limit passed in it, in the order of their
            start. Episodes of environments that died are never among them; their steps in this
            rollout have `valid_TB` False.
        """
        if self._images is None:
            self._images = self._start(tasks)
        self.generate_s = self.wait_env_s = 0.0
        writer = _RolloutWriter(num_steps, self._images, [len(e.actions) for e in self._episodes])
        for t in range(num_steps):
            for group in self.groups:
                if t > 0:
                    self._receive(group, t - 1, writer, tasks)
                self._act(group, t, writer)
        for group in self.groups:
            self._receive(group, num_steps - 1, writer, tasks)
        self._num_steps += num_steps
        return writer.finish(self.prompts, self._images, self._task_id_B), self._report()

    def _report(self) -> list[TrainingEpisode]:
        """Remove and return the episodes whose time limit has passed, in the order of their start."""
        last_start = self._num_steps - self.time_limit
        due = [episode for episode in self._ended if episode.start_step <= last_start]
        self._ended = [episode for episode in self._ended if episode.start_step > last_start]
        return sorted(due, key=lambda episode: episode.start_step)

    def _act(self, group: np.ndarray, t: int, writer: "_RolloutWriter") -> None:
        assert self._images is not None
        images, tasks = self._images[group], self._task_id_B[group]
        started = time.perf_counter()
        generation = self.generate([self.prompts[i] for i in tasks], images)
        self.generate_s += time.perf_counter() - started
        actions = np.asarray(self.decode(generation.token_ids), dtype=np.float32)
        self.vector.send(group, actions, [self._episodes[e].next_request for e in group])
        for env_id, action in zip(group, actions, strict=True):
            self._episodes[env_id].actions.append(action)
        writer.add_actions(t, group, images, tasks, generation)

    def _receive(
        self, group: np.ndarray, t: int, writer: "_RolloutWriter", tasks: Iterator[int]
    ) -> None:
        assert self._images is not None
        started = time.perf_counter()
        step = self.vector.receive(group)
        self.wait_env_s += time.perf_counter() - started
        self._images[group] = step.images
        writer.add_results(t, group, step)
        for row, env_id in enumerate(group):
            if not step.reset_used[row]:
                continue
            if not step.dropped[row]:
                end_step = self._num_steps + t + 1
                self._ended.append(_result(step, row, self._episodes[env_id].request, end_step))
            request = self._episodes[env_id].next_request
            self._task_id_B[env_id] = request.task_id
            self._episodes[env_id] = RunningEpisode(request, self._request(int(env_id), tasks))


def _result(step: VectorStep, row: int, request: ResetRequest, end_step: int) -> TrainingEpisode:
    assert int(step.task_ids[row]) == request.task_id, (
        "an environment played another task than it was given"
    )
    length = int(step.episode_length[row])
    return TrainingEpisode(
        task_id=request.task_id,
        init_state_id=request.init_state_id,
        seed=request.seed,
        success=bool(step.success[row]),
        length=length,
        episode_return=float(step.episode_return[row]),
        start_step=end_step - length,
    )


class _RolloutWriter:
    """Arrays of one rollout while it is collected."""

    def __init__(
        self, num_steps: int, images_BHWC: np.ndarray, episode_step_B: Sequence[int]
    ) -> None:
        num_envs = len(images_BHWC)
        shape = (num_steps, num_envs)
        self.images = np.empty((*shape, *images_BHWC.shape[1:]), dtype=np.uint8)
        self.action_ids = np.zeros((*shape, 7), dtype=np.int64)
        self.logprob = np.zeros((*shape, 7), dtype=np.float32)
        self.reward = np.zeros(shape, dtype=np.float32)
        self.terminated, self.truncated = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
        self.task_id = np.zeros(shape, dtype=np.int64)
        self.valid = np.ones(shape, dtype=bool)
        self.episode_start = np.zeros(num_envs, dtype=np.int64)
        self.episode_step_B = torch.tensor(episode_step_B, dtype=torch.int64)
        self.final: list[tuple[int, int, np.ndarray]] = []

    def add_actions(
        self,
        t: int,
        group: np.ndarray,
        images: np.ndarray,
        tasks: np.ndarray,
        generation: Generation,
    ) -> None:
        self.images[t, group], self.task_id[t, group] = images, tasks
        self.action_ids[t, group], self.logprob[t, group] = (
            generation.token_ids,
            generation.logprobs,
        )

    def add_results(self, t: int, group: np.ndarray, step: VectorStep) -> None:
        self.reward[t, group], self.terminated[t, group] = step.reward, step.terminated
        self.truncated[t, group] = step.truncated
        for row, env_id in enumerate(group):
            if step.dropped[
                row
            ]:  # the episode is void from its start; a wall in the GAE recursion ends it
                self.valid[self.episode_start[env_id] : t + 1, env_id] = False
                self.reward[t, env_id], self.terminated[t, env_id], self.truncated[t, env_id] = (
                    0.0,
                    True,
                    False,
                )
            elif step.truncated[row]:
                self.final.append((t, int(env_id), step.final_images[row].copy()))
            if step.reset_used[row]:
                self.episode_start[env_id] = t + 1

    def finish(self, prompts: list[list[int]], images: np.ndarray, task_ids: np.ndarray) -> Rollout:
        final_images = [image for _, _, image in self.final] or np.empty(
            (0, *images.shape[1:]), np.uint8
        )
        return Rollout(
            prompts=prompts,
            images_TBHWC=torch.from_numpy(self.images),
            action_ids_TBA=torch.from_numpy(self.action_ids),
            logprob_TBA=torch.from_numpy(self.logprob),
            reward_TB=torch.from_numpy(self.reward),
            terminated_TB=torch.from_numpy(self.terminated),
            truncated_TB=torch.from_numpy(self.truncated),
            task_id_TB=torch.from_numpy(self.task_id),
            valid_TB=torch.from_numpy(self.valid),
            last_images_BHWC=torch.from_numpy(images.copy()),
            last_task_id_B=torch.from_numpy(task_ids.copy()),
            episode_step_B=self.episode_step_B,
            final_images_KHWC=torch.from_numpy(np.asarray(final_images)),
            final_t_K=torch.tensor([t for t, _, _ in self.final], dtype=torch.int64),
            final_b_K=torch.tensor([b for _, b, _ in self.final], dtype=torch.int64),
        )
