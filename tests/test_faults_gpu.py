"""Faults and resuming on GPUs: NCCL or CUDA IPC between trainer and engine, fused AdamW, engines that sleep.

A GPU's sums differ from run to run, so nothing here is compared to the last bit. That a replaced engine and a resumed
trainer have the right weights shows in the engine's log-probs, which must equal the trainer's at every step.
"""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from tests.test_driver import metrics_by_step, run_driver
from tests.test_faults import FAULTS, fault_args, run_through
from tests.test_resume_run import stop_in_update
from utils.logging_utils import read_metrics

NUM_GPUS = torch.cuda.device_count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not NUM_GPUS, reason="needs an NVIDIA GPU: there is none here"),
]
two_gpus = pytest.mark.skipif(NUM_GPUS < 2, reason=f"needs two GPUs: {NUM_GPUS} here")
# Of a step's mean |engine - trainer| log-prob of a token, bfloat16 on both sides; a step moves it by 0.3 and more.
TOLERANCE = 0.05
LAYOUTS = {"separate": {"colocate": False}, "colocated": {"colocate": True}}
GOES_ON = "going on from the last checkpoint"
CASES = {
    "separate": ("an engine, during a rollout", "an engine, during an update", "a trainer, during an update",
                 "the driver, during an update", "an engine that hangs", "a trainer that hangs",
                 "an engine with a spare"),
    "colocated": ("an engine, during a rollout", "an engine, during an update", "a trainer, during an update",
                  "the driver, during a rollout", "an engine with a spare"),
}  # fmt: skip


def gpu_args(layout: str, model_dir: Path, folder: Path, **changes):
    """One trainer and one engine, in eager mode for a quicker start; an update takes several seconds."""
    values = {
        "device": "cuda", "actor_num_gpus_per_node": "[1]", "local_mini_batch_size": 16,
        "per_device_train_batch_size": 8, "vllm_enforce_eager": True, "deterministic": False, "hang_timeout_s": 60.0,
        "num_epochs": 10, "learning_rate": 1e-3, "gpu_memory_utilization": 0.05,
        "engine_args": json.dumps({"kv_cache_memory_bytes": 256 << 20}),  # several runs may share a GPU
    }  # fmt: skip
    return fault_args(model_dir, folder, "run", **(values | LAYOUTS[layout] | changes))


def assert_engines_agree(exp_dir: Path) -> None:
    steps = metrics_by_step(exp_dir)
    assert {n: m["train/engine_logprob_abs_diff"] for n, m in steps.items()} == {
        n: pytest.approx(0.0, abs=TOLERANCE) for n in steps
    }


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        pytest.param(layout, name, marks=[two_gpus] if layout == "separate" else [])
        for layout, names in CASES.items()
        for name in names
    ],
)
def test_a_run_survives(layout: str, name: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    fault = FAULTS[name]
    if (layout, name) == (
        "colocated",
        "an engine, during an update",
    ):  # which sleeps
        fault = dataclasses.replace(fault, says=GOES_ON)
    run_through([fault], gpu_args(layout, tiny_model_dir, tmp_path), tmp_path)
    assert_engines_agree(tmp_path / "run")


@pytest.mark.parametrize("layout", [pytest.param("separate", marks=two_gpus), "colocated"])
def test_a_run_stopped_within_an_update_goes_on(layout, tiny_model_dir, tmp_path, monkeypatch):
    counter = tmp_path / "steps"
    monkeypatch.setenv("PPO_VLA_TEST_STEPS", str(counter))
    args = gpu_args(layout, tiny_model_dir, tmp_path, deterministic=True)
    assert stop_in_update(args, 2, counter) == 0
    run = tmp_path / "run"
    (within,) = run.glob("step_1_minibatch_*")
    assert json.loads((within / "training_state/state.json").read_text())["worlds"]
    output = run_driver(dataclasses.replace(args, resume="auto"))
    assert f"going on from {within}" in output
    assert [m["step"] for m in read_metrics(run)] == [1, 2, 3]
    assert_engines_agree(run)
