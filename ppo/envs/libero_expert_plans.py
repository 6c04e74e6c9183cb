"""What LIBERO's scripted expert takes hold of in each task, how, and where it puts it. Lengths in metres."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ppo.envs.libero_expert_motion import PickPlace, Push
from ppo.envs.libero_expert_scene import CABINET, TOP_DRAWER, Scene

Plan = Callable[[int], PickPlace | Push]
"""Attempt number -> what to do now."""


def _up(height: float) -> np.ndarray:
    return np.array([0.0, 0.0, height])


BOWL = "akita_black_bowl_1"
BOWL_GRASPS = (np.array([0.0, 0.046, 0.03]), np.array([0.0, -0.046, 0.03]))
"""From a bowl's origin to the hand that takes its rim, the usual side first; the fingers open along y."""
BOTTLE_GRASP = _up(0.135)
"""By its neck; further down the palm would touch its top."""
GRASPS = {
    "akita_black_bowl": BOWL_GRASPS,
    "plate": (np.array([0.0, 0.05, 0.009]),),
    "cream_cheese": (_up(0.008),),
    "wine_bottle": (BOTTLE_GRASP,),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "akita_black_bowl": {},
    "plate": {"held_gap": 0.045, "travel": 0.02, "hold_radius": 0.05},
    "cream_cheese": {"held_gap": 0.055},
    "wine_bottle": {"carry_margin": 0.05},
}
"""Attributes of PickPlace that differ from its defaults. A plate is pushed: hardly lifted, held by one side."""
PLACES = {
    "plate": _up(0.01),
    "akita_black_bowl": _up(0.045),
    "flat_stove_1_cook_region": _up(0.035),
    "wooden_cabinet_1_top_side": _up(0.01),
    "wine_rack_1_top_region": _up(0.02),
    "main_table_stove_front_region": _up(0.01),
}
"""From a receptacle's origin, or a region's, to the origin of what is put there."""

DRAWER_FRONT, DRAWER_FLOOR = -0.0648, 0.158
"""In the open drawer's frame: its front wall's inner side (y), and a bowl's origin on its floor (z)."""
DRAWER_MARGIN = 0.003
"""Between the outer finger and the drawer's front wall."""
FINGER_REACH, FINGER_HALF_WIDTH = 0.0543, 0.009
"""From the hand's middle to the outside of an open finger, along y; half its width, along x."""
DRAWER_GRASP_X, DRAWER_GRASP_Y, DRAWER_GRASP_Z = -0.025, (0.02, 0.034), 0.03
DRAWER_BACK_GRASP = np.array([0.0, -0.04, 0.034])
"""For a bowl that a failed attempt has left at the front wall: the other side of the rim."""
DRAWER_CLOSE_HEIGHT = 0.02
CABINET_TOP_FRONT = -0.141
"""In the cabinet's frame: a bowl with its origin further in (y) lies under the cabinet's top with its rim."""

HANDLE_CONTACT, HANDLE_SLACK = np.array([-0.003, -0.1016, 0.204]), (0.03, 0.006)
"""In the drawer's frame: the hand with its closed fingers on the handle."""
HANDLE_AHEAD, HANDLE_PRESS = 0.06, 0.03
"""How far ahead and below the contact the hand aims that pulls the drawer open."""
OPEN_ENOUGH, OPEN_FULLY = -0.12, -0.135
"""The drawer's joint: from the first on a bowl fits in, to the second it is pulled."""
IN_DRAWER = np.array([0.0033, -0.003, 0.17])
"""In the drawer's frame: where a bowl is put."""
DRAWER_SIDE, DRAWER_SHUT = 0.109, -0.02
"""In the drawer's frame: its side wall's outside (x, towards the robot). The joint of a drawer that counts as shut."""
BOWL_ASIDE = 0.05
"""How far from the drawer's side, towards the robot, the bowl's origin must be to be taken beside the open drawer."""
BESIDE_DRAWER_INSIDE = 0.015
BOWL_CONTACT, BOWL_SLACK, BOWL_AHEAD = (
    np.array([-0.01, 0.0, 0.035]),
    (0.045, 0.01),
    np.array([-0.05, 0.0, 0.0]),
)
"""Closed fingers that stand in the bowl push it towards the robot."""

KNOB_CONTACT, KNOB_SLACK = np.array([0.03, -0.035, 0.026]), (0.03, 0.008)
"""In the knob's frame: closed fingers beside the end of its bar."""
KNOB_AHEAD, KNOB_BACK = np.array([0.0, 0.05, 0.0]), np.array([0.0, -0.03, 0.0])
KNOB_PATIENCE = 12
"""Steps that it pushes the knob, which is heavy; it goes on turning when the fingers withdraw."""


