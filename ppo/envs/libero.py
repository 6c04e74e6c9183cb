"""LIBERO behind `ppo.envs.base.Environment`: the suites libero_spatial, _object, _goal, _10 and _90.

An episode is decided by its ResetRequest: task, fixed initial state (or a random layout) and seed, whatever the
environment did before. Conventions are those of OpenVLA's evaluation: ten settling steps, agentview at 256 pixels
rotated by 180 degrees, a JPEG round trip, Lanczos-3 to the policy's size; success ends the episode, the suite's step
limit truncates it.

Composing a task's model takes seconds, so simulators are kept, and `prepare` makes the next episode ready in slices
while the process would wait for an action: a reset then costs nothing. H, W: image height and width in pixels.
"""

import functools
import os
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np

from ppo.envs import libero_install
from ppo.envs.base import (
    ResetRequest,
    StepResult,
    TaskSuite,
    check_request,
    checked_action,
    options_of_process,
)
from ppo.envs.images import policy_image
from ppo.envs.libero_install import visible_gpus
from ppo.envs.libero_pool import SIMULATORS_OF_ANOTHER, SimulatorPool
from ppo.envs.libero_simulator import RENDER_SIZE, SETTLING_ACTION, Simulator
from ppo.envs.libero_textures import can_share
from ppo.envs.sizing import MemoryCost

NUM_STEPS_WAIT = 10
AGENT_CAMERA, WRIST_CAMERA = "agentview", "robot0_eye_in_hand"
MAX_SIMULATORS, MAX_CANVASES = 12, 3
RenderQuality = Literal["eval", "fast"]


