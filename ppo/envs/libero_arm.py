"""The arm and gripper of one LIBERO episode: robosuite's controller, and the same control law compiled for training.

robosuite's OSC_POSE is operational-space control (Khatib 1987, https://doi.org/10.1109/JRA.1987.1087068). With the end
effector's Jacobian J (6, 7), the arm's mass matrix M (7, 7), the bias forces h and the inertia L(J) = (J M^-1 J^T)^-1:

    torques = J^T [L(J_pos) f; L(J_ori) t] + N^T M a + h        f, t = kp error - kd velocity
    N^T     = 1 - J^T L(J) J M^-1                                a   = 10 (q_reset - q) - 2 sqrt(10) qvel

`Arm` calls robosuite's code 25 times a control step, which takes as long as the physics. `QuickArm` evaluates the same
law in one compiled function, without an inverse of M (N^T M a = M a - J^T L(J) J a) and with Cholesky factors in place
of inverses and pseudo-inverses. It differs from robosuite by rounding.
"""

from typing import NamedTuple

import numba
import numpy as np

from ppo.envs import libero_install

with libero_install.mujoco_without_gl():
    import mujoco

NULLSPACE_KP = 10.0
NULLSPACE_KD = 2.0 * np.sqrt(NULLSPACE_KP)
"""Of robosuite's `nullspace_torques`, 1/s^2 and 1/s: they draw the joints to where the reset put them."""
SMALLEST_PIVOT = 1e-13
"""Of a factorization, relative to the diagonal: what is below is rounding."""


class Arm:
    """robosuite's operational-space controller and gripper of one episode, with every index looked up once.

    Args:
        domain: LIBERO's environment object, just reset.
        model: its model.
        data: its data.
    """

    def __init__(self, domain: object, model: mujoco.MjModel, data: mujoco.MjData) -> None:
        sim, robot = domain.sim, domain.robots[0]  # type: ignore[attr-defined]
        self.model, self.data, self.robot = model, data, robot
        self.controller = robot.controller
        self.num_substeps = int(domain.control_timestep / domain.model_timestep)  # type: ignore[attr-defined]
        self.site_id = sim.model.site_name2id(self.controller.eef_name)
        self.qpos_index, self.qvel_index = self.controller.qpos_index, self.controller.qvel_index
        self.jacobian_p, self.jacobian_r = np.zeros((3, model.nv)), np.zeros((3, model.nv))
        self.mass = np.zeros((model.nv, model.nv))
        self.joint_actuators = robot._ref_joint_actuator_indexes
        self.torque_low, self.torque_high = robot.torque_limits
        self.gripper_actuators = [
            sim.model.actuator_name2id(name) for name in robot.gripper.actuators
        ]
        ctrl_range = model.actuator_ctrlrange[self.gripper_actuators]
        self.gripper_bias = 0.5 * (ctrl_range[:, 1] + ctrl_range[:, 0])
        self.gripper_weight = 0.5 * (ctrl_range[:, 1] - ctrl_range[:, 0])

    def control(self, action: np.ndarray, is_first: bool) -> None:
        """Set the actuators for the next physics step; positions and velocities must be evaluated (mj_step1).

        Args:
            action: LIBERO's raw action (7,), float64.
            is_first: whether the control step begins: the goal is set, relative to the present pose.
        """
        if (
            self.controller.new_update
        ):  # not at an episode's first call: as in robosuite, it sees the reset's pose
            self._observe()
        if is_first:
            self.controller.set_goal(action[:6])
        torques = np.clip(self.controller.run_controller(), self.torque_low, self.torque_high)
        fingers = self.robot.gripper.format_action(action[6:])
        self.data.ctrl[self.gripper_actuators] = self.gripper_bias + self.gripper_weight * fingers
        self.data.ctrl[self.joint_actuators] = torques

    def _observe(self) -> None:
        """What `Controller.update` reads, without its solver pass and with each Jacobian computed once."""
        controller, data, model = self.controller, self.data, self.model
        mujoco.mj_jacSite(model, data, self.jacobian_p, self.jacobian_r, self.site_id)
        controller.ee_pos = data.site_xpos[self.site_id].copy()
        controller.ee_ori_mat = data.site_xmat[self.site_id].reshape(3, 3).copy()
        controller.ee_pos_vel = self.jacobian_p @ data.qvel
        controller.ee_ori_vel = self.jacobian_r @ data.qvel
        controller.joint_pos = data.qpos[self.qpos_index]
        controller.joint_vel = data.qvel[self.qvel_index]
        controller.J_pos = np.array(self.jacobian_p[:, self.qvel_index])
        controller.J_ori = np.array(self.jacobian_r[:, self.qvel_index])
        controller.J_full = np.vstack([controller.J_pos, controller.J_ori])
        mujoco.mj_fullM(model, self.mass, data.qM)
        controller.mass_matrix = self.mass[self.qvel_index, :][
            :, self.qvel_index
        ]  # its memory order decides rounding
        controller.new_update = False


