"""Files from elsewhere run no code, lead out of no folder and reach no network; what was damaged is named."""

import ast
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from prismatic.extern.hf.modeling_prismatic import load_model
from prismatic.extern.hf.processing_prismatic import load_processor
from prismatic.model_files import (
    MAX_JSON_BYTES,
    checksum_problems,
    raise_file_problems,
    read_json_object,
    write_checksums,
)
from prismatic.vla.action_normalization import load_norm_stats
from prismatic.vla.datasets.rlds import iterate_episodes
from prismatic.vla.datasets.schema import check_dataset_dir
from prismatic.vla.datasets.statistics import load_dataset_statistics
from tests.test_malformed_files import DATASET, adapter, rlds
from utils import checkpoint_utils, peft_utils

ROOT = Path(__file__).parents[1]
SOURCES = [
    path
    for pattern in (
        "*.py",
        "ppo/**/*.py",
        "prismatic/**/*.py",
        "utils/**/*.py",
        "vla-scripts/*.py",
        "benchmarks/*.py",
    )
    for path in ROOT.glob(pattern)
]
# Calls that run what a file says, or send files away.
FORBIDDEN_CALLS = {
    "eval", "exec", "pickle.load", "pickle.loads", "cloudpickle.load", "cloudpickle.loads", "dill.load", "joblib.load",
    "yaml.load", "yaml.unsafe_load", "runpy.run_path", "pd.read_pickle",
}  # fmt: skip
FORBIDDEN_METHODS = {"push_to_hub", "upload_file", "upload_folder", "create_repo", "HfApi"}


@pytest.fixture
def model_dir(tiny_model_dir: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_model_dir, tmp_path / "model")


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# ---- code ----


def forbidden(call: ast.Call) -> str | None:
    """What is wrong with a call, None if nothing is."""
    name = ast.unparse(call.func)
    keywords = {k.arg: ast.unparse(k.value) for k in call.keywords}
    if name in FORBIDDEN_CALLS or name.rpartition(".")[2] in FORBIDDEN_METHODS:
        return name
    if name == "torch.load" and keywords.get("weights_only") != "True":
        return "torch.load without weights_only=True"
    wrong = [
        k
        for k in ("trust_remote_code", "allow_pickle", "push_to_hub")
        if keywords.get(k, "False") != "False"
    ]
    return f"{name}({wrong[0]}=...)" if wrong else None


def test_no_source_unpickles_trusts_or_uploads():
    assert len(SOURCES) > 80
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {problem}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and (problem := forbidden(node))
    ]
    assert found == []
    bad = "torch.load(x); np.load(f, allow_pickle=True); m.push_to_hub('x'); eval(y); A.b(trust_remote_code=True)"
    assert (
        sum(forbidden(n) is not None for n in ast.walk(ast.parse(bad)) if isinstance(n, ast.Call))
        == 5
    )


