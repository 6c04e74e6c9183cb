"""Recognise OpenVLA-OFT checkpoints, which have OpenVLA's tensor names and work in another way.

OFT predicts a chunk of actions in one pass, with bidirectional attention. Its published checkpoints
compute actions with a separate network (the action head) and were never trained to predict action
tokens: read as a plain OpenVLA, they load without an error and solve nothing.
Source: moojink/openvla-oft, vla-scripts/finetune.py.
"""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from prismatic.model_files import is_int, read_json_object

ADAPTER_FOLDER = "lora_adapter"
STATISTICS_NAME = "dataset_statistics.json"
# Networks that OFT saves beside the weights, as NETWORK--STEP_checkpoint.pt or
# NETWORK--latest_checkpoint.pt. It saves the vision backbone where FiLM layers condition it on the
# instruction.
_NETWORK_FILE = re.compile(
    r"(?:action_head|proprio_projector|noisy_action_projector|vision_backbone)--.*checkpoint.*\.\w+"
)
# Fields of config.json that OFT and the RL codes built on it (SimpleVLA-RL, RLinf) write. The names
# without `use_` are numbers, and 1 means plain OpenVLA.
_SWITCHES = ("use_l1_regression", "use_diffusion", "use_proprio", "use_film")
_COUNTS = (
    "num_images_in_input",
    "num_actions_chunk",
    "num_action_chunks",
    "action_chunk_size",
    "chunk_size",
    "chunk",
)
_MODEL_TYPES = ("openvla_oft", "openvla-oft", "openvlaoft")
# In OFT's modeling_prismatic.py and not in OpenVLA's.
_CODE_MARKERS = (b"NUM_ACTIONS_CHUNK", b"num_images_in_input")
_CODE_FILE = re.compile(r"modeling\w*\.py")
# OFT's has 50 KB.
_MAX_CODE_BYTES = 4 << 20


def oft_files(names: Iterable[str]) -> list[str]:
    """The names among a folder's files that only OpenVLA-OFT's checkpoints have: its additional networks."""
    return sorted(name for name in names if _NETWORK_FILE.fullmatch(name))


def oft_fields(config: Mapping[str, Any]) -> list[str]:
    """What in config.json's fields says OpenVLA-OFT, as `use_proprio true`."""
    found = []
    model_type, architectures = config.get("model_type"), config.get("architectures")
    if model_type in _MODEL_TYPES:
        found.append(f"model_type {model_type}")
    for name in architectures if isinstance(architectures, list) else []:
        if isinstance(name, str) and "OpenVLAOFT" in name:
            found.append(f"architectures {name[:80]}")
    found += [f"{name} true" for name in _SWITCHES if config.get(name) is True]
    found += [f"{name} {config[name]}" for name in _COUNTS if is_int(config.get(name), 2, 1 << 30)]
    return found


def oft_problems(model_dir: str | Path, config: Mapping[str, Any] | None = None) -> list[str]:
    """Why a model folder is taken for an OpenVLA-OFT checkpoint, as one message; empty if it is not.

    `config`: the fields of config.json if they are known already. Files and fields that only OFT
    has are certain signs. OFT's modelling code and a `lora_adapter` folder may lie beside a plain
    OpenVLA too (OFT copies the code into the folder that it starts from), so the message then says
    what to do. No code is run and no .pt file is read.
    """
    folder = Path(model_dir)
    if config is None:
        try:
            config = read_json_object(folder / "config.json")
        except (OSError, ValueError):
            config = {}  # another check reports that
    names = os.listdir(folder)
    fields = [f"{field} in config.json" for field in oft_fields(config)]
    certain = oft_files(names) + fields
    uncertain = [name for name in sorted(names) if _is_oft_code(folder / name)]
    if (folder / ADAPTER_FOLDER).is_dir():
        uncertain.append(f"{ADAPTER_FOLDER}/")
    if certain:
        return [
            f"{folder} is an OpenVLA-OFT checkpoint, which is not supported yet. It was recognised "
            f"by {', '.join(certain + uncertain)}. Read as a plain OpenVLA, its actions would be "
            "meaningless: give a plain OpenVLA checkpoint"
        ]
    if uncertain:
        return [
            f"{folder} looks like an OpenVLA-OFT checkpoint, which is not supported yet. It was "
            f"recognised by {', '.join(uncertain)}. If the weights are those of a plain OpenVLA, "
            f"move {' and '.join(uncertain)} out of the folder; otherwise give a plain OpenVLA "
            "checkpoint"
        ]
    return []


def oft_adapter_problems(adapter_dir: str | Path) -> list[str]:
    """Why an adapter is taken for that of an OpenVLA-OFT checkpoint, as one message; else empty.

    OFT writes the adapter as CHECKPOINT/lora_adapter, with the other networks and the statistics in
    CHECKPOINT. Merged into a plain OpenVLA, it gives a folder that looks like a plain OpenVLA.
    """
    # As it is written and with its links followed: either may lead into a checkpoint.
    for adapter in (Path(os.path.abspath(adapter_dir)), Path(adapter_dir).resolve()):
        for folder in (adapter, adapter.parent):
            names = _readable_names(folder)
            found = oft_files(names)
            if folder != adapter and adapter.name == ADAPTER_FOLDER and STATISTICS_NAME in names:
                found.append(STATISTICS_NAME)
            if found:
                return [
                    f"{adapter_dir} is the adapter of an OpenVLA-OFT checkpoint, which is not "
                    f"supported yet. It was recognised by {', '.join(found)} in {folder}. Merged "
                    "into a plain OpenVLA, its actions would be meaningless; if it was trained as "
                    "a plain OpenVLA, move it to another folder"
                ]
    return []


def _readable_names(folder: Path) -> list[str]:
    """The names in a folder; none if this user may not list it."""
    try:
        return os.listdir(folder)
    except PermissionError:
        return []


def _is_oft_code(file: Path) -> bool:
    """Whether a file is OFT's modelling code. It is searched for two names, nothing more."""
    if not _CODE_FILE.fullmatch(file.name) or not file.is_file():
        return False
    with file.open("rb") as data:
        content = data.read(_MAX_CODE_BYTES)
    return any(marker in content for marker in _CODE_MARKERS)
