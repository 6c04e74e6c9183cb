"""Commands run one after the other: what the quick start and the from-scratch run share. Knows no PPO."""

import collections
import contextlib
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NUM_TAIL_LINES = 25
SHOWN = re.compile(r"step (\d+)/\d+ .*")  # lines of a stage's log that the console shows too
KILL_AFTER_S = 60.0  # what was asked to save and end, and has not by then, is killed


@dataclass(frozen=True)
class Stage:
    """One command of a run.

    Attributes:
        name: of its log and its marker.
        title: for people.
        command: the whole command line.
        settings: what decides its result, by flag, as text; compared before it is taken as done.
        environment: variables for it alone.
        needs_s: seconds that must be left for it to be begun.
        stop_signal: asks it to save what it has and to end, so that it goes on next time; None: it cannot go on.
        after: names of stages whose results it uses.
        scrap: removed before it begins, if it cannot go on.
        is_complete: whether it has done everything, once it has ended with code 0.
    """

    name: str
    title: str
    command: tuple[str, ...]
    settings: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    needs_s: float = 0.0
    stop_signal: int | None = None
    after: tuple[str, ...] = ()
    scrap: Path | None = None
    is_complete: Callable[[], bool] = lambda: True


class StageError(RuntimeError):
    """A stage's command failed; the message holds the end of its log."""


def flags(values: Mapping[str, Any]) -> list[str]:
    """{"lr": 0.1, "use_lora": True, "image_aug": False} -> --lr 0.1 --use_lora --no_image_aug.

    A tuple or list becomes several values; None leaves the flag out.
    """
    texts: list[str] = []
    for name, value in values.items():
        if isinstance(value, bool):
            texts.append(f"--{name}" if value else f"--no_{name}")
        elif isinstance(value, tuple | list):
            texts += [f"--{name}", *map(str, value)]
        elif value is not None:
            texts += [f"--{name}", str(value)]
    return texts


def child_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Variables of every stage: unbuffered, unwrapped logs; nothing reaches for the network; threads that sleep."""
    quiet = {
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "VLLM_NO_USAGE_STATS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    offline = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    plain = {"PYTHONUNBUFFERED": "1", "COLUMNS": "180", "TOKENIZERS_PARALLELISM": "false"}
    # Spinning threads lose whole time slices to each other on busy cores: fine-tuning on two threads fell from 360 to
    # 13-40 samples/s beside another job, and to 220 with this, which costs a quarter of the speed on idle cores.
    threads = {"OMP_WAIT_POLICY": "PASSIVE"}
    return os.environ | quiet | offline | plain | threads | dict(extra or {})


class StopTimer:
    """Sends a process a signal after a while, and kills it if it has not ended `KILL_AFTER_S` later; None: never."""

    def __init__(
        self, process: subprocess.Popen[str], after_s: float | None, stop_signal: int
    ) -> None:
        self.process, self.stop_signal, self.was_sent = process, stop_signal, False
        self._timers = []
        if after_s is not None:
            self._timers.append(threading.Timer(max(0.0, after_s), self._stop))
            self._timers.append(
                threading.Timer(max(0.0, after_s) + KILL_AFTER_S, self._send, (signal.SIGKILL,))
            )
        for timer in self._timers:
            timer.daemon = True
            timer.start()

    def _stop(self) -> None:
        self.was_sent = True
        self._send(self.stop_signal)

    def _send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)

    def cancel(self) -> None:
        """Send nothing more."""
        for timer in self._timers:
            timer.cancel()


@contextlib.contextmanager
def _stopping(
    process: subprocess.Popen[str], stop_after_s: float | None, stop_signal: int
) -> Iterator[StopTimer]:
    timer = StopTimer(process, stop_after_s, stop_signal)
    try:
        yield timer
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(stop_signal)
        try:
            process.communicate(
                timeout=KILL_AFTER_S
            )  # reads on: a full pipe would keep it from ending
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        raise
    finally:
        timer.cancel()


def run_command(
    command: Sequence[str],
    log: Path,
    on_line: Callable[[str], None],
    *,
    environment: Mapping[str, str] | None = None,
    stop_after_s: float | None = None,
    stop_signal: int = signal.SIGTERM,
) -> bool:
    """Run a command with its output appended to `log`, and each line given to `on_line`.

    After `stop_after_s` seconds it gets `stop_signal`; whatever code it then ends with, it is taken as stopped.

    Returns: whether it was left to end by itself (with code 0).

    Raises:
        StageError: it ended by itself with another code than 0; the message holds the end of the log.
    """
    tail: collections.deque[str] = collections.deque(maxlen=NUM_TAIL_LINES)
    with log.open("a") as file:
        file.write(f"$ {' '.join(command)}\n")
        file.flush()
        process = subprocess.Popen(
            command, env=child_environment(environment), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace",
        )  # fmt: skip
        with _stopping(process, stop_after_s, stop_signal) as timer:
            assert process.stdout is not None
            for line in process.stdout:
                file.write(line)
                file.flush()
                tail.append(line)
                on_line(line.rstrip())
            code = process.wait()
    if timer.was_sent:
        return False
    if code != 0:
        raise StageError(f"{''.join(tail)}\nended with code {code}; the whole log is {log}")
    return True


class TimeLimit:
    """How long this invocation may still run; None: as long as it takes."""

    def __init__(self, limit_s: float | None) -> None:
        self.limit_s, self.started = limit_s, time.monotonic()

    @property
    def left_s(self) -> float:
        """Seconds left; infinite without a limit."""
        return (
            float("inf")
            if self.limit_s is None
            else self.limit_s - (time.monotonic() - self.started)
        )
