"""vla-scripts/merge.py against peft's own merge, on a tiny model and on plain safetensors folders."""

import dataclasses
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from prismatic.extern.hf.modeling_prismatic import load_model
from tests.adapters import CONVOLUTIONS, save_official_adapter
from utils import merge_utils, peft_utils, progress
from utils.checkpoint_utils import INDEX_NAME, WEIGHTS_NAME, check_model_dir

ROOT = Path(__file__).resolve().parents[2]
ATTENTION = "language_model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def merge_script():
    spec = importlib.util.spec_from_file_location("merge_script", ROOT / "vla-scripts" / "merge.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["merge_script"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def linear_names(model):
    return [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]


def make_adapter(base_dir, adapter_dir, **options):
    """Save a random adapter for `base_dir`; return peft's own merged state dict, in float32."""
    torch.manual_seed(1)
    base = load_model(base_dir)
    config = LoraConfig(
        **({"r": 4, "lora_alpha": 8, "target_modules": linear_names(base)} | options)
    )
    wrapper = get_peft_model(base, config)
    for name, parameter in wrapper.named_parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.05) if "lora_" in name else parameter.data.add_(0.1)
    wrapper.save_pretrained(str(adapter_dir))
    return {
        name: tensor.clone() for name, tensor in wrapper.merge_and_unload().state_dict().items()
    }


def read_weights(folder):
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def shard(model_dir, output_dir, num_shards=3):
    """Copy of a model folder with its weights split over several files with an index."""
    shutil.copytree(model_dir, output_dir)
    weights = load_file(output_dir / WEIGHTS_NAME)
    (output_dir / WEIGHTS_NAME).unlink()
    names = sorted(weights)
    weight_map = {}
    for i in range(num_shards):
        file = f"model-{i + 1:05d}-of-{num_shards:05d}.safetensors"
        part = {name: weights[name] for name in names[i::num_shards]}
        save_file(part, output_dir / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (output_dir / INDEX_NAME).write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
    )
    return output_dir


@pytest.fixture(scope="module")
def adapter(tiny_model_dir, tmp_path_factory):
    """(adapter folder, peft's merged weights) for the tiny model: every linear layer, lm_head too."""
    folder = tmp_path_factory.mktemp("adapter")
    return folder, make_adapter(tiny_model_dir, folder)


def names_in_checkpoint(state, model_dir):
    """State dict keys renamed as the checkpoint has them (timm's gamma is stored as scale_factor)."""
    stored = read_weights(model_dir)
    renamed = {
        n if n in stored else n.replace(".gamma", ".scale_factor"): t for n, t in state.items()
    }
    assert set(stored) <= set(renamed)
    return {name: renamed[name] for name in stored}


def assert_equals_peft(output_dir, expected, model_dir, atol=2e-6):
    merged, expected = read_weights(output_dir), names_in_checkpoint(expected, model_dir)
    assert set(merged) == set(expected)
    for name in expected:
        torch.testing.assert_close(
            merged[name].float(), expected[name].float(), rtol=0, atol=atol, msg=name
        )


def test_merge_equals_peft_and_folder_is_complete(merge_script, tiny_model_dir, adapter, tmp_path):
    folder, expected = adapter
    out = tmp_path / "merged"
    metadata = merge_script.merge(merge_script.Args(tiny_model_dir, folder, out))
    assert_equals_peft(out, expected, tiny_model_dir)
    base = read_weights(tiny_model_dir)
    changed = {n for n, t in read_weights(out).items() if not torch.equal(t, base[n])}
    assert changed == {f"{name}.weight" for name in linear_names(load_model(tiny_model_dir))}
    assert check_model_dir(out) == []
    added = {"merge_metadata.json", "checksums.json"}
    assert {p.name for p in tiny_model_dir.iterdir()} | added == {p.name for p in out.iterdir()}
    assert json.loads((out / "merge_metadata.json").read_text()) == metadata
    assert metadata["base"] == str(tiny_model_dir) and metadata["adapter"] == str(folder)
    assert metadata["checks"]["logits"]["max_difference"] < 1e-4 and metadata["dtype"] == "float32"
    assert [p.name for p in tmp_path.iterdir()] == ["merged"]  # no temporary sibling is left


