"""Fixtures that several packages' tests share."""

import os
from pathlib import Path
from typing import Any

import pytest

# Two cores for everything: a test that starts a thread pool on each would only disturb the others.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny policy (28 px, 4 patches, 0.4 M parameters) with statistics for the key `tabletop`."""
    import json

    from prismatic.extern.hf.tiny_prismatic import TinyVLAConfig, save_tiny_vla

    output_dir = tmp_path_factory.mktemp("models") / "tiny"
    vision: dict[str, Any] = {
        "image_size": 28,
        "patch_size": 14,
        "vision_dim": 32,
        "vision_depth": 3,
        "vision_heads": 2,
    }
    llm: dict[str, Any] = {"llm_dim": 64, "llm_depth": 2, "llm_heads": 2, "llm_mlp_dim": 128}
    save_tiny_vla(TinyVLAConfig(seed=0, **vision, **llm), output_dir)
    action = {
        "q01": [-1.0, -0.5, -0.9, 0.0, 0.0, -0.25, 0.0],
        "q99": [1.0, 0.5, 0.3, 0.0, 0.0, 0.25, 1.0],
        "min": [-1.0, -0.6, -1.0, 0.0, 0.0, -0.3, 0.0],
        "max": [1.0, 0.6, 0.4, 0.0, 0.0, 0.3, 1.0],
        "mask": [True] * 6 + [False],
    }
    statistics = {"tabletop": {"action": action, "num_transitions": 100, "num_trajectories": 10}}
    (output_dir / "dataset_statistics.json").write_text(json.dumps(statistics))
    return output_dir
