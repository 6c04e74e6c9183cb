"""What config.json, preprocessor_config.json and the tokenizer's files may say, checked before a library sees them.

transformers and timm take these files at their word: a field can name code of the hub (attention kernels, remote
classes), another file, another model, or sizes that no memory holds. Each check names the file, the field and the rule.
"""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig
from prismatic.extern.hf.oft_checks import oft_problems
from prismatic.model_files import (
    CHECKSUMS_NAME,
    INDEX_NAME,
    WEIGHTS_NAME,
    checksum_problems,
    field_problems,
    is_int,
    is_list_of,
    is_number,
    read_headers,
    read_json_object,
    reading,
    weight_files,
)
from prismatic.regular_files import folder_problems

Rules = Mapping[str, tuple[Callable[[Any], bool], str]]

CONFIG_NAME, PREPROCESSOR_NAME, TOKENIZER_CONFIG_NAME = (
    "config.json", "preprocessor_config.json", "tokenizer_config.json",
)  # fmt: skip
ADAPTER_CONFIG_NAME = "adapter_config.json"
PROCESSOR_NAME = "processor_config.json"
ARCHITECTURE = "OpenVLAForActionPrediction"
WEIGHT_DTYPES = ("F64", "F32", "F16", "BF16")
# The tokenizers that OpenVLA checkpoints name, all of which read tokenizer.json.
TOKENIZER_CLASSES = (
    "LlamaTokenizer",
    "LlamaTokenizerFast",
    "PreTrainedTokenizerFast",
    "TokenizersBackend",
)
# Fields with which transformers would run code of the hub or read other files than those that were checked.
REFUSED_FIELDS = (
    "adapter_config", "configuration_files", "experts_implementation", "_experts_implementation_internal",
    "gguf_file", "quantization_config", "transformers_weights",
)  # fmt: skip
ATTENTION_FIELDS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
# Built into transformers; any other name is a kernel of the hub.
ATTENTION_NAMES = (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3")
# Far above any OpenVLA (32 layers of 4096), and small enough that a wrong number is no more than an error.
MAX_LAYERS, MAX_WIDTH, MAX_PIXELS = 512, 1 << 20, 1 << 13
ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "relu", "silu", "swish")
TORCH_DTYPE_NAMES = ("float64", "float32", "float16", "bfloat16")


def _int_rule(low: int, high: int) -> tuple[Callable[[Any], bool], str]:
    return lambda value: is_int(value, low, high), f"a whole number from {low} to {high}"


def _or_none(rule: tuple[Callable[[Any], bool], str]) -> tuple[Callable[[Any], bool], str]:
    return lambda value: value is None or rule[0](value), f"{rule[1]}, or null"


_TEXT = (lambda value: isinstance(value, str), "text")
_BOOL = (lambda value: isinstance(value, bool), "true or false")
_NUMBER = (lambda value: is_number(value) and 0 <= value <= 1e9, "a finite number from 0 to 1e9")
_OBJECT = (lambda value: isinstance(value, dict), "a JSON object")
_WIDTH, _LAYERS, _HEADS = _int_rule(1, MAX_WIDTH), _int_rule(1, MAX_LAYERS), _int_rule(1, 4096)
_TOKEN = _or_none(_int_rule(-1, MAX_WIDTH * 4))
_DTYPE = _or_none(
    (lambda value: value in TORCH_DTYPE_NAMES, f"one of {', '.join(TORCH_DTYPE_NAMES)}")
)
_ROPE = (
    lambda value: isinstance(value, dict) and all(map(_is_rope_value, value.values())),
    "a JSON object of texts and of finite numbers above 0",
)
_VECTOR = (lambda value: is_list_of(value, is_number, 3), "3 finite numbers")

