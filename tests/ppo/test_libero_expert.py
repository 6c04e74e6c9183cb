"""LIBERO's scripted expert: its decisions one by one, whole episodes in a toy world, and a few in the simulator."""

from types import SimpleNamespace

import numpy as np
import pytest

from ppo.envs import libero_expert_motion as motion
from ppo.envs.base import ResetRequest
from ppo.envs.libero_expert import EXPERT_TASKS, LiberoExpert, run_expert_episode
from ppo.envs.libero_expert_motion import CLOSE, OPEN, Hand, Obstacle, PickPlace, Push
from prismatic.vla.datasets.writer import noop_steps

OPEN_GAP, RIM_GAP = 0.079, 0.012
BOWL, PLATE, GRASP = (
    np.array([-0.06, 0.2, 0.9]),
    np.array([0.05, -0.1, 0.91]),
    np.array([0.0, 0.046, 0.03]),
)


def task(**changes) -> PickPlace:
    return PickPlace(**({"object": BOWL, "place": PLATE, "grasp": GRASP} | changes))


def hand(
    offset=(0.0, 0.0, 0.0), gap=OPEN_GAP, gap_speed=0.0, command=OPEN, origin=BOWL + GRASP
) -> Hand:
    """A hand at an offset from the grasp point."""
    return Hand(origin + np.array(offset), gap, gap_speed, command)


# --- The control law ---


def test_speed_is_odd_grows_with_the_error_and_saturates():
    errors = np.array([0.0005, 0.001, 0.005, 0.02, motion.FULL_SPEED_ERROR, 0.3])
    speeds = motion.speed(errors)
    np.testing.assert_allclose(motion.speed(-errors), -speeds)
    assert np.all(np.diff(speeds[:5]) > 0) and speeds[4] == speeds[5] == 1.0
    np.testing.assert_allclose(
        motion.speed(np.array([motion.FULL_SPEED_ERROR / 2])), 0.5**motion.SPEED_POWER
    )


def test_no_action_is_a_noop_even_without_any_error():
    action = motion.move_to(BOWL, BOWL, OPEN)
    assert not motion.is_noop(action, OPEN) and np.abs(action[:6]).max() <= motion.MIN_COMMAND
    nothing = np.array([0, 0, 5e-5, 0, 0, 0, CLOSE])
    assert motion.is_noop(nothing, CLOSE) and not motion.is_noop(nothing, OPEN)


def test_distance_to_an_obstacle_turned_by_a_quarter():
    obstacle = Obstacle(np.array([1.0, 2.0]), np.pi / 2, np.array([0.3, 0.1]), 1.2)
    assert obstacle.distance(np.array([1.05, 2.25, 7.0])) == 0.0  # its long side lies along y
    np.testing.assert_allclose(obstacle.distance(np.array([1.4, 2.0])), 0.3)
    np.testing.assert_allclose(obstacle.distance(np.array([1.4, 2.7])), 0.5)


def test_moving_over_rises_first_then_goes_sideways_then_comes_down():
    def over(position, **options):
        options = {"height": 0.1, "clear": -np.inf} | options
        return motion.move_over(np.array(position), np.zeros(3), CLOSE, **options)

    np.testing.assert_array_equal(over([0.5, 0.0, 0.0])[:3], [0, 0, 1])  # too low: straight up
    np.testing.assert_array_equal(over([0.5, 0.0, 0.1])[:2], [-1, 0])
    half = over([0.5, 0.0, 0.1 - motion.LOW_MARGIN / 2])
    assert half[0] == pytest.approx(-0.5) and half[2] > 0
    np.testing.assert_array_equal(
        over([0.0, 0.0, 0.1])[:3], [0, 0, -1]
    )  # in the middle of the funnel: down
    assert over([0.5, 0.0, 0.0], near=0.2)[0] == -1.0  # far away nothing is in the way
    np.testing.assert_array_equal(
        over([0.5, 0.0, 0.1], clear=0.3)[:3], [0, 0, 1]
    )  # unless an obstacle is
    np.testing.assert_array_equal(over([0.5, 0.0, 0.1], clear=0.3, near=0.2)[:3], [0, 0, 1])


# --- What it does when ---


