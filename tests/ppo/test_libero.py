"""LIBERO's environments in the simulator: every task, LIBERO's own environment as reference, repetition, limits."""

import gc
import subprocess
import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ppo.envs import libero_install
from ppo.envs.base import ResetRequest, StepResult
from ppo.envs.images import policy_image
from ppo.envs.libero_expert import run_expert_episode
from tests.libero_episodes import (
    ACTIONS,
    CABINET_TASK,
    DRAWER,
    DRAWER_TASK,
    FIXED,
    NUM_WAIT,
    RANDOM,
    SIZE,
    SUITE,
    assert_same,
    leave_traces,
    make_env,
    play,
)

pytestmark = pytest.mark.libero("libero_spatial", "libero_goal")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def pair() -> Iterator[list]:
    """Two environments with quick drawing; what they have played before is each test's own affair."""
    envs = [make_env(), make_env()]
    yield envs
    for env in envs:
        env.close()
        env.close()


# --- Every task ---


class Alive:
    """The simulators and canvases of one environment that are in memory, and how many there were at most."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        from ppo.envs import libero_pool

        self.objects: dict[str, weakref.WeakSet] = {}
        self.peak = {"Simulator": 0, "Canvas": 0}
        for name in self.peak:
            self.objects[name] = weakref.WeakSet()
            patch.setattr(libero_pool, name, self.noting(getattr(libero_pool, name), name))

    def noting(self, original: type, name: str):
        def make(*args):
            made = original(*args)
            self.objects[name].add(made)
            self.peak[name] = max(self.peak[name], self.now()[name])
            return made

        return make

    def now(self) -> dict[str, int]:
        gc.collect()
        return {name: len(objects) for name, objects in self.objects.items()}


def assert_object_is_where_it_belongs(env, view: np.ndarray, name: str) -> None:
    """Take the object away: what changes in the image lies where the camera's geometry has it, mirrored.

    To a few pixels: other things may hide a part of it.
    """
    model, data, domain = env.simulator.model, env.simulator.data, env.domain
    camera, body = domain.sim.model.camera_name2id("agentview"), domain.obj_body_id[name]
    x, y, z = data.cam_xmat[camera].reshape(3, 3).T @ (data.xpos[body] - data.cam_xpos[camera])
    focal = 128 / np.tan(np.radians(model.cam_fovy[camera]) / 2)
    expected = np.array(
        [128 + focal * y / z, 128 + focal * x / z]
    )  # the camera looks along -z: both signs turn
    address = model.jnt_qposadr[model.body_jntadr[body]]
    data.qpos[address + 2] += 50.0
    domain.sim.forward()
    changed = np.abs(env.render(256).astype(int) - view).sum(-1) > 60
    assert np.count_nonzero(changed) > 100
    found = np.median(np.argwhere(changed), axis=0)
    np.testing.assert_allclose(found, expected, atol=20, err_msg=f"row and column of {name}")


@pytest.mark.parametrize(
    "suite",
    [
        pytest.param(s, marks=pytest.mark.libero(s))
        for s in ("libero_object", "libero_10", "libero_90")
    ],
)
def test_the_other_suites_start_from_their_fixed_states_where_their_assets_are(suite):
    env = make_env(suite, num_steps_wait=0)
    for task_id in (0, 9):
        image = env.reset(ResetRequest(task_id, 1, 0))
        num_positions = env.simulator.model.nq
        state = libero_install.load_init_states(suite, task_id)[1]
        np.testing.assert_array_equal(env.simulator.data.qpos, state[1 : 1 + num_positions])
        assert image.std() > 10 and not env.step(ACTIONS[0]).success
    env.close()


@pytest.mark.parametrize(
    "suite", ["libero_spatial", pytest.param("libero_goal", marks=pytest.mark.slow)]
)
def test_every_task_starts_from_its_fixed_states_steps_and_draws_upright(suite, monkeypatch):
    """One environment plays all tasks in turn with room for two simulators and one canvas."""
    alive = Alive(monkeypatch)
    env = make_env(suite, num_steps_wait=0, max_simulators=2, max_canvases=1)
    first_views = []
    for task_id in range(10):
        states = libero_install.load_init_states(suite, task_id)
        views = []
        for state_id in range(5):
            image = env.reset(ResetRequest(task_id, state_id, 0))
            data, num_positions = env.simulator.data, env.simulator.model.nq
            np.testing.assert_array_equal(data.qpos, states[state_id, 1 : 1 + num_positions])
            np.testing.assert_array_equal(data.qvel, states[state_id, 1 + num_positions :])
            view = env.render(256)
            np.testing.assert_array_equal(image, policy_image(view, SIZE))
            result = env.step(ACTIONS[state_id])
            assert not np.array_equal(data.qpos, states[state_id, 1 : 1 + num_positions])
            assert (result.reward, result.terminated, result.truncated, result.success) == (
                0.0,
                False,
                False,
                False,
            )
            views += [view, env.render(256)]
            assert np.abs(views[-1].astype(int) - view).max() > 20, "the arm has moved"
        raw = env.pool.draw(env.simulator, 256, "agentview")
        np.testing.assert_array_equal(raw[::-1, ::-1], views[-1])
        assert_object_is_where_it_belongs(env, views[-1], "plate_1")
        assert len({v.tobytes() for v in views}) == 10, "each state looks its own way"
        first_views.append(views[0])
    assert len({v.tobytes() for v in first_views}) == 10, "each task too"
    env.reset(ResetRequest(0, 0, 0))  # its simulator was freed long ago
    np.testing.assert_array_equal(env.render(256), first_views[0])
    assert alive.peak == alive.now() == {"Simulator": 2, "Canvas": 1}
    env.close()
    assert alive.now() == {"Simulator": 0, "Canvas": 0}


# --- LIBERO's own environment ---


@dataclass
class Reference:
    """The expert's episode in our environment (no drawing), and what LIBERO's own saw with the same actions."""

    env: Any
    request: ResetRequest
    actions: np.ndarray
    qpos: np.ndarray
    qvel: np.ndarray
    pictured: tuple[int, ...]
    seen: dict[str, np.ndarray]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reference]:
    env = make_env(images=False, num_steps_wait=10, exact_physics=True)
    positions, velocities = [], []

    class Watched:
        """The environment, its states noted before each step."""

        def __getattr__(self, name):
            return getattr(env, name)

        def step(self, action):
            positions.append(env.simulator.data.qpos.copy())
            velocities.append(env.simulator.data.qvel.copy())
            return env.step(action)

    episode = run_expert_episode(Watched(), FIXED, 0.0, np.random.default_rng(0))
    positions.append(env.simulator.data.qpos.copy())
    velocities.append(env.simulator.data.qvel.copy())
    assert episode.success
    pictured, folder = (1, 6, 12), tmp_path_factory.mktemp("plain")
    np.savez(
        folder / "played.npz",
        suite=SUITE,
        task_id=FIXED.task_id,
        init_state_id=np.array(FIXED.init_state_id),
        seed=FIXED.seed,
        num_wait=10,
        actions=episode.actions,
        pictured=pictured,
    )
    files = (ROOT / "tests/plain_libero.py", folder / "played.npz", folder / "seen.npz")
    program = [sys.executable, *map(str, files)]
    ended = subprocess.run(
        program, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=550
    )
    assert ended.returncode == 0, ended.stderr
    seen = dict(np.load(folder / "seen.npz"))
    yield Reference(
        env, FIXED, episode.actions, np.stack(positions), np.stack(velocities), pictured, seen
    )
    env.close()


def test_states_rewards_and_the_end_are_those_of_liberos_own_environment(reference):
    """A whole successful episode, settling included, and the layout that a seed draws."""
    seen = reference.seen
    np.testing.assert_allclose(reference.qpos, seen["qpos"], rtol=0, atol=1e-9)
    np.testing.assert_allclose(reference.qvel, seen["qvel"], rtol=0, atol=1e-9)
    results = replay(reference.env, reference.request, reference.actions)
    assert [r.reward for r in results] == seen["rewards"].tolist()
    assert [r.terminated for r in results] == seen["dones"].tolist()
    reference.env.reset(reference.request)
    fixtures = reference.env.simulator.model.body_pos
    np.testing.assert_array_equal(fixtures, seen["body_pos"][0])


def test_a_layout_after_a_soft_reset_is_the_one_after_liberos_hard_reset(reference):
    """From the first state on, through the settling steps, which `play` is left to do."""
    env, actions = reference.env, reference.actions[:4]
    leave_traces(env, ResetRequest(DRAWER_TASK, 7, 99))
    leave_traces(env, ResetRequest(FIXED.task_id, 7, 99))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(env, "num_steps_wait", 0)
        settling = np.tile(np.array([0, 0, 0, 0, 0, 0, -1], np.float32), (10, 1))
        played = play(
            env, ResetRequest(FIXED.task_id, None, FIXED.seed), np.concatenate([settling, actions])
        )
    np.testing.assert_array_equal(played.qpos, reference.seen["layout_qpos"])


def test_images_are_those_of_liberos_own_drawing(reference):
    """After a soft reset, byte for byte what LIBERO's renderer draws at the end of a step.

    The images in LIBERO's observations are 2 ms older: its sensors are read after 24 of a step's 25 substeps.
    """
    from ppo.envs.libero import WRIST_CAMERA, LiberoEnv

    env, seen = LiberoEnv(SUITE, 224), reference.seen
    leave_traces(env, ResetRequest(FIXED.task_id, 7, 99))
    env.reset(reference.request)
    for number, action in enumerate(reference.actions[: reference.pictured[-1]], start=1):
        image = env.step(action).image
        np.testing.assert_array_equal(env.simulator.data.qpos, reference.qpos[number])
        if number not in reference.pictured:
            continue
        row = reference.pictured.index(number)
        np.testing.assert_array_equal(image, policy_image(seen["agentview_at_end"][row], 224))
        for camera in ("agentview", WRIST_CAMERA):
            view = env.render(256, camera)
            np.testing.assert_array_equal(view, seen[f"{camera}_at_end"][row])
            older = seen[camera][row].astype(int)
            assert np.abs(view - older).mean() < 2.0
        state, joints = env.proprioception()
        np.testing.assert_allclose(state[:3], seen["robot0_eef_pos"][row], atol=1e-3)
        np.testing.assert_allclose(state[3:6], axis_angle(seen["robot0_eef_quat"][row]), atol=5e-3)
        np.testing.assert_allclose(state[6:], seen["robot0_gripper_qpos"][row], atol=1e-4)
        np.testing.assert_allclose(joints, seen["robot0_joint_pos"][row], atol=5e-3)
    env.close()


def axis_angle(quaternion_xyzw: np.ndarray) -> np.ndarray:
    """As in OpenVLA's evaluation: the angle of [0, 2 pi) times the axis."""
    *axis, cosine = quaternion_xyzw
    return np.array(axis) * 2 * np.arccos(cosine) / np.sqrt(1 - cosine**2)