def test_a_tokenizers_code_is_not_run(model_dir, tmp_path):
    (model_dir / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    edit(
        model_dir / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    )
    edit(model_dir / "config.json", auto_map={"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"})
    edit(model_dir / "preprocessor_config.json", auto_map={"AutoImageProcessor": "evil.Evil"})
    load_processor(model_dir)
    load_model(model_dir)
    assert not (tmp_path / "ran").exists()


def test_a_pickle_is_no_model(model_dir, tmp_path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    (model_dir / "model.safetensors").unlink()
    (model_dir / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    assert "has no weights" in "\n".join(checkpoint_utils.check_model_dir(model_dir))
    with pytest.raises(ValueError, match="has no weights"):
        load_model(model_dir)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attn_implementation": "evil/kernel"}, "attn_implementation is not allowed"),
        ({"configuration_files": ["config.9.0.0.json"]}, "configuration_files is not allowed"),
        ({"quantization_config": {"quant_method": "x"}}, "quantization_config is not allowed"),
        (
            {"timm_model_ids": ["hf-hub:evil/model"] * 2},
            "timm_model_ids is .* names of timm's models",
        ),
        ({"timm_model_ids": ["local-dir:/tmp"] * 2}, "timm_model_ids is .* names of timm's models"),
        (
            {"model_type": "llama"},
            "model_type is 'llama', not 'openvla': this is another architecture",
        ),
        ({"image_sizes": [10**9, 10**9]}, "image_sizes is"),
        (
            {"text_config": {"num_hidden_layers": 10**9}},
            "text_config.num_hidden_layers is '1000000000'",
        ),
    ],
)
def test_a_configuration_that_leads_elsewhere_is_refused(model_dir, changes, message):
    edit(model_dir / "config.json", **changes)
    for load in (load_model, load_processor):
        with pytest.raises(ValueError, match=f"(?s)config.json: .*{message}"):
            load(model_dir)
    assert any("config.json" in problem for problem in checkpoint_utils.check_model_dir(model_dir))


def test_a_dataset_that_names_code_imports_nothing(tmp_path, monkeypatch):
    folder = rlds(tmp_path)
    (tmp_path / "evil_features.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    tree = json.loads((folder / "features.json").read_text())
    tree["featuresDict"]["features"]["episode_metadata"]["pythonClassName"] = "evil_features.Evil"
    (folder / "features.json").write_text(json.dumps(tree))
    (problem,) = [p for p in check_dataset_dir(folder) if "features.json" in p]
    assert "only tfds' own features are read" in problem
    with pytest.raises(ValueError, match="evil_features"):
        list(iterate_episodes(folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"megatron_config": {"x": 1}, "megatron_core": "os"}, "megatron_config is"),
        ({"target_modules": "(a+)+$"}, "target_modules is"),
        ({"rank_pattern": {"(a+)+": 4}}, "rank_pattern is"),
        ({"r": "4"}, "r is '4': it must be a positive whole number"),
        ({"lora_alpha": float("nan")}, "lora_alpha is 'nan'"),
    ],
)
def test_an_adapter_with_code_or_expressions_is_refused(tiny_model_dir, tmp_path, changes, message):
    folder = adapter(tiny_model_dir, tmp_path / "adapter")
    assert (
        checkpoint_utils.check_adapter_dir(folder)
        == peft_utils.check_adapter_fits(folder, tiny_model_dir)
        == []
    )
    edit(folder / "adapter_config.json", **changes)
    (problem,) = checkpoint_utils.check_adapter_dir(folder)
    assert message in problem and "adapter_config.json" in problem
    with pytest.raises(ValueError, match="adapter_config.json"):
        peft_utils.load_lora(load_model(tiny_model_dir), folder)


# ---- paths ----


def test_an_index_stays_in_its_folder(model_dir, tmp_path):
    state = load_file(model_dir / "model.safetensors")
    (model_dir / "model.safetensors").rename(tmp_path / "outside.safetensors")
    for name in (
        "../outside.safetensors",
        str(tmp_path / "outside.safetensors"),
        "x/../../outside.safetensors",
    ):
        index = {"metadata": {}, "weight_map": dict.fromkeys(state, name)}
        (model_dir / "model.safetensors.index.json").write_text(json.dumps(index))
        (problem,) = checkpoint_utils.check_model_dir(model_dir)
        assert "model.safetensors.index.json names" in problem
        with pytest.raises(ValueError, match="may only name .safetensors files in its own folder"):
            load_model(model_dir)


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "../../elsewhere"},
        {"fileFormat": "array_record"},
        {"splits": [{"name": "../train"}]},
        {"splits": [{"name": "train", "shardLengths": ["2"], "filepathTemplate": [[]]}]},
    ],
)
def test_a_dataset_stays_in_its_folder(tmp_path, changes):
    folder = rlds(tmp_path)
    edit(folder / "dataset_info.json", **changes)
    (problem,) = check_dataset_dir(folder)
    assert "dataset_info.json" in problem


def test_a_link_to_this_machines_files_is_not_copied(model_dir, tmp_path):
    (tmp_path / "secret").write_text("key")
    (model_dir / "vocabulary.txt").symlink_to(tmp_path / "secret")
    (tmp_path / "out").mkdir()
    with pytest.raises(
        ValueError, match=r"vocabulary.txt is a link to .*secret, outside of its folder"
    ):
        checkpoint_utils.copy_model_files(model_dir, tmp_path / "out")
    assert not (tmp_path / "out" / "vocabulary.txt").exists()


