"""What episode i of a recording is, in which order processes do them, and the name that recreates its start."""

from types import SimpleNamespace

import numpy as np
import pytest

from ppo.envs import recording
from ppo.envs.base import ResetRequest, get_suite
from ppo.envs.recording import (
    LIBERO_SUITES,
    Recorder,
    RecordingSettings,
    episode_path,
    expert_tasks,
    parse_episode_path,
)
from ppo.envs.recording_pool import WorkList


def settings(**values) -> RecordingSettings:
    defaults = {
        "task_suite_name": "tabletop", "task_ids": (3, 7), "init_states": "random", "seed": 5, "imperfection": 0.0,
        "image_size": 28, "image_format": "png", "max_env_length": None, "keep_failures": False,
        "render_quality": "eval",
    }  # fmt: skip
    return RecordingSettings(**(defaults | values))


@pytest.mark.parametrize("request_", [ResetRequest(4, None, 2**31 - 1), ResetRequest(0, 49, 0)])
def test_a_file_path_recreates_the_start(request_) -> None:
    path = episode_path("libero_spatial", request_, 12)
    assert parse_episode_path(path) == ("libero_spatial", request_)
    assert path.endswith("/episode000012")


def test_other_file_paths_are_refused() -> None:
    for path in (
        "",
        "/data/libero_spatial/pick_up_the_bowl_demo.hdf5",
        "tabletop/seed0/episode000001/task1",
    ):
        with pytest.raises(ValueError, match="does not say how the episode started"):
            parse_episode_path(path)


def test_where_episodes_start() -> None:
    def start(index, attempt, **values):
        return settings(**values).request(index, attempt, 50, np.random.default_rng(index))

    assert [start(i, 0).task_id for i in range(4)] == [3, 7, 3, 7]
    assert start(0, 0).init_state_id is None and start(0, 0).seed != start(1, 0).seed
    fixed = [start(i, 0, init_states="fixed").init_state_id for i in (0, 1, 2, 3, 99, 100)]
    assert fixed == [0, 0, 1, 1, 49, 0]
    assert start(99, 2, init_states="fixed").init_state_id == 1, (
        "another attempt takes the next state"
    )


def test_only_the_gpu_is_left_out_of_the_identity() -> None:
    assert settings(env_gpu_id=1).identity() == settings().identity()
    for change in (
        {"seed": 6},
        {"imperfection": 0.5},
        {"task_ids": (3,)},
        {"render_quality": "fast"},
        {"haste": 0.5},
    ):
        assert settings(**change).identity() != settings().identity()


def test_attempts_of_an_expert_in_a_hurry_are_drawn_once_they_are_known_to_succeed(
    monkeypatch,
) -> None:
    played = []

    def run_expert_episode(
        env, request, imperfection, rng, record_size=None, haste=0.0, wrist_camera=True
    ):
        luck = rng.random()
        played.append((request, record_size, haste, luck))
        actions = np.full((2, 7), luck, dtype=np.float32)
        images = [np.zeros((28, 28, 3), dtype=np.uint8)] * 2
        return SimpleNamespace(
            success=luck > 0.7, images=images, actions=actions, rewards=np.float32([0, luck > 0.7]),
            states=np.zeros((2, 8), np.float32), joint_states=np.zeros((2, 7), np.float32), wrist_images=None,
        )  # fmt: skip

    monkeypatch.setattr(recording, "make_recording_env", lambda settings: None)
    monkeypatch.setattr(
        recording,
        "expert_module",
        lambda name: SimpleNamespace(run_expert_episode=run_expert_episode),
    )
    recorder = Recorder(
        settings(task_suite_name="libero_spatial", task_ids=(4,), haste=0.9, wrist_camera=False)
    )
    episodes = [recorder.record(index) for index in range(6)]
    assert sum(e.counts["attempts"] for e in episodes) > 6, "some attempts fail"
    drawn = [play for play in played if play[1] is not None]
    assert len(drawn) == 6 and all(luck > 0.7 and haste == 0.9 for _, _, haste, luck in drawn)
    rehearsed = [play for play in played if play[1] is None]
    assert [(r, luck) for r, _, _, luck in rehearsed if luck > 0.7] == [
        (r, luck) for r, _, _, luck in drawn
    ]
    assert len(rehearsed) == sum(e.counts["attempts"] for e in episodes)


def test_a_process_stays_with_its_task() -> None:
    work = WorkList(settings(task_ids=(0, 1, 2)), range(9))
    assert [work.next_index(0) for _ in range(2)] == [0, 3]
    assert [work.next_index(1) for _ in range(3)] == [1, 4, 7]
    assert work.next_index(1) == 2, "the task that nobody does comes first"
    assert [work.next_index(0) for _ in range(2)] == [6, 5], "and in the end they share one"
    assert [work.next_index(p) for p in (1, 0, 1)] == [8, None, None]


def test_the_expert_says_which_tasks_it_can_do() -> None:
    suite = get_suite("tabletop")
    assert expert_tasks(suite) == tuple(range(10))
    assert set(LIBERO_SUITES) == {"libero_spatial", "libero_goal"}