def test_the_empty_hand_comes_from_above_with_open_fingers():
    action = motion.pick_place(hand((-0.2, -0.2, 0.3)), task())
    assert action[0] == action[1] == 1.0 and action[2] < 0 and action[6] == OPEN
    beside = motion.pick_place(
        hand((0.05, 0.0, 0.0)), task()
    )  # beside the bowl: up before it goes there
    assert beside[2] > 0 and abs(beside[0]) < 0.1
    above = motion.pick_place(hand((0.0, 0.0, 0.08)), task())
    assert above[2] == -1.0 and above[6] == OPEN


def test_fingers_close_only_at_the_grasp_point_and_only_when_open():
    assert motion.pick_place(hand((0.005, 0.0, 0.01)), task())[6] == CLOSE
    assert motion.pick_place(hand((0.0, 0.0, 0.03)), task())[6] == OPEN
    assert motion.pick_place(hand((0.03, 0.0, 0.01)), task())[6] == OPEN
    half_open = motion.pick_place(hand((0.0, 0.0, 0.01), gap=0.04), task())
    assert half_open[6] == OPEN and half_open[2] == 1.0


def test_it_lifts_when_the_fingers_have_stopped_at_the_rim():
    closing = motion.pick_place(hand(gap=0.04, gap_speed=-0.19, command=CLOSE), task())
    still_closing = motion.pick_place(hand(gap=0.02, gap_speed=-0.19, command=CLOSE), task())
    held = motion.pick_place(hand(gap=RIM_GAP, command=CLOSE), task())
    assert closing[6] == still_closing[6] == held[6] == CLOSE
    assert closing[2] < 0.1 and still_closing[2] < 0.1 and held[2] == 1.0
    np.testing.assert_array_equal(held[:2], 0)


def test_an_empty_or_lost_grasp_is_given_up():
    empty = motion.pick_place(hand(gap=0.001, command=CLOSE), task())
    lost = motion.pick_place(hand((0.0, 0.0, 0.2), gap=RIM_GAP, command=CLOSE), task())
    assert empty[6] == OPEN and empty[2] == 1.0 and lost[6] == OPEN


def test_it_carries_high_goes_down_at_the_place_and_opens_there():
    def carried(offset):
        position = PLATE + np.array(offset)
        now = task(object=position)
        return motion.pick_place(hand(gap=RIM_GAP, command=CLOSE, origin=position + GRASP), now)

    np.testing.assert_array_equal(carried((0.2, 0.0, 0.08))[:2], [-1, 0])
    down = carried((0.0, 0.0, 0.06))
    assert down[2] == -1.0 and down[6] == CLOSE
    assert carried((0.01, 0.0, 0.01))[6] == OPEN
    let_go = motion.pick_place(hand(gap=0.02, origin=PLATE + GRASP), task(object=PLATE))
    assert let_go[6] == OPEN and np.abs(let_go[:3]).max() < 0.01  # it does not fetch it again


def test_what_lies_under_something_is_drawn_out_before_it_is_lifted():
    way_out = BOWL + np.array([0.0, 0.02, 0.0])
    low = motion.pick_place(hand(gap=RIM_GAP, command=CLOSE), task(way_out=way_out))
    assert low[1] > 0.5 and abs(low[2]) < 0.1
    out = motion.pick_place(hand(gap=RIM_GAP, command=CLOSE), task(way_out=BOWL))
    far = motion.pick_place(hand(gap=RIM_GAP, command=CLOSE), task(way_out=BOWL - 0.3))
    assert out[2] == far[2] == 1.0


def test_obstacles_are_passed_above():
    wall = Obstacle((BOWL + GRASP)[:2] - np.array([0.2, 0.0]), 0.0, np.array([0.02, 0.3]), 1.2)
    at_wall, far_away = hand((-0.25, 0.0, 0.1)), hand((-0.4, 0.0, 0.1))
    np.testing.assert_array_equal(
        motion.pick_place(at_wall, task(obstacles=(wall,)))[:3], [0, 0, 1]
    )
    assert (
        motion.pick_place(far_away, task(obstacles=(wall,)))[0]
        == motion.pick_place(at_wall, task())[0]
        == 1.0
    )
    held = hand(gap=RIM_GAP, command=CLOSE, origin=BOWL + GRASP)
    near_place = task(
        place=BOWL + [0.03, 0.0, -0.05], obstacles=(Obstacle(BOWL[:2], 0.0, np.ones(2), 1.2),)
    )
    assert (
        motion.pick_place(held, near_place)[0] > 0
    )  # close to its place it comes down whatever stands around


