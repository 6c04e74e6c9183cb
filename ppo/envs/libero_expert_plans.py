"""What LIBERO's scripted expert takes hold of in each task, how, and where it puts it. Lengths in metres."""

from collections.abc import Callable, Sequence

import numpy as np

from ppo.envs.libero_expert_motion import PickPlace
from ppo.envs.libero_expert_scene import CABINET, TOP_DRAWER, Scene

Plan = Callable[[int], PickPlace]
"""Attempt number -> what to do now."""


def _up(height: float) -> np.ndarray:
    return np.array([0.0, 0.0, height])


BOWL_GRASPS = (np.array([0.0, 0.046, 0.03]), np.array([0.0, -0.046, 0.03]))
"""From a bowl's origin to the hand that takes its rim, the usual side first; the fingers open along y."""
DRAWER_CLOSE_HEIGHT = 0.02
DRAWER_WALL, DRAWER_FLOOR = -0.0648, 0.158
DRAWER_MARGIN = 0.003
DRAWER_GRASP_X, DRAWER_GRASP_Y = -0.025, (0.02, 0.034)
DRAWER_BACK_GRASP = np.array([0.0, -0.04, 0.034])
DRAWER_WAY_OUT = -0.141
PLATE_GRASPS = (np.array([0.0, 0.065, 0.012]), np.array([0.0, -0.065, 0.012]))
CHEESE_GRASPS = (_up(0.008),)
BOTTLE_GRASPS = (_up(0.135),)
"""By its neck; further down the palm would touch its top."""
PLACES = {
    "plate": _up(0.01),
    "akita_black_bowl": _up(0.045),
    "flat_stove_1_cook_region": _up(0.035),
    "wooden_cabinet_1_top_side": _up(0.01),
    "wine_rack_1_top_region": _up(0.02),
    "main_table_stove_front_region": _up(0.01),
}


def make_plan(scene: Scene, goal: Sequence[str]) -> Plan:
    """How to reach a goal of LIBERO's language, e.g. ("on", "akita_black_bowl_1", "plate_1").

    Raises:
        ValueError: a goal that the expert cannot reach.
    """
    predicate, name, target = goal
    category = name.rsplit("_", 1)[0]
    grasps, options = {
        "akita_black_bowl": (BOWL_GRASPS, {}),
        "plate": (PLATE_GRASPS, {"travel": 0.01}),
        "cream_cheese": (CHEESE_GRASPS, {"held_gap": 0.055}),
        "wine_bottle": (BOTTLE_GRASPS, {"carry_margin": 0.05}),
    }[category]
    if _lies_in_drawer(scene, name):
        return _drawer_plan(scene, name, target)
    place = PLACES.get(target)
    if place is None:
        place = PLACES[target.rsplit("_", 1)[0]]
    is_site = target in PLACES

    def plan(attempt: int) -> PickPlace:
        return PickPlace(
            object=scene.body(name),
            place=(scene.site(target) if is_site else scene.body(target)) + place,
            grasp=grasps[attempt % len(grasps)],
            obstacles=scene.obstacles(name),
            **options,
        )

    return plan


def _lies_in_drawer(scene: Scene, name: str) -> bool:
    if CABINET not in scene.domain.obj_body_id:
        return False
    return bool(np.linalg.norm(scene.body(name) - scene.site(f"{CABINET}_top_region")) < 0.08)


def _drawer_plan(scene: Scene, name: str, target: str) -> Plan:
    """In the narrow drawer the open fingers come down off the rim's middle, so that the outer one clears the wall, and
    draw the bowl between them as they close; then the bowl is drawn out from under the cabinet's top."""

    def plan(attempt: int) -> PickPlace:
        position, axes = scene.body(name), scene.rotation(CABINET)
        origin = scene.body(CABINET) + axes[:, 1] * scene.joint(TOP_DRAWER)
        local = axes.T @ (position - origin)
        to_wall = local[1] - DRAWER_WALL - DRAWER_MARGIN
        front = -axes[:, 1]
        corner = np.array([DRAWER_GRASP_X + 0.009, 0.0])
        y = (to_wall - front[0] * corner[0]) / front[1] - 0.0543
        grasp = np.array([DRAWER_GRASP_X, np.clip(y, *DRAWER_GRASP_Y), 0.03])
        if attempt % 2:
            grasp = DRAWER_BACK_GRASP
        return PickPlace(
            object=position,
            place=scene.body(target) + PLACES["plate"],
            grasp=grasp,
            close_height=DRAWER_CLOSE_HEIGHT,
            obstacles=scene.cabinet(),
            way_out=origin
            + axes @ np.array([local[0], min(local[1], DRAWER_WAY_OUT - scene.joint(TOP_DRAWER)), DRAWER_FLOOR]),
        )

    return plan