TIMM_RULES: Rules = {
    "embed_dim": _WIDTH,
    "depth": _int_rule(2, MAX_LAYERS),
    "num_heads": _HEADS,
    "patch_size": _int_rule(1, MAX_PIXELS),
    "mlp_ratio": _NUMBER,
    "init_values": _NUMBER,
    "reg_tokens": _int_rule(0, 64),
    "class_token": _BOOL,
    "qkv_bias": _BOOL,
}
LLAMA_RULES: Rules = {
    "vocab_size": _int_rule(1, MAX_WIDTH),
    "hidden_size": _WIDTH,
    "intermediate_size": _WIDTH,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": _HEADS,
    "num_key_value_heads": _or_none(_HEADS),
    "head_dim": _or_none(_WIDTH),
    "max_position_embeddings": _WIDTH,
    "hidden_act": (lambda value: value in ACTIVATIONS, f"one of {', '.join(ACTIVATIONS)}"),
    "rms_norm_eps": _NUMBER,
    "initializer_range": _NUMBER,
    "attention_dropout": _NUMBER,
    "rope_theta": (lambda value: _NUMBER[0](value) and value > 0, "a positive number up to 1e9"),
    "rope_parameters": _or_none(_ROPE),
    "rope_scaling": _or_none(_ROPE),
    "attention_bias": _BOOL,
    "mlp_bias": _BOOL,
    "tie_word_embeddings": (lambda value: value is False, "false: OpenVLA's lm_head is its own"),
    "pad_token_id": _TOKEN,
    "dtype": _DTYPE,
    "torch_dtype": _DTYPE,
}
CONFIG_RULES: Rules = {
    # vLLM chooses its class by this name, from all that it knows.
    "architectures": (lambda value: value == [ARCHITECTURE], f"[{ARCHITECTURE}]"),
    "n_action_bins": _int_rule(2, 1 << 16),
    "pad_to_multiple_of": _int_rule(0, 1 << 16),
    "llm_max_length": _WIDTH,
    "pad_token_id": _int_rule(0, MAX_WIDTH),
    "empty_piece_token_id": _int_rule(0, MAX_WIDTH),
    "use_fused_vision_backbone": _or_none(_BOOL),
    "output_projector_states": _BOOL,
    "tie_word_embeddings": LLAMA_RULES["tie_word_embeddings"],
    "vision_backbone_id": _TEXT,
    "llm_backbone_id": _TEXT,
    "arch_specifier": _TEXT,
    "image_resize_strategy": _TEXT,
    "text_config": _OBJECT,
    "norm_stats": _or_none(_OBJECT),
    "image_sizes": (
        lambda v: is_list_of(v, _int_rule(1, MAX_PIXELS)[0]),
        f"a list of sizes up to {MAX_PIXELS}",
    ),
    # Only names of timm's own models: hf-hub: and local-dir: would fetch and read others.
    "timm_model_ids": (lambda v: is_list_of(v, _is_timm_model), "a list of names of timm's models"),
    "timm_override_act_layers": _or_none(
        (
            lambda v: is_list_of(v, lambda a: a in (None, *ACTIVATIONS)),
            f"a list of null or {', '.join(ACTIVATIONS)}",
        )
    ),
    "timm_model_kwargs": _or_none((lambda v: is_list_of(v, _OBJECT[0]), "a list of JSON objects")),
    "dtype": _DTYPE,
    "torch_dtype": _DTYPE,
}
PREPROCESSOR_RULES: Rules = {
    "image_processor_type": (lambda value: value == "PrismaticImageProcessor", "PrismaticImageProcessor"),
    "use_fused_vision_backbone": _BOOL,
    "image_resize_strategy": _TEXT,
    "input_sizes": (
        lambda v: is_list_of(v, lambda s: is_list_of(s, lambda n: is_int(n, 1, MAX_PIXELS), 3) and s[0] == 3) and v,
        "[3, height, width] for each ViT",
    ),
    "interpolations": (lambda v: is_list_of(v, _TEXT[0]), "a list of names"),
    "means": (lambda v: is_list_of(v, _is_mean), "3 finite numbers up to 1e3 for each ViT"),
    "stds": (lambda v: is_list_of(v, _is_std), "3 positive numbers (1e-6 to 1e3) for each ViT"),
    "tvf_do_letterbox": _BOOL,
    "tvf_letterbox_fill": _or_none((lambda v: is_list_of(v, lambda n: is_int(n, 0, 255), 3), "3 numbers to 255")),
    "tvf_normalize_params": (
        lambda v: is_list_of(
            v, lambda p: isinstance(p, dict) and _is_mean(p.get("mean")) and _is_std(p.get("std"))
        ),
        "a mean (up to 1e3) and a positive std (1e-6 to 1e3) of 3 numbers for each ViT",
    ),
    "tvf_resize_params": (lambda v: is_list_of(v, lambda p: _is_resize(p)), "size and interpolation for each ViT"),
    "tvf_crop_params": (lambda v: is_list_of(v, _OBJECT[0]), "a JSON object for each ViT"),
}  # fmt: skip
_PER_VIT = (
    "interpolations",
    "means",
    "stds",
    "tvf_normalize_params",
    "tvf_resize_params",
    "tvf_crop_params",
)


