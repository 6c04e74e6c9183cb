"""LIBERO's simulators in processes that die, hang, or lack a file."""

import logging
import os
import shutil
import signal
import time
from collections.abc import Iterator

import numpy as np
import pytest

from ppo.envs import libero_install
from ppo.envs.base import ResetRequest
from ppo.envs.vector import VectorEnv
from tests.libero_episodes import (
    ACTIONS,
    CABINET_TASK,
    DRAWER,
    DRAWER_TASK,
    FIXED,
    NUM_WAIT,
    SIZE,
    SUITE,
    make_env,
    play,
)

pytestmark = pytest.mark.libero("libero_spatial")


@pytest.fixture
def log() -> Iterator[list[str]]:
    messages: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record):
            messages.append(record.getMessage())

    logger, handler = logging.getLogger("ppo_vla"), Keep()
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


def stop_within_step(process) -> None:
    """SIGSTOP at a moment when the process steps an environment."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        os.kill(process.pid, signal.SIGSTOP)
        if process.activity()[0] == "stepping":
            return
        os.kill(process.pid, signal.SIGCONT)
        time.sleep(0.003)
    raise AssertionError("the process did not step")


@pytest.fixture
def lone() -> Iterator:
    env = make_env(max_steps=3)
    yield env
    env.close()


def test_simulators_that_die_or_hang_are_replaced_and_episodes_are_those_of_a_lone_one(
    lone, monkeypatch, log
):
    requests = [FIXED, DRAWER]
    upcoming = [ResetRequest(CABINET_TASK, 5, 0), ResetRequest(DRAWER_TASK, None, 1)]

    def step(vector, number: int):
        vector.send([0, 1], ACTIONS[[number, number]], upcoming)
        return vector.receive([0, 1])

    def assert_plays(vector, env_id: int, request: ResetRequest, first_image: np.ndarray) -> None:
        """Three steps and the next reset; the other environment plays on."""
        expected = play(lone, request, ACTIONS[:3])
        np.testing.assert_array_equal(first_image, expected.images[0])
        for number in range(3):
            result = step(vector, number)
            assert not result.dropped.any()
            image = result.final_images if number == 2 else result.images
            np.testing.assert_array_equal(image[env_id], expected.images[number + 1])
        assert (
            result.truncated[env_id] and not result.terminated[env_id] and result.reset_used[env_id]
        )
        np.testing.assert_array_equal(result.images[env_id], lone.reset(upcoming[env_id]))

    with VectorEnv(
        SUITE, 2, num_processes=2, image_size=SIZE, max_steps=3, replacement_wait_s=0.0,
        startup_timeout_s=500.0, step_timeout_s=500.0,
        env_kwargs={"render_quality": "fast", "num_steps_wait": NUM_WAIT},
    ) as vector:  # fmt: skip
        assert_plays(vector, 0, requests[0], vector.reset([0, 1], requests)[0])
        for env_id, process in enumerate(vector._processes):
            vector.send([0, 1], ACTIONS[:2], upcoming)
            stop_within_step(process)
            if env_id == 0:
                os.kill(process.pid, signal.SIGKILL)
                reason = "died while stepping environment 0"
            else:
                monkeypatch.setattr(process, "step_timeout_s", 0.5)
                reason = "made no progress for 0.5 s while stepping environment 1"
            result = vector.receive([0, 1])
            monkeypatch.setattr(process, "step_timeout_s", 500.0)
            assert result.dropped.tolist() == [env_id == 0, env_id == 1]
            assert reason in log[-1] and str(upcoming[env_id]) in log[-1]
            num_other_steps = 0
            while not result.reset_used[env_id] or not result.dropped[env_id]:
                result = step(vector, 0)
                assert not result.dropped[1 - env_id]
                num_other_steps += 1
                time.sleep(0.1)  # the new process needs the core
            assert num_other_steps > 0, "the other one played meanwhile"
            assert vector.num_replaced == len(log) == env_id + 1
            assert_plays(vector, env_id, upcoming[env_id], result.images[env_id])


def test_a_missing_asset_is_reported_with_task_and_file(tmp_path):
    found = libero_install.find_assets()
    assert found is not None
    assets = tmp_path / "assets"
    shutil.copytree(found, assets, copy_function=os.symlink)
    mesh = assets / "stable_scanned_objects/akita_black_bowl/visual/akita_black_bowl_vis.msh"
    mesh.unlink()
    with VectorEnv(
        SUITE, 1, num_processes=1, image_size=SIZE, env_kwargs={"images": False},
        process_variables={"LIBERO_ASSETS": str(assets)},
    ) as vector:  # fmt: skip
        with pytest.raises(RuntimeError) as caught:
            vector.reset([0], [FIXED])
        text = "pick up the black bowl on the wooden cabinet and place it on the plate"
        assert f"libero_spatial task 9 ({text!r}) cannot be made: " in str(caught.value)
        assert mesh.name in str(caught.value)
