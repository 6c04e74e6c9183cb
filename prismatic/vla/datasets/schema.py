"""What an RLDS directory must hold, checked from its JSON files alone (tensorflow takes seconds to import).

The layout is `modified_libero_rlds/<name>/1.0.0`: `features.json`, `dataset_info.json` and TFRecord shards. An
episode is `steps` (a nested dataset) and `episode_metadata`.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VERSION = "1.0.0"
SPLIT = "train"
ACTION_DIM = 7
# Feature path -> shape the readers rely on (None: any extent; () a scalar or text).
REQUIRED_FEATURES: dict[str, tuple[int | None, ...]] = {
    "steps/observation/image": (None, None, 3),
    "steps/action": (ACTION_DIM,),
    "steps/language_instruction": (),
}
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

    Raises ValueError if the file is missing or is not what tfds writes.
    """
    file = Path(dataset_dir) / "features.json"
    features: dict[str, Feature] = {}
    try:
        _flatten(json.loads(file.read_text()), "", features)
    except FileNotFoundError as error:
        raise ValueError(f"{dataset_dir} lacks features.json") from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not a tfds features file ({error!r}): damaged or half-written") from error
    return features


def _flatten(node: dict[str, Any], path: str, features: dict[str, Feature]) -> None:
    if "featuresDict" in node:
        for name, child in node["featuresDict"]["features"].items():
            _flatten(child, f"{path}/{name}".lstrip("/"), features)
    elif "sequence" in node:
        _flatten(node["sequence"]["feature"], path, features)
    else:
        spec = node.get("image") or node.get("tensor") or {}
        dimensions = spec.get("shape", {}).get("dimensions", [])
        shape = tuple(int(d) if int(d) > 0 else None for d in dimensions)
        kind = node["pythonClassName"].rpartition(".")[2]
        features[path] = Feature(kind, shape, spec.get("dtype", ""), spec.get("encodingFormat", ""))


def check_dataset_dir(path: str | Path) -> list[str]:
    """Problems that keep `path` (`<data_root_dir>/<name>/1.0.0`) from being read; empty when it is complete.

    Looks at the directory, the features and their shapes, the `train` split and that every shard is there. Reads
    two JSON files; imports no tensorflow.
    """
    folder = Path(path)
    if not folder.is_dir():
        return [f"{path} is not a directory: give <data_root_dir>/<dataset_name>/{VERSION} as tfds writes it"]
    try:
        features = read_features(folder)
    except ValueError as error:
        return [str(error)]
    return _feature_problems(folder, features) + _shard_problems(folder)


def _feature_problems(folder: Path, features: dict[str, Feature]) -> list[str]:
    missing = [name for name in REQUIRED_FEATURES if name not in features]
    problems = []
    if missing:
        problems.append(f"{folder} lacks the features {', '.join(missing)}: it has {', '.join(sorted(features))}")
    for name, wanted in REQUIRED_FEATURES.items():
        found = features[name].shape if name in features else wanted
        agrees = len(found) == len(wanted) and all(w in (None, f) for w, f in zip(wanted, found, strict=True))
        if not agrees:
            problems.append(f"{folder}: feature {name} has shape {found}, expected {wanted} (None: any)")
    return problems


def _shard_problems(folder: Path) -> list[str]:
    file = folder / "dataset_info.json"
    try:
        splits = {s["name"]: s for s in json.loads(file.read_text()).get("splits", [])}
    except FileNotFoundError:
        return [f"{folder} lacks dataset_info.json: it is half-written"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        return [f"{file} is not a tfds dataset_info file ({error!r}): damaged or half-written"]
    if SPLIT not in splits:
        return [f"{folder} has no split {SPLIT!r}: it has {', '.join(sorted(splits)) or 'none'}"]
    num_shards = len(splits[SPLIT].get("shardLengths", []))
    found = shard_files(folder)
    if num_shards == 0 or len(found) != num_shards:
        return [f"{folder} has {len(found)} {SPLIT} shards, dataset_info.json names {num_shards}: it is half-written"]
    return []


def shard_files(dataset_dir: str | Path) -> list[Path]:
    """The `train` split's TFRecord files in name order."""
    return sorted(Path(dataset_dir).glob(f"*-{SPLIT}.tfrecord*"))
