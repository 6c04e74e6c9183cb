"""What a simulated world must offer: the environment protocol, task suites and their registry.

An environment lives in one process, is stepped by one caller and knows its own time limit. Slow resets are
allowed (LIBERO: seconds); `ppo.envs.vector` hides them and survives an environment that dies or hangs.
Shapes: H, W image height and width in pixels.
"""

import importlib
import inspect
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ppo.envs.sizing import MemoryCost

ACTION_DIM = 7

_LIBERO = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")

# Suite name -> "module:attribute" of its TaskSuite, imported only when asked for: a world's simulator may be absent.
_SUITES: dict[str, str] = {
    "tabletop": "ppo.envs.tabletop:SUITE",
    **{name: f"ppo.envs.libero:{name.upper()}" for name in _LIBERO},
}


@dataclass(frozen=True)
class ResetRequest:
    """Which episode to start: everything that decides its first state.

    Attributes:
        task_id: index into the suite's instructions.
        init_state_id: which of the suite's fixed initial states, or None for a random layout drawn from `seed`.
        seed: decides whatever is random in the episode (layout without an init_state_id, actuation noise).
    """

    task_id: int
    init_state_id: int | None
    seed: int


@dataclass
class StepResult:
    """What one step returns.

    Attributes:
        image: (H, W, 3) uint8, upright, after the step.
        reward: reward of this step.
        terminated: the episode reached an end of the task's own (success, or a failure that cannot be undone).
        truncated: the time limit ended the episode; the state is not terminal. Never both.
        success: the task is solved (at this step).
    """

    image: np.ndarray
    reward: float
    terminated: bool
    truncated: bool
    success: bool


@runtime_checkable
class Environment(Protocol):
    """One simulated robot. After `terminated` or `truncated` only `reset` may follow."""

    def reset(self, request: ResetRequest) -> np.ndarray:
        """Start the requested episode and return its first image, (H, W, 3) uint8."""
        ...

    def step(self, action: np.ndarray) -> StepResult:
        """Apply one action, (7,) float32 in LIBERO's raw convention (gripper -1 opens, +1 closes)."""
        ...

    def render(self, size: int) -> np.ndarray:
        """Draw the present state, (size, size, 3) uint8, without changing it."""
        ...

    def close(self) -> None:
        """Release the simulator. A second call does nothing."""
        ...


@runtime_checkable
class PreparingEnvironment(Environment, Protocol):
    """An environment whose resets are slow, so that it makes the next episode ready beside the running one."""

    def prepare(self, request: ResetRequest) -> bool:
        """Do a short piece of work towards `reset(request)`; whether more remains. The running episode is not touched.

        It is called while nobody waits for the environment, and must change nothing of what `reset` returns.
        """
        ...


def options_of_process(options: Mapping[str, Any], turn: int) -> dict[str, Any]:
    """The options of one process: if `env_gpu_id` is a tuple of several GPUs, processes take turns on them."""
    gpus = options.get("env_gpu_id")
    if not isinstance(gpus, tuple):
        return dict(options)
    return {**options, "env_gpu_id": gpus[turn % len(gpus)]}


@dataclass(frozen=True)
class TaskSuite:
    """A set of language tasks of one world.

    Attributes:
        name: as given to `--task_suite_name`.
        instructions: one per task, in task id order.
        max_steps: default time limit in environment steps.
        num_init_states: fixed initial states per task, for evaluation.
        make_env: `(image_size, max_steps=None, seed=0, **options) -> Environment`; image_size in pixels (square).
        find_problems: `(**options) -> list[str]`: what keeps make_env from working on this machine, told before
            anything starts (a missing simulator, library or file).
        process_options: `(options, turn) -> options`: make_env's options for the environments of one process, the
            `turn`-th of those that share the GPUs; see `options_of_process`.
        memory_cost: `(options) -> MemoryCost` of environments made with these options of make_env, where they are so
            large or slow that they get one process per core, memory permitting; None: they are light.
        training_options: `(options) -> options`: completes make_env's options for training, where looks and exactness
            may give way to speed.
        remarks: `() -> list[str]`: what must be said beside every success rate measured on this machine.
    """

    name: str
    instructions: tuple[str, ...]
    max_steps: int
    num_init_states: int
    make_env: Callable[..., Environment]
    find_problems: Callable[..., list[str]] = lambda **options: []
    process_options: Callable[[Mapping[str, Any], int], dict[str, Any]] = options_of_process
    memory_cost: Callable[[Mapping[str, Any]], MemoryCost | None] = lambda options: None
    training_options: Callable[[Mapping[str, Any]], dict[str, Any]] = dict
    remarks: Callable[[], list[str]] = lambda: []

    @property
    def num_tasks(self) -> int:
        """Number of tasks."""
        return len(self.instructions)

    @property
    def options(self) -> frozenset[str]:
        """Names of the keyword arguments that make_env takes besides image_size, max_steps and seed."""
        parameters = inspect.signature(self.make_env).parameters
        return frozenset(parameters) - {"image_size", "max_steps", "seed"}


