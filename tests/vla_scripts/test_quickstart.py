import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.utils.reports.test_page import check

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("quickstart", ROOT / "vla-scripts/quickstart.py")
quickstart = importlib.util.module_from_spec(SPEC)
sys.modules["quickstart"] = quickstart  # dataclasses look their module up
SPEC.loader.exec_module(quickstart)


def stage(name: str, code: str) -> "quickstart.Stage":
    return quickstart.Stage(name, name, (sys.executable, "-c", code))


def results(successes: list[list[bool]]) -> dict:
    """A results.json with `successes[task][state]`."""

    def part(values):
        rate = sum(values) / len(values)
        return {
            "successes": sum(values),
            "episodes": len(values),
            "rate": rate,
            "wilson_95": [rate / 2, 1.0],
        }

    episodes = [
        {"task_id": t, "init_state_id": s, "seed": 9, "success": ok}
        for t, row in enumerate(successes)
        for s, ok in enumerate(row)
    ]
    return {
        "overall": part([ok for row in successes for ok in row]),
        "per_task": [{"instruction": f"do {t}", **part(row)} for t, row in enumerate(successes)],
        "episodes": episodes,
    }


@pytest.fixture
def finished(tmp_path):
    """A run's folder as its stages leave it."""
    before, after = [[True, False], [False, False]], [[True, True], [True, False]]
    for name, data in (("sft", before), ("merged", after)):
        folder = tmp_path / f"eval_{name}" / "EVAL-tabletop"
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps(results(data)))
    (tmp_path / "ppo").mkdir()
    (tmp_path / "ppo/eval_final.json").write_text(json.dumps(results([[True, True], [True, True]])))
    lines = [
        {"step": 1, "time/collect_s": 3.0, "time/generate_s": 1.5, "time/wait_env_s": 0.5, "time/update_s": 1.0,
         "time/sync_s": 0.2, "time/step_s": 4.2, "time/env_steps_total": 64.0,
         "rollout/num_episodes": 1.0, "rollout/success_rate": 1.0},
        {"step": 2, "time/collect_s": 3.0, "time/generate_s": 2.0, "time/wait_env_s": 0.5, "time/update_s": 1.0,
         "time/sync_s": 0.2, "time/step_s": 4.2, "time/env_steps_total": 128.0,
         "rollout/num_episodes": 3.0, "rollout/success_rate": 1 / 3},
        {"step": 2, "time/eval_s": 5.0},
    ]  # fmt: skip
    ppo_args = dict.fromkeys(quickstart.SHOWN_PPO_FLAGS, 0.123) | {"value_init_steps": 1}
    # 128 steps until the first episodes have ended: the world's time limit is 16
    ppo_args |= {"vllm_num_engines": 2, "local_rollout_batch_size": 4}
    ppo_args |= {"max_env_length": None, "task_suite_name": "tabletop"}
    (tmp_path / "ppo/args.json").write_text(json.dumps(ppo_args))
    (tmp_path / "ppo/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_replay_plays_the_evaluated_episode_with_the_model(tiny_model_dir, tmp_path):
    def episode(task_id: int, success: bool) -> dict:
        return {"task_id": task_id, "init_state_id": 3, "seed": 9, "success": success}

    clips = quickstart.replay(
        tiny_model_dir, "random", [episode(0, False), episode(7, False)], tmp_path
    )
    assert [clip.success for clip in clips] == [False, False]  # a random policy
    assert "red block" in clips[0].instruction and "purple ball" in clips[1].instruction
    assert all(b"ftyp" in clip.mp4[:12] and len(clip.mp4) > 2000 for clip in clips)
    again = quickstart.replay(tiny_model_dir, "random", [episode(0, False)], tmp_path)
    assert again[0].mp4 == clips[0].mp4


def test_flags_spell_booleans_as_tyro_wants_them():
    values = {"lr": 0.1, "use_lora": True, "image_aug": False, "task_ids": 3}
    assert quickstart.flags(values) == [
        "--lr",
        "0.1",
        "--use_lora",
        "--no_image_aug",
        "--task_ids",
        "3",
    ]


def test_stages_hand_folders_on_and_take_the_seed(tmp_path):
    stages = {
        s.name: s.command for s in quickstart.make_stages(quickstart.Args(seed=5, run_dir=tmp_path))
    }

    def value(name, flag):
        return stages[name][stages[name].index(flag) + 1]

    assert value("demos", "--output_dir") == value("finetune", "--data_root_dir")
    assert (
        value("finetune", "--output_dir")
        == value("eval_sft", "--pretrained_checkpoint")
        == value("ppo", "--vla_path")
    )
    assert value("merge", "--vla_path") == value("ppo", "--vla_path")
    assert value("merge", "--adapter_dir") == str(
        Path(value("ppo", "--run_root_dir")) / value("ppo", "--exp_id")
    )
    assert value("merge", "--output_dir") == value("eval_merged", "--pretrained_checkpoint")
    assert [value(name, "--seed") for name in ("demos", "finetune", "ppo")] == ["5", "5", "5"]
    assert (
        "--seed" not in stages["eval_sft"] + stages["eval_merged"]
    )  # the same episodes whatever the seed
    assert stages["ppo"][:2] == (
        "bash",
        str(ROOT / "scripts/train_tabletop_cpu.sh"),
    )  # see test_docs.py


def test_validate_names_every_problem_and_protects_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(quickstart, "BASE_MODEL", tmp_path / "absent")
    (tmp_path / "file").write_text("mine")
    args = quickstart.Args(seed=-1, run_dir=tmp_path)
    with pytest.raises(ValueError) as error:
        quickstart.validate(args)
    for text in ("--seed -1", "absent", "not empty: choose another folder"):
        assert text in str(error.value)
    with pytest.raises(ValueError, match="not recognisably a quick start"):
        quickstart.main(dataclasses.replace(args, overwrite=True))
    assert (tmp_path / "file").read_text() == "mine"


def test_overwrite_replaces_an_earlier_run(tmp_path, monkeypatch):
    monkeypatch.setattr("utils.checkpoint_utils.check_model_dir", lambda path: [])
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / quickstart.MARKER).write_text('{"seed": "0", "run_dir": "run"}')
    (run_dir / "report.html").write_text("")
    monkeypatch.setattr(
        quickstart, "make_stages", lambda args: [stage("one", "raise SystemExit(3)")]
    )
    with pytest.raises(ValueError, match="already holds a quick start"):
        quickstart.main(quickstart.Args(run_dir=run_dir))
    (run_dir / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="holds thesis.txt"):
        quickstart.main(quickstart.Args(run_dir=run_dir, overwrite=True))
    assert (run_dir / "report.html").exists()
    (run_dir / "thesis.txt").unlink()
    with pytest.raises(quickstart.StageError):
        quickstart.main(quickstart.Args(run_dir=run_dir, overwrite=True))
    assert not (run_dir / "report.html").exists() and (run_dir / "logs/1_one.log").exists()


