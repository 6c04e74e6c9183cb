import copy
import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location(
    "libero_from_scratch", ROOT / "vla-scripts/libero_from_scratch.py"
)
script = importlib.util.module_from_spec(SPEC)
sys.modules["libero_from_scratch"] = script  # dataclasses look their module up
SPEC.loader.exec_module(script)
CHECKS = (*script.CHECKS, "held_out")


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "osmesa")


def stages_of(tmp_path, **options) -> dict:
    made = script.StageMaker(script.Args(run_dir=tmp_path, **options))
    return {stage.name: stage for stage in made.all()}


def value(stage, flag: str) -> str:
    return stage.command[stage.command.index(flag) + 1]


def values(stage, flag: str) -> list[str]:
    rest = stage.command[stage.command.index(flag) + 1 :]
    return list(
        rest[: next((i for i, text in enumerate(rest) if text.startswith("--")), len(rest))]
    )


def test_stages_come_in_order_and_hand_folders_on(tmp_path):
    stages = stages_of(tmp_path, variants=("base", "seed1"))
    assert list(stages) == [
        "demos", "model", "sft", "ppo.base", "merge.base", "ppo.seed1", "merge.seed1",
        "eval.supervised.main.0", "eval.supervised.main.1", "eval.base.main.0", "eval.base.main.1",
        "eval.seed1.main.0", "eval.seed1.main.1",
    ]  # fmt: skip
    sft = value(stages["sft"], "--output_dir")
    assert value(stages["sft"], "--data_root_dir") == value(stages["demos"], "--output_dir")
    assert value(stages["sft"], "--vla_path") == value(stages["model"], "--output_dir")
    assert sft == value(stages["eval.supervised.main.0"], "--pretrained_checkpoint")
    for name in ("base", "seed1"):
        assert (
            value(stages[f"ppo.{name}"], "--vla_path")
            == value(stages[f"merge.{name}"], "--vla_path")
            == sft
        )
        exp_dir = f"{value(stages[f'ppo.{name}'], '--run_root_dir')}/{value(stages[f'ppo.{name}'], '--exp_id')}"
        assert (
            value(stages[f"merge.{name}"], "--adapter_dir")
            == exp_dir
            == str(tmp_path / "ppo" / name)
        )
        merged = value(stages[f"merge.{name}"], "--output_dir")
        assert merged == value(stages[f"eval.{name}.main.1"], "--pretrained_checkpoint") != sft
        assert value(stages[f"ppo.{name}"], "--resume") == "auto"
    can_stop = {
        name: stage.stop_signal for name, stage in stages.items() if stage.stop_signal is not None
    }
    assert can_stop == {
        "demos": signal.SIGINT,
        "ppo.base": signal.SIGTERM,
        "ppo.seed1": signal.SIGTERM,
    }
    after = set()
    for name, stage in stages.items():
        assert set(stage.after) <= after
        after.add(name)


def test_an_evaluation_is_shared_out_and_all_policies_play_the_same_episodes(tmp_path):
    stages = stages_of(tmp_path, eval_parts=3)
    parts = [stages[f"eval.base.main.{i}"] for i in range(3)]
    assert [values(p, "--task_ids") for p in parts] == [list("012"), list("3456"), list("789")]
    assert values(parts[0], "--video_episodes") == [f"{t}:{s}" for t in range(3) for s in range(3)]
    for i, part in enumerate(parts):
        assert part.settings == stages[f"eval.supervised.main.{i}"].settings
        assert (
            part.settings["num_trials_per_task"] == "50"
            and part.settings["render_quality"] == "eval"
        )
    assert script.share_out((4, 5), 5) == [(4,), (5,)]


@pytest.mark.parametrize("variant", script.VARIANTS)
def test_variants_change_what_they_name_and_nothing_else(variant, tmp_path):
    base, changed = (
        stages_of(tmp_path, variants=(name,))[f"ppo.{name}"] for name in ("base", variant)
    )
    differing = {
        k
        for k in {*base.settings, *changed.settings}
        if base.settings.get(k) != changed.settings.get(k)
    }
    assert differing == set(script.VARIANTS[variant])