class QuickArm(Arm):
    """The same arm in compiled code; its torques differ from `Arm`'s by rounding, typically 1e-14 of the largest.

    robosuite still runs the first physics step of an episode, where it acts on the pose before the initial state was
    set, and sets the goals, so that they are equal bit for bit.

    Singular poses: robosuite's pseudo-inverses drop singular values below 1e-15 of the largest. Here a pivot below
    1e-13 of its diagonal drops that coordinate of the Cartesian force (x before y before z, forces and moments apart)
    instead of the singular direction; both are finite, and the nullspace's torques are the same. In between torques
    grow with the inverse of the pivot until the actuators' limits clip them, as robosuite's do.
    """

    def __init__(self, domain: object, model: mujoco.MjModel, data: mujoco.MjData) -> None:
        super().__init__(domain, model, data)
        controller, gripper = self.controller, self.robot.gripper
        fixed_gains = controller.impedance_mode == "fixed" and controller.uncoupling
        no_interpolator = (
            controller.interpolator_pos is None and controller.interpolator_ori is None
        )
        assert controller.name == "OSC_POSE" and fixed_gains and no_interpolator
        self._has_begun = False
        root = model.body_rootid[model.site_bodyid[self.site_id]]
        dofs = np.array(self.qvel_index, dtype=np.int64)
        self._arrays = _Arrays(
            qpos=data.qpos,
            qvel=data.qvel,
            position=data.site_xpos[self.site_id],
            rotation=data.site_xmat[self.site_id].reshape(3, 3),
            motion_axes=data.cdof,
            reference=data.subtree_com[root],
            mass_entries=data.qM,
            bias=data.qfrc_bias,
            ctrl=data.ctrl,
            qpos_index=np.array(self.qpos_index, dtype=np.int64),
            dofs=dofs,
            mass_index=_mass_index(model, dofs),
            goal_position=np.zeros(3),
            goal_rotation=np.zeros((3, 3)),
            kp=np.array(controller.kp, dtype=np.float64),
            kd=np.array(controller.kd, dtype=np.float64),
            reset_joints=np.array(controller.initial_joint, dtype=np.float64),
            actuators=np.array(self.joint_actuators, dtype=np.int64),
            torque_low=np.array(self.torque_low),
            torque_high=np.array(self.torque_high),
            fingers=np.zeros(2),
            finger_speeds=np.array([-1.0, 1.0]) * gripper.speed,
            finger_actuators=np.array(self.gripper_actuators, dtype=np.int64),
            finger_bias=self.gripper_bias,
            finger_weight=self.gripper_weight,
        )

    def control(self, action: np.ndarray, is_first: bool) -> None:
        """As `Arm.control`."""
        arrays = self._arrays
        if not self._has_begun:
            super().control(action, is_first)
            arrays.fingers[:] = self.robot.gripper.current_action
            self.robot.gripper.current_action = arrays.fingers
            self._take_goal()
            self._has_begun = True
            return
        if is_first:
            controller = self.controller
            controller.ee_pos, controller.ee_ori_mat = (
                arrays.position.copy(),
                arrays.rotation.copy(),
            )
            controller.new_update = False
            controller.set_goal(action[:6])
            self._take_goal()
        _control(arrays, action[6])

    def _take_goal(self) -> None:
        self._arrays.goal_position[:] = self.controller.goal_pos
        self._arrays.goal_rotation[:] = self.controller.goal_ori


