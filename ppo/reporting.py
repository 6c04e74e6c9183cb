"""What the driver says about a training step: metrics of the rollout, the console line, and which policy is best."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ppo.episodes import TrainingEpisode
from utils.logging_utils import format_duration

EMA_ALPHA = 0.99
# The EMA averages over about 1 / (1 - alpha) episodes. With fewer, chance could set a mark that no
# policy beats.
MIN_EPISODES = 100


@dataclass
class BestReturn:
    """EMA of the episodic return, and whether it beats its best by enough to save the policy.

    With returns R_1 .. R_n in the order in which the episodes started, and alpha = EMA_ALPHA:
        average_n = alpha average_{n-1} + (1 - alpha) R_n,   average_0 = 0
        ema_n     = average_n / (1 - alpha^n)
    The division corrects the start at 0 (Kingma and Ba 2015, arXiv:1412.6980, section 3).

    The EMA lags behind the policy that is saved: it averages over the last hundred episodes or so,
    and the newest of them were played with the weights before the last update. `mean_step` says how
    far.

    Attributes:
        min_delta: the EMA must beat its best by more than this.
        patience: least number of training steps between two saves.
        average: the EMA without its correction.
        average_step: the same of the training steps in which the episodes started.
        num_episodes: episodes taken in.
        best: the EMA at the last save.
        last_saved_step: training step of the last save.
    """

    min_delta: float
    patience: int
    average: float = 0.0
    average_step: float = 0.0
    num_episodes: int = 0
    best: float | None = None
    last_saved_step: int | None = None

    @property
    def ema(self) -> float | None:
        """The bias-corrected EMA of the return; None before the first episode."""
        return self._corrected(self.average)

    @property
    def mean_step(self) -> float | None:
        """Training step in which the EMA's episodes started, averaged with the EMA's weights."""
        return self._corrected(self.average_step)

    def _corrected(self, average: float) -> float | None:
        return average / (1 - EMA_ALPHA**self.num_episodes) if self.num_episodes else None

    def state_dict(self) -> dict[str, Any]:
        """All but the two settings, as plain JSON types."""
        return {name: getattr(self, name) for name in self.state_names()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`'s result."""
        for name in self.state_names():
            setattr(self, name, state[name])

    @staticmethod
    def state_names() -> tuple[str, ...]:
        """Keys of `state_dict`."""
        return ("average", "average_step", "num_episodes", "best", "last_saved_step")

    def update(self, episodes: Sequence[TrainingEpisode], step: int, num_steps: int) -> bool:
        """Take in the episodes of training step `step`; True if the policy is to be saved.

        Args:
            episodes: in the order of their start.
            step: training step, from 1 on.
            num_steps: steps of each environment in a training step.
        """
        for episode in episodes:
            start = episode.start_step // num_steps + 1
            self.average = EMA_ALPHA * self.average + (1 - EMA_ALPHA) * episode.episode_return
            self.average_step = EMA_ALPHA * self.average_step + (1 - EMA_ALPHA) * start
        self.num_episodes += len(episodes)
        if self.num_episodes < MIN_EPISODES or (
            self.last_saved_step is not None and step - self.last_saved_step < self.patience
        ):
            return False
        assert self.ema is not None
        if self.best is not None and self.ema <= self.best + self.min_delta:
            return False
        self.best, self.last_saved_step = self.ema, step
        return True


def rollout_metrics(
    episodes: Sequence[TrainingEpisode], worker_stats: Sequence[dict[str, float]]
) -> dict[str, float]:
    """`rollout/` metrics of one step over all workers.

    Success, return and length are absent if no episode is reported.
    """
    metrics = {
        "rollout/num_episodes": float(len(episodes)),
        "rollout/num_void_steps": sum(s["num_void_steps"] for s in worker_stats),
        "rollout/num_env_replaced": sum(s["num_replaced"] for s in worker_stats),
        "rollout/num_not_repeated": sum(s["num_not_repeated"] for s in worker_stats),
        "time/generate_s": max(s["generate_s"] for s in worker_stats),
        "time/wait_env_s": max(s["wait_env_s"] for s in worker_stats),
        "mem/worker_peak_gib": max(s["mem_gib"] for s in worker_stats),
        "mem/environments_gib": sum(s["envs_gib"] for s in worker_stats),
    }
    if episodes:
        metrics["rollout/success_rate"] = float(np.mean([e.success for e in episodes]))
        metrics["rollout/episode_return"] = float(np.mean([e.episode_return for e in episodes]))
        metrics["rollout/episode_length"] = float(np.mean([e.length for e in episodes]))
    return metrics


def time_metrics(
    seconds: Mapping[str, float], worker_stats: Sequence[Mapping[str, float]], samples_per_step: int
) -> dict[str, float]:
    """`time/` metrics of one step: the driver's phases, env steps/s, and which share of the step each side worked.

    `seconds` are the driver's phases (with `step`, the whole, and `update`); the engines' share is generating alone.
    """
    step_s = seconds["step"]
    return {f"time/{name}_s": value for name, value in seconds.items()} | {
        "time/env_steps_per_s": samples_per_step / step_s,
        "time/trainer_busy_fraction": seconds["update"] / step_s,
        "time/worker_busy_fraction": float(np.mean([s["collect_s"] for s in worker_stats]))
        / step_s,
        "time/engine_busy_fraction": float(np.mean([s["generate_s"] for s in worker_stats]))
        / step_s,
    }


def progress_line(step: int, num_steps: int, metrics: dict[str, float], step_s: float) -> str:
    """One line per training step: success, return, KL, clip fraction, explained variance, time split, ETA.

    `step_s`: mean seconds of a training step so far.
    """

    def show(name: str, label: str, form: str) -> str:
        return f"{label} {format(metrics[name], form)}" if name in metrics else f"{label} -"

    eta = format_duration(step_s * (num_steps - step))
    phases = {name: metrics.get(f"time/{name}_s", 0.0) for name in ("sync", "collect", "update")}
    return " | ".join(
        [
            f"step {step}/{num_steps}",
            show("rollout/success_rate", "success", ".3f")
            + f" ({metrics['rollout/num_episodes']:.0f} ep)",
            show("train/approx_kl_k3", "kl", ".4f"),
            show("train/clip_fraction", "clip", ".3f"),
            show("train/explained_variance_outcome", "ev outcome", ".2f"),
            " ".join(f"{name} {seconds:.1f}" for name, seconds in phases.items()) + " s",
            f"{metrics['time/env_steps_per_s']:.0f} env steps/s",
            f"ETA {eta}",
        ]
    )