def test_merge_patterns_rslora_saved_modules_and_biases(merge_script, tiny_model_dir, tmp_path):
    expected = make_adapter(
        tiny_model_dir,
        tmp_path / "adapter",
        use_rslora=True,
        rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.up_proj": 3},
        alpha_pattern={"v_proj": 32},
        target_modules=["q_proj", "v_proj", "up_proj"],
        modules_to_save=["projector.fc1"],
        bias="lora_only",
    )
    merge_script.merge(merge_script.Args(tiny_model_dir, tmp_path / "adapter", tmp_path / "merged"))
    assert_equals_peft(tmp_path / "merged", expected, tiny_model_dir)
    base, merged = read_weights(tiny_model_dir), read_weights(tmp_path / "merged")
    assert not torch.equal(base["projector.fc1.bias"], merged["projector.fc1.bias"])


def test_trained_biases_are_merged(merge_script, tiny_model_dir, tmp_path):
    expected = make_adapter(
        tiny_model_dir, tmp_path / "adapter", target_modules=["fc1", "fc2"], bias="all"
    )
    merge_script.merge(merge_script.Args(tiny_model_dir, tmp_path / "adapter", tmp_path / "merged"))
    assert_equals_peft(tmp_path / "merged", expected, tiny_model_dir)
    name = "projector.fc3.bias"
    assert not torch.equal(
        read_weights(tiny_model_dir)[name], read_weights(tmp_path / "merged")[name]
    )


def test_shards_and_index_are_kept(merge_script, tiny_model_dir, adapter, tmp_path):
    folder, expected = adapter
    base = shard(tiny_model_dir, tmp_path / "base")
    merge_script.merge(merge_script.Args(base, folder, tmp_path / "merged"))
    assert_equals_peft(tmp_path / "merged", expected, base)
    before, after = (json.loads((d / INDEX_NAME).read_text()) for d in (base, tmp_path / "merged"))
    assert after["weight_map"] == before["weight_map"]
    assert after["metadata"]["total_size"] == sum(
        t.nbytes for t in read_weights(tmp_path / "merged").values()
    )
    for file in (tmp_path / "merged").glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            assert {after["weight_map"][name] for name in tensors.keys()} == {file.name}  # noqa: SIM118


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes(merge_script, tiny_model_dir, adapter, tmp_path, dtype):
    folder, expected = adapter
    metadata = merge_script.merge(
        merge_script.Args(tiny_model_dir, folder, tmp_path / "merged", dtype=dtype)
    )
    merged, wanted = (
        read_weights(tmp_path / "merged"),
        names_in_checkpoint(expected, tiny_model_dir),
    )
    assert {t.dtype for t in merged.values()} == {getattr(torch, dtype)}
    # The sum is rounded once, at the end: within half a unit in the last place of peft's float32 merge.
    half_ulp = torch.finfo(getattr(torch, dtype)).eps / 2
    assert all(
        (merged[n].float() - wanted[n]).abs().le(1.01 * half_ulp * wanted[n].abs() + 1e-6).all()
        for n in wanted
    )
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert dtype in (config.get("dtype"), config.get("torch_dtype"))
    logits = metadata["checks"]["logits"]
    # What is judged leaves out what the rounding of the weights does to the logits.
    assert logits["max_difference"] <= 1e-5 < 1e-4 < logits["rounding_difference"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_adapters_of_the_official_recipe_are_merged_as_peft_does(
    merge_script, tiny_model_dir, tmp_path, dtype
):
    """LoRA on the convolutions of the ViTs, on lm_head, and a copy of lm_head among the tensors."""
    expected = save_official_adapter(tiny_model_dir, tmp_path / "adapter")
    out = tmp_path / "merged"
    metadata = merge_script.merge(
        merge_script.Args(tiny_model_dir, tmp_path / "adapter", out, dtype=dtype)
    )
    rounded = {n: t.to(getattr(torch, dtype)).float() for n, t in expected.items()}
    assert_equals_peft(out, rounded, tiny_model_dir, atol=1e-6)
    base, merged = read_weights(tiny_model_dir), read_weights(out)
    for name in (*CONVOLUTIONS, "language_model.lm_head"):
        assert (merged[f"{name}.weight"].float() - base[f"{name}.weight"]).abs().max() > 0.01
    assert metadata["num_merged_matrices"] == len(linear_names(load_model(tiny_model_dir))) + 2
    assert metadata["checks"]["logits"]["max_difference"] < 1e-5


def small_adapter(folder, base_dtype, weight=None, times_weight=1e-3):
    """A folder with one matrix and a convolution, and an adapter whose change is `times_weight` of them (RMS)."""
    base_dir, adapter_dir = folder / "base", folder / "adapter"
    base_dir.mkdir()
    adapter_dir.mkdir()
    torch.manual_seed(0)
    weights, factors = {}, {}
    for name, shape in {"fc": (96, 200), "proj": (64, 3, 7, 7)}.items():
        weights[name] = torch.randn(shape) * 0.02 if weight is None else torch.full(shape, weight)
        down, up = torch.randn(4, *shape[1:]), torch.randn(shape[0], 4, *(1 for _ in shape[2:]))
        delta = up.flatten(1) @ down.flatten(1)
        up *= times_weight * weights[name].square().mean().sqrt() / delta.square().mean().sqrt()
        factors[f"base_model.model.{name}.lora_A.weight"] = down
        factors[f"base_model.model.{name}.lora_B.weight"] = up
    save_file(
        {f"{n}.weight": t.to(base_dtype) for n, t in weights.items()}, base_dir / WEIGHTS_NAME
    )
    save_file(factors, adapter_dir / "adapter_model.safetensors")
    LoraConfig(r=4, lora_alpha=4, target_modules=["fc", "proj"]).save_pretrained(str(adapter_dir))
    return base_dir, merge_utils.load_adapter(adapter_dir)


def check_scaled(folder, base_dtype, dtype, factor, **options):
    """Problems and counts of the check of a merge that adds the adapter `factor` times."""
    base_dir, adapter = small_adapter(folder, base_dtype, **options)
    scaling = {name: factor * value for name, value in adapter.scaling.items()}
    (folder / "merged").mkdir()
    wrong = dataclasses.replace(adapter, scaling=scaling)
    merge_utils.merge_weights(base_dir, wrong, folder / "merged", dtype)
    return merge_utils.check_merged_weights(base_dir, adapter, folder / "merged", dtype)


TYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", TYPES)
def test_a_right_merge_of_a_small_adapter_passes(tmp_path, base_dtype, dtype):
    problems, counts = check_scaled(tmp_path, base_dtype, dtype, 1.0)
    assert problems == []
    num_values = 96 * 200 + 64 * 3 * 7 * 7
    assert counts["num_values"] == num_values
    # In float32 the sum itself is off by a unit in the last place now and then.
    most = 0.5 if dtype == torch.float32 else 1e-3
    assert counts["num_within_sum_error"] < most * num_values


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("factor", "how"), [(0, "omitted"), (2, "doubled"), (0.5, "half")])
def test_a_wrong_merge_of_a_small_adapter_is_found_in_every_type(
    tmp_path, base_dtype, dtype, factor, how
):
    """The adapter changes the weights by 0.1 %, less than half a unit in bfloat16's last place (0.2 to 0.4 %)."""
    problems, _ = check_scaled(tmp_path, base_dtype, dtype, factor)
    assert [problem.partition(":")[0] for problem in problems] == ["fc.weight", "proj.weight"]
    for problem in problems:
        assert "are not base + adapter" in problem
        assert ("the adapter is not in them" in problem) == (how == "omitted")