class _Arrays(NamedTuple):
    """What `_control` reads and writes: views of MjData, and constants of the episode. SI units.

    nq, nv, nu: positions, velocities and actuators of the whole model.
    """

    qpos: np.ndarray  # (nq,)
    qvel: np.ndarray  # (nv,)
    position: np.ndarray  # (3,) of the end effector's site
    rotation: np.ndarray  # (3, 3)
    motion_axes: (
        np.ndarray
    )  # (nv, 6) MjData.cdof: rotation and translation of each degree of freedom
    reference: np.ndarray  # (3,) the point at which those translations hold
    mass_entries: np.ndarray  # (nM,) MjData.qM
    bias: np.ndarray  # (nv,) Coriolis, centrifugal and gravity
    ctrl: np.ndarray  # (nu,) written
    qpos_index: np.ndarray  # (7,) the arm's joints in qpos
    dofs: np.ndarray  # (7,) and in qvel
    mass_index: np.ndarray  # (7, 7) where the arm's mass matrix is in mass_entries
    goal_position: np.ndarray  # (3,)
    goal_rotation: np.ndarray  # (3, 3)
    kp: np.ndarray  # (6,) 1/s^2, position and orientation
    kd: np.ndarray  # (6,) 1/s
    reset_joints: np.ndarray  # (7,)
    actuators: np.ndarray  # (7,) the arm's in ctrl
    torque_low: np.ndarray  # (7,)
    torque_high: np.ndarray  # (7,)
    fingers: np.ndarray  # (2,) the gripper's ramp in [-1, 1], written
    finger_speeds: np.ndarray  # (2,) change of the ramp in a physics step
    finger_actuators: np.ndarray  # (2,)
    finger_bias: np.ndarray  # (2,) ctrl at the ramp's middle
    finger_weight: np.ndarray  # (2,)


def _mass_index(model: mujoco.MjModel, dofs: np.ndarray) -> np.ndarray:
    """Where qM keeps the entries between these degrees of freedom, each the next one's ancestor: (n, n) int64.

    A row of qM is a degree of freedom's diagonal element, followed by those of its ancestors from the nearest on.
    """
    index = np.zeros((len(dofs), len(dofs)), dtype=np.int64)
    for i, dof in enumerate(dofs):
        ancestors, ancestor = [], int(dof)
        while ancestor >= 0:
            ancestors.append(ancestor)
            ancestor = int(model.dof_parentid[ancestor])
        for j in range(i + 1):
            index[i, j] = index[j, i] = model.dof_Madr[dof] + ancestors.index(dofs[j])
    return index


_compiled = numba.njit(cache=True, error_model="numpy")


@_compiled
def _control(arm, grip):
    """Write the actuators' ctrl: the clipped torques of the module's control law, N m, and the gripper's next ramp.

    Args:
        arm: `_Arrays`.
        grip: the action's last number: its sign closes (+) or opens (-).
    """
    num = len(arm.dofs)
    mass, pull, joint_velocity = np.empty((num, num)), np.empty(num), np.empty(num)
    for i in range(num):
        for j in range(num):
            mass[i, j] = arm.mass_entries[arm.mass_index[i, j]]
        joint_velocity[i] = arm.qvel[arm.dofs[i]]
        error = arm.reset_joints[i] - arm.qpos[arm.qpos_index[i]]
        pull[i] = NULLSPACE_KP * error - NULLSPACE_KD * joint_velocity[i]
    jacobian = _jacobian(arm.motion_axes, arm.dofs, arm.position, arm.reference)
    velocity, turn = (
        _times(jacobian, joint_velocity),
        _rotation_error(arm.goal_rotation, arm.rotation),
    )
    acceleration = np.empty(6)
    for k in range(6):
        error = arm.goal_position[k] - arm.position[k] if k < 3 else turn[k - 3]
        acceleration[k] = arm.kp[k] * error - arm.kd[k] * velocity[k]
    wrench = _wrench(mass, jacobian, acceleration, _times(jacobian, pull))
    for i in range(num):
        torque = arm.bias[arm.dofs[i]]
        for j in range(num):
            torque += mass[i, j] * pull[j]
        for k in range(6):
            torque += jacobian[k, i] * wrench[k]
        arm.ctrl[arm.actuators[i]] = min(max(torque, arm.torque_low[i]), arm.torque_high[i])
    for i in range(len(arm.fingers)):
        finger = arm.fingers[i] + arm.finger_speeds[i] * np.sign(grip)
        arm.fingers[i] = min(max(finger, -1.0), 1.0)
        arm.ctrl[arm.finger_actuators[i]] = (
            arm.finger_bias[i] + arm.finger_weight[i] * arm.fingers[i]
        )


