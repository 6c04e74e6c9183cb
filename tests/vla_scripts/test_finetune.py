"""vla-scripts/finetune.py on a tiny model and a few demonstrations: it learns, and writes what other tools read."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from peft import PeftModel
from safetensors.torch import load_file

from prismatic.extern.hf.modeling_prismatic import load_model
from prismatic.extern.hf.processing_prismatic import load_processor
from prismatic.vla.action_normalization import load_norm_stats
from prismatic.vla.action_tokenizer import ActionTokenizer
from prismatic.vla.datasets.dataset import RLDSDataset, load_specs
from prismatic.vla.datasets.sources import Reading
from tests.distributed import in_ranks
from utils.checkpoint_utils import check_adapter_dir, check_model_dir
from utils.logging_utils import read_metrics
from utils.peft_utils import check_adapter_fits

ROOT = Path(__file__).resolve().parents[2]
SAVE_DTYPES = ("float32", "bfloat16")


def load_script(name: str):
    spec = importlib.util.spec_from_file_location(
        f"{name}_script", ROOT / "vla-scripts" / f"{name}.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[f"{name}_script"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


finetune = load_script("finetune")


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four episodes of two tasks."""
    make_demos = load_script("make_demos")
    root = tmp_path_factory.mktemp("demos")
    make_demos.main(
        make_demos.Args(output_dir=str(root), num_episodes=4, task_ids=(0, 1), image_size=28)
    )
    return root