def make_plan(scene: Scene, goal: Sequence[str]) -> Plan:
    """How to reach a goal of LIBERO's language, e.g. ("on", "akita_black_bowl_1", "plate_1").

    Raises:
        ValueError: a goal that the expert cannot reach.
    """
    if tuple(goal) == ("in", BOWL, f"{CABINET}_top_region"):
        return lambda attempt: _fill_drawer(scene)
    if goal[0] == "turnon":
        return lambda attempt: _turn_knob(scene, goal[1], attempt)
    if len(goal) != 3 or goal[0] != "on":
        raise ValueError(f"the scripted expert cannot do {' '.join(goal)}")
    _, name, target = goal
    category = _category(name)
    if _lies_in_drawer(scene, name):
        return lambda attempt: _take_from_drawer(scene, name, target, attempt)
    if category not in GRASPS:
        raise ValueError(f"the scripted expert cannot take hold of {name}")
    return lambda attempt: _pick_place(scene, name, target, attempt)


def _category(name: str) -> str:
    return name.rsplit("_", 1)[0]


def _place(scene: Scene, target: str) -> np.ndarray:
    """Where the origin of what is put on `target`, a region or an object, shall come."""
    if target in PLACES:
        return scene.site(target) + PLACES[target]
    return scene.body(target) + PLACES[_category(target)]


def _pick_place(scene: Scene, name: str, target: str, attempt: int) -> PickPlace:
    category = _category(name)
    grasps = GRASPS[category]
    return PickPlace(
        object=scene.body(name),
        place=_place(scene, target),
        grasp=grasps[attempt % len(grasps)],
        obstacles=scene.obstacles(name),
        **OPTIONS[category],
    )


def _lies_in_drawer(scene: Scene, name: str) -> bool:
    if CABINET not in scene.domain.obj_body_id:
        return False
    return bool(np.linalg.norm(scene.body(name) - scene.site(f"{CABINET}_top_region")) < 0.08)


def _take_from_drawer(scene: Scene, name: str, target: str, attempt: int) -> PickPlace:
    """A bowl out of the upper drawer, which is hardly longer than bowl and open fingers.

    The open fingers come down beside the rim's middle, as far out as the outer one clears the drawer's front, and draw
    the bowl between them as they close; then it is drawn forward from under the cabinet's top.
    """
    bowl, axes = scene.body(name), scene.rotation(CABINET)
    opening = scene.joint(TOP_DRAWER)
    drawer = scene.body(CABINET) + axes[:, 1] * opening
    x, y, _ = axes.T @ (bowl - drawer)
    forward = -axes[:, 1]
    to_front = y - DRAWER_FRONT - DRAWER_MARGIN - forward[0] * (DRAWER_GRASP_X + FINGER_HALF_WIDTH)
    reach = np.clip(to_front / forward[1] - FINGER_REACH, *DRAWER_GRASP_Y)
    grasp = np.array([DRAWER_GRASP_X, reach, DRAWER_GRASP_Z])
    return PickPlace(
        object=bowl,
        place=_place(scene, target),
        grasp=DRAWER_BACK_GRASP if attempt % 2 else grasp,
        close_height=DRAWER_CLOSE_HEIGHT,
        obstacles=scene.obstacles(name),
        way_out=drawer + axes @ np.array([x, min(y, CABINET_TOP_FRONT - opening), DRAWER_FLOOR]),
    )


def _fill_drawer(scene: Scene) -> PickPlace | Push:
    """Push the bowl aside, pull the upper drawer open by its handle, and put the bowl in.

    Where the bowl stands at first the open drawer would be above it.
    """
    axes, opening = scene.rotation(CABINET), scene.joint(TOP_DRAWER)
    drawer = scene.body(CABINET) + axes[:, 1] * opening
    handle = drawer + axes @ HANDLE_CONTACT
    bowl = scene.body(BOWL)
    edge = (drawer + axes @ np.array([DRAWER_SIDE, 0.0, 0.0]))[0]
    if opening > DRAWER_SHUT and bowl[0] > edge - BOWL_ASIDE:
        return Push(bowl + BOWL_CONTACT, BOWL_AHEAD, BOWL_SLACK, obstacles=scene.obstacles(BOWL))
    is_pulling = np.linalg.norm(scene.hand(0.0).position - handle) < HANDLE_SLACK[0]
    if opening > (OPEN_FULLY if is_pulling else OPEN_ENOUGH):
        ahead = -HANDLE_AHEAD * axes[:, 1] - _up(HANDLE_PRESS)
        return Push(handle, ahead, HANDLE_SLACK, obstacles=scene.obstacles(BOWL))
    return PickPlace(
        object=bowl,
        place=drawer + axes @ IN_DRAWER,
        grasp=BOWL_GRASPS[0],
        obstacles=scene.obstacles(BOWL),
        inside=BESIDE_DRAWER_INSIDE,
    )


def _turn_knob(scene: Scene, stove: str, attempt: int) -> Push:
    """Strike the end of the knob's bar to the left with closed fingers, and withdraw, in turn."""
    angle = scene.joint(f"{stove}_button")
    cos, sin = np.cos(angle), np.sin(angle)
    axes = np.array([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]])
    contact, obstacles = scene.body(stove) + axes @ KNOB_CONTACT, scene.obstacles(stove)
    if attempt % 2:
        return Push(
            contact + axes @ KNOB_BACK, np.zeros(3), KNOB_SLACK, patience=1, obstacles=obstacles
        )
    return Push(contact, axes @ KNOB_AHEAD, KNOB_SLACK, KNOB_PATIENCE, obstacles=obstacles)
