"""LoRA adapters (peft's folders) merged into safetensors checkpoints, one matrix in memory at a time, on a CPU.

Shape suffixes: O output features, I input features, R LoRA rank. The kernel of a convolution counts
as a matrix with one row per output channel, as in peft.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors import safe_open
from torch import Tensor, nn

from prismatic.finite_weights import check_finite, nonfinite
from prismatic.model_files import read_json_object, weight_files
from utils.checkpoint_utils import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    INDEX_NAME,
    check_adapter_dir,
    read_adapter_config,
)
from utils.hub import recorded_path

PEFT_PREFIX = "base_model.model."
BASE_RECORD = (
    "base_model.json"  # in an adapter folder: path and fingerprint of the model it was trained on
)
FINGERPRINT_SAMPLES = 64
# Values of a matrix that are compared at a time: their float64 intermediates fit a core's cache.
BLOCK_VALUES = 1 << 17
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Options that the merged weights do not depend on, or that are read below. Any other option that is set is refused.
# `fan_in_fan_out` is among them because peft switches it off for nn.Linear and ignores it for
# nn.Conv2d, the only layer types accepted here.
# fmt: off
KNOWN_OPTIONS = frozenset((
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core", "modules_to_save", "peft_type",
    "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules",
    "task_type", "use_rslora", "velora_config",
))
# fmt: on
# Initialisations that leave the base weights as they are; the others (pissa, olora, corda, loftq, lora_ga) change them.
KNOWN_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")
SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
TORCH_DTYPES = {name: dtype for dtype, name in SAFETENSORS_NAMES.items()}


@dataclass(frozen=True)
class LoraAdapter:
    """What an adapter folder does to a checkpoint.

    Attributes:
        folder: the peft folder.
        config: adapter_config.json.
        scaling: name of each adapted module -> factor of B @ A.
        replaced: checkpoint name -> the adapter's key of a whole tensor (modules_to_save, trained biases).
        frozen: checkpoint name -> the adapter's key of a copy of the base's tensor (peft adds lm_head's).
    """

    folder: Path
    config: dict[str, Any]
    scaling: dict[str, float]
    replaced: dict[str, str]
    frozen: dict[str, str]

    def tensor(self, key: str) -> Tensor:
        """The adapter's tensor under its own key."""
        with safe_open(self.folder / ADAPTER_WEIGHTS, "pt") as tensors:
            return tensors.get_tensor(key)

    def factors(self, module: str) -> tuple[Tensor, Tensor]:
        """lora_A and lora_B of one module in float32, with peft's shapes.

        A linear layer has (R, I) and (O, R), a convolution (R, input channels, height, width) and
        (O, R, 1, 1).
        """
        down, up = (self.tensor(f"{PEFT_PREFIX}{module}.lora_{x}.weight").float() for x in "AB")
        return down, up

    def apply(self, name: str, weight: Tensor) -> Tensor:
        """The merged tensor for checkpoint name `name`: float32 where LoRA applies, else as it is stored.

        W + scaling * B @ A is accumulated in float32 into a new tensor.
        """
        if name in self.replaced:
            return self.tensor(self.replaced[name])
        module = name.removesuffix(".weight")
        if module == name or module not in self.scaling:
            return weight
        down_RI, up_OR = (factor.flatten(1) for factor in self.factors(module))
        merged_OI = torch.addmm(
            weight.float().flatten(1), up_OR, down_RI, alpha=self.scaling[module]
        )
        return merged_OI.view(weight.shape)


def load_adapter(adapter_dir: str | Path) -> LoraAdapter:
    """Read a peft LoRA folder's configuration and key list.

    Raises:
        ValueError: an incomplete folder, or options and tensors that merging does not support, each by name.
    """
    folder = Path(adapter_dir)
    problems = check_adapter_dir(folder)
    if problems:
        raise ValueError("\n".join(problems))
    config = read_adapter_config(folder)
    problems = unsupported_options(config)
    with safe_open(folder / ADAPTER_WEIGHTS, "pt") as tensors:
        shapes = {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
    modules, replaced, frozen, unknown = _sort_keys(shapes, config)
    problems += [
        f"tensor {key} is not a LoRA factor, a saved module or a trained bias" for key in unknown
    ]
    problems += [
        problem for module in modules for problem in _factor_problems(module, shapes, config)
    ]
    if problems:
        raise ValueError(
            f"{folder} cannot be merged:\n" + "\n".join(f"- {problem}" for problem in problems)
        )
    scaling = {module: lora_scaling(config, module) for module in modules}
    return LoraAdapter(folder, config, scaling, replaced, frozen)


def unsupported_options(config: Mapping[str, Any]) -> list[str]:
    """Options of an adapter_config.json that merging does not support, with their values."""
    problems = []
    if config.get("peft_type") != "LORA":
        problems.append(f"peft_type {config.get('peft_type')} is not supported, only LORA is")
    for option, value in sorted(config.items()):
        if option not in KNOWN_OPTIONS and value:
            problems.append(f"option {option}={value!r} is not supported")
    init = config.get("init_lora_weights")
    if not any(init is known or init == known for known in KNOWN_INITIALISATIONS):
        problems.append(
            f"option init_lora_weights={init!r} is not supported: it changed the base weights, save the adapter with "
            "peft's path_initial_model_for_weight_conversion first"
        )
    return problems


def _sort_keys(
    shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]
) -> tuple[list[str], dict[str, str], dict[str, str], list[str]]:
    """Adapted modules, replaced and frozen tensors (checkpoint name -> key), and keys that are none of these."""
    modules, replaced, frozen, unknown = set(), {}, {}, []
    saved = config.get("modules_to_save") or []
    for key in sorted(shapes):
        name = key.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".")
        plain = re.sub(r"\.(original_module|modules_to_save)\.", ".", key)
        if not key.startswith(PEFT_PREFIX):
            unknown.append(key)
        elif name.endswith((".lora_A.weight", ".lora_B.weight")):
            modules.add(name[: -len(".lora_A.weight")])
        elif plain != key and plain in shapes:
            continue  # peft's bias="all" stores the biases of saved modules a second and third time
        elif key.endswith(".base_layer.weight"):
            frozen[name] = key
        elif ".lora_" not in name and plain == key and _is_trained(name, saved, config):
            replaced[name] = key
        else:
            unknown.append(key)
    return sorted(modules), replaced, frozen, unknown


