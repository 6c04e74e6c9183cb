"""The driver: what it refuses before anything starts, and the whole loop with real Ray, FSDP, vLLM and tabletop."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tyro
from safetensors.torch import load_file

import ppo_vllm_ray_fsdp_vla as driver
from ppo.inputs import exp_dir_problems, process_problems
from utils.logging_utils import read_metrics
from utils.placement import Demand

ROOT = Path(__file__).parents[1]


def small_args(vla_path: Path, run_root_dir: Path, **changes) -> driver.Args:
    """Two FSDP ranks, 8 environments, 3 steps of 8 x 8 samples; a learning rate that moves the policy visibly."""
    values = {
        "vla_path": str(vla_path), "run_root_dir": str(run_root_dir), "exp_id": "run", "device": "cpu",
        "task_suite_name": "tests.worlds:SUITE", "dataset_name": "tabletop", "actor_num_gpus_per_node": "[2]",
        "local_rollout_batch_size": 8, "num_steps": 8, "local_mini_batch_size": 16, "per_device_train_batch_size": 8,
        "total_episodes": 3 * 64, "learning_rate": 5e-3, "num_env_processes": 2, "value_init_steps": 1,
        "temperature": 1.5,
    }  # fmt: skip
    return driver.Args(**(values | changes))


def command_line(args: driver.Args) -> list[str]:
    """The flags that differ from the defaults, as typed."""
    words = [sys.executable, "ppo_vllm_ray_fsdp_vla.py"]
    for field in dataclasses.fields(driver.Args):
        value = getattr(args, field.name)
        if value == field.default:
            continue
        if isinstance(value, bool):
            words.append(f"--{field.name}" if value else f"--no_{field.name}")
        else:
            words += [f"--{field.name}", *map(str, value if isinstance(value, tuple) else [value])]
    return words


def run_environment(args: driver.Args) -> dict[str, str]:
    """Variables of a run's process: a run on CPUs sees no GPU."""
    return {**os.environ, "CUDA_VISIBLE_DEVICES": ""} if args.device == "cpu" else dict(os.environ)


def run_driver(args: driver.Args) -> str:
    result = subprocess.run(
        command_line(args),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1100,
        env=run_environment(args),
    )
    output = result.stdout + result.stderr
    assert result.returncode == 0, output[-8000:]
    return output


def metrics_by_step(exp_dir: Path) -> dict[int, dict[str, float]]:
    merged: dict[int, dict[str, float]] = {}
    for line in read_metrics(exp_dir):
        merged.setdefault(int(line["step"]), {}).update(line)
    return merged


def test_lora_run_learns_syncs_and_writes_what_it_promises(tiny_model_dir, tmp_path):
    args = small_args(
        tiny_model_dir, tmp_path, use_lora=True, lora_rank=4, num_epochs=2, save_freq=2, eval_final=True,
        num_trials_per_task=2, task_ids=(1,), vllm_num_engines=2, num_steps=16, local_mini_batch_size=64,
        per_device_train_batch_size=32, total_episodes=4 * 256, gamma=0.0,
    )  # fmt: skip
    output = run_driver(args)
    assert "step 4/4" in output and "ETA" in output
    exp_dir = tmp_path / "run"
    steps = metrics_by_step(exp_dir)
    assert sorted(steps) == [1, 2, 3, 4]

    # critic warm-up: no policy update in step 1, so step 2 acts with the initial policy; later ones with others
    assert "train/policy_loss" not in steps[1] and steps[2]["train/approx_kl_k3"] > 1e-4
    for step in steps:
        assert steps[step]["train/engine_logprob_max_diff"] < 1e-4, (
            "engine and trainer are not the same policy"
        )
    assert (
        steps[2]["train/first_minibatch_ratio_max_abs_dev"]
        < 1e-5
        < steps[2]["train/ratio_max_abs_dev"]
    )

    # only the chosen task was played, and each episode's result came back for its task
    episodes = {
        k: v
        for k, v in steps[4].items()
        if k.endswith("num_episodes") and k.startswith("curriculum/")
    }
    assert set(episodes) == {"curriculum/task_1_num_episodes"}
    assert sum(episodes.values()) == sum(s["rollout/num_episodes"] for s in steps.values()) > 0
    assert json.loads((exp_dir / "curriculum.json").read_text())["stats"].keys() == {"1"}

    evaluation = json.loads((exp_dir / "eval_final.json").read_text())
    assert evaluation["overall"]["episodes"] == 2 and steps[4]["eval/num_episodes"] == 2
    metadata = json.loads((exp_dir / "best_return" / "metadata.json").read_text())
    assert metadata.keys() >= {
        "timestamp", "ema_return", "current_return", "training_step", "global_step", "exp_id", "vla_path"
    }  # fmt: skip
    assert (exp_dir / "step_2" / "training_state" / ".metadata").exists()
    assert list(exp_dir.glob("events.out.tfevents.*"))
    adapter, middle = (
        load_file(d / "adapter_model.safetensors") for d in (exp_dir, exp_dir / "step_2")
    )
    assert adapter.keys() == middle.keys() and any((adapter[n] != middle[n]).any() for n in adapter)
    assert any(t.any() for n, t in adapter.items() if "lora_B" in n), (
        "the adapter was never trained"
    )

    # an adapter is no model: what needs one says how to get it
    with pytest.raises(ValueError, match="vla-scripts/merge.py --vla_path"):
        driver.check_files(dataclasses.replace(args, vla_path=str(exp_dir)), tmp_path / "other")
    # the run's folder is not written again, but every file in it is known: --overwrite may remove it
    with pytest.raises(ValueError, match="already holds a PPO run"):
        driver.check_files(args, exp_dir)
    assert exp_dir_problems(dataclasses.replace(args, overwrite=True), exp_dir) == []


