"""The run's folder: what a training step leaves there (metrics, console line, checkpoints) and the final model."""

import dataclasses
import json
import os
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from ppo.envs.base import get_suite
from ppo.evaluation import EpisodeResult, summarize_run
from ppo.reporting import BestReturn, progress_line
from utils.logging_utils import MetricWriter, get_logger

logger = get_logger("driver")


class Run:
    """The run's folder: metrics, checkpoints and their metadata. Takes the driver's Args, Plan and Cluster."""

    def __init__(self, args: Any, plan: Any, cluster: Any) -> None:
        self.args, self.plan, self.cluster = args, plan, cluster
        self.exp_dir = Path(plan.exp_dir)
        config = dataclasses.asdict(args)
        for remark in get_suite(args.task_suite_name).remarks():
            logger.warning(remark)
        (self.exp_dir / "args.json").write_text(json.dumps(config, indent=2) + "\n")
        self.writer = MetricWriter(
            self.exp_dir, use_wandb=args.use_wandb, wandb_project=args.wandb_project, wandb_mode=args.wandb_mode,
            config=config,
        )  # fmt: skip
        self.best = BestReturn(args.best_min_delta, args.best_patience)
        self.started = time.perf_counter()

    def metadata(self, step: int, episodes: Sequence[EpisodeResult]) -> dict[str, Any]:
        """What a checkpoint says about itself."""
        returns = [e.episode_return for e in episodes]
        return {
            "timestamp": datetime.now().astimezone().isoformat(timespec="seconds"),
            "ema_return": self.best.ema,
            "current_return": float(np.mean(returns)) if returns else None,
            "training_step": step,
            "global_step": step * self.plan.samples_per_step,
            "exp_id": self.exp_dir.name,
            "vla_path": self.args.vla_path,
            "task_suite_name": self.args.task_suite_name,
            "seed": self.args.seed,
        }

    def report(self, step: int, metrics: dict[str, float | None], episodes: Sequence[EpisodeResult]) -> None:
        """Write a training step's metrics and line, the curriculum and the checkpoints that are due."""
        args = self.args
        is_best = self.best.update([e.episode_return for e in episodes], step)
        metrics["rollout/ema_return"] = self.best.ema
        metrics["time/env_steps_total"] = float(step * self.plan.samples_per_step)
        tasks = self.cluster.curriculum_stats()
        curriculum = {f"curriculum/task_{t}_{k}": v for t, stats in tasks.items() for k, v in stats.items()}
        defined = self.writer.write(step, metrics | curriculum)
        logger.info(progress_line(step, self.plan.num_training_steps, defined, time.perf_counter() - self.started))
        self.cluster.save_curriculum(self.exp_dir / "curriculum.json")
        metadata = self.metadata(step, episodes)
        if is_best:
            self.cluster.save(self.exp_dir / "best_return", metadata, overwrite=True)
        if args.save_freq and step % args.save_freq == 0:
            self.cluster.save(self.exp_dir / f"step_{step}", metadata, with_state=args.save_optimizer)

    def evaluate(self, step: int, file_name: str | None = None) -> dict[str, float]:
        """Greedy evaluation on the fixed initial states; logged, and written to `file_name` if given."""
        start = time.perf_counter()
        suite = get_suite(self.args.task_suite_name)
        video_dir = self.exp_dir / "videos" / f"step_{step}" if self.args.save_video else None
        summary = summarize_run(self.cluster.evaluate(video_dir), self.plan.task_ids, suite.instructions)
        overall = summary["overall"]
        metrics = {"time/eval_s": time.perf_counter() - start, "eval/num_episodes": float(overall["episodes"])}
        for name, part in [("", overall), *((f"task_{t['task_id']}_", t) for t in summary["per_task"])]:
            metrics |= {f"eval/{name}success_rate": part["rate"]} if "rate" in part else {}
        if file_name:
            summary |= {"training_step": step, "remarks": suite.remarks()}
            (self.exp_dir / file_name).write_text(json.dumps(summary, indent=1) + "\n")
        logger.info(f"greedy evaluation: {overall['successes']} of {overall['episodes']} episodes succeed")
        return metrics

    def finish(self, step: int, episodes: Sequence[EpisodeResult]) -> None:
        """Final evaluation (if asked) and the final model, in the run's own folder."""
        if self.args.eval_final:
            self.cluster.push_weights(step)
            self.writer.write(step, dict(self.evaluate(step, "eval_final.json")))
        final = self.exp_dir / ".final"
        self.cluster.save(final, self.metadata(step, episodes), overwrite=True)
        for file in final.iterdir():
            os.replace(file, self.exp_dir / file.name)
        final.rmdir()
        self.writer.close()
        logger.info(f"done: {self.exp_dir}")