def test_quick_physics_and_drawing_differ_little(reference, pair, monkeypatch):
    env = pair[0]
    monkeypatch.setattr(env, "num_steps_wait", 10)
    env.reset(reference.request)
    num = reference.pictured[-1]
    for action in reference.actions[:num]:
        env.step(action)
    error = np.abs(env.simulator.data.qpos - reference.qpos[num]).max()
    assert 0 < error < 1e-4
    difference = np.abs(env.render(256) - reference.seen["agentview_at_end"][-1].astype(int)).mean()
    assert 0 < difference < 5


# --- The same request, the same episode ---


def test_an_episode_is_decided_by_its_request_whatever_was_played_before(pair):
    first, second = pair
    leave_traces(second, ResetRequest(CABINET_TASK, 7, 99))
    leave_traces(second, ResetRequest(DRAWER_TASK, 1, 2))
    leave_traces(second, ResetRequest(CABINET_TASK, None, 1))
    fresh, expected = play(first, FIXED), play(second, FIXED)
    assert_same(fresh, expected)
    random_layout = play(first, RANDOM)
    leave_traces(second, ResetRequest(CABINET_TASK, None, 2))
    assert_same(play(second, RANDOM), random_layout)
    leave_traces(first, ResetRequest(CABINET_TASK, 8, 1))
    assert_same(play(first, FIXED), expected)
    # Each part of the request counts.
    others = [random_layout] + [
        play(first, ResetRequest(CABINET_TASK, state, 3), ACTIONS[:1]) for state in (3, None)
    ]
    other_fixtures = play(first, ResetRequest(CABINET_TASK, 2, 4), ACTIONS[:1])
    np.testing.assert_allclose(other_fixtures.qpos[0, :9], fresh.qpos[0, :9], atol=1e-3)
    for other in [*others, other_fixtures]:
        assert not np.array_equal(other.images[0], fresh.images[0])


