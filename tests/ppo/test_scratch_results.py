"""Summary, report, figure and grid of a run's folder that looks as its stages leave it."""

import json
import subprocess
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest

from ppo.scratch_report import figure, grid_note, make_grid, render_page
from ppo.scratch_results import Paths, ScratchRun, summarize_run
from tests.ppo.test_run_results import METRICS, part
from tests.utils.reports.test_page import check
from utils.pipeline import Stage
from utils.reports.videos import save_video
from utils.stage_ledger import Ledger, write_json

REMARK = "3 files are stand-ins"


def add_evaluation(
    run_dir: Path, policy: str, kind: str, successes: dict[int, list[bool]], videos: bool = False
) -> None:
    """One part for each task."""
    for number, (task, row) in enumerate(successes.items()):
        folder = run_dir / "eval" / policy / kind / str(number) / "EVAL-x"
        folder.mkdir(parents=True)
        results = part({task: row}, remarks=[REMARK])
        for episode in results["episodes"] if videos else []:
            name = f"{task}_{episode['init_state_id']}.mp4"
            save_video(
                folder / name,
                [np.full((32, 32, 3), 60 * task, np.uint8)] * (episode["length"] + 1),
                fps=20,
            )
            episode["video"] = name
        (folder / "results.json").write_text(json.dumps(results))
        add_stage(
            run_dir,
            f"eval.{policy}.{kind}.{number}",
            [{"started": 50.0, "seconds": 3.0, "outcome": "done"}],
        )


def add_stage(run_dir: Path, name: str, pieces: list[dict], done: bool = True) -> None:
    folder = run_dir / "stages"
    folder.mkdir(exist_ok=True)
    write_json(folder / f"{name}.pieces.json", {"settings": {}, "pieces": pieces})
    if done:
        Ledger(folder).finish(Stage(name, name, ("true",)))


@pytest.fixture
def run(tmp_path) -> ScratchRun:
    add_evaluation(
        tmp_path, "supervised", "main", {0: [False, False], 4: [True, False]}, videos=True
    )
    add_evaluation(tmp_path, "base", "main", {0: [True, False], 4: [True, True]}, videos=True)
    add_evaluation(tmp_path, "supervised", "fast", {0: [False, True], 4: [True, False]})
    add_evaluation(tmp_path, "base", "fast", {0: [True, True]})  # the other part is not there yet
    # The second begins its first step 20 s after its start, and so on: see test_run_results.
    began = time.mktime((2026, 11, 25, 12, 0, 0, 0, 0, -1))
    pieces = [
        {
            "started": began,
            "seconds": 45.0,
            "outcome": "stopped",
            "first_step": 1,
            "first_step_s": 30.0,
        },
        {
            "started": began + 90,
            "seconds": 40.0,
            "outcome": "done",
            "first_step": 3,
            "first_step_s": 34.0,
        },
    ]
    for i, (name, done) in enumerate({"base": True, "seed1": False}.items()):
        shifted = [{**piece, "started": piece["started"] + 1000 * i} for piece in pieces]
        add_stage(tmp_path, f"ppo.{name}", shifted, done)
        folder = tmp_path / "ppo" / name
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in METRICS))
        (folder / "args.json").write_text(json.dumps(ARGS))
        (folder / "adapter_model.safetensors").write_bytes(b"weights")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/ppo.base.gpu.csv").write_text(
        "0, 2026/11/25 12:00:05.000, 1, 1024\n"  # while starting up
        "0, 2026/11/25 12:00:25.000, 40, 20480\n0, 2026/11/25 12:00:26.500, 60, 30720\n"
        "0, 2026/11/25 12:02:05.000, 80, 10240\n"
        "0, 2026/11/25 12:00:27.000, [N/A], 3\n2026/11/25 12:00"  # not available; cut
    )
    (tmp_path / "held_out.json").write_text(
        json.dumps(
            {
                "num_layouts": 640,
                "smallest_distance_mm": 4.2,
                "num_equal": 0,
                "num_demonstrations": 600,
            }
        )
    )
    return ScratchRun(Paths(tmp_path), num_tasks=2)


ARGS = {"local_rollout_batch_size": 20, "vllm_num_engines": 2, "max_env_length": 5}
WANTED = ["ppo.base", "eval.base.main.0", "eval.base.main.1"]


def summary_of(run: ScratchRun, wanted=tuple(WANTED)) -> dict:
    return summarize_run(
        run, {"ppo": {"learning_rate": 5e-4}}, {"base": {}, "seed1": {"seed": 1}}, wanted
    )