def test_every_variant_is_a_command_that_the_driver_takes(tmp_path):
    made = stages_of(tmp_path, variants=tuple(script.VARIANTS))
    script.check_commands(
        [made[f"ppo.{name}"] for name in script.VARIANTS], tmp_path / "checked.json"
    )
    assert set(json.loads((tmp_path / "checked.json").read_text())) == {
        f"ppo.{name}" for name in script.VARIANTS
    }


def test_each_program_takes_its_command_and_a_bad_flag_stops_before_anything(tmp_path, capsys):
    made = stages_of(tmp_path, checks=CHECKS)
    some = [made[name] for name in ("demos", "model", "merge.base", "eval.base.seed.0", "held_out")]
    script.check_commands(some, tmp_path / "checked.json")
    bad = stages_of(tmp_path, set=("demos.num_epsiodes=3",))
    with pytest.raises(SystemExit) as stopped:
        script.check_commands([bad["demos"]], tmp_path / "checked.json")
    assert stopped.value.code == 2 and "num_epsiodes" in capsys.readouterr().err
    bad = stages_of(tmp_path, set=("ppo.local_mini_batch_size=500",))
    with pytest.raises(ValueError, match="--local_mini_batch_size 500 does not divide"):
        script.check_commands([bad["ppo.base"]], tmp_path / "checked.json")


def test_changes_of_the_recipe_reach_their_stage_as_flags(tmp_path):
    changes = (
        "ppo.learning_rate=3e-4",
        "ppo.use_curriculum=false",
        "ppo.cliprange_high=none",
        "sft.max_steps=7",
    )
    recipe = copy.deepcopy(script.RECIPE)
    stages = stages_of(tmp_path, set=changes, task_ids=(3, 6))
    ppo = stages["ppo.base"]
    assert value(ppo, "--learning_rate") == "3e-4" and "--no_use_curriculum" in ppo.command
    assert "--cliprange_high" not in ppo.command and "cliprange_high" not in ppo.settings
    assert value(stages["sft"], "--max_steps") == "7"
    assert values(ppo, "--task_ids") == values(stages["demos"], "--task_ids") == ["3", "6"]
    assert recipe == script.RECIPE, "the recipe itself stays"


def test_a_policy_made_earlier_takes_the_place_of_the_first_stages(tmp_path):
    stages = stages_of(tmp_path, sft_dir=tmp_path / "sft", checks=CHECKS)
    assert next(iter(stages)) == "ppo.base"
    assert value(stages["ppo.base"], "--vla_path") == str(tmp_path / "sft")
    assert stages["ppo.base"].settings["sft_dir"] == str(tmp_path / "sft")
    assert "--data_root_dir" not in stages["held_out"].command


def test_checks_evaluate_every_policy_otherwise(tmp_path):
    stages = stages_of(tmp_path, checks=CHECKS)
    for policy in ("supervised", "base"):
        assert value(stages[f"eval.{policy}.fast.0"], "--render_quality") == "fast"
        seed = stages[f"eval.{policy}.seed.1"]
        assert (
            value(seed, "--seed") == "8" and "seed" not in stages[f"eval.{policy}.main.1"].settings
        )
        assert "--video_episodes" not in seed.command
        assert value(stages[f"eval.{policy}.sampled.0"], "--temperature") == "1.0"
        assert value(seed, "--num_trials_per_task") == "20"
        assert value(stages[f"eval.{policy}.main.0"], "--num_trials_per_task") == "50"
    assert not any(
        ".sampled." in name or name == "held_out" for name in stages_of(tmp_path, checks=("fast",))
    )
    assert value(stages["held_out"], "--num_envs") == value(
        stages["ppo.base"], "--local_rollout_batch_size"
    )