def _is_timm_model(name: Any) -> bool:
    import timm

    return (
        isinstance(name, str)
        and re.fullmatch(r"[A-Za-z0-9_.]+", name) is not None
        and timm.is_model(name)
    )


def _is_mean(value: Any) -> bool:
    return bool(_VECTOR[0](value)) and max(map(abs, value)) <= 1e3


def _is_std(value: Any) -> bool:
    """In a range whose reciprocals float32 holds: pixels are divided by it."""
    return bool(_VECTOR[0](value)) and min(value) >= 1e-6 and max(value) <= 1e3


def _is_rope_value(value: Any) -> bool:
    numbers = value if isinstance(value, list) else [value]
    return (
        value is None
        or isinstance(value, str | bool)
        or all(is_number(n) and n > 0 for n in numbers)
    )


def _is_resize(params: Any) -> bool:
    if not isinstance(params, dict) or not is_int(params.get("interpolation"), 0, 5):
        return False
    size = params.get("size")
    return is_int(size, 1, MAX_PIXELS) or is_list_of(size, lambda n: is_int(n, 1, MAX_PIXELS), 2)


def config_problems(fields: Mapping[str, Any]) -> list[str]:
    """Problems of config.json's fields: another architecture, wrong types, and what must not be in a file."""
    if fields.get("model_type") != "openvla":
        return [
            f"model_type is {str(fields.get('model_type'))[:40]!r}, not 'openvla': this is another architecture"
        ]
    problems = field_problems(fields, CONFIG_RULES)
    text_config = fields.get("text_config")
    if isinstance(text_config, dict):
        problems += [
            f"text_config.{problem}" for problem in field_problems(text_config, LLAMA_RULES)
        ]
    else:
        text_config = {}
    for place, found in (("", fields), ("text_config.", text_config)):
        refused = [n for n in REFUSED_FIELDS if found.get(n) is not None]
        refused += [n for n in ATTENTION_FIELDS if found.get(n) not in ATTENTION_NAMES]
        problems += [f"{place}{name} is not allowed in a file" for name in refused]
    kwargs: Any = fields.get("timm_model_kwargs")
    for index, vit in enumerate(kwargs if is_list_of(kwargs, _OBJECT[0]) else []):
        unknown = sorted(vit.keys() - TIMM_RULES.keys())
        problems += (
            [f"timm_model_kwargs[{index}] has {unknown}: known are {sorted(TIMM_RULES)}"]
            if unknown
            else []
        )
        problems += [
            f"timm_model_kwargs[{index}].{problem}" for problem in field_problems(vit, TIMM_RULES)
        ]
    return problems


def read_config(model_dir: str | Path) -> OpenVLAConfig:
    """The configuration of a model folder.

    Raises ValueError naming config.json with all problems, or saying that the folder is an OpenVLA-OFT checkpoint;
    OSError if the file cannot be opened.
    """
    file = Path(model_dir) / CONFIG_NAME
    fields = read_json_object(file)
    if problems := oft_problems(model_dir, fields):
        raise ValueError(problems[0])
    if problems := config_problems(fields):
        raise ValueError("\n".join(f"{file}: {problem}" for problem in problems))
    with reading(file, "the configuration"):
        config = OpenVLAConfig.from_pretrained(str(model_dir), local_files_only=True)
    if config.first_action_token_id < 1:
        raise ValueError(
            f"{file}: text_config.vocab_size has no room for n_action_bins and pad_to_multiple_of"
        )
    for name in ("pad_token_id", "empty_piece_token_id"):
        if getattr(config, name) >= config.text_config.vocab_size:
            raise ValueError(
                f"{file}: {name} is {getattr(config, name)}: it must be a token of the model, which has "
                f"{config.text_config.vocab_size} (text_config.vocab_size)"
            )
    return config


