"""Episodes under way, as what decides them: request and actions. Playing them again gives the simulators' states back.

No simulator is pickled: an environment's state depends on its ResetRequest and its actions only. A hash of the last
image tells whether that held.
"""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ppo.envs.base import ACTION_DIM, ResetRequest
from ppo.envs.vector import VectorEnv
from ppo.evaluation import EpisodeResult


@dataclass(frozen=True)
class TrainingEpisode(EpisodeResult):
    """One finished training episode.

    Attributes:
        start_step: steps that its environment had taken since the run's start when it started.
            Environments take their steps together, so that these are comparable among all of them.
    """

    start_step: int = 0


@dataclass
class RunningEpisode:
    """One environment's episode: where it began, its actions so far (each (7,) float32), and what comes next."""

    request: ResetRequest
    next_request: ResetRequest
    actions: list[np.ndarray] = field(default_factory=list)

    def to_json(self, image: np.ndarray) -> dict[str, Any]:
        """Plain JSON types; `image` is the observation that the episode has come to."""
        actions = np.asarray(self.actions, dtype=np.float32).reshape(-1, ACTION_DIM)
        return {
            "request": _request_list(self.request),
            "next_request": _request_list(self.next_request),
            "actions": base64.b64encode(actions.tobytes()).decode(),
            "image": image_hash(image),
        }

    @staticmethod
    def from_json(content: dict[str, Any]) -> "RunningEpisode":
        """The episode of `to_json`. Raises ValueError, KeyError or TypeError for content that is none."""
        actions = np.frombuffer(base64.b64decode(content["actions"], validate=True), np.float32)
        request, next_request = (
            ResetRequest(*content["request"]),
            ResetRequest(*content["next_request"]),
        )
        return RunningEpisode(request, next_request, list(actions.reshape(-1, ACTION_DIM)))


def _request_list(request: ResetRequest) -> list[int | None]:
    return [request.task_id, request.init_state_id, request.seed]


def image_hash(image: np.ndarray) -> str:
    """Of an image's pixels."""
    return hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest()[:16]


def play_again(
    vector: VectorEnv, episodes: Sequence[RunningEpisode], hashes: Sequence[str]
) -> tuple[np.ndarray, list[int]]:
    """Bring environment i to where `episodes[i]` was, all side by side.

    Returns:
        The images (B, H, W, 3) uint8 to act on, and which environments did not come to the image of that hash, because
        their world does not repeat itself or its process died: their episodes have begun again, without actions.
    """
    images = np.array(vector.reset(range(len(episodes)), [e.request for e in episodes]))
    lost: set[int] = set()
    for t in range(max((len(e.actions) for e in episodes), default=0)):
        ids = [i for i, e in enumerate(episodes) if len(e.actions) > t and i not in lost]
        if not ids:
            break
        vector.send(ids, np.stack([episodes[i].actions[t] for i in ids]), [None] * len(ids))
        step = vector.receive(ids)
        images[ids] = step.images
        lost |= {i for i, ended in zip(ids, step.done | step.dropped, strict=True) if ended}
    lost |= {i for i, image in enumerate(images) if image_hash(image) != hashes[i]}
    again = sorted(lost)
    if again:
        images[again] = vector.reset(again, [episodes[i].request for i in again])
        for i in again:
            episodes[i].actions.clear()
    return images, again
