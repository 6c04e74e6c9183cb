"""Per-dataset transforms: from the actions a dataset stores to the actions the policy predicts.

T steps of one episode; numpy, so that statistics and tests need no tensorflow.
"""

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np


@dataclass(frozen=True)
class DatasetTransform:
    """How one family of datasets is read.

    Attributes:
        name: part of the statistics' cache key, so that a changed rule gets a new name.
        actions: (T, 7) float32 as stored -> (T, 7) float32 as the policy predicts them, before normalisation.
        action_mask: the dimensions that are normalised.
    """

    name: str
    actions: Callable[[np.ndarray], np.ndarray]
    action_mask: tuple[bool, ...]


def libero_actions(actions_T7: np.ndarray) -> np.ndarray:
    """LIBERO's raw actions with the gripper as OpenVLA has it: -1 (open) .. +1 (close) becomes 1 = open, 0 = closed.

    The gripper is clipped to 0..1 before it is inverted, as in OpenVLA's `libero_dataset_transform`.
    """
    actions = np.array(actions_T7, dtype=np.float32)
    actions[..., -1] = 1.0 - np.clip(actions[..., -1], 0.0, 1.0)
    return actions


LIBERO = DatasetTransform("libero-v1", libero_actions, (True,) * 6 + (False,))

# Dataset name pattern -> transform; the first that matches counts.
_TRANSFORMS: dict[str, DatasetTransform] = {"libero_*": LIBERO, "tabletop*": LIBERO}


def register_transform(pattern: str, transform: DatasetTransform) -> None:
    """Use `transform` for datasets whose name matches the shell pattern; goes before the existing ones."""
    existing = {p: t for p, t in _TRANSFORMS.items() if p != pattern}
    _TRANSFORMS.clear()
    _TRANSFORMS.update({pattern: transform, **existing})


def get_transform(dataset_name: str) -> DatasetTransform:
    """The transform of a dataset.

    Raises ValueError if no pattern matches: guessing a gripper convention would train a policy that never grasps.
    """
    for pattern, transform in _TRANSFORMS.items():
        if fnmatchcase(dataset_name, pattern):
            return transform
    raise ValueError(
        f"no transform is known for dataset {dataset_name!r} (known: {', '.join(_TRANSFORMS)}): name it by one of "
        "these patterns if it follows LIBERO's conventions, or add one with "
        "prismatic.vla.datasets.transforms.register_transform"
    )