@pytest.mark.slow
def test_full_run_with_its_own_critic_kl_and_token_ratios(tiny_model_dir, tmp_path):
    args = small_args(
        tiny_model_dir, tmp_path, value_model_type="vla", value_use_lora=False, beta=0.1, ratio_level="token",
        entropy_coef=0.01, total_episodes=2 * 64, value_init_steps=0, learning_rate=1e-3,
        policy_lr_scheduler_type="cosine", policy_lr_warmup_steps=1, enable_gradient_checkpointing=True,
        use_curriculum=False, old_logprobs="engine", num_value_epochs=2, num_env_groups=1,
        sharding_strategy="shard-grad-op",
    )  # fmt: skip
    run_driver(args)
    steps = metrics_by_step(tmp_path / "run")
    assert (
        steps[1]["train/ref_kl_k3"] == pytest.approx(0.0, abs=1e-4)
        and steps[2]["train/ref_kl_k3"] > 1e-4
    )
    assert steps[2]["train/engine_logprob_max_diff"] == 0.0, (
        "the engine's own log-probs were to be used"
    )
    assert steps[2]["train/first_minibatch_ratio_max_abs_dev"] < 1e-3, (
        "engine and trainer are not the same policy"
    )
    assert steps[2]["train/learning_rate"] < 1e-3
    saved, base = (
        load_file(tmp_path / "run" / "model.safetensors"),
        load_file(tiny_model_dir / "model.safetensors"),
    )
    assert saved.keys() == base.keys()
    assert (tmp_path / "run" / "dataset_statistics.json").exists()
    assert not driver.checkpoint_utils.check_model_dir(tmp_path / "run")
    assert exp_dir_problems(dataclasses.replace(args, overwrite=True), tmp_path / "run") == []


def test_the_next_rollout_is_collected_during_the_update(tiny_model_dir, tmp_path):
    args = small_args(
        tiny_model_dir, tmp_path, async_depth=1, use_lora=True, lora_rank=4, total_episodes=4 * 64, value_init_steps=0,
        eval_freq=3, num_trials_per_task=1, task_ids=(1,), per_device_train_batch_size=0, value_model_type="vla",
        beta=0.1,
    )  # fmt: skip
    run_driver(args)
    steps = metrics_by_step(tmp_path / "run")
    assert 0 < steps[1]["train/ref_kl_k3"] < steps[4]["train/ref_kl_k3"], (
        "away from the initial policy"
    )
    assert [steps[s]["train/policy_lag"] for s in (1, 2, 3, 4)] == [0, 1, 1, 1]
    # the first rollout is the trainer's own policy's, the later ones that of the version before: weights leave 1
    assert (
        steps[1]["train/engine_logprob_max_diff"] < 1e-4 < steps[2]["train/engine_logprob_max_diff"]
    )
    assert steps[1]["train/importance_weight_mean"] == pytest.approx(1.0, abs=1e-4)
    for step in (2, 3, 4):
        assert abs(steps[step]["train/importance_weight_mean"] - 1.0) > 1e-4
        assert steps[step]["train/first_minibatch_ratio_max_abs_dev"] < 1e-5, (
            "the ratio is against the own policy"
        )