def _is_trained(name: str, saved: list[str], config: Mapping[str, Any]) -> bool:
    module = name.rpartition(".")[0]
    in_saved = any(f".{part}." in f".{module}." for part in saved)
    return in_saved or (name.endswith(".bias") and config.get("bias", "none") != "none")


def _factor_problems(
    module: str, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]
) -> list[str]:
    down, up = (shapes.get(f"{PEFT_PREFIX}{module}.lora_{x}.weight") for x in "AB")
    if down is None or up is None:
        return [f"module {module} has only one of lora_A and lora_B"]
    is_linear = len(down) == len(up) == 2
    is_convolution = len(down) == len(up) == 4 and up[2:] == (1, 1)
    if not is_linear and not is_convolution:
        return [
            f"module {module} (lora_A {down}, lora_B {up}) is neither a linear layer nor a 2-D "
            "convolution: no other type is supported"
        ]
    rank = _pattern_value(config.get("rank_pattern"), module, config["r"])
    if not down[0] == up[1] == rank:
        return [
            f"module {module}: lora_A {down} and lora_B {up} do not have rank {rank} of {ADAPTER_CONFIG}"
        ]
    return []


def _pattern_value(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The rule of peft: the first pattern that matches the end of the module's name, at a dot, decides."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def lora_scaling(config: Mapping[str, Any], module: str) -> float:
    """Factor of B @ A after both patterns: alpha / r, or alpha / sqrt(r) (rsLoRA, Kalajdzievski 2023)."""
    rank = _pattern_value(config.get("rank_pattern"), module, config["r"])
    alpha = _pattern_value(config.get("alpha_pattern"), module, config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def tensor_specs(model_dir: str | Path) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of every tensor of a model folder, from the safetensors headers."""
    specs = {}
    for file in weight_files(model_dir):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                header = tensors.get_slice(name)
                specs[name] = (TORCH_DTYPES[header.get_dtype()], tuple(header.get_shape()))
    return specs


def base_mismatches(adapter: LoraAdapter, base_dir: str | Path) -> list[str]:
    """Reasons why `base_dir` cannot be the model that `adapter` was trained on: names, shapes, fingerprint."""
    shapes = {name: shape for name, (_, shape) in tensor_specs(base_dir).items()}
    problems = []
    for module in adapter.scaling:
        down, up = adapter.factors(module)
        problems += _shape_problem(f"{module}.weight", (up.shape[0], *down.shape[1:]), shapes)
    for name, key in adapter.replaced.items():
        problems += _shape_problem(name, tuple(adapter.tensor(key).shape), shapes)
    if not problems:
        problems += frozen_problems(adapter, base_dir)
    if not problems:
        problems += fingerprint_problems(adapter.folder, base_dir)
    return problems


def frozen_problems(adapter: LoraAdapter, base_dir: str | Path) -> list[str]:
    """Copies of base tensors in the adapter that differ from the base's."""
    problems = []
    for file in weight_files(base_dir):
        with safe_open(file, "pt") as base:
            for name in set(base.keys()) & set(adapter.frozen):
                copy = adapter.tensor(adapter.frozen[name])
                if not torch.equal(base.get_tensor(name).to(copy.dtype), copy):
                    problems.append(
                        f"the adapter holds a copy of its base's {name}, the base has other values"
                    )
    return sorted(problems)


def _shape_problem(
    name: str, wanted: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]
) -> list[str]:
    if name not in shapes:
        return [f"the adapter changes {name}, which the base does not have"]
    if shapes[name] != wanted:
        return [f"the adapter needs {name} of shape {wanted}, the base has {shapes[name]}"]
    return []


def record_base(adapter_dir: str | Path, base_dir: str | Path) -> None:
    """Write into an adapter folder which model it was trained on: path, or hub id and commit, and fingerprint."""
    record = recorded_path(base_dir) | {"fingerprint": base_fingerprint(base_dir)}
    (Path(adapter_dir) / BASE_RECORD).write_text(json.dumps(record, indent=2) + "\n")


def recorded_fingerprint(adapter_dir: str | Path) -> str | None:
    """`base_fingerprint` of the model that the adapter was trained on, if the folder says so (`record_base`).

    Raises ValueError if the record is damaged.
    """
    file = Path(adapter_dir) / BASE_RECORD
    fingerprint = read_json_object(file).get("fingerprint") if file.exists() else None
    if fingerprint is not None and not isinstance(fingerprint, str):
        raise ValueError(f"{file}: fingerprint is {str(fingerprint)[:40]!r}, it must be text")
    return fingerprint


def fingerprint_problems(adapter_dir: str | Path, base_dir: str | Path) -> list[str]:
    """Whether `base_dir` holds other weights than those that the adapter was trained on; empty if unknown."""
    recorded = recorded_fingerprint(adapter_dir)
    if recorded is None or recorded == (actual := base_fingerprint(base_dir)):
        return []
    return [
        f"the adapter was trained on weights with fingerprint {recorded}, {base_dir} has {actual}"
    ]


def base_fingerprint(model_dir: str | Path) -> str:
    """Short SHA-256 over every tensor's name, shape and a sample of its rows, in name order, whatever the sharding.

    Samples the first, middle and last row (at most 64 values each): milliseconds a tensor also for the 7B, and two
    trained models never share it. Values are hashed in float32, so bf16 -> float32 conversion does not change it.
    """
    digest = hashlib.sha256()
    where = {name: file for file in weight_files(model_dir) for name in _names(file)}
    for name in sorted(where):
        with safe_open(where[name], "pt") as tensors:
            header = tensors.get_slice(name)
            shape = header.get_shape()
            digest.update(f"{name}{list(shape)}".encode())
            indices = sorted({0, shape[0] // 2, shape[0] - 1}) if shape else []
            rows = [header[i] for i in indices] or [tensors.get_tensor(name)]
        for row in rows:
            digest.update(row.flatten()[:FINGERPRINT_SAMPLES].float().numpy().tobytes())
    return digest.hexdigest()[:16]


def _names(file: Path) -> list[str]:
    with safe_open(file, "pt") as tensors:
        return list(tensors.keys())


def write_safetensors(
    file: str | Path,
    specs: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    tensors: Iterator[tuple[str, Tensor]],
) -> None:
    """Write a safetensors file tensor by tensor: the library's own writers want all of them in memory.

    `tensors` must come in the order of `file_order(specs)`. Format: 8 bytes header length, JSON header, raw data.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in file_order(specs):
        dtype, shape = specs[name]
        end = offset + dtype.itemsize * math.prod(shape)
        header[name] = {
            "dtype": SAFETENSORS_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    written = []
    with open(file, "wb") as output:
        output.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors:
            assert (tensor.dtype, tuple(tensor.shape)) == specs[name], (
                f"{name} is not what the header says"
            )
            output.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            written.append(name)
    assert written == file_order(specs), "tensors came in another order than the header's"


def file_order(specs: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> list[str]:
    """The safetensors library's order: wider dtypes first (alignment), then by name."""
    return sorted(specs, key=lambda name: (-specs[name][0].itemsize, name))


def merge_weights(
    base_dir: str | Path,
    adapter: LoraAdapter,
    output_dir: str | Path,
    dtype: torch.dtype,
    on_tensor: Callable[[], None] = lambda: None,
) -> int:
    """Write base + adapter as safetensors with the base's file names and index; return the number of tensors.

    `on_tensor` is called after each of them.

    Floating-point tensors become `dtype`, the others stay. Memory: one matrix in float32 and its result, plus the
    pages of the base shard being read (mapped, not copied).
    """
    num_tensors = total_bytes = 0
    for source in weight_files(base_dir):
        with safe_open(source, "pt") as base:
            specs = {}
            for name in base.keys():  # noqa: SIM118
                header = base.get_slice(name)
                specs[name] = (
                    _output_dtype(TORCH_DTYPES[header.get_dtype()], dtype),
                    tuple(header.get_shape()),
                )

            def merged(base=base, specs=specs) -> Iterator[tuple[str, Tensor]]:
                for name in file_order(specs):
                    stored = base.get_tensor(name)
                    check_finite(base_dir, [(name, stored)])
                    merged = adapter.apply(name, stored).to(specs[name][0])
                    if nonfinite([(name, merged)]):
                        raise ValueError(
                            f"{base_dir}: {name} merged with {adapter.folder} overflows {dtype}: use --dtype float32"
                        )
                    yield name, merged
                    on_tensor()

            write_safetensors(Path(output_dir) / source.name, specs, merged())
        num_tensors += len(specs)
        total_bytes += sum(d.itemsize * math.prod(shape) for d, shape in specs.values())
    index_file = Path(base_dir) / INDEX_NAME
    if index_file.exists():
        index = read_json_object(index_file)
        index["metadata"] = {**index.get("metadata", {}), "total_size": total_bytes}
        (Path(output_dir) / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
    return num_tensors


def _output_dtype(stored: torch.dtype, wanted: torch.dtype) -> torch.dtype:
    return wanted if stored.is_floating_point else stored


@dataclass
class MatrixComparison:
    """How the values of a merged matrix compare with base + adapter.

    Attributes:
        num_values: number of values.
        num_within_sum_error: values that are not the nearest to the float64 sum, but the nearest to
            a sum within the error of float32.
        num_wrong: all other values that are not the nearest.
        equals_base: whether the rows with wrong values hold the base without the adapter.
    """

    num_values: int
    num_within_sum_error: int = 0
    num_wrong: int = 0
    equals_base: bool = True

    def problem(self, name: str, dtype: torch.dtype) -> str:
        """Message for a matrix with wrong values."""
        wrong = f"{name}: {self.num_wrong} of {self.num_values} values are not base + adapter"
        omitted = ": they are the base's, the adapter is not in them" if self.equals_base else ""
        return f"{wrong}, rounded to {_name_of(dtype)}{omitted}"


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_merged_weights(
    base_dir: str | Path,
    adapter: LoraAdapter,
    merged_dir: str | Path,
    dtype: torch.dtype,
    on_tensor: Callable[[], None] = lambda: None,
) -> tuple[list[str], dict[str, int]]:
    """Compare every value of a merged folder with base + adapter, one tensor at a time.

    Adapted matrices: see `compare_matrix`. All other tensors must be equal bit for bit after the
    conversion to `dtype`. No value may be infinite or NaN. `on_tensor` is called for
    each tensor.

    Returns:
        Problems (none: a right merge) and, over the adapted matrices, how many values were compared
        and how many of them are right only within the error of float32 (`num_within_sum_error`).
    """
    problems, counts = [], {"num_values": 0, "num_within_sum_error": 0}
    merged_files = {name: file for file in weight_files(merged_dir) for name in _names(file)}
    missing = set(tensor_specs(base_dir)) ^ set(merged_files)
    problems += [f"{name} is in only one of base and merged" for name in sorted(missing)]
    for source in weight_files(base_dir):
        with safe_open(source, "pt") as base:
            for name in (n for n in base.keys() if n in merged_files):  # noqa: SIM118
                on_tensor()
                with safe_open(merged_files[name], "pt") as tensors:
                    merged = tensors.get_tensor(name)
                stored, module = base.get_tensor(name), name.removesuffix(".weight")
                if not merged.isfinite().all():
                    problems.append(
                        f"{name} has infinite or NaN values as {_name_of(merged.dtype)}"
                    )
                elif module != name and module in adapter.scaling:
                    found = _compare_if_alike(module, stored, adapter, merged, dtype)
                    counts["num_values"] += found.num_values
                    counts["num_within_sum_error"] += found.num_within_sum_error
                    if found.num_wrong:
                        problems.append(found.problem(name, dtype))
                elif not _equal_after_cast(adapter.apply(name, stored), merged, dtype):
                    problems.append(
                        f"{name} differs from the {'adapter' if name in adapter.replaced else 'base'}'s"
                    )
    return problems, counts


def _equal_after_cast(stored: Tensor, merged: Tensor, dtype: torch.dtype) -> bool:
    expected = stored.to(_output_dtype(stored.dtype, dtype))
    return merged.dtype == expected.dtype and torch.equal(merged.view(-1), expected.view(-1))


def _compare_if_alike(
    module: str, weight: Tensor, adapter: LoraAdapter, merged: Tensor, dtype: torch.dtype
) -> MatrixComparison:
    if (merged.dtype, merged.shape) != (dtype, weight.shape):
        return MatrixComparison(merged.numel(), num_wrong=merged.numel(), equals_base=False)
    return compare_matrix(module, weight, adapter, merged)


@torch.no_grad()
def compare_matrix(
    module: str, weight: Tensor, adapter: LoraAdapter, merged: Tensor
) -> MatrixComparison:
    """Compare every value of `merged` with base + adapter, rounded to the type of `merged`.

    The reference is peft's own delta weight (its product, scaling and patterns) in float64, one
    block of rows at a time. The merge sums n = R + 1 terms in float32 in an unknown order, so its
    sum may be off by n eps (|W| + s |B| |A|) (Higham 2002, section 3.1; a few eps more for the
    scaling). A value must be the rounding of some number within that error of the reference.
    That fixes the value, except where the reference lies within the error of a boundary between
    two roundings: there either is right (in bfloat16 one value in three million).

    A tolerance of one unit in the last place would not do: in bfloat16 that is up to 0.8 % of the
    value, and an adapter of 0.1 % could be forgotten. Here a wrong merge passes only where it
    cannot be told from a right one: if every one of its values rounds to the same number.
    """
    layer: Any = peft_layer(module, weight.shape, adapter)
    up, down = layer.lora_B["default"].weight, layer.lora_A["default"].weight
    norm_1I = down.flatten(1).norm(dim=0, keepdim=True) * abs(layer.scaling["default"])
    error = (len(down) + 4) * torch.finfo(torch.float32).eps
    found = MatrixComparison(merged.numel())
    num_rows = max(1, BLOCK_VALUES // max(1, norm_1I.numel()))
    for start in range(0, len(weight), num_rows):
        rows = slice(start, start + num_rows)
        layer.lora_B["default"].weight = nn.Parameter(up[rows], requires_grad=False)
        delta_OI = layer.get_delta_weight("default").flatten(1)
        base_OI, stored_OI = weight[rows].flatten(1).double(), merged[rows].flatten(1)
        exact_OI = base_OI + delta_OI
        # |B| |A| summed over the rank is at most the product of the two norms (Cauchy-Schwarz).
        slack_OI = error * (base_OI.abs() + up[rows].flatten(1).norm(dim=1, keepdim=True) * norm_1I)
        low_OI, high_OI = (
            (exact_OI - slack_OI).to(merged.dtype),
            (exact_OI + slack_OI).to(merged.dtype),
        )
        num_wrong = int(((stored_OI < low_OI) | (stored_OI > high_OI)).sum())
        num_within_sum_error = int((stored_OI != exact_OI.to(merged.dtype)).sum()) - num_wrong
        found.num_within_sum_error += num_within_sum_error
        if num_wrong:
            found.num_wrong += num_wrong
            found.equals_base &= torch.equal(stored_OI, base_OI.to(merged.dtype))
    return found


@torch.no_grad()
def peft_layer(module: str, shape: Sequence[int], adapter: LoraAdapter) -> nn.Module:
    """Build peft's LoRA layer in float64 for one module whose weight has `shape`.

    A linear layer for two dimensions, a convolution for four. The base weight takes no memory.
    """
    root = nn.Module()
    parent = root
    *path, leaf = module.split(".")
    for part in path:
        parent.add_module(part, nn.Module())
        parent = parent.get_submodule(part)
    outputs, inputs, *kernel = shape
    base: Any
    if kernel:
        base = nn.Conv2d(inputs, outputs, (kernel[0], kernel[1]), bias=False, device="meta")
    else:
        base = nn.Linear(inputs, outputs, bias=False, device="meta")
    # One value in all places: peft reads the shape, and the device and type for its factors.
    stand_in = torch.zeros((), dtype=torch.float64).expand(*shape)
    base.weight = nn.Parameter(stand_in, requires_grad=False)
    parent.add_module(leaf, base)
    config = LoraConfig.from_pretrained(str(adapter.folder))
    config.modules_to_save, config.init_lora_weights, config.bias = None, True, "none"
    layer: Any = inject_adapter_in_model(config, root, "default").eval().get_submodule(module)
    down, up = adapter.factors(module)
    layer.lora_A["default"].weight.copy_(down)
    layer.lora_B["default"].weight.copy_(up)
    return layer.requires_grad_(False)