def check_preprocessor(
    model_dir: str | Path, reserved: Callable[[str], bool] = lambda name: False
) -> None:
    """Raise ValueError with all problems of preprocessor_config.json; `reserved`: names that no field may have."""
    file = Path(model_dir) / PREPROCESSOR_NAME
    fields = read_json_object(file)
    other = file.with_name(PROCESSOR_NAME)
    if os.path.lexists(other) and "image_processor" in read_json_object(other):
        # transformers 5 prefers it; the engine and older readers do not know it.
        raise ValueError(
            f"{other}: image_processor would replace {PREPROCESSOR_NAME}, which an engine reads: remove it"
        )
    problems = field_problems(fields, PREPROCESSOR_RULES)
    problems += [
        f"{name} is not a field"
        for name in fields
        if name not in PREPROCESSOR_RULES and reserved(name)
    ]
    if not problems:
        sizes = fields.get("input_sizes", [[3, 224, 224]])
        lengths = {name: len(fields[name]) for name in _PER_VIT if name in fields}
        wrong = {name: length for name, length in lengths.items() if length != len(sizes)}
        problems += (
            [f"input_sizes has {len(sizes)} entries, one for each ViT, others have {wrong}"]
            if wrong
            else []
        )
        problems += (
            [] if all(size == sizes[0] for size in sizes) else [f"input_sizes {sizes} differ"]
        )
    if problems:
        raise ValueError("\n".join(f"{file}: {problem}" for problem in problems))


def check_tokenizer_files(model_dir: str | Path) -> None:
    """Raise ValueError if the tokenizer's JSON files are none, or name a tokenizer other than OpenVLA's kinds."""
    folder = Path(model_dir)
    fields = read_json_object(folder / TOKENIZER_CONFIG_NAME)
    name = fields.get("tokenizer_class")
    if name not in TOKENIZER_CLASSES:
        known = ", ".join(TOKENIZER_CLASSES)
        raise ValueError(
            f"{folder / TOKENIZER_CONFIG_NAME}: tokenizer_class is {name!r}, known are {known}"
        )
    for name in ("tokenizer.json", "special_tokens_map.json", "added_tokens.json"):
        if os.path.lexists(folder / name):
            read_json_object(folder / name)


def check_model_files(
    model_dir: str | Path, shapes_of: Callable[[OpenVLAConfig], Mapping[str, tuple[int, ...]]]
) -> OpenVLAConfig:
    """Check configuration, checksums (where the folder has them) and every weight's name, shape and type.

    `shapes_of` gives the parameters that a configuration describes. Returns the configuration. Raises ValueError naming
    the file, OSError if one cannot be opened.
    """
    folder = Path(model_dir)
    if not os.path.isdir(folder):
        raise FileNotFoundError(
            f"{model_dir} is not a folder: give a model folder (config.json, safetensors)"
        )
    problems = folder_problems(folder) or checksum_problems(folder, _decides_the_model)
    if (folder / ADAPTER_CONFIG_NAME).exists():
        # transformers would load the base that it names, from wherever that is.
        problems.append(
            f"{folder / ADAPTER_CONFIG_NAME} lies beside a whole model: move the adapter elsewhere"
        )
    if problems:
        raise ValueError("\n".join(problems))
    config = read_config(folder)
    if not weight_files(folder):
        raise ValueError(f"{model_dir} has no weights: neither {WEIGHTS_NAME} nor {INDEX_NAME}")
    headers = read_headers(folder)
    with reading(folder / CONFIG_NAME, "the described model"):
        expected = shapes_of(config)
    if problems := _weight_problems(folder, headers, expected):
        more = [f"... and {len(problems) - 3} more"] if len(problems) > 3 else []
        raise ValueError("\n".join([*problems[:3], *more]))
    return config


def _decides_the_model(name: str) -> bool:
    return name.endswith(".safetensors") or name in (
        CONFIG_NAME,
        INDEX_NAME,
        "dataset_statistics.json",
        CHECKSUMS_NAME,
    )


def _weight_problems(
    folder: Path,
    headers: Mapping[str, tuple[str, tuple[int, ...]]],
    expected: Mapping[str, tuple[int, ...]],
) -> list[str]:
    files = weight_files(folder)
    where = files[0] if len(files) == 1 else folder / INDEX_NAME
    problems = []
    missing, unexpected = (
        sorted(expected.keys() - headers.keys()),
        sorted(headers.keys() - expected.keys()),
    )
    if missing or unexpected:
        found = {"missing": missing[:5], "unexpected": unexpected[:5]}
        problems.append(
            f"{where} does not hold exactly the parameters of {CONFIG_NAME}'s model: "
            f"{ {name: names for name, names in found.items() if names} } (first five of each)"
        )
    for name in sorted(expected.keys() & headers.keys()):
        dtype, shape = headers[name]
        if shape != expected[name]:
            problems.append(
                f"{where}: {name} has shape {shape}, {CONFIG_NAME} describes {expected[name]}"
            )
        if dtype not in WEIGHT_DTYPES:
            problems.append(
                f"{where}: {name} is {dtype}, weights must be one of {', '.join(WEIGHT_DTYPES)}"
            )
    return problems
