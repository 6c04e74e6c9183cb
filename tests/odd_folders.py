"""Damaged and odd folders: what a hostile or unlucky user may give as model, adapter, dataset or checkpoint.

Each case damages a fresh copy of a good folder in place. `tests/test_odd_folders.py` runs them; other than the random
damage of `tests/malformed.py` these are thought of.
"""

import base64
import json
import os
import shutil
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from prismatic.vla.datasets.writer import Demonstration, write_dataset

Damage = Callable[[Path], object]
TEBI = 1 << 40
HUGE = 10**400  # an integer that JSON has and no float holds


@dataclass(frozen=True)
class Case:
    """One folder.

    Attributes:
        kind: model, sharded, adapter, dataset, checkpoint, update or recording.
        name: what is odd about it.
        damage: makes it so.
        says: text that the refusal holds besides the folder's path.
        is_fine: it is legitimate and must be accepted.
    """

    kind: str
    name: str
    damage: Damage
    says: str = ""
    is_fine: bool = False


# ------------------------------------------------------------------------------------------- how to damage


def put(name: str, path: str, value: Any) -> Damage:
    """Set the value at `path` (keys and list indices, with dots) of a JSON file; a last key may be new."""

    def damage(folder: Path) -> None:
        file = folder / name
        tree = json.loads(file.read_text())
        node: Any = tree
        *parents, last = path.split(".")
        for key in parents:
            node = node[int(key)] if isinstance(node, list) else node[key]
        node[int(last) if isinstance(node, list) else last] = value
        file.write_text(json.dumps(tree))

    return damage


def drop(name: str, path: str) -> Damage:
    """Remove the key at `path` of a JSON file."""

    def damage(folder: Path) -> None:
        tree = json.loads((folder / name).read_text())
        node: Any = tree
        *parents, last = path.split(".")
        for key in parents:
            node = node[int(key)] if isinstance(node, list) else node[key]
        del node[int(last) if isinstance(node, list) else last]
        (folder / name).write_text(json.dumps(tree))

    return damage


def write(name: str, content: str | bytes) -> Damage:
    """Write a file, in place of what may be there."""
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def twice(name: str, key: str) -> Damage:
    """Give the first object of a JSON file that has `key` a second entry of it, before the right one."""
    return lambda folder: (folder / name).write_text(
        (folder / name).read_text().replace(f'"{key}":', f'"{key}": null, "{key}":', 1)
    )


def replaced(name: str, make: Callable[[Path], object]) -> Damage:
    """Remove a file and make something else under its name."""

    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).parent.mkdir(exist_ok=True)
        make(folder / name)

    return damage


def fifo(name: str) -> Damage:
    """A pipe that nobody writes to."""
    return replaced(name, os.mkfifo)


def folder_named(name: str) -> Damage:
    """A folder."""
    return replaced(name, Path.mkdir)


def link(name: str, target: str) -> Damage:
    """A link."""
    return replaced(name, lambda path: path.symlink_to(target))


def sparse(name: str, size: int) -> Damage:
    """A file that claims `size` bytes and has none on disk; what was there is at its beginning."""

    def damage(folder: Path) -> None:
        with (folder / name).open("ab") as file:
            file.truncate(size)

    return damage


def socket_named(name: str) -> Damage:
    """A socket; bound by a short relative name, as its address holds 107 characters."""

    def make(path: Path) -> None:
        before = Path.cwd()
        os.chdir(path.parent)
        try:
            with socket.socket(socket.AF_UNIX) as end:
                end.bind(path.name)
        finally:
            os.chdir(before)

    return replaced(name, make)


def weight(part: str, value: float, name: str = "model.safetensors", dtype: Any = None) -> Damage:
    """Set the last element of the first tensor whose name holds `part`."""

    def damage(folder: Path) -> None:
        state = {k: v.clone() for k, v in load_file(folder / name).items()}
        if dtype is not None:
            state = {k: v.to(dtype) for k, v in state.items()}
        key = next(k for k in sorted(state) if part in k)
        state[key].view(-1)[-1] = value
        save_file(state, folder / name, metadata={"format": "pt"})

    return damage


