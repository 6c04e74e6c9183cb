"""What an RLDS directory must hold, checked from its JSON files alone (tensorflow takes seconds to import).

The layout is `modified_libero_rlds/<name>/1.0.0`: `features.json`, `dataset_info.json` and TFRecord shards. An
episode is `steps` (a nested dataset) and `episode_metadata`.
"""

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prismatic.model_files import checksum_problems, read_json_object
from prismatic.regular_files import MAX_TEXT_BYTES, file_problems

VERSION = "1.0.0"
SPLIT = "train"
ACTION_DIM = 7
# Feature path -> shape the readers rely on (None: any extent; () a scalar or text).
REQUIRED_FEATURES: dict[str, tuple[int | None, ...]] = {
    "steps/observation/image": (None, None, 3),
    "steps/action": (ACTION_DIM,),
    "steps/language_instruction": (),
}
REQUIRED_DTYPES = {"steps/observation/image": ("uint8",), "steps/action": ("float32", "float64")}
# How tfds' two writers name a shard: by index and count, or by index alone.
FILE_TEMPLATES = {
    "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}": "{name}-{split}.tfrecord-{index:05d}-of-{count:05d}",
    "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}": "{name}-{split}.tfrecord-{index:05d}",
}
DEFAULT_TEMPLATE = next(iter(FILE_TEMPLATES))
# A frame of 4096 x 4096; nothing in a robot's data set is larger.
MAX_ELEMENTS, MAX_RANK = 3 << 24, 8
_TFDS_CLASS = re.compile(r"tensorflow_datasets\.core\.features\.[a-z_]+\.[A-Za-z]+")
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_DTYPES = ("", "bool", "string", "object", "float16", "float32", "float64",
           *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)))  # fmt: skip
# Read when there: proprioception only enters the statistics.
STATE_FEATURE = "steps/observation/state"


@dataclass(frozen=True)
class Feature:
    """One leaf of features.json: its kind (`Image`, `Tensor`, `Scalar`, `Text`), shape and dtype."""

    kind: str
    shape: tuple[int | None, ...]
    dtype: str
    encoding: str = ""


