"""Demonstrations of the scripted expert on LIBERO: what is written, and that it succeeds again when replayed."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ppo.envs import recording
from ppo.envs.images import jpeg_round_trip
from ppo.envs.recording import parse_episode_path
from ppo.envs.replay import Replay, load_replays, play
from prismatic.vla.datasets.mixtures import dataset_dir
from prismatic.vla.datasets.rlds import iterate_episodes
from prismatic.vla.datasets.writer import noop_steps, write_dataset

pytestmark = pytest.mark.libero("libero_spatial")
ROOT = Path(__file__).resolve().parents[2]
NAME = "libero_spatial_no_noops"
OPTIONS = {"task_suite_name": "libero_spatial", "task_ids": (2, 5), "seed": 3}


def load_make_demos():
    spec = importlib.util.spec_from_file_location(
        "make_demos_for_libero", ROOT / "vla-scripts" / "make_demos.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


make_demos = load_make_demos()


def make(output_dir: Path, **options) -> Path:
    args = make_demos.Args(output_dir=str(output_dir), **OPTIONS, **options)
    make_demos.main(args)
    return make_demos.output_path(args)


@pytest.fixture(scope="module")
def replays(tmp_path_factory: pytest.TempPathFactory) -> list[Replay]:
    """Four episodes of two tasks, recorded without drawing, written, and read back."""
    from ppo.envs.libero import LiberoEnv

    root = tmp_path_factory.mktemp("demos")
    settings = make_demos.settings_of(make_demos.Args(**OPTIONS, image_size=16))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            recording,
            "make_recording_env",
            lambda s: LiberoEnv(s.task_suite_name, 16, images=False),
        )
        recorder = recording.Recorder(settings)
        demos = [recorder.record(index).demonstration for index in range(4)]
        recorder.close()
    folder = dataset_dir(root, NAME)
    folder.mkdir(parents=True)
    write_dataset(folder, NAME, demos, image_size=16, image_format="png", description="test")
    return load_replays(root, NAME)


def test_recorded_episodes_succeed_again(replays: list[Replay]) -> None:
    from ppo.envs.libero import LiberoEnv

    assert [r.request.task_id for r in replays] == [2, 5, 2, 5] and {
        r.suite_name for r in replays
    } == {NAME[:14]}
    env = LiberoEnv("libero_spatial", 16, images=False)
    for replay in replays:
        assert not noop_steps(replay.stored_T7)[:-1].any() and np.abs(replay.stored_T7).max() <= 1.0
        assert np.array_equal(replay.actions_T7[:, 6], replay.stored_T7[:, 6]), (
            "the gripper comes back"
        )
        # Un-normalised; a hundredth of the values lies outside q01..q99.
        np.testing.assert_allclose(
            np.quantile(np.abs(replay.actions_T7 - replay.stored_T7), 0.95), 0, atol=1e-5
        )
        assert play(env, replay.request, replay.actions_T7)
    # Rounded to the tokens' 256 values, which may make the end a little late.
    assert sum(play(env, replay.request, replay.token_actions_T7, 10) for replay in replays) >= 3
    assert not play(env, replay.request, -replay.actions_T7), "other actions do not"
    env.close()


def test_frames_and_proprioception_are_those_before_each_action(tmp_path: Path) -> None:
    import tensorflow_datasets as tfds

    from ppo.envs.libero import WRIST_CAMERA, LiberoEnv

    options = {
        "num_episodes": 2,
        "max_env_length": 4,
        "keep_failures": True,
        "render_quality": "fast",
    }
    folder = make(tmp_path / "one", **options)
    # Drawn in other processes, the same bytes.
    other = make(tmp_path / "two", num_processes=2, **options)
    assert [p.read_bytes() for p in sorted(folder.iterdir())] == [
        p.read_bytes() for p in sorted(other.iterdir())
    ]

    env = LiberoEnv("libero_spatial", 224, render_quality="fast")
    for episode in tfds.builder_from_directory(str(folder)).as_dataset(split="train"):
        name, request = parse_episode_path(
            episode["episode_metadata"]["file_path"].numpy().decode()
        )
        env.reset(request)
        steps = list(episode["steps"].as_numpy_iterator())
        assert len(steps) == 4 and steps[0]["language_instruction"].decode() == env_instruction(
            name, request.task_id
        )
        for step in steps:
            observation = step["observation"]
            assert np.array_equal(observation["image"], jpeg_round_trip(env.render(256)))
            assert np.array_equal(
                observation["wrist_image"], jpeg_round_trip(env.render(256, WRIST_CAMERA))
            )
            state, joints = env.proprioception()
            assert np.array_equal(observation["state"], state) and np.array_equal(
                observation["joint_state"], joints
            )
            env.step(step["action"])
    env.close()
    assert [len(e.actions_T7) for e in iterate_episodes(folder)] == [4, 4]


def env_instruction(suite_name: str, task_id: int) -> str:
    from ppo.envs.base import get_suite

    return get_suite(suite_name).instructions[task_id]


@pytest.mark.parametrize("first", ["tensorflow", "libero"])
def test_drawing_and_tensorflow_live_in_one_process(first: str) -> None:
    """OSMesa and tensorflow each bring an LLVM: once they see each other's, the second one dies."""
    import_tensorflow = "import tensorflow as tf; tf.constant([1.0]) + 1\n"
    draw = (
        "from ppo.envs.base import ResetRequest\nfrom ppo.envs.libero import LiberoEnv\n"
        "env = LiberoEnv('libero_spatial', 64, render_quality='fast')\nenv.reset(ResetRequest(0, 0, 0))\n"
    )
    order = (import_tensorflow, draw) if first == "tensorflow" else (draw, import_tensorflow)
    subprocess.run(
        [sys.executable, "-c", "".join(order) + import_tensorflow + "env.close()"],
        check=True,
        cwd=ROOT,
    )
