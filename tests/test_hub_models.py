"""Every program with a hub id: the driver, merging, evaluation and fine-tuning, with real Ray, FSDP and vLLM."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import hub_server
from tests.hub_server import COMMIT, OTHER_COMMIT
from tests.test_console import QUIET, foreign_lines
from tests.test_driver import ROOT, command_line, small_args

HUB_ID = "openvla/tiny"


def run(server, home: Path, words: list[str], code: int = 0, **variables: str) -> str:
    """Output of a command with that hub; it must end with `code`, and without a traceback if that is not 0."""
    # With CUDA's tools and no GPU torch warns that there is none.
    variables |= {"CUDA_VISIBLE_DEVICES": "", "CUDA_HOME": "/usr/local/cuda"}
    environment = hub_server.environment(server, home, **variables)
    environment = {name: value for name, value in environment.items() if name not in QUIET}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    output = done.stdout + done.stderr
    assert done.returncode == code and (code == 0 or "Traceback" not in output), output[-6000:]
    return output


@pytest.fixture
def server(tiny_model_dir):
    with hub_server.serving() as server:
        server.add(HUB_ID, tiny_model_dir)
        yield server


def read(file: Path) -> dict:
    return json.loads(file.read_text())


def test_a_run_from_a_hub_id_records_it_and_its_adapter_merges_and_acts(server, tmp_path):
    home, exp_dir = tmp_path / "home", tmp_path / "run"
    args = small_args(
        HUB_ID, tmp_path, use_lora=True, lora_rank=4, total_episodes=64, value_init_steps=0
    )
    assert foreign_lines(run(server, home, command_line(args))) == []
    recorded = {"vla_path": HUB_ID, "revision": COMMIT}
    assert recorded.items() <= read(exp_dir / "args.json").items()
    assert recorded.items() <= read(exp_dir / "metadata.json").items()
    base = read(exp_dir / "base_model.json")
    assert (base["path"], base["revision"]) == (HUB_ID, COMMIT)
    adapter = read(exp_dir / "adapter_config.json")
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == (HUB_ID, COMMIT)

    server.add("me/adapter", exp_dir)
    merged = tmp_path / "merged"
    words = [sys.executable, "vla-scripts/merge.py", "--vla_path", HUB_ID, "--revision", COMMIT]
    words += ["--check", "weights"]
    run(server, home, [*words, "--adapter_dir", "me/adapter", "--output_dir", str(merged)])
    metadata = read(merged / "merge_metadata.json")
    assert (metadata["base"], metadata["base_revision"]) == (HUB_ID, COMMIT)
    assert (metadata["adapter"], metadata["adapter_revision"]) == ("me/adapter", COMMIT)

    server.add("me/merged", merged)
    words = [sys.executable, "run_libero_eval_vllm.py", "--pretrained_checkpoint", "me/merged"]
    words += ["--task_ids", "0", "--num_trials_per_task", "2", "--max_env_length", "3"]
    output = run(server, home, [*words, "--local_log_dir", str(tmp_path / "logs")])
    assert foreign_lines(output) == []
    (results,) = (tmp_path / "logs").glob("EVAL-tabletop-merged-*/results.json")
    found = read(results)
    assert (found["checkpoint"], found["checkpoint_revision"]) == ("me/merged", COMMIT)
    assert (found["args"]["pretrained_checkpoint"], found["args"]["revision"]) == (
        "me/merged",
        COMMIT,
    )


RESUMED = """
import json, sys
from pathlib import Path
import ppo_vllm_ray_fsdp_vla as driver
args = driver.Args(vla_path="openvla/tiny", exp_id="run", **json.loads(sys.argv[2]))
print(driver.fetch_models(args, Path(sys.argv[1])).vla_path)
"""


def test_a_resumed_run_stays_at_its_commit_unless_a_revision_is_given(
    server, tiny_model_dir, tmp_path
):
    server.add(HUB_ID, tiny_model_dir, OTHER_COMMIT)  # the branch has moved on
    (tmp_path / "args.json").write_text(json.dumps({"vla_path": HUB_ID, "revision": COMMIT}))

    def commit(**flags: str) -> str:
        words = [sys.executable, "-c", RESUMED, str(tmp_path), json.dumps(flags)]
        return Path(run(server, tmp_path / "home", words).splitlines()[-1]).name

    assert commit(resume="auto") == COMMIT
    assert commit(resume="auto", revision="main") == OTHER_COMMIT == commit()


def test_fine_tuning_starts_from_a_hub_id(server, tmp_path):
    home, data, output = tmp_path / "home", tmp_path / "data", tmp_path / "sft"
    words = [sys.executable, "vla-scripts/make_demos.py", "--output_dir", str(data)]
    run(server, home, [*words, "--num_episodes", "2", "--image_size", "28"])
    words = [sys.executable, "vla-scripts/finetune.py", "--vla_path", HUB_ID, "--device", "cpu"]
    words += ["--data_root_dir", str(data), "--dataset_name", "tabletop_no_noops"]
    words += ["--max_steps", "1", "--per_device_train_batch_size", "2", "--output_dir", str(output)]
    assert "--max_steps 0" in run(server, home, [*words, "--max_steps", "0"], 2)
    assert not server.requests  # nothing is downloaded for a command line that cannot work
    run(server, home, words)
    recorded = {"vla_path": HUB_ID, "revision": COMMIT}
    assert recorded.items() <= read(output / "args.json").items()
    assert recorded.items() <= read(output / "metadata.json")["args"].items()


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["ppo_vllm_ray_fsdp_vla.py", "--device", "cpu", "--vla_path", "openvla/none"], 2),
        (["run_libero_eval_vllm.py", "--pretrained_checkpoint", "openvla/none"], 2),
        (["vla-scripts/merge.py", "--vla_path", "openvla/none", "--adapter_dir", "me/x", "--output_dir", "o"], 2),
        (["vla-scripts/finetune.py", "--vla_path", "openvla/none"], 2),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)  # fmt: skip
def test_a_model_that_is_not_there_is_refused_like_any_bad_flag(server, tmp_path, words, code):
    message = run(server, tmp_path, [sys.executable, *words], code)
    assert "openvla/none: there is no such folder here" in message


def test_a_shared_snapshot_is_asked_of_every_node():
    from utils.ray_utils import probe_node

    folder = f"/nowhere/models--openvla--tiny/snapshots/{COMMIT}"
    problems = probe_node("/nowhere/probe", "/nowhere/answer", {folder: {"config.json": 1}})
    assert (
        f"no model folder {folder}: copy it there, or use an HF_HOME on a file system"
        in problems[0]
    )
