"""How far a long task is and how long it will take: a bar on a terminal, log lines elsewhere."""

import logging
import time
from collections.abc import Callable

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from utils.logging_utils import format_duration, stderr_console

# Seconds between log lines where there is no terminal to draw a bar on.
LOG_INTERVAL_S = 30.0


class ProgressReport:
    """Progress of a task whose number of steps is known, with the estimated time left. A context manager.

    Args:
        logger: gets a line every LOG_INTERVAL_S seconds where stderr is no terminal. A task that takes less has none.
        unit: what is counted, in the plural ("episodes").
        total: steps of the whole task; may still grow, see `total`.
        num_done: steps that an earlier process did; the estimate ignores how long they took.
        clock: seconds.

    Attributes:
        total: steps of the whole task.
        num_done: steps done.
    """

    def __init__(
        self,
        logger: logging.Logger,
        unit: str,
        total: int,
        *,
        num_done: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.logger, self.unit, self.clock = logger, unit, clock
        self.total, self.num_done, self._num_before = total, num_done, num_done
        self._started_at = self._logged_at = clock()
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn(),
                   TextColumn("left"), TimeRemainingColumn(elapsed_when_finished=False))  # fmt: skip
        console = stderr_console()
        self._bar = Progress(
            *columns, console=console, disable=not console.is_terminal, transient=True
        )
        self._task = self._bar.add_task(unit, total=total, completed=num_done)

    def __enter__(self) -> "ProgressReport":
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def advance(self, count: int = 1, note: str = "") -> None:
        """`count` more steps are done; `note` says more about the task so far."""
        self.num_done += count
        description = f"{self.unit}, {note}" if note else self.unit
        self._bar.update(
            self._task, completed=self.num_done, total=self.total, description=description
        )
        now = self.clock()
        if self._bar.disable and now - self._logged_at >= LOG_INTERVAL_S:
            self._logged_at = now
            self.logger.info(
                "%d of %d %s, about %s left",
                self.num_done,
                self.total,
                description,
                format_duration(self.left_s(now)),
            )

    def left_s(self, now: float) -> float:
        """Estimated seconds until the end, at the speed since this report began."""
        num_here = self.num_done - self._num_before
        return (now - self._started_at) / max(num_here, 1) * max(self.total - self.num_done, 0)
