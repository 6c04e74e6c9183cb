"""The run's folder: metrics, console lines, checkpoints, and going on from one."""

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
from ppo.episodes import TrainingEpisode
from ppo.evaluation import summarize_run
from ppo.reporting import BestReturn, progress_line
from ppo.resume import (
    STATE_DIR,
    Collected,
    RunState,
    changed_flags,
    checkpoints,
    cut_after,
    remove_old,
    remove_partial,
)
from utils.hub import recorded_flags
from utils.logging_utils import MetricWriter, get_logger

logger = get_logger("driver")


class Run:
    """The run's folder: metrics, checkpoints and their metadata. Takes the driver's Args, Plan and Cluster.

    Args:
        args: flags.
        plan: sizes.
        cluster: the run's actors.
        checkpoint: where to go on; None: at the beginning.

    Attributes:
        steps_done: training steps that the trainers have finished.
        collected: rollouts of the step under way, once the trainers have them.
    """

    def __init__(self, args: Any, plan: Any, cluster: Any, checkpoint: Path | None = None) -> None:
        self.args, self.plan, self.cluster = args, plan, cluster
        self.exp_dir = Path(plan.exp_dir)
        self.config = recorded_flags(dataclasses.asdict(args))
        self.best = BestReturn(args.best_min_delta, args.best_patience)
        self.steps_done = 0
        self.collected: Collected | None = None
        self.episodes: list[TrainingEpisode] = []
        for remark in get_suite(args.task_suite_name).remarks():
            logger.warning(remark)
        if checkpoint is not None:
            self._restore(checkpoint)
        if args.resume:
            remove_partial(self.exp_dir)
            cut_after(self.exp_dir, self.steps_done, checkpoint)
        (self.exp_dir / "args.json").write_text(json.dumps(self.config, indent=2) + "\n")
        self.writer = MetricWriter(
            self.exp_dir, use_wandb=args.use_wandb, wandb_project=args.wandb_project, wandb_mode=args.wandb_mode,
            config=self.config, first_step=self.steps_done + 1 if args.resume else None,
        )  # fmt: skip
        self.first_step = self.steps_done + 1
        self.started = time.perf_counter()

    def _restore(self, checkpoint: Path) -> None:
        """Load a checkpoint into the cluster and continue from there."""
        state = RunState.read(checkpoint)
        for name, (before, now) in changed_flags(state, self.config).items():
            logger.info(f"--{name} was {before}, is {now} from here on")
        self.best.load_state_dict(state.best)
        self.steps_done = state.step
        self.collected = Collected.from_json(state.rollout) if state.rollout is not None else None
        self.cluster.load(checkpoint / STATE_DIR, state)
        logger.info(f"going on from {checkpoint}: {state.step} training steps are done")

    def metadata(self, step: int, episodes: Sequence[TrainingEpisode]) -> dict[str, Any]:
        """What a checkpoint says about itself.

        Its weights are those after the update of training step `step`, of which `policy_updates`
        trained the policy: at 0 it is the initial one. The returns are of episodes that earlier
        weights played: `current_return` of those that the step reports, `ema_return` of
        `ema_num_episodes` episodes that started in training step `ema_mean_training_step` on
        average.
        """
        returns = [e.episode_return for e in episodes]
        return {
            "timestamp": datetime.now().astimezone().isoformat(timespec="seconds"),
            "ema_return": self.best.ema,
            "ema_num_episodes": self.best.num_episodes,
            "ema_mean_training_step": self.best.mean_step,
            "current_return": float(np.mean(returns)) if returns else None,
            "policy_updates": max(0, step - self.args.value_init_steps),
            "training_step": step,
            "global_step": step * self.plan.samples_per_step,
            "exp_id": self.exp_dir.name,
            "vla_path": self.config["vla_path"],
            "revision": self.config["revision"],
            "task_suite_name": self.args.task_suite_name,
            "seed": self.args.seed,
        }

    def report(
        self, step: int, metrics: dict[str, float | None], episodes: Sequence[TrainingEpisode]
    ) -> None:
        """Write a finished training step's metrics and line, the curriculum, and a best-return checkpoint if due."""
        self.steps_done, self.collected, self.episodes = step, None, list(episodes)
        is_best = self.best.update(episodes, step, self.args.num_steps)
        metrics["rollout/ema_return"] = self.best.ema
        metrics["time/env_steps_total"] = float(step * self.plan.samples_per_step)
        tasks = self.cluster.curriculum_stats()
        curriculum = {
            f"curriculum/task_{t}_{k}": v for t, stats in tasks.items() for k, v in stats.items()
        }
        defined = self.writer.write(step, metrics | curriculum)
        step_s = (time.perf_counter() - self.started) / (step - self.first_step + 1)
        logger.info(progress_line(step, self.plan.num_training_steps, defined, step_s))
        self.cluster.save_curriculum(self.exp_dir / "curriculum.json")
        if is_best:
            self.cluster.save(
                self.exp_dir / "best_return", self.metadata(step, episodes), overwrite=True
            )

    def save_if_due(self) -> None:
        """Every `save_freq` steps begin the checkpoint of the finished one; it is written in the background."""
        args, step = self.args, self.steps_done
        if not args.save_freq or step % args.save_freq:
            return
        if args.save_optimizer:
            self._begin_checkpoint(None)
        else:
            self.cluster.save(self.exp_dir / f"step_{step}", self.metadata(step, self.episodes))
            remove_old(self.exp_dir, args.keep_last)

    def _begin_checkpoint(self, num_minibatches: int | None) -> Path:
        """Begin a complete checkpoint of the present state; `num_minibatches` of an update under way."""
        in_update = num_minibatches is not None
        worlds, curriculum = self.cluster.world_states(
            is_rollout_used=in_update or self.collected is None
        )
        state = RunState(
            step=self.steps_done,
            num_minibatches=num_minibatches,
            num_trainers=self.plan.num_trainers,
            flags=self.config,
            best=self.best.state_dict(),
            curriculum=curriculum,
            worlds=worlds,
            rollout=self.collected.to_json() if self.collected is not None and in_update else None,
        )
        folder = self.exp_dir / state.name
        self.cluster.begin_checkpoint(folder, state, self.metadata(self.steps_done, self.episodes))
        return folder

    def save_stopped(self) -> None:
        """Save where a stop found the run, and wait until it is on disk."""
        num_minibatches = self.cluster.minibatches_done()
        folder = self.exp_dir / f"step_{self.steps_done}"
        self.cluster.wait_for_checkpoint()
        if num_minibatches is not None or folder not in checkpoints(self.exp_dir):
            folder = self._begin_checkpoint(num_minibatches)
            self.cluster.wait_for_checkpoint()
        self.writer.close()
        logger.info(f"stopped; the state is in {folder}: --resume {self.exp_dir} goes on")

    def evaluate(
        self, step: int, file_name: str | None = None, *, restore: bool = True
    ) -> dict[str, float]:
        """Evaluate greedily on the fixed initial states, log it, and write it to `file_name`.

        `restore`: bring the training environments back afterwards.
        """
        start = time.perf_counter()
        suite = get_suite(self.args.task_suite_name)
        video_dir = self.exp_dir / "videos" / f"step_{step}" if self.args.save_video else None
        summary = summarize_run(
            self.cluster.evaluate(video_dir, restore=restore),
            self.plan.task_ids,
            suite.instructions,
        )
        overall = summary["overall"]
        metrics = {"time/eval_s": time.perf_counter() - start}
        for name, part in [
            ("", overall),
            *((f"task_{t['task_id']}_", t) for t in summary["per_task"]),
        ]:
            metrics[f"eval/{name}num_episodes"] = float(part["episodes"])
            metrics |= {f"eval/{name}success_rate": part["rate"]} if "rate" in part else {}
        if file_name:
            summary |= {"training_step": step, "remarks": suite.remarks()}
            (self.exp_dir / file_name).write_text(json.dumps(summary, indent=1) + "\n")
        logger.info(
            f"greedy evaluation: {overall['successes']} of {overall['episodes']} episodes succeed"
        )
        return metrics

    def finish(self) -> None:
        """Final evaluation (if asked) and the final model, in the run's own folder."""
        step = self.steps_done
        if self.args.eval_final:
            self.cluster.push_weights(step)
            self.writer.write(step, dict(self.evaluate(step, "eval_final.json", restore=False)))
        self.cluster.wait_for_checkpoint()
        final = self.exp_dir / ".final"
        self.cluster.save(final, self.metadata(step, self.episodes), overwrite=True)
        for file in final.iterdir():
            os.replace(file, self.exp_dir / file.name)
        final.rmdir()
        self.writer.close()
        logger.info(f"done: {self.exp_dir}")
