"""Recorded actions played again from the recorded start: closes the loop over every convention of the data.

An episode read from an RLDS directory goes the way a policy's actions go: transformed and normalised as for training,
on request through the action tokens, un-normalised and converted for the environment. T steps of an episode.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ppo.envs.base import Environment, ResetRequest
from ppo.envs.recording import parse_episode_path
from prismatic.vla.action_normalization import (
    to_env_action,
    tokens_to_env_actions,
    unnormalize_action,
)
from prismatic.vla.action_tokenizer import ActionTokenizer
from prismatic.vla.datasets.mixtures import dataset_dir
from prismatic.vla.datasets.rlds import RawEpisode, iterate_episodes
from prismatic.vla.datasets.sources import DatasetSpec
from prismatic.vla.datasets.statistics import dataset_statistics
from prismatic.vla.datasets.transforms import get_transform


@dataclass(frozen=True)
class Replay:
    """One episode to replay.

    Attributes:
        suite_name, request: recreate its start.
        stored_T7: the recorded raw actions.
        actions_T7: the same after normalisation and back.
        token_actions_T7: the same also through the action tokens, which round to one of 256 values.
    """

    suite_name: str
    request: ResetRequest
    stored_T7: np.ndarray
    actions_T7: np.ndarray
    token_actions_T7: np.ndarray


def load_replays(
    data_root_dir: str | Path, dataset_name: str, max_episodes: int | None = None
) -> list[Replay]:
    """Read the episodes of a dataset that make_demos.py wrote, with the dataset's own statistics.

    Raises ValueError for an incomplete directory, or one whose `file_path` does not recreate an episode's start.
    """
    folder, transform = dataset_dir(data_root_dir, dataset_name), get_transform(dataset_name)
    spec = DatasetSpec(dataset_name, folder, 1.0, transform, dataset_statistics(folder, transform))
    episodes: list[Replay] = []
    for episode in iterate_episodes(folder):
        if len(episodes) == max_episodes:
            break
        episodes.append(_replay_of(episode, spec))
    return episodes


def _replay_of(episode: RawEpisode, spec: DatasetSpec) -> Replay:
    statistics, tokenizer = spec.statistics["action"], ActionTokenizer(32000)
    policy_T7 = spec.policy_actions(episode.actions_T7)
    return Replay(
        *parse_episode_path(episode.file_path or ""),
        stored_T7=episode.actions_T7,
        actions_T7=to_env_action(unnormalize_action(policy_T7, statistics)),
        token_actions_T7=tokens_to_env_actions(tokenizer.encode(policy_T7), tokenizer, statistics),
    )


def play(
    env: Environment, request: ResetRequest, actions_T7: np.ndarray, num_extra_steps: int = 0
) -> bool:
    """Whether these actions solve the task.

    Args:
        env: of the episode's suite.
        request: the start.
        actions_T7: raw actions.
        num_extra_steps: the last action is repeated this often: a recording ends at the very step that solves the
            task, which rounded actions may reach a little later.
    """
    env.reset(request)
    for action in np.concatenate([actions_T7, np.repeat(actions_T7[-1:], num_extra_steps, axis=0)]):
        result = env.step(action)
        if result.terminated or result.truncated:
            return result.success
    return False
