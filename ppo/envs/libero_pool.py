"""The LIBERO simulators of a process, shared by its environments, and what draws them.

Composing a task's model takes seconds and 0.1 GiB, making it ready to be drawn 0.1 to 0.4 s and 0.5 GiB (with EGL 0.3,
of the GPU's memory; `ppo.envs.libero.memory_cost` has the measurements). A pool keeps both for the next episode of the
same task, whichever environment plays it; an episode does not depend on what its simulator did before. To be used from
one thread.
"""

import contextlib
import threading
from typing import ClassVar

import numpy as np

from ppo.envs.libero_simulator import Canvas, Drawing, Simulator

SIMULATORS_OF_ANOTHER = 3
"""Simulators by which a pool grows with each environment after the first: the running one, the next, and one more."""

Key = tuple[str, bool, tuple[int | None, bool] | None, int, int]


class SimulatorPool:
    """Simulators by task: those in use belong to whoever took them, the others wait here.

    A simulator that is not there is composed by a thread of this process (`begin`), so that the running episodes go
    on meanwhile, or at once (`take`). LIBERO samples from numpy's global generator while it composes: nobody resets a
    simulator meanwhile.
    """

    _shared: ClassVar[dict[Key, "SimulatorPool"]] = {}

    def __init__(self, key: Key) -> None:
        self._key = key
        self.suite, self.is_exact, drawing, self._max_simulators, self._max_canvases = key
        self._drawing = Drawing(*drawing) if drawing is not None else None
        self._num_members = 0
        self._waiting: list[Simulator] = []  # used longest ago first
        self._canvases: dict[int, Canvas] = {}  # by task, drawn longest ago first
        self._num_taken = 0
        self._thread: threading.Thread | None = None
        self._composed: Simulator | Exception | None = None

    @classmethod
    def join(
        cls,
        suite: str,
        is_exact: bool,
        drawing: tuple[int | None, bool] | None,
        max_simulators: int,
        max_canvases: int,
    ) -> "SimulatorPool":
        """The pool of the environments with these options, for one more; `leave` it in the end.

        Args:
            suite: LIBERO's name of the suite.
            is_exact: see `Simulator`.
            drawing: arguments of `Drawing`; None: nothing is drawn.
            max_simulators: kept for the first environment; see SIMULATORS_OF_ANOTHER.
            max_canvases: tasks ready to be drawn for the first environment, each further one adds one.
        """
        key = (suite, is_exact, drawing, max_simulators, max_canvases)
        pool = cls._shared.get(key) or cls(key)
        cls._shared[key] = pool
        pool._num_members += 1
        return pool

    def leave(self) -> None:
        """An environment, which has given back all that it took, needs the pool no more; the last one frees it."""
        self._num_members -= 1
        if self._num_members:
            self._make_room(0)
            return
        del self._shared[self._key]
        with contextlib.suppress(Exception):  # of a task that nobody asks for any more
            self._finish_composing()
        while self._waiting:
            self._waiting.pop().close()
        while self._canvases:
            self._free_canvas()
        if self._drawing is not None:
            self._drawing.close()

    def begin(self, task_id: int, wait_s: float) -> bool:
        """Whether a simulator of this task waits; if not, a thread composes one, and this is to be asked again."""
        if self._thread is not None:
            self._thread.join(wait_s)
            if self._thread.is_alive():
                return False
            self._finish_composing()
        if any(s.task_id == task_id for s in self._waiting):
            return True
        self._make_room(1)
        self._thread = threading.Thread(target=self._compose, args=(task_id,), daemon=True)
        self._thread.start()
        return False

    def _compose(self, task_id: int) -> None:
        try:
            self._composed = Simulator(self.suite, task_id, self.is_exact)
        except Exception as error:  # raised where the result is asked for
            self._composed = error

    def _finish_composing(self) -> None:
        if self._thread is None:
            return
        self._thread.join()
        self._thread, composed = None, self._composed
        self._composed = None
        if isinstance(composed, Exception):
            raise composed
        assert composed is not None
        self._waiting.append(composed)

    def take(self, task_id: int) -> Simulator:
        """A simulator of this task, for the caller alone."""
        self._finish_composing()
        found = next((s for s in reversed(self._waiting) if s.task_id == task_id), None)
        if found is not None:
            self._waiting.remove(found)
        else:
            self._make_room(1)
            found = Simulator(self.suite, task_id, self.is_exact)
        self._num_taken += 1
        return found

    def _make_room(self, count: int) -> None:
        """For `count` more simulators, as long as any waits that may go."""
        limit = self._max_simulators + (self._num_members - 1) * SIMULATORS_OF_ANOTHER
        while self._waiting and len(self._waiting) + self._num_taken + count > limit:
            self._waiting.pop(0).close()

    def give_back(self, simulator: Simulator) -> None:
        """Let a simulator wait for its next episode."""
        self._num_taken -= 1
        self._waiting.append(simulator)
        self._make_room(0)

    def canvas_of(self, simulator: Simulator) -> Canvas:
        """What draws this simulator's task, made if need be; the one drawn longest ago makes room for it."""
        assert self._drawing is not None
        canvas = self._canvases.pop(simulator.task_id, None)
        if canvas is None:
            while len(self._canvases) >= self._max_canvases + self._num_members - 1:
                self._free_canvas()
            canvas = Canvas(self._drawing, simulator.model)
        self._canvases[simulator.task_id] = canvas
        return canvas

    def _free_canvas(self) -> None:
        self._canvases.pop(next(iter(self._canvases))).close()

    def draw(self, simulator: Simulator, size: int, camera: str) -> np.ndarray:
        """A camera's view, (size, size, 3) uint8, see `Canvas.draw`."""
        return self.canvas_of(simulator).draw(simulator.model, simulator.data, size, camera)
