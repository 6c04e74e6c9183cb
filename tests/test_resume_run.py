"""Whole runs with real Ray, FSDP, vLLM: stopped by a signal, gone on with, and equal to one that never stopped."""

import dataclasses
import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

import ppo_vllm_ray_fsdp_vla as driver
from tests.test_driver import (
    ROOT,
    command_line,
    metrics_by_step,
    run_driver,
    run_environment,
    small_args,
)
from utils.logging_utils import read_metrics
from utils.training_state import load_prefixed

NUM_STEPS = 3
NUM_MINIBATCHES = 4 * 4  # of an update, of policy and of critic each


def run_args(model_dir: Path, folder: Path, name: str, **changes) -> driver.Args:
    """Episodes of 5 steps are under way when a rollout of 8 ends; an update has 4 x 4 minibatches of each kind."""
    values = {
        "exp_id": name, "use_lora": True, "lora_rank": 4, "lora_dropout": 0.1, "num_epochs": 4, "save_freq": 1,
        "local_mini_batch_size": 8, "per_device_train_batch_size": 4, "max_env_length": 5, "value_init_steps": 0,
        "total_episodes": NUM_STEPS * 64, "task_suite_name": "tests.worlds:COUNTED_SUITE", "deterministic": True,
        "policy_lr_scheduler_type": "cosine",
    }  # fmt: skip
    return small_args(model_dir, folder, **(values | changes))


def stop_in_update(args: driver.Args, step: int, counter: Path) -> int:
    """Run, send SIGTERM after the first minibatches of training step `step`; returns the exit status."""
    updates = counter.with_suffix(".updates")
    for file in (counter, updates):
        file.write_bytes(b"")
    num_before = (step - 1) * 2 * 2 * NUM_MINIBATCHES  # of policy and critic, on two ranks
    process = subprocess.Popen(
        command_line(args),
        cwd=ROOT,
        env=run_environment(args) | {"PPO_VLA_TEST_UPDATES": str(updates)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        deadline = time.monotonic() + 900
        while updates.stat().st_size <= num_before:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0][
                -4000:
            ]
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=500)
    finally:
        process.kill()
    assert "SIGTERM: stopping" in output, output[-4000:]
    return process.returncode


def training_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_prefixed(checkpoint / "training_state", "")


def assert_equal_runs(
    one: Path, two: Path, num_steps: int, not_compared: tuple[str, ...] = ("time/", "mem/")
) -> dict[str, torch.Tensor]:
    """Metrics and the training state after `num_steps` are the same to the last bit; returns that state."""
    first, second = metrics_by_step(one), metrics_by_step(two)
    for step in first:
        differing = {
            name: (first[step].get(name), second[step].get(name))
            for name in first[step] | second[step]
            if not name.startswith(not_compared) and first[step].get(name) != second[step].get(name)
        }
        assert differing == {}, step
    expected, found = (training_tensors(run / f"step_{num_steps}") for run in (one, two))
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    return expected


@pytest.fixture(scope="module")
def runs(straight_run, tiny_model_dir) -> Path:
    """`straight` never stopped; `stopped` ended by SIGTERM within the update of step 2."""
    folder = straight_run.parent
    counter = folder / "stopped.steps"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PPO_VLA_TEST_STEPS", str(counter))
        assert stop_in_update(run_args(tiny_model_dir, folder, "stopped"), 2, counter) == 0
        yield folder


def test_a_run_stopped_within_an_update_goes_on_to_the_last_bit(runs, tiny_model_dir):
    straight, stopped = runs / "straight", runs / "stopped"
    (within,) = stopped.glob("step_1_minibatch_*")
    assert 0 < int(within.name.rpartition("_")[2]) < 2 * NUM_MINIBATCHES, (
        "it was to be stopped within the update"
    )
    assert [m["step"] for m in read_metrics(stopped)] == [1]
    state = json.loads((within / "training_state/state.json").read_text())
    assert any(episode["actions"] for world in state["worlds"] for episode in world["running"])

    output = run_driver(run_args(tiny_model_dir, runs, "stopped", resume="auto", keep_last=1))
    assert f"going on from {within}" in output
    assert not within.exists(), (
        "the checkpoint within the update is of no use once the next one is whole"
    )
    assert [p.name for p in stopped.glob("step_*")] == ["step_3"], "--keep_last 1"
    assert [m["step"] for m in read_metrics(stopped)] == [1, 2, 3]
    expected = assert_equal_runs(straight, stopped, NUM_STEPS)
    assert any(".exp_avg." in name for name in expected)
    initial = training_tensors(straight / "step_1")
    assert any(
        not torch.equal(initial[name], expected[name])
        for name in expected
        if name.startswith("policy.weight")
    )


def test_evaluations_leave_training_as_it_is(straight_run, tiny_model_dir, tmp_path, monkeypatch):
    """Episodes of 5 steps are under way after each rollout of 8, when the evaluation begins."""
    monkeypatch.setenv("PPO_VLA_TEST_STEPS", str(tmp_path / "steps"))
    run_driver(run_args(tiny_model_dir, tmp_path, "evaluated", eval_freq=1, num_trials_per_task=3))
    steps = metrics_by_step(tmp_path / "evaluated")
    assert [steps[step]["eval/num_episodes"] for step in steps] == [6] * NUM_STEPS
    assert all(steps[step]["rollout/num_not_repeated"] == 0 for step in steps)
    not_compared = ("time/", "mem/", "eval/")
    assert_equal_runs(straight_run, tmp_path / "evaluated", NUM_STEPS, not_compared)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_trainers(runs, tiny_model_dir):
    straight, other = runs / "straight", runs / "other"
    shutil.copytree(straight, other)
    args = run_args(
        tiny_model_dir, runs, "other", resume=str(other / "step_1"), actor_num_gpus_per_node="[1]",
        local_mini_batch_size=16, total_episodes=2 * 64,
    )  # fmt: skip
    output = run_driver(args)
    assert (
        "--actor_num_gpus_per_node was [2], is [1]" in output
        and "--local_mini_batch_size was 8, is 16" in output
    )
    assert [m["step"] for m in read_metrics(other)] == [1, 2]
    assert {p.name for p in (other / "cut/1").iterdir()} == {"metrics.jsonl", "step_2", "step_3"}
    one, two = metrics_by_step(straight)[2], metrics_by_step(other)[2]
    # the same policy acted in the same episodes, and the same critic valued them
    for name in (
        "rollout/num_episodes",
        "rollout/episode_return",
        "rollout/num_not_repeated",
        "rollout/ema_return",
    ):
        assert one[name] == two[name], name
    for name in ("train/value_mean", "train/return_mean", "train/explained_variance"):
        assert two[name] == pytest.approx(one[name], rel=1e-5, abs=1e-6), name
    assert two["train/engine_logprob_max_diff"] < 1e-4
    assert training_tensors(other / "step_2").keys() >= {
        "critic.weight.fc1.weight",
        "rank_0.random.cpu",
    }


def test_flags_that_may_not_change_are_refused_before_anything_starts(runs, tiny_model_dir):
    args = run_args(tiny_model_dir, runs, "straight", resume="auto")
    assert driver.choose_checkpoint(args, runs / "straight") == runs / "straight" / "step_3"
    wrong = dataclasses.replace(args, lora_rank=2, num_steps=16)
    with pytest.raises(ValueError, match="2 problem") as error:
        driver.choose_checkpoint(wrong, runs / "straight")
    assert "--lora_rank is 2" in str(error.value) and "--num_steps is 16" in str(error.value)