def test_pushing_aims_ahead_and_returns_to_the_object_when_it_has_slipped():
    push = Push(BOWL, np.array([0.0, 0.08, -0.02]), (0.05, 0.01))
    np.testing.assert_allclose(motion.push(hand(origin=BOWL), push)[[0, 1, 6]], [0, 1, CLOSE])
    assert motion.push(hand(origin=BOWL), push)[2] < 0
    slipped = motion.push(hand((0.0, 0.04, 0.03), origin=BOWL), push)
    assert slipped[1] < 0.1 and slipped[2] > 0


# --- Whole episodes in a world without physics ---


class ToyDomain:
    """What the expert reads of LIBERO's domain: a hand that follows commands, and fingers that ramp over 8 steps."""

    def __init__(self, slips: int = 0) -> None:
        self.robots = [
            SimpleNamespace(
                _ref_gripper_joint_pos_indexes=[0, 1],
                _ref_gripper_joint_vel_indexes=[0, 1],
                eef_site_id=0,
            )
        ]
        self.obj_body_id = {"akita_black_bowl_1": 0, "plate_1": 1}
        self.parsed_problem = {"goal_state": [["on", "akita_black_bowl_1", "plate_1"]]}
        data = SimpleNamespace(qpos=np.array([0.04, -0.04]), qvel=np.zeros(2))
        data.site_xpos, data.body_xpos = (
            np.array([[-0.2, 0.0, 1.17]]),
            np.array([BOWL, PLATE - [0, 0, 0.01]]),
        )
        self.sim = SimpleNamespace(data=data)
        self.slips = slips

    @property
    def solved(self) -> bool:
        bowl, plate = self.sim.data.body_xpos
        return bool(np.linalg.norm((bowl - plate)[:2]) < 0.03 and self.sim.data.qpos[0] > 0.03)

    def step(self, action: np.ndarray) -> None:
        data = self.sim.data
        hand_position, bowl = data.site_xpos[0], data.body_xpos[0]
        at_rim = (
            abs(np.linalg.norm((hand_position - bowl)[:2]) - 0.046) < 0.01
            and abs(hand_position - bowl)[2] < 0.045
        )
        gap = data.qpos[0] - data.qpos[1]
        holds = at_rim and gap <= RIM_GAP + 1e-6 and action[6] == CLOSE
        if holds and self.slips and bowl[2] > 0.95:
            self.slips, holds = self.slips - 1, False
            bowl[:] = [bowl[0], bowl[1], 0.9]
        data.site_xpos[0] += 0.0125 * action[:3]
        if holds:
            bowl += 0.0125 * action[:3]
        elif action[6] == OPEN:
            bowl[2] = 0.9
        smallest = RIM_GAP if at_rim else 0.0
        new_gap = np.clip(gap - 0.01 * action[6], smallest, 0.08)
        data.qpos[:] = [new_gap / 2, -new_gap / 2]
        data.qvel[:] = (data.qpos - [gap / 2, -gap / 2]) / 0.05


def play(
    domain: ToyDomain, imperfection: float = 0.0, seed: int = 0, haste: float = 0.0
) -> np.ndarray:
    expert = LiberoExpert(domain, imperfection, np.random.default_rng(seed), haste)
    actions = []
    while not domain.solved and len(actions) < 220:
        actions.append(expert.act())
        domain.step(actions[-1])
    return np.stack(actions)


def test_an_episode_closes_once_opens_once_and_never_turns_or_rests():
    domain = ToyDomain()
    actions = play(domain)
    assert domain.solved and len(actions) < 130
    assert np.count_nonzero(np.diff(actions[:, 6])) == 2
    assert (
        not actions[:, 3:6].any() and np.abs(actions).max() <= 1.0 and actions.dtype == np.float32
    )
    assert not noop_steps(actions).any()
    closed = np.flatnonzero(actions[:, 6] == CLOSE)
    lifted = closed[np.flatnonzero(actions[closed, 2] > 0.5)[0]]
    assert 7 <= lifted - closed[0] <= 9  # the fingers need 7 steps to the rim


def test_a_bowl_that_slips_is_fetched_again():
    domain = ToyDomain(slips=1)
    actions = play(domain)
    assert domain.solved and np.count_nonzero(np.diff(actions[:, 6])) == 4


