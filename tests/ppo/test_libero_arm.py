"""The compiled controller of LIBERO's arm against robosuite's own, substep by substep and over whole episodes."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest

from ppo.envs.base import ResetRequest
from ppo.envs.libero_expert import run_expert_episode
from tests.libero_episodes import CABINET_TASK, DRAWER_TASK, make_env, random_actions

pytestmark = pytest.mark.libero("libero_spatial")
TORQUE_LIMIT = 80.0
"""N m, of the arm's stronger joints."""


@pytest.fixture(scope="module")
def env():
    made = make_env(images=False, exact_physics=False)
    yield made
    made.close()


def varied_actions(num: int, seed: int) -> np.ndarray:
    """Random ones (T, 7), held for two steps: all axes, no rotation, rotation only, nothing; one close of the hand."""
    actions = random_actions(num, seed).repeat(2, axis=0)[:num]
    kind = np.arange(num) // 2 % 4
    actions[kind == 1, 3:6] = 0.0
    actions[kind == 2, :3] = 0.0
    actions[kind == 3, :6] = 0.0
    actions[:, 6] = np.where(np.arange(num) < num // 2, 1.0, -1.0)
    actions[::7, 6] = 0.0  # the fingers stay
    return actions


class ArmBesideRobosuites:
    """The environment's arm; at each substep robosuite's controller is asked too, and both answers are noted."""

    def __init__(self, simulator) -> None:
        from ppo.envs.libero_arm import Arm

        self.arm, self.data = simulator._arm, simulator.data
        self.reference = Arm(simulator.domain, simulator.model, simulator.data)
        self.reference.controller = copy.copy(self.reference.controller)
        gripper = copy.copy(self.reference.robot.gripper)
        self.reference.robot = SimpleNamespace(gripper=gripper)
        self.num_substeps = self.arm.num_substeps
        self.controls: list[np.ndarray] = []
        self.expected: list[np.ndarray] = []
        self.unclipped: list[np.ndarray] = []

    def control(self, action: np.ndarray, is_first: bool) -> None:
        self.reference.control(action, is_first)
        self.expected.append(self.data.ctrl.copy())
        self.unclipped.append(self.reference.controller.torques)
        self.data.ctrl[:] = np.nan
        self.arm.control(action, is_first)
        self.controls.append(self.data.ctrl.copy())
        for goal in ("goal_pos", "goal_ori"):
            ours, theirs = (getattr(c.controller, goal) for c in (self.arm, self.reference))
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("task_id", "init_state_id"), [(0, 0), (DRAWER_TASK, 3), (CABINET_TASK, None)]
)
def test_every_substeps_torques_and_fingers_are_robosuites(
    env, task_id, init_state_id, monkeypatch
):
    from ppo.envs.libero_arm import QuickArm

    env.reset(ResetRequest(task_id, init_state_id, 1))
    simulator = env.simulator
    simulator.reset(1, init_state_id)  # again, so that the episode's first substep is compared too
    assert type(simulator._arm) is QuickArm
    both = ArmBesideRobosuites(simulator)
    monkeypatch.setattr(simulator, "_arm", both)
    for action in varied_actions(24, seed=task_id):
        env.step(action)
    controls, expected, unclipped = (
        np.array(x) for x in (both.controls, both.expected, both.unclipped)
    )
    assert len(controls) == 24 * 25
    np.testing.assert_allclose(controls, expected, rtol=0, atol=1e-9 * TORQUE_LIMIT)
    torques = both.reference.joint_actuators
    is_free = expected[:, torques] == unclipped
    assert 0.5 < is_free.mean() < 1.0 and np.abs(expected[:, torques]).max() > 30.0, (
        "both sides of the limits are met"
    )
    fingers = both.reference.gripper_actuators
    np.testing.assert_array_equal(controls[:, fingers], expected[:, fingers])
    assert np.ptp(expected[:, fingers], axis=0).min() > 0.03, "the fingers have opened and closed"