@_compiled
def _jacobian(motion_axes, dofs, position, reference):
    """The end effector's Jacobian (6, 7), position above orientation, as mj_jacSite."""
    result = np.empty((6, len(dofs)))
    x, y, z = position[0] - reference[0], position[1] - reference[1], position[2] - reference[2]
    for i, dof in enumerate(dofs):
        a, b, c = motion_axes[dof, 0], motion_axes[dof, 1], motion_axes[dof, 2]
        result[0, i] = motion_axes[dof, 3] + b * z - c * y
        result[1, i] = motion_axes[dof, 4] + c * x - a * z
        result[2, i] = motion_axes[dof, 5] + a * y - b * x
        result[3, i], result[4, i], result[5, i] = a, b, c
    return result


@_compiled
def _rotation_error(desired, present):
    """Half the sum of the cross products of present and desired axes, (3,), as robosuite's `orientation_error`."""
    error = np.zeros(3)
    for k in range(3):
        m, n = (k + 1) % 3, (k + 2) % 3
        for axis in range(3):
            error[k] += 0.5 * (
                present[m, axis] * desired[n, axis] - present[n, axis] * desired[m, axis]
            )
    return error


@_compiled
def _wrench(mass, jacobian, acceleration, pull):
    """`[L(J_pos) f; L(J_ori) t] - L(J) pull`, (6,): force and moment at the end effector.

    Args:
        mass: M (7, 7).
        jacobian: J (6, 7).
        acceleration: f and t (6,), changed.
        pull: J a (6,), changed.
    """
    num = len(mass)
    factor, whitened, inverse_inertia = _cholesky(mass), np.empty((6, num)), np.empty((6, 6))
    for k in range(6):  # J M^-1 J^T = W W^T with factor @ W^T = J^T
        for i in range(num):
            whitened[k, i] = jacobian[k, i]
            for j in range(i):
                whitened[k, i] -= factor[i, j] * whitened[k, j]
            whitened[k, i] /= factor[i, i]
        for m in range(k + 1):
            inverse_inertia[k, m] = 0.0
            for i in range(num):
                inverse_inertia[k, m] += whitened[k, i] * whitened[m, i]
    factor = _cholesky(inverse_inertia)
    _solve(factor, pull)
    _solve(factor, acceleration[:3])  # its first rows are the factor of the position's block
    block = np.empty((3, 3))
    for k in range(3):
        for m in range(k + 1):
            block[k, m] = inverse_inertia[k + 3, m + 3]
    _solve(_cholesky(block), acceleration[3:])
    for k in range(6):
        acceleration[k] -= pull[k]
    return acceleration


@_compiled
def _times(matrix, vector):
    """`matrix @ vector`."""
    result = np.zeros(len(matrix))
    for i in range(len(matrix)):
        for j in range(len(vector)):
            result[i] += matrix[i, j] * vector[j]
    return result


@_compiled
def _cholesky(matrix):
    """The lower factor (n, n) of a symmetric positive semi-definite matrix, of which the lower half is read.

    A row that depends on those before it gets pivot 0.
    """
    factor = np.zeros((len(matrix), len(matrix)))
    for i in range(len(matrix)):
        for j in range(i + 1):
            total = matrix[i, j]
            for k in range(j):
                total -= factor[i, k] * factor[j, k]
            if j == i:
                factor[i, i] = np.sqrt(total) if total > SMALLEST_PIVOT * matrix[i, i] else 0.0
            elif factor[j, j] > 0.0:
                factor[i, j] = total / factor[j, j]
    return factor


@_compiled
def _solve(factor, vector):
    """Solve in place the equations of the factor's first len(vector) rows; unknowns with pivot 0 become 0."""
    num = len(vector)
    for i in range(num):
        for j in range(i):
            vector[i] -= factor[i, j] * vector[j]
        vector[i] = vector[i] / factor[i, i] if factor[i, i] > 0.0 else 0.0
    for i in range(num - 1, -1, -1):
        for j in range(i + 1, num):
            vector[i] -= factor[j, i] * vector[j]
        vector[i] = vector[i] / factor[i, i] if factor[i, i] > 0.0 else 0.0
