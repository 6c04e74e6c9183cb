"""The tabletop world without pictures: its items, tasks, layouts and dynamics.

Lengths are in table units: the workspace is the unit square (x right, y towards the camera), height z is up from
the table. One action moves the gripper by at most `MOVE_STEP` along each axis. All randomness (layout, actuation
noise, slips, scatter) comes from one generator that the caller gives.
"""

from dataclasses import dataclass, field

import numpy as np

MOVE_STEP = 0.2
"""Table units that an action component of 1 moves the gripper."""
NOISE_XY, NOISE_Z = 0.012, 0.008
"""Standard deviation of the actuation noise per step, so that a memoryless policy cannot repeat a state for ever."""
MAX_HEIGHT = 0.5
GRASP_RADIUS = 0.095
"""Fingers and object centre may be this far apart, seen from above, for a grasp or a press to take hold."""
FIRM_HEIGHT, CONTACT_HEIGHT = 0.11, 0.3
"""At or below FIRM_HEIGHT a hold is firm; up to CONTACT_HEIGHT it takes hold, but loosely; above it, not at all."""
SLIP_PROBABILITY = 0.4
"""Chance per moving step that a loosely held or lightly pressed object slips out of the fingers."""
SLIP_SCATTER = 0.08
"""Standard deviation per axis of how far a slipped object rolls, in table units."""
SCATTER_PER_HEIGHT = 1.8
"""Standard deviation per axis of where a dropped object comes to rest, per unit of height above FIRM_HEIGHT."""
TARGET_RADIUS = 0.13
"""An object's centre is on a receptacle when it is this close to the receptacle's centre."""

OBJECT_RADIUS, RECEPTACLE_RADIUS = 0.08, 0.155
OBJECTS = ("red block", "green block", "yellow ball", "purple ball")
RECEPTACLES = ("blue plate", "white bowl", "orange mat")
NUM_SCENE_OBJECTS, NUM_SCENE_RECEPTACLES = 3, 2


@dataclass(frozen=True)
class Task:
    """One language task: `verb` is "pick" (grasp, carry, release) or "push" (press down, slide, rise)."""

    verb: str
    target: str
    receptacle: str

    @property
    def instruction(self) -> str:
        """What the policy reads."""
        if self.verb == "push":
            return f"push the {self.target} onto the {self.receptacle}"
        preposition = "in" if self.receptacle.endswith("bowl") else "on"
        return f"pick up the {self.target} and place it {preposition} the {self.receptacle}"


TASKS = (
    Task("pick", "red block", "blue plate"),
    Task("pick", "red block", "white bowl"),
    Task("pick", "green block", "blue plate"),
    Task("pick", "green block", "orange mat"),
    Task("pick", "yellow ball", "white bowl"),
    Task("pick", "yellow ball", "orange mat"),
    Task("pick", "purple ball", "blue plate"),
    Task("pick", "purple ball", "white bowl"),
    Task("push", "red block", "orange mat"),
    Task("push", "purple ball", "orange mat"),
)


@dataclass
class Item:
    """A thing on the table.

    `position` is (x, y) of its centre, `height` that of its underside; `moved_by` says how the gripper took hold of it
    last: "grasp" (between the fingers), "press" (under closed fingers), or "" (not at all).
    """

    name: str
    position: np.ndarray
    height: float = 0.0
    moved_by: str = ""