@pytest.mark.parametrize(
    ("task_id", "init_state_id"), [(0, 0), (DRAWER_TASK, 3), (CABINET_TASK, 2)]
)
def test_whole_episodes_are_those_of_robosuites_controller(
    env, task_id, init_state_id, monkeypatch
):
    """Approach, grasp, transport and release; the sensors are left out too.

    Until the fingers close the states differ by rounding (4e-13 m or rad at most where it was measured). A grasp
    enlarges that: in 11 of 12 episodes to 1e-11, in one to 1e-5. `exact_physics` changes such episodes by up to 5e-3.
    """
    from ppo.envs import libero_arm, libero_simulator

    request = ResetRequest(task_id, init_state_id, task_id)
    episode = run_expert_episode(env, request, 0.0, np.random.default_rng(0))
    assert episode.success and len(episode.actions) > 40

    def replay() -> tuple[np.ndarray, list[bool]]:
        env.reset(request)
        positions, solved = [], []
        for action in episode.actions:
            solved.append(env.step(action).success)
            positions.append(env.simulator.data.qpos.copy())
        return np.array(positions), solved

    ours, ours_solved = replay()
    model = env.simulator.model
    monkeypatch.setattr(libero_simulator, "QuickArm", libero_arm.Arm)
    assert model.opt.disableflags != 0
    monkeypatch.setattr(model.opt, "disableflags", 0)
    theirs, theirs_solved = replay()
    assert ours_solved == theirs_solved and ours_solved[-1]
    difference = np.abs(ours - theirs).max(axis=1)
    grasp = int(np.argmax(episode.actions[:, 6] > 0))
    assert grasp > 10 and difference[:grasp].max() < 1e-10
    assert 0 < difference.max() < 1e-3


def test_exact_physics_keeps_robosuites_controller_and_the_sensors():
    from ppo.envs.libero_arm import Arm

    exact = make_env(images=False, exact_physics=True, num_steps_wait=1)
    exact.reset(ResetRequest(0, 0, 0))
    assert type(exact.simulator._arm) is Arm
    assert (
        exact.simulator.model.opt.disableflags == 0
        and np.abs(exact.simulator.data.sensordata).max() > 0
    )
    exact.close()


@pytest.fixture
def arm_model() -> tuple[np.ndarray, np.ndarray]:
    """A mass matrix (7, 7) and a Jacobian (6, 7)."""
    rng = np.random.default_rng(5)
    root = rng.normal(size=(7, 7))
    return root @ root.T + np.eye(7), rng.normal(size=(6, 7))


def test_the_wrench_is_that_of_the_pseudo_inverses_away_from_singular_poses(arm_model):
    from ppo.envs.libero_arm import _wrench

    mass, jacobian = arm_model
    acceleration, pull = np.random.default_rng(6).normal(size=(2, 6))
    inverse_inertia = jacobian @ np.linalg.inv(mass) @ jacobian.T
    blocks = (inverse_inertia, inverse_inertia[:3, :3], inverse_inertia[3:, 3:])
    full, position, orientation = (np.linalg.pinv(block) for block in blocks)
    expected = (
        np.concatenate([position @ acceleration[:3], orientation @ acceleration[3:]]) - full @ pull
    )
    np.testing.assert_allclose(
        _wrench(mass, jacobian, acceleration.copy(), pull.copy()), expected, rtol=1e-10
    )


@pytest.mark.parametrize("lost", [1, 5])
def test_a_singular_pose_gives_finite_torques_and_the_nullspaces_are_the_pseudo_inverses(
    arm_model, lost
):
    """A direction of the velocity, or of the rotation, depends on the one before it."""
    from ppo.envs.libero_arm import _wrench

    mass, jacobian = arm_model
    jacobian[lost] = 0.5 * jacobian[lost - 1]
    pull = jacobian @ np.arange(7.0)
    inverse_inertia = jacobian @ np.linalg.solve(mass, jacobian.T)
    inertia = np.linalg.pinv(inverse_inertia, rcond=1e-10, hermitian=True)
    ours = jacobian.T @ _wrench(mass, jacobian, np.zeros(6), pull.copy())
    np.testing.assert_allclose(ours, -jacobian.T @ inertia @ pull, rtol=1e-8, atol=1e-8)
    # A demand that can be met is met: the same acceleration as with the pseudo-inverse; the lost row's force is 0.
    block = slice(0, 3) if lost < 3 else slice(3, 6)
    demand = np.zeros(6)
    demand[block] = inverse_inertia[block, block] @ np.array([1.0, -2.0, 3.0])
    wrench = _wrench(mass, jacobian, demand.copy(), np.zeros(6))
    np.testing.assert_allclose(
        inverse_inertia[block, block] @ wrench[block], demand[block], rtol=1e-9
    )
    assert wrench[lost] == 0.0 and np.all(np.isfinite(wrench))
    unreachable = _wrench(mass, jacobian, np.ones(6), np.ones(6))
    assert np.abs(unreachable).max() < 1e3
