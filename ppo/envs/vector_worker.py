"""The child side of `ppo.envs.vector`: a process that owns some environments and does what the pipe says, in order.

It is started as a plain Python process, not by multiprocessing: nothing of the parent's main module (torch, Ray, vLLM)
is imported again, and thread limits and GL variables hold before the first import. Images go through an anonymous
shared memory (memfd): it has no name that could be left behind in /dev/shm, and no size limit of a container's.
Shapes: N environments, H W image.
"""

import contextlib
import faulthandler
import mmap
import os
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from ppo.envs.base import Environment, PreparingEnvironment, ResetRequest, get_suite
from ppo.envs.images import center_crop

ACTIVITIES = ("starting", "idle", "stepping", "resetting", "preparing", "closing")

NICENESS = 5
"""Where cores are few, the one thread of the engine goes before the many environments that wait for it."""


@dataclass(frozen=True)
class WorkerConfig:
    """What a process needs to know; sizes in pixels, `process_index` of `num_processes`."""

    suite_name: str
    env_ids: tuple[int, ...]
    num_envs: int
    process_index: int
    num_processes: int
    image_size: int
    max_steps: int | None
    parent_pid: int
    center_crop: bool = False
    env_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Command:
    """Step an environment, then reset it with `request` if its episode ended; without an action: reset it."""

    env_id: int
    action: np.ndarray | None
    request: ResetRequest | None


@dataclass(frozen=True)
class Outcome:
    """What came of a command; the images are in the shared memory."""

    env_id: int
    task_id: int
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    success: bool = False
    episode_return: float = 0.0
    episode_length: int = 0
    reset_used: bool = False
    dropped: bool = False


class SharedBoard:
    """Arrays that parent and children see alike.

    Attributes:
        images: (N, H, W, 3) uint8, the next observation of each environment.
        final_images: (N, H, W, 3) uint8, the last real observation of the episode that ended last.
        activity: (num_processes, 4) float64: index into ACTIVITIES, environment id, the episode's step number, since
            when (time.monotonic, s).
    """

    def __init__(self, fd: int, num_envs: int, image_size: int, num_processes: int) -> None:
        shape = (num_envs, image_size, image_size, 3)
        image_bytes, activity_bytes = int(np.prod(shape)), num_processes * 4 * 8
        size = activity_bytes + 2 * image_bytes
        if os.fstat(fd).st_size < size:
            os.ftruncate(fd, size)
        memory = mmap.mmap(fd, size)
        self.activity = np.frombuffer(memory, np.float64, num_processes * 4).reshape(
            num_processes, 4
        )
        pixels = np.frombuffer(memory, np.uint8, 2 * image_bytes, offset=activity_bytes)
        self.images = pixels[:image_bytes].reshape(shape)
        self.final_images = pixels[image_bytes:].reshape(shape)


@dataclass
class _Slot:
    """One environment, its running episode, and the request that will follow it as far as the parent has said."""

    env: Environment
    preparing: PreparingEnvironment | None  # the same, if it can
    request: ResetRequest | None = None
    next_request: ResetRequest | None = None
    episode_return: float = 0.0
    episode_length: int = 0


