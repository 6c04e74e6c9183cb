"""What LIBERO's scripted expert sees: positions read from the simulator's state, in metres in the world's frame."""

from typing import Any

import numpy as np

from ppo.envs.libero_expert_motion import Hand, Obstacle

CABINET, TOP_DRAWER = "wooden_cabinet_1", "wooden_cabinet_1_top_level"
# Boxes (from, to) sideways and tops in the cabinet's frame; the drawer's front is what sticks out of the cabinet.
_CABINET_BOX, _CABINET_TOP = ((-0.125, -0.08), (0.131, 0.11)), 0.223
_DRAWER_BOX, _DRAWER_TOP = ((-0.107, -0.11), (0.112, -0.08)), 0.218
_TALL = {
    "wine_bottle_1": (((-0.02, -0.02), (0.02, 0.02)), 0.158),
    "wine_rack_1": (((-0.135, -0.09), (0.135, 0.08)), 0.3),
}
_DRAWER_SHUT = -0.02


class Scene:
    """Reads one episode's objects and hand.

    Args:
        domain: LIBERO's environment object (BDDLBaseDomain), reset.
    """

    def __init__(self, domain: Any) -> None:
        self.domain, self.robot = domain, domain.robots[0]

    def hand(self, command: float) -> Hand:
        """The hand, given the last gripper command."""
        data, robot = self.domain.sim.data, self.robot
        left, right = data.qpos[robot._ref_gripper_joint_pos_indexes]
        left_speed, right_speed = data.qvel[robot._ref_gripper_joint_vel_indexes]
        return Hand(
            np.array(data.site_xpos[robot.eef_site_id]),
            left - right,
            left_speed - right_speed,
            command,
        )

    def body(self, name: str) -> np.ndarray:
        """Origin (3,) of an object or fixture."""
        return np.array(self.domain.sim.data.body_xpos[self.domain.obj_body_id[name]])

    def rotation(self, name: str) -> np.ndarray:
        """Axes (3, 3) of an object or fixture, in columns."""
        return np.array(self.domain.sim.data.body_xmat[self.domain.obj_body_id[name]]).reshape(3, 3)

    def site(self, name: str) -> np.ndarray:
        """Position (3,) of a region."""
        return np.array(self.domain.sim.data.get_site_xpos(name))

    def joint(self, name: str) -> float:
        """Value of a fixture's joint, metres or radians."""
        return float(self.domain.sim.data.get_joint_qpos(name))

    def box(self, name: str, corners: tuple, top: float, shift_y: float = 0.0) -> Obstacle:
        """An upright box given in an object's frame by two opposite corners (2,) and the height of its top."""
        low, high = (np.array([*corner, 0.0]) for corner in corners)
        axes = self.rotation(name)
        centre = self.body(name) + axes @ ((low + high) / 2 + np.array([0.0, shift_y, 0.0]))
        yaw = float(np.arctan2(axes[1, 0], axes[0, 0]))
        return Obstacle(centre[:2], yaw, (high - low)[:2] / 2, float(self.body(name)[2] + top))

    def obstacles(self, moved: str) -> list[Obstacle]:
        """What is too high to be passed at travelling height, without the object that is moved."""
        boxes = self.cabinet()
        for name, (corners, top) in _TALL.items():
            if name in self.domain.obj_body_id and name != moved:
                boxes.append(self.box(name, corners, top))
        return boxes

    def cabinet(self) -> list[Obstacle]:
        """The cabinet and, where it is open, its upper drawer; nothing in scenes without."""
        if CABINET not in self.domain.obj_body_id:
            return []
        opening = self.joint(TOP_DRAWER)
        boxes = [self.box(CABINET, _CABINET_BOX, _CABINET_TOP)]
        if opening < _DRAWER_SHUT:
            (left, front), (right, back) = _DRAWER_BOX
            boxes.append(self.box(CABINET, ((left, front + opening), (right, back)), _DRAWER_TOP))
        return boxes
