"""Normalisation statistics of an RLDS dataset, cached as JSON beside the data.

The numbers and their names are OpenVLA's `dataset_statistics.json`: mean, std, min, max, q01, q99 of the
transformed actions (and of the proprioception), and how many transitions and trajectories they cover.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from prismatic.model_files import raise_file_problems, read_json_object, write_whole
from prismatic.regular_files import open_file, read_file
from prismatic.vla.action_normalization import statistics_problems
from prismatic.vla.datasets.mixtures import check_mixture, dataset_dir, resolve_mixture
from prismatic.vla.datasets.rlds import RawEpisode, iterate_episodes
from prismatic.vla.datasets.schema import shard_files
from prismatic.vla.datasets.transforms import DatasetTransform, get_transform

logger = logging.getLogger("ppo_vla.data")


def array_statistics(values_ND: np.ndarray) -> dict[str, list[float]]:
    """Mean, std (population), min, max and the 1st and 99th percentile of each column."""
    return {
        "mean": values_ND.mean(0).tolist(),
        "std": values_ND.std(0).tolist(),
        "max": values_ND.max(0).tolist(),
        "min": values_ND.min(0).tolist(),
        "q01": np.quantile(values_ND, 0.01, axis=0).tolist(),
        "q99": np.quantile(values_ND, 0.99, axis=0).tolist(),
    }


def compute_statistics(
    episodes: Iterable[RawEpisode], transform: DatasetTransform, *, where: str = "the dataset"
) -> dict[str, Any]:
    """Statistics of whole episodes in OpenVLA's format: `action` (with its mask), `proprio`, the two counts.

    Raises ValueError if there are no transitions, or an action or a state is not finite.
    """
    actions, states = [], []
    for episode in episodes:
        actions.append(transform.actions(episode.actions_T7))
        if episode.states_TS is not None:
            states.append(episode.states_TS)
    if not sum(map(len, actions)):
        raise ValueError(f"{where} holds no transitions: nothing can be learned from it")
    actions_N7 = np.concatenate(actions)
    if not np.isfinite(actions_N7).all():
        row = int(np.argwhere(~np.isfinite(actions_N7))[0, 0])
        raise ValueError(
            f"{where}: transition {row} has a non-finite action {actions_N7[row].tolist()}: repair the dataset"
        )
    statistics: dict[str, Any] = {"action": array_statistics(actions_N7)}
    statistics["action"]["mask"] = list(transform.action_mask)
    if states:
        states_NS = np.concatenate(states)
        if not np.isfinite(states_NS).all():
            row = int(np.argwhere(~np.isfinite(states_NS))[0, 0])
            raise ValueError(
                f"{where}: transition {row} has a non-finite state {states_NS[row].tolist()}: repair it"
            )
        statistics["proprio"] = array_statistics(states_NS)
    return statistics | {"num_transitions": len(actions_N7), "num_trajectories": len(actions)}


def content_key(dataset_dir: str | Path, transform: DatasetTransform) -> str:
    """Hash that changes with the data and with the transform.

    Covers both JSON files in full and each shard's name, size and first and last 64 KiB: hashing hundreds of GB
    would take longer than the statistics.
    """
    digest = hashlib.sha256(transform.name.encode())
    for name in ("features.json", "dataset_info.json"):
        digest.update(read_file(Path(dataset_dir) / name))
    for file in shard_files(dataset_dir):
        with open_file(file) as data:
            size = os.fstat(data.fileno()).st_size
            digest.update(f"{file.name}:{size}".encode())
            digest.update(data.read(1 << 16))
            data.seek(max(0, size - (1 << 16)))
            digest.update(data.read(1 << 16))
    return digest.hexdigest()[:16]


def dataset_statistics(
    dataset_dir: str | Path, transform: DatasetTransform, *, num_threads: int = 1
) -> dict[str, Any]:
    """The dataset's statistics, from `dataset_statistics_<key>.json` beside the data if it is there.

    Computed and cached otherwise; a directory that cannot be written to costs a warning and the computation.
    """
    cache = Path(dataset_dir) / f"dataset_statistics_{content_key(dataset_dir, transform)}.json"
    if (cached := _read_cache(cache)) is not None:
        return cached
    logger.info("computing the statistics of %s", dataset_dir)
    episodes = iterate_episodes(dataset_dir, num_threads=num_threads)
    statistics = compute_statistics(episodes, transform, where=str(dataset_dir))
    raise_file_problems(f"{dataset_dir}: {p.lstrip('.')}" for p in statistics_problems(statistics))
    content = {"sha256": _digest(statistics), "statistics": statistics}
    try:
        write_whole(
            cache, json.dumps(content, indent=2) + "\n"
        )  # several ranks may arrive here at once
    except OSError as error:
        logger.warning(
            "cannot cache the statistics in %s (%s): they are computed again next time",
            cache,
            error,
        )
    return statistics


def _read_cache(file: Path) -> dict[str, Any] | None:
    """The statistics in a cache file; None if there is none, or it is not what was written (then it is made anew)."""
    if not os.path.lexists(file):
        return None
    try:
        content = read_json_object(file)
    except (ValueError, OSError) as error:
        logger.warning("%s; the statistics are computed again", error)
        return None
    statistics = content.get("statistics")
    if (
        not isinstance(statistics, dict)
        or content.get("sha256") != _digest(statistics)
        or statistics_problems(statistics)
    ):
        logger.warning(
            "%s is damaged, or of another version: the statistics are computed again", file
        )
        return None
    return statistics


def _digest(statistics: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(statistics, sort_keys=True).encode()).hexdigest()


def load_dataset_statistics(data_root_dir: str | Path, dataset_name: str) -> dict[str, Any]:
    """Statistics of the one dataset that `dataset_name` means; tensorflow is imported only if they are not cached.

    Raises ValueError if it cannot be read, or means several datasets: an action is un-normalised with one's numbers.
    """
    problems = check_mixture(data_root_dir, dataset_name)
    if problems:
        raise ValueError("\n".join(problems))
    names = [name for name, _ in resolve_mixture(dataset_name)]
    if len(names) > 1:
        raise ValueError(
            f"--dataset_name {dataset_name} is a mixture: name one of {', '.join(names)}"
        )
    return dataset_statistics(dataset_dir(data_root_dir, names[0]), get_transform(names[0]))
