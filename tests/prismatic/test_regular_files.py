"""Files are opened only if they are regular and of bounded size; weights are finite where they are loaded."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import ppo_vllm_ray_fsdp_vla as driver
import run_libero_eval_vllm
from ppo import inputs, resume
from prismatic import regular_files
from prismatic.extern.hf.modeling_prismatic import load_model
from prismatic.finite_weights import nonfinite
from prismatic.model_files import read_json, read_json_object
from prismatic.vla.action_normalization import resolve_unnorm_key, statistics_problems
from prismatic.vla.datasets.statistics import _digest, load_dataset_statistics
from tests.test_malformed_files import DATASET, rlds
from utils import checkpoint_utils, merge_utils, training_state
from utils.logging_utils import read_metrics

ROOT = Path(__file__).parents[2]
NAN, INF = float("nan"), float("inf")

READ_A_DEVICE = """
import sys
from prismatic.model_files import checksum_problems, read_json_object
from prismatic.regular_files import folder_problems
try:
    read_json_object(sys.argv[1] + "/config.json")
except ValueError as error:
    assert "is a character device, reached through a link to /dev/zero" in str(error)
assert len(folder_problems(sys.argv[1])) == 1
assert len(checksum_problems(sys.argv[1])) == 1
print("REFUSED")
"""


def test_a_link_to_a_device_that_never_ends_is_not_read(tmp_path):
    (tmp_path / "config.json").symlink_to("/dev/zero")
    (tmp_path / "checksums.json").write_text(json.dumps({"sha256": {"config.json": "0" * 64}}))
    limit = 2 << 30  # of memory: without the check the process would fill it, not the machine
    done = subprocess.run(
        [sys.executable, "-c", READ_A_DEVICE, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    assert "REFUSED" in done.stdout, done.stderr[-2000:]


def test_a_regular_file_is_read_through_links(tmp_path):
    (tmp_path / "blob").write_bytes(b"abc")
    (tmp_path / "name").symlink_to("blob")
    (tmp_path / "other").symlink_to("name")
    assert regular_files.read_file(tmp_path / "other") == b"abc"
    assert regular_files.read_file(tmp_path / "other", max_bytes=3) == b"abc"
    with pytest.raises(ValueError, match="other has 3 bytes, the limit for such a file is 2"):
        regular_files.read_file(tmp_path / "other", max_bytes=2)
    assert regular_files.file_problems([tmp_path / "blob", tmp_path / "other"]) == []


def test_files_of_proc_which_say_that_they_are_empty_are_not_read():
    assert regular_files.read_file("/proc/self/environ") == b""


def test_a_file_without_permission_is_named():
    folder = Path(tempfile.mkdtemp())  # where another user may look into it
    try:
        folder.chmod(0o755)
        (folder / "config.json").write_text("{}")
        (folder / "config.json").chmod(0o000)
        before = os.geteuid()
        if before == 0:
            os.seteuid(65534)
        try:
            problems = regular_files.folder_problems(folder)
        finally:
            os.seteuid(before)
    finally:
        shutil.rmtree(folder)
    (problem,) = problems
    assert "Permission denied" in problem and f"{folder}/config.json" in problem


def test_a_key_twice_is_an_error_at_any_depth(tmp_path):
    file = tmp_path / "a.json"
    for text in ('{"a": 1, "a": 1}', '[{"b": {"a": 1, "c": 2, "a": 3}}]'):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"a.json .*the key 'a' appears twice"):
            read_json(file)
    file.write_text('{"a": {"a": 1}, "b": {"a": 1}}')
    assert read_json_object(file)["b"] == {"a": 1}


# ---- finite weights ----


def test_tensors_that_are_not_finite_are_found_and_no_others():
    names = {
        "nan": torch.tensor([1.0, NAN]),
        "inf": torch.tensor([[INF, 1.0]], dtype=torch.bfloat16),
        "both": torch.tensor([INF, -INF]),
        "half": torch.tensor([-INF], dtype=torch.float16),
        "double": torch.tensor([NAN], dtype=torch.float64),
    }
    fine = {
        "sum overflows": torch.full((8,), 3e38),
        "sum overflows in half": torch.full((100,), 6e4, dtype=torch.float16),
        "beyond float32": torch.tensor([1e300], dtype=torch.float64),
        "empty": torch.zeros(0),
        "scalar": torch.tensor(2.0),
        "integers": torch.tensor([1, 2]),
        "mask": torch.tensor([True]),
    }
    assert nonfinite({**fine, **names}.items()) == list(names)
    assert nonfinite([]) == []


def test_a_large_tensor_is_checked_as_the_exact_test_says():
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        tensor = torch.randn(300, 1000, generator=generator).to(dtype)
        assert nonfinite([("t", tensor)]) == []
        tensor[173, 512] = NAN
        assert nonfinite([("t", tensor)]) == ["t"]
        assert nonfinite([("t", tensor.T)]) == ["t"]


@pytest.fixture
def broken_dir(tiny_model_dir, tmp_path) -> tuple[Path, str]:
    folder = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    state = load_file(folder / "model.safetensors")
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    state[name][3, 4] = NAN
    state[name][5, 6] = INF
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_that_is_not_finite_is_named_where_it_is_loaded(broken_dir, dtype):
    folder, name = broken_dir
    says = rf"model/model.safetensors: {name} holds 2 of \d+ values that are NaN or infinite"
    with pytest.raises(ValueError, match=says):
        load_model(folder, dtype=dtype)


@pytest.mark.parametrize("is_sharded", [False, True])
def test_programs_name_a_weight_that_is_not_finite_before_anything_starts(
    broken_dir, tiny_model_dir, tmp_path, is_sharded
):
    folder, name = broken_dir
    if is_sharded:
        state = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        checkpoint_utils.save_weights(folder, state, max_shard_size="400KB")
    assert checkpoint_utils.check_model_dir(folder) == [], "its headers are right"
    assert checkpoint_utils.check_model_values(tiny_model_dir) == []
    (problem,) = checkpoint_utils.check_model_values(folder)
    assert re.search(rf"model[-0-9a-z]*\.safetensors: {name} holds 2 of", problem)
    arguments = {"vla_path": str(folder), "run_root_dir": str(tmp_path), "exp_id": "run"}
    with pytest.raises(ValueError, match=f"{name} holds 2 of"):
        inputs.check_files(driver.Args(**arguments), tmp_path / "run")
    evaluation = run_libero_eval_vllm.Args(pretrained_checkpoint=folder)
    assert problem in run_libero_eval_vllm.find_problems(evaluation)


def test_merging_names_a_base_that_is_not_finite_and_a_type_that_overflows(
    broken_dir, tiny_model_dir, tmp_path
):
    folder, name = broken_dir
    adapter = merge_utils.LoraAdapter(tmp_path, {}, {}, {}, {})
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=f"model.safetensors: {name} holds 2 of"):
        merge_utils.merge_weights(folder, adapter, tmp_path / "out", torch.float32)
    state = load_file(tiny_model_dir / "model.safetensors")
    state[name][0, 0] = 1e6
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    merge_utils.merge_weights(folder, adapter, tmp_path / "out", torch.bfloat16)
    with pytest.raises(ValueError, match=rf"{name} .* overflows torch.float16: use --dtype"):
        merge_utils.merge_weights(folder, adapter, tmp_path / "out", torch.float16)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_whose_tensors_are_not_finite_is_named(tmp_path):
    import torch.distributed.checkpoint as dcp

    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    tensors = training_state.trained_tensors("policy", model, optimizer)
    saved = {name: tensor.clone() for name, tensor in tensors.items()}
    saved["policy.weight.weight"][1, 1] = INF
    dcp.save(saved, checkpoint_id=tmp_path, no_dist=True)
    with pytest.raises(ValueError, match=r"policy.weight.weight holds values that are NaN"):
        training_state.load_trained(tmp_path, "policy", model, optimizer)


# ---- statistics and metrics ----


def test_statistics_are_refused_with_the_value_and_the_rule():
    good = {"q01": [0.0, -1.0], "q99": [0.0, 1.0]}
    assert statistics_problems({"action": good}) == []
    assert statistics_problems({"action": good | {"mask": [True, False], "std": [0, 1]}}) == []
    for change, says in (
        ({"q01": [0.5, -1.0]}, "q01[0] 0.5 above q99[0] 0.0"),
        ({"q99": [0.0, 1e7]}, "q99[1] is 10000000.0"),
        ({"q99": [0.0, NAN]}, "q99 is [0.0, nan]: it must be a list of finite numbers"),
        ({"q01": [0.0]}, "1 numbers in q01 and 2 in q99"),
        ({"std": [1.0, INF]}, "std is [1.0, inf]: it must be 2 finite numbers"),
        ({"mask": [True]}, "mask is [True]: it must be 2 times true or false"),
    ):
        (problem,) = statistics_problems({"action": good | change})
        assert says in problem


def test_statistics_of_another_action_are_not_used():
    two = {"action": {"q01": [0.0, 0.0], "q99": [1.0, 1.0]}}
    with pytest.raises(ValueError, match="'mine' have 2 dimensions, an action has 7"):
        resolve_unnorm_key({"mine": two}, "tabletop", "mine")


def test_cached_statistics_that_make_no_sense_are_computed_again(tmp_path):
    folder = rlds(tmp_path)
    first = load_dataset_statistics(tmp_path, DATASET)
    (cache,) = folder.glob("dataset_statistics_*.json")
    wrong = json.loads(cache.read_text())["statistics"]
    wrong["action"]["q01"][0] = 5.0
    cache.write_text(json.dumps({"sha256": _digest(wrong), "statistics": wrong}))
    assert load_dataset_statistics(tmp_path, DATASET) == first


@pytest.mark.parametrize(
    "line", [b'{"step": 1e999}', b'{"step": NaN}', b'{"step": true}', b"\xff\xfe", b"[" * 10**5]
)
def test_a_damaged_line_of_the_metrics_is_put_aside_on_resume(tmp_path, line):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1}\n' + line + b"\n" + b'{"step": 2}\n')
    resume.cut_after(tmp_path, 2, None)
    assert file.read_bytes() == b'{"step": 1}\n'
    assert (tmp_path / "cut/1/metrics.jsonl").read_bytes() == line + b"\n" + b'{"step": 2}\n'
    file.write_bytes(line + b"\n")
    if line.startswith((b"\xff", b"[")):
        with pytest.raises(ValueError, match="metrics.jsonl has a damaged line"):
            read_metrics(tmp_path)
