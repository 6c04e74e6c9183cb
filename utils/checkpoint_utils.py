"""Model folders: what a complete one holds, checks before anything starts, and writing that is never half done.

A folder in openvla-7b's format has config.json, safetensors (one file, or shards with an index), the tokenizer's and
the processor's files and, after fine-tuning, dataset_statistics.json. An adapter folder (peft) has only
adapter_config.json and adapter_model.safetensors.
"""

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from prismatic.extern.hf.oft_checks import oft_adapter_problems, oft_problems
from prismatic.model_files import (
    CHECKSUMS_NAME,
    INDEX_NAME,
    WEIGHTS_NAME,
    checksum_problems,
    field_problems,
    is_int,
    is_list_of,
    is_number,
    leaves_folder,
    raise_file_problems,
    read_header,
    read_headers,
    read_json_object,
    weight_files,
    write_checksums,
)
from prismatic.regular_files import folder_problems
from prismatic.vla.action_normalization import load_norm_stats, statistics_file_problems

# torch and transformers take seconds to import and are imported where they are used: programs that only write folders
# or check flags need neither.
if TYPE_CHECKING:
    import torch

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
REQUIRED_FILES = ("config.json", "preprocessor_config.json", "tokenizer_config.json")
# Never copied beside new weights: other weights, and what describes another folder's history.
NOT_COPIED_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".index.json")
NOT_COPIED_NAMES = (
    ADAPTER_CONFIG, "metadata.json", "merge_metadata.json", "base_model.json", "args.json", "log.txt", "metrics.jsonl",
    "curriculum.json", "eval_final.json", "pretraining.jsonl", CHECKSUMS_NAME,
)  # fmt: skip
NOT_COPIED_PREFIXES = ("events.out.tfevents", ".")
# What atomic_directory leaves when its process is killed.
_INTERRUPTED = re.compile(r"\.(?P<name>.+)\.(?P<kind>partial|old)-(?P<pid>[0-9]{1,10})")
# peft matches the keys of both patterns, and target_modules where it is text, as regular expressions: a hostile one
# never ends. Names, with escaped dots and without repetitions or groups, are enough.
_MODULE_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_MODULE_PATTERN = re.compile(r"\^?([A-Za-z0-9_.-]|\\\.)+\$?")


def _is_names(value: Any) -> bool:
    return is_list_of(
        value, lambda name: isinstance(name, str) and _MODULE_NAME.fullmatch(name) is not None
    )


def _is_layers(value: Any) -> bool:
    return is_list_of(
        value if isinstance(value, list) else [value], lambda layer: is_int(layer, 0, 4096)
    )


def _is_pattern(value: Any, is_value: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(
        _MODULE_PATTERN.fullmatch(k) and is_value(v) for k, v in value.items()
    )


# A factor of the update far above any in use, and within what its product with a weight may be in float32.
MAX_ALPHA = 1e6
REQUIRED_ADAPTER_FIELDS = ("peft_type", "r", "lora_alpha", "target_modules")
ADAPTER_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "peft_type": (lambda v: v == "LORA", "LORA"),
    "r": (lambda v: is_int(v, 1, 1 << 16), "a positive whole number"),
    "lora_alpha": (lambda v: is_number(v) and 0 < v <= MAX_ALPHA, "a positive number up to 1e6"),
    "lora_dropout": (lambda v: is_number(v) and 0 <= v < 1, "in [0, 1)"),
    "bias": (lambda v: v in ("none", "all", "lora_only"), "none, all or lora_only"),
    "target_modules": (
        lambda v: _is_names(v) and len(v) > 0,
        "a list of names of modules, without regular expressions",
    ),
    "rank_pattern": (
        lambda v: v is None or _is_pattern(v, lambda n: is_int(n, 1, 1 << 16)),
        "names with ranks",
    ),
    "alpha_pattern": (
        lambda v: v is None or _is_pattern(v, lambda n: is_number(n) and abs(n) <= MAX_ALPHA),
        "names with numbers up to 1e6",
    ),
    "modules_to_save": (
        lambda v: v is None or _is_names(v),
        "a list of names of modules, or null",
    ),
    "base_model_name_or_path": (lambda v: v is None or isinstance(v, str), "text"),
    "exclude_modules": (lambda v: v is None or _is_names(v), "a list of names of modules, or null"),
    "layers_to_transform": (
        lambda v: v is None or _is_layers(v),
        "a layer's number, a list of them, or null",
    ),
    "layers_pattern": (
        lambda v: v is None or _is_names(v if isinstance(v, list) else [v]),
        "names, or null",
    ),
    # Not used here; with megatron_config peft imports the module that megatron_core names.
    **{
        name: (lambda v: v is None, "null")
        for name in ("eva_config", "megatron_config", "velora_config")
    },
    "use_rslora": (lambda v: isinstance(v, bool), "true or false"),
}