class _Worker:
    def __init__(self, config: WorkerConfig, memory_fd: int) -> None:
        self.config = config
        self.board = SharedBoard(
            memory_fd, config.num_envs, config.image_size, config.num_processes
        )
        self.slots: dict[int, _Slot] = {}

    def note(self, activity: str, env_id: int = -1) -> None:
        """Tell the parent what is about to be done, for its time-outs and its log."""
        length = self.slots[env_id].episode_length if env_id in self.slots else 0
        self.board.activity[self.config.process_index] = (
            ACTIVITIES.index(activity),
            env_id,
            length,
            time.monotonic(),
        )

    def make_environments(self) -> None:
        config = self.config
        suite = get_suite(config.suite_name)
        for env_id in config.env_ids:
            self.note("starting", env_id)
            env = suite.make_env(config.image_size, config.max_steps, **config.env_kwargs)
            self.slots[env_id] = _Slot(env, env if isinstance(env, PreparingEnvironment) else None)
        if "cv2" in sys.modules:
            sys.modules["cv2"].setNumThreads(1)
        self.note("idle")

    def execute(self, command: Command) -> Outcome:
        slot = self.slots[command.env_id]
        slot.next_request = command.request
        if command.action is None:
            assert command.request is not None
            self._reset(slot, command.env_id, command.request)
            return Outcome(command.env_id, command.request.task_id, reset_used=True)
        return self._step(slot, command)

    def _step(self, slot: _Slot, command: Command) -> Outcome:
        assert slot.request is not None and command.action is not None
        env_id = command.env_id
        self.note("stepping", env_id)
        result = slot.env.step(command.action)
        slot.episode_return += float(result.reward)
        slot.episode_length += 1
        outcome = Outcome(
            env_id,
            slot.request.task_id,
            float(result.reward),
            bool(result.terminated),
            bool(result.truncated and not result.terminated),
            bool(result.success),
            slot.episode_return,
            slot.episode_length,
            reset_used=bool(result.terminated or result.truncated) and command.request is not None,
        )
        self._put(self.board.images, env_id, result.image)
        if outcome.terminated or outcome.truncated:
            self._put(self.board.final_images, env_id, result.image)
        if outcome.reset_used:
            assert command.request is not None
            self._reset(slot, env_id, command.request)
        return outcome

    def _reset(self, slot: _Slot, env_id: int, request: ResetRequest) -> None:
        self.note("resetting", env_id)
        self._put(self.board.images, env_id, slot.env.reset(request))
        slot.request, slot.episode_return, slot.episode_length = request, 0.0, 0
        slot.next_request = None

    def prepare(self) -> bool:
        """Let one environment do a slice of work towards its next episode; whether any did."""
        for env_id, slot in self.slots.items():
            if slot.next_request is None or slot.preparing is None:
                continue
            self.note("preparing", env_id)
            if slot.preparing.prepare(slot.next_request):
                return True
        return False

    def _put(self, images: np.ndarray, env_id: int, image: np.ndarray) -> None:
        if image.shape != images.shape[1:] or image.dtype != np.uint8:
            raise ValueError(
                f"the environment returned a {image.dtype} image of shape {image.shape}: "
                f"{self.config.suite_name} was asked for uint8 {images.shape[1:]}"
            )
        images[env_id] = center_crop(image) if self.config.center_crop else image

    def close(self) -> None:
        for env_id, slot in self.slots.items():
            self.note("closing", env_id)
            with contextlib.suppress(
                Exception
            ):  # the process ends anyway, and frees what the simulator holds
                slot.env.close()

    def serve(self, connection: Connection) -> None:
        """Execute messages (lists of commands) until the parent closes the pipe; one reply per message.

        While no message waits the next episodes are prepared.
        """
        while True:
            while not connection.poll(0) and self.prepare():
                pass
            self.note("idle")
            try:
                commands = connection.recv()
            except (EOFError, ConnectionResetError):
                return
            outcomes = [self.execute(command) for command in commands]
            connection.send(("outcomes", outcomes))


def _exit_with_parent(parent_pid: int) -> None:
    """End this process when its parent is gone, even in the middle of a step that never returns."""

    def watch() -> None:
        while os.getppid() == parent_pid:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main(connection_fd: int, memory_fd: int) -> None:
    """Entry point of the process: reads its WorkerConfig from the pipe, then serves.

    An exception of an environment is sent as ("error", traceback) and ends the process: a simulator that raised is not
    trusted with another episode.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    os.nice(NICENESS)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)  # the parent asks where a process hangs
    connection = Connection(connection_fd)
    config: WorkerConfig = connection.recv()
    _exit_with_parent(config.parent_pid)
    worker = _Worker(config, memory_fd)
    try:
        worker.make_environments()
        connection.send(("ready", None))
        worker.serve(connection)
    except BrokenPipeError:
        pass  # the parent went away in between
    except Exception:
        with contextlib.suppress(OSError):
            connection.send(("error", traceback.format_exc()))
        os._exit(1)  # without the simulator's own clean-up, which may hang after a failure
    worker.close()
