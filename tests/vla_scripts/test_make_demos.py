"""vla-scripts/make_demos.py: what is recorded, and that nothing is lost or half-written."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ppo.envs import recording_pool, tabletop_expert
from ppo.envs.base import get_suite
from ppo.envs.recording import ExpertFailedError, Recorder, parse_episode_path
from ppo.envs.recording_pool import RecordingError
from prismatic.vla.datasets.mixtures import check_mixture
from prismatic.vla.datasets.rlds import frame_decoder, iterate_episodes
from prismatic.vla.datasets.schema import read_features
from prismatic.vla.datasets.store import EpisodeStore
from utils import progress

ROOT = Path(__file__).resolve().parents[2]


def load_script():
    spec = importlib.util.spec_from_file_location(
        "make_demos_script", ROOT / "vla-scripts" / "make_demos.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_demos_script"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


make_demos = load_script()


def make(output_dir: Path, **options):
    args = make_demos.Args(
        **{"output_dir": str(output_dir), "num_episodes": 12, "image_size": 28, **options}
    )
    make_demos.main(args)
    return list(iterate_episodes(make_demos.output_path(args), images=True))


def same(first, second) -> bool:
    return all(
        np.array_equal(a.actions_T7, b.actions_T7)
        and list(a.encoded_images_T) == list(b.encoded_images_T)
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
    by_start = {("tabletop", request): episode for request, episode in kept}
    for index, written in enumerate(episodes):
        start = parse_episode_path(written.file_path)
        episode = by_start.pop(start)
        assert (
            start[1].task_id == index % 10 and written.instruction == suite.instructions[index % 10]
        )
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
    with pytest.raises(
        ValueError, match="already holds a dataset of make_demos.py: choose another"
    ):
        make(tmp_path, num_episodes=3)
    folder = tmp_path / "tabletop_no_noops" / "1.0.0"
    assert same(before, list(iterate_episodes(folder, images=True)))
    assert len(make(tmp_path, num_episodes=3, overwrite=True)) == 3
    assert [p.name for p in folder.parent.iterdir()] == ["1.0.0"], "no temporary folder stays"


def test_a_dataset_from_elsewhere_is_never_overwritten(tmp_path: Path) -> None:
    make(tmp_path, num_episodes=2)
    folder = tmp_path / "tabletop_no_noops" / "1.0.0"
    info = json.loads((folder / "dataset_info.json").read_text())
    info["description"] = "LIBERO's demonstrations, replayed"
    (folder / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match="is not recognisably a dataset of make_demos.py"):
        make(tmp_path, num_episodes=3, overwrite=True)
    assert list(folder.glob("*.tfrecord-*"))


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
    numbers = {
        "num_episodes": 0,
        "seed": -1,
        "imperfection": 2.0,
        "image_size": 4,
        "max_env_length": 0,
    }
    numbers |= {"env_gpu_id": -1, "num_processes": 0, "haste": 1.5}
    problems = "\n".join(make_demos.validate(make_demos.Args(task_ids=(10,), **numbers)))
    for flag, value in [*numbers.items(), ("task_ids", [10])]:
        assert f"--{flag} {value}" in problems
    assert (
        "no scripted expert" in make_demos.validate(make_demos.Args(task_suite_name="libero_90"))[0]
    )
    assert (
        "--haste 0.5 is for LIBERO's expert" in make_demos.validate(make_demos.Args(haste=0.5))[0]
    )
    assert make_demos.validate(make_demos.Args(task_suite_name="libero_spatial", haste=0.5)) == []
    assert make_demos.validate(make_demos.Args()) == []


@pytest.mark.libero
def test_processes_that_do_not_fit_into_memory_are_refused_with_a_number_that_does(
    monkeypatch,
) -> None:
    monkeypatch.setenv("MUJOCO_GL", "egl")
    args = make_demos.Args(task_suite_name="libero_spatial", num_processes=64)
    assert make_demos.memory_problems(args, 1000.0) == []
    (problem,) = make_demos.memory_problems(args, 20.0)
    assert problem.startswith("--num_processes 64: 64 processes of libero_spatial need at least 8")
    number = int(problem.rpartition("use --num_processes ")[2])
    fitting = make_demos.Args(task_suite_name="libero_spatial", num_processes=number)
    assert 1 < number < 64 and make_demos.memory_problems(fitting, 20.0) == []
    few = make_demos.Args(task_suite_name="libero_spatial", num_processes=64, num_episodes=2)
    assert make_demos.memory_problems(few, 20.0) == []  # two episodes take two processes
    assert make_demos.memory_problems(make_demos.Args(num_processes=64), 0.1) == []


# ---- interruptions and processes ----


def contents(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Every file of a recording of 12 episodes in one process."""
    root = tmp_path_factory.mktemp("uninterrupted")
    make(root, imperfection=0.5)
    return contents(root)


