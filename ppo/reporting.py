"""What the driver says about a training step: metrics of the rollout, the console line, and which policy is best."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ppo.evaluation import EpisodeResult
from utils.logging_utils import format_duration


@dataclass
class BestReturn:
    """EMA (0.99) of the episodic return, and when it has beaten its best by enough to be saved."""

    min_delta: float
    patience: int
    ema: float | None = None
    best: float | None = None
    last_saved_step: int | None = None

    def state_dict(self) -> dict[str, Any]:
        """What it has seen, of plain JSON types."""
        return {"ema": self.ema, "best": self.best, "last_saved_step": self.last_saved_step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`'s result."""
        self.ema, self.best, self.last_saved_step = (
            state["ema"],
            state["best"],
            state["last_saved_step"],
        )

    def update(self, episode_returns: Sequence[float], step: int) -> bool:
        """Take in the returns of the episodes that ended in this step; True if the policy is to be saved."""
        for value in episode_returns:
            self.ema = value if self.ema is None else 0.99 * self.ema + 0.01 * value
        if self.ema is None or (
            self.last_saved_step is not None and step - self.last_saved_step < self.patience
        ):
            return False
        if self.best is not None and self.ema <= self.best + self.min_delta:
            return False
        self.best, self.last_saved_step = self.ema, step
        return True


def rollout_metrics(
    episodes: Sequence[EpisodeResult], worker_stats: Sequence[dict[str, float]]
) -> dict[str, float]:
    """`rollout/` metrics of one step over all workers; success, return and length only if an episode ended."""
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
