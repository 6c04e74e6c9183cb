"""One LIBERO task in MuJoCo, stepped and drawn with little overhead; `ppo.envs.libero` makes an environment of it.

The physics, the object placement and the goal are LIBERO's and robosuite's own, and so is the arm's control law
(`ppo.envs.libero_arm`). Around them less is done than `OffScreenRenderEnv` does at each step: no observables (which
draw two cameras), no look-ups by name, one pair of Jacobians a physics step instead of two, and an image only when one
is asked for.
"""

import ctypes
import functools
import os
from typing import Any, ClassVar

import numpy as np

from ppo.envs import libero_install
from ppo.envs.libero_arm import Arm, QuickArm
from ppo.envs.libero_textures import share_textures

with libero_install.mujoco_without_gl():
    import mujoco

RENDER_SIZE = 256
"""Pixels, LIBERO's and OpenVLA's."""
SETTLING_ACTION = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0], dtype=np.float32)
_VISUAL_GROUP, _COLLISION_GROUP = 1, 0
_POSE_AND_VELOCITY = int(mujoco.mjtStage.mjSTAGE_VEL)


class Drawing:
    """What draws for a pool of simulators: a GL library and a context of it.

    Args:
        env_gpu_id: GPU to draw on (EGL's number); None: see `libero_install.choose_gl`.
        is_fast: without multisampling and reflections: a third of the time on a CPU, mean change about 2 of 255.

    Raises:
        LiberoMissingError: a system library is missing.
        RuntimeError: no context can be made, e.g. of a GPU that is not there.
    """

    _current: ClassVar["Drawing | None"] = None

    def __init__(self, env_gpu_id: int | None, is_fast: bool) -> None:
        self.backend = libero_install.choose_gl(env_gpu_id)
        self.is_fast = is_fast
        module = libero_install.load_gl(self.backend)
        if env_gpu_id is not None:  # read when the process makes its first context
            os.environ["MUJOCO_EGL_DEVICE_ID"] = str(env_gpu_id)
        try:
            self._gl = module.GLContext(640, 480)
            self.use()
        except Exception as error:  # mujoco and PyOpenGL raise whatever comes up
            raise RuntimeError(
                f"MUJOCO_GL={self.backend}, GPU {env_gpu_id}: no drawing context ({error!r}); "
                "see docs/TROUBLESHOOTING.md"
            ) from error

    def use(self) -> None:
        """Make its context the one that GL's calls are for: another environment of this process may have drawn."""
        if Drawing._current is not self:
            self._gl.make_current()
            Drawing._current = self

    def close(self) -> None:
        """Release the context; no drawing may follow."""
        if Drawing._current is self:
            Drawing._current = None
        self._gl.free()


class Canvas:
    """A task's geometry and textures in a `Drawing`, ready to draw each of its simulators.

    Holds about 0.5 GiB of main memory, with EGL 0.3 GiB of the GPU's.
    """

    def __init__(self, drawing: Drawing, model: mujoco.MjModel) -> None:
        self.drawing = drawing
        drawing.use()
        samples = model.vis.quality.offsamples
        if drawing.is_fast:
            model.vis.quality.offsamples = 0
        self.context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_150)
        model.vis.quality.offsamples = samples
        self.scene = mujoco.MjvScene(model, maxgeom=1000)
        if drawing.is_fast:
            self.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        self.option = mujoco.MjvOption()
        self.option.geomgroup[_COLLISION_GROUP], self.option.geomgroup[_VISUAL_GROUP] = 0, 1
        self.perturbation = mujoco.MjvPerturb()
        self.camera = mujoco.MjvCamera()
        self.camera.type = mujoco.mjtCamera.mjCAMERA_FIXED

    def draw(
        self, model: mujoco.MjModel, data: mujoco.MjData, size: int, camera: str
    ) -> np.ndarray:
        """(size, size, 3) uint8 as OpenGL has it: bottom row first. Raises ValueError for an unknown camera."""
        camera_id = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, camera)
        largest = min(self.context.offWidth, self.context.offHeight)
        if camera_id < 0 or not 1 <= size <= largest:
            raise ValueError(
                f"camera {camera!r} at {size} pixels: use a camera of the model and 1 to {largest} pixels"
            )
        self.drawing.use()
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self.context)
        self.camera.fixedcamid = camera_id
        everything = mujoco.mjtCatBit.mjCAT_ALL
        mujoco.mjv_updateScene(
            model, data, self.option, self.perturbation, self.camera, everything, self.scene
        )  # fmt: skip
        viewport = mujoco.MjrRect(0, 0, size, size)
        mujoco.mjr_render(viewport, self.scene, self.context)
        image = np.empty((size, size, 3), dtype=np.uint8)
        mujoco.mjr_readPixels(image, None, viewport, self.context)
        return image

    def close(self) -> None:
        """Free the GL memory."""
        self.drawing.use()
        self.context.free()


@functools.cache
def _remembering(domain_class: type) -> type:
    """A class of LIBERO's domains whose soft reset begins, like its hard one, from the model as it was compiled."""

    def initialize_sim(self: Any, xml_string: str | None = None) -> None:
        domain_class._initialize_sim(self, xml_string)  # type: ignore[attr-defined]
        model, data = self.sim.model._model, self.sim.data._data
        changed = ("body_pos", "body_quat", "site_rgba", "geom_rgba")
        self.compiled = {name: getattr(model, name).copy() for name in changed}

        def reset_as_compiled() -> None:
            # The last layout's fixtures would decide where objects on and in them are placed.
            for name, values in self.compiled.items():
                getattr(model, name)[:] = values
            mujoco.mj_resetData(model, data)
            mujoco.mj_forward(
                model, data
            )  # as after compilation: the solver starts from its result

        self.sim.reset = reset_as_compiled

    # LIBERO compares the class's name with the task file's.
    return type(domain_class.__name__, (domain_class,), {"_initialize_sim": initialize_sim})