def test_the_environments_seed_is_added_to_the_requests(pair, monkeypatch):
    expected = play(pair[0], RANDOM, ACTIONS[:1])
    monkeypatch.setattr(pair[0], "seed", 2)
    assert_same(
        play(pair[0], ResetRequest(CABINET_TASK, None, RANDOM.seed - 2), ACTIONS[:1]), expected
    )


@pytest.mark.parametrize(
    "upcoming", [ResetRequest(CABINET_TASK, None, 21), DRAWER], ids=["same task", "another"]
)
def test_preparing_disturbs_nothing_and_leaves_nothing_to_do(pair, monkeypatch, upcoming):
    from ppo.envs.libero import Simulator

    first, second = pair
    expected = play(second, FIXED)
    remaining: list[bool] = []

    def prepare():
        remaining.extend(first.prepare(upcoming) for _ in range(2))

    leave_traces(first, RANDOM)
    assert_same(play(first, FIXED, between=prepare), expected)
    before = (first.render(SIZE), first.simulator.data.qpos.copy())
    while first.prepare(upcoming):
        pass
    assert remaining[0] and not first.prepare(upcoming)
    np.testing.assert_array_equal(first.render(SIZE), before[0])
    np.testing.assert_array_equal(first.simulator.data.qpos, before[1])

    num_steps = [0]
    step = Simulator.step

    def counted(self, action):
        num_steps[0] += 1
        return step(self, action)

    monkeypatch.setattr(Simulator, "step", counted)
    prepared = play(first, upcoming, ACTIONS[:4])
    assert num_steps[0] == 4, "the reset had no step left to do"
    assert_same(prepared, play(second, upcoming, ACTIONS[:4]))
    assert num_steps[0] == 8 + NUM_WAIT


