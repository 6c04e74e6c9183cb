"""Whatever loads a model refuses OpenVLA-OFT checkpoints and accepts plain OpenVLA folders."""

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ppo_vllm_ray_fsdp_vla as driver
import run_libero_eval_vllm as evaluation
from prismatic.extern.hf.modeling_prismatic import load_model
from prismatic.extern.hf.oft_checks import oft_files
from prismatic.extern.hf.processing_prismatic import load_processor
from tests.test_malformed_files import adapter
from utils.checkpoint_utils import check_adapter_dir, check_model_dir

ROOT = Path(__file__).resolve().parents[2]
OFT_CODE = "from constants import NUM_ACTIONS_CHUNK\nclass OpenVLAForActionPrediction: ...\n"
PLAIN_CODE = "class OpenVLAForActionPrediction:\n    def predict_action(self, input_ids): ...\n"


def load_script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(
        f"{name}_oft", ROOT / "vla-scripts" / f"{name}.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[f"{name}_oft"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def model_dir(tiny_model_dir: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_model_dir, tmp_path / "model")


def edit_config(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def add_network(folder: Path, name: str) -> None:
    torch.save({"fc1.weight": torch.zeros(2, 2)}, folder / name)


def add_l1_networks(folder: Path) -> None:
    """What OFT's fine-tuning adds for LIBERO, under the names of the published checkpoints."""
    add_network(folder, "action_head--150000_checkpoint.pt")
    add_network(folder, "proprio_projector--150000_checkpoint.pt")
    (folder / "lora_adapter").mkdir()


def add_adapter_folder(folder: Path) -> None:
    (folder / "lora_adapter").mkdir()


# The sign in the message -> what puts it into a folder.
SIGNS: dict[str, Callable[[Path], Any]] = {
    "action_head--150000_checkpoint.pt, proprio_projector--150000_checkpoint.pt, lora_adapter/": add_l1_networks,
    "action_head--latest_checkpoint.pt": lambda f: add_network(f, "action_head--latest_checkpoint.pt"),
    "noisy_action_projector--5_checkpoint.pt": lambda f: add_network(f, "noisy_action_projector--5_checkpoint.pt"),
    "vision_backbone--5_checkpoint.pt": lambda f: add_network(f, "vision_backbone--5_checkpoint.pt"),
    "use_l1_regression true in config.json": lambda f: edit_config(f, use_l1_regression=True),
    "use_diffusion true in config.json": lambda f: edit_config(f, use_diffusion=True),
    "use_proprio true in config.json": lambda f: edit_config(f, use_proprio=True, proprio_dim=8),
    "use_film true in config.json": lambda f: edit_config(f, use_film=True),
    "num_images_in_input 2 in config.json": lambda f: edit_config(f, num_images_in_input=2),
    "num_action_chunks 8 in config.json": lambda f: edit_config(f, num_action_chunks=8),
    "num_actions_chunk 8 in config.json": lambda f: edit_config(f, num_actions_chunk=8),
    "chunk 8 in config.json": lambda f: edit_config(f, chunk=8),
    "model_type openvla_oft in config.json": lambda f: edit_config(f, model_type="openvla_oft"),
    "architectures OpenVLAOFTForRLActionPrediction in config.json": lambda f: edit_config(
        f, architectures=["OpenVLAOFTForRLActionPrediction"]
    ),
    "modeling_prismatic.py": lambda f: (f / "modeling_prismatic.py").write_text(OFT_CODE),
    "lora_adapter/": add_adapter_folder,
}  # fmt: skip


@pytest.mark.parametrize("sign", SIGNS)
def test_an_oft_folder_is_refused_with_what_was_recognised(model_dir: Path, sign: str) -> None:
    assert check_model_dir(model_dir) == []
    SIGNS[sign](model_dir)
    (problem,) = check_model_dir(model_dir)
    assert problem.startswith(f"{model_dir} ") and f"recognised by {sign}" in problem
    assert "OpenVLA-OFT checkpoint, which is not supported yet" in problem
    for load in (load_model, load_processor):
        with pytest.raises(ValueError) as error:
            load(model_dir)
        assert str(error.value) == problem


@pytest.mark.parametrize("sign", ["modeling_prismatic.py", "lora_adapter/"])
def test_what_may_lie_beside_a_plain_openvla_can_be_moved_away(model_dir: Path, sign: str) -> None:
    SIGNS[sign](model_dir)
    (problem,) = check_model_dir(model_dir)
    assert f"If the weights are those of a plain OpenVLA, move {sign} out of the folder" in problem
    (model_dir / sign).rename(model_dir.parent / "elsewhere")
    assert check_model_dir(model_dir) == []
    load_model(model_dir)


def test_an_oft_checkpoint_that_is_not_merged_yet_is_recognised(model_dir: Path) -> None:
    """Unless OFT merges while it trains, it saves the adapter, the networks and the processor."""
    (model_dir / "model.safetensors").unlink()
    (model_dir / "config.json").unlink()
    add_l1_networks(model_dir)
    (problem,) = check_model_dir(model_dir)
    assert "recognised by action_head--150000_checkpoint.pt" in problem


def test_every_program_that_loads_a_model_refuses_an_oft_folder(
    model_dir: Path, tmp_path: Path
) -> None:
    add_l1_networks(model_dir)
    plain = shutil.copytree(model_dir, tmp_path / "plain", ignore=shutil.ignore_patterns("*.pt"))
    (plain / "lora_adapter").rmdir()
    adapter_dir = adapter(plain, tmp_path / "adapter")
    finetune, merge = load_script("finetune"), load_script("merge")

    def drive() -> None:
        args = driver.Args(vla_path=str(model_dir), task_suite_name="tabletop")
        driver.check_files(args, tmp_path / "run")

    def evaluate() -> None:
        args = evaluation.Args(pretrained_checkpoint=model_dir, task_suite_name="tabletop")
        raise ValueError("\n".join(evaluation.find_problems(args)))

    def tune() -> None:
        args = finetune.Args(vla_path=str(model_dir), data_root_dir=str(tmp_path))
        raise ValueError("\n".join(finetune.check_files(args)))

    def merge_adapter() -> None:
        merge.validate(merge.Args(model_dir, adapter_dir, tmp_path / "merged"))

    for program in (drive, evaluate, tune, merge_adapter):
        with pytest.raises(ValueError, match=r"is an OpenVLA-OFT checkpoint.*action_head--150000"):
            program()


@pytest.mark.parametrize("is_merged", [True, False])
def test_the_adapter_inside_an_oft_checkpoint_is_not_merged_into_a_plain_model(
    tiny_model_dir: Path, tmp_path: Path, is_merged: bool
) -> None:
    checkpoint = tmp_path / "run--150000_chkpt"
    if is_merged:
        shutil.copytree(tiny_model_dir, checkpoint)
    adapter_dir = adapter(tiny_model_dir, checkpoint / "lora_adapter")
    (checkpoint / "dataset_statistics.json").write_text("{}")
    (problem,) = check_adapter_dir(adapter_dir)
    assert "is the adapter of an OpenVLA-OFT checkpoint" in problem
    assert f"recognised by dataset_statistics.json in {checkpoint}" in problem
    add_network(checkpoint, "action_head--150000_checkpoint.pt")
    link = tmp_path / "link"
    link.symlink_to(adapter_dir)
    for path in (adapter_dir, link):
        (problem,) = check_adapter_dir(path)
        assert "action_head--150000_checkpoint.pt" in problem
    merge = load_script("merge")
    with pytest.raises(ValueError, match="OpenVLA-OFT"):
        merge.validate(merge.Args(tiny_model_dir, adapter_dir, tmp_path / "merged"))
    moved = adapter_dir.rename(tmp_path / "adapter")
    assert check_adapter_dir(moved) == []


def test_plain_openvla_folders_are_accepted(model_dir: Path) -> None:
    """Files that OpenVLA's fine-tuning and its users leave, and OFT's fields with plain values."""
    for name in ("configuration_prismatic.py", "modeling_prismatic.py", "processing_prismatic.py"):
        (model_dir / name).write_text(PLAIN_CODE)
    (model_dir / "README.md").write_text("OpenVLA-OFT sets NUM_ACTIONS_CHUNK; this is OpenVLA.\n")
    (model_dir / "generation_config.json").write_text('{"pad_token_id": 400}\n')
    (model_dir / "modeling_prismatic.py.back.20251128_120000").write_text(OFT_CODE)
    (model_dir / "training_args.bin").write_bytes(b"\x80")
    (model_dir / "checkpoint-1000").mkdir()
    edit_config(
        model_dir,
        auto_map={"AutoModelForVision2Seq": "modeling_prismatic.OpenVLAForActionPrediction"},
        use_l1_regression=False, use_diffusion=False, use_proprio=False, use_film=None, proprio_dim=7,
        num_images_in_input=1, num_action_chunks=1, chunk_size="8",
    )  # fmt: skip
    assert check_model_dir(model_dir) == []
    load_model(model_dir)


def test_our_own_folders_are_accepted(tiny_model_dir: Path, tmp_path: Path) -> None:
    assert check_model_dir(ROOT / "assets" / "tabletop-base") == []
    # An adapter of ours may have any name, also in a folder with other models.
    run = tmp_path / "runs" / "ppo"
    shutil.copytree(tiny_model_dir, run / "step_10")
    assert check_adapter_dir(adapter(tiny_model_dir, run / "lora_adapter")) == []
    assert check_adapter_dir(adapter(tiny_model_dir, run / "step_10" / "adapter")) == []


def test_names_alone_tell_an_oft_repository() -> None:
    names = ["config.json", "lora_adapter/adapter_config.json", "model.safetensors", "vision_backbone.py"]  # fmt: skip
    assert oft_files(names) == []
    added = ["action_head--50000_checkpoint.pt", "proprio_projector--50000_checkpoint.pt"]
    assert oft_files([*names, *reversed(added)]) == added