@pytest.fixture(scope="module", autouse=True)
def process_group():
    """The scripts leave their process group of one behind."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def make_args(model_dir: Path, data_root: Path, output_dir: Path, **options):
    defaults = {
        "max_steps": 3, "log_freq": 1, "save_freq": 0, "per_device_train_batch_size": 16, "learning_rate": 1e-3,
        "image_aug": False, "device": "cpu", "num_threads": 1,
    }  # fmt: skip
    paths = {
        "vla_path": str(model_dir),
        "data_root_dir": str(data_root),
        "output_dir": str(output_dir),
    }
    return finetune.Args(**paths, **{**defaults, **options})


def run(*args, **options) -> Path:
    return finetune.main(make_args(*args, **options))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_model(folder).state_dict()


def test_it_learns_and_writes_a_model_folder(
    tiny_model_dir: Path, data_root: Path, tmp_path: Path
) -> None:
    out = run(
        tiny_model_dir, data_root, tmp_path / "run", max_steps=200, save_freq=100, learning_rate=3e-3,
        warmup_steps=10, lr_scheduler_type="cosine",
    )  # fmt: skip
    metrics = read_metrics(out)
    assert len(metrics) == 200
    assert (
        metrics[-1]["train/action_token_accuracy"]
        > 0.95
        > 0.5
        > metrics[0]["train/action_token_accuracy"]
    )
    assert metrics[-1]["train/action_l1"] < 0.05 < 0.3 < metrics[0]["train/action_l1"]
    assert metrics[-1]["train/loss"] < 0.2 and metrics[0]["train/loss"] > 3
    rates = [m["train/learning_rate"] for m in metrics]
    np.testing.assert_allclose(
        rates[:11], np.linspace(0, 3e-3, 11), atol=1e-9
    )  # counts optimizer steps
    assert rates[-1] < 1e-4
    assert {p.name for p in out.iterdir()} >= {"step_100", "args.json", "log.txt", "metadata.json"}
    assert not list(out.glob(".*"))
    for folder in (out, out / "step_100"):
        assert check_model_dir(folder) == []
    spec = load_specs(data_root, "tabletop")[0]
    assert load_norm_stats(out)["tabletop_no_noops"] == spec.statistics
    assert greedy_accuracy(out, data_root) > 0.9, "the saved model acts as the trained one did"
    assert greedy_accuracy(tiny_model_dir, data_root) < 0.5


def greedy_accuracy(model_dir: Path, data_root: Path) -> float:
    """Share of action tokens that a saved model generates as demonstrated."""
    model, processor = load_model(model_dir), load_processor(model_dir)
    reading = Reading(processor.image_processor.image_size, train=False)
    tokenizer = ActionTokenizer.from_config(model.config)
    samples = list(
        RLDSDataset(load_specs(data_root, "tabletop"), reading, processor.prompt_ids, tokenizer)
    )
    ids, mask = processor.collate_prompts([s["prompt_ids"].tolist() for s in samples])
    images = torch.from_numpy(np.stack([s["image"] for s in samples]))
    tokens = model.generate_actions(
        ids, mask, pixel_values=processor.image_processor.normalize(images)
    )
    return float((tokens.numpy() == np.stack([s["action_ids"] for s in samples])).mean())


def test_gradient_accumulation_equals_one_large_batch(
    tiny_model_dir: Path, data_root: Path, tmp_path: Path
) -> None:
    whole = run(tiny_model_dir, data_root, tmp_path / "whole")
    parts = run(
        tiny_model_dir,
        data_root,
        tmp_path / "parts",
        per_device_train_batch_size=4,
        grad_accumulation_steps=4,
    )
    for a, b in zip(read_metrics(whole), read_metrics(parts), strict=True):
        for name in (
            "train/loss",
            "train/grad_norm",
            "train/action_l1",
            "train/action_token_accuracy",
        ):
            assert a[name] == pytest.approx(b[name], rel=1e-3), name
    first, second = weights(whole), weights(parts)
    # Adam turns rounding of tiny gradients into steps of up to the learning rate; most must agree closely.
    assert max((first[n] - second[n]).abs().mean().item() for n in first) < 1e-5


def test_two_ranks_equal_one(tiny_model_dir: Path, data_root: Path, tmp_path: Path) -> None:
    alone = run(tiny_model_dir, data_root, tmp_path / "alone")
    args = make_args(tiny_model_dir, data_root, tmp_path / "two", per_device_train_batch_size=8)
    in_ranks(2, run_rank_of_script, dataclasses.asdict(args))
    for a, b in zip(read_metrics(alone), read_metrics(tmp_path / "two"), strict=True):
        for name in (
            "train/loss",
            "train/grad_norm",
            "train/action_l1",
            "train/action_token_accuracy",
        ):
            assert a[name] == pytest.approx(b[name], rel=1e-3), name
    first, second = weights(alone), weights(tmp_path / "two")
    assert max((first[n] - second[n]).abs().mean().item() for n in first) < 1e-5


def run_rank_of_script(rank: int, options: dict) -> None:
    script = load_script("finetune")
    script.main(script.Args(**options))


def test_lora_writes_an_adapter_or_the_merged_model(
    tiny_model_dir: Path, data_root: Path, tmp_path: Path
) -> None:
    options = {"use_lora": True, "lora_rank": 4}
    adapter = run(tiny_model_dir, data_root, tmp_path / "adapter", **options)
    assert check_adapter_dir(adapter) == [] and check_adapter_fits(adapter, tiny_model_dir) == []
    assert not (adapter / "model.safetensors").exists()
    assert "tabletop_no_noops" in json.loads((adapter / "dataset_statistics.json").read_text())
    assert "merge.py" in check_model_dir(adapter)[0]

    merged = weights(
        run(tiny_model_dir, data_root, tmp_path / "merged", **options, merge_lora=True)
    )
    wanted = (
        PeftModel.from_pretrained(load_model(tiny_model_dir), str(adapter))
        .merge_and_unload()
        .state_dict()
    )
    base = weights(tiny_model_dir)
    assert set(merged) == set(base)
    for name, tensor in wanted.items():
        assert torch.allclose(merged[name], tensor, atol=1e-6), name
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(merged[name], base[name]), "the adapter has learnt something"


def test_a_frozen_vision_backbone_does_not_change(
    tiny_model_dir: Path, data_root: Path, tmp_path: Path
) -> None:
    before = weights(tiny_model_dir)
    after = weights(
        run(tiny_model_dir, data_root, tmp_path / "frozen", freeze_vision_backbone=True)
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert not [name for name in changed if name.startswith("vision_backbone")]
    assert {"projector.fc1.weight", "language_model.lm_head.weight"} <= changed
    trained = weights(run(tiny_model_dir, data_root, tmp_path / "trained"))
    name = "vision_backbone.featurizer.blocks.0.attn.qkv.weight"
    assert not torch.equal(before[name], trained[name])


def test_a_gradient_that_is_not_finite_stops_before_the_step(
    tiny_model_dir: Path, data_root: Path, tmp_path
) -> None:
    args = make_args(tiny_model_dir, data_root, tmp_path / "inf")
    finetuner = finetune.Finetuner(args, finetune.fsdp_utils.setup_distributed(device_type="cpu"))
    with torch.no_grad():
        finetuner.model.projector.fc1.bias[0] = torch.inf
    before = {n: p.clone() for n, p in finetuner.model.named_parameters()}
    batches = finetuner.batches()
    with pytest.raises(
        FloatingPointError, match="step 7, rank 0: the gradient norm of the model is nan"
    ):
        finetuner.step(batches, 7)
    batches.close()
    assert all(torch.equal(before[n], p) for n, p in finetuner.model.named_parameters())


def test_bfloat16_compute_keeps_float32_master_weights(
    tiny_model_dir: Path, data_root: Path, tmp_path: Path
) -> None:
    out = run(tiny_model_dir, data_root, tmp_path / "bf16", dtype="bfloat16", learning_rate=1e-6)
    exact = run(tiny_model_dir, data_root, tmp_path / "fp32", learning_rate=1e-6)
    losses, wanted = ([m["train/loss"] for m in read_metrics(folder)] for folder in (out, exact))
    assert losses == pytest.approx(wanted, rel=0.02) and losses != wanted, (
        "bfloat16 was really used"
    )
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    before, after = weights(tiny_model_dir)[name], weights(out)[name]
    # Steps of 1e-6 are far below bfloat16's resolution of these weights.
    assert after.dtype == torch.float32 and 0 < (after - before).abs().max() < 1e-5
    assert (after != before).float().mean() > 0.9


def test_action_metrics_by_hand() -> None:
    tokenizer = ActionTokenizer(400)
    labels = torch.tensor([*range(200, 207), 2, *range(300, 307), 2])
    logits = torch.full((16, 464), -5.0)
    logits[:, 0] = 9.0  # not an action: the policy never says it
    for row, label in enumerate(labels.tolist()):
        logits[row, label] = 1.0
    logits[0, 210] = 2.0  # ten bins off
    logits[3, 204] = 2.0  # one bin off
    metrics = finetune.action_metrics(logits, labels, tokenizer)
    assert metrics["num_samples"] == 2
    assert metrics["action_token_accuracy"] == pytest.approx(12 / 7)
    assert metrics["action_l1"] == pytest.approx(11 * 2 / 255 / 7)


def test_an_existing_run_is_kept_unless_overwritten_and_nothing_else_is_ever_removed(
    tiny_model_dir: Path, data_root: Path, tmp_path: Path
) -> None:
    out = run(tiny_model_dir, data_root, tmp_path / "run", max_steps=2, save_freq=1)
    before = (out / "metrics.jsonl").read_text()
    with pytest.raises(
        ValueError, match="already holds a fine-tuning run: choose another --output_dir, or pass"
    ):
        run(tiny_model_dir, data_root, out)
    (out / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match=r"holds thesis.txt, which a fine-tuning run does not"):
        run(tiny_model_dir, data_root, out, overwrite=True)
    for folder in (tiny_model_dir, data_root, data_root.parent):
        with pytest.raises(ValueError, match="is --|contains --"):
            run(tiny_model_dir, data_root, folder, overwrite=True)
    assert (out / "metrics.jsonl").read_text() == before and check_model_dir(tiny_model_dir) == []
    (out / "thesis.txt").unlink()
    run(tiny_model_dir, data_root, out, overwrite=True, max_steps=1)
    assert check_model_dir(out) == [] and not (out / "step_1").exists()


def test_all_problems_are_reported_before_anything_starts(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "BASE_MODEL"})
    )
    with pytest.raises(ValueError) as error:
        run(
            adapter, tmp_path, tmp_path / "out", max_steps=0, learning_rate=float("nan"), lora_dropout=1.0,
            merge_lora=True, use_wandb=True, offload=True, lora_rank=0, cache_gib=-1, seed=-3,
        )  # fmt: skip
    message = str(error.value)
    for part in (
        "--max_steps 0", "--learning_rate nan", "--lora_dropout 1.0", "--merge_lora needs --use_lora",
        "--use_wandb needs --wandb_project", "--offload", "--lora_rank 0", "--cache_gib -1", "--seed -3",
        "merge.py --vla_path BASE_MODEL", "tabletop_no_noops/1.0.0 is not a directory",
    ):  # fmt: skip
        assert part in message
    assert not (tmp_path / "out").exists()
    problems = finetune.validate(
        make_args(tiny_model_dir, tmp_path, tmp_path, dataset_name="bridge_orig")
    )
    assert len(problems) == 1 and "no transform is known for dataset 'bridge_orig'" in problems[0]


def test_default_folders_tell_runs_apart() -> None:
    args = finetune.Args(
        vla_path="models/tiny/",
        run_root_dir="r",
        dataset_name="a:2,b",
        use_lora=True,
        run_id_note="x",
    )
    assert (
        str(finetune.run_dir(args))
        == "r/tiny+a-2+b+b16+lr-0.0005+lora-r32+dropout-0.0--image_aug--x"
    )


def test_a_model_is_written_in_bfloat16_on_request(
    tiny_model_dir: Path, data_root: Path, tmp_path: Path
) -> None:
    exact, rounded = (
        run(tiny_model_dir, data_root, tmp_path / t, max_steps=1, save_dtype=t) for t in SAVE_DTYPES
    )
    for name, tensor in load_file(rounded / "model.safetensors").items():
        assert torch.equal(
            tensor, load_file(exact / "model.safetensors")[name].to(torch.bfloat16)
        ), name
    assert json.loads((rounded / "config.json").read_text())["dtype"] == "bfloat16"
    assert check_model_dir(rounded) == [] and weights(rounded)
    args = make_args(tiny_model_dir, data_root, tmp_path, save_dtype="bfloat16", use_lora=True)
    assert "an adapter is float32" in " ".join(finetune.validate(args))