def test_a_gpu_is_given_to_children_and_to_the_renderer(tmp_path):
    stages = stages_of(tmp_path, gpus=(2,))
    for name in ("demos", "eval.base.main.0", "ppo.base"):
        assert value(stages[name], "--env_gpu_id") == "2"  # EGL does not know CUDA_VISIBLE_DEVICES
    cores, evaluation = len(os.sched_getaffinity(0)), stages["eval.base.main.0"]
    assert value(evaluation, "--num_envs") == str(8 * cores) and value(
        evaluation, "--num_processes"
    ) == str(cores)
    assert all(stage.environment["CUDA_VISIBLE_DEVICES"] == "2" for stage in stages.values())
    assert "--colocate" in stages["ppo.base"].command
    assert (
        stages["ppo.base"].settings == stages_of(tmp_path, gpus=(0,))["ppo.base"].settings
    )  # another may go on
    assert "CUDA_VISIBLE_DEVICES" not in stages_of(tmp_path)["ppo.base"].environment


def test_of_two_gpus_the_engine_has_the_second_to_itself(tmp_path):
    stages = stages_of(tmp_path, gpus=(1, 3))
    ppo = stages["ppo.base"]
    assert ppo.environment["CUDA_VISIBLE_DEVICES"] == "1,3" and "--colocate" not in ppo.command
    assert value(ppo, "--async_depth") == "1" == value(ppo, "--env_gpu_id")
    evaluation = stages["eval.base.main.0"]
    assert (
        evaluation.environment["CUDA_VISIBLE_DEVICES"] == "3"
        and value(evaluation, "--env_gpu_id") == "1"
    )
    assert ppo.settings != stages_of(tmp_path, gpus=(1,))["ppo.base"].settings, (
        "a step behind is another run"
    )


def test_two_gpus_may_also_have_a_trainer_and_an_engine_each(tmp_path):
    ppo = stages_of(tmp_path, gpus=(1, 3), colocate=True)["ppo.base"]
    assert "--colocate" in ppo.command and value(ppo, "--actor_num_gpus_per_node") == "[2]"
    at = ppo.command.index("--env_gpu_id")
    assert ppo.command[at + 1 : at + 3] == ("1", "3")
    alone = stages_of(tmp_path, gpus=(1,))["ppo.base"]
    for flag in (
        "--local_rollout_batch_size",
        "--local_mini_batch_size",
    ):  # the same samples in the same minibatches
        assert 2 * int(value(ppo, flag)) == int(value(alone, flag))


def test_a_ppo_run_is_complete_when_its_last_step_is_published(tmp_path):
    stage = stages_of(tmp_path, set=("ppo.total_episodes=2048", "ppo.local_rollout_batch_size=32"))[
        "ppo.base"
    ]
    folder = tmp_path / "ppo/base"
    folder.mkdir(parents=True)
    assert not stage.is_complete()
    (folder / "metadata.json").write_text('{"training_step": 1}')
    (folder / "adapter_model.safetensors").write_bytes(b"")
    assert not stage.is_complete()
    (folder / "metadata.json").write_text('{"training_step": 2}')
    assert stage.is_complete()


def test_wrong_flags_are_all_named_before_anything_is_written(tmp_path):
    args = script.Args(
        run_dir=tmp_path / "run", variants=("base", "best", "base"), task_ids=(10,), set=("ppo=3", "x.y=1"),
        estimate=("sft=soon", "lunch=3"), time_limit_s=0.0, eval_parts=0, reserve_s=-1.0, sft_dir=tmp_path / "none",
    )  # fmt: skip
    with pytest.raises(ValueError) as error:
        script.main(args)
    named = [
        "--variants best",
        "names base twice",
        "--task_ids",
        "--set ppo=3",
        "--set x.y=1",
        "--estimate sft=soon",
    ]
    for text in [
        *named,
        "--estimate lunch=3",
        "--time_limit_s",
        "--eval_parts",
        "--reserve_s",
        "none",
    ]:
        assert text in str(error.value), text
    assert not (tmp_path / "run").exists()


