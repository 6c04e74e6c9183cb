"""Named and weighted mixtures of RLDS datasets."""

import math
from collections.abc import Mapping
from pathlib import Path

from prismatic.vla.datasets.schema import VERSION, check_dataset_dir

_LIBERO = (
    "libero_spatial_no_noops",
    "libero_object_no_noops",
    "libero_goal_no_noops",
    "libero_10_no_noops",
)

# Mixture name -> ((dataset, weight), ...). OpenVLA's names; the order decides nothing.
MIXTURES: dict[str, tuple[tuple[str, float], ...]] = {
    "libero_4_task_suites_no_noops": tuple((name, 1.0) for name in _LIBERO),
    **{name: ((name, 1.0),) for name in (*_LIBERO, "libero_90_no_noops", "tabletop_no_noops")},
    "tabletop": (("tabletop_no_noops", 1.0),),
}


def resolve_mixture(dataset_name: str) -> tuple[tuple[str, float], ...]:
    """Datasets and weights behind `--dataset_name`.

    Accepts a mixture's name, any dataset's name, or a list `name:weight,name:weight` (weight 1 where none is given).
    A weight multiplies the dataset's number of transitions, as in OpenVLA: equal weights draw every transition
    equally often.

    Raises ValueError on an empty name, a repeated dataset and a weight that is not a positive number.
    """
    mixture: dict[str, float] = {}
    for entry in dataset_name.split(","):
        name, _, weight_text = entry.strip().partition(":")
        weight = _parse_weight(dataset_name, weight_text or "1")
        if not name:
            raise ValueError(
                f"--dataset_name {dataset_name!r} has an empty name: write name:weight,name:weight"
            )
        for dataset, factor in MIXTURES.get(name, ((name, 1.0),)):
            if dataset in mixture:
                raise ValueError(
                    f"--dataset_name {dataset_name!r} names {dataset} twice: give it once, with a weight"
                )
            mixture[dataset] = weight * factor
    return tuple(mixture.items())


def _parse_weight(dataset_name: str, text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not (weight > 0 and math.isfinite(weight)):
        raise ValueError(
            f"--dataset_name {dataset_name!r}: weight {text!r} is not a positive number"
        )
    return weight


def dataset_dir(data_root_dir: str | Path, name: str) -> Path:
    """Where dataset `name` lies: `<data_root_dir>/<name>/1.0.0`."""
    return Path(data_root_dir) / name / VERSION


def check_mixture(data_root_dir: str | Path, dataset_name: str) -> list[str]:
    """All problems of a mixture's name and of the directories that it needs; empty when it can be read."""
    try:
        mixture = resolve_mixture(dataset_name)
    except ValueError as error:
        return [str(error)]
    problems = [
        p for name, _ in mixture for p in check_dataset_dir(dataset_dir(data_root_dir, name))
    ]
    if problems:
        problems.append(_hint(data_root_dir))
    return problems


def _hint(data_root_dir: str | Path) -> str:
    found = sorted(p.parent.name for p in Path(data_root_dir).glob(f"*/{VERSION}"))
    return f"{data_root_dir} holds {', '.join(found) or 'no datasets'}; mixtures: {', '.join(sorted(MIXTURES))}"


def sampling_probabilities(
    weights: Mapping[str, float], num_transitions: Mapping[str, int]
) -> dict[str, float]:
    """Probability that the next transition comes from each dataset: weight times size, normalised."""
    raw = {name: weight * num_transitions[name] for name, weight in weights.items()}
    total = sum(raw.values())
    return {name: value / total for name, value in raw.items()}
