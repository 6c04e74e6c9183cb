"""How LIBERO's scripted expert moves its hand: pure functions from what it sees to one action.

The same situation gives the same action. What comes next follows from where the object is, how far the fingers are
open and the last gripper command, not from a counter: what an image shows is enough to imitate it. The hand never
turns, so that the rotation of the recorded actions is exactly zero; it opens along y.

Lengths in metres in the world's frame (x away from the robot's base, y to its left, z up). Actions are LIBERO's raw
ones, (7,) float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ppo.envs.base import ACTION_DIM

OPEN, CLOSE = -1.0, 1.0
FULL_SPEED_ERROR = 0.03
SPEED_POWER = 0.7
"""Command = (error / FULL_SPEED_ERROR) ** SPEED_POWER up to 1. Below 1 the power makes small errors count: stopping
turns the hand a little, and what turns it back pushes it aside with up to a tenth of full speed for ten steps."""
MIN_COMMAND = 2e-3
"""Some component is at least this: a step of nothing would be taken out of the recording."""
NOOP_NORM = 1e-4
"""Six deltas of a smaller norm and an unchanged gripper command are a no-op."""

OPEN_GAP = 0.065
"""Fingers this far apart (0.08 at most) are open."""
TOUCH_GAP = 0.05
"""Closing fingers may touch the object from here on: the hand does not correct itself sideways any more."""
EMPTY_GAP = 0.0015
"""Fingers closer than this hold nothing."""
CLOSING_SPEED = 0.03
"""In m/s; fingers that close faster than this have not got hold yet."""

ALIGNED = 0.018
"""The fingers close when the hand is this close to the grasp point, sideways."""
FUNNEL_RADIUS, FUNNEL_SLOPE = 0.008, 1.5
"""Closer than the radius, sideways, it goes all the way down; outside it stays above by the slope times the rest."""
LOW_MARGIN = 0.03
"""Below the height needed it moves sideways the slower, and not at all from this far below."""
NEAR = 0.12
"""Further than this from the grasp point, sideways, the empty hand needs no height but that of the obstacles."""
INSIDE = 0.06
"""Closer than this to the grasp point or the object's place, sideways, it goes down whatever stands around."""
HAND_MARGIN, HAND_CLEARANCE = 0.08, 0.03
"""What is closer than the margin, sideways, the empty hand passes by the clearance above its top."""
PLACED_RADIUS, PLACED_HEIGHT = 0.02, 0.015
"""The fingers open when the object is this close to its place, sideways and above."""
HASTY_RADIUS = 0.08
"""From this close to its place, sideways, an expert in a hurry may drop the object, while the hand moves on by a
hundredth a step. Bowls let go from 0.06 on stayed on the plate in 18 of 18 layouts, from 0.07 in 13, from 0.08 in 3 and
from 0.1 in none; the one out of the drawer always did, even from 0.12."""
LIFTED = 0.015
"""From this far above its way out an object is on its way."""
DONE_RADIUS, DONE_HEIGHT = 0.03, 0.025
"""An object this close to its place is not fetched again."""


@dataclass(frozen=True)
class Obstacle:
    """An upright box to pass above: centre (2,), yaw in radians, half sizes (2,), height of its top."""

    centre: np.ndarray
    yaw: float
    half_sizes: np.ndarray
    top: float

    def distance(self, point: np.ndarray) -> float:
        """How far `point` (2 or more numbers) is from the box sideways; 0 above it."""
        cos, sin = np.cos(self.yaw), np.sin(self.yaw)
        x, y = np.asarray(point)[:2] - self.centre
        local = np.array([cos * x + sin * y, cos * y - sin * x])
        return float(np.linalg.norm(np.maximum(np.abs(local) - self.half_sizes, 0.0)))


@dataclass(frozen=True)
class Hand:
    """The hand: position (3,), distance between the fingers, how fast that grows (m/s), the last gripper command."""

    position: np.ndarray
    gap: float
    gap_speed: float
    command: float