def header(name: str, change: Callable[[str], str | bytes], length: int | None = None) -> Damage:
    """Change the text of a safetensors header; `length`: what the file says about it."""

    def damage(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        text = change(data[8 : 8 + size].decode())
        raw = text.encode() if isinstance(text, str) else text
        claimed = len(raw) if length is None else length
        (folder / name).write_bytes(struct.pack("<Q", claimed) + raw + data[8 + size :])

    return damage


def first_entry_twice(text: str) -> str:
    """A header with the first tensor named twice."""
    fields = json.loads(text)
    name = next(key for key in fields if key != "__metadata__")
    return text.replace("{", "{" + f"{json.dumps(name)}:{json.dumps(fields[name])},", 1)


def all_of(*damages: Damage) -> Damage:
    """Several damages."""
    return lambda folder: [damage(folder) for damage in damages]


def shard_of(folder: Path) -> str:
    """Name of a dataset's first shard."""
    return min(path.name for path in folder.glob("*.tfrecord*"))


def on_shard(damage: Callable[[str], Damage]) -> Damage:
    """Damage of the first shard."""
    return lambda folder: damage(shard_of(folder))(folder)


def actions(values: np.ndarray) -> str:
    """Actions of a running episode as a state has them."""
    return base64.b64encode(values.astype(np.float32).tobytes()).decode()


def nested(depth: int) -> Any:
    """Lists in lists."""
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


def recorded(action: float | None = None, state: float = 0.0) -> Damage:
    """Write the dataset again with other values in one action dimension and in the state."""

    def damage(folder: Path) -> None:
        rng = np.random.default_rng(0)
        moves = rng.uniform(-1, 1, (3, 7)).astype(np.float32)
        moves[:, 2] = moves[:, 2] if action is None else action
        images = [rng.integers(0, 256, (16, 16, 3), dtype=np.uint8) for _ in range(3)]
        states, joints = np.full((3, 8), state, np.float32), np.zeros((3, 7), np.float32)
        rewards = np.eye(3, dtype=np.float32)[-1]
        demos = [
            Demonstration(images, moves, states, joints, rewards, "push", str(i)) for i in range(2)
        ]
        shutil.rmtree(folder)
        folder.mkdir()
        name = folder.parent.name
        write_dataset(folder, name, demos, image_size=16, image_format="png", description="odd")

    return damage


# ------------------------------------------------------------------------------------------- the cases

STATS = "dataset_statistics.json"
Q = "tabletop.action"
MODEL = [
    Case("model", "config is a device", link("config.json", "/dev/null"), "a character device"),
    Case("model", "config is a link to this process's memory", link("config.json", "/proc/self/mem"), "config.json"),
    Case("model", "config is a pipe", fifo("config.json"), "a named pipe"),
    Case("model", "config is a folder", folder_named("config.json"), "a folder"),
    Case("model", "config is a link to itself", link("config.json", "config.json"), "config.json"),
    Case("model", "config is a link to nothing", link("config.json", "gone"), "which does not exist"),
    Case("model", "tokenizer is a pipe", fifo("tokenizer.json"), "a named pipe"),
    Case("model", "tokenizer of one TiB without content", sparse("tokenizer.json", TEBI), "the limit"),
    Case("model", "sentencepiece file is a pipe", fifo("tokenizer.model"), "a named pipe"),
    Case("model", "merges of a tokenizer are a device", link("merges.txt", "/dev/null"), "a character device"),
    Case("model", "preprocessor is a socket", socket_named("preprocessor_config.json"), "a socket"),
    Case("model", "statistics are a link to nothing", link(STATS, "gone.json"), "which does not exist"),
    Case("model", "statistics are a pipe", fifo(STATS), "a named pipe"),
    Case("model", "weights are a pipe", fifo("model.safetensors"), "a named pipe"),
    Case("model", "weights are a folder", folder_named("model.safetensors"), "a folder"),
    Case("model", "weights of 300 GiB without content", sparse("model.safetensors", 300 << 30), "the limit"),
    Case("model", "weights with a hole of one GiB behind", sparse("model.safetensors", 1 << 30), "model.safetensors"),
    Case("model", "generation config is a pipe", fifo("generation_config.json"), "a named pipe"),
    Case("model", "chat template is a pipe", fifo("chat_template.jinja"), "a named pipe"),
    Case("model", "another chat template is a pipe", fifo("additional_chat_templates/x.jinja"), "a named pipe"),
    Case("model", "checksums are a pipe", fifo("checksums.json"), "a named pipe"),
    Case("model", "checksums are a link to nothing", link("checksums.json", "gone"), "which does not exist"),
    Case("model", "checksums list a pipe", all_of(
        fifo("notes"),
        lambda f: write("checksums.json", json.dumps({"sha256": {
            "notes": "0" * 64, "config.json": "0" * 64, "model.safetensors": "0" * 64}}))(f)), "a named pipe"),
    Case("model", "NaN in a weight", weight("lm_head", float("nan")), "NaN or infinite"),
    Case("model", "infinity in a bias of a ViT", weight("qkv.bias", float("inf")), "NaN or infinite"),
    Case("model", "minus infinity in a norm", weight("norm.weight", -float("inf")), "NaN or infinite"),
    Case("model", "NaN in bfloat16", weight("q_proj", float("nan"), dtype=torch.bfloat16), "NaN or infinite"),
    Case("model", "huge weights that are finite", weight("q_proj", 3e38), is_fine=True),
    Case("model", "half-precision weights", weight("q_proj", 0.0, dtype=torch.float16), is_fine=True),
    Case("model", "a key twice in config", twice("config.json", "model_type"), "appears twice"),
    Case("model", "a key twice deep in config", twice("config.json", "hidden_size"), "appears twice"),
    Case("model", "a key twice in the statistics", twice(STATS, "q99"), "appears twice"),
    Case("model", "a key twice in the preprocessor", twice("preprocessor_config.json", "input_sizes"), "appears twice"),
    Case("model", "a key twice in the tokenizer", twice("tokenizer.json", "model"), "appears twice"),
    Case("model", "a tensor twice in the header", header("model.safetensors", first_entry_twice), "appears twice"),
    Case("model", "a tensor's type twice", header(
        "model.safetensors", lambda t: t.replace('"dtype":', '"dtype":"I8","dtype":', 1)), "appears twice"),
    Case("model", "a header of almost all memory", header("model.safetensors", str, 1 << 62), "header"),
    Case("model", "a header of nested lists", header("model.safetensors", lambda t: "[" * 50000), "header"),
    Case("model", "a header that is no text", header("model.safetensors", lambda t: b"\xff\xfe"), "header"),
    Case("model", "q01 above q99", put(STATS, f"{Q}.q01.2", 5.0), "above q99[2]"),
    Case("model", "q01 equals q99", all_of(put(STATS, f"{Q}.q01.3", 0.25), put(STATS, f"{Q}.q99.3", 0.25)),
         is_fine=True),
    Case("model", "q99 of 1e30", put(STATS, f"{Q}.q99.0", 1e30), "q99[0] is 1e+30"),
    Case("model", "q01 of minus ten million", put(STATS, f"{Q}.q01.0", -1e7), "q01[0]"),
    Case("model", "q99 infinite", put(STATS, f"{Q}.q99.0", float("inf")), "finite numbers"),
    Case("model", "q99 beyond any float", put(STATS, f"{Q}.q99.0", HUGE), "finite numbers"),
    Case("model", "q01 of text", put(STATS, f"{Q}.q01.0", "-1"), "finite numbers"),
    Case("model", "one q99 too few", drop(STATS, f"{Q}.q99.6"), "7 numbers in q01 and 6 in q99"),
    Case("model", "std NaN", put(STATS, f"{Q}.std", [float("nan")] * 7), "action.std"),
    Case("model", "mean of three numbers", put(STATS, f"{Q}.mean", [0.0] * 3), "action.mean"),
    Case("model", "mask of numbers", put(STATS, f"{Q}.mask", [1] * 7), "7 times true or false"),
    Case("model", "mask too long", put(STATS, f"{Q}.mask", [True] * 8), "7 times true or false"),
    Case("model", "mask is text", put(STATS, f"{Q}.mask", "true"), "7 times true or false"),
    Case("model", "minus one transitions", put(STATS, "tabletop.num_transitions", -1), "must be a count"),
    Case("model", "statistics of a list", write(STATS, "[1, 2]"), "not a JSON object"),
    Case("model", "statistics nested too deep", write(STATS, json.dumps({"tabletop": nested(900)})), STATS),
    Case("model", "consolidated weights beside the model", lambda f: shutil.copy(
        f / "model.safetensors", f / "consolidated.safetensors"), "not part of the model"),
    Case("model", "another safetensors file", lambda f: shutil.copy(
        f / "model.safetensors", f / "zz.safetensors"), "not part of the model"),
    Case("model", "a processor config that says something else", write("processor_config.json", json.dumps(
        {"image_processor": {"image_processor_type": "PrismaticImageProcessor", "means": [[9, 9, 9]]}})),
        "processor_config.json"),
    Case("model", "a generation config that is no JSON, which nobody reads", write("generation_config.json", "{"),
         is_fine=True),
    Case("model", "an epsilon beyond any float", put("config.json", "text_config.rms_norm_eps", HUGE), "rms_norm_eps"),
    Case("model", "an unknown kind of RoPE", put(
        "config.json", "text_config.rope_parameters", {"rope_type": "evil"}), "config.json"),
    Case("model", "RoPE with base NaN", put("config.json", "text_config.rope_parameters", {
        "rope_type": "default", "rope_theta": float("nan")}), "rope_parameters"),
    Case("model", "RoPE with base 0", put("config.json", "text_config.rope_theta", 0), "rope_theta"),
    Case("model", "hidden size that heads do not divide", put(
        "config.json", "text_config.num_attention_heads", 3), "config.json"),
    Case("model", "more key heads than heads", put("config.json", "text_config.num_key_value_heads", 7), "config.json"),
    Case("model", "a vocabulary without room for actions", put("config.json", "text_config.vocab_size", 300),
         "vocab_size"),
    Case("model", "model type is half a character", put("config.json", "model_type", "\ud800"), "another architecture"),
    Case("model", "config in UTF-16", lambda f: (f / "config.json").write_bytes(
        (f / "config.json").read_text().encode("utf-16")), "not valid JSON"),
    Case("model", "config with a byte order mark", lambda f: (f / "config.json").write_bytes(
        b"\xef\xbb\xbf" + (f / "config.json").read_bytes()), "not valid JSON"),
    Case("model", "config nested in an unknown field", put("config.json", "extra", nested(900)), "config.json"),
    Case("model", "architectures of numbers", put("config.json", "architectures", [1, 2]), "architectures"),
    Case("model", "id2label of a list", put("config.json", "id2label", [[]]), "config.json"),
    Case("model", "transformers' version is a list", put("config.json", "transformers_version", [1]), is_fine=True),
    Case("model", "pixels divided by zero", put("preprocessor_config.json", "stds.0.1", 0), "positive numbers"),
    Case("model", "pixels divided by almost zero", put("preprocessor_config.json", "stds.0.1", 1e-300), "positive"),
    Case("model", "pixels divided by almost zero in the other list", put(
        "preprocessor_config.json", "tvf_normalize_params.0.std", [1e-300] * 3), "positive std"),
    Case("model", "a mean of 1e30", put("preprocessor_config.json", "means.0", [1e30] * 3), "up to 1e3"),
    Case("model", "padding that is no token", put("config.json", "pad_token_id", 10**5), "pad_token_id is 100000"),
    Case("model", "an empty piece that is no token", put("config.json", "empty_piece_token_id", 10**5), "empty_piece"),
    Case("model", "a tokenizer that adds no first token: we do", put("tokenizer.json", "post_processor", None),
         is_fine=True),
    Case("model", "an unknown interpolation", put("preprocessor_config.json", "interpolations.0", "evil"),
         "preprocessor_config.json"),
    Case("model", "architectures of another model", put("config.json", "architectures", ["LlamaForCausalLM"]),
         "architectures"),
    Case("model", "more tokens than the model has", lambda f: put("tokenizer.json", "model.vocab", json.loads(
        (f / "tokenizer.json").read_text())["model"]["vocab"] + [[f"z{i}", -1.0] for i in range(999)])(f), "tokens"),
    Case("model", "a token's score of text", put("tokenizer.json", "model.vocab.5.1", "7"), "tokenizer"),
    Case("model", "added token without content", put("tokenizer.json", "added_tokens", [{"id": 3}]), "tokenizer"),
    Case("model", "longest prompt below zero, which nobody reads", put("tokenizer_config.json", "model_max_length", -5),
         is_fine=True),
    Case("sharded", "a shard is a pipe", lambda f: fifo(min(p.name for p in f.glob("model-*")))(f), "a named pipe"),
    Case("sharded", "a shard leads to nothing", lambda f: link(min(p.name for p in f.glob("model-*")), "gone")(f),
         "which does not exist"),
    Case("sharded", "NaN in the last shard", lambda f: weight(
        "", float("nan"), max(p.name for p in f.glob("model-*")))(f), "NaN or infinite"),
    Case("sharded", "the index is a device", link("model.safetensors.index.json", "/dev/null"), "a character device"),
    Case("sharded", "the index has a tensor twice", twice(
        "model.safetensors.index.json", "language_model.lm_head.weight"), "appears twice"),
    Case("sharded", "a shard that the index does not name", lambda f: shutil.copy(
        min(f.glob("model-*")), f / "model-00099.safetensors"), "not part of the model"),
    Case("sharded", "metadata of the index is a list", put("model.safetensors.index.json", "metadata", []), "index"),
]  # fmt: skip

CONFIG, FACTORS = "adapter_config.json", "adapter_model.safetensors"
ADAPTER = [
    Case("adapter", "config is a pipe", fifo(CONFIG), "a named pipe"),
    Case("adapter", "weights are a socket", socket_named(FACTORS), "a socket"),
    Case("adapter", "weights are a link to a device", link(FACTORS, "/dev/null"), "a character device"),
    Case("adapter", "NaN in A", weight("lora_A", float("nan"), FACTORS), "NaN or infinite"),
    Case("adapter", "infinity in B", weight("lora_B", float("inf"), FACTORS), "NaN or infinite"),
    Case("adapter", "infinity in B in half precision", weight("lora_B", -float("inf"), FACTORS, torch.float16),
         "NaN or infinite"),
    Case("adapter", "a factor twice", header(FACTORS, first_entry_twice), "appears twice"),
    Case("adapter", "the rank twice", twice(CONFIG, "r"), "appears twice"),
    Case("adapter", "alpha beyond any float", put(CONFIG, "lora_alpha", HUGE), "lora_alpha"),
    Case("adapter", "alpha infinite", lambda f: (f / CONFIG).write_text(
        json.dumps(json.loads((f / CONFIG).read_text()) | {"lora_alpha": 0}).replace(
            '"lora_alpha": 0', '"lora_alpha": 1e999')), "lora_alpha"),
    Case("adapter", "alpha of 1e308", put(CONFIG, "lora_alpha", 1e308), "up to 1e6"),
    Case("adapter", "alpha of one layer of 1e308", put(CONFIG, "alpha_pattern", {"q_proj": 1e308}), "up to 1e6"),
    Case("adapter", "alpha true", put(CONFIG, "lora_alpha", True), "lora_alpha"),
    Case("adapter", "rank of 2^40", put(CONFIG, "r", TEBI), "r is"),
    Case("adapter", "rank of another size than the factors", put(CONFIG, "r", 5), "rank 5"),
    Case("adapter", "the head was saved as a whole", put(CONFIG, "modules_to_save", ["lm_head"]), "Merge the adapter"),
    Case("adapter", "DoRA", put(CONFIG, "use_dora", True), "use_dora"),
    Case("adapter", "a layer that is not there", put(CONFIG, "target_modules", ["evil_proj"]), CONFIG),
    Case("adapter", "its base's record is a pipe", fifo("base_model.json"), "a named pipe"),
    Case("adapter", "its base's record is a list", write("base_model.json", "[]"), "not a JSON object"),
    Case("adapter", "its base's fingerprint is a number", put("base_model.json", "fingerprint", 7), "fingerprint"),
    Case("adapter", "statistics upside down", write(STATS, json.dumps(
        {"x": {"action": {"q01": [1.0], "q99": [0.0]}}})), "above q99"),
    Case("adapter", "statistics are a pipe", fifo(STATS), "a named pipe"),
    Case("adapter", "init_lora_weights of an object", put(CONFIG, "init_lora_weights", {"a": 1}), "init_lora_weights"),
    Case("adapter", "runtime_config of text, which nobody reads", put(CONFIG, "runtime_config", "x"), is_fine=True),
    Case("adapter", "task type unknown", put(CONFIG, "task_type", "EVIL"), "task types"),
]  # fmt: skip

DATASET = [
    Case("dataset", "features are a pipe", fifo("features.json"), "a named pipe"),
    Case("dataset", "info is a link to a device", link("dataset_info.json", "/dev/null"), "a character device"),
    Case("dataset", "a shard is a pipe", on_shard(fifo), "a named pipe"),
    Case("dataset", "a shard is a folder", on_shard(folder_named), "a folder"),
    Case("dataset", "a shard is a link to a device", on_shard(lambda n: link(n, "/dev/null")), "a character device"),
    Case("dataset", "a shard leads to nothing", on_shard(lambda n: link(n, "gone")), "which does not exist"),
    Case("dataset", "a shard with a hole of one GiB", on_shard(lambda n: sparse(n, 1 << 30)), "damaged"),
    Case("dataset", "a shard of 300 GiB without content", on_shard(lambda n: sparse(n, 300 << 30)), "the limit"),
    Case("dataset", "labels are a pipe", fifo("names.labels.txt"), "a named pipe"),
    Case("dataset", "checksums are a pipe", fifo("checksums.json"), "a named pipe"),
    Case("dataset", "actions of infinite size", put(
        "features.json", "featuresDict.features.steps.sequence.feature.featuresDict.features.action.tensor.shape",
        {"dimensions": [float("inf")]}), "features.json"),
    Case("dataset", "a shard of infinitely many episodes", put(
        "dataset_info.json", "splits.0.shardLengths", [float("inf"), 1]), "dataset_info"),
    Case("dataset", "shards of minus one episode", put("dataset_info.json", "splits.0.shardLengths", ["-1", "1"]),
         "counts of episodes"),
    Case("dataset", "an info that has its name twice", twice("dataset_info.json", "name"), "appears twice"),
    Case("dataset", "features with a class twice", twice("features.json", "pythonClassName"), "appears twice"),
    Case("dataset", "splits of an object", put("dataset_info.json", "splits", {"train": 1}), "dataset_info.json"),
    Case("dataset", "a version that is none", put("dataset_info.json", "version", [[]]), ""),
    Case("dataset", "actions NaN", recorded(action=float("nan")), "non-finite action"),
    Case("dataset", "actions of 1e30", recorded(action=1e30), "q99"),
    Case("dataset", "states infinite", recorded(state=float("inf")), "non-finite state"),
    Case("dataset", "an action that never changes", recorded(action=0.25), is_fine=True),
    Case("dataset", "a cache of statistics is a pipe", fifo("dataset_statistics_0123.json"), "a named pipe"),
]  # fmt: skip

STATE, RANK = "training_state/state.json", "training_state/rank_0.json"
CHECKPOINT = [
    Case("checkpoint", "rank's numbers are a list", write(RANK, "[1, 2]"), "not a JSON object"),
    Case("checkpoint", "rank's numbers are null", write(RANK, "null"), "not a JSON object"),
    Case("checkpoint", "rank's numbers are a pipe", fifo(RANK), "a named pipe"),
    Case("checkpoint", "rank's file is missing", lambda f: (f / RANK).unlink(), "rank_0.json"),
    Case("checkpoint", "an update that the state does not know", put(RANK, "update", {
        "num_done": {"value": 1, "policy": 1}, "averages": {"sums": {}, "maxima": {}}}), "minibatches"),
    Case("update", "no update in a rank", put(RANK, "update", None), "minibatches"),
    Case("update", "another number of minibatches", put(RANK, "update.num_done.policy", 9), "minibatches"),
    Case("update", "minibatches true", put(RANK, "update.num_done.policy", True), "num_done.policy is True"),
    Case("update", "averages of a list", put(RANK, "update.averages", []), "averages"),
    Case("update", "sums of a list", put(RANK, "update.averages.sums", [1.0]), "sums"),
    Case("update", "a sum of text", put(RANK, "update.averages.sums", {"a": "1", "a#": 1.0}), "sums"),
    Case("update", "a sum NaN", put(RANK, "update.averages.sums", {"a": float("nan"), "a#": 1.0}), "sums"),
    Case("update", "a sum without its count", put(RANK, "update.averages.sums", {"a": 1.0}), "without its count"),
    Case("update", "a maximum of null", put(RANK, "update.averages.maxima", {"a": None}), "maxima"),
    Case("update", "a maximum infinite", put(RANK, "update.averages.maxima", {"a": float("inf")}), is_fine=True),
    Case("update", "episodes of an object", put(STATE, "rollout.episodes", {}), "rollout.episodes"),
    Case("update", "an episode of minus three steps", put(STATE, "rollout.episodes.0.length", -3), "length is -3"),
    Case("update", "a return of text", put(STATE, "rollout.episodes.0.episode_return", "1"), "episode_return"),
    Case("update", "a success of 0.5", put(STATE, "rollout.episodes.0.success", 0.5), "success"),
    Case("update", "an episode of an unknown task", put(STATE, "rollout.episodes.0.task_id", 40), "tasks [40]"),
    Case("update", "no workers' statistics", put(STATE, "rollout.worker_stats", []), "worker_stats"),
    Case("update", "workers' statistics without memory", drop(STATE, "rollout.worker_stats.0.mem_gib"), "no mem_gib"),
    Case("update", "a metric of a list", put(STATE, "rollout.metrics", {"a": [1]}), "rollout.metrics"),
    Case("checkpoint", "state is a list", write(STATE, "[]"), "not a JSON object"),
    Case("checkpoint", "state is a pipe", fifo(STATE), "a named pipe"),
    Case("checkpoint", "state is a device", link(STATE, "/dev/null"), "a character device"),
    Case("checkpoint", "state nested too deep", write(STATE, "[" * 10**5), "not valid JSON"),
    Case("checkpoint", "state with a key twice", twice(STATE, "step"), "appears twice"),
    Case("checkpoint", "state of another step than its folder", put(STATE, "step", 7), "step_7"),
    Case("checkpoint", "step huge", put(STATE, "step", HUGE), "state.step is 1000"),
    Case("checkpoint", "step 2.5", put(STATE, "step", 2.5), "state.step is 2.5"),
    Case("checkpoint", "a billion trainers", put(STATE, "num_trainers", 10**9), "num_trainers"),
    Case("checkpoint", "a trainer more than there are files", put(STATE, "num_trainers", 2), "rank_1.json"),
    Case("checkpoint", "flags of a list", put(STATE, "flags", []), "state.flags"),
    Case("checkpoint", "a path of a number", put(STATE, "flags.vla_path", 7), "flags.vla_path is 7"),
    Case("checkpoint", "best return of text", put(STATE, "best.best", "high"), "best.best is high"),
    Case("checkpoint", "best return NaN", put(STATE, "best.best", float("nan")), "best.best is nan"),
    Case("checkpoint", "best return without its step", drop(STATE, "best.last_saved_step"), "no last_saved_step"),
    Case("checkpoint", "best is a list", put(STATE, "best", [1]), "state.best"),
    Case("checkpoint", "curriculum of a list", put(STATE, "curriculum", [1]), "state.curriculum"),
    Case("checkpoint", "a success rate of 2", put(STATE, "curriculum.ema.0", 2.0), "ema"),
    Case("checkpoint", "more successes than episodes", put(STATE, "curriculum.num_successes.0", 5), "more successes"),
    Case("checkpoint", "a task twice", put(STATE, "curriculum.task_ids", [1, 1]), "each once"),
    Case("checkpoint", "no random state", put(STATE, "curriculum.rng", {}), "random state"),
    Case("checkpoint", "random state of a list", put(STATE, "curriculum.rng.state", [1]), "random state"),
    Case("checkpoint", "random state of no generator", put(STATE, "curriculum.rng.bit_generator", "x"), "random state"),
    Case("checkpoint", "random state negative", put(STATE, "curriculum.rng.state.state", -1), "random state"),
    Case("checkpoint", "random state huge", put(STATE, "curriculum.rng.state.inc", HUGE), "random state"),
    Case("checkpoint", "worlds of text", put(STATE, "worlds", "abc"), "state.worlds"),
    Case("checkpoint", "worlds of lists", put(STATE, "worlds", [[]]), "state.worlds"),
    Case("checkpoint", "no worlds", put(STATE, "worlds", []), "worlds is empty"),
    Case("checkpoint", "a world too many", lambda f: put(STATE, "worlds", 2 * json.loads(
        (f / STATE).read_text())["worlds"])(f), "worlds has 2 entries"),
    Case("checkpoint", "an environment too few", lambda f: all_of(
        drop(STATE, "worlds.0.running.0"), drop(STATE, "worlds.0.num_episodes.0"))(f), "environments for"),
    Case("checkpoint", "a running episode too few", drop(STATE, "worlds.0.running.0"), "running episodes for"),
    Case("checkpoint", "a running episode of null", put(STATE, "worlds.0.running.0", None), "running"),
    Case("checkpoint", "a request of two numbers", put(STATE, "worlds.0.running.0.request", [1, 2]), "request"),
    Case("checkpoint", "a request of an unknown task", put(STATE, "worlds.0.running.0.request", [40, None, 1]), "[40]"),
    Case("checkpoint", "a seed below zero", put(STATE, "worlds.0.running.0.request", [1, None, -1]), "request"),
    Case("checkpoint", "an initial state of text", put(STATE, "worlds.0.running.0.request", [1, "0", 1]), "request"),
    Case("checkpoint", "actions NaN", put(STATE, "worlds.0.running.0.actions", actions(np.full(7, np.nan))), "actions"),
    Case("checkpoint", "half an action", put(STATE, "worlds.0.running.0.actions", actions(np.zeros(4))), "actions"),
    Case("checkpoint", "actions that are no base64", put(STATE, "worlds.0.running.0.actions", "!!!"), "actions"),
    Case("checkpoint", "actions of a list", put(STATE, "worlds.0.running.0.actions", [0.0] * 7), "actions"),
    Case("checkpoint", "episode counts negative", put(STATE, "worlds.0.num_episodes.0", -2), "num_episodes"),
    Case("checkpoint", "no tensors' index", lambda f: (f / "training_state/.metadata").unlink(), ".metadata"),
    Case("checkpoint", "the tensors' index is a pipe", fifo("training_state/.metadata"), "a named pipe"),
    Case("checkpoint", "tensors are a pipe", fifo("training_state/__0_0.distcp"), "a named pipe"),
    Case("checkpoint", "tensors are a device", link("training_state/__0_0.distcp", "/dev/null"), "a character device"),
    Case("checkpoint", "checksums are a pipe", fifo("checksums.json"), "a named pipe"),
    Case("checkpoint", "the run's metrics are a pipe", fifo("../metrics.jsonl"), "a named pipe"),
    Case("checkpoint", "the run's arguments are a device", link("../args.json", "/dev/null"), "a character device"),
    Case("checkpoint", "the run's log is a pipe", fifo("../log.txt"), "a named pipe"),
]  # fmt: skip

RECORDING = [
    Case("recording", "its identity is a pipe", fifo("recording.json"), "a named pipe"),
    Case("recording", "its identity is a list", write("recording.json", "[]"), "not a JSON object"),
    Case("recording", "its lock is a pipe", fifo("lock"), "a named pipe"),
    Case("recording", "an episode is a pipe", fifo("episode_000000.npz"), is_fine=True),
    Case("recording", "an episode is another archive", lambda f: np.savez(
        f / "episode_000000.npz", x=np.zeros(2)), "episode_000000.npz"),
    Case("recording", "an episode's texts are a list", lambda f: np.savez(f / "episode_000000.npz", **(
        dict(np.load(f / "episode_000000.npz")) | {"meta": np.array("[1]")})), "episode_000000.npz"),
]  # fmt: skip

CASES = [*MODEL, *ADAPTER, *DATASET, *CHECKPOINT, *RECORDING]
