"""LoRA on OpenVLA models through peft: fresh or from a folder, saved so that peft 0.11 reads it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from prismatic.model_files import raise_file_problems, read_header, reading
from utils.checkpoint_utils import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_shapes
from utils.hub import recorded_path
from utils.lora_linear import fuse_lora
from utils.merge_utils import (
    PEFT_PREFIX,
    LoraAdapter,
    fingerprint_problems,
    frozen_problems,
    load_adapter,
    record_base,
)

# Options of LoraConfig in peft 0.11.1, which OpenVLA pins; later versions have them too.
ALWAYS_WRITTEN = (
    "base_model_name_or_path", "bias", "inference_mode", "init_lora_weights", "lora_alpha",
    "lora_dropout", "peft_type", "r", "target_modules",
)  # fmt: skip
WRITTEN_IF_SET = (
    "alpha_pattern", "fan_in_fan_out", "layers_pattern", "layers_to_transform", "modules_to_save",
    "rank_pattern", "revision", "task_type", "use_rslora",
)  # fmt: skip


def lora_target_modules(model: nn.Module, *, freeze_vision_backbone: bool) -> list[str]:
    """Full names of the layers that get a fresh adapter: every nn.Linear but lm_head.

    `freeze_vision_backbone` leaves those of the ViTs out.

    OpenVLA's recipe asks peft 0.11.1 for "all-linear", which adapts three more layers: lm_head, and
    `patch_embed.proj`, a convolution, of both ViTs (peft matches the last part of a name, and the
    attention of the ViTs has a linear `proj`). Both sets contain linear layers whose output is not
    used (the last block of each ViT, SigLIP's attention pool). They get no gradient, and their B
    stays at zero.
    """
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and not name.endswith("lm_head")
        and not (freeze_vision_backbone and name.startswith("vision_backbone"))
    ]


def add_lora(
    model: nn.Module,
    *,
    rank: int,
    alpha: float | None = None,
    dropout: float = 0.0,
    freeze_vision_backbone: bool = False,
    base_name: str | None = None,
) -> PeftModel:
    """Freeze `model` and inject a fresh LoRA (B = 0) into its linear layers, in place; returns the peft wrapper.

    The adapter is float32 whatever the model's dtype. `alpha` defaults to min(rank, 16) as in OpenVLA (scaling =
    alpha / rank). `base_name` is the base's folder, which the saved adapter names, or else its hub id and commit.
    """
    config = LoraConfig(
        r=rank,
        lora_alpha=min(rank, 16) if alpha is None else alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        target_modules=lora_target_modules(model, freeze_vision_backbone=freeze_vision_backbone),
        init_lora_weights=True,
    )
    wrapper = get_peft_model(model, config)  # type: ignore[arg-type]
    if base_name is not None:
        base = recorded_path(base_name)
        wrapper.peft_config["default"].base_model_name_or_path = base["path"]
        wrapper.peft_config["default"].revision = base.get("revision")
    fuse_lora(model)
    return wrapper  # type: ignore[return-value]


def load_lora(
    model: nn.Module, adapter_dir: str | Path, *, freeze_vision_backbone: bool = False
) -> PeftModel:
    """Inject the adapter saved in `adapter_dir` into `model`, trainable and in float32.

    With `freeze_vision_backbone` the factors in the ViTs act but do not train, and `save_adapter`
    writes them as they were loaded.

    Raises ValueError naming the folder if it is damaged, has options that nothing here can merge, or does not hold
    exactly the factors of the layers of `model` that it names (peft would leave the others as they are).
    """
    adapter = load_adapter(adapter_dir)
    raise_file_problems(_training_problems(adapter))
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    raise_file_problems(_misfits(adapter, shapes, "the model"))
    file = Path(adapter_dir) / ADAPTER_CONFIG
    with reading(file, "peft's options"):
        config = LoraConfig.from_pretrained(str(adapter_dir), inference_mode=False)
    try:
        wrapper = PeftModel.from_pretrained(
            model,  # type: ignore[arg-type]
            str(adapter_dir),
            is_trainable=True,
            config=config,
        )
    except ValueError as error:
        raise ValueError(f"{file} does not fit the model: {error}") from error
    adapted = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    if differing := sorted(adapted ^ adapter.scaling.keys()):
        raise ValueError(
            f"{file} and {ADAPTER_WEIGHTS} name other layers, for example {differing[0]}"
        )
    fuse_lora(model)
    if freeze_vision_backbone:
        _freeze_factors(wrapper, "vision_backbone.")
    return wrapper


def _freeze_factors(wrapper: PeftModel, prefix: str) -> None:
    """Freeze what the adapter trains below `prefix`, and keep copies of it for `save_adapter`.

    The copies are on the CPU: only what trains is gathered to be saved.
    """
    frozen = {
        name: parameter.requires_grad_(False)
        for name, parameter in wrapper.get_base_model().named_parameters()
        if name.startswith(prefix) and parameter.requires_grad
    }
    copies = {name: parameter.detach().to("cpu", copy=True) for name, parameter in frozen.items()}
    wrapper.frozen_factors = copies  # type: ignore[assignment]


def check_adapter_fits(adapter_dir: str | Path, model_dir: str | Path) -> list[str]:
    """Problems that show the adapter was made for another base: names, shapes or (if recorded) other weights."""
    try:
        adapter = load_adapter(adapter_dir)
        if problems := _training_problems(adapter):
            return problems
        problems = _misfits(adapter, read_shapes(model_dir), str(model_dir))
        problems = problems or frozen_problems(adapter, model_dir)
        problems = problems or fingerprint_problems(adapter_dir, model_dir)
    except (ValueError, OSError) as error:
        return str(error).splitlines()
    if len(problems) > 3:
        problems = [*problems[:3], f"... and {len(problems) - 3} more tensors"]
    return [f"{adapter_dir} is an adapter for another base: {p}" for p in problems]


def _training_problems(adapter: LoraAdapter) -> list[str]:
    """Why training cannot continue from an adapter that can be merged: it replaces whole modules.

    peft wraps each of them in a module with two copies, which the model's head, the sharding and the weight sync do
    not know.
    """
    saved = adapter.config.get("modules_to_save")
    if not saved:
        return []
    base = adapter.config.get("base_model_name_or_path") or "BASE"
    folder = str(adapter.folder).rstrip("/")
    return [
        f"{folder}/{ADAPTER_CONFIG}: modules_to_save is {saved}: these modules were trained as a whole, and training "
        f"continues from LoRA factors only. Merge the adapter into its base (python vla-scripts/merge.py --vla_path "
        f"{base} --adapter_dir {folder} --output_dir {folder}-merged), then train {folder}-merged"
    ]


def _misfits(
    adapter: LoraAdapter, base: Mapping[str, tuple[int, ...]], base_name: str
) -> list[str]:
    """Tensors of the adapter that `base` (parameter name -> shape) has no place for."""
    problems = []
    for key, (_, shape) in read_header(adapter.folder / ADAPTER_WEIGHTS).items():
        name, _, kind = key.removeprefix(PEFT_PREFIX).rpartition(".lora_")
        if not name:
            continue
        target = base.get(f"{name}.weight")
        # A has the layer's inputs (and kernel), B its outputs.
        part = slice(1, None) if kind.startswith("A") else slice(1)
        if target is None or len(target) != len(shape) or shape[part] != target[part]:
            problems.append(f"{key} {shape} does not fit {base_name} ({name}.weight is {target})")
    for name, key in adapter.replaced.items():
        if name not in base or tuple(adapter.tensor(key).shape) != base[name]:
            problems.append(f"{key} does not fit {base_name} ({name} is {base.get(name)})")
    return problems


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters with requires_grad, in order."""
    return [p for p in model.parameters() if p.requires_grad]