class LiberoEnv:
    """One LIBERO environment (see the module docstring).

    Args:
        suite_name: libero_spatial, libero_object, libero_goal, libero_10 or libero_90.
        image_size: side of the returned images in pixels.
        max_steps: time limit in steps after settling; None: the suite's.
        seed: added to every request's seed, so that runs can differ.
        num_steps_wait: settling steps after each reset, not counted in the limit.
        env_gpu_id: draw on this GPU with EGL (EGL's number); None: what MUJOCO_GL says, else osmesa.
        render_quality: `eval`: LIBERO's own drawing; `fast`: without multisampling and reflections.
        exact_physics: robosuite's own controller and redundant solver passes, so that states are LIBERO's bit for bit;
            without, a step takes a quarter of the time (drawing apart). None: with `eval` only.
        images: without: images are black and nothing is drawn (experts, tests).
        max_simulators: simulators kept, about 0.1 GiB each; the one unused longest goes first. Environments of a
            process with the same options share theirs, each further one adds `libero_pool.SIMULATORS_OF_ANOTHER`.
        max_canvases: tasks that are ready to be drawn, about 0.5 GiB each (with EGL 0.3, of the GPU's memory); each
            further environment of a process adds one.

    Raises:
        ValueError: numbers that cannot work.
        LiberoMissingError: LIBERO, its assets or a GL library is missing; says how to get it.
    """

    def __init__(
        self,
        suite_name: str,
        image_size: int,
        max_steps: int | None = None,
        seed: int = 0,
        *,
        num_steps_wait: int = NUM_STEPS_WAIT,
        env_gpu_id: int | None = None,
        render_quality: RenderQuality = "eval",
        exact_physics: bool | None = None,
        images: bool = True,
        max_simulators: int = MAX_SIMULATORS,
        max_canvases: int = MAX_CANVASES,
    ) -> None:
        if suite_name not in libero_install.SUITES:
            raise ValueError(
                f"{suite_name} is no suite of LIBERO: use one of {', '.join(libero_install.SUITES)}"
            )
        limits = {
            "image_size": (image_size, 16),
            "max_steps": (max_steps, 1),
            "num_steps_wait": (num_steps_wait, 0),
        }
        limits |= {"max_simulators": (max_simulators, 2), "max_canvases": (max_canvases, 1)}
        for name, (value, smallest) in limits.items():
            if value is not None and value < smallest:
                raise ValueError(f"{name} {value}: must be at least {smallest}")
        if render_quality not in ("eval", "fast"):
            raise ValueError(f"render_quality {render_quality!r}: use eval or fast")
        self.suite_name, self.image_size, self.seed = suite_name, image_size, seed
        self.max_steps = max_steps or libero_install.MAX_STEPS[suite_name]
        self.num_steps_wait = num_steps_wait
        self.num_tasks = len(libero_install.task_names(suite_name))
        libero_install.import_libero()
        self._has_images = images
        is_exact = render_quality == "eval" if exact_physics is None else exact_physics
        drawing = (env_gpu_id, render_quality == "fast") if images else None
        self._pool: SimulatorPool | None = SimulatorPool.join(
            suite_name, is_exact, drawing, max_simulators, max_canvases
        )
        self._running: Simulator | None = None
        self._next: _Preparation | None = None
        self._num_steps = 0

    @property
    def simulator(self) -> Simulator:
        """The running episode's simulator."""
        assert self._running is not None, "reset the environment first"
        return self._running

    @property
    def pool(self) -> SimulatorPool:
        """Where its simulators come from."""
        assert self._pool is not None, "the environment is closed"
        return self._pool

    @property
    def domain(self) -> object:
        """LIBERO's own environment object (BDDLBaseDomain) of the running episode, for experts and tests."""
        return self.simulator.domain

    def reset(self, request: ResetRequest) -> np.ndarray:
        """Start an episode and return its first image, (H, W, 3) uint8; at once if `prepare` has finished with it.

        Raises:
            ValueError: unknown task or initial state.
            RuntimeError: the task cannot be made.
        """
        self._check(request)
        if self._running is not None:
            self.pool.give_back(self._running)
            self._running = None
        if self._next is None or self._next.request != request:
            self._give_up_preparation()
            self._next = _Preparation(self, request, in_background=False)
        preparation, self._next = self._next, None
        self._running, image = preparation.finish()
        self._num_steps = 0
        return image

    def prepare(self, request: ResetRequest) -> bool:
        """Do a bounded piece of work (a settling step, about 5 ms) towards `reset(request)`.

        Returns whether more remains to be done. Another request gives up what was prepared. The running episode is
        not touched.
        """
        if self._next is None or self._next.request != request:
            self._check(request)
            self._give_up_preparation()
            self._next = _Preparation(self, request, in_background=True)
        return self._next.advance()

    def step(self, action: np.ndarray) -> StepResult:
        """Apply one raw action, (7,): deltas in [-1, 1], gripper -1 open, +1 close.

        Raises:
            ValueError: an action of another shape, or not finite.
        """
        success = self.simulator.step(checked_action(action))
        self._num_steps += 1
        truncated = self._num_steps >= self.max_steps and not success
        return StepResult(self.observe(self.simulator), float(success), success, truncated, success)

    def observe(self, simulator: Simulator) -> np.ndarray:
        """What the policy sees, (image_size, image_size, 3) uint8."""
        if not self._has_images:
            return np.zeros((self.image_size, self.image_size, 3), dtype=np.uint8)
        return policy_image(self._draw(simulator, RENDER_SIZE, AGENT_CAMERA), self.image_size)

    def render(self, size: int, camera: str = AGENT_CAMERA) -> np.ndarray:
        """The camera's view, upright, (size, size, 3) uint8: neither compressed nor resized."""
        if not self._has_images:
            return np.zeros((size, size, 3), dtype=np.uint8)
        return self._draw(self.simulator, size, camera)

    def _draw(self, simulator: Simulator, size: int, camera: str) -> np.ndarray:
        # OpenGL gives the bottom row first. LIBERO keeps that and OpenVLA turns it by 180 degrees: upright, mirrored.
        return np.ascontiguousarray(self.pool.draw(simulator, size, camera)[::-1, ::-1])

    def proprioception(self) -> tuple[np.ndarray, np.ndarray]:
        """State (8,) and joint angles (7,), float32, as `modified_libero_rlds` stores them."""
        return self.simulator.proprioception()

    def close(self) -> None:
        """Release simulators and drawing. A second call does nothing."""
        if self._pool is None:
            return
        self._give_up_preparation()
        if self._running is not None:
            self._pool.give_back(self._running)
            self._running = None
        self._pool.leave()
        self._pool = None

    def _check(self, request: ResetRequest) -> None:
        check_request(request, self.suite_name, self.num_tasks, libero_install.NUM_INIT_STATES)

    def _give_up_preparation(self) -> None:
        if self._next is not None:
            self._next.give_up()
            self._next = None


class _Preparation:
    """The start of one episode, done slice by slice on a simulator of its own."""

    def __init__(self, env: LiberoEnv, request: ResetRequest, in_background: bool) -> None:
        self.request, self._env = request, env
        self._in_background = in_background
        self._simulator: Simulator | None = None
        self._image: np.ndarray | None = None
        self._slices = self._run()

    def _run(self) -> Iterator[None]:
        env, request, pool = self._env, self.request, self._env.pool
        while self._in_background and not pool.begin(request.task_id, wait_s=0.01):
            yield
        simulator = self._simulator = pool.take(request.task_id)
        simulator.reset(request.seed + env.seed, request.init_state_id)
        for _ in range(env.num_steps_wait):
            yield
            simulator.step(SETTLING_ACTION)
        if env._has_images:
            yield
            pool.canvas_of(simulator)
            yield
        self._image = env.observe(simulator)

    def advance(self) -> bool:
        """Do one slice; whether more remain."""
        return next(self._slices, self) is None

    def finish(self) -> tuple[Simulator, np.ndarray]:
        """Do the rest; the simulator now belongs to the caller."""
        self._in_background = False
        for _ in self._slices:
            pass
        simulator, image = self._simulator, self._image
        assert simulator is not None and image is not None
        self._simulator = None
        return simulator, image

    def give_up(self) -> None:
        """Return the simulator to the pool."""
        self._slices.close()  # type: ignore[attr-defined]
        if self._simulator is not None:
            self._env.pool.give_back(self._simulator)
            self._simulator = None