def test_the_final_evaluation_is_that_of_the_evaluation_script_episode_by_episode(
    tiny_model_dir, tmp_path
):
    """Training has a shorter time limit and its own physics, and only training has them."""
    args = small_args(
        tiny_model_dir, tmp_path, task_suite_name="tests.worlds:DRIFT_SUITE", total_episodes=2 * 64, value_init_steps=0,
        max_env_length=3, eval_final=True, actor_num_gpus_per_node="[1]", local_mini_batch_size=32,
    )  # fmt: skip
    run_driver(args)
    words = [
        sys.executable, "run_libero_eval_vllm.py", "--pretrained_checkpoint", str(tmp_path / "run"),
        "--task_suite_name", args.task_suite_name, "--num_trials_per_task", "20", "--unnorm_key", "tabletop",
        "--num_envs", "8", "--local_log_dir", str(tmp_path / "logs"),
    ]  # fmt: skip
    done = subprocess.run(
        words, cwd=ROOT, capture_output=True, text=True, timeout=500, env=run_environment(args)
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    (file,) = (tmp_path / "logs").glob("*/results.json")
    expected = [
        {name: value for name, value in episode.items() if name != "video"}
        for episode in json.loads(file.read_text())["episodes"]
    ]
    found = json.loads((tmp_path / "run" / "eval_final.json").read_text())["episodes"]
    assert found == expected and len(found) == 40
    assert len({e["length"] for e in found}) > 5 and 5 < sum(e["success"] for e in found) < 35
    assert max(e["length"] for e in found) == 30, "the suite's limit"


def test_every_problem_of_a_command_line_is_reported_at_once(tmp_path):
    args = driver.Args(
        task_suite_name="table", local_mini_batch_size=48, per_device_train_batch_size=9, num_steps=32,
        local_rollout_batch_size=10, gamma=1.5, use_wandb=True, load_adapter_checkpoint="x", learning_rate=0.0,
        total_episodes=10,
    )  # fmt: skip
    with pytest.raises(ValueError) as error:
        driver.validate(args)
    text = str(error.value)
    assert (
        "--local_mini_batch_size 48 does not divide the rollout of a rank (32 steps x 10 envs / 1 ranks = 320)"
        in text
    )
    assert "use 40 or 64" in text
    parts = [
        "unknown task suite 'table'", "--per_device_train_batch_size 9", "--gamma 1.5", "--wandb_project",
        "needs --use_lora", "--learning_rate 0.0", "--total_episodes 10 is less than one rollout",
    ]  # fmt: skip
    assert [part for part in parts if part not in text] == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task_ids": (3, 99)}, "tabletop has tasks 0..9"),
        ({"task_ids": (3, 3)}, "--task_ids 3 3 names 3 twice"),
        (
            {"actor_num_gpus_per_node": "[3]", "local_rollout_batch_size": 8},
            "does not divide among 3 trainer ranks: use 6 or 9",
        ),
        ({"actor_num_gpus_per_node": "two"}, "is not a list"),
        ({"actor_num_gpus_per_node": "[0]"}, "positive whole numbers"),
        ({"curriculum_min_prob": 0.2}, "exceeds 1: use at most 0.1"),
        ({"num_trials_per_task": 51}, "50 fixed initial states"),
        ({"cliprange": 1.0}, "must be above 0 and below 1"),
        ({"num_env_groups": 99}, "exceeds --local_rollout_batch_size"),
        ({"device": "cpu", "offload": True}, "--offload"),
        ({"temperature": float("nan")}, "--temperature nan"),
        ({"data_root_dir": "d"}, "--dataset_name"),
    ],
)
def test_a_command_line_that_cannot_work_is_refused_by_name(changes, message):
    driver.validate(driver.Args())
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace("[", r"\[")):
        driver.validate(dataclasses.replace(driver.Args(), **changes))