def test_an_adapter_that_rounds_away_everywhere_cannot_be_missed(tmp_path):
    """In bfloat16 1.001 is 1: with or without the adapter the merged folder is the same."""
    options = {"weight": 1.0, "times_weight": 2e-4}
    assert check_scaled(tmp_path, torch.bfloat16, torch.bfloat16, 0.0, **options)[0] == []


def test_weights_beyond_the_range_of_float16_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match="fc.weight .* overflows torch.float16: use --dtype float32"
    ):
        check_scaled(tmp_path, torch.float32, torch.float16, 1.0, weight=1e5)


def corrupt(folder, name):
    file = next(f for f in folder.glob("*.safetensors") if name in load_file(f))
    weights = load_file(file)
    weights[name] = weights[name].clone()
    weights[name][0, 0] += 0.05
    save_file(weights, file, metadata={"format": "pt"})


def corrupting(merge_script, monkeypatch, name):
    """Let the script damage one value of one matrix after it has written the weights."""
    merge_weights = merge_script.merge_weights

    def damaged(base_dir, adapter, output_dir, dtype, on_tensor):
        num_tensors = merge_weights(base_dir, adapter, output_dir, dtype, on_tensor)
        corrupt(output_dir, name)
        return num_tensors

    monkeypatch.setattr(merge_script, "merge_weights", damaged)