def check_model_dir(path: str | Path) -> list[str]:
    """Problems that keep `path` from being loaded as a model; empty when it is complete.

    Reads the small files and the weights' headers; all of a folder that has checksums (a few seconds for openvla-7b).
    """
    folder = Path(path)
    if not os.path.isdir(folder):
        return [
            f"{path} is not a folder: give a model folder (config.json, safetensors, tokenizer)"
        ]
    if problems := folder_problems(folder):
        return problems
    has_weights = (folder / WEIGHTS_NAME).exists() or (folder / INDEX_NAME).exists()
    if (folder / ADAPTER_CONFIG).exists() and not has_weights:
        return [_adapter_only_message(folder)]
    if problems := oft_problems(folder):
        return problems
    problems = [f"{path} lacks {name}" for name in REQUIRED_FILES if not (folder / name).exists()]
    if not has_weights:
        problems.append(f"{path} has no weights: neither {WEIGHTS_NAME} nor {INDEX_NAME}")
    problems = problems or checksum_problems(folder)
    if problems:
        return problems
    from prismatic.extern.hf.folder_checks import check_model_files
    from prismatic.extern.hf.modeling_prismatic import parameter_shapes
    from prismatic.extern.hf.processing_prismatic import load_processor

    checks: list[Callable[[], Any]] = [
        lambda: check_model_files(folder, parameter_shapes),
        lambda: load_processor(folder),
        lambda: load_norm_stats(folder),
    ]
    return list(dict.fromkeys(problem for check in checks for problem in _problems_of(check)))


def check_model_values(path: str | Path) -> list[str]:
    """Tensors of a complete model folder that hold NaN or infinity. Reads all weights: 10 GB/s and core if cached."""
    from prismatic.finite_weights import nonfinite_in_files

    return nonfinite_in_files(weight_files(path))


def _problems_of(check: Callable[[], Any]) -> list[str]:
    try:
        check()
    except (ValueError, OSError) as error:
        return str(error).splitlines()
    return []


def _adapter_only_message(folder: Path) -> str:
    try:
        base = read_json_object(folder / ADAPTER_CONFIG).get("base_model_name_or_path") or "BASE"
    except ValueError:
        base = "BASE"
    return (
        f"{folder} holds only a LoRA adapter, a whole model is needed: merge it first with\n  python "
        f"vla-scripts/merge.py --vla_path {base} --adapter_dir {folder} --output_dir {str(folder).rstrip('/')}-merged"
    )