def read_features(dataset_dir: str | Path) -> dict[str, Feature]:
    """Flatten `features.json` to {"steps/observation/image": Feature, ...}.

    Raises ValueError if the file is missing, is not what tfds writes, or names code that is not tfds' own.
    """
    file = Path(dataset_dir) / "features.json"
    features: dict[str, Feature] = {}
    try:
        _flatten(read_json_object(file), "", features)
    except FileNotFoundError as error:
        raise ValueError(f"{dataset_dir} lacks features.json") from error
    except (KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise ValueError(
            f"{file} is not a tfds features file ({error!r}): damaged or half-written"
        ) from error
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return features


def _flatten(node: dict[str, Any], path: str, features: dict[str, Feature]) -> None:
    if not _TFDS_CLASS.fullmatch(
        node["pythonClassName"]
    ):  # tfds imports the module that stands there
        found = node["pythonClassName"][:80]
        raise ValueError(f"{path or 'the tree'} is a {found!r}: only tfds' own features are read")
    if "featuresDict" in node:
        for name, child in node["featuresDict"]["features"].items():
            _flatten(child, f"{path}/{name}".lstrip("/"), features)
    elif "sequence" in node:
        _flatten(node["sequence"]["feature"], path, features)
    else:
        spec = node.get("image") or node.get("tensor") or {}
        sizes = [int(d) for d in spec.get("shape", {}).get("dimensions", [])]
        dtype, encoding = spec.get("dtype", ""), spec.get("encodingFormat", "")
        if len(sizes) > MAX_RANK or math.prod(max(size, 1) for size in sizes) > MAX_ELEMENTS:
            raise ValueError(
                f"{path} has the shape {sizes}: more than {MAX_ELEMENTS} elements are not read"
            )
        if dtype not in _DTYPES or encoding not in ("", "jpeg", "png"):
            raise ValueError(
                f"{path} has dtype {dtype!r} and encoding {encoding!r}, which are not read"
            )
        kind = node["pythonClassName"].rpartition(".")[2]
        features[path] = Feature(
            kind, tuple(size if size > 0 else None for size in sizes), dtype, encoding
        )


def check_dataset_dir(path: str | Path) -> list[str]:
    """Problems that keep `path` (`<data_root_dir>/<name>/1.0.0`) from being read; empty when it is complete.

    Looks at the directory, the features and their shapes, the `train` split and that every shard is there. Reads
    two JSON files; imports no tensorflow.
    """
    folder = Path(path)
    if not os.path.isdir(folder):
        return [
            f"{path} is not a directory: give <data_root_dir>/<dataset_name>/{VERSION} as tfds writes it"
        ]
    texts = [p for p in folder.iterdir() if p.name.endswith((".json", ".txt", ".bib"))]
    if problems := file_problems(sorted(texts), MAX_TEXT_BYTES) + file_problems(
        shard_files(folder)
    ):
        return problems
    if problems := checksum_problems(folder, lambda name: name.endswith(".json")):
        return problems
    try:
        features = read_features(folder)
    except ValueError as error:
        return [str(error)]
    return _feature_problems(folder, features) + _shard_problems(folder)


def _feature_problems(folder: Path, features: dict[str, Feature]) -> list[str]:
    missing = [name for name in REQUIRED_FEATURES if name not in features]
    problems = []
    if missing:
        problems.append(
            f"{folder} lacks the features {', '.join(missing)}: it has {', '.join(sorted(features))}"
        )
    for name, wanted in REQUIRED_FEATURES.items():
        found = features[name].shape if name in features else wanted
        agrees = len(found) == len(wanted) and all(
            w in (None, f) for w, f in zip(wanted, found, strict=True)
        )
        if not agrees:
            problems.append(
                f"{folder}: feature {name} has shape {found}, expected {wanted} (None: any)"
            )
    for name, dtypes in REQUIRED_DTYPES.items():
        if name in features and features[name].dtype not in dtypes:
            problems.append(
                f"{folder}: feature {name} is {features[name].dtype!r}, expected {' or '.join(dtypes)}"
            )
    return problems


def _shard_problems(folder: Path) -> list[str]:
    try:
        lengths = read_shard_lengths(folder)
    except ValueError as error:
        return [str(error)]
    if not lengths or len(shard_files(folder)) != len(lengths):
        found = len(shard_files(folder))
        return [
            f"{folder} has {found} {SPLIT} shards, dataset_info.json names {len(lengths)}: it is half-written"
        ]
    return []


def read_shard_lengths(dataset_dir: str | Path) -> dict[str, int]:
    """File name -> number of episodes of each shard of the `train` split, as `dataset_info.json` says.

    Raises ValueError if the file is missing or damaged, or names files outside of its folder.
    """
    file = Path(dataset_dir) / "dataset_info.json"
    try:
        fields = read_json_object(file)
        splits = {split["name"]: split for split in fields.get("splits", [])}
        names = [fields["name"], *splits]
        templates = [split.get("filepathTemplate", DEFAULT_TEMPLATE) for split in splits.values()]
        lengths = [int(n) for n in splits[SPLIT].get("shardLengths", [])] if SPLIT in splits else []
    except FileNotFoundError as error:
        raise ValueError(f"{dataset_dir} lacks dataset_info.json: it is half-written") from error
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"{file} is not a tfds dataset_info file ({error!r}): damaged or half-written"
        ) from error
    if not all(isinstance(name, str) and _NAME.fullmatch(name) for name in names):
        raise ValueError(
            f"{file}: the names {names} may only have letters, digits, - and _: they become file names"
        )
    known_templates = tuple(
        FILE_TEMPLATES
    )  # of a tuple anything may be asked, of a dict only what can be hashed
    if (
        any(t not in known_templates for t in templates)
        or fields.get("fileFormat", "tfrecord") != "tfrecord"
    ):
        known, found = " or ".join(FILE_TEMPLATES), sorted(map(str, templates))
        raise ValueError(f"{file}: only tfrecord files named {known} are read, not {found}")
    if SPLIT not in splits:
        raise ValueError(
            f"{dataset_dir} has no split {SPLIT!r}: it has {', '.join(sorted(splits)) or 'none'}"
        )
    if not all(0 <= n <= MAX_ELEMENTS for n in lengths):
        raise ValueError(f"{file}: shardLengths {lengths[:5]} ... must be counts of episodes")
    template = FILE_TEMPLATES[splits[SPLIT].get("filepathTemplate", DEFAULT_TEMPLATE)]
    return {
        template.format(name=names[0], split=SPLIT, index=index, count=len(lengths)): num_episodes
        for index, num_episodes in enumerate(lengths)
    }


def shard_files(dataset_dir: str | Path) -> list[Path]:
    """The `train` split's TFRecord files in name order."""
    return sorted(Path(dataset_dir).glob(f"*-{SPLIT}.tfrecord*"))