def checked_action(action: np.ndarray) -> np.ndarray:
    """The action as (7,) float32. Raises ValueError for another shape or numbers that are not finite."""
    action = np.asarray(action, dtype=np.float32)
    if action.shape != (ACTION_DIM,) or not np.isfinite(action).all():
        raise ValueError(f"action {action}: must be {ACTION_DIM} finite numbers")
    return action


def check_request(request: ResetRequest, world: str, num_tasks: int, num_init_states: int) -> None:
    """Raise ValueError for a task or a fixed initial state that `world` (a name for the message) does not have."""
    if not 0 <= request.task_id < num_tasks:
        raise ValueError(f"task_id {request.task_id}: {world} has tasks 0..{num_tasks - 1}")
    state_id = request.init_state_id
    if state_id is not None and not 0 <= state_id < num_init_states:
        raise ValueError(f"init_state_id {state_id}: {world} has states 0..{num_init_states - 1}")


def split_options(suite: TaskSuite, **flags: Any) -> tuple[dict[str, Any], list[str]]:
    """Which of the flags that were given (not None) the suite's environments take, and a problem for each other one."""
    given = {name: value for name, value in flags.items() if value is not None}
    taken = {name: value for name, value in given.items() if name in suite.options}
    return taken, [
        f"--{name} {given[name]}: {suite.name} has no such option"
        for name in given.keys() - taken.keys()
    ]


def known_suites() -> tuple[str, ...]:
    """Names that `get_suite` accepts, besides `package.module:ATTRIBUTE` of a world of one's own."""
    return tuple(sorted(_SUITES))


def get_suite(name: str) -> TaskSuite:
    """Return the task suite of that name, importing its world only now.

    Args:
        name: one of `known_suites()`, or `package.module:ATTRIBUTE` naming a TaskSuite anywhere on the path.

    Raises:
        ValueError: unknown name (lists the known ones), a module that cannot be imported (with its own error), or the
            attribute is not a TaskSuite.
    """
    target = _SUITES.get(name, name)
    module_name, colon, attribute = target.partition(":")
    if not colon:
        raise ValueError(
            f"unknown task suite {name[:80]!r}: use one of {', '.join(known_suites())}, "
            "or package.module:ATTRIBUTE for a suite of your own"
        )
    if not all(map(str.isidentifier, [*module_name.split("."), attribute])):
        raise ValueError(
            f"task suite {name[:80]!r} is not of the form package.module:ATTRIBUTE with Python's names"
        )
    suite = getattr(_import_module(name, module_name), attribute, None)
    if not isinstance(suite, TaskSuite):
        raise ValueError(f"task suite {name!r}: {target} is not a TaskSuite")
    return suite


def _import_module(suite: str, module_name: str) -> ModuleType:
    """Import the module of a suite. Raises ValueError with the module's own error and where it is raised.

    A module of a user's may raise anything when it is imported, SystemExit too, hence the broad except.
    """
    try:
        return importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        frames = [
            f for f in traceback.extract_tb(error.__traceback__) if "importlib" not in f.filename
        ]
        place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames[1:] else ""
        raise ValueError(
            f"task suite {suite!r}: importing {module_name} raises {type(error).__name__}: {error}{place}"
        ) from error
