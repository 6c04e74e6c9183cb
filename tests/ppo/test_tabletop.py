"""The tabletop world: its physics, its fixed states, its operators, and that image and instruction are both needed."""

import hashlib

import numpy as np
import pytest

from ppo.envs.base import Environment, ResetRequest, get_suite
from ppo.envs.tabletop import MAX_STEPS, NUM_INIT_STATES, SUITE, TabletopEnv
from ppo.envs.tabletop_expert import TabletopExpert, run_expert_episode
from ppo.envs.tabletop_pretraining import instructions, make_frame
from ppo.envs.tabletop_world import (
    CONTACT_HEIGHT,
    FIRM_HEIGHT,
    GRASP_RADIUS,
    TARGET_RADIUS,
    TASKS,
    Item,
    World,
    random_world,
)

SIZE = 16
OPEN, CLOSE = -1.0, 1.0
PICK, PUSH = TASKS[0], TASKS[8]


def action(dx=0.0, dy=0.0, dz=0.0, grip=OPEN):
    return np.array([dx, dy, dz, 0, 0, 0, grip], dtype=np.float32)


def small_world(gripper, closed=False):
    """A red block at (0.3, 0.5), a blue plate at (0.7, 0.5), an orange mat at (0.7, 0.1)."""
    block = Item("red block", np.array([0.3, 0.5]))
    plate, mat = Item("blue plate", np.array([0.7, 0.5])), Item("orange mat", np.array([0.7, 0.1]))
    return World([block], [plate, mat], np.array(gripper, dtype=float), closed)


class Still:
    """A generator without noise; a slip happens when `roll` is below the slip probability."""

    def __init__(self, roll=1.0):
        self.roll = roll

    def normal(self, size):
        return np.zeros(size)

    def random(self):
        return self.roll


