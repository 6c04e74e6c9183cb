"""Thousands of damaged folders: each is refused with an error that names a file, or loads what the original holds.

`tests/malformed.py` does the damage in a process of its own, so that a crash or a hang of a parser in C is seen. A
folder from elsewhere has no checksums: there a change that leaves a well-formed file (another number in a JSON file, a
flipped bit in a weight) cannot be told from another model, and loads as such. With checksums nothing such passes but a
record that was rewritten with its CRC: shards may have many gigabytes, and are not hashed at every start.
"""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prismatic.extern.hf.modeling_prismatic import load_model
from prismatic.extern.hf.tiny_prismatic import TinyVLAConfig, save_tiny_vla
from prismatic.model_files import write_checksums
from prismatic.vla.datasets.writer import Demonstration, write_dataset
from utils import checkpoint_utils, peft_utils

ROOT = Path(__file__).parents[1]
# Damage to weights and records after which the file can be well-formed: of the data, or with a right CRC.
BLIND = ("damage_bytes: flip", "damage_bytes: zero", "damage_records: protobuf")
REWRITTEN = "damage_records: protobuf"
DATASET = "tabletop_no_noops"


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest model: what is checked does not depend on the size, how long it takes does."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    vision: dict[str, Any] = {
        "image_size": 28,
        "vision_dim": 16,
        "vision_depth": 2,
        "vision_heads": 2,
    }
    llm: dict[str, Any] = {"llm_dim": 16, "llm_depth": 1, "llm_heads": 2, "llm_mlp_dim": 16}
    save_tiny_vla(TinyVLAConfig(seed=0, **vision, **llm), folder)
    action = {
        "q01": [-1.0] * 7,
        "q99": [1.0] * 7,
        "min": [-1.0] * 7,
        "max": [1.0] * 7,
        "mask": [True] * 6 + [False],
    }
    (folder / "dataset_statistics.json").write_text(json.dumps({"tabletop": {"action": action}}))
    return folder


def sharded_model(tiny_dir: Path, folder: Path) -> Path:
    """The model in shards with an index, as openvla-7b has it."""
    state = load_model(tiny_dir).state_dict()
    shutil.copytree(tiny_dir, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    checkpoint_utils.save_weights(folder, state, max_shard_size="40KB")
    return folder


def adapter(tiny_dir: Path, folder: Path) -> Path:
    """An adapter whose B is not 0, beside its base."""
    base = shutil.copytree(tiny_dir, folder.parent / "base")
    model = load_model(base)
    wrapper = peft_utils.add_lora(model, rank=2, base_name=str(base))
    generator = torch.Generator().manual_seed(0)
    state = {
        n: torch.randn(p.shape, generator=generator)
        for n, p in model.named_parameters()
        if p.requires_grad
    }
    folder.mkdir()
    peft_utils.save_adapter(wrapper, state, folder)
    return folder


def rlds(root: Path) -> Path:
    """Three episodes in two shards."""
    folder = root / DATASET / "1.0.0"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    demos = [
        Demonstration(
            [rng.integers(0, 256, (16, 16, 3), dtype=np.uint8) for _ in range(3)],
            rng.uniform(-1, 1, (3, 7)).astype(np.float32),
            *(rng.normal(size=(3, size)).astype(np.float32) for size in (8, 7)),
            np.eye(3, dtype=np.float32)[-1],
            f"push number {episode}",
            f"file {episode}",
        )
        for episode in range(3)
    ]
    write_dataset(
        folder,
        DATASET,
        demos,
        image_size=16,
        image_format="png",
        description="test",
        episodes_per_shard=2,
    )
    return folder


def start_damage(jobs: list[dict[str, Any]]) -> subprocess.Popen[str]:
    """Start a process that runs the jobs one after the other."""
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TRANSFORMERS_VERBOSITY": "error"}
    words = [sys.executable, "-m", "tests.malformed", json.dumps(jobs)]
    return subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env
    )


def finish_damage(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    """Wait for it; returns folder, file, what was done and outcome of each case."""
    output, _ = process.communicate()
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert process.returncode == 0, f"the process ended ({process.returncode}) at {lines[-1:]}"
    return [begun | ended for begun, ended in zip(lines[::2], lines[1::2], strict=True)]


def faults_of(cases: list[dict[str, Any]], *, checksums: bool) -> list[dict[str, Any]]:
    """Cases with another outcome than those that are allowed."""
    allowed = {"refused", "same"}
    return [
        case
        for case in cases
        if case["outcome"] not in allowed
        and not (case["outcome"] == "different" and is_blind(case, checksums))
    ]


def is_blind(case: dict[str, Any], checksums: bool) -> bool:
    """Whether the damage can leave a well-formed file, so that nothing but a checksum shows it."""
    if checksums:
        return case["what"].startswith(REWRITTEN)
    is_plain_json = case["file"].endswith(".json") and not case["file"].endswith(".index.json")
    return is_plain_json or case["what"].startswith(BLIND)


def damaged_folder(kind: str, tiny_dir: Path, tmp_path: Path, *, checksums: bool) -> Path:
    """The folder to damage: a model, a sharded model, an adapter or a dataset."""
    if kind == "rlds":
        folder = rlds(tmp_path)
    elif kind == "adapter":
        folder = adapter(tiny_dir, tmp_path / "adapter")
    elif kind == "sharded":
        folder = sharded_model(tiny_dir, tmp_path / "model")
    else:
        folder = shutil.copytree(tiny_dir, tmp_path / "model")
    if checksums:
        write_checksums(folder)
    return folder


# Kind, whether the folder has checksums, cases in the default suite: 400 in all.
CASES = [
    ("model", False, 52), ("sharded", False, 28), ("adapter", False, 40), ("rlds", False, 50),
    ("model", True, 70), ("sharded", True, 40), ("adapter", True, 60), ("rlds", True, 60),
]  # fmt: skip


def check_all(tiny_dir: Path, tmp_path: Path, seed: int, times: int) -> None:
    """Damage every kind of folder `times` as often as CASES says, and judge each case."""
    jobs = []
    for kind, checksums, cases in CASES:
        root = tmp_path / f"{kind}-{checksums}"
        root.mkdir()
        folder = damaged_folder(kind, tiny_dir, root, checksums=checksums)
        kind = {"sharded": "model"}.get(kind, kind)
        jobs.append({"kind": kind, "folder": str(folder), "seed": seed, "cases": cases * times})
    processes = [
        start_damage([job for job in jobs if (job["kind"] == "rlds") is of_data])
        for of_data in (False, True)
    ]
    found = [case for process in processes for case in finish_damage(process)]
    assert len(found) == times * sum(cases for _, _, cases in CASES)
    for job, (kind, checksums, cases) in zip(jobs, CASES, strict=True):
        of_job = [case for case in found if case["folder"] == job["folder"]]
        faults = faults_of(of_job, checksums=checksums)
        assert not faults, f"{kind}, checksums {checksums}: {json.dumps(faults[:5], indent=1)}"
        refused = Counter(case["outcome"] for case in of_job)["refused"]
        assert refused > 0.5 * cases * times, "too few cases do damage"


@pytest.mark.timeout(900)
def test_damaged_folders_are_refused_by_name_or_load_the_same(tiny_dir, tmp_path):
    check_all(tiny_dir, tmp_path, seed=0, times=1)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_more_damaged_folders(tiny_dir, tmp_path):
    check_all(tiny_dir, tmp_path, seed=1, times=30)