def test_imperfect_episodes_differ_by_seed_keep_the_gripper_and_still_succeed():
    clean = play(ToyDomain())
    episodes = []
    for seed in range(6):
        domain = ToyDomain()
        episodes.append(play(domain, 0.5, seed))
        assert (
            domain.solved and not noop_steps(episodes[-1]).any() and not episodes[-1][:, 3:6].any()
        )
    assert len({len(e) for e in episodes} | {len(clean)}) > 2
    np.testing.assert_array_equal(play(ToyDomain(), 0.5, 3), episodes[3])


def test_an_expert_in_a_hurry_drops_the_object_short_of_its_place_and_fetches_it_again():
    """The toy's bowl falls straight down and stays: from HASTY_RADIUS away that is no success."""
    domain, carried = ToyDomain(), []
    expert = LiberoExpert(domain, rng=np.random.default_rng(0), haste=1.0)
    for _ in range(220):
        action, was_closed = expert.act(), expert.command
        task = expert._task(0)
        if action[6] == OPEN and carried and carried[-1]:
            offset = np.hypot(*(task.object - task.place)[:2])
            assert motion.HASTY_RADIUS - 0.02 < offset < motion.HASTY_RADIUS
            break
        carried.append(action[6] == CLOSE and was_closed == CLOSE)
        domain.step(action)
    else:
        pytest.fail("it never let go")
    often = play(ToyDomain(), seed=1, haste=0.3)
    assert np.count_nonzero(np.diff(often[:, 6])) >= 2 and not noop_steps(often).any()
    np.testing.assert_array_equal(play(ToyDomain(), seed=1, haste=0.3), often)
    np.testing.assert_array_equal(play(ToyDomain(), haste=0.0), play(ToyDomain()))


def test_a_wrong_haste_is_refused():
    for haste, rng in ((1.5, np.random.default_rng()), (0.5, None)):
        with pytest.raises(ValueError, match="haste"):
            LiberoExpert(ToyDomain(), rng=rng, haste=haste)


@pytest.mark.parametrize(
    "imperfection, rng", [(1.5, np.random.default_rng()), (-0.1, None), (0.5, None)]
)
def test_a_wrong_imperfection_is_refused(imperfection, rng):
    with pytest.raises(ValueError, match="imperfection"):
        LiberoExpert(ToyDomain(), imperfection, rng)


def test_goals_that_it_cannot_reach_are_refused():
    domain = ToyDomain()
    domain.parsed_problem = {"goal_state": [["open", "wooden_cabinet_1_middle_region"]]}
    with pytest.raises(ValueError, match="cannot do open wooden_cabinet_1_middle_region"):
        LiberoExpert(domain)


# --- In the simulator ---


@pytest.fixture(scope="module", params=["libero_spatial", "libero_goal"])
def env(request):
    from ppo.envs.libero import LiberoEnv

    env = LiberoEnv(request.param, 16, images=False, render_quality="fast")
    yield env
    env.close()


@pytest.mark.libero("libero_spatial", "libero_goal")
def test_it_solves_tasks_of_both_suites(env):
    tasks = {"libero_spatial": (0, 4, 9), "libero_goal": (2, 3, 5, 7)}[env.suite_name]
    assert set(tasks) <= set(EXPERT_TASKS[env.suite_name])
    for task_id in tasks:
        episode = run_expert_episode(
            env, ResetRequest(task_id, 1, 7), 0.0, np.random.default_rng(0)
        )
        assert episode.success and len(episode.actions) < 200
        assert not episode.actions[:, 3:6].any() and not noop_steps(episode.actions).any()
        num = len(episode.actions)
        assert len(episode.images) == num and episode.wrist_images is None
        assert episode.states.shape == (num, 8) and episode.joint_states.shape == (num, 7)
        assert episode.rewards.sum() == episode.rewards[-1] == 1.0


@pytest.mark.libero("libero_spatial", "libero_goal")
def test_an_episode_repeats_and_random_layouts_and_pushes_are_survived(env):
    task_id = {"libero_spatial": 4, "libero_goal": 8}[env.suite_name]
    request = ResetRequest(task_id, None, 11)
    first, again = (
        run_expert_episode(env, request, 0.3, np.random.default_rng(5)) for _ in range(2)
    )
    assert first.success
    np.testing.assert_array_equal(first.actions, again.actions)