@pytest.mark.parametrize(
    "name", [f"{ATTENTION}.weight", "language_model.model.embed_tokens.weight"]
)
def test_corrupted_matrix_fails_the_weight_check(
    merge_script, tiny_model_dir, adapter, tmp_path, monkeypatch, name
):
    corrupting(merge_script, monkeypatch, name)
    args = merge_script.Args(tiny_model_dir, adapter[0], tmp_path / "merged", check="weights")
    with pytest.raises(RuntimeError, match=name):
        merge_script.merge(args)
    assert list(tmp_path.iterdir()) == []


def test_corrupted_matrix_fails_the_logits_check(
    merge_script, tiny_model_dir, adapter, tmp_path, monkeypatch
):
    corrupting(merge_script, monkeypatch, f"{ATTENTION}.weight")
    monkeypatch.setattr(merge_script, "check_merged_weights", lambda *_: ([], {}))
    with pytest.raises(RuntimeError, match="logits differ"):
        merge_script.merge(merge_script.Args(tiny_model_dir, adapter[0], tmp_path / "merged"))
    assert list(tmp_path.iterdir()) == []


def test_every_tensor_that_is_merged_and_checked_is_counted(
    merge_script, tiny_model_dir, adapter, tmp_path, monkeypatch
):
    monkeypatch.setattr(progress, "LOG_INTERVAL_S", 0.0)
    lines = []
    monkeypatch.setattr(merge_script.logger, "info", lambda text, *v: lines.append(text % v))
    args = merge_script.Args(tiny_model_dir, adapter[0], tmp_path / "merged", check="weights")
    count = merge_script.merge(args)["num_tensors"]
    for what in ("merged", "checked"):
        counted = [line for line in lines if f" tensors {what}, about" in line]
        assert len(counted) == count
        assert counted[-1] == f"{count} of {count} tensors {what}, about 0:00 left"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("factor", [0, 2])
