"""Questions about single tabletop pictures, for the base model: grounding and single motions, no task.

A frame is a random scene in a random state (gripper anywhere, open or closed, possibly holding something). A question
is an instruction whose answer, in the same seven numbers as an action, follows from the frame alone: where a named
thing is, how high the gripper is, whether something is held, one step towards a thing. None of the ten tasks'
sentences is among them, and no answer says when to take hold of or to let go of anything.
"""

from dataclasses import dataclass

import numpy as np

from ppo.envs.base import ACTION_DIM
from ppo.envs.tabletop_render import render_world
from ppo.envs.tabletop_world import (
    MAX_HEIGHT,
    MOVE_STEP,
    OBJECTS,
    RECEPTACLES,
    Item,
    World,
    random_world,
)

STEP_HEIGHTS = {
    "lower the gripper": 0.0,
    "move the gripper to middle height": 0.2,
    "lift the gripper": 0.4,
}
FINE_RANGE = 0.5
"""Table units that the finest answers ("point to ...") map to the action range [-1, 1]."""


@dataclass
class Frame:
    """One picture with its questions: (H, W, 3) uint8, instructions, and answers (number of questions, 7) float32.

    Answers are in the model's convention: [-1, 1], the gripper 1 = open and 0 = closed.
    """

    image: np.ndarray
    instructions: list[str]
    answers: np.ndarray


def random_state(rng: np.random.Generator) -> World:
    """A random scene with the gripper in a random pose, near something more often than not."""
    world = random_world(rng)
    world.gripper = np.append(rng.random(2), rng.uniform(0.0, MAX_HEIGHT))
    anchor = [*world.objects, *world.receptacles][rng.integers(5)]
    if rng.random() < 0.6:
        world.gripper[:2] = np.clip(anchor.position + rng.uniform(-0.22, 0.22, 2), 0.0, 1.0)
    if rng.random() < 0.3:
        rider = world.objects[rng.integers(len(world.objects))]
        rider.position = world.receptacles[rng.integers(2)].position + rng.uniform(-0.1, 0.1, 2)
    world.closed = bool(rng.random() < 0.55)
    if world.closed and rng.random() < 0.6:
        world.held = world.objects[rng.integers(len(world.objects))]
        world.held.position = world.gripper[:2].copy()
        world.pressed = bool(rng.random() < 0.3)
        if world.pressed:
            world.gripper[2] *= 0.3 / MAX_HEIGHT
        else:
            world.held.height = float(world.gripper[2])
    return world


def _steps(delta: np.ndarray) -> np.ndarray:
    """Table units to motion answers: multiples of 0.5 in [-1, 1], like the operator's."""
    return np.clip(np.round(2.0 * delta / MOVE_STEP) / 2.0, -1.0, 1.0)


def _question(kind: str, world: World, rng: np.random.Generator) -> tuple[str, np.ndarray]:
    """One question of a kind and its answer."""
    answer = np.zeros(ACTION_DIM, dtype=np.float32)
    answer[6] = 0.0 if world.closed else 1.0
    items: list[Item] = [*world.objects, *world.receptacles]
    item = items[rng.integers(len(items))]
    if kind == "point":
        answer[:2] = np.clip((item.position - world.gripper[:2]) / FINE_RANGE, -1.0, 1.0)
        answer[2] = world.gripper[2] / MAX_HEIGHT
        return f"point to the {item.name}", answer
    if kind == "move":
        answer[:2] = _steps(item.position - world.gripper[:2])
        return f"move to the {item.name}", answer
    if kind == "height":
        text = list(STEP_HEIGHTS)[rng.integers(len(STEP_HEIGHTS))]
        answer[2] = _steps(STEP_HEIGHTS[text] - world.gripper[2])
        return text, answer
    if kind == "hold":
        thing = (
            world.held
            if world.held is not None and rng.random() < 0.5
            else world.objects[rng.integers(3)]
        )
        answer[6] = 0.0 if world.held is thing else 1.0
        return f"hold the {thing.name} or open the gripper", answer
    assert kind == "carry", kind
    thing = (
        world.held
        if world.held is not None and rng.random() < 0.5
        else world.objects[rng.integers(3)]
    )
    place = world.receptacles[rng.integers(2)]
    goal = place if world.held is thing else thing
    answer[:2] = _steps(goal.position - world.gripper[:2])
    return f"move with the {thing.name} to the {place.name}", answer


def instructions() -> list[str]:
    """Every instruction that a question can have."""
    names = [*OBJECTS, *RECEPTACLES]
    texts = [f"{verb} to the {name}" for verb in ("point", "move") for name in names]
    texts += list(STEP_HEIGHTS) + [f"hold the {name} or open the gripper" for name in OBJECTS]
    return texts + [
        f"move with the {thing} to the {place}" for thing in OBJECTS for place in RECEPTACLES
    ]


def make_frame(rng: np.random.Generator, image_size: int, kinds: tuple[str, ...]) -> Frame:
    """Draw a frame with one question of each kind.

    Args:
        rng: decides everything.
        image_size: pixels a side.
        kinds: which questions, of "point", "move", "height", "hold", "carry"; one of each is asked.
    """
    world = random_state(rng)
    image = render_world(world, image_size)
    texts, answers = zip(*(_question(kind, world, rng) for kind in kinds), strict=True)
    return Frame(image, list(texts), np.stack(answers))