def test_the_links_of_a_hugging_face_cache_are_copied(model_dir, tmp_path):
    snapshot = tmp_path / "models--x" / "snapshots" / "0123"
    blobs = snapshot.parents[1] / "blobs"
    for folder in (snapshot, blobs, tmp_path / "out"):
        folder.mkdir(parents=True)
    for file in model_dir.iterdir():
        shutil.copy(file, blobs / file.name)
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    checkpoint_utils.copy_model_files(snapshot, tmp_path / "out")
    assert checkpoint_utils.check_model_dir(snapshot) == []
    assert (tmp_path / "out" / "config.json").read_text() == (model_dir / "config.json").read_text()


def test_an_adapter_beside_a_model_does_not_bring_another_base(model_dir):
    (model_dir / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "/elsewhere"})
    )
    with pytest.raises(ValueError, match="lies beside a whole model"):
        load_model(model_dir)


# ---- damage ----


def test_another_architectures_weights_are_named(model_dir, tiny_model_dir):
    state = load_file(model_dir / "model.safetensors")
    name = "language_model.lm_head.weight"
    for wrong, message in (
        ({name: state[name][:, :8].contiguous()}, "lm_head.weight has shape"),
        ({name: state[name].int()}, "lm_head.weight is I32"),
        ({"another.weight": torch.zeros(2)}, "does not hold exactly the parameters"),
    ):
        save_file(state | wrong, model_dir / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=f"model.safetensors.*{message}"):
            load_model(model_dir)
        assert message in "\n".join(checkpoint_utils.check_model_dir(model_dir))