def save_adapter(
    wrapper: PeftModel, full_state: dict[str, torch.Tensor], folder: str | Path
) -> None:
    """Write peft's two adapter files from a gathered state dict of the (sharded) model inside `wrapper`.

    peft 0.11 and later read them (`portable_options`). Records the base beside them (path and
    fingerprint), if it was loaded from a folder that is still there.
    """
    model = wrapper.get_base_model()
    state = getattr(wrapper, "frozen_factors", {}) | full_state
    factors = [_plain_name(name) for name, _ in model.named_parameters() if ".lora_" in name]
    missing = [name for name in factors if name not in state]
    assert not missing, f"factors that were not gathered: {missing[:3]}"
    prefixed = {f"{PEFT_PREFIX}{name}": tensor for name, tensor in state.items()}
    # peft would add a copy of lm_head to an adapter that has it.
    wrapper.save_pretrained(str(folder), state_dict=prefixed, save_embedding_layers=False)
    adapted = sorted(name for name, module in model.named_modules() if hasattr(module, "lora_A"))
    file = Path(folder) / ADAPTER_CONFIG
    options = portable_options(json.loads(file.read_text()), adapted)
    file.write_text(json.dumps(options, indent=2, sort_keys=True) + "\n")
    base_dir = getattr(model, "name_or_path", "")
    if (Path(base_dir) / "config.json").exists():
        record_base(folder, base_dir)
    # peft adds a model card full of placeholders
    (Path(folder) / "README.md").unlink(missing_ok=True)


def _plain_name(name: str) -> str:
    for wrapper in ("_checkpoint_wrapped_module.", "_orig_mod."):
        name = name.replace(wrapper, "")
    return name


def portable_options(options: Mapping[str, Any], adapted: Sequence[str]) -> dict[str, Any]:
    """The options of an adapter_config.json that peft 0.11 and all later versions can load.

    `options` is what the installed peft writes; `adapted` lists the full names of the layers. peft
    0.11 refuses a file with an option that it does not know. Options at their defaults are left
    out, and `auto_mapping` too: it would say which class to load the base with, and here that is
    the class that FSDP makes.
    """
    portable = {name: options[name] for name in ALWAYS_WRITTEN}
    portable |= {
        name: options[name]
        for name in WRITTEN_IF_SET
        if options.get(name) not in (None, False, {}, [])
    }
    # Later versions know more initialisations. Loading replaces whatever they draw.
    if portable["init_lora_weights"] not in (True, False, "gaussian"):
        portable["init_lora_weights"] = True
    # No version before 0.14 knows `exclude_modules`, but all take full names.
    targets = adapted if options.get("exclude_modules") else options["target_modules"]
    return portable | {"target_modules": sorted(targets)}
