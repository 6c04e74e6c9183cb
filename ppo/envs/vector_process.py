"""The parent's handle of one process of environments: start, talk, watch, end."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

from ppo.envs.vector_worker import ACTIVITIES, Command, SharedBoard, WorkerConfig

_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)
_TAIL_BYTES = 6000
_STACK_TIMEOUT_S = 5.0
"""On a busy machine a process may get no core for a while; a process that hangs has been waited for longer."""


def spawn_python(
    program: str,
    output: IO[bytes],
    pass_fds: tuple[int, ...],
    variables: dict[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Start a plain Python process of one thread a library, with this one's import path and nothing else of it.

    `program` is its source; it writes to `output`, keeps the file descriptors `pass_fds`, and gets the environment
    variables `variables` besides this process's.
    """
    paths = [path or os.getcwd() for path in sys.path]
    return subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        pass_fds=pass_fds,
        env={
            **os.environ,
            **dict.fromkeys(_THREAD_VARIABLES, "1"),
            "PYTHONPATH": os.pathsep.join(paths),
            **(variables or {}),
        },
    )


class EnvProcess:
    """One process and the environments in it; can be started again after its death.

    Args:
        config: given to the process.
        board: shared with it, through `memory_fd`.
        memory_fd: file descriptor of the shared memory.
        startup_timeout_s: most seconds from the start until all its environments are made.
        step_timeout_s: most seconds for one step or one reset of one environment.
        variables: environment variables of the process, besides the parent's.
    """

    def __init__(
        self,
        config: WorkerConfig,
        board: SharedBoard,
        memory_fd: int,
        *,
        startup_timeout_s: float,
        step_timeout_s: float,
        variables: dict[str, str],
    ) -> None:
        self.config, self.board, self.memory_fd = config, board, memory_fd
        self.startup_timeout_s, self.step_timeout_s, self.variables = (
            startup_timeout_s,
            step_timeout_s,
            variables,
        )
        self.num_failures = 0  # since it last did what it was told
        self.is_ready = False
        self.backlog: list[list[Command]] = []  # waits for the start
        self._sent_at: deque[float] = deque()  # of messages without a reply
        self._popen: subprocess.Popen[bytes] | None = None
        self._output: IO[bytes] | None = None
        self.connection: Connection[Any, Any]

    def start(self) -> None:
        """Start the process; it says ("ready", None) once its environments are made."""
        parent_end, child_end = Pipe()
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `kill`)
        program = (
            f"from ppo.envs.vector_worker import main; main({child_end.fileno()}, {self.memory_fd})"
        )
        self.started_at = time.monotonic()
        self.board.activity[self.config.process_index] = (0, -1, 0, self.started_at)
        self._popen = spawn_python(
            program, self._output, (child_end.fileno(), self.memory_fd), self.variables
        )
        child_end.close()
        self.connection = parent_end
        self.is_ready = False
        self._sent_at.clear()
        self.connection.send(self.config)

    @property
    def pid(self) -> int:
        """Process id."""
        assert self._popen is not None
        return self._popen.pid

    def memory_gib(self) -> float:
        """Resident memory in GiB; 0 of a process that has ended, and where there is no /proc."""
        if self._popen is None:
            return 0.0
        try:
            pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        except (OSError, IndexError):
            return 0.0
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**30

    def send(self, commands: list[Command]) -> None:
        """Queue commands, to be done in order; they wait here while the process starts."""
        if not self.is_ready:
            self.backlog.append(commands)
            return
        self._sent_at.append(time.monotonic())
        with contextlib.suppress(
            BrokenPipeError, ConnectionResetError
        ):  # its end is noticed when waiting for a reply
            self.connection.send(commands)

    def note_ready(self) -> None:
        """The process said that it is ready: send what waited for it."""
        self.is_ready = True
        backlog, self.backlog = self.backlog, []
        for commands in backlog:
            self.send(commands)

    def note_reply(self) -> None:
        """A message was answered."""
        self._sent_at.popleft()
        self.num_failures = 0

    def deadline(self) -> float:
        """When (time.monotonic) it must have got further; infinite while it has nothing to do."""
        if not self.is_ready:
            return self.started_at + self.startup_timeout_s
        if not self._sent_at:
            return float("inf")
        return (
            max(self._sent_at[0], float(self.board.activity[self.config.process_index, 3]))
            + self.step_timeout_s
        )

    def activity(self) -> tuple[str, int, int]:
        """What it does, or did when it died, with which environment (-1: none), and the episode's step number."""
        code, env_id, step, _ = self.board.activity[self.config.process_index]
        return ACTIVITIES[int(code)], int(env_id), int(step)

    def request_stack(self) -> None:
        """Let a process that hangs write its Python stack to its output; one that is stopped writes nothing."""
        assert self._popen is not None and self._output is not None
        first = written = os.fstat(self._output.fileno()).st_size
        with contextlib.suppress(ProcessLookupError):
            self._popen.send_signal(signal.SIGUSR1)
        deadline = time.monotonic() + _STACK_TIMEOUT_S
        while time.monotonic() < deadline:  # until it has begun to write and writes no more
            time.sleep(0.2)
            before, written = written, os.fstat(self._output.fileno()).st_size
            if first < before == written:
                break

    def hang_up(self) -> None:
        """Close the pipe: the process finishes what it does, closes its environments and ends."""
        if self._popen is not None:
            self.connection.close()

    def end(self, grace_s: float) -> str:
        """End the process for good, by force after `grace_s`; returns how it ended and the end of what it wrote."""
        if self._popen is None or self._output is None:
            return ""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(grace_s)
        status = self._popen.poll()
        self._popen.kill()
        with contextlib.suppress(
            subprocess.TimeoutExpired
        ):  # it may be stuck in a driver: go on without it
            self._popen.wait(5.0)
        self.connection.close()
        size = os.fstat(self._output.fileno()).st_size
        tail = (
            os.pread(self._output.fileno(), _TAIL_BYTES, max(size - _TAIL_BYTES, 0))
            .decode(errors="replace")
            .strip()
        )
        self._output.close()
        self._popen = self._output = None
        return f"{_describe_status(status)}\n{tail}" if tail else _describe_status(status)


def _describe_status(status: int | None) -> str:
    if status is None:
        return "was killed by us"
    if status < 0:
        return f"died by {signal.Signals(-status).name}"
    return f"exited with status {status}"
