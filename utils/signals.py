"""SIGTERM and SIGINT as a request to stop at the next good place."""

import signal
from types import FrameType

from utils.logging_utils import get_logger

logger = get_logger("driver")


class StopRequested(Exception):
    """A signal asked the run to stop."""


class StopSignal:
    """Notes the first SIGTERM or SIGINT instead of dying of it; a second one does what it always did."""

    def __init__(self) -> None:
        self.name: str | None = None

    def install(self) -> None:
        """Take over both signals; to be called from the main thread."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        logger.info(f"{self.name}: stopping as soon as the state can be saved; once more: at once")

    @property
    def requested(self) -> bool:
        """Whether a signal came."""
        return self.name is not None

    def check(self) -> None:
        """Raise StopRequested once a signal came."""
        if self.requested:
            raise StopRequested(self.name)