def test_an_adapter_of_a_thousandth_that_was_forgotten_or_doubled_fails_the_logits_check(
    merge_script, tiny_model_dir, tmp_path, monkeypatch, dtype, factor
):
    base = read_weights(tiny_model_dir)
    make_adapter(tiny_model_dir, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    factors = load_file(file)
    for key in [key for key in factors if key.endswith("lora_B.weight")]:
        name = key.removeprefix("base_model.model.").replace("lora_B.", "")
        change = 2 * factors[key] @ factors[key.replace("lora_B", "lora_A")]
        factors[key] *= 1e-3 * base[name].square().mean().sqrt() / change.square().mean().sqrt()
    save_file(factors, file)
    monkeypatch.setattr(merge_script, "check_merged_weights", lambda *_: ([], {}))
    args = merge_script.Args(tiny_model_dir, tmp_path / "adapter", tmp_path / "merged", dtype=dtype)
    logits = merge_script.merge(args)["checks"]["logits"]
    assert logits["max_difference"] < 0.1 * logits["relative_tolerance"] * logits["max_abs_logit"]
    monkeypatch.setattr(merge_utils, "lora_scaling", lambda config, module: 2.0 * factor)
    with pytest.raises(RuntimeError, match="logits differ"):
        merge_script.merge(dataclasses.replace(args, overwrite=True))


def test_wrong_scaling_fails_the_weight_check(
    merge_script, tiny_model_dir, adapter, tmp_path, monkeypatch
):
    """The reference scaling is peft's own, not ours."""
    monkeypatch.setattr(merge_utils, "lora_scaling", lambda config, module: 1.99)
    with pytest.raises(RuntimeError, match="are not base . adapter, rounded to float32"):
        merge_script.merge(merge_script.Args(tiny_model_dir, adapter[0], tmp_path / "merged"))


def test_statistics_of_the_adapter_win_and_missing_files_come_from_the_base(
    merge_script, tiny_model_dir, adapter, tmp_path
):
    folder = shutil.copytree(adapter[0], tmp_path / "adapter")
    statistics = {"from_the_adapter": {"action": {"q01": [0.0], "q99": [1.0]}}}
    (folder / "dataset_statistics.json").write_text(json.dumps(statistics))
    base = shutil.copytree(tiny_model_dir, tmp_path / "base")
    (base / "special_notes.txt").write_text("kept")
    merge_script.merge(merge_script.Args(base, folder, tmp_path / "merged", check="weights"))
    assert json.loads((tmp_path / "merged/dataset_statistics.json").read_text()) == statistics
    assert (tmp_path / "merged" / "special_notes.txt").read_text() == "kept"
    assert not (tmp_path / "merged" / "adapter_config.json").exists()


def edit_adapter(adapter_dir, output_dir, **options):
    folder = shutil.copytree(adapter_dir, output_dir)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | options))
    return folder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type is .LOHA."),
        ({"use_dora": True}, "use_dora=True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"r": 5}, "do not have rank 5"),
        ({"option_of_next_year": 1}, "option_of_next_year=1"),
    ],
)
def test_unsupported_adapters_are_refused_by_name(
    merge_script, tiny_model_dir, adapter, tmp_path, options, message
):
    folder = edit_adapter(adapter[0], tmp_path / "adapter", **options)
    with pytest.raises(ValueError, match=message):
        merge_script.merge(merge_script.Args(tiny_model_dir, folder, tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()


def test_adapter_for_another_base_is_refused(merge_script, tiny_model_dir, adapter, tmp_path):
    weights = load_file(adapter[0] / "adapter_model.safetensors")
    names = {
        "shape": lambda w: w | {f"base_model.model.{ATTENTION}.lora_A.weight": torch.zeros(4, 48)}
    }
    names["name"] = lambda w: {k.replace("layers.1.", "layers.7."): t for k, t in w.items()}
    for case, change in names.items():
        folder = shutil.copytree(adapter[0], tmp_path / case)
        save_file(change(weights), folder / "adapter_model.safetensors")
        with pytest.raises(ValueError, match="adapter for another base") as error:
            merge_script.merge(merge_script.Args(tiny_model_dir, folder, tmp_path / "merged"))
        assert "layers.7." in str(error.value) if case == "name" else "(64, 48)" in str(error.value)


def test_fingerprint_tells_bases_of_one_shape_apart(
    merge_script, tiny_model_dir, adapter, tmp_path
):
    folder = shutil.copytree(adapter[0], tmp_path / "adapter")
    fingerprint = merge_utils.base_fingerprint(tiny_model_dir)
    merge_utils.record_base(folder, tiny_model_dir)
    sharded = shard(tiny_model_dir, tmp_path / "sharded")
    assert merge_utils.base_fingerprint(sharded) == fingerprint
    merge_script.validate(merge_script.Args(sharded, folder, tmp_path / "merged"))
    other = shutil.copytree(tiny_model_dir, tmp_path / "other")
    corrupt(other, f"{ATTENTION}.weight")
    with pytest.raises(ValueError, match=f"fingerprint {fingerprint}"):
        merge_script.validate(merge_script.Args(other, folder, tmp_path / "merged"))


def test_output_folders_in_the_way(merge_script, tiny_model_dir, adapter, tmp_path):
    base = shutil.copytree(tiny_model_dir, tmp_path / "base")
    args = {"vla_path": base, "adapter_dir": adapter[0], "check": "weights"}

    def merge(output, **options):
        merge_script.merge(merge_script.Args(**args, output_dir=output, **options))

    for output, message in [(base, "is --vla_path"), (tmp_path, "contains --vla_path")]:
        with pytest.raises(ValueError, match=message):
            merge(output, overwrite=True)
    other_model = shutil.copytree(tiny_model_dir, tmp_path / "other_model")
    for output in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/none")):
        (tmp_path / "file").write_text("precious")
        with pytest.raises(ValueError, match="is a file|cannot be written"):
            merge(output)
    out = tmp_path / "out"
    merge(out)
    with pytest.raises(
        ValueError, match="already holds a model that merge.py wrote: .* pass --overwrite"
    ):
        merge(out)
    with pytest.raises(ValueError, match="not recognisably a model that merge.py wrote"):
        merge(other_model, overwrite=True)
    (out / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="holds thesis.txt"):
        merge(out, overwrite=True)
    (out / "thesis.txt").unlink()
    linked = tmp_path / "link"
    linked.symlink_to(out)
    with pytest.raises(ValueError, match="is a link"):
        merge(linked, overwrite=True)
    merge(out, overwrite=True, dtype="bfloat16")
    assert check_model_dir(out) == [] and check_model_dir(other_model) == []


def test_all_problems_are_reported_at_once(merge_script, tiny_model_dir, tmp_path):
    with pytest.raises(ValueError) as error:
        merge_script.validate(merge_script.Args(tmp_path / "nowhere", tmp_path, tiny_model_dir))
    assert all(
        part in str(error.value) for part in ("nowhere", "adapter_config.json", "is not empty")
    )


MEMORY_SCRIPT = """
import resource, sys, torch
from utils import merge_utils, peft_utils
adapter = merge_utils.load_adapter(sys.argv[2])
matrix = torch.ones(1024, 1024)
merge_utils.compare_matrix(next(iter(adapter.scaling)), matrix, adapter, matrix)
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
merge_utils.merge_weights(sys.argv[1], adapter, sys.argv[3], torch.float32)
merge_utils.check_merged_weights(sys.argv[1], adapter, sys.argv[3], torch.float32)
print(peak() - before)
"""


def test_memory_is_bounded_by_a_shard_and_a_few_matrices(tmp_path):
    """16 shards of 8 MiB in bfloat16 (128 MiB, 256 written): the peak rises by far less than one copy of the model."""
    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "out"))
    for folder in (base, adapter, out):
        folder.mkdir()
    weight_map, factors = {}, {}
    for i in range(16):
        file = f"model-{i:05d}.safetensors"
        part = {
            f"layers.{i}.fc{j}.weight": torch.full((1024, 1024), 0.01, dtype=torch.bfloat16)
            for j in range(4)
        }
        save_file(part, base / file)
        weight_map |= dict.fromkeys(part, file)
        for name in part:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            factors |= {
                f"{module}.lora_A.weight": torch.ones(4, 1024),
                f"{module}.lora_B.weight": torch.ones(1024, 4),
            }
    (base / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    save_file(factors, adapter / "adapter_model.safetensors")
    LoraConfig(r=4, target_modules=[f"fc{j}" for j in range(4)]).save_pretrained(str(adapter))
    command = [sys.executable, "-c", MEMORY_SCRIPT, str(base), str(adapter), str(out)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    # one shard of the base (8 MiB) and one of the output (16 MiB) mapped, and at most eight 4 MiB matrices
    assert float(result.stdout) < 8 + 16 + 8 * 4, result.stdout
    assert len(list(out.glob("*.safetensors"))) == 16


def test_safetensors_writer_matches_the_library(tmp_path):
    tensors = {
        "b": torch.arange(6, dtype=torch.float32).view(2, 3),
        "a": torch.tensor([1, 2, 3], dtype=torch.uint8),
        "c": torch.tensor(7, dtype=torch.int64),
        "d": torch.randn(5).to(torch.bfloat16),
        "e": torch.randn(4, 3).T,
    }
    specs = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    merge_utils.write_safetensors(
        tmp_path / "ours", specs, ((name, tensors[name]) for name in merge_utils.file_order(specs))
    )
    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "theirs")
    ours, theirs = load_file(tmp_path / "ours"), load_file(tmp_path / "theirs")
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[n], theirs[n]) and ours[n].dtype == theirs[n].dtype for n in ours)