def test_a_preparation_may_be_given_up(pair):
    first, second = pair
    expected = {request: play(second, request, ACTIONS[:2]) for request in (FIXED, RANDOM, DRAWER)}
    first.reset(FIXED)
    for num_slices in (1, 2, 4):
        for request in (RANDOM, DRAWER):
            for _ in range(num_slices):
                first.prepare(request)
        assert_same(play(first, RANDOM, ACTIONS[:2]), expected[RANDOM])
    for _ in range(3):
        first.prepare(DRAWER)
    assert_same(play(first, DRAWER, ACTIONS[:2]), expected[DRAWER])  # the rest is done by the reset
    assert_same(play(first, FIXED, ACTIONS[:2]), expected[FIXED])


def test_environments_of_a_process_share_simulators_and_what_draws_them(pair, monkeypatch):
    """Three play the same task at once and others in turn: each sees what it would see alone."""
    from ppo.envs.libero_pool import SIMULATORS_OF_ANOTHER

    expected = {request: play(pair[0], request, ACTIONS[:2]) for request in (FIXED, RANDOM, DRAWER)}
    alive = Alive(monkeypatch)
    envs = [make_env(max_simulators=3, max_canvases=1) for _ in range(3)]
    assert len({id(env.pool) for env in envs}) == 1 and envs[0].pool is not pair[0].pool
    for requests in ((FIXED, RANDOM, FIXED), (DRAWER, FIXED, RANDOM), (RANDOM, DRAWER, DRAWER)):
        images = [[env.reset(request)] for env, request in zip(envs, requests, strict=True)]
        for action in ACTIONS[:2]:
            for env, seen in zip(envs, images, strict=True):
                seen.append(env.step(action).image)
        for request, seen in zip(requests, images, strict=True):
            np.testing.assert_array_equal(seen, expected[request].images[: len(seen)])
    assert alive.peak["Simulator"] <= 3 + 2 * SIMULATORS_OF_ANOTHER
    assert alive.now()["Canvas"] == 2, "one for each of the two tasks"
    for env in envs[:2]:
        env.close()
    np.testing.assert_array_equal(envs[2].reset(FIXED), expected[FIXED].images[0])
    envs[2].close()
    assert alive.now() == {"Simulator": 0, "Canvas": 0}