def test_folders_that_stages_would_remove_must_be_of_an_earlier_run(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("of years")
    (tmp_path / "summary.json").write_text("mine")
    with pytest.raises(ValueError) as error:
        script.main(script.Args(run_dir=tmp_path, collect=tmp_path))
    assert "holds model and is not a run of this program" in str(error.value)
    assert "holds summary.json, which would be replaced" in str(error.value)
    assert (tmp_path / "model" / "weights").exists()
    (tmp_path / script.CHECKED_COMMANDS).write_text("{}")
    assert script.folder_problems(script.Args(run_dir=tmp_path)) == []


def test_a_run_without_an_adapter_to_merge_is_refused(tmp_path):
    with pytest.raises(ValueError, match="ppo.use_lora"):
        script.validate(script.Args(run_dir=tmp_path, set=("ppo.use_lora=false",)))


def tiny_stage(name: str, code: str, **options) -> "script.Stage":
    return script.Stage(
        name, name, (sys.executable, "-c", code), settings={"code": code}, **options
    )


@pytest.fixture
def two_stages(monkeypatch, tmp_path):
    """A run of two short commands instead of the real ones."""
    codes = {"one": "print(1)", "two": "print(2)"}
    needs = {"one": 0.0, "two": 0.0}
    monkeypatch.setattr(script, "check_commands", lambda stages, file: None)
    made = lambda self: [tiny_stage(n, codes[n], needs_s=needs[n]) for n in codes]  # noqa: E731
    monkeypatch.setattr(script.StageMaker, "all", made)
    return codes, needs


def test_time_that_runs_out_is_an_exit_code_and_the_same_line_goes_on(two_stages, tmp_path):
    codes, needs = two_stages
    needs["two"] = 10_000.0
    args = script.Args(run_dir=tmp_path / "run", time_limit_s=5000.0)
    assert script.main(args) == script.EXIT_OUT_OF_TIME == 75
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (
        summary["stages"]["one"]["is_done"]
        and "two" not in summary["stages"]
        and not summary["is_complete"]
    )
    assert (
        script.main(dataclasses.replace(args, time_limit_s=20_000.0, collect=tmp_path / "out")) == 0
    )
    assert json.loads((tmp_path / "run/summary.json").read_text())["is_complete"]
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {
        "summary.json",
        "report.html",
        "records.tar.gz",
    }
    assert (tmp_path / "run/logs/one.log").read_text().count("$ ") == 1  # not repeated
    codes["one"] = "print(3)"
    with pytest.raises(ValueError, match="stage one is done with --code"):
        script.main(args)


TINY = {
    "demos": "num_episodes=2 render_quality=fast image_size=64",
    "model": "image_size=28 vision_dim=32 vision_depth=3 vision_heads=2 llm_dim=64 llm_depth=2 llm_heads=2 "
    "llm_mlp_dim=128",
    "sft": "max_steps=20 warmup_steps=2 per_device_train_batch_size=16 log_freq=10",
    "ppo": "total_episodes=2880 local_rollout_batch_size=2 num_steps=12 max_env_length=5 local_mini_batch_size=12 "
    "per_device_train_batch_size=12 lora_rank=4 value_init_steps=1 gpu_memory_utilization=0.5 num_steps_wait=2 "
    "num_env_processes=2",
    "eval": "num_trials_per_task=2 max_env_length=8",
}  # fmt: skip


def run_piece(tmp_path, limit_s: float, *argv: str) -> int:
    """One invocation at tiny sizes; returns its exit code."""
    changes = [f"{stage}.{change}" for stage, texts in TINY.items() for change in texts.split()]
    few = [f"{stage}=1" for stage in script.ESTIMATES_S]
    command = [
        "bash", "scripts/libero_spatial_from_scratch.sh", "--run_dir", str(tmp_path / "run"), "--task_ids", "3", "6",
        "--num_envs", "2", "--time_limit_s", str(limit_s), "--reserve_s", "20", "--set", *changes, "--estimate", *few,
        *argv,
    ]  # fmt: skip
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, script.EXIT_OUT_OF_TIME), (done.stdout + done.stderr)[-6000:]
    return done.returncode


