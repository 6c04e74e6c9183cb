"""Many environments in processes, stepped in groups, that outlive a simulator's death.

    with VectorEnv("tabletop", 8, num_processes=2, image_size=64) as vector:
        images = vector.reset(range(8), requests)
        vector.send(group0, actions0, next0)
        vector.send(group1, actions1, next1)   # both processes are busy while a policy acts for a group
        step = vector.receive(group0)

Environment i lives in process i % num_processes, so that every group of neighbours keeps all processes busy. What an
episode is depends on its ResetRequest only, never on the environment or process that plays it.
Shapes: n of the N environments, H W image.
"""

import functools
import multiprocessing.connection
import os
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ppo.envs.base import ACTION_DIM, ResetRequest, get_suite
from ppo.envs.vector_process import EnvProcess
from ppo.envs.vector_worker import Command, Outcome, SharedBoard, WorkerConfig
from utils.logging_utils import get_logger

logger = get_logger(__name__)

MAX_FAILURES = 3


@dataclass
class VectorStep:
    """Result of one step of n environments; every array has n rows, in the order asked for.

    Attributes:
        images: (n, H, W, 3) uint8, the next observation to act on (after the reset, where one was made).
        final_images: (n, H, W, 3) uint8, the last real observation where the episode ended; black elsewhere.
        reward: float32.
        terminated: bool.
        truncated: bool, the time limit; never together with terminated.
        success: bool.
        episode_return: float32, sum of the episode's rewards so far.
        episode_length: int64, its steps so far.
        task_ids: int64, the task of the episode that was stepped.
        reset_used: bool, the environment plays the `next_resets` request now.
        dropped: bool, the process died or hung: the step did not happen, its episode is void and must not be counted.
            The other fields of the row are 0. The environment plays its next request if it was given one (reset_used),
            else its present one again. With neither reset yet (the process still starts) the image is black.
    """

    images: np.ndarray
    final_images: np.ndarray
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    success: np.ndarray
    episode_return: np.ndarray
    episode_length: np.ndarray
    task_ids: np.ndarray
    reset_used: np.ndarray
    dropped: np.ndarray

    @property
    def done(self) -> np.ndarray:
        """Bool: the episode ended, for whatever reason of its own."""
        return self.terminated | self.truncated


@dataclass
class _Slot:
    """What the parent knows of one environment.

    Attributes:
        request: of the running episode; None: it waits for `reset`.
        lost: its process died, so the episode is void although the caller does not know yet.
        command: what the caller asked for and has not received yet.
        dropping: the command was a step of a lost episode: the replacement is reset instead.
        outcome: what came of the command.
        upcoming: the next episode as far as the process has been told; it may be preparing that.
    """

    request: ResetRequest | None = None
    lost: bool = False
    command: Command | None = None
    dropping: bool = False
    outcome: Outcome | None = None
    upcoming: ResetRequest | None = None

    def is_in_flight(self) -> bool:
        """Whether a process owes an outcome."""
        return self.command is not None and self.outcome is None

    def effective_command(self) -> Command:
        """What the process is to do: for a lost episode a reset, with the next request or else the same one."""
        assert self.command is not None
        if not self.dropping:
            return self.command
        return Command(self.command.env_id, None, self.command.request or self.request)