def test_preparing_keeps_to_the_limits_and_drawings_are_apart(pair, monkeypatch):
    expected = play(pair[0], FIXED, ACTIONS[:2])
    alive = Alive(monkeypatch)
    env = make_env(max_simulators=2, max_canvases=1)
    assert_same(play(env, FIXED, ACTIONS[:2]), expected)
    for task_id in (0, 1):
        upcoming = ResetRequest(task_id, 0, 0)
        while env.prepare(upcoming):
            pass
        env.reset(upcoming)
    assert_same(play(env, FIXED, ACTIONS[:2]), expected)
    env.close()
    assert alive.now() == {"Simulator": 0, "Canvas": 0}
    assert alive.peak == {"Simulator": 2, "Canvas": 1}
    assert_same(play(pair[0], FIXED, ACTIONS[:2]), expected)  # another one's end is not its own


def test_simulators_that_make_room_are_freed_without_pythons_collector(monkeypatch):
    """Taken or composed ahead, drawn or not, and the one that is being composed when the environment ends."""
    from ppo.envs import libero_pool

    held: list[weakref.ref] = []

    def make(*args):
        made = original(*args)
        held.extend(
            weakref.ref(thing) for thing in (made.model, made.data, made.domain, made.domain.model)
        )
        return made

    original = libero_pool.Simulator
    monkeypatch.setattr(libero_pool, "Simulator", make)
    env = make_env(num_steps_wait=0, max_simulators=2, max_canvases=2)
    gc.disable()
    try:
        for task_id in (0, 1, 2, 3):
            upcoming = ResetRequest(task_id, 0, 0)
            while task_id % 2 and env.prepare(upcoming):
                assert env.simulator.model.nq > 0
            env.reset(upcoming)
            env.step(ACTIONS[0])
        alive = {number // 4 for number, ref in enumerate(held) if ref() is not None}
        assert alive == {2, 3}, "of the last two tasks"
        assert env.prepare(ResetRequest(4, 0, 0))
        env.close()
        assert len(held) == 4 * 5 and not any(ref() for ref in held)
    finally:
        gc.enable()


# --- How episodes end ---


def replay(env, request: ResetRequest, actions: np.ndarray) -> list[StepResult]:
    env.reset(request)
    return [env.step(action) for action in actions]


def test_success_ends_an_episode_and_the_limit_truncates_it_never_both(reference, monkeypatch):
    env, num = reference.env, len(reference.actions)
    assert env.max_steps == 220
    for limit in (num, num - 1):  # settling steps do not count
        monkeypatch.setattr(env, "max_steps", limit)
        *running, last = replay(env, reference.request, reference.actions[:limit])
        assert not any(r.terminated or r.truncated or r.success or r.reward for r in running)
        is_solved = limit == num
        facts = (last.terminated, last.truncated, last.success, last.reward)
        assert facts == (is_solved, not is_solved, is_solved, float(is_solved))
        assert not last.image.any() and last.image.shape == (SIZE, SIZE, 3), (
            "nothing is drawn without images"
        )


# --- What is refused ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"suite": "libero_100"}, "libero_100 is no suite of LIBERO: use one of libero_spatial, "),
        ({"max_steps": 0}, "max_steps 0: must be at least 1"),
        ({"num_steps_wait": -1}, "num_steps_wait -1: must be at least 0"),
        ({"max_simulators": 1}, "max_simulators 1: must be at least 2"),
        ({"max_canvases": 0}, "max_canvases 0: must be at least 1"),
        ({"render_quality": "best"}, "render_quality 'best': use eval or fast"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_env(**options)


def test_wrong_requests_actions_and_cameras_are_refused_and_the_episode_goes_on(pair):
    env, expected = pair[0], play(pair[1], FIXED, ACTIONS[:2])
    env.reset(FIXED)
    for method in (env.reset, env.prepare):
        with pytest.raises(ValueError, match=r"task_id 10: libero_spatial has tasks 0\.\.9"):
            method(ResetRequest(10, 0, 0))
        with pytest.raises(
            ValueError, match=r"init_state_id 50: libero_spatial has states 0\.\.49"
        ):
            method(ResetRequest(0, 50, 0))
    for action in (np.zeros(6, np.float32), np.full(7, np.nan, np.float32)):
        with pytest.raises(ValueError, match="must be 7 finite numbers"):
            env.step(action)
    for size, camera in ((256, "nowhere"), (0, "agentview"), (5000, "agentview")):
        with pytest.raises(ValueError, match=f"camera '{camera}' at {size} pixels"):
            env.render(size, camera)
    images = [env.step(action).image for action in ACTIONS[:2]]
    np.testing.assert_array_equal(images, expected.images[1:])