@pytest.mark.slow
@pytest.mark.libero
@pytest.mark.timeout(3600)
def test_whole_run_in_pieces_with_ppo_interrupted(tmp_path):
    """Twenty minutes on two idle cores: PPO in two or more pieces, evaluations of every kind."""
    assert (
        run_piece(tmp_path, 2000.0, "--estimate", "ppo=3000") == script.EXIT_OUT_OF_TIME
    )  # everything before PPO
    ledger = script.Ledger(tmp_path / "run/stages")
    assert ledger.marker("sft") and not ledger.pieces("ppo.base")
    limits_s = iter(
        [100.0, 200.0, 400.0, 800.0, 1600.0]
    )  # longer each time: a slow machine must get somewhere too
    while (code := run_piece(tmp_path, next(limits_s))) == script.EXIT_OUT_OF_TIME:
        pass
    assert code == 0
    collect = ("--collect", str(tmp_path / "out"), "--collect_models", str(tmp_path / "m"))
    assert run_piece(tmp_path, 1000.0, "--checks", *CHECKS, *collect) == 0

    pieces = ledger.pieces("ppo.base")
    assert [p["outcome"] for p in pieces[:-1]] == ["stopped"] * (len(pieces) - 1) and len(
        pieces
    ) >= 2
    went_on = [p["first_step"] for p in pieces if "first_step" in p]
    assert len(went_on) >= 2 and went_on[0] == 1 and went_on[1] > 1
    lines = (tmp_path / "run/ppo/base/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(
        range(1, 121)
    )  # each once, none missing
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["is_complete"] and summary["ppo"]["base"]["env_steps"] == 2880
    assert {name: p["episodes"] for name, p in summary["policies"].items()} == {
        "supervised": 4,
        "base": 4,
    }
    assert set(summary["checks"]) == set(CHECKS)
    assert (
        summary["checks"]["held_out"]["num_equal"] == 0
        and summary["checks"]["held_out"]["num_demonstrations"] == 2
    )
    from ppo.envs.libero_install import asset_remarks

    assert summary["remarks"] == asset_remarks()
    collected = {p.name: p.stat().st_size for p in (tmp_path / "out").iterdir()}
    assert set(collected) == {
        "summary.json",
        "report.html",
        "figure.svg",
        "grid.mp4",
        "records.tar.gz",
    }
    assert (tmp_path / "m/models.tar").exists()
    markers = {p: p.read_text() for p in (tmp_path / "run/stages").glob("*.json")}
    assert run_piece(tmp_path, 1000.0, "--checks", *CHECKS) == 0  # nothing is left to do
    assert markers == {p: p.read_text() for p in (tmp_path / "run/stages").glob("*.json")}


def test_a_stage_that_another_invocation_is_at_comes_later(two_stages, tmp_path, monkeypatch):
    args = script.Args(run_dir=tmp_path / "run", time_limit_s=1000.0)
    for name in ("stages", "logs"):
        (tmp_path / "run" / name).mkdir(parents=True)
    ledger = script.Ledger(tmp_path / "run/stages")

    class UntilTwoIsDone(script.TimeLimit):
        left_s = property(lambda self: -1.0 if ledger.marker("two") else 500.0)

    with ledger.lock("one"), monkeypatch.context() as patch:
        patch.setattr(script, "TimeLimit", UntilTwoIsDone)
        assert (
            script.main(args) == script.EXIT_OUT_OF_TIME
        )  # it waited for the other as long as it could
        assert ledger.marker("two") and not ledger.marker("one") and not ledger.pieces("one")
    assert script.main(args) == 0 and ledger.marker("one")


def test_what_was_done_before_a_failure_is_reported_and_collected_with_the_log(
    two_stages, tmp_path
):
    codes, _ = two_stages
    codes["two"] = "print('why'); raise SystemExit(3)"
    with pytest.raises(script.StageError, match="code 3"):
        script.main(script.Args(run_dir=tmp_path / "run", collect=tmp_path / "out"))
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["stages"]["one"]["is_done"] and not summary["stages"]["two"]["is_done"]
    show = ["tar", "xzOf", "records.tar.gz", "logs/two.log"]
    log = subprocess.run(
        show, cwd=tmp_path / "out", capture_output=True, text=True, check=True
    ).stdout
    assert "why" in log


def test_the_script_sets_up_only_without_an_interpreter_of_ones_own(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", "scripts/libero_spatial_from_scratch.sh", "--gpus", "1"],
        cwd=ROOT, env={**os.environ, "PYTHON": str(python)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "vla-scripts/libero_from_scratch.py --gpus 1\n"
