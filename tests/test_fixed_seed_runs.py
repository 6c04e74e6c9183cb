"""A refactor keeps fixed-seed runs identical: metrics of every step and the final weights, compared with a record.

    .venv/bin/python -m tests.test_fixed_seed_runs          writes the record anew, after an intended change
    bash scripts/test.sh tests/test_fixed_seed_runs.py -m slow

The record is `tests/data/fixed_seed_runs.json`. Runs are deterministic on one kind of CPU. On another kind, whose
kernels round differently, metrics are compared with a tolerance and weights are not compared.
"""

import hashlib
import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.test_driver import metrics_by_step, run_driver, small_args

RECORD = Path(__file__).parent / "data" / "fixed_seed_runs.json"
NOT_COMPARED = ("time/", "mem/", "sync/")  # seconds, memory, and how weights travel

LORA = {"use_lora": True, "lora_rank": 4, "num_epochs": 2, "save_freq": 1}
RUNS: dict[str, dict[str, Any]] = {
    # Two engines: 128 samples per step.
    "lora_shared_critic": LORA | {"vllm_num_engines": 2, "total_episodes": 3 * 128, "curriculum_tau": 0.1},
    "full_own_critic": {
        "value_model_type": "vla", "value_use_lora": False, "beta": 0.1, "ratio_level": "token",
        "entropy_coef": 0.01, "policy_lr_scheduler_type": "cosine", "policy_lr_warmup_steps": 1,
        "use_curriculum": False, "learning_rate": 1e-3, "cliprange_high": 0.28,
    },
    "async": LORA | {"async_depth": 1, "value_init_steps": 0, "norm_adv": False},
    # Episodes of 5 steps are under way when a rollout of 8 ends; the run is resumed after step 2 of 3.
    "resumed": LORA | {"max_env_length": 5, "lora_dropout": 0.1, "max_approx_kl": 0.5},
}  # fmt: skip


def run_once(name: str, model_dir: Path, folder: Path) -> dict[str, Any]:
    """Run the driver in a process; return its metrics by step and a hash of what it trained."""
    args = small_args(model_dir, folder, exp_id=name, deterministic=True, **RUNS[name])
    if name == "resumed":
        # The schedule's length comes from total_episodes, which may change on resume: here it is constant.
        first = dict(RUNS[name], total_episodes=2 * 64)
        run_driver(small_args(model_dir, folder, exp_id=name, deterministic=True, **first))
        args.resume = "auto"
    run_driver(args)
    exp_dir = folder / name
    (weights,) = exp_dir.glob("*model.safetensors")
    return {
        "metrics": {
            str(step): {k: v for k, v in line.items() if not k.startswith(NOT_COMPARED)}
            for step, line in metrics_by_step(exp_dir).items()
        },
        "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
    }


def cpu_model() -> str:
    """Name of this machine's CPU; kernels are chosen by it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_fixed_seed_run_is_the_recorded_one(name, tiny_model_dir, tmp_path):
    record = json.loads(RECORD.read_text())
    found = run_once(name, tiny_model_dir, tmp_path)
    expected = record["runs"][name]
    assert found["metrics"].keys() == expected["metrics"].keys()
    is_same_cpu = record["cpu"] == cpu_model()
    for step, line in expected["metrics"].items():
        assert found["metrics"][step].keys() == line.keys(), step
        if is_same_cpu:
            assert found["metrics"][step] == line, step
        else:
            assert found["metrics"][step] == pytest.approx(line, rel=1e-3, abs=1e-5), step
    if is_same_cpu:
        assert found["weights_sha256"] == expected["weights_sha256"]


def write_record() -> None:
    """Run everything and write the record."""
    from tests.conftest import save_tiny_model

    with tempfile.TemporaryDirectory() as folder:
        model_dir = save_tiny_model(Path(folder) / "models")
        runs = {name: run_once(name, model_dir, Path(folder)) for name in RUNS}
    RECORD.write_text(json.dumps({"cpu": cpu_model(), "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(write_record())