def test_more_processes_than_this_machine_has_memory_for_are_refused():
    placed = Demand((1000,), num_engines=500, device="cpu")
    (problem,) = process_problems(placed, available_bytes=64 << 30)
    assert "1000 trainers and 500 engines" in problem and "750 GiB" in problem and "64.0" in problem
    assert process_problems(Demand((2,), num_engines=2, device="cpu"), 4 << 30) == []
    assert process_problems(Demand((1000,), num_engines=500, device="cuda"), 64 << 30) == []


def test_a_run_with_a_note_keeps_its_name_over_restarts(tiny_model_dir, tmp_path, monkeypatch):
    """The name of the folder is made once, note included, and given to every attempt."""
    commands: list[list[str]] = []
    monkeypatch.setattr(
        driver, "run_attempts", lambda *attempts: commands.extend(attempts[:2]) or 0
    )
    args = small_args(tiny_model_dir, tmp_path, exp_id=None, run_id_note="trial", max_restarts=2)
    monkeypatch.setattr(sys, "argv", command_line(args)[1:])
    assert driver.supervise(args) == 0
    names = set()
    for command in commands:
        attempt = tyro.cli(driver.Args, args=command[2:], use_underscores=True)
        driver.validate(attempt)
        names.add(attempt.exp_id)
    assert len(names) == 1 and "--trial--" in names.pop()


def test_folders_and_engine_options_are_checked_before_anything_starts(tiny_model_dir, tmp_path):
    good = small_args(tiny_model_dir, tmp_path)
    driver.check_files(good, tmp_path / "run")
    wrong = dataclasses.replace(
        good, dataset_name="libero_goal", engine_args='{"no_such_option": 1}'
    )
    with pytest.raises(ValueError) as error:
        driver.check_files(wrong, tmp_path / "run")
    assert "libero_goal" in str(error.value) and "tabletop" in str(error.value)
    assert "no_such_option" in str(error.value) and "0.26" in str(error.value)
    with pytest.raises(ValueError, match="not a folder"):
        driver.check_files(dataclasses.replace(good, vla_path="/nowhere"), tmp_path / "run")


def test_empty_dimensions_of_the_statistics_are_ignored_on_request_unless_all_are_empty(
    tiny_model_dir, tmp_path
):
    args = small_args(tiny_model_dir, tmp_path, ignore_empty_dimensions=False)
    assert driver.counted_tokens(args) is None
    args = dataclasses.replace(args, ignore_empty_dimensions=True)
    assert driver.counted_tokens(args) == [0, 1, 2, 5, 6], "q01 = q99 = 0 in dimensions 3 and 4"

    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
    empty = {"q01": [0.0] * 7, "q99": [0.0] * 7}
    (model / "dataset_statistics.json").write_text(json.dumps({"tabletop": {"action": empty}}))
    args = dataclasses.replace(args, vla_path=str(model))
    with pytest.raises(ValueError, match="ignore_empty_dimensions leaves no action token"):
        driver.check_files(args, tmp_path / "run")


def test_an_adapter_for_another_base_is_refused(tiny_model_dir, tmp_path):
    from prismatic.extern.hf.modeling_prismatic import load_model
    from utils import peft_utils

    model = load_model(tiny_model_dir)
    wrapper = peft_utils.add_lora(model, rank=2)
    peft_utils.save_adapter(wrapper, dict(model.state_dict()), tmp_path / "adapter")
    assert peft_utils.check_adapter_fits(tmp_path / "adapter", tiny_model_dir) == []
    from prismatic.extern.hf.tiny_prismatic import TinyVLAConfig, save_tiny_vla

    save_tiny_vla(TinyVLAConfig(image_size=28, llm_dim=96), tmp_path / "other")
    args = small_args(
        tmp_path / "other",
        tmp_path,
        use_lora=True,
        load_adapter_checkpoint=str(tmp_path / "adapter"),
    )
    (tmp_path / "other" / "dataset_statistics.json").write_bytes(
        (tiny_model_dir / "dataset_statistics.json").read_bytes()
    )
    with pytest.raises(ValueError, match="is an adapter for another base"):
        driver.check_files(args, tmp_path / "run")