def test_summary_has_hand_worked_numbers(run):
    summary = summary_of(run)
    assert summary["is_complete"] and summary["remarks"] == [REMARK]
    supervised, base = summary["policies"]["supervised"], summary["policies"]["base"]
    assert list(summary["policies"]) == ["supervised", "base"]  # seed1 was not evaluated
    assert (supervised["successes"], supervised["episodes"], supervised["rate"]) == (1, 4, 0.25)
    assert (
        base["rate"] == 0.75
        and base["gain_points"] == 50.0
        and base["states_turned_to_success"] == 2
    )
    assert base["mean_length"] == pytest.approx((1 + 2 + 41 + 42) / 4)
    assert [t["successes"] for t in base["per_task"]] == [1, 2]
    ppo = summary["ppo"]["base"]
    assert (ppo["wall_s"], ppo["startup_s"], ppo["training_s"], ppo["num_pieces"]) == (
        85.0,
        50.0,
        35.0,
        2,
    )
    assert ppo["gpu"] == {
        "0": {"mean_utilization_percent": 60.0, "peak_memory_gib": 30.0, "num_samples": 3}
    }
    assert ppo["is_done"] and ppo["changes"] == {} and "gpu" not in summary["ppo"]["seed1"]
    assert (
        summary["ppo"]["seed1"]["changes"] == {"seed": 1} and not summary["ppo"]["seed1"]["is_done"]
    )
    assert list(summary["checks"]["fast"]) == ["supervised"]  # base's is not whole
    assert summary["stages"]["ppo.base"] == {"seconds": 85.0, "num_pieces": 2, "is_done": True}
    assert not summary_of(run, [*WANTED, "eval.seed1.main.0"])["is_complete"]
    json.dumps(summary)


def test_report_shows_policies_curves_checks_and_what_the_assets_are(run, tmp_path):
    grid = make_grid(run, tmp_path / "grid.mp4")
    page = render_page(run, summary_of(run), grid)
    text = check(page).text
    for part_of in ("25.0 %", "75.0 %", "+50.0 points", "+50.0 (", "3 of 4", REMARK, "seed=1", "60 %, 30 GiB", "do 4",
                    "4.2 mm", "Fast drawing", "not sampled", "minutes of training", "0:50 in 2"):  # fmt: skip
        assert part_of in text, part_of
    assert page.count("<svg") == 3  # bars, and the curves by steps and by minutes
    assert "data:video/mp4" in page and grid.note in text
    text = check(render_page(run, summary_of(run, ["absent"]), None)).text
    assert "not complete yet" in text and "Before and after" not in text


def test_evaluated_runs_are_compared_with_each_other(run):
    assert summary_of(run)["pairs"] == []
    add_evaluation(run.paths.run_dir, "seed1", "main", {0: [False, False], 4: [False, True]})
    run = ScratchRun(run.paths, num_tasks=2)
    (pair,) = (summary := summary_of(run))["pairs"]
    assert (pair["before"], pair["after"], pair["gain_points"]) == ("base", "seed1", -50.0)
    assert (
        pair["states_turned_to_success"],
        pair["states_turned_to_failure"],
        pair["mcnemar_p"],
    ) == (0, 2, 0.5)
    text = check(render_page(run, summary, None)).text
    assert "Runs against each other" in text and "+0 -2" in text


def test_learning_curves_begin_when_every_first_episode_has_ended(run):
    assert [(p.env_steps, p.success_rate, p.num_episodes) for p in run.curve("base")] == [
        (300, 0.5, 8)
    ]
    assert run.curve("absent") == ()


def test_grid_shows_the_same_states_of_both_policies(run, tmp_path):
    grid = make_grid(run, tmp_path / "grid.mp4")
    frames = imageio.mimread(grid.file, memtest=False)
    assert len(frames) == 43 + 20  # task 4, state 1: 42 steps
    assert "(2 of these 2)" in grid.note and "from the 4 states" in grid.note
    assert grid_note([(0, 1)], {(0, 1): True}, {(0, 1): True}, 9).count("(0 of these 1)") == 1
    for file in (run.paths.run_dir / "eval/base/main").glob(
        "*/*/*.mp4"
    ):  # records that came from another machine
        file.unlink()
    assert make_grid(run, tmp_path / "grid.mp4") is None


def test_nothing_but_a_beginning_makes_a_report_too(tmp_path):
    (tmp_path / "stages").mkdir()
    run = ScratchRun(Paths(tmp_path), num_tasks=2)
    assert make_grid(run, tmp_path / "grid.mp4") is None
    check(render_page(run, summary_of(run, ["demos"]), None))
    ElementTree.fromstring(figure(run))


def test_figure_is_a_file_of_its_own(run):
    text = figure(run)
    ElementTree.fromstring(text)
    assert "25.0 %" in text and "75.0 %" in text


def test_collected_files_are_few_and_hold_the_records(run, tmp_path):
    write_json(tmp_path / "summary.json", {})
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft/model.safetensors").write_bytes(b"base")
    run.collect(tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "records.tar.gz",
        "summary.json",
    ]
    listed = subprocess.run(
        ["tar", "tzf", "records.tar.gz"],
        cwd=tmp_path / "out",
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert {
        "ppo/base/metrics.jsonl",
        "ppo/seed1/metrics.jsonl",
        "stages/ppo.base.json",
        "logs/ppo.base.gpu.csv",
    } <= {*listed}
    assert "eval/base/main/1/EVAL-x/results.json" in listed and not any(
        "mp4" in name for name in listed
    )
    run.collect_models(tmp_path / "models")
    listed = subprocess.run(
        ["tar", "tf", "models.tar"],
        cwd=tmp_path / "models",
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert "sft/model.safetensors" in listed and "ppo/base/adapter_model.safetensors" in listed
    assert "ppo/base/metrics.jsonl" not in listed, "base is finished"
    assert {"ppo/seed1/metrics.jsonl", "stages/ppo.seed1.pieces.json"} <= {*listed}, (
        "seed1 is to go on"
    )