@dataclass(frozen=True)
class PickPlace:
    """Where an object is, where it shall be, and how to take hold of it.

    Attributes:
        object: (3,) the object's origin now.
        place: (3,) where its origin shall come.
        grasp: (3,) from the object's origin to the hand that takes hold of it.
        held_gap: with the object between them the fingers are closer than this.
        hover: how far above the grasp point the hand comes from.
        travel: how far above its place the object is carried.
        close_height: how far above the grasp point the fingers start to close.
        hold_radius: an object that is further than this from where the fingers hold it has been lost.
        carry_margin: obstacles closer than this to the carried object's origin, sideways, must be passed above.
        clearance: how far above an obstacle's top the carried object's origin must be.
        obstacles: what must be passed above.
        inside: closer than this to the grasp point, sideways, the hand goes down whatever stands around.
        way_out: (3,) where an object that lies under something is drawn to before it is lifted; None: lifted at once.
    """

    object: np.ndarray
    place: np.ndarray
    grasp: np.ndarray
    held_gap: float = 0.03
    hover: float = 0.1
    travel: float = 0.08
    close_height: float = 0.015
    hold_radius: float = 0.06
    carry_margin: float = 0.09
    clearance: float = 0.015
    obstacles: Sequence[Obstacle] = ()
    inside: float = INSIDE
    way_out: np.ndarray | None = None


@dataclass(frozen=True)
class Push:
    """What to push with closed fingers, and where to.

    Attributes:
        contact: (3,) where the hand must be to push the object as it lies now.
        ahead: (3,) from `contact` to where the hand pushes towards.
        slack: as long as the hand is this close to `contact`, it pushes; (sideways, above).
        patience: after so many steps of pushing it goes over to its next attempt.
        hover: how far above `contact` the hand comes from.
        obstacles: what the hand must pass above.
    """

    contact: np.ndarray
    ahead: np.ndarray
    slack: tuple[float, float]
    patience: float = np.inf
    hover: float = 0.1
    obstacles: Sequence[Obstacle] = ()


def is_noop(action: np.ndarray, last_gripper: float) -> bool:
    """Whether recordings leave this action (7,) out: it does not move, nor change the gripper's command."""
    return bool(np.linalg.norm(action[:6]) < NOOP_NORM and action[6] == last_gripper)


def speed(error: np.ndarray) -> np.ndarray:
    """The command, in [-1, 1], that reduces each component of a position error in metres."""
    return np.sign(error) * np.minimum((np.abs(error) / FULL_SPEED_ERROR) ** SPEED_POWER, 1.0)


def make_action(translation: np.ndarray, gripper: float) -> np.ndarray:
    """The action (7,) of a translation command (3,) and a gripper command; never a no-op."""
    action = np.zeros(ACTION_DIM, dtype=np.float32)
    action[:3], action[6] = translation, gripper
    if np.abs(action[:3]).max() < MIN_COMMAND:
        action[2] = MIN_COMMAND
    return action


def move_to(position: np.ndarray, goal: np.ndarray, gripper: float) -> np.ndarray:
    """The action that brings `position` (3,) straight to `goal` (3,)."""
    return make_action(speed(goal - position), gripper)


def move_over(
    position: np.ndarray,
    goal: np.ndarray,
    gripper: float,
    *,
    height: float,
    clear: float,
    near: float = np.inf,
) -> np.ndarray:
    """The action that brings `position` (3,) to `goal` (3,) from above.

    Args:
        position: the hand, or the object that it carries.
        goal: where that shall come.
        gripper: the gripper's command.
        height: how far above the goal it travels; the funnel around the goal leads down.
        clear: height that the obstacles at the present position demand.
        near: further from the goal than this, sideways, only `clear` keeps it from moving sideways.
    """
    offset = goal - position
    beside = float(np.hypot(offset[0], offset[1]))
    above = float(np.clip(FUNNEL_SLOPE * (beside - FUNNEL_RADIUS), 0.0, height))
    needed = max(goal[2] + above, clear)
    floor = needed if beside < near else clear
    translation = speed(np.array([offset[0], offset[1], needed - position[2]]))
    translation[:2] *= np.clip(1.0 - (floor - position[2]) / LOW_MARGIN, 0.0, 1.0)
    return make_action(translation, gripper)