def _trim_heap() -> None:
    """Give the system the pages that composing has used and freed (230 MB, in 25 ms): glibc would keep them."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # another C library has none
    if trim is not None:
        trim(0)


class Simulator:
    """One task of a suite in MuJoCo.

    Making one takes seconds (robosuite composes and compiles the model), a reset 40 ms. The first reset gives the same
    state as every later one: all that a reset leaves behind is set again.

    Args:
        suite: LIBERO's name of the suite.
        task_id: task in it.
        is_exact: robosuite's own controller and redundant passes of the solver, so that states equal those of LIBERO's
            own environment bit for bit; without them a step takes a quarter of the time and differs by rounding (1e-9,
            which contacts then enlarge), and the wrist's force sensors read nothing.

    Attributes:
        domain: LIBERO's environment object.

    Raises:
        RuntimeError: the task cannot be made (an asset is missing, ...); names it.
    """

    def __init__(self, suite: str, task_id: int, is_exact: bool) -> None:
        self.suite, self.task_id, self.is_exact = suite, task_id, is_exact
        libero = libero_install.import_libero()
        from robosuite import load_controller_config

        file = libero_install.bddl_file(suite, task_id)
        try:
            problem = libero.bddl_base_domain.BDDLUtils.get_problem_info(str(file))["problem_name"]
            self.domain = _remembering(libero.TASK_MAPPING[problem])(
                str(file), robots=["Panda"], controller_configs=load_controller_config(default_controller="OSC_POSE"),
                gripper_types="default", initialization_noise=None, use_camera_obs=False, has_renderer=False,
                has_offscreen_renderer=False, control_freq=20, ignore_done=True, hard_reset=False,
            )  # fmt: skip
        except Exception as error:
            raise RuntimeError(f"{self.name} cannot be made: {error}") from error
        self.domain._observables = {}
        self.model, self.data = self.domain.sim.model._model, self.domain.sim.data._data
        if (
            not is_exact
        ):  # the wrist's force sensors, which nobody reads, cost a pass over all bodies
            self.model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_SENSOR
        self._textures = share_textures(self.model)
        _trim_heap()

    def close(self) -> None:
        """Free its memory at once (10 ms); it cannot be used any more. Models and data that others hold stay valid.

        robosuite's objects refer to each other in circles, which would wait for Python's collector: its full runs are
        rare, for it counts few small objects where a model has 100 MB.
        """
        vars(self.domain).clear()
        for name in ("domain", "model", "data", "_arm", "_textures"):
            vars(self).pop(name, None)

    @property
    def name(self) -> str:
        """Suite, task and instruction, for messages."""
        text = libero_install.instruction(libero_install.task_names(self.suite)[self.task_id])
        return f"{self.suite} task {self.task_id} ({text!r})"

    def reset(self, seed: int, init_state_id: int | None) -> None:
        """Begin an episode: a layout drawn from `seed` (fixtures too), then a fixed state where one is named.

        Sets numpy's global generator, which LIBERO samples from.
        """
        domain = self.domain
        np.random.seed(seed % 2**32)
        for _ in range(100):
            try:
                domain.reset()
                break
            except libero_install.placement_error():
                continue
        else:
            raise RuntimeError(f"{self.name}: no placement of its objects found for seed {seed}")
        robot = domain.robots[0]
        robot.gripper.current_action = np.zeros(robot.gripper.dof)  # the ramp of the last episode
        if init_state_id is not None:
            states = libero_install.load_init_states(self.suite, self.task_id)
            domain.sim.set_state_from_flattened(states[init_state_id])
            domain.sim.forward()
        domain._check_success()
        domain._post_process()
        self._arm = (Arm if self.is_exact else QuickArm)(domain, self.model, self.data)

    def step(self, action: np.ndarray) -> bool:
        """One control step (0.05 s, 25 physics steps) with LIBERO's raw action (7,); returns whether the goal holds."""
        domain, arm, model, data = self.domain, self._arm, self.model, self.data
        action = np.asarray(action, dtype=np.float64)
        domain.timestep += 1
        for substep in range(arm.num_substeps):
            if (
                self.is_exact
            ):  # robosuite: forward, forward, control, step; what depends on the pose alone once
                mujoco.mj_forward(model, data)
                mujoco.mj_forwardSkip(model, data, _POSE_AND_VELOCITY, 1)
            else:
                mujoco.mj_step1(model, data)
            arm.control(action, is_first=substep == 0)
            mujoco.mj_step2(model, data)
        domain.cur_time += domain.control_timestep
        is_solved = bool(domain._check_success())
        domain._post_process()
        return is_solved

    def proprioception(self) -> tuple[np.ndarray, np.ndarray]:
        """State (8,) float32: end effector position, axis-angle, finger joints; and arm joints (7,) float32."""
        from robosuite.utils import transform_utils

        robot, data = self.domain.robots[0], self.data
        quaternion_wxyz = self.domain.sim.data.get_body_xquat(robot.robot_model.eef_name)
        rotation = transform_utils.quat2axisangle(
            transform_utils.convert_quat(quaternion_wxyz, to="xyzw")
        )
        fingers = data.qpos[robot._ref_gripper_joint_pos_indexes]
        state = np.concatenate([data.site_xpos[robot.eef_site_id], rotation, fingers])
        return state.astype(np.float32), data.qpos[robot._ref_joint_pos_indexes].astype(np.float32)