def check_adapter_dir(path: str | Path) -> list[str]:
    """Problems that keep `path` from being loaded as a peft adapter; empty when it is complete."""
    folder = Path(path)
    if not os.path.isdir(folder):
        return [f"{path} is not a folder: give an adapter folder ({ADAPTER_CONFIG}, safetensors)"]
    if problems := folder_problems(folder):
        return problems
    problems = [
        f"{path} lacks {n}" for n in (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if not (folder / n).exists()
    ]
    if problems:
        return [f"{problem}: not an adapter folder" for problem in problems]
    if problems := oft_adapter_problems(folder):
        return problems
    problems = checksum_problems(
        folder, lambda name: name.startswith(("adapter_", "base_model", "dataset_statistics"))
    )
    return problems or [
        problem
        for check in (lambda: read_adapter_config(folder), lambda: _check_adapter_weights(folder))
        for problem in _problems_of(check)
    ] + statistics_file_problems(folder / "dataset_statistics.json")


def read_adapter_config(adapter_dir: str | Path) -> dict[str, Any]:
    """The fields of adapter_config.json. Raises ValueError naming the file with all that is wrong in it."""
    file = Path(adapter_dir) / ADAPTER_CONFIG
    fields = read_json_object(file)
    problems = field_problems(fields, ADAPTER_RULES)
    problems += [f"{name} is missing" for name in REQUIRED_ADAPTER_FIELDS if name not in fields]
    if problems:
        raise ValueError("\n".join(f"{file}: {problem}" for problem in problems))
    return fields


def _check_adapter_weights(folder: Path) -> None:
    from prismatic.extern.hf.folder_checks import WEIGHT_DTYPES
    from prismatic.finite_weights import nonfinite_in_files

    for name, (dtype, _) in read_header(folder / ADAPTER_WEIGHTS).items():
        if dtype not in WEIGHT_DTYPES:
            raise ValueError(
                f"{folder / ADAPTER_WEIGHTS}: {name} is {dtype}, not one of {', '.join(WEIGHT_DTYPES)}"
            )
    raise_file_problems(nonfinite_in_files([folder / ADAPTER_WEIGHTS]))


def read_shapes(path: str | Path) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a model folder, from the safetensors headers."""
    return {name: shape for name, (_, shape) in read_headers(path).items()}


def copy_model_files(source_dir: str | Path, output_dir: str | Path) -> list[str]:
    """Copy everything but weights (config, tokenizer, processor, statistics) that `output_dir` lacks; return names.

    Raises ValueError for a link out of the folder: one from elsewhere could collect files of this machine.
    """
    copied = []
    for file in sorted(Path(source_dir).iterdir()):
        history = file.name in NOT_COPIED_NAMES or file.name.startswith(NOT_COPIED_PREFIXES)
        if history or file.name.endswith(NOT_COPIED_SUFFIXES) or not file.is_file():
            continue
        if (Path(output_dir) / file.name).exists():
            continue
        if leaves_folder(file):
            raise ValueError(
                f"{file} is a link to {file.resolve()}, outside of its folder: put the file itself there"
            )
        shutil.copyfile(file, Path(output_dir) / file.name)
        copied.append(file.name)
    return copied


@contextlib.contextmanager
def atomic_directory(output_dir: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a temporary sibling of `output_dir` to write into, and rename it when the block ends without an error.

    Until then nothing under the final name exists or changes. An existing folder is replaced only with `overwrite`
    (FileExistsError otherwise). checksums.json is written last, over all files. What a killed process left of writing
    the same folder is cleaned first. An OSError of the block or of the renaming names a file.
    """
    target = Path(output_dir)
    clean_interrupted_writes(target.parent, target.name)
    if target.is_symlink() and any(target.iterdir() if target.is_dir() else ()):
        raise FileExistsError(f"{target} is a link, which is not replaced: give the folder itself")
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file: choose another folder")
    if target.exists() and any(target.iterdir()) and not overwrite:
        raise FileExistsError(
            f"{target} exists and is not empty: choose another folder or pass --overwrite"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    partial.mkdir()
    try:
        yield partial
        write_checksums(partial)
        _put_in_place(partial, target)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = str(target)  # a full disk shows at `write`, which knows no name
        raise


def _put_in_place(partial: Path, target: Path) -> None:
    previous = target.with_name(f".{target.name}.old-{os.getpid()}")
    if target.exists():
        target.rename(previous)
    try:
        partial.rename(target)
    except OSError:
        if previous.exists():
            previous.rename(target)
        raise
    shutil.rmtree(previous, ignore_errors=True)


def clean_interrupted_writes(folder: str | Path, name: str | None = None) -> list[Path]:
    """Undo what killed processes left of `atomic_directory` in `folder`; only of the target `name` if it is given.

    A half-written folder goes; a complete one that was about to be replaced comes back if its successor is missing.
    Those of processes that run are left alone. Returns the paths that were cleaned.
    """
    cleaned = []
    for path in sorted(Path(folder).glob(".*")) if Path(folder).is_dir() else []:
        match = _INTERRUPTED.fullmatch(path.name)
        running = (
            match and int(match["pid"]) != os.getpid() and psutil.pid_exists(int(match["pid"]))
        )
        if not match or running or name not in (None, match["name"]):
            continue
        target = path.with_name(match["name"])
        if match["kind"] == "old" and not target.exists():
            path.rename(target)
        else:
            shutil.rmtree(path, ignore_errors=True)
        cleaned.append(path)
    return cleaned


def save_weights(
    folder: str | Path, state: "Mapping[str, torch.Tensor]", max_shard_size: str = "5GB"
) -> None:
    """Write `state` as safetensors: one file, or shards of `max_shard_size` with an index.

    Raises OSError naming the file that could not be written.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    folder = Path(folder)
    split = split_torch_state_dict_into_shards(dict(state), max_shard_size=max_shard_size)
    for name, keys in split.filename_to_tensors.items():
        try:
            save_file(
                {k: state[k].detach().contiguous() for k in keys},
                folder / name,
                metadata={"format": "pt"},
            )
        except SafetensorError as error:  # hides the system's error
            code = re.search(r"os error (\d+)", str(error))
            number = int(code[1]) if code else errno.EIO
            raise OSError(number, os.strerror(number), str(folder / name)) from error
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def save_model_dir(
    output_dir: str | Path,
    state: "Mapping[str, torch.Tensor]",
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