class VectorEnv:
    """A vector of environments; see the module docstring. To be used from one thread.

    Args:
        suite_name: see `get_suite`.
        num_envs: environments.
        num_processes: processes that share them, at most num_envs.
        image_size: side of the images in pixels.
        max_steps: time limit of an episode; None: the suite's.
        startup_timeout_s: most seconds for a process to make its environments.
        step_timeout_s: most seconds for one step or one reset of one environment; then its process is taken to hang.
        replacement_wait_s: most seconds that `receive` waits for the replacement of a dead process, counted from the
            death; later its environments report void steps until it is ready, and the others go on.
        center_crop: show the central 0.9 of every image's area, enlarged: for policies trained with random crops.
        env_kwargs: further arguments of the suite's make_env. Processes take turns on several `env_gpu_id`.
        first_turn: the first process's turn; callers that share the GPUs pass the number of processes before theirs.
        process_variables: environment variables of the processes (MUJOCO_GL, CUDA_VISIBLE_DEVICES, ...).

    Attributes:
        num_envs: N.
        num_replaced: processes that died or hung and were replaced.

    Raises:
        ValueError: sizes or names that cannot work.
        RuntimeError: the environments cannot be made, or a process failed MAX_FAILURES times in a row.
    """

    def __init__(
        self,
        suite_name: str,
        num_envs: int,
        *,
        num_processes: int,
        image_size: int,
        max_steps: int | None = None,
        startup_timeout_s: float = 120.0,
        step_timeout_s: float = 60.0,
        replacement_wait_s: float = 5.0,
        center_crop: bool = False,
        env_kwargs: Mapping[str, Any] | None = None,
        first_turn: int = 0,
        process_variables: Mapping[str, str] | None = None,
    ) -> None:
        if not 1 <= num_processes <= num_envs:
            raise ValueError(
                f"{num_processes} processes for {num_envs} environments: use 1 to {num_envs} processes"
            )
        self.num_envs, self.num_processes, self.image_size = num_envs, num_processes, image_size
        suite = get_suite(suite_name)
        options_of = functools.partial(suite.process_options, env_kwargs or {})
        self.num_tasks = suite.num_tasks
        self.startup_timeout_s, self.replacement_wait_s = startup_timeout_s, replacement_wait_s
        self.num_replaced = 0
        self._slots = [_Slot() for _ in range(num_envs)]
        memory_fd = os.memfd_create("ppo_vla_images")
        self._board = SharedBoard(memory_fd, num_envs, image_size, num_processes)
        self._processes = [
            EnvProcess(
                WorkerConfig(
                    suite_name, tuple(range(index, num_envs, num_processes)), num_envs, index, num_processes,
                    image_size, max_steps, os.getpid(), center_crop, options_of(first_turn + index),
                ),
                self._board, memory_fd, startup_timeout_s=startup_timeout_s, step_timeout_s=step_timeout_s,
                variables=dict(process_variables or {}),
            )
            for index in range(num_processes)
        ]  # fmt: skip
        self._finalizer = weakref.finalize(self, _end_all, self._processes, memory_fd, os.getpid())
        try:
            for process in self._processes:
                process.start()
            while not all(process.is_ready for process in self._processes):
                self._poll(float("inf"))
        except BaseException:
            self.close()
            raise
        if gpus := self.drawing_gpus:
            numbers = ", ".join(map(str, gpus))
            logger.info(
                f"{num_envs} environments in {num_processes} processes draw on GPU {numbers} (EGL's numbers)"
            )

    @property
    def drawing_gpus(self) -> tuple[int, ...]:
        """GPUs that the environments were told to draw on; () where they draw on the CPU or on EGL's first device."""
        options = [process.config.env_kwargs for process in self._processes]
        return tuple(sorted({o["env_gpu_id"] for o in options if o.get("env_gpu_id") is not None}))

    def __enter__(self) -> "VectorEnv":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def memory_gib(self) -> float:
        """Resident memory of the environment processes, all together, in GiB."""
        return sum(process.memory_gib() for process in self._processes)

    def close(self) -> None:
        """End all processes, by force where they do not react. A second call does nothing."""
        self._finalizer()

    def reset(
        self, env_ids: Sequence[int] | np.ndarray, requests: Sequence[ResetRequest]
    ) -> np.ndarray:
        """Start the requested episodes, giving up running ones; returns their first images, (n, H, W, 3) uint8.

        Raises:
            ValueError: an environment is between `send` and `receive`, or a request is of no task of the suite.
        """
        ids = self._check_ids(env_ids, len(requests))
        self._check_requests(requests)
        for env_id, request in zip(ids, requests, strict=True):
            self._slots[env_id] = _Slot(command=Command(env_id, None, request))
        self._dispatch(ids)
        self._wait(ids, wait_for_start=True)
        for env_id, request in zip(ids, requests, strict=True):
            self._slots[env_id] = _Slot(request=request)
        return self._board.images[ids]

    def send(
        self,
        env_ids: Sequence[int] | np.ndarray,
        actions: np.ndarray,
        next_resets: Sequence[ResetRequest | None],
    ) -> None:
        """Begin one step of these environments; `receive` ends it. Several groups may be under way.

        Args:
            env_ids: the environments, each with a running episode.
            actions: (n, 7) float32 in LIBERO's raw convention.
            next_resets: the episode that each starts at once if the present one ends with this step; None: it then
                waits for `reset`.

        Raises:
            ValueError: shapes or requests are wrong, an environment has no running episode or is under way already.
        """
        ids = self._check_ids(env_ids, len(next_resets))
        self._check_requests([r for r in next_resets if r is not None])
        actions = np.asarray(actions, dtype=np.float32)
        if actions.shape != (len(ids), ACTION_DIM):
            raise ValueError(
                f"actions of shape {actions.shape} for {len(ids)} environments: need (n, {ACTION_DIM})"
            )
        idle = [env_id for env_id in ids if self._slots[env_id].request is None]
        if idle:
            raise ValueError(f"environments {idle} have no running episode: reset them first")
        for env_id, action, next_reset in zip(ids, actions, next_resets, strict=True):
            slot = self._slots[env_id]
            slot.command, slot.outcome = Command(env_id, action, next_reset), None
            slot.dropping = slot.lost
        self._dispatch(ids)

    def receive(self, env_ids: Sequence[int] | np.ndarray) -> VectorStep:
        """Wait for the step of these environments that `send` began.

        Raises:
            ValueError: one of them was not sent.
            RuntimeError: a process failed MAX_FAILURES times in a row; the message has its traceback.
        """
        ids = [int(i) for i in env_ids]
        missing = [
            env_id
            for env_id in ids
            if not 0 <= env_id < self.num_envs or self._slots[env_id].command is None
        ]
        if missing or len(set(ids)) != len(ids):
            raise ValueError(
                f"environments {missing or ids} cannot be received: send them first, each once"
            )
        self._wait(ids, wait_for_start=False)
        return self._collect(ids)

    def _collect(self, ids: list[int]) -> VectorStep:
        outcomes = []
        for env_id in ids:
            slot = self._slots[env_id]
            outcome, command = slot.outcome, slot.command
            assert outcome is not None and command is not None
            outcomes.append(outcome)
            if outcome.reset_used:
                slot.request = command.request
            elif outcome.terminated or outcome.truncated:
                slot.request, slot.lost = None, False
            slot.command, slot.dropping, slot.outcome = None, False, None
        images, final_images = self._board.images[ids], np.zeros_like(self._board.images[ids])
        ended = np.array([o.terminated or o.truncated for o in outcomes], dtype=bool)
        final_images[ended] = self._board.final_images[np.array(ids)[ended]]
        return VectorStep(
            images=images,
            final_images=final_images,
            reward=np.array([o.reward for o in outcomes], dtype=np.float32),
            terminated=np.array([o.terminated for o in outcomes], dtype=bool),
            truncated=np.array([o.truncated for o in outcomes], dtype=bool),
            success=np.array([o.success for o in outcomes], dtype=bool),
            episode_return=np.array([o.episode_return for o in outcomes], dtype=np.float32),
            episode_length=np.array([o.episode_length for o in outcomes], dtype=np.int64),
            task_ids=np.array([o.task_id for o in outcomes], dtype=np.int64),
            reset_used=np.array([o.reset_used for o in outcomes], dtype=bool),
            dropped=np.array([o.dropped for o in outcomes], dtype=bool),
        )

    # ------------------------------------------------------------------------------------------ checks

    def _check_ids(self, env_ids: Sequence[int] | np.ndarray, num_others: int) -> list[int]:
        ids = [int(i) for i in env_ids]
        if not self._finalizer.alive:
            raise ValueError("this vector of environments is closed")
        if len(set(ids)) != len(ids) or any(not 0 <= i < self.num_envs for i in ids):
            raise ValueError(
                f"environments {ids}: give each of 0..{self.num_envs - 1} at most once"
            )
        if len(ids) != num_others:
            raise ValueError(
                f"{num_others} requests for {len(ids)} environments: give one for each"
            )
        under_way = [i for i in ids if self._slots[i].command is not None]
        if under_way:
            raise ValueError(f"environments {under_way} are under way: receive their step first")
        return ids

    def _check_requests(self, requests: Sequence[ResetRequest]) -> None:
        wrong = sorted({r.task_id for r in requests if not 0 <= r.task_id < self.num_tasks})
        if wrong:
            raise ValueError(
                f"task ids {wrong} are not among the suite's: use 0..{self.num_tasks - 1}"
            )

    # ------------------------------------------------------------------------------------------ traffic

    def _process_of(self, env_id: int) -> EnvProcess:
        return self._processes[env_id % self.num_processes]

    def _dispatch(self, ids: list[int]) -> None:
        """Send the commands of these environments, one message to each process."""
        for index, process in enumerate(self._processes):
            mine = [i for i in ids if i % self.num_processes == index]
            if mine:
                process.send([self._slots[i].effective_command() for i in mine])

    def _wait(self, ids: list[int], *, wait_for_start: bool) -> None:
        """Until each has an outcome; without `wait_for_start` those of a process that starts for long are voided."""
        while missing := [i for i in ids if self._slots[i].outcome is None]:
            starting = [p for p in map(self._process_of, missing) if not p.is_ready]
            until = float("inf")
            if starting and not wait_for_start:
                until = min(p.started_at for p in starting) + self.replacement_wait_s
            self._poll(until)
            if not wait_for_start:
                self._void_waiting(missing)

    def _void_waiting(self, ids: list[int]) -> None:
        """Report as void, for now, what has waited long enough for the start of a replacement."""
        for env_id in ids:
            process, slot = self._process_of(env_id), self._slots[env_id]
            still_waits = time.monotonic() < process.started_at + self.replacement_wait_s
            if process.is_ready or still_waits or slot.outcome is not None:
                continue
            waiting = [[c for c in commands if c.env_id != env_id] for commands in process.backlog]
            process.backlog = [commands for commands in waiting if commands]
            assert slot.request is not None
            slot.outcome = Outcome(env_id, slot.request.task_id, dropped=True)
            slot.lost = True
            self._board.images[env_id] = 0

    def _poll(self, until: float) -> None:
        """Take in what the processes say, wait for them at most until then; replace the dead and the hanging."""
        by_connection = {p.connection: p for p in self._processes}
        until = min([until, *(p.deadline() for p in self._processes)])
        timeout_s = None if until == float("inf") else max(until - time.monotonic(), 0.0)
        readable = multiprocessing.connection.wait(list(by_connection), timeout_s)
        for connection in readable:
            self._read(by_connection[connection])  # type: ignore[index]
        if readable:
            return  # nobody is late before the replies of a busy moment are in
        for process in self._processes:
            if time.monotonic() > process.deadline():
                process.request_stack()
                limit_s = process.step_timeout_s if process.is_ready else process.startup_timeout_s
                self._replace(process, f"made no progress for {limit_s:g} s", grace_s=0.0)

    def _read(self, process: EnvProcess) -> None:
        try:
            kind, content = process.connection.recv()
        except (EOFError, ConnectionResetError):
            self._replace(process, "died", grace_s=1.0)
            return
        if kind == "ready":
            process.note_ready()
        elif kind == "error":
            self._replace(process, "raised an exception", grace_s=1.0, traceback_text=content)
        else:
            process.note_reply()
            for outcome in content:
                self._note_outcome(outcome)

    def _note_outcome(self, outcome: Outcome) -> None:
        slot = self._slots[outcome.env_id]
        assert slot.command is not None
        if slot.dropping:  # a reset in place of the step that was asked for
            assert slot.request is not None
            outcome = Outcome(
                outcome.env_id,
                slot.request.task_id,
                reset_used=slot.command.request is not None,
                dropped=True,
            )
            slot.lost = False
        slot.outcome = outcome
        slot.upcoming = None if outcome.reset_used else slot.command.request

    # ------------------------------------------------------------------------------------------ deaths

    def _replace(
        self, process: EnvProcess, what: str, *, grace_s: float, traceback_text: str = ""
    ) -> None:
        """Log how a process failed, start another in its place and have its environments reset there."""
        where = f"environment process {process.config.process_index} (pid {process.pid})"
        message = f"{where} {what} {self._describe_activity(process)}"
        ending = process.end(grace_s)
        message += f"\n{traceback_text or ending}"
        process.num_failures += 1
        if process.num_failures >= MAX_FAILURES or (traceback_text and not process.is_ready):
            self.close()
            raise RuntimeError(f"{message}\nfailure {process.num_failures} in a row: giving up")
        self.num_replaced += 1
        logger.error(
            f"{message}\nreplacing it; the episodes of environments {process.config.env_ids} are void"
        )
        for env_id in process.config.env_ids:
            slot = self._slots[env_id]
            if not slot.is_in_flight():
                slot.lost = slot.request is not None
            elif slot.command is not None and slot.command.action is not None:
                slot.dropping = True
        process.start()
        owed = [
            self._slots[i].effective_command()
            for i in process.config.env_ids
            if self._slots[i].is_in_flight()
        ]
        process.backlog = [owed] if owed else []

    def _describe_activity(self, process: EnvProcess) -> str:
        activity, env_id, step = process.activity()
        if activity not in ("stepping", "resetting", "preparing"):
            return f"while {activity}"
        slot = self._slots[env_id]
        if activity == "preparing":
            return f"while preparing the next episode of environment {env_id}, {slot.upcoming}"
        request = slot.request
        if activity == "resetting" and slot.command is not None:
            request = slot.command.request or slot.request
        place = f" at step {step} of its episode" if activity == "stepping" else ""
        return f"while {activity} environment {env_id}{place}, {request}"


def _end_all(processes: list[EnvProcess], memory_fd: int, owner_pid: int) -> None:
    """End all processes (at close, at garbage collection, at the parent's exit; not in a fork of the parent)."""
    if os.getpid() != owner_pid:
        return
    for process in processes:
        process.hang_up()
    deadline = time.monotonic() + 2.0
    for process in processes:
        process.end(max(deadline - time.monotonic(), 0.0))
    os.close(memory_fd)
