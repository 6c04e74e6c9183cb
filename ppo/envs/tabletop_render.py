"""Draws a tabletop world as a camera above its near edge sees it.

Everything is anti-aliased with sub-pixel coordinates, so positions can be read far below one pixel. Height lifts a
thing upwards in the image; its shadow stays below it, which is how one sees how high the gripper is. Open fingers
stand apart with a light palm, closed ones together with a dark palm.
"""

import cv2
import numpy as np

from ppo.envs.tabletop_world import OBJECT_RADIUS, RECEPTACLE_RADIUS, Item, World

_SHIFT = 4
_SCALE = 0.86
_LEFT, _TOP = 0.07, 0.13
_LIFT = 0.45
_TABLE = (196, 180, 160)
_SHADOW = (128, 116, 104)
_COLORS = {
    "red": (214, 40, 40),
    "green": (40, 160, 60),
    "yellow": (245, 215, 40),
    "purple": (140, 60, 190),
    "blue": (40, 90, 220),
    "white": (245, 245, 245),
    "orange": (240, 130, 20),
}
_PALM_OPEN, _PALM_CLOSED, _FINGER = (225, 235, 240), (20, 20, 25), (70, 75, 85)


class _Canvas:
    """An image that takes table units; `size` pixels a side."""

    def __init__(self, size: int):
        self.size = size
        self.image = np.empty((size, size, 3), dtype=np.uint8)
        self.image[:] = _TABLE

    def _length(self, units: float) -> int:
        return max(1, round(units * _SCALE * self.size * (1 << _SHIFT)))

    def _point(self, x: float, y: float, z: float) -> tuple[int, int]:
        unit = self.size * (1 << _SHIFT)
        half_pixel = (1 << _SHIFT) // 2
        row = _TOP + _SCALE * (y - _LIFT * z)
        return round((_LEFT + _SCALE * x) * unit) - half_pixel, round(row * unit) - half_pixel

    def ellipse(
        self, x: float, y: float, z: float, radius: float, color: tuple, flat: float = 1.0
    ) -> None:
        """A filled ellipse, `flat` times as high as wide."""
        axes = (self._length(radius), self._length(radius * flat))
        if flat == 1.0:
            cv2.circle(self.image, self._point(x, y, z), axes[0], color, -1, cv2.LINE_AA, _SHIFT)
        else:
            cv2.ellipse(
                self.image, self._point(x, y, z), axes, 0, 0, 360, color, -1, cv2.LINE_AA, _SHIFT
            )

    def box(
        self, x: float, y: float, z: float, half_width: float, half_height: float, color: tuple
    ) -> None:
        """A filled upright rectangle around a point."""
        u, v = self._point(x, y, z)
        w, h = self._length(half_width), self._length(half_height)
        corners = np.array(
            [(u - w, v - h), (u + w, v - h), (u + w, v + h), (u - w, v + h)], dtype=np.int32
        )
        cv2.fillConvexPoly(self.image, corners, color, cv2.LINE_AA, _SHIFT)


def _shade(color: tuple, factor: float) -> tuple:
    return tuple(int(min(255, channel * factor)) for channel in color)


def _draw_receptacle(canvas: _Canvas, item: Item) -> None:
    color_name, kind = item.name.split()
    color, (x, y), radius = _COLORS[color_name], item.position, RECEPTACLE_RADIUS
    if kind == "mat":
        canvas.box(x, y, 0, radius, radius, color)
        canvas.box(x, y, 0, radius * 0.7, radius * 0.7, _shade(color, 0.82))
        return
    canvas.ellipse(x, y, 0, radius, color)
    canvas.ellipse(
        x, y, 0, radius * 0.72, _shade(color, 1.3) if kind == "plate" else _shade(color, 0.8)
    )


def _draw_object(canvas: _Canvas, item: Item) -> None:
    color_name, kind = item.name.split()
    color, (x, y), z, radius = _COLORS[color_name], item.position, item.height, OBJECT_RADIUS
    if kind == "block":
        canvas.box(x, y, z, radius * 0.92, radius * 0.92, _shade(color, 0.7))
        canvas.box(x, y - 0.015, z, radius * 0.92, radius * 0.72, color)
        return
    canvas.ellipse(x, y, z, radius, color)
    canvas.ellipse(x - 0.025, y - 0.025, z, radius * 0.35, _shade(color, 1.5))


def _draw_gripper(canvas: _Canvas, world: World) -> None:
    x, y, z = world.gripper
    gap = 0.12 if not world.closed else 0.035 if world.held is None or world.pressed else 0.085
    for side in (-1, 1):
        canvas.box(x + side * gap, y - 0.05, z, 0.024, 0.075, _FINGER)
    canvas.box(x, y - 0.15, z, 0.135, 0.035, _PALM_CLOSED if world.closed else _PALM_OPEN)


def render_world(world: World, size: int) -> np.ndarray:
    """Draw the world: (size, size, 3) uint8 RGB, upright (the robot's side is at the top)."""
    canvas = _Canvas(size)
    for item in world.receptacles:
        _draw_receptacle(canvas, item)
    x, y, z = world.gripper
    canvas.ellipse(x, y + 0.02, 0, 0.1 - 0.06 * z, _SHADOW, flat=0.6)
    for item in sorted(world.objects, key=lambda item: item.position[1]):
        if item is not world.held:
            _draw_object(canvas, item)
    if world.held is not None:
        _draw_object(canvas, world.held)
    _draw_gripper(canvas, world)
    return canvas.image
