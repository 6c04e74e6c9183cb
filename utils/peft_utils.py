"""LoRA on OpenVLA models through peft: which layers, fresh or from a folder."""

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from utils.checkpoint_utils import read_shapes
from utils.lora_linear import fuse_lora
from utils.merge_utils import fingerprint_problems, record_base


def lora_target_modules(model: nn.Module, *, freeze_vision_backbone: bool) -> list[str]:
    """Full names of the linear layers that get an adapter: all but lm_head, and the ViTs unless they are frozen.

    The ViT blocks that the model never computes (the last one of each, see OpenVLA's features) are included where
    they are linear layers, as in openvla's own "all-linear"; they stay at zero.
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
    alpha / rank). `base_name` is what the saved adapter names as its base.
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
        wrapper.peft_config["default"].base_model_name_or_path = base_name
    fuse_lora(model)
    return wrapper  # type: ignore[return-value]


def load_lora(model: nn.Module, adapter_dir: str | Path) -> PeftModel:
    """Inject the adapter saved in `adapter_dir` into `model`, trainable and in float32."""
    wrapper = PeftModel.from_pretrained(model, str(adapter_dir), is_trainable=True)  # type: ignore[arg-type]
    fuse_lora(model)
    return wrapper


def check_adapter_fits(adapter_dir: str | Path, model_dir: str | Path) -> list[str]:
    """Problems that show the adapter was made for another base: names, shapes or (if recorded) other weights."""
    from safetensors import safe_open

    base = read_shapes(model_dir)
    problems = []
    with safe_open(Path(adapter_dir) / "adapter_model.safetensors", "pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118
            name, _, kind = key.removeprefix("base_model.model.").rpartition(".lora_")
            if not name:
                continue
            shape, target = tuple(tensors.get_slice(key).get_shape()), base.get(f"{name}.weight")
            wrong = target is None or (shape[1] != target[1] if kind[0] == "A" else shape[0] != target[0])
            if wrong:
                problems.append(f"{key} {shape} does not fit {model_dir} ({name}.weight is {target})")
    if not problems:
        problems = fingerprint_problems(adapter_dir, model_dir)
    if len(problems) > 3:
        problems = [*problems[:3], f"... and {len(problems) - 3} more tensors"]
    return [f"{adapter_dir} is an adapter for another base: {p}" for p in problems]


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters with requires_grad, in order."""
    return [p for p in model.parameters() if p.requires_grad]


def save_adapter(wrapper: PeftModel, full_state: dict[str, torch.Tensor], folder: str | Path) -> None:
    """Write peft's two adapter files from a gathered state dict of the (sharded) model inside `wrapper`.

    Records the base beside them (path and fingerprint), if it was loaded from a folder that is still there.
    """
    prefixed = {f"base_model.model.{name}": tensor for name, tensor in full_state.items()}
    wrapper.save_pretrained(str(folder), state_dict=prefixed)
    base_dir = getattr(wrapper.get_base_model(), "name_or_path", "")
    if (Path(base_dir) / "config.json").exists():
        record_base(folder, base_dir)
    # peft adds a model card full of placeholders
    (Path(folder) / "README.md").unlink(missing_ok=True)
