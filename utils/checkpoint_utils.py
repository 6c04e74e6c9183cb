"""Model folders: what a complete one holds, checks before anything starts, and writing that is never half done.

A folder in openvla-7b's format has config.json, safetensors (one file, or shards with an index), the tokenizer's and
the processor's files and, after fine-tuning, dataset_statistics.json. An adapter folder (peft) has only
adapter_config.json and adapter_model.safetensors.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
REQUIRED_FILES = ("config.json", "preprocessor_config.json", "tokenizer_config.json")
# Never copied beside new weights: other weights, and what describes another folder's history.
NOT_COPIED_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".index.json")
NOT_COPIED_NAMES = (
    ADAPTER_CONFIG, "metadata.json", "merge_metadata.json", "base_model.json", "args.json", "log.txt", "metrics.jsonl",
    "curriculum.json", "eval_final.json", "pretraining.jsonl",
)  # fmt: skip
NOT_COPIED_PREFIXES = ("events.out.tfevents", ".")


def weight_files(model_dir: str | Path) -> list[Path]:
    """The safetensors files of a model folder, in name order (from the index where there is one).

    Raises ValueError if the index is not the JSON it should be.
    """
    folder = Path(model_dir)
    index = folder / INDEX_NAME
    if not index.exists():
        return [p for p in [folder / WEIGHTS_NAME] if p.exists()]
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
    except (json.JSONDecodeError, KeyError, AttributeError) as error:
        raise ValueError(f"{index} is not a safetensors index ({error})") from error
    return [folder / name for name in sorted(names)]


def check_model_dir(path: str | Path) -> list[str]:
    """Problems that keep `path` from being loaded as a model; empty when it is complete. Reads headers only."""
    folder = Path(path)
    if not folder.is_dir():
        return [f"{path} is not a folder: give a model folder (config.json, safetensors, tokenizer)"]
    adapter = folder / ADAPTER_CONFIG
    if adapter.exists() and not (folder / WEIGHTS_NAME).exists() and not (folder / INDEX_NAME).exists():
        return [_adapter_only_message(folder)]
    problems = [f"{path} lacks {name}" for name in REQUIRED_FILES if not (folder / name).exists()]
    problems += _json_problems([folder / "config.json", folder / "dataset_statistics.json"])
    try:
        files = weight_files(folder)
    except ValueError as error:
        return [*problems, str(error)]
    if not files:
        problems.append(f"{path} has no weights: neither {WEIGHTS_NAME} nor {INDEX_NAME}")
    return problems + [problem for file in files for problem in _safetensors_problems(file)]


def _adapter_only_message(folder: Path) -> str:
    try:
        base = json.loads((folder / ADAPTER_CONFIG).read_text()).get("base_model_name_or_path") or "BASE"
    except json.JSONDecodeError:
        base = "BASE"
    return (
        f"{folder} holds only a LoRA adapter, a whole model is needed: merge it first with\n  python "
        f"vla-scripts/merge.py --vla_path {base} --adapter_dir {folder} --output_dir {str(folder).rstrip('/')}-merged"
    )


def _json_problems(files: list[Path]) -> list[str]:
    problems = []
    for file in files:
        if not file.exists():
            continue
        try:
            if not isinstance(json.loads(file.read_text()), dict):
                problems.append(f"{file} is not a JSON object")
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            problems.append(f"{file} is not valid JSON ({error}): the folder is damaged or half-written")
    return problems


def _safetensors_problems(file: Path) -> list[str]:
    if not file.exists():
        return [f"{file} is named by the index but missing: the folder is half-written"]
    try:
        with safe_open(file, "pt") as tensors:
            if not tensors.keys():
                return [f"{file} holds no tensors"]
    except (SafetensorError, OSError) as error:
        return [f"{file} cannot be read ({error}): the folder is damaged or half-written"]
    return []


def check_adapter_dir(path: str | Path) -> list[str]:
    """Problems that keep `path` from being loaded as a peft adapter; empty when it is complete."""
    folder = Path(path)
    problems = [f"{path} lacks {n}" for n in (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if not (folder / n).exists()]
    if problems:
        return [f"{problem}: not an adapter folder" for problem in problems]
    return _json_problems([folder / ADAPTER_CONFIG]) + _safetensors_problems(folder / ADAPTER_WEIGHTS)


def read_shapes(path: str | Path) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a model folder, from the safetensors headers."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in weight_files(path):
        with safe_open(file, "pt") as tensors:
            shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    return shapes


def copy_model_files(source_dir: str | Path, output_dir: str | Path) -> list[str]:
    """Copy everything but weights (config, tokenizer, processor, statistics) that `output_dir` lacks; return names."""
    copied = []
    for file in sorted(Path(source_dir).iterdir()):
        history = file.name in NOT_COPIED_NAMES or file.name.startswith(NOT_COPIED_PREFIXES)
        if history or file.name.endswith(NOT_COPIED_SUFFIXES) or not file.is_file():
            continue
        if (Path(output_dir) / file.name).exists():
            continue
        shutil.copyfile(file, Path(output_dir) / file.name)
        copied.append(file.name)
    return copied


@contextlib.contextmanager
def atomic_directory(output_dir: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a temporary sibling of `output_dir` to write into, and rename it when the block ends without an error.

    Until then nothing under the final name exists or changes. An existing folder is replaced only with `overwrite`
    (FileExistsError otherwise).
    """
    target = Path(output_dir)
    if target.exists() and any(target.iterdir()) and not overwrite:
        raise FileExistsError(f"{target} exists and is not empty: choose another folder or pass --overwrite")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    previous = target.with_name(f".{target.name}.old-{os.getpid()}")
    if target.exists():
        target.rename(previous)
    partial.rename(target)
    shutil.rmtree(previous, ignore_errors=True)


def save_weights(folder: str | Path, state: Mapping[str, torch.Tensor], max_shard_size: str = "5GB") -> None:
    """Write `state` as safetensors: one file, or shards of `max_shard_size` with an index."""
    folder = Path(folder)
    split = split_torch_state_dict_into_shards(dict(state), max_shard_size=max_shard_size)
    for name, keys in split.filename_to_tensors.items():
        save_file({k: state[k].detach().contiguous() for k in keys}, folder / name, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def save_model_dir(
    output_dir: str | Path,
    state: Mapping[str, torch.Tensor],
    source_dir: str | Path,
    *,
    json_files: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a complete model folder: `state` (checkpoint names) plus the other files of `source_dir`.

    `json_files` maps file names (dataset_statistics.json, metadata.json) to what they hold; these win over copies.
    All or nothing: see `atomic_directory`.
    """
    with atomic_directory(output_dir, overwrite=overwrite) as folder:
        save_weights(folder, state)
        write_json_files(folder, json_files or {})
        copy_model_files(source_dir, folder)


def write_json_files(folder: str | Path, json_files: Mapping[str, Any]) -> None:
    """Write each value as indented JSON under its name, in name order."""
    for name, value in sorted(json_files.items()):
        (Path(folder) / name).write_text(json.dumps(value, indent=2, sort_keys=False) + "\n")