def interrupt_after(num_episodes: int, patch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while the episode after `num_episodes` is played."""
    original = Recorder.record
    finished: list[int] = []

    def record(self, index):
        if len(finished) == num_episodes:
            raise KeyboardInterrupt
        finished.append(index)
        return original(self, index)

    patch.setattr(Recorder, "record", record)


def test_an_interrupted_recording_goes_on_and_comes_out_the_same(
    tmp_path: Path, uninterrupted
) -> None:
    for num_finished in (5, 2):  # and is interrupted again
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            interrupt_after(num_finished, patch)
            make(tmp_path, imperfection=0.5)
        assert not (tmp_path / "tabletop_no_noops" / "1.0.0").exists()
    store = tmp_path / "tabletop_no_noops" / ".1.0.0.recording"
    assert len(list(store.glob("episode_*.npz"))) == 7
    next(store.glob("episode_*.npz")).write_bytes(b"PK half a file")
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(6, patch)  # no more are missing
        make(tmp_path, imperfection=0.5)
    assert contents(tmp_path) == uninterrupted and not store.exists()


def test_the_number_of_processes_changes_nothing(tmp_path: Path, uninterrupted) -> None:
    make(tmp_path, imperfection=0.5, num_processes=3)
    assert contents(tmp_path) == uninterrupted


def test_a_process_that_dies_is_named_and_what_was_finished_stays(
    tmp_path: Path, uninterrupted
) -> None:
    processes: list[subprocess.Popen] = []
    real_popen, real_note = subprocess.Popen, make_demos.RecordingProgress.note

    def popen(*args, **options):
        processes.append(real_popen(*args, **options))
        return processes[-1]

    def note(self, index, num_steps, counts):
        real_note(self, index, num_steps, counts)
        if self.num_done == 3:
            for process in processes:
                process.kill()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recording_pool.subprocess, "Popen", popen)
        patch.setattr(make_demos.RecordingProgress, "note", note)
        with pytest.raises(
            RecordingError, match=r"process \d, episode \d+ \(tabletop task \d\): died by SIGKILL"
        ):
            make(tmp_path, imperfection=0.5, num_processes=2)
    assert all(process.poll() is not None for process in processes)
    finished = list((tmp_path / "tabletop_no_noops" / ".1.0.0.recording").glob("episode_*.npz"))
    assert 3 <= len(finished) < 12
    make(tmp_path, imperfection=0.5)
    assert contents(tmp_path) == uninterrupted


def test_an_error_of_a_process_comes_with_its_traceback(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(make_demos, "validate", lambda args: [])
    with pytest.raises(
        RecordingError, match=r"(?s)episode \d \(tabletop task \d\):.*Traceback.*max_steps -1"
    ):
        make(tmp_path, num_processes=2, max_env_length=-1)
    with pytest.raises(ExpertFailedError, match="failed 100 times in a row at task"):
        make(tmp_path, num_processes=2, max_env_length=2)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_other_settings_do_not_continue_a_recording(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(3, patch)
        make(tmp_path, seed=1)
    with pytest.raises(
        ValueError, match="interrupted recording with --seed 1, not 2: .* or pass --overwrite"
    ):
        make(tmp_path, seed=2)
    assert same(make(tmp_path / "fresh", seed=2), make(tmp_path, seed=2, overwrite=True))


def test_a_recording_that_is_going_on_is_left_alone(tmp_path: Path) -> None:
    args = make_demos.Args(output_dir=str(tmp_path), num_episodes=2, image_size=28)
    settings = make_demos.settings_of(args)
    store = EpisodeStore(tmp_path / "tabletop_no_noops" / ".1.0.0.recording", settings.identity())
    with store.opened(), pytest.raises(BlockingIOError, match="another process is recording into"):
        make_demos.main(args)
    make_demos.main(args)


def test_fixed_initial_states_come_in_turn(tmp_path: Path) -> None:
    episodes = make(
        tmp_path, init_states="fixed", task_ids=(2, 5), num_episodes=6, imperfection=0.0
    )
    starts = [parse_episode_path(episode.file_path) for episode in episodes]
    wanted = [(2, 0), (5, 0), (2, 1), (5, 1), (2, 2), (5, 2)]
    assert [(request.task_id, request.init_state_id) for _, request in starts] == wanted
    decode = frame_decoder(tmp_path / "tabletop_no_noops" / "1.0.0", (28, 28))
    env = get_suite("tabletop").make_env(28)
    for (name, request), episode in zip(starts, episodes, strict=True):
        assert name == "tabletop" and np.array_equal(
            env.reset(request), decode(episode.encoded_images_T[0])
        )


def test_without_a_terminal_lines_are_logged_now_and_then(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(progress, "LOG_INTERVAL_S", 0.0)
    messages: list[str] = []
    monkeypatch.setattr(
        make_demos.logger, "info", lambda text, *values: messages.append(text % values)
    )
    make(tmp_path, num_episodes=3)
    assert re.match(r"1 of 3 episodes, 1 of 1 attempts solved, \d+ steps, about \d", messages[0])
    assert "3 episodes" in messages[-1] and "the expert solved 3 of 3 at the first" in messages[-1]