def success_rate(run, num_episodes=500):
    return np.mean([run(index % len(TASKS), index // len(TASKS)) for index in range(num_episodes)])


def test_careful_operator_solves_the_fixed_states():
    env = TabletopEnv(SIZE)
    episodes = [
        run_expert_episode(env, ResetRequest(task, state, 0), 0.0, np.random.default_rng(0))
        for task in range(len(TASKS))
        for state in range(NUM_INIT_STATES)
    ]
    assert np.mean([episode.success for episode in episodes]) >= 0.98
    assert 7 <= np.mean([len(episode.actions) for episode in episodes]) <= 10
    values = np.unique(np.concatenate([episode.actions for episode in episodes])[:, :3])
    assert set(values) <= {-1.0, -0.5, 0.0, 0.5, 1.0}


def test_rushing_costs_success_step_by_step():
    env = TabletopEnv(SIZE)
    rates = []
    for imperfection in (0.0, 0.5, 1.0):
        rng = np.random.default_rng(1)
        rates.append(
            success_rate(
                lambda task, index, rng=rng, imperfection=imperfection: (
                    run_expert_episode(
                        env, ResetRequest(task, None, index), imperfection, rng
                    ).success
                ),
                300,
            )
        )
    assert rates[0] > 0.97 and 0.7 < rates[1] < 0.9 and 0.4 < rates[2] < 0.65, rates


def test_a_wrong_instruction_fails():
    env = TabletopEnv(SIZE)
    rng = np.random.default_rng(2)
    results = []
    for index in range(300):
        request = ResetRequest(index % len(TASKS), None, index)
        env.reset(request)
        names = {item.name for item in (*env.world.objects, *env.world.receptacles)}
        possible = [t for t in TASKS if t != env.task and {t.target, t.receptacle} <= names]
        if possible:
            results.append(
                run_expert_episode(env, request, 0.0, rng, possible[index % len(possible)]).success
            )
    assert len(results) > 150 and np.mean(results) < 0.15


def test_a_policy_that_does_not_look_fails():
    """It plays what the careful operator did in another layout of the same task."""
    env = TabletopEnv(SIZE)

    def blind(task, index):
        seen = run_expert_episode(
            env, ResetRequest(task, None, 10_000 + index), 0.0, np.random.default_rng(0)
        )
        env.reset(ResetRequest(task, None, index))
        for step in seen.actions:
            result = env.step(step)
            if result.terminated or result.truncated:
                break
        return result.success

    assert success_rate(blind, 200) < 0.15


def test_every_scene_offers_a_wrong_choice():
    """Target and receptacle cannot be guessed: each scene has two other objects and another receptacle."""
    for seed, task in enumerate(TASKS * 5):
        world = random_world(np.random.default_rng(seed), task)
        objects = [item.name for item in world.objects]
        receptacles = [item.name for item in world.receptacles]
        assert len(set(objects)) == 3 and task.target in objects
        assert len(set(receptacles)) == 2 and task.receptacle in receptacles


def test_fixed_states_never_change():
    """The digest pins the 500 layouts that reported numbers rest on; a new one makes old results incomparable."""
    env = TabletopEnv(SIZE)
    digest = hashlib.sha256()
    for task in range(len(TASKS)):
        for state in range(NUM_INIT_STATES):
            env.reset(ResetRequest(task, state, seed=state + 3))
            items = [*env.world.objects, *env.world.receptacles]
            digest.update(
                repr([(i.name, np.round(i.position, 6).tolist()) for i in items]).encode()
            )
            digest.update(repr(np.round(env.world.gripper, 6).tolist()).encode())
    assert digest.hexdigest()[:16] == "30dabd5b44fda6be"


def test_an_episode_is_reproducible_and_its_seed_decides_the_noise():
    env = TabletopEnv(32)

    def roll(request):
        first = env.reset(request)
        return first, np.stack([env.step(action(0.5, 0.5, -0.5)).image for _ in range(4)])

    request = ResetRequest(3, 7, seed=1)
    first, images = roll(request)
    first_again, images_again = roll(request)
    other_first, other_images = roll(ResetRequest(3, 7, seed=2))
    assert (first == first_again).all() and (images == images_again).all()
    assert (first == other_first).all() and (images != other_images).any()
    assert (roll(ResetRequest(3, None, seed=1))[0] != first).any()
    assert (
        TabletopEnv(32, seed=5).reset(ResetRequest(3, None, 1))
        != env.reset(ResetRequest(3, None, 1))
    ).any()


@pytest.mark.parametrize(
    "gripper, closed, grip, holds",
    [
        ((0.3, 0.5, 0.0), False, CLOSE, True),
        ((0.3, 0.5, CONTACT_HEIGHT - 0.02), False, CLOSE, True),
        ((0.3, 0.5, CONTACT_HEIGHT + 0.02), False, CLOSE, False),
        ((0.42, 0.5, 0.0), False, CLOSE, False),
        ((0.3 + GRASP_RADIUS + 0.01, 0.5, 0.0), False, CLOSE, False),
        ((0.3 + GRASP_RADIUS - 0.01, 0.5, 0.0), False, CLOSE, True),
        ((0.3, 0.5, 0.0), False, OPEN, False),
    ],
)
def test_a_grasp_needs_position_height_and_fingers_that_close(gripper, closed, grip, holds):
    world = small_world(gripper, closed)
    world.move(action(grip=grip), Still())
    assert (world.held is world.objects[0] and not world.pressed) == holds


def test_closed_fingers_press_but_never_grasp():
    world = small_world((0.3, 0.5, 0.2), closed=True)
    world.move(action(dz=-1, grip=CLOSE), Still())
    assert world.held is world.objects[0] and world.pressed and world.firm
    for _ in range(2):
        world.move(action(dx=1, grip=CLOSE), Still())
    assert np.allclose(world.objects[0].position, (0.7, 0.5)) and world.objects[0].height == 0
    world.move(action(dz=1, grip=CLOSE), Still())
    assert world.held is not None
    world.move(action(dz=1, grip=CLOSE), Still())
    assert world.held is None


def test_success_only_after_release_on_the_right_receptacle():
    world = small_world((0.3, 0.5, 0.0))
    world.move(action(grip=CLOSE), Still())
    for step in (action(1, grip=CLOSE), action(1, grip=CLOSE)):
        world.move(step, Still())
    assert np.allclose(world.objects[0].position, (0.7, 0.5)) and not world.solved(PICK)
    world.move(action(grip=OPEN), Still())
    assert world.solved(PICK) and not world.solved(
        TASKS[1].__class__("pick", "red block", "orange mat")
    )
    assert not world.solved(PICK.__class__("push", "red block", "blue plate")), (
        "grasped, not pushed"
    )
    world.objects[0].position = np.array([0.7 + TARGET_RADIUS + 0.01, 0.5])
    assert not world.solved(PICK)


def test_pushing_is_not_picking():
    world = small_world((0.3, 0.5, 0.4), closed=True)
    route = (
        [action(dz=-1, grip=CLOSE)] * 2
        + [action(dx=1, grip=CLOSE)] * 2
        + [action(dz=1, grip=CLOSE)] * 2
    )
    for step in route:
        world.move(step, Still())
    assert world.solved(PICK.__class__("push", "red block", "blue plate")) and not world.solved(
        PICK
    )


@pytest.mark.parametrize("height, slips", [(FIRM_HEIGHT - 0.02, False), (FIRM_HEIGHT + 0.05, True)])
def test_only_a_loose_hold_slips(height, slips):
    world = small_world((0.3, 0.5, height))
    world.move(action(grip=CLOSE), Still())
    world.move(action(dz=0.5, grip=CLOSE), Still(roll=0.0))
    assert world.held is not None, "standing still"
    world.move(action(dx=1, grip=CLOSE), Still(roll=0.0))
    assert (world.held is None) == slips


def test_a_high_drop_scatters_and_a_low_one_does_not():
    def drop(height):
        world = small_world((0.7, 0.5, height), closed=True)
        world.held = world.objects[0]
        world.move(action(grip=OPEN), np.random.default_rng(0))
        return np.hypot(*(world.objects[0].position - world.gripper[:2]))

    assert drop(0.2) > 0.02 > drop(0.02)


def test_time_limit_truncates_and_success_terminates():
    env = TabletopEnv(SIZE, max_steps=3)
    env.reset(ResetRequest(0, 0, 0))
    results = [env.step(action()) for _ in range(3)]
    assert [r.truncated for r in results] == [False, False, True] and not any(
        r.terminated for r in results
    )
    episode = run_expert_episode(
        TabletopEnv(SIZE), ResetRequest(0, 0, 0), 0.0, np.random.default_rng(0)
    )
    limit = len(episode.actions)
    env = TabletopEnv(SIZE, max_steps=limit)
    env.reset(ResetRequest(0, 0, 0))
    last = [env.step(step) for step in episode.actions][-1]
    assert last.terminated and not last.truncated, "solved in the very last step"
    assert episode.success and episode.rewards.tolist() == [0.0] * (len(episode.actions) - 1) + [
        1.0
    ]
    assert (
        len(episode.images)
        == len(episode.states)
        == len(episode.joint_states)
        == len(episode.actions)
    )


def test_the_picture_shows_height_fingers_and_hold():
    env = TabletopEnv(56)
    env.reset(ResetRequest(0, 0, 0))
    world = env.world
    world.gripper[:] = (0.5, 0.5, 0.2)
    base = env.render(56).astype(int)
    world.gripper[2] = 0.05
    lower = env.render(56).astype(int)
    world.closed = True
    closed = env.render(56).astype(int)
    world.held = world.item("red block")
    held = env.render(56).astype(int)
    for one, other in ((base, lower), (lower, closed), (closed, held)):
        assert (np.abs(one - other).max(axis=2) > 40).sum() >= 15
    assert env.render(40).shape == (40, 40, 3) and env.render(256).dtype == np.uint8


def test_bad_requests_are_refused():
    env = TabletopEnv(SIZE)
    assert (
        isinstance(env, Environment)
        and get_suite("tabletop") is SUITE
        and SUITE.max_steps == MAX_STEPS
    )
    for request in (ResetRequest(10, None, 0), ResetRequest(0, 50, 0)):
        with pytest.raises(ValueError, match="tabletop has"):
            env.reset(request)
    env.reset(ResetRequest(0, 0, 0))
    for bad in (np.zeros(6), np.full(7, np.nan)):
        with pytest.raises(ValueError, match="7 finite numbers"):
            env.step(bad)
    with pytest.raises(ValueError, match="probability"):
        TabletopExpert(env, 1.5, np.random.default_rng(0))


def test_pretraining_never_asks_a_task_and_answers_like_the_operator():
    assert not set(instructions()) & set(SUITE.instructions)
    kinds = ("point", "move", "height", "hold", "carry")
    frames = [make_frame(np.random.default_rng(seed), 32, kinds) for seed in range(100)]
    assert {text for frame in frames for text in frame.instructions} <= set(instructions())
    answers = np.concatenate([frame.answers for frame in frames])
    assert np.abs(answers).max() <= 1.0 and (answers[:, 3:6] == 0).all()
    assert set(np.unique(answers[:, 6])) == {0.0, 1.0}