def training_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options for training where the caller has not said otherwise: quick physics, and quick drawing on a CPU.

    On a GPU LIBERO's own drawing costs little, and the policy sees what it will be evaluated on; its memory is for
    the running and the prepared episode of many environments, beside an engine and a trainer.
    """
    drawn_by_cpu = libero_install.choose_gl(given.get("env_gpu_id")) == "osmesa"
    drawing = (
        {"render_quality": "fast"}
        if drawn_by_cpu
        else {"render_quality": "eval", "max_canvases": 2}
    )
    return {"exact_physics": False, **drawing, **given}


def memory_cost(suite_name: str, options: Mapping[str, Any]) -> MemoryCost:
    """Main memory of a suite's environments; with EGL their canvases take a GPU's memory instead.

    Measured on 2026-11-28 with LIBERO's own assets: imports 0.16 GiB, the first simulator 0.75 to 0.9, textures of a
    task 0.03 to 0.29, on average 0.14 (the tasks of libero_spatial and libero_goal all have the same), a further
    simulator 0.08 to 0.14, a canvas 0.53. 18 simulators of libero_spatial took 2.8 GiB after 70 episodes; here they
    count 3.7, for memory fragments in the long run. Without shared textures a simulator takes 0.27.
    """
    is_shared, has_one_scene = can_share(), suite_name in ("libero_spatial", "libero_goal")
    is_drawn_by_gpu = (
        options.get("env_gpu_id") is not None
        or os.environ.get("MUJOCO_GL", "").lower().strip() == "egl"
    )
    return MemoryCost(
        process_gib=1.2,
        simulator_gib=0.15 if is_shared else 0.32,
        canvas_gib=0.0 if is_drawn_by_gpu or not options.get("images", True) else 0.53,
        max_simulators=options.get("max_simulators", MAX_SIMULATORS),
        simulators_of_another=SIMULATORS_OF_ANOTHER,
        max_canvases=options.get("max_canvases", MAX_CANVASES),
        task_gib=0.15 if is_shared and not has_one_scene else 0.0,
    )


def process_options(options: Mapping[str, Any], turn: int) -> dict[str, Any]:
    """Options of one process; without `env_gpu_id`, EGL draws on the GPUs that this process may use, in turns.

    Those are the GPUs in CUDA_VISIBLE_DEVICES: in a rollout worker the GPU of its engine. A MUJOCO_EGL_DEVICE_ID
    that the user has set wins.
    """
    is_open = options.get("env_gpu_id") is None and "MUJOCO_EGL_DEVICE_ID" not in os.environ
    if is_open and libero_install.choose_gl(None) == "egl" and (gpus := visible_gpus()):
        options = {**options, "env_gpu_id": gpus}
    return options_of_process(options, turn)


def _find_problems(
    env_gpu_id: tuple[int, ...] | int | None = None, images: bool = True, **_options: object
) -> list[str]:
    first = env_gpu_id[0] if isinstance(env_gpu_id, tuple) else env_gpu_id
    return libero_install.find_problems(first) if images else []


@functools.cache
def _suite(name: str) -> TaskSuite:
    return TaskSuite(
        name=name,
        instructions=tuple(
            libero_install.instruction(task) for task in libero_install.task_names(name)
        ),
        max_steps=libero_install.MAX_STEPS[name],
        num_init_states=libero_install.NUM_INIT_STATES,
        make_env=functools.partial(LiberoEnv, name),
        find_problems=_find_problems,
        process_options=process_options,
        memory_cost=functools.partial(memory_cost, name),
        training_options=training_options,
        remarks=libero_install.asset_remarks,
    )


def __getattr__(name: str) -> TaskSuite:
    """LIBERO_SPATIAL and its siblings, whose instructions are read from the package when they are asked for."""
    if name.lower() in libero_install.SUITES and name.isupper():
        return _suite(name.lower())
    raise AttributeError(f"module {__name__} has no attribute {name}")