def clear_height(point: np.ndarray, obstacles: Sequence[Obstacle], margin: float) -> float:
    """The highest top among the obstacles within `margin` of `point`, sideways; -inf without any."""
    return max(
        (obstacle.top for obstacle in obstacles if obstacle.distance(point) < margin),
        default=-np.inf,
    )


def _within(offset: np.ndarray, radius: float, height: float) -> bool:
    return bool(np.hypot(offset[0], offset[1]) < radius and offset[2] < height)


def is_held(hand: Hand, task: PickPlace) -> bool:
    """Whether the fingers have closed on the object."""
    return EMPTY_GAP < hand.gap < task.held_gap and hand.gap_speed > -CLOSING_SPEED


def pick_place(hand: Hand, task: PickPlace) -> np.ndarray:
    """The next action of fetching the object and bringing it to its place."""
    grasp_point = task.object + task.grasp
    offset = grasp_point - hand.position
    if hand.command == CLOSE and hand.gap > EMPTY_GAP and np.linalg.norm(offset) < task.hold_radius:
        return carry(hand, task) if is_held(hand, task) else close_fingers(hand, offset)
    if _within(task.object - task.place, DONE_RADIUS, DONE_HEIGHT):
        return make_action(np.zeros(3), OPEN)
    is_open = hand.gap > OPEN_GAP
    if hand.command == OPEN and is_open and _within(-offset, ALIGNED, task.close_height):
        return close_fingers(hand, offset)
    goal = grasp_point if is_open else grasp_point + np.array([0.0, 0.0, task.hover])
    return _approach(hand, goal, OPEN, task.hover, task.obstacles, task.inside)


def _approach(
    hand: Hand,
    goal: np.ndarray,
    gripper: float,
    hover: float,
    obstacles: Sequence[Obstacle],
    inside: float = INSIDE,
) -> np.ndarray:
    """The hand, holding nothing, comes to `goal` (3,) from above."""
    clear = -np.inf
    if not _within(goal - hand.position, inside, np.inf):
        clear = clear_height(hand.position, obstacles, HAND_MARGIN) + HAND_CLEARANCE
    return move_over(hand.position, goal, gripper, height=hover, clear=clear, near=NEAR)


def close_fingers(hand: Hand, offset: np.ndarray) -> np.ndarray:
    """Close them, while the hand covers the rest of its way, `offset` (3,), to the grasp point."""
    rest = offset if hand.gap > TOUCH_GAP else np.array([0.0, 0.0, offset[2]])
    return make_action(speed(rest), CLOSE)


def may_drop(hand: Hand, task: PickPlace) -> bool:
    """Whether the object is on its way and so close to its place that it could be dropped there."""
    offset = task.object - task.place
    return hand.command == CLOSE and is_held(hand, task) and _within(offset, HASTY_RADIUS, np.inf)


def carry(hand: Hand, task: PickPlace) -> np.ndarray:
    """Bring the object that the hand holds to its place, and open the fingers there."""
    if _within(task.object - task.place, PLACED_RADIUS, PLACED_HEIGHT):
        return move_to(task.object, task.place, OPEN)
    if task.way_out is not None:
        rest = task.way_out - task.object
        if rest[2] > -LIFTED and FUNNEL_RADIUS < np.hypot(rest[0], rest[1]) < INSIDE:
            return move_to(task.object, task.way_out, CLOSE)
    clear = -np.inf
    if not _within(task.object - task.place, INSIDE, np.inf):
        clear = clear_height(task.object, task.obstacles, task.carry_margin) + task.clearance
    return move_over(task.object, task.place, CLOSE, height=task.travel, clear=clear)


def is_pushing(hand: Hand, task: Push) -> bool:
    """Whether the hand is where it can push the object."""
    return _within(hand.position - task.contact, *task.slack)


def push(hand: Hand, task: Push) -> np.ndarray:
    """The next action of pushing the object along its way with closed fingers."""
    if is_pushing(hand, task):
        return move_to(hand.position, task.contact + task.ahead, CLOSE)
    return _approach(hand, task.contact, CLOSE, task.hover, task.obstacles)
