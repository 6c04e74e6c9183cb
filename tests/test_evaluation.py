"""run_libero_eval_vllm.py and ppo/evaluation.py: the episode loop, the counts, the folder, the whole script."""

import json
import logging
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import imageio.v2 as imageio
import numpy as np
import pytest

import run_libero_eval_vllm as script
from ppo.envs.base import ResetRequest, TaskSuite
from ppo.envs.vector import VectorEnv
from ppo.evaluation import (
    EpisodeResult,
    EvaluationRun,
    evaluation_requests,
    run_episodes,
    summarize,
    summarize_run,
    wilson_interval,
)
from utils.progress import LOG_INTERVAL_S, ProgressReport
from utils.reports.videos import save_video

ROOT = Path(__file__).resolve().parents[1]

# ---- the episode loop, on a vector of environments that only counts ----


def episode_length(request):
    return 1 + (7 * request.task_id + 3 * request.init_state_id) % 5


def is_success(request):
    return (request.task_id + request.init_state_id) % 2 == 0


class CountingVectorEnv:
    """VectorEnv's interface. An image holds task, initial state and step; `deaths[request]` attempts die at once."""

    def __init__(self, deaths=None, length=episode_length):
        self.length = length
        self.buffers = {}
        self.deaths = Counter(deaths or {})
        self.state = {}
        self.in_flight = {}
        self.calls = []
        self.started = Counter()

    def image(self, env_id):
        request, step = self.state[env_id]
        return np.full((4, 4, 3), [request.task_id, request.init_state_id, step], dtype=np.uint8)

    def begin(self, env_id, request):
        self.state[env_id] = [request, 0]
        self.started[request] += 1

    def reset(self, env_ids, requests):
        for env_id, request in zip(env_ids, requests, strict=True):
            assert env_id not in self.in_flight
            self.begin(env_id, request)
        return self.shared("images", [self.image(i) for i in env_ids])

    def shared(self, name, images):
        """Images in a buffer that the next call writes again."""
        buffer = self.buffers.setdefault(name, np.zeros((64, 4, 4, 3), np.uint8))
        buffer[: len(images)] = images
        return buffer[: len(images)]

    def send(self, env_ids, actions, next_resets):
        self.calls.append(("send", tuple(env_ids)))
        for env_id, action, request in zip(env_ids, actions, next_resets, strict=True):
            assert self.state[env_id] is not None, "an idle environment was stepped"
            np.testing.assert_array_equal(action[:3], self.image(env_id)[0, 0])
            self.in_flight[env_id] = request

    def receive(self, env_ids):
        self.calls.append(("receive", tuple(env_ids)))
        rows = [self.step_one(env_id, self.in_flight.pop(env_id)) for env_id in env_ids]
        columns = {key: np.array([row[key] for row in rows]) for key in rows[0]}
        columns |= {key: self.shared(key, columns[key]) for key in ("images", "final_images")}
        return SimpleNamespace(**columns)

    def step_one(self, env_id, next_request):
        request = self.state[env_id][0]
        self.state[env_id][1] += 1
        dropped = self.deaths[request] > 0
        self.deaths[request] -= dropped
        done = not dropped and self.state[env_id][1] == self.length(request)
        row = {"final_images": self.image(env_id), "reward": 0.0, "dropped": dropped}
        row |= {
            "terminated": done and is_success(request),
            "truncated": done and not is_success(request),
        }
        row |= {
            "success": done and is_success(request),
            "episode_return": float(is_success(request)),
        }
        row["episode_length"] = self.state[env_id][1]
        row["reset_used"] = (done or dropped) and next_request is not None
        if row["reset_used"]:
            self.begin(env_id, next_request)
        elif done or dropped:
            row["images"] = np.zeros((4, 4, 3), np.uint8)
            self.state[env_id] = None
            return row
        return row | {"images": self.image(env_id)}


def echo(images, task_ids):
    """A policy whose action repeats the image's content, and which checks that the task fits the image."""
    np.testing.assert_array_equal(images[:, 0, 0, 0], task_ids)
    return np.pad(images[:, 0, 0].astype(np.float32), ((0, 0), (0, 4)))


REQUESTS = [
    ResetRequest(task, state, seed=100 * task + state) for task in range(3) for state in range(5)
]


