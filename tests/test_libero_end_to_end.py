"""Training and evaluation on real LIBERO, small: the driver and the evaluation script with the simulator on OSMesa."""

import json
import subprocess
import sys

import pytest

from tests.test_driver import ROOT, metrics_by_step, run_driver, small_args

pytestmark = pytest.mark.libero


def test_ppo_runs_on_libero_with_curriculum_resets_and_videos(tiny_model_dir, tmp_path):
    args = small_args(
        tiny_model_dir, tmp_path, task_suite_name="libero_spatial", task_ids=(3, 6), max_env_length=5, num_steps=6,
        local_rollout_batch_size=2, num_env_processes=None, local_mini_batch_size=6, per_device_train_batch_size=6,
        actor_num_gpus_per_node="[1]", total_episodes=2 * 12, eval_final=True, num_trials_per_task=1, save_video=True,
        center_crop=True, colocate=True, gpu_memory_utilization=0.5, num_steps_wait=2, use_lora=True, lora_rank=4,
    )  # fmt: skip
    output = run_driver(args)
    assert "step 2/2" in output
    exp_dir = tmp_path / "run"
    steps = metrics_by_step(exp_dir)
    # Two environments, five steps an episode: one ends in each rollout of six, and another task may follow.
    assert steps[1]["rollout/num_episodes"] == steps[2]["rollout/num_episodes"] == 2
    assert {k for k in steps[2] if k.endswith("_num_episodes")} >= {
        "curriculum/task_3_num_episodes"
    }
    assert (
        sum(
            v
            for k, v in steps[2].items()
            if k.startswith("curriculum") and k.endswith("num_episodes")
        )
        == 4
    )
    assert all(steps[step]["train/engine_logprob_max_diff"] < 1e-4 for step in steps)
    assert not any(steps[step].get("rollout/num_void_steps") for step in steps)

    evaluation = json.loads((exp_dir / "eval_final.json").read_text())
    assert evaluation["overall"]["episodes"] == 2 and evaluation["overall"]["dropped_attempts"] == 0
    assert [e["length"] for e in evaluation["episodes"]] == [220, 220], "not --max_env_length"
    assert [t["instruction"] for t in evaluation["per_task"]] == [
        "pick up the black bowl on the cookie box and place it on the plate",
        "pick up the black bowl next to the cookie box and place it on the plate",
    ]
    videos = sorted(p.name for p in (exp_dir / "videos" / "step_2" / "worker_0").iterdir())
    assert videos == [
        "contact_sheet.png",
        "task_03-episode_000-failure.mp4",
        "task_06-episode_000-failure.mp4",
    ]


def test_evaluation_visits_the_fixed_states_and_says_what_the_assets_are(tiny_model_dir, tmp_path):
    command = [
        sys.executable, "run_libero_eval_vllm.py", "--pretrained_checkpoint", str(tiny_model_dir), "--task_suite_name",
        "libero_spatial", "--task_ids", "2", "--num_trials_per_task", "3", "--unnorm_key", "tabletop",
        "--max_env_length", "4", "--center_crop", "--num_envs", "2", "--local_log_dir", str(tmp_path),
    ]  # fmt: skip
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1100)
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
    (run_dir,) = tmp_path.iterdir()
    results = json.loads((run_dir / "results.json").read_text())
    assert [(e["task_id"], e["init_state_id"], e["length"]) for e in results["episodes"]] == [
        (2, 0, 4), (2, 1, 4), (2, 2, 4)
    ]  # fmt: skip
    from ppo.envs.libero_install import asset_remarks

    assert results["remarks"] == asset_remarks()
    assert all(remark in (run_dir / "eval.log").read_text() for remark in results["remarks"])