def test_stages_run_in_order_with_their_own_logs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = "import os; print('out', os.environ['COLUMNS']); os.write(2, b'err'); open('a', 'x')"
    seconds = quickstart.run_stages(
        [stage("first", code), stage("second", "open('a'); open('b', 'x')")], tmp_path
    )
    assert list(seconds) == ["first", "second"] and all(s > 0 for s in seconds.values())
    log = (tmp_path / "logs/1_first.log").read_text()
    assert log.startswith(f"$ {sys.executable} -c") and "out 180" in log and "err" in log
    assert (tmp_path / "b").exists()


def test_a_failing_stage_stops_the_run_with_the_end_of_its_log(tmp_path):
    code = "for i in range(100): print('line', i)\nraise SystemExit(7)"
    stages = [stage("bad", code), stage("never", "open('never', 'x')")]
    with pytest.raises(quickstart.StageError) as error:
        quickstart.run_stages(stages, tmp_path)
    message = str(error.value)
    assert message.startswith("bad failed") and "code 7" in message and "1_bad.log" in message
    assert "line 99" in message and "line 50\n" not in message
    assert not (tmp_path / "logs/2_never.log").exists()


def test_progress_lines_reach_the_console(tmp_path):
    lines = []
    code = "print('INFO step 3/9 | success 0.5'); print('other')"
    quickstart.run_command((sys.executable, "-c", code), tmp_path / "log", lines.append)
    assert lines == ["INFO step 3/9 | success 0.5", "other"]
    shown = [match[0] for line in lines if (match := quickstart.SHOWN.search(line))]
    assert shown == ["step 3/9 | success 0.5"]


def test_ending_the_run_ends_the_stage(tmp_path):
    child = "import os, time; print(os.getpid()); time.sleep(900)"
    parent = (
        "import signal, sys; sys.path.insert(0, 'vla-scripts'); import quickstart; from pathlib import Path\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        f"import os; os.chdir({str(tmp_path)!r})\n"
        f"quickstart.run_command((sys.executable, '-c', {child!r}), Path('log'), lambda line: print(line, flush=True))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", parent], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    pid = int(process.stdout.readline())  # it passes on what the stage says: it is waiting for it
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=400) == 143
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_summary_has_the_agreed_keys_from_the_right_files(finished):
    args = quickstart.Args(seed=4, run_dir=finished)
    assert quickstart.summarize(args, ppo_s=12.34, wall_s=56.78) == {
        "sft_success_rate": 0.25,
        "ppo_success_rate": 1.0,
        "merged_success_rate": 0.75,
        "num_eval_episodes": 4,
        "ppo_env_steps": 128,
        "ppo_wall_s": 12.3,
        "wall_s": 56.8,
        "seed": 4,
    }


def test_ppo_phases_add_up_to_the_stage(finished):
    phases = quickstart.ppo_phases(quickstart.read_metrics(finished / "ppo"), 20.0)
    assert sum(phases.values()) == pytest.approx(20.0)
    assert phases["engine generating"] == 3.5 and phases["collecting, the rest"] == pytest.approx(
        1.5
    )
    assert phases["greedy evaluation"] == 5.0


def test_report_is_made_from_the_files(finished):
    args = quickstart.Args(seed=4, run_dir=finished)
    summary = quickstart.summarize(args, 20.0, 30.0)
    page = quickstart.make_report(args, summary, {quickstart.PPO_TITLE: 20.0}, ())
    texts = (
        "seed 4",
        "25.0 %",
        "100.0 %",
        "75.0 %",
        "do 1",
        "--seed 4",
        "0.123",
    )
    for text in texts:
        assert text in page, text
    check(page)
    assert "The shaded steps train only the critic" in page


def test_chosen_episodes_are_those_that_ppo_turned_one_per_task_first():
    before = results([[False, False, True], [False, False, False], [True, True, True]])
    after = results([[True, True, True], [False, True, True], [True, True, True]])
    chosen = quickstart.choose_episodes(before, after, 3)
    assert [(e["task_id"], e["init_state_id"]) for e in chosen] == [(0, 0), (1, 1), (0, 1)]
    assert len(quickstart.choose_episodes(after, after, 3)) == 3  # nothing turned: any