def test_a_flipped_bit_in_what_we_wrote_is_found(tiny_model_dir, tmp_path):
    state = load_file(tiny_model_dir / "model.safetensors")
    folder = tmp_path / "saved"
    checkpoint_utils.save_model_dir(
        folder, state, tiny_model_dir, json_files={"metadata.json": {"step": 3}}
    )
    assert checkpoint_utils.check_model_dir(folder) == []
    assert checkpoint_utils.check_model_dir(tiny_model_dir) == [], (
        "a folder without checksums is checked otherwise"
    )
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1000] ^= 4
    (folder / "model.safetensors").write_bytes(weights)
    (problem,) = checkpoint_utils.check_model_dir(folder)
    assert "model.safetensors is not what was written" in problem
    with pytest.raises(
        ValueError, match=r"model.safetensors is not what was written .* delete .*checksums.json"
    ):
        load_model(folder)
    (folder / "checksums.json").unlink()
    load_model(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_checksums_that_do_not_list_what_is_loaded_are_damaged(tiny_model_dir, tmp_path, name):
    """A flipped bit in a name would leave the file of that name unchecked."""
    folder = tmp_path / "saved"
    checkpoint_utils.save_model_dir(
        folder, load_file(tiny_model_dir / "model.safetensors"), tiny_model_dir
    )
    manifest = folder / "checksums.json"
    manifest.write_text(manifest.read_text().replace(name, name.replace("o", "n")))
    for load in (
        load_model,
        lambda path: raise_file_problems(checkpoint_utils.check_model_dir(path)),
    ):
        with pytest.raises(ValueError, match=f"checksums.json does not list {name}"):
            load(folder)
    (folder / "notes.json").write_text("{}")  # what was added later may be there
    manifest.write_text(manifest.read_text().replace(name.replace("o", "n"), name))
    load_model(folder)


def test_checksums_lead_out_of_no_folder_and_miss_no_file(tmp_path):
    (tmp_path / "folder" / "training_state").mkdir(parents=True)
    for name in ("a.json", "training_state/b"):
        (tmp_path / "folder" / name).write_text(name)
    write_checksums(tmp_path / "folder")
    assert checksum_problems(tmp_path / "folder") == []
    (tmp_path / "folder" / "added_later").write_text("x")
    (tmp_path / "folder" / "training_state" / "b").write_text("c")
    (tmp_path / "folder" / "a.json").unlink()
    missing, changed = checksum_problems(tmp_path / "folder")
    assert "a.json is missing" in missing and "training_state/b is not what was written" in changed
    assert checksum_problems(tmp_path / "folder", lambda name: name == "other") == []
    for name in ("../outside", "/etc/passwd", "a//b", ""):
        (tmp_path / "folder" / "checksums.json").write_text(
            json.dumps({"sha256": {name: "0" * 64}})
        )
        (problem,) = checksum_problems(tmp_path / "folder")
        assert "checksums.json is damaged" in problem


@pytest.mark.parametrize(
    "content", ["[1]", "{", "\xff", "[" * 10**5, '{"a": ' + "1" * 5000 + "}", ""]
)
def test_json_that_is_none_is_named(tmp_path, content):
    (tmp_path / "metadata.json").write_text(content, encoding="latin1")
    with pytest.raises(ValueError, match="metadata.json is not"):
        read_json_object(tmp_path / "metadata.json")


def test_huge_json_is_not_read(tmp_path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(MAX_JSON_BYTES + 1)
    with pytest.raises(ValueError, match="config.json has .* bytes"):
        read_json_object(tmp_path / "config.json")


@pytest.mark.parametrize(
    "action",
    [
        {"q01": [0.0], "q99": [1.0, 2.0]},
        {"q01": [float("nan")], "q99": [1.0]},
        {"q01": [2.0], "q99": [1.0]},
        {"q01": [0.0], "q99": [1.0], "mask": [1]},
        {"q01": [], "q99": []},
        {"q01": "0", "q99": "1"},
        None,
    ],
)
def test_statistics_that_cannot_unnormalise_are_named(model_dir, action):
    (model_dir / "dataset_statistics.json").write_text(json.dumps({"tabletop": {"action": action}}))
    with pytest.raises(ValueError, match="dataset_statistics.json: tabletop"):
        load_norm_stats(model_dir)


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("at", [3, 9, 500, -2])
def test_a_flipped_bit_in_a_shard_names_the_shard(tmp_path, at):
    folder = rlds(tmp_path)
    shard = sorted(folder.glob("*.tfrecord*"))[1]
    flip(shard, at)
    with pytest.raises(ValueError, match=shard.name):
        list(iterate_episodes(folder, images=True))


def test_a_record_less_names_the_shard(tmp_path):
    folder = rlds(tmp_path)
    shard = sorted(folder.glob("*.tfrecord*"))[0]
    data = shard.read_bytes()
    shard.write_bytes(data[: 16 + int.from_bytes(data[:8], "little")])
    with pytest.raises(
        ValueError, match=f"{shard.name} holds 1 episodes, dataset_info.json says 2"
    ):
        list(iterate_episodes(folder))


def test_damaged_cached_statistics_are_made_anew(tmp_path):
    folder = rlds(tmp_path)
    first = load_dataset_statistics(tmp_path, DATASET)
    (cache,) = folder.glob("dataset_statistics_*.json")
    content = json.loads(cache.read_text())
    content["statistics"]["action"]["q99"][0] += 1
    for text in (json.dumps(content), "{", "[]"):
        cache.write_text(text)
        assert load_dataset_statistics(tmp_path, DATASET) == first
        assert json.loads(cache.read_text())["statistics"] == first


# ---- network ----

WITHOUT_NETWORK = """
import socket, sys
reached = []
connect = socket.socket.connect
def watched(self, address):
    if self.family in (socket.AF_INET, socket.AF_INET6):
        reached.append(address)
    return connect(self, address)
socket.socket.connect = watched
socket.getaddrinfo = lambda *a, **k: reached.append(a) or []

from prismatic.extern.hf.modeling_prismatic import load_model
from prismatic.extern.hf.processing_prismatic import load_processor
from utils import checkpoint_utils
from utils.logging_utils import MetricWriter

model_dir, exp_dir = sys.argv[1:]
assert checkpoint_utils.check_model_dir(model_dir) == []
load_model(model_dir), load_processor(model_dir)
writer = MetricWriter(exp_dir, config={"seed": 0})
writer.write(1, {"train/loss": 1.0})
writer.close()
assert not reached, reached
assert "wandb" not in sys.modules or sys.modules["wandb"].run is None  # transformers may import it
print("QUIET")
"""


def test_loading_and_logging_reach_no_network_unless_asked(tiny_model_dir, tmp_path):
    env = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "WANDB_MODE")}
    words = [sys.executable, "-c", WITHOUT_NETWORK, str(tiny_model_dir), str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=env, timeout=550)
    assert "QUIET" in done.stdout, done.stderr[-3000:]
