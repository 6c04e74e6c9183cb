"""A stand-in for threading.Timer that goes off when something has happened, however long that takes."""

import threading
from collections.abc import Callable
from typing import Any


def timer_when(has_happened: Callable[[], bool]) -> Callable[..., Any]:
    """For `pipeline.threading.Timer`: the first timer, which asks to stop, goes off then; the others never do."""
    made: list[threading.Thread] = []

    class Timer(threading.Thread):
        def __init__(self, after_s: float, function: Callable[..., None], args: Any = ()) -> None:
            super().__init__(daemon=True)
            self.function, self.arguments, self.is_first = function, args, not made
            self.cancelled = threading.Event()
            made.append(self)

        def run(self) -> None:
            while self.is_first and not self.cancelled.wait(0.01):
                if has_happened():
                    self.function(*self.arguments)
                    return

        def cancel(self) -> None:
            self.cancelled.set()

    return Timer