@dataclass
class World:
    """The state of one table.

    Attributes:
        objects, receptacles: what lies there; receptacles never move.
        gripper: (3,) x, y, z of the fingertips.
        closed: whether the fingers are closed.
        held: the object between the fingers, or under them (`pressed`).
        pressed: the held object is only pressed onto the table by the closed fingers.
        firm: the hold cannot slip.
    """

    objects: list[Item]
    receptacles: list[Item]
    gripper: np.ndarray
    closed: bool = False
    held: Item | None = None
    pressed: bool = False
    firm: bool = False
    _by_name: dict[str, Item] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._by_name = {item.name: item for item in (*self.objects, *self.receptacles)}

    def item(self, name: str) -> Item:
        """The item of that name; KeyError when the scene has none."""
        return self._by_name[name]

    def move(self, action: np.ndarray, rng: np.random.Generator) -> None:
        """Apply one action (7,) in LIBERO's raw convention: first the motion, then the fingers."""
        command = np.clip(np.asarray(action, dtype=np.float64), -1.0, 1.0)
        noise = rng.normal(size=3) * (NOISE_XY, NOISE_XY, NOISE_Z)
        slip_roll, scatter = rng.random(), rng.normal(size=2)
        moves_sideways = bool(np.abs(command[:2]).max() > 0.1)
        self.gripper = np.clip(
            self.gripper + MOVE_STEP * command[:3] + noise, 0.0, (1.0, 1.0, MAX_HEIGHT)
        )
        if (
            self.held is not None
            and not self.firm
            and moves_sideways
            and slip_roll < SLIP_PROBABILITY
        ):
            self._let_go(scatter * SLIP_SCATTER)
        self._carry()
        if command[6] > 0 and not self.closed:
            self.closed = True
            self._grasp()
        elif command[6] < 0 and self.closed:
            self.closed = False
            if self.held is not None:
                drop = max(0.0, self.gripper[2] - FIRM_HEIGHT)
                self._let_go(scatter * SCATTER_PER_HEIGHT * drop)
        elif self.closed and self.held is None:
            self._press()

    def solved(self, task: Task) -> bool:
        """Whether the task's object lies free on its receptacle, brought there in the way the verb says."""
        target, receptacle = self.item(task.target), self.item(task.receptacle)
        if (
            self.held is target
            or np.hypot(*(target.position - receptacle.position)) > TARGET_RADIUS
        ):
            return False
        return target.moved_by == {"pick": "grasp", "push": "press"}[task.verb]

    def _carry(self) -> None:
        """Let the held object follow the gripper; a pressed one stays behind once the fingers rise."""
        if self.held is None:
            return
        if self.pressed:
            if self.gripper[2] > CONTACT_HEIGHT:
                self._let_go(np.zeros(2))
                return
            self.firm = bool(self.gripper[2] <= FIRM_HEIGHT)
        else:
            self.held.height = float(self.gripper[2])
        self.held.position = self.gripper[:2].copy()

    def _reachable(self) -> Item | None:
        """The object under the fingers that they can take hold of, or None."""
        if self.gripper[2] > CONTACT_HEIGHT:
            return None
        nearest = min(
            self.objects, key=lambda item: float(np.hypot(*(item.position - self.gripper[:2])))
        )
        return nearest if np.hypot(*(nearest.position - self.gripper[:2])) <= GRASP_RADIUS else None

    def _grasp(self) -> None:
        """Close the fingers around what is between them."""
        self.held, self.pressed = self._reachable(), False
        self.firm = bool(self.gripper[2] <= FIRM_HEIGHT)
        if self.held is not None:
            self.held.moved_by = "grasp"
        self._carry()

    def _press(self) -> None:
        """Closed fingers that come down onto an object press it to the table."""
        self.held, self.pressed = self._reachable(), True
        if self.held is not None:
            self.held.moved_by = "press"
        self._carry()

    def _let_go(self, offset: np.ndarray) -> None:
        """Drop the held object where it is plus `offset`; it stays on the table and off other objects' centres."""
        assert self.held is not None
        self.held.position = np.clip(self.held.position + offset, 0.05, 0.95)
        self.held.height = 0.0
        self.held, self.pressed = None, False


def _place(radii_gap: list[np.ndarray], gaps: list[float], rng: np.random.Generator) -> np.ndarray:
    """A random point of the table that keeps its distance from the points placed so far."""
    for _ in range(60):
        point = rng.uniform((0.12, 0.12), (0.88, 0.9))
        if all(
            np.hypot(*(point - other)) >= gap for other, gap in zip(radii_gap, gaps, strict=True)
        ):
            return point
    raise _Crowded


class _Crowded(Exception):
    """No room was left for the next item; the whole layout is drawn again."""


def _try_layout(
    num_receptacles: int, num_objects: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """Centres of the receptacles, then of the objects, none touching another."""
    points: list[np.ndarray] = []
    for index in range(num_receptacles + num_objects):
        is_receptacle = index < num_receptacles
        gaps = [
            (0.36 if is_receptacle else 0.29) if other < num_receptacles else 0.24
            for other in range(index)
        ]
        points.append(_place(points, gaps, rng))
    return points


def random_world(rng: np.random.Generator, task: Task | None = None) -> World:
    """Draw a table at the start of an episode.

    The scene holds three of the four objects and two of the three receptacles, among them the task's; which others,
    and where everything lies, is random. Without a task any of them may be missing (pre-training).
    """
    objects = _choose(OBJECTS, NUM_SCENE_OBJECTS, task.target if task else None, rng)
    receptacles = _choose(
        RECEPTACLES, NUM_SCENE_RECEPTACLES, task.receptacle if task else None, rng
    )
    while True:
        try:
            points = _try_layout(len(receptacles), len(objects), rng)
            break
        except _Crowded:
            continue
    gripper = rng.uniform((0.2, 0.2, 0.36), (0.8, 0.8, 0.46))
    items = [
        Item(name, point) for name, point in zip([*receptacles, *objects], points, strict=True)
    ]
    return World(items[len(receptacles) :], items[: len(receptacles)], gripper)


def _choose(
    names: tuple[str, ...], count: int, needed: str | None, rng: np.random.Generator
) -> list[str]:
    """`count` of the names in random order, `needed` among them."""
    others = [name for name in rng.permutation(names).tolist() if name != needed]
    chosen = ([needed] if needed else []) + others
    return rng.permutation(chosen[:count]).tolist()
