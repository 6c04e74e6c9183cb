"""Attempts of a run: the program in a child process, started again when it dies, and nothing of it left behind.

Whatever a run starts (Ray's servers, actors, engines, environments) and outlives its parent becomes a child of the
process here, which Linux calls a subreaper, and is ended with the run, however that ends. Knows no Ray and no PPO.
"""

import contextlib
import ctypes
import signal
import subprocess
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import psutil

from utils.command_line import REFUSED
from utils.logging_utils import get_logger

logger = get_logger("driver")

SHARED_MEMORY = "/dev/shm"
# Exit codes of a program that would end the same way again: a user's mistake, and numbers that are not finite.
FINAL_CODES = (REFUSED, 3)
# Ray's processes and ours end by themselves when the driver does; what has not by then never will.
GRACE_S = 5.0
# Of linux/prctl.h.
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


def adopt_orphans() -> set[int]:
    """Make this process the parent of descendants that lose theirs; returns the process ids that it has now."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    return {process.pid for process in psutil.Process().children(recursive=True)}


def end_descendants(spared: Collection[int] = (), grace_s: float = GRACE_S) -> list[str]:
    """Kill descendants but the `spared` that do not end within `grace_s`, with their shared memory; returns names."""
    left = _descendants(spared)
    files = {file for process in left for file in _shared_memory_files(process)}
    psutil.wait_procs(left, timeout=grace_s)
    names = []
    while left := _descendants(spared):  # again: one may have been starting another
        for process in left:
            with contextlib.suppress(psutil.Error):
                names.append(f"{process.name()} ({process.pid})")
                process.kill()
        psutil.wait_procs(left, timeout=10)
    if not spared:
        for file in files:
            Path(file).unlink(missing_ok=True)
    return names


def _descendants(spared: Collection[int]) -> list[psutil.Process]:
    """Living ones; those that ended are reaped."""
    found = psutil.Process().children(recursive=True)
    _, alive = psutil.wait_procs(
        [process for process in found if process.pid not in spared], timeout=0
    )
    return [process for process in alive if _is_running(process)]


def _is_running(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _shared_memory_files(process: psutil.Process) -> set[str]:
    """Paths in /dev/shm that a process has mapped."""
    with contextlib.suppress(psutil.Error, OSError):
        return {
            m.path
            for m in process.memory_maps()
            if m.path.startswith(SHARED_MEMORY) and "(deleted)" not in m.path
        }
    return set()


def run_attempt(program: Callable[[], None], user_error: type[Exception]) -> int:
    """Run `program`, end what it leaves running, and return an exit code, see FINAL_CODES. Other errors are raised."""
    spared = adopt_orphans()
    try:
        program()
    except user_error as problem:
        logger.error("%s", problem)
        return REFUSED
    except RuntimeError as error:
        if not isinstance(error.__cause__, FloatingPointError):
            raise
        logger.error("%s", error)
        return 3
    finally:
        end_descendants(spared)
    return 0


def run_attempts(first: Sequence[str], again: Sequence[str], max_restarts: int) -> int:
    """Run the command `first`, and `again` each time that it died, at most `max_restarts` times; returns an exit code.

    A command that ends with 0 or one of FINAL_CODES is not run again. SIGTERM and SIGINT go to the child, which is
    expected to end by itself. A child outlives this process only for as long as it takes to stop properly.
    """
    stopped: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, _: object) -> None:
        stopped.append(number)
        if child is not None:
            with contextlib.suppress(ProcessLookupError):
                child.send_signal(number)

    adopt_orphans()
    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for attempt in range(max_restarts + 1):
            # A group of its own: Ctrl-C at a terminal would otherwise reach it twice.
            child = subprocess.Popen(
                again if attempt else first, process_group=0, preexec_fn=_end_with_parent
            )
            code = child.wait()
            end_descendants()
            if code == 0 or code in FINAL_CODES or stopped:
                return code if code >= 0 else 128 - code
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            if attempt == max_restarts:
                logger.error(
                    f"attempt {attempt + 1} ended with {how}: --max_restarts {max_restarts} is used up"
                )
                return code if code >= 0 else 128 - code
            logger.warning(
                f"attempt {attempt + 1} of {max_restarts + 1} ended with {how}: going on from the last checkpoint"
            )
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    raise AssertionError("the loop returns")


def _end_with_parent() -> None:
    """Ask the kernel for a SIGTERM to this process when its parent dies."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def same_command(*added: str) -> list[str]:
    """Return the command line of this program, with flags added."""
    return [sys.executable, *sys.argv, *added]