def test_merged_folder_loads_as_base_plus_adapter(merge_script, tiny_model_dir, adapter, tmp_path):
    """What the command line calls, and actions of the merged folder equal to those of peft's wrapped model."""
    folders = {
        "vla_path": tiny_model_dir,
        "adapter_dir": adapter[0],
        "output_dir": tmp_path / "merged",
    }
    merge_script.main(merge_script.Args(**folders))
    merged, base = load_model(tmp_path / "merged"), load_model(tiny_model_dir)
    wrapped = PeftModel.from_pretrained(
        load_model(tiny_model_dir), str(adapter[0])
    ).get_base_model()
    generator = torch.Generator().manual_seed(3)
    size = merged.config.image_sizes[0]
    pixels = torch.randn(2, 6, size, size, generator=generator)
    ids, mask = torch.tensor([[1, 5, 6, 7]] * 2), torch.ones(2, 4, dtype=torch.long)
    first = merged.config.first_action_token_id
    actions = torch.arange(first, first + 14).view(2, 7)
    with torch.inference_mode():
        logits = [
            m.eval().forward_actions(ids, mask, actions, pixel_values=pixels)[0]
            for m in (merged, wrapped, base)
        ]
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-4)
    assert (logits[0] - logits[2]).abs().max() > 1e-2  # the adapter does something


def test_adapters_that_we_save_know_their_base(tiny_model_dir, tmp_path):
    model = load_model(tiny_model_dir)
    wrapper = peft_utils.add_lora(model, rank=2)
    peft_utils.save_adapter(wrapper, dict(model.state_dict()), tmp_path / "adapter")
    assert peft_utils.check_adapter_fits(tmp_path / "adapter", tiny_model_dir) == []
    other = shutil.copytree(tiny_model_dir, tmp_path / "other")
    corrupt(other, f"{ATTENTION}.weight")
    (problem,) = peft_utils.check_adapter_fits(tmp_path / "adapter", other)
    assert "adapter for another base" in problem and "fingerprint" in problem