@pytest.mark.parametrize("num_envs", [1, 2, 3, 7, 40])
def test_every_episode_runs_once_and_is_reported_for_its_request(num_envs):
    env = CountingVectorEnv()
    run = run_episodes(env, num_envs, echo, REQUESTS)
    assert env.started == Counter(REQUESTS)
    assert Counter((e.task_id, e.init_state_id, e.seed) for e in run.episodes) == Counter(
        (r.task_id, r.init_state_id, r.seed) for r in REQUESTS
    )
    for episode in run.episodes:
        assert episode.success == is_success(episode) and episode.length == episode_length(episode)
    assert (
        run.num_env_steps == sum(map(episode_length, REQUESTS))
        and not run.void
        and run.num_dropped == 0
    )


def test_one_group_simulates_while_the_policy_acts_for_the_other():
    env = CountingVectorEnv()
    run_episodes(env, 4, echo, REQUESTS)
    first, second, third = env.calls[:3]
    assert [first[0], second[0], third[0]] == ["send", "send", "receive"]
    assert not set(first[1]) & set(second[1]) and third[1] == first[1]


def test_environments_do_not_idle_while_episodes_wait():
    env = CountingVectorEnv()
    run_episodes(env, 4, echo, REQUESTS)
    num_steps = sum(len(ids) for kind, ids in env.calls if kind == "send")
    assert num_steps == sum(map(episode_length, REQUESTS)) == 45
    # 45 steps on 2 x 2 environments: 22.5 calls at best, and the tail of one longest episode (5) in each group.
    assert sum(kind == "send" for kind, _ in env.calls) <= 22.5 + 2 * 5


@pytest.mark.parametrize(("num_requests", "num_sends"), [(4, {0: 20, 2: 20}), (6, {0: 25, 2: 20})])
def test_waiting_episodes_are_not_kept_from_an_idle_environment(num_requests, num_sends):
    """Four environments in two groups: what one group might need next must not make the other wait."""
    env = CountingVectorEnv(
        length=lambda request: 5 if num_requests == 6 and request.init_state_id < 2 else 20
    )
    run_episodes(env, 4, echo, [ResetRequest(0, state, 0) for state in range(num_requests)])
    assert Counter(ids[0] for kind, ids in env.calls if kind == "send") == num_sends


def test_dropped_episodes_run_again_or_are_void_and_are_counted():
    once, always = REQUESTS[4], REQUESTS[7]
    env = CountingVectorEnv(deaths={once: 1, always: 99})
    run = run_episodes(env, 3, echo, REQUESTS, max_attempts=3)
    assert env.started[once] == 2 and env.started[always] == 3
    assert run.void == [always] and run.num_dropped == 4
    finished = {(e.task_id, e.init_state_id): e for e in run.episodes}
    assert len(run.episodes) == len(finished) == len(REQUESTS) - 1
    assert (always.task_id, always.init_state_id) not in finished
    assert finished[once.task_id, once.init_state_id].num_dropped == 1
    results = summarize_run(run, [0, 1, 2], ["a", "b", "c"])
    assert results["overall"]["episodes"] == 14 and results["overall"]["void"] == 1
    assert results["overall"]["dropped_attempts"] == 4
    assert [row["void"] for row in results["per_task"]] == [0, 1, 0]
    assert results["void_episodes"] == [{"task_id": 1, "init_state_id": 2, "seed": 102}]


def test_real_environments_that_die_lose_no_episode(tmp_path):
    options = {
        "num_processes": 2,
        "image_size": 4,
        "env_kwargs": {"marker": str(tmp_path / "died")},
        "replacement_wait_s": 500.0,
    }
    requests = evaluation_requests([0, 1], 3)
    with VectorEnv("tests.dying_world:SUITE", 4, **options) as vector_env:
        run = run_episodes(vector_env, 4, echo, requests)
        assert vector_env.num_replaced == 1
    assert Counter((e.task_id, e.init_state_id) for e in run.episodes) == {
        (t, s): 1 for t in (0, 1) for s in range(3)
    }
    assert all(e.success and e.length == 3 and e.episode_return == 3.0 for e in run.episodes)
    # Every environment of the process that died loses its episode: (0, 1) and whatever its neighbour played.
    assert 1 <= run.num_dropped <= 2 and not run.void


def test_the_same_episode_twice_is_refused():
    with pytest.raises(ValueError, match="the same"):
        run_episodes(CountingVectorEnv(), 2, echo, [*REQUESTS, REQUESTS[0]])


def test_observer_sees_each_episodes_images_in_order():
    seen, finished = {}, {}

    class Observer:
        def start(self, env_id, request, image):
            seen[env_id] = [image]

        def step(self, env_id, image):
            seen[env_id].append(image)

        def end(self, env_id, result):
            finished[result.task_id, result.init_state_id] = [
                image[0, 0].tolist() for image in seen[env_id]
            ]

    run_episodes(CountingVectorEnv(), 4, echo, REQUESTS, observer=Observer())
    for request in REQUESTS:
        frames = [
            [request.task_id, request.init_state_id, t] for t in range(episode_length(request) + 1)
        ]
        assert finished[request.task_id, request.init_state_id] == frames


