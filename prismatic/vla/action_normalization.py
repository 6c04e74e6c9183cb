"""Action statistics of a model folder, normalisation, and the way to LIBERO's raw action."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from prismatic.model_files import (
    checksum_problems,
    is_int,
    is_list_of,
    is_number,
    raise_file_problems,
    read_json_object,
)
from prismatic.vla.action_tokenizer import ActionTokenizer
from prismatic.vla.datasets.schema import ACTION_DIM

STATISTICS_FILES = ("config.json", "dataset_statistics.json")
# Actions are metres, radians and gripper openings of one step. Larger quantiles are an overflow or another unit.
MAX_ACTION = 1e6
_REPAIR = "Compute the statistics again from the data"


def load_norm_stats(model_dir: str | Path) -> dict[str, Any]:
    """Return `norm_stats` of `config.json`, overridden key by key by `dataset_statistics.json` where that exists.

    Raises FileNotFoundError when the folder has no `config.json`, ValueError naming the file when one is damaged or its
    statistics cannot un-normalise an action.
    """
    model_dir = Path(model_dir)
    raise_file_problems(checksum_problems(model_dir, lambda name: name in STATISTICS_FILES))
    stats: dict[str, Any] = {}
    for name in STATISTICS_FILES:
        file = model_dir / name
        if name != "config.json" and not os.path.lexists(file):
            continue
        fields = read_json_object(file)
        found = (fields.get("norm_stats") or {}) if name == "config.json" else fields
        if not isinstance(found, dict):
            raise ValueError(f"{file}: norm_stats is {str(found)[:40]!r}, it must be a JSON object")
        for key, entry in found.items():
            raise_file_problems(f"{file}: {key}{problem}" for problem in statistics_problems(entry))
        stats.update(found)
    return stats


def statistics_file_problems(file: str | Path) -> list[str]:
    """What is wrong with a `dataset_statistics.json`; empty if nothing is, or there is no such file."""
    if not os.path.lexists(file):
        return []
    try:
        fields = read_json_object(file)
    except (ValueError, OSError) as error:
        return [str(error)]
    return [
        f"{file}: {key}{problem}"
        for key, entry in fields.items()
        for problem in statistics_problems(entry)
    ]


def statistics_problems(entry: Any) -> list[str]:
    """Why one dataset's statistics cannot un-normalise actions; empty if they can.

    `action` needs q01 and q99: finite, of the same length, q01 <= q99 (equal where a dimension never moves), and no
    larger than MAX_ACTION. `mask`, `min`, `max`, `mean` and `std` may be absent.
    """
    action = entry.get("action") if isinstance(entry, dict) else None
    if not isinstance(action, dict):
        return [" has no action statistics: it must be an object with q01 and q99 under action"]
    for name in ("q01", "q99"):
        if not action.get(name) or not is_list_of(action[name], is_number):
            found = str(action.get(name))[:80]
            return [f".action.{name} is {found}: it must be a list of finite numbers. {_REPAIR}"]
    low, high = action["q01"], action["q99"]
    if len(low) != len(high):
        return [f".action has {len(low)} numbers in q01 and {len(high)} in q99. {_REPAIR}"]
    problems = [
        f".action has q01[{i}] {a} above q99[{i}] {b}. {_REPAIR}"
        for i, (a, b) in enumerate(zip(low, high, strict=True))
        if a > b
    ]
    problems += [
        f".action.{name}[{i}] is {value}: an action of more than {MAX_ACTION:g} is none. {_REPAIR}"
        for name, values in (("q01", low), ("q99", high))
        for i, value in enumerate(values)
        if abs(value) > MAX_ACTION
    ]
    mask = action.get("mask", True)
    if mask is not True and not is_list_of(mask, lambda m: isinstance(m, bool), len(low)):
        problems.append(
            f".action.mask is {str(mask)[:80]}: it must be {len(low)} times true or false"
        )
    for name in ("num_transitions", "num_trajectories"):
        if name in entry and not is_int(entry[name], 0, 1 << 62):
            problems.append(f".{name} is {str(entry[name])[:40]}: it must be a count")
    for name in ("min", "max", "mean", "std"):
        if name in action and not is_list_of(action[name], is_number, len(low)):
            problems.append(
                f".action.{name} is {str(action[name])[:80]}: it must be {len(low)} finite numbers. {_REPAIR}"
            )
    return problems


def resolve_unnorm_key(
    norm_stats: Mapping[str, Any], suite_name: str, unnorm_key: str | None = None
) -> str:
    """Return the statistics' key: `unnorm_key` if given, else the suite's name, else `{suite_name}_no_noops`.

    Raises ValueError naming the keys there are when none fits, or if the statistics are of another action.
    """
    candidates = [unnorm_key] if unnorm_key else [suite_name, f"{suite_name}_no_noops"]
    for key in candidates:
        if key in norm_stats:
            action = norm_stats[key].get("action", {})
            if "q01" in action and len(action["q01"]) != ACTION_DIM:
                raise ValueError(
                    f"the action statistics of {key!r} have {len(action['q01'])} dimensions, an action has "
                    f"{ACTION_DIM}: use the key of another dataset, or compute the statistics again"
                )
            return key
    have = (
        sorted(norm_stats)
        or "none: the folder needs dataset_statistics.json, as fine-tuning writes it"
    )
    raise ValueError(
        f"the checkpoint has no action statistics under {' or '.join(map(repr, candidates))}; it has {have}"
    )


def normalize_action(action: np.ndarray, stats: Mapping[str, Any]) -> np.ndarray:
    """Map q01..q99 to [-1, 1] where `mask` is true, clipping; any dimension whose min equals its max becomes 0.

    `action` (..., A); `stats` is `norm_stats[key]["action"]`. Returns float32.
    """
    action = np.asarray(action, dtype=np.float64)
    low, high, mask = _bounds(stats)
    scaled = np.clip(2.0 * (action - low) / (high - low + 1e-8) - 1.0, -1.0, 1.0)
    normalized = np.where(mask, scaled, action)
    if "min" in stats and "max" in stats:
        # As OpenVLA does it: after the mask, so an unused dimension is 0 whether or not it is scaled.
        normalized = np.where(np.asarray(stats["min"]) == np.asarray(stats["max"]), 0.0, normalized)
    return normalized.astype(np.float32)


def unnormalize_action(action: np.ndarray, stats: Mapping[str, Any]) -> np.ndarray:
    """Map [-1, 1] to q01..q99 where `mask` is true (`0.5 * (a + 1) * (q99 - q01) + q01`), else keep; float32."""
    action = np.asarray(action, dtype=np.float64)
    low, high, mask = _bounds(stats)
    return np.where(mask, 0.5 * (action + 1.0) * (high - low) + low, action).astype(np.float32)


def constant_dimensions(tokenizer: ActionTokenizer, stats: Mapping[str, Any]) -> np.ndarray:
    """Return which dimensions give the environment the same number whatever the token, (A,) bool.

    Those are the dimensions with an empty range in the statistics (`q01 == q99` where `mask` is true).
    """
    num_dimensions = len(stats["q01"])
    token_ids_VA = np.repeat(tokenizer.action_token_ids[:, None], num_dimensions, axis=1)
    actions_VA = tokens_to_env_actions(token_ids_VA, tokenizer, stats)
    return (actions_VA == actions_VA[0]).all(axis=0)


def _bounds(stats: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    low, high = (
        np.asarray(stats["q01"], dtype=np.float64),
        np.asarray(stats["q99"], dtype=np.float64),
    )
    return low, high, np.asarray(stats.get("mask", np.ones_like(low)), dtype=bool)


def to_env_action(action: np.ndarray) -> np.ndarray:
    """Turn the model's action (gripper 1 = open, 0 = closed) into LIBERO's raw one (gripper -1 = open, +1 = close).

    `-sign(2 g - 1)`, except that exactly 0.5, where the sign is 0 and LIBERO would get no command, opens.
    `action` (..., 7); returns a float32 copy.
    """
    env_action = np.array(action, dtype=np.float32)
    env_action[..., -1] = np.where(env_action[..., -1] >= 0.5, -1.0, 1.0)
    return env_action


def tokens_to_env_actions(
    token_ids_BA: np.ndarray, tokenizer: ActionTokenizer, stats: Mapping[str, Any]
) -> np.ndarray:
    """Decode, un-normalise and convert action tokens (B, 7) to LIBERO's raw actions (B, 7) float32."""
    return to_env_action(unnormalize_action(tokenizer.decode(token_ids_BA), stats))
