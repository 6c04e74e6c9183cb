"""How many processes the environments of an engine get: one per core, fewer where memory is short.

Environments of a process share simulators, so fewer processes need less memory; they step one after another, so more
processes than cores gain little. Arithmetic only: nothing is measured or started here.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

COMFORTABLE_SHARE = 0.8
"""Share of the available memory that the choice may fill: engine and trainer take main memory too."""
UNSHARED_PROCESSES = 2
"""Processes for environments that are so light that their number does not matter."""


@dataclass(frozen=True)
class MemoryCost:
    """Main memory of a process whose environments share simulators, in GiB.

    Attributes:
        process_gib: the process with its first simulator.
        simulator_gib: each further simulator.
        canvas_gib: each task that is ready to be drawn (0 where that takes a GPU's memory).
        max_simulators: simulators that a process keeps for its first environment.
        simulators_of_another: simulators by which that number grows with each further environment.
        max_canvases: tasks that are kept ready to be drawn for the first environment; each further one adds one.
        task_gib: each task after the first that a simulator is of: what the task's simulators share.
    """

    process_gib: float
    simulator_gib: float
    canvas_gib: float
    max_simulators: int
    simulators_of_another: int
    max_canvases: int
    task_gib: float = 0.0

    def least_gib(self, num_envs: int, num_tasks: int) -> float:
        """A process whose environments hold the simulators of their running and next episode, and no others."""
        return self._gib(2 * num_envs, num_tasks, min(num_envs, num_tasks))

    def most_gib(self, num_envs: int, num_tasks: int) -> float:
        """A process that keeps as many simulators as it may, as it does after some time."""
        others = num_envs - 1
        simulators = self.max_simulators + self.simulators_of_another * others
        canvases = min(self.max_canvases + others, num_tasks)
        return self._gib(min(simulators, 2 * num_envs * num_tasks), num_tasks, canvases)

    def _gib(self, simulators: int, num_tasks: int, canvases: int) -> float:
        further_gib = (simulators - 1) * self.simulator_gib
        further_gib += (min(simulators, num_tasks) - 1) * self.task_gib
        return self.process_gib + further_gib + canvases * self.canvas_gib


@dataclass(frozen=True)
class EnvSizes:
    """Number of processes, and of simulators that each keeps for its first environment (None: the suite's number)."""

    num_processes: int
    max_simulators: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """What make_env is to be given."""
        return {} if self.max_simulators is None else {"max_simulators": self.max_simulators}


def choose_sizes(
    num_envs: int,
    num_tasks: int,
    cores: int,
    memory_gib: float,
    cost: MemoryCost | None,
    num_processes: int | None = None,
) -> EnvSizes:
    """Processes and simulators for `num_envs` environments on `cores` cores with `memory_gib` of available memory.

    One process per core, fewer if they would outgrow COMFORTABLE_SHARE of the memory. A `num_processes` that is given
    stays. Where even so they would outgrow it, processes keep fewer simulators and compose them again when needed,
    which takes seconds each. `memory_problem` says what cannot work at all.
    """
    if cost is None:
        return EnvSizes(num_processes or min(num_envs, UNSHARED_PROCESSES))

    def fits(processes: int, max_simulators: int) -> bool:
        fewer = replace(cost, max_simulators=max_simulators)
        needed_gib = _total(num_envs, processes, lambda n: fewer.most_gib(n, num_tasks))
        return needed_gib <= COMFORTABLE_SHARE * memory_gib

    chosen = num_processes or balanced(num_envs, cores)
    while not num_processes and chosen > 1 and not fits(chosen, cost.max_simulators):
        chosen = balanced(num_envs, chosen - 1)
    for max_simulators in range(cost.max_simulators, 2, -1):
        if fits(chosen, max_simulators):
            is_usual = max_simulators == cost.max_simulators
            return EnvSizes(chosen, None if is_usual else max_simulators)
    return EnvSizes(chosen, 2)


def balanced(num_envs: int, most: int) -> int:
    """The smallest number of processes whose largest share of environments is as small as with `most` processes."""
    return math.ceil(num_envs / math.ceil(num_envs / most))


@dataclass(frozen=True)
class MemoryShortage:
    """Environments that cannot all start: the least memory that they need, and what would fit.

    num_processes: the most processes that fit, None if not even one does. num_envs: the most environments that fit in
    one process, possibly 0.
    """

    needed_gib: float
    num_processes: int | None
    num_envs: int


def memory_shortage(
    num_envs: int, num_processes: int, num_tasks: int, memory_gib: float, cost: MemoryCost | None
) -> MemoryShortage | None:
    """Why these environments cannot start in `memory_gib`; None if they can."""
    if cost is None:
        return None

    def least_gib(envs: int, processes: int) -> float:
        return _total(envs, processes, lambda n: cost.least_gib(n, num_tasks))

    needed_gib = least_gib(num_envs, num_processes)
    if needed_gib <= memory_gib:
        return None
    fewer_processes = range(num_processes - 1, 0, -1)
    return MemoryShortage(
        needed_gib,
        next((n for n in fewer_processes if least_gib(num_envs, n) <= memory_gib), None),
        next((n for n in range(num_envs, 0, -1) if least_gib(n, 1) <= memory_gib), 0),
    )


def _total(num_envs: int, num_processes: int, gib: Callable[[int], float]) -> float:
    """Sum over the processes of what their environments take, shared out as `ppo.envs.vector` does."""
    share, larger = divmod(num_envs, num_processes)
    return larger * gib(share + 1) + (num_processes - larger) * gib(share)