# ---- counts ----


@pytest.mark.parametrize(
    ("successes", "episodes", "low", "high"),
    # Newcombe (1998), Statistics in Medicine 17, table I, method 3.
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_equals_published_values(successes, episodes, low, high):
    assert wilson_interval(successes, episodes) == pytest.approx((low, high), abs=5e-5)


def test_wilson_interval_is_symmetric_and_undefined_without_episodes():
    low, high = wilson_interval(29 - 1, 29)
    assert (1 - high, 1 - low) == pytest.approx(wilson_interval(1, 29))
    assert wilson_interval(0, 250)[0] == 0.0 and wilson_interval(250, 250)[1] == 1.0
    with pytest.raises(ValueError, match="no rate"):
        wilson_interval(0, 0)


def result(task_id, state, success, length):
    return EpisodeResult(
        task_id, state, seed=0, success=success, length=length, episode_return=float(success)
    )


def test_summary_of_a_hand_worked_run():
    episodes = [
        result(2, 1, True, 10),
        result(5, 0, False, 20),
        result(2, 0, False, 20),
        result(2, 2, True, 13),
    ]
    results = summarize_run(EvaluationRun(episodes), [2, 5, 6], [f"task {i}" for i in range(7)])
    overall, (two, five, six) = results["overall"], results["per_task"]
    assert (overall["successes"], overall["episodes"], overall["rate"]) == (2, 4, 0.5)
    assert overall["mean_length"] == 15.75 and overall["mean_length_success"] == 11.5
    assert overall["wilson_95"] == pytest.approx([0.1500, 0.8500], abs=1e-4)
    assert (two["task_id"], two["instruction"], two["successes"], two["episodes"]) == (
        2,
        "task 2",
        2,
        3,
    )
    assert two["rate"] == pytest.approx(2 / 3) and two["mean_length"] == pytest.approx(43 / 3)
    assert five["rate"] == 0.0 and "mean_length_success" not in five
    assert six["episodes"] == 0 and "rate" not in six and "wilson_95" not in six
    assert [(e["task_id"], e["init_state_id"]) for e in results["episodes"]] == [
        (2, 0),
        (2, 1),
        (2, 2),
        (5, 0),
    ]


def test_summary_of_nothing_has_no_rate():
    assert summarize([]) == {"successes": 0, "episodes": 0}


# ---- the script's parts ----


def args_for(tmp_path, **options):
    return script.Args(
        **(
            {"pretrained_checkpoint": tmp_path / "model", "local_log_dir": tmp_path / "logs"}
            | options
        )
    )


def test_run_directories_are_never_shared(tmp_path):
    args = args_for(tmp_path, run_id_note="a b/c")
    folders = [script.make_run_dir(args) for _ in range(3)]
    assert len(set(folders)) == 3 and all(folder.is_dir() for folder in folders)
    (folders[0] / "results.json").write_text("mine")
    script.make_run_dir(args)
    assert (folders[0] / "results.json").read_text() == "mine"
    assert all(
        f.parent == tmp_path / "logs" and f.name.startswith("EVAL-tabletop-model-") for f in folders
    )
    assert "a_b_c" in folders[0].name


def test_requests_cover_the_initial_states_and_seeds_do_not_depend_on_the_choice_of_tasks():
    few, many = evaluation_requests([4], 2), evaluation_requests([1, 4], 3)
    assert [(r.task_id, r.init_state_id) for r in many] == [
        (t, s) for t in (1, 4) for s in range(3)
    ]
    assert set(few) < set(many) and len({r.seed for r in many}) == len(many)
    assert not set(few) & set(evaluation_requests([4], 2, seed=8))


def test_finished_episodes_are_counted_with_their_success_rate_and_recorded(tmp_path, caplog):
    recorder = script.recorder_for(args_for(tmp_path, save_video="all"), tmp_path / "videos")
    now = [0.0]
    logger = logging.getLogger("test_evaluation")
    progress = ProgressReport(logger, "episodes", 4, clock=lambda: now[0])
    observer = script.ShownEpisodes(recorder, progress)
    image = np.zeros((28, 28, 3), np.uint8)
    with caplog.at_level("INFO"):
        for state, success in enumerate([True, False]):
            observer.start(0, ResetRequest(1, state, 5), image)
            observer.step(0, image)
            now[0] += LOG_INTERVAL_S
            observer.end(0, EpisodeResult(1, state, 5, success, 1, float(success)))
    assert caplog.messages == [
        "1 of 4 episodes, success rate so far 1.000, about 1:30 left",
        "2 of 4 episodes, success rate so far 0.500, about 1:00 left",
    ]
    assert set(recorder.files) == {(1, 0), (1, 1)}


def test_videos_show_the_wanted_episodes_and_say_how_they_ended(tmp_path):
    args = args_for(tmp_path, save_video="failures", max_videos_per_task=1, video_fps=5)
    recorder = script.recorder_for(args, tmp_path / "videos", instructions=tuple("abcde"))
    assert recorder.save_contact_sheet() is None

    def episode(env_id, task_id, state, success):
        recorder.start(env_id, ResetRequest(task_id, state, 0), np.zeros((30, 31, 3), np.uint8))
        recorder.step(env_id, np.full((30, 31, 3), 200, np.uint8))
        recorder.end(env_id, result(task_id, state, success, 1))

    for task_id, state, success in [(3, 0, True), (3, 1, False), (3, 2, False), (4, 0, False)]:
        episode(0, task_id, state, success)
    names = ["task_03-episode_001-failure.mp4", "task_04-episode_000-failure.mp4"]
    assert sorted(p.name for p in (tmp_path / "videos").iterdir()) == names
    assert recorder.files == {(3, 1): f"videos/{names[0]}", (4, 0): f"videos/{names[1]}"}
    # a row for each video: a white line with text, then eight frames from the first (black) to the last (grey)
    sheet = imageio.imread(recorder.save_contact_sheet())
    assert sheet.shape == (2 * (22 + 128), 8 * 128, 3)
    assert sheet[:22].min() < 100 < 250 < np.median(sheet[:22])
    assert sheet[22:150, :128].max() == 0 and sheet[22:150, -128:].min() == 200
    frames = imageio.mimread(tmp_path / "videos" / names[0], memtest=False)
    assert len(frames) == 2 + 5  # and a second of the last one
    assert (
        frames[0].shape == (240, 248, 3)
        and frames[0].mean() < 10
        and abs(frames[-1].mean() - 200) < 10
    )


def test_named_episodes_become_videos_whatever_they_end_in_and_count_as_no_others(tmp_path):
    options = {"video_episodes": ("3:1", "4:0"), "max_videos_per_task": 1}
    recorder = script.recorder_for(
        args_for(tmp_path, save_video="failures", **options), tmp_path / "videos"
    )
    for task_id, state, success in [
        (3, 1, False),
        (3, 2, False),
        (3, 3, False),
        (4, 0, True),
        (4, 1, True),
    ]:
        recorder.start(0, ResetRequest(task_id, state, 0), np.zeros((30, 30, 3), np.uint8))
        recorder.end(0, result(task_id, state, success, 1))
    assert sorted(recorder.files) == [
        (3, 1),
        (3, 2),
        (4, 0),
    ]  # the named ones, and the first other failure
    only_named = script.recorder_for(args_for(tmp_path, **options), tmp_path / "videos")
    for state in (0, 1):
        only_named.start(state, ResetRequest(3, state, 0), np.zeros((8, 8, 3), np.uint8))
    assert list(only_named.frames) == [1]


def test_recording_keeps_no_frames_when_nothing_can_be_wanted(tmp_path):
    recorder = script.recorder_for(args_for(tmp_path), tmp_path / "videos")
    recorder.start(0, ResetRequest(0, 0, 0), np.zeros((8, 8, 3), np.uint8))
    assert recorder.frames == {}


def test_a_video_needs_frames(tmp_path):
    with pytest.raises(ValueError, match="no frames"):
        save_video(tmp_path / "a.mp4", [])


# ---- bad input ----


def problems(args):
    with pytest.raises(ValueError) as error:
        script.validate(args)
    return str(error.value)


def test_all_problems_come_at_once(tiny_model_dir, tmp_path):
    text = problems(
        args_for(
            tmp_path,
            task_ids=(3, 12, 3),
            num_trials_per_task=51,
            temperature=-1.0,
            num_envs=0,
            engine_args='{"max_num_bached_tokens": 1}',
        )
    )
    for part in (
        "model is not a folder",
        "[12]",
        "twice",
        "1 to 50",
        "--temperature",
        "--num_envs",
        "max_num_bached",
    ):
        assert part in text
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize(
    ("named", "message"),
    [
        (("3:1", "4"), "4: give TASK:STATE"),
        (("3:-1",), "give TASK:STATE"),
        (("3:5", "2:0", "3:4"), "2:0 3:5: not among"),
    ],
)
def test_named_videos_must_be_of_the_evaluation(named, message, tiny_model_dir, tmp_path):
    options = {"task_ids": (3,), "num_trials_per_task": 5, "video_episodes": named}
    assert message in problems(args_for(tmp_path, **options))


def test_unknown_suite_lists_the_known_ones(tiny_model_dir, tmp_path):
    text = problems(
        args_for(tmp_path, pretrained_checkpoint=tiny_model_dir, task_suite_name="libero_moon")
    )
    assert "libero_moon" in text and "tabletop" in text


def test_missing_unnorm_key_lists_the_keys_there_are(tiny_model_dir, tmp_path):
    text = problems(
        args_for(tmp_path, pretrained_checkpoint=tiny_model_dir, unnorm_key="bridge_orig")
    )
    assert "bridge_orig" in text and "tabletop" in text


def test_adapter_only_folder_names_the_merge_command(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "runs/base"}')
    text = problems(args_for(tmp_path))
    assert f"vla-scripts/merge.py --vla_path runs/base --adapter_dir {folder}" in text


@pytest.mark.parametrize("engine_args", ["block_size=32", "[1]"])
def test_engine_arguments_must_be_a_json_object(tmp_path, engine_args):
    assert "is not" in problems(args_for(tmp_path, engine_args=engine_args))


# ---- the whole script: vLLM, tabletop, a random tiny policy; in a process of its own, as vLLM changes its process ----

THREE_RUNS = """
import sys
from pathlib import Path
from run_libero_eval_vllm import Args, evaluate
if __name__ == "__main__":
    for note, temperature in (("first", 0.0), ("second", 0.0), ("sampled", 1.0)):
        evaluate(Args(Path(sys.argv[1]), task_ids=(1, 6), num_trials_per_task=2, num_envs=3, num_processes=1,
                      max_env_length=4, temperature=temperature, save_video="all", run_id_note=note,
                      local_log_dir=Path(sys.argv[2])))
"""


@pytest.fixture(scope="module")
def runs(tiny_model_dir, tmp_path_factory):
    """Results of three evaluations by note, read back from their folders."""
    folder = tmp_path_factory.mktemp("evaluations")
    (folder / "three_runs.py").write_text(THREE_RUNS)
    command = [
        sys.executable,
        str(folder / "three_runs.py"),
        str(tiny_model_dir),
        str(folder / "logs"),
    ]
    env = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=folder, env=script.os.environ | env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    folders = {path.name.rpartition("-")[2]: path for path in (folder / "logs").iterdir()}
    assert set(folders) == {"first", "second", "sampled"}
    return {
        note: (path, json.loads((path / "results.json").read_text()))
        for note, path in folders.items()
    }


def test_whole_evaluation_visits_every_initial_state_once(runs, tiny_model_dir):
    folder, results = runs["first"]
    visited = [(e["task_id"], e["init_state_id"]) for e in results["episodes"]]
    assert visited == [(1, 0), (1, 1), (6, 0), (6, 1)]
    assert [row["episodes"] for row in results["per_task"]] == [2, 2] and results["overall"][
        "episodes"
    ] == 4
    suite = script.get_suite("tabletop")
    assert isinstance(suite, TaskSuite)
    assert [row["instruction"] for row in results["per_task"]] == [
        suite.instructions[1],
        suite.instructions[6],
    ]
    assert all(1 <= e["length"] <= 4 for e in results["episodes"])
    assert (
        results["checkpoint"] == str(tiny_model_dir)
        and results["greedy"]
        and results["unnorm_key"] == "tabletop"
    )
    assert results["versions"]["vllm"] and results["time"]["wall_s"] > 0
    for episode in results["episodes"]:
        outcome = "success" if episode["success"] else "failure"
        assert outcome in episode["video"] and (folder / episode["video"]).stat().st_size > 0
    log = (folder / "eval.log").read_text()
    assert suite.instructions[6] in log and results["run_dir"] in log
    assert log.count("0.000 .. 0.658") == 2  # the intervals of 0 of 2 episodes, in the table


def test_greedy_evaluation_is_deterministic_and_sampling_differs(runs):
    first, second, sampled = (runs[note][1] for note in ("first", "second", "sampled"))
    assert first["episodes"] == second["episodes"] and first["overall"] == second["overall"]
    videos = [
        (runs[note][0] / first["episodes"][0]["video"]).read_bytes() for note in ("first", "second")
    ]
    assert videos[0] == videos[1]
    other = (runs["sampled"][0] / sampled["episodes"][0]["video"]).read_bytes()
    assert other != videos[0] and not sampled["greedy"]
