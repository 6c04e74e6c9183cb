"""What came of the episodes that ended: discounted outcomes, beside the values predicted on the way to them.

Rollouts are shorter than episodes, so values and rewards of running episodes are carried from rollout to rollout.
Shapes: T steps, B environments, L steps of an episode, M steps of all episodes that ended.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ppo.rollout import Rollout


@dataclass(frozen=True)
class EndedEpisodes:
    """Every step of the episodes that ended.

    Attributes:
        num_episodes: how many they are.
        outcome_M: float64, the discounted sum of the rewards from each step to the end of its episode.
        value_M: float32, the value predicted when the step was collected.
    """

    num_episodes: int
    outcome_M: Tensor
    value_M: Tensor


def discounted_outcomes(reward_L: Tensor, gamma: float) -> Tensor:
    """Return G_t = r_t + gamma G_{t+1} of a whole episode, float64, with G = 0 after its last step.

    An episode that a time limit cut has no bootstrap either: its outcome is what came within the limit.
    """
    outcome, outcomes = 0.0, []
    for reward in reversed(reward_L.tolist()):
        outcome = reward + gamma * outcome
        outcomes.append(outcome)
    return torch.tensor(outcomes[::-1], dtype=torch.float64)


class EpisodeOutcomes:
    """Collects the outcomes of a rank's episodes over consecutive rollouts.

    Only episodes whose every step was seen count. Dropped episodes do not. An episode that was given up or begun again
    between two rollouts, and what ran before another number of ranks took over, is recognised by
    `Rollout.episode_step_B` and does not count either.
    """

    def __init__(self) -> None:
        self._running: list[Tensor] = []  # of each environment (2, L): values and rewards so far

    def add(self, rollout: Rollout, value_TB: Tensor, gamma: float) -> EndedEpisodes:
        """Take in the next rollout of the same environments and return the episodes that ended in it."""
        nothing = torch.zeros(2, 0)
        step_2TB = torch.stack([value_TB.float(), rollout.reward_TB.float()])
        running = self._running or [nothing] * rollout.num_envs
        self._running, ended = [], []
        for b, carried in enumerate(running):
            num_before = int(rollout.episode_step_B[b])
            episode: Tensor | None = carried[:, :num_before]
            if num_before != carried.shape[1] and num_before > 0:
                episode = None  # its beginning was not seen
            begin = 0
            for end in (rollout.done_TB[:, b].nonzero().flatten() + 1).tolist():
                if episode is not None and rollout.valid_TB[end - 1, b]:
                    ended.append(torch.cat([episode, step_2TB[:, begin:end, b]], dim=1))
                episode, begin = nothing, end
            rest = step_2TB[:, begin:, b]
            self._running.append(nothing if episode is None else torch.cat([episode, rest], dim=1))
        outcomes = [discounted_outcomes(episode_2L[1], gamma) for episode_2L in ended]
        values = [episode_2L[0] for episode_2L in ended]
        return EndedEpisodes(
            len(ended),
            torch.cat([*outcomes, nothing[0].double()]),
            torch.cat([*values, nothing[0]]),
        )

    def tensors(self) -> dict[str, Tensor]:
        """The running episodes by name, for a checkpoint; empty before the first rollout."""
        if not self._running:
            return {}
        lengths = torch.tensor([episode.shape[1] for episode in self._running])
        return {"length_B": lengths, "value_and_reward": torch.cat(self._running, dim=1)}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from the result of `tensors`; from none, forget the running episodes."""
        lengths = tensors["length_B"].tolist() if tensors else []
        self._running = list(tensors["value_and_reward"].split(lengths, dim=1)) if tensors else []
