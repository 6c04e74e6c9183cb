"""vla-scripts/make_demos.py: what is recorded, and that nothing is lost or half-written."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from ppo.envs import tabletop_expert
from ppo.envs.base import get_suite
from prismatic.vla.datasets.mixtures import check_mixture
from prismatic.vla.datasets.rlds import frame_decoder, iterate_episodes
from prismatic.vla.datasets.schema import read_features

ROOT = Path(__file__).resolve().parents[2]


def load_script():
    spec = importlib.util.spec_from_file_location("make_demos_script", ROOT / "vla-scripts" / "make_demos.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_demos_script"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


make_demos = load_script()


def make(output_dir: Path, **options):
    args = make_demos.Args(**{"output_dir": str(output_dir), "num_episodes": 12, "image_size": 28, **options})
    make_demos.main(args)
    return list(iterate_episodes(make_demos.output_path(args), images=True))


def same(first, second) -> bool:
    return all(
        np.array_equal(a.actions_T7, b.actions_T7) and list(a.encoded_images_T) == list(b.encoded_images_T)
        for a, b in zip(first, second, strict=True)
    )


def test_demonstrations_are_what_the_expert_did(tmp_path: Path) -> None:
    recorded = []
    original = tabletop_expert.run_expert_episode

    def spy(env, request, imperfection, rng):
        assert request.init_state_id is None, "the fixed initial states are for evaluation"
        episode = original(env, request, imperfection, rng)
        recorded.append((request, episode))
        return episode

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tabletop_expert, "run_expert_episode", spy)
        episodes = make(tmp_path, imperfection=0.5)
    kept = [(request, episode) for request, episode in recorded if episode.success]
    assert len(episodes) == len(kept) == 12 < len(recorded), "failures are replaced"
    folder = tmp_path / "tabletop_no_noops" / "1.0.0"
    assert read_features(folder)["steps/observation/image"].encoding == "png"
    decode, suite = frame_decoder(folder, (28, 28)), get_suite("tabletop")
    for index, (written, (request, episode)) in enumerate(zip(episodes, kept, strict=True)):
        assert request.task_id == index % 10 and written.instruction == suite.instructions[index % 10]
        moves = np.abs(episode.actions[:, :6]).sum(1) > 0
        assert np.array_equal(written.actions_T7[-1], episode.actions[-1])
        assert len(written.actions_T7) >= moves.sum()
        assert np.array_equal(decode(written.encoded_images_T[0]).numpy(), episode.images[0])


def test_the_seed_decides_and_longer_recordings_begin_with_shorter_ones(tmp_path: Path) -> None:
    first = make(tmp_path / "a", seed=1, imperfection=0.3)
    assert same(first, make(tmp_path / "b", seed=1, imperfection=0.3))
    assert same(first[:5], make(tmp_path / "c", seed=1, imperfection=0.3, num_episodes=5))
    other = make(tmp_path / "d", seed=2, imperfection=0.3)
    assert first[0].encoded_images_T[0] != other[0].encoded_images_T[0]


def test_failures_are_kept_on_request_and_tasks_chosen(tmp_path: Path) -> None:
    # Nobody solves a task in two steps.
    episodes = make(tmp_path, keep_failures=True, max_env_length=2, task_ids=(3, 7), num_episodes=5)
    instructions = get_suite("tabletop").instructions
    assert [e.instruction for e in episodes] == [instructions[i] for i in (3, 7, 3, 7, 3)]
    assert max(len(e.actions_T7) for e in episodes) == 2


def test_an_expert_that_always_fails_is_reported_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="failed 100 times in a row at task 0 .* --keep_failures"):
        make(tmp_path, max_env_length=2)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_never_overwrites_unless_asked(tmp_path: Path) -> None:
    before = make(tmp_path, num_episodes=2)
    with pytest.raises(ValueError, match="exists: choose another --output_dir, or pass --overwrite"):
        make(tmp_path, num_episodes=3)
    folder = tmp_path / "tabletop_no_noops" / "1.0.0"
    assert same(before, list(iterate_episodes(folder, images=True)))
    assert len(make(tmp_path, num_episodes=3, overwrite=True)) == 3
    assert [p.name for p in folder.parent.iterdir()] == ["1.0.0"], "no temporary folder stays"


def test_the_statistics_come_with_the_data(tmp_path: Path) -> None:
    make(tmp_path, num_episodes=2)
    folder = tmp_path / "tabletop_no_noops" / "1.0.0"
    assert len(list(folder.glob("dataset_statistics_*.json"))) == 1
    assert check_mixture(tmp_path, "tabletop") == []


def test_large_frames_are_jpeg(tmp_path: Path) -> None:
    make(tmp_path, num_episodes=1, image_size=160)
    image = read_features(tmp_path / "tabletop_no_noops" / "1.0.0")["steps/observation/image"]
    assert (image.encoding, image.shape) == ("jpeg", (160, 160, 3))


def test_all_problems_are_reported_at_once() -> None:
    args = make_demos.Args(num_episodes=0, seed=-1, imperfection=2.0, image_size=4, task_ids=(10,), max_env_length=0)
    problems = "\n".join(make_demos.validate(args))
    for flag in ("num_episodes 0", "seed -1", "imperfection 2.0", "image_size 4", "task_ids [10]", "max_env_length 0"):
        assert f"--{flag}" in problems
    assert "no scripted expert" in make_demos.validate(make_demos.Args(task_suite_name="libero_goal"))[0]
    assert make_demos.validate(make_demos.Args()) == []
