"""Model folders: complete ones pass, damaged ones are named, and nothing is ever half written or overwritten."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from prismatic.model_files import weight_files
from utils import checkpoint_utils


@pytest.fixture
def model_dir(tiny_model_dir, tmp_path):
    return shutil.copytree(tiny_model_dir, tmp_path / "model")


def test_a_complete_folder_has_no_problems(model_dir):
    assert checkpoint_utils.check_model_dir(model_dir) == []


@pytest.mark.parametrize(
    "name",
    ["config.json", "preprocessor_config.json", "tokenizer_config.json", "model.safetensors"],
)
def test_a_missing_file_is_named(model_dir, name):
    (model_dir / name).unlink()
    (problem,) = checkpoint_utils.check_model_dir(model_dir)
    assert name in problem


def test_truncated_weights_and_damaged_json_are_named_together(model_dir):
    weights = model_dir / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    (model_dir / "dataset_statistics.json").write_text('{"tabletop": {')
    problems = "\n".join(checkpoint_utils.check_model_dir(model_dir))
    assert (
        "model.safetensors cannot be read" in problems
        and "dataset_statistics.json is not valid JSON" in problems
    )


def test_a_shard_that_the_index_names_and_the_folder_lacks_is_half_written(model_dir):
    state = load_file(model_dir / "model.safetensors")
    (model_dir / "model.safetensors").unlink()
    checkpoint_utils.save_weights(model_dir, state, max_shard_size="1MB")
    assert checkpoint_utils.check_model_dir(model_dir) == []
    assert {n: tuple(t.shape) for n, t in state.items()} == checkpoint_utils.read_shapes(model_dir)
    lost = weight_files(model_dir)[1]
    lost.unlink()
    (problem,) = checkpoint_utils.check_model_dir(model_dir)
    assert lost.name in problem and "half-written" in problem


def test_an_adapter_folder_says_how_to_merge_it(tmp_path):
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "models/base"})
    )
    (problem,) = checkpoint_utils.check_model_dir(tmp_path)
    assert (
        f"merge.py --vla_path models/base --adapter_dir {tmp_path} --output_dir {tmp_path}-merged"
        in problem
    )


def test_a_failed_write_leaves_what_was_there_and_no_remains(tmp_path):
    target = tmp_path / "out"
    with checkpoint_utils.atomic_directory(target) as folder:
        (folder / "a").write_text("first")
    with (
        pytest.raises(FileExistsError, match="--overwrite"),
        checkpoint_utils.atomic_directory(target),
    ):
        raise AssertionError("the block must not run")
    with (
        pytest.raises(OSError, match="full"),
        checkpoint_utils.atomic_directory(target, overwrite=True) as folder,
    ):
        (folder / "a").write_text("second")
        raise OSError("disk full")
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and (target / "a").read_text() == "first"
    with checkpoint_utils.atomic_directory(target, overwrite=True) as folder:
        (folder / "b").write_text("third")
    assert {p.name for p in target.iterdir()} == {"b", "checksums.json"}


def test_a_saved_model_takes_over_the_sources_files_but_not_its_history(model_dir, tmp_path):
    for name in ("log.txt", "metrics.jsonl", "args.json", "events.out.tfevents.1", "metadata.json"):
        (model_dir / name).write_text("of an earlier run")
    (model_dir / "notes.txt").write_text("kept")
    state = {
        name: tensor + 1 for name, tensor in load_file(model_dir / "model.safetensors").items()
    }
    statistics = {"other": {"action": {"q01": [0.0], "q99": [1.0]}}}
    files = {"dataset_statistics.json": statistics}
    checkpoint_utils.save_model_dir(tmp_path / "out", state, model_dir, json_files=files)
    assert checkpoint_utils.check_model_dir(tmp_path / "out") == []
    names = {p.name for p in (tmp_path / "out").iterdir()}
    expected = {p.name for p in model_dir.iterdir()} - {
        "log.txt", "metrics.jsonl", "args.json", "events.out.tfevents.1", "metadata.json"
    }  # fmt: skip
    assert names == expected | {"checksums.json"}
    assert json.loads((tmp_path / "out" / "dataset_statistics.json").read_text()) == statistics
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(saved[n], t) for n, t in state.items())
