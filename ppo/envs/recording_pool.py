"""Records the missing episodes of an `EpisodeStore`, in this process or in several.

A process gets one episode at a time, of the task that it did last as long as there is one: changing tasks costs a
LIBERO environment seconds. The processes are plain Python processes, as in `ppo.envs.vector_worker`.
"""

import contextlib
import faulthandler
import os
import signal
import subprocess
import tempfile
import traceback
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import IO, Any

from ppo.envs.base import get_suite
from ppo.envs.recording import LIBERO_SUITES, ExpertFailedError, Recorder, RecordingSettings
from ppo.envs.vector_process import spawn_python
from prismatic.vla.datasets.store import EpisodeStore

# Called with an episode's number, its steps and its counts when it is in the store.
OnDone = Callable[[int, int, dict[str, int]], None]
_TAIL_BYTES = 4000


class RecordingError(RuntimeError):
    """A recording process failed; names the episode and the cause."""


class WorkList:
    """Which episode a process does next."""

    def __init__(self, settings: RecordingSettings, indices: Iterable[int]) -> None:
        self._remaining: dict[int, deque[int]] = {}
        for index in sorted(indices):
            self._remaining.setdefault(settings.task_id(index), deque()).append(index)
        self._task_of: dict[int, int] = {}  # process -> task

    def next_index(self, process: int) -> int | None:
        """The next episode for this process: of its task, else of the task with most left per process; None: done."""
        task = self._task_of.pop(process, None)
        if task is None or not self._remaining[task]:
            busy = list(self._task_of.values())
            open_tasks = [t for t, left in sorted(self._remaining.items()) if left]
            if not open_tasks:
                return None
            task = max(open_tasks, key=lambda t: len(self._remaining[t]) / (1 + busy.count(t)))
        self._task_of[process] = task
        return self._remaining[task].popleft()


def record_missing(
    settings: RecordingSettings,
    store: EpisodeStore,
    indices: Iterable[int],
    num_processes: int,
    on_done: OnDone,
) -> None:
    """Record the episodes `indices` into the store.

    Args:
        settings: of the recording.
        store: opened.
        indices: numbers of the episodes.
        num_processes: 1: in this process, but LIBERO always in processes of its own, which it may take with it.
        on_done: called in this process.

    Raises:
        ExpertFailedError: the expert cannot supply an episode.
        RecordingError: a process failed or died. What was finished is in the store, also in the other case.
    """
    indices = list(indices)
    work, num_processes = WorkList(settings, indices), min(num_processes, len(indices))
    if num_processes > 1 or (num_processes and settings.task_suite_name in LIBERO_SUITES):
        _record_in_processes(settings, store, work, num_processes, on_done)
    elif indices:
        with contextlib.closing(Recorder(settings)) as recorder:
            while (index := work.next_index(0)) is not None:
                on_done(index, *_record_into(store, recorder, index))


def _record_into(store: EpisodeStore, recorder: Recorder, index: int) -> tuple[int, dict[str, int]]:
    episode = recorder.record(index)
    store.add(index, episode.demonstration, episode.counts)
    return len(episode.demonstration.actions_T7), episode.counts


def _record_in_processes(
    settings: RecordingSettings,
    store: EpisodeStore,
    work: WorkList,
    num_processes: int,
    on_done: OnDone,
) -> None:
    processes = [_Process(number, settings, store) for number in range(num_processes)]
    try:
        for process in processes:
            process.give(work.next_index(process.number))
        while busy := [process for process in processes if process.index is not None]:
            ready = wait([process.connection for process in busy])
            for process in [p for p in busy if p.connection in ready]:
                index, num_steps, counts = process.result()
                process.give(work.next_index(process.number))
                on_done(index, num_steps, counts)
    finally:
        for process in processes:
            process.end()


class _Process:
    """The parent's handle of one recording process."""

    def __init__(self, number: int, settings: RecordingSettings, store: EpisodeStore) -> None:
        self.number, self.settings = number, settings
        self.index: int | None = None  # the episode it works on
        self.connection, child_end = Pipe()
        self._output: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `end`)
        program = f"from ppo.envs.recording_pool import main; main({child_end.fileno()})"
        self._popen = spawn_python(program, self._output, (child_end.fileno(),))
        child_end.close()
        suite = get_suite(settings.task_suite_name)
        options = suite.process_options({"env_gpu_id": settings.env_gpu_id}, number)
        self.connection.send((replace(settings, env_gpu_id=options["env_gpu_id"]), store))

    def give(self, index: int | None) -> None:
        """Let it record an episode; None: it has nothing more to do."""
        self.index = index
        if index is None:
            self.connection.close()
            return
        with contextlib.suppress(
            BrokenPipeError, ConnectionResetError
        ):  # noticed when waiting for its result
            self.connection.send(index)

    def result(self) -> tuple[int, int, dict[str, int]]:
        """Number, steps and counts of the episode it was given; raises as `record_missing` does."""
        assert self.index is not None
        task_id = self.settings.task_id(self.index)
        where = f"process {self.number}, episode {self.index} ({self.settings.task_suite_name} task {task_id})"
        try:
            kind, *content = self.connection.recv()
        except (EOFError, ConnectionResetError):
            raise RecordingError(f"{where}: {self._how_it_died()}") from None
        if kind == "expert failed":
            raise ExpertFailedError(content[0])
        if kind == "error":
            raise RecordingError(f"{where}:\n{content[0]}")
        return self.index, content[0], content[1]

    def _how_it_died(self) -> str:
        status = self._popen.wait()
        size = os.fstat(self._output.fileno()).st_size
        tail = (
            os.pread(self._output.fileno(), _TAIL_BYTES, max(size - _TAIL_BYTES, 0))
            .decode(errors="replace")
            .strip()
        )
        how = (
            f"died by {signal.Signals(-status).name}"
            if status < 0
            else f"exited with status {status}"
        )
        return f"{how}\n{tail}" if tail else how

    def end(self) -> None:
        """End the process: at once if it is at work, else after it has closed its environment."""
        if self.index is not None:
            self._popen.kill()
        self.connection.close()
        try:
            self._popen.wait(10.0)
        except (
            subprocess.TimeoutExpired
        ):  # a driver that does not let go: everything is in the store
            self._popen.kill()
        self._output.close()


def main(connection_fd: int) -> None:
    """Entry point of a recording process: reads settings and store from the pipe, then records what it is told."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    faulthandler.enable()
    connection: Connection[Any, Any] = Connection(connection_fd)
    settings, store = connection.recv()
    recorder = Recorder(settings)
    with contextlib.suppress(
        EOFError, BrokenPipeError, ConnectionResetError
    ):  # the parent has had enough
        while True:
            index = connection.recv()
            try:
                connection.send(("done", *_record_into(store, recorder, index)))
            except ExpertFailedError as error:
                connection.send(("expert failed", str(error)))
            except Exception:
                connection.send(("error", traceback.format_exc()))
    recorder.close()
