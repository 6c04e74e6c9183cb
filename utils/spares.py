"""Processes that have their imports behind them and wait to take the place of an actor that dies. Knows no PPO."""

import contextlib
import time
from collections.abc import Callable
from typing import Any

import psutil
import ray
from ray.exceptions import RayActorError, RayError

from utils.actors import first_line
from utils.logging_utils import get_logger

logger = get_logger("driver")

# A spare that still imports when it is wanted is nearly as late as a new process.
READY_TIMEOUT_S = 60.0
# What is killed ends within this, unless the kernel or a driver holds it.
GONE_TIMEOUT_S = 30.0


def spare_class(kind: type) -> type:
    """A class like `kind` whose constructor only prepares, and whose `begin` is the constructor of `kind`."""

    class Spare(kind):
        def __init__(self, prepare: Callable[[], None], pid: int) -> None:
            """Call `prepare`. `pid` is the process whose place this one may take, on the same machine."""
            self._pid = pid
            prepare()

        def ready(self) -> None:
            """Answers when it is prepared."""

        def begin(self, *args: Any) -> None:
            wait_until_gone(self._pid, GONE_TIMEOUT_S)
            super().__init__(*args)

    Spare.__name__ = Spare.__qualname__ = f"Spare{kind.__name__}"
    return Spare


def wait_until_gone(pid: int, timeout_s: float) -> None:
    """Until process `pid` has ended, which gives back its GPU memory, or the time is over. A zombie has ended."""
    deadline = time.monotonic() + timeout_s
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        while process.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
            time.sleep(0.05)


class SpareActors:
    """A spare beside each of `size` actors.

    Args:
        name: of one of the actors.
        start: makes the spare of the actor with an index; its class is a `spare_class`.
        arguments: those of the constructor of the actor with an index.
    """

    def __init__(
        self, name: str, size: int, start: Callable[[int], Any], arguments: Callable[[int], tuple]
    ) -> None:
        self.name, self._size, self._start, self._arguments = name, size, start, arguments
        self._waiting: dict[int, Any] = {}
        self._beginning: list[Any] = []

    def prepare(self) -> None:
        """Start those that are missing; does not wait for their imports."""
        for index in range(self._size):
            if index in self._waiting:
                continue
            with contextlib.suppress(
                RayActorError
            ):  # its actor has died meanwhile: noticed when that is called next
                self._waiting[index] = self._start(index)

    def take(self, index: int) -> Any | None:
        """The spare of actor `index`, which begins to be that actor; None if there is none that answers."""
        spare = self._waiting.pop(index, None)
        if spare is None:
            return None
        try:
            ray.get(spare.ready.remote(), timeout=READY_TIMEOUT_S)
        except RayError as error:
            logger.warning(f"the spare of {self.name} {index} is of no use: {first_line(error)}")
            ray.kill(spare)
            return None
        logger.info(f"the spare of {self.name} {index} takes its place")
        self._beginning.append(spare.begin.remote(*self._arguments(index)))
        return spare

    def beginning(self) -> list[Any]:
        """Calls of the spares taken since the last time, done when their constructors are; errors are these calls'."""
        calls, self._beginning = self._beginning, []
        return calls
