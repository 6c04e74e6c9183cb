"""One logger for the whole project, phase timers, and the metric writers (TensorBoard always, W&B on request)."""

import contextlib
import json
import logging
import math
import os
import sys
import time
import types
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.logging import RichHandler

from prismatic.regular_files import open_file


@lru_cache(maxsize=1)
def stderr_console() -> Console:
    """The console of log lines and progress bars: they must share one, or each would overwrite the other's lines."""
    return Console(stderr=True)


def get_logger(name: str) -> logging.Logger:
    """Return a logger that writes to the console through rich; its level comes from `PPO_VLA_LOG_LEVEL` (INFO)."""
    root = logging.getLogger("ppo_vla")
    if not root.handlers:
        handler: logging.Handler
        if sys.stderr.isatty():
            handler = RichHandler(
                console=stderr_console(),
                show_path=False,
                log_time_format="%H:%M:%S",
                markup=False,
            )
            handler.setFormatter(logging.Formatter("%(message)s"))
        else:  # in a file or a pipe a message is one line, however long
            handler = logging.StreamHandler()
            handler.setFormatter(
                logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S")
            )
        root.addHandler(handler)
        root.setLevel(os.environ.get("PPO_VLA_LOG_LEVEL", "INFO"))
        root.propagate = False
    return root.getChild(name)


def add_log_file(path: str | Path) -> None:
    """Copy everything logged in this process to a text file too."""
    get_logger("init")
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger("ppo_vla").addHandler(handler)


class PhaseTimer:
    """Seconds spent per named phase since the last `pop`; phases of one name add up."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the block under `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def pop(self) -> dict[str, float]:
        """Return {phase: seconds} and start again from nothing."""
        seconds, self._seconds = self._seconds, {}
        return seconds


class MetricWriter:
    """Scalars to TensorBoard and `metrics.jsonl` in the run's folder, to W&B if asked.

    A value of None or NaN is absent from all of them, never written as 0. `wandb_mode` "offline" writes to the run's
    folder and sends nothing. A run that goes on begins with `first_step`: TensorBoard hides what it had from there on.
    """

    def __init__(
        self,
        exp_dir: str | Path,
        *,
        use_wandb: bool = False,
        wandb_project: str | None = None,
        wandb_mode: str = "online",
        config: Mapping[str, Any] | None = None,
        first_step: int | None = None,
    ) -> None:
        # TensorBoard imports all of TensorFlow (5 s) where it is installed, unless this module says that it is not.
        sys.modules.setdefault(
            "tensorboard.compat.notf", types.ModuleType("tensorboard.compat.notf")
        )
        from torch.utils.tensorboard import SummaryWriter

        self._tensorboard = SummaryWriter(str(exp_dir), purge_step=first_step)
        self._jsonl = (Path(exp_dir) / "metrics.jsonl").open("a")
        self._wandb = None
        if use_wandb:
            import wandb

            self._wandb = wandb.init(
                project=wandb_project,
                name=Path(exp_dir).name,
                dir=str(exp_dir),
                mode=wandb_mode,  # type: ignore[arg-type]
                config=dict(config or {}),
            )
        text = "\n".join(f"    {k}: {v}" for k, v in (config or {}).items())
        self._tensorboard.add_text("args", text)

    def write(self, step: int, metrics: Mapping[str, float | None]) -> dict[str, float]:
        """Write one training step's scalars; returns what was defined and written."""
        defined = {k: float(v) for k, v in metrics.items() if v is not None and not math.isnan(v)}
        for name, value in defined.items():
            self._tensorboard.add_scalar(name, value, step)
        self._tensorboard.flush()
        self._jsonl.write(json.dumps({"step": step, **defined}) + "\n")
        self._jsonl.flush()
        if self._wandb is not None:
            self._wandb.log(defined, step=step)
        return defined

    def close(self) -> None:
        """Flush and close every writer."""
        self._tensorboard.close()
        self._jsonl.close()
        if self._wandb is not None:
            self._wandb.finish()


def format_duration(seconds: float) -> str:
    """Seconds as 1:02:03 or 2:03."""
    minutes, rest = divmod(int(round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def read_metrics(exp_dir: str | Path) -> list[dict[str, float]]:
    """Every line of a run's metrics.jsonl, in order. Raises ValueError naming the file if a line is damaged."""
    file = Path(exp_dir) / "metrics.jsonl"
    with open_file(file) as lines:
        try:
            return [json.loads(line) for line in lines]
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} has a damaged line: {error}") from error
