"""Merge a LoRA adapter into its base model and write a complete folder, without a GPU.

    python vla-scripts/merge.py --vla_path BASE --adapter_dir ADAPTER --output_dir OUT

The base's shards are read one matrix at a time, W + scaling * B @ A is computed in float32, and shards with the same
names are written: the memory needed is a few matrices and the mapped pages of one shard, for any model size. The
folder appears under its name only when it is complete and has passed two checks:

1. weights: every matrix against peft's own layer built on the base's matrix, everything else bit for bit;
2. logits: the merged model against base + adapter loaded by peft, on a fixed image and prompt. It needs the whole model
   in float32, so with `--check auto` it is left out where that does not fit; `merge_metadata.json` says which ran.
"""

import datetime
import json
import platform
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
import tyro
from peft import PeftModel
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from prismatic.extern.hf.modeling_prismatic import load_model
from prismatic.extern.hf.processing_prismatic import load_processor
from utils.checkpoint_utils import (
    atomic_directory,
    check_adapter_dir,
    check_model_dir,
    copy_model_files,
)
from utils.command_line import REFUSED, CommandLineError, path_problems
from utils.logging_utils import get_logger
from utils.merge_utils import (
    DTYPES,
    LoraAdapter,
    base_fingerprint,
    base_mismatches,
    check_merged_weights,
    load_adapter,
    merge_weights,
    recorded_fingerprint,
    tensor_specs,
)
from utils.output_folders import MERGED_MODEL, output_problems

logger = get_logger(__name__)

# Largest |difference| of a logit, relative to the largest |logit| (at least 1). Both models compute in float32, so for
# float32 only the order of summation differs; else the rounding of the merged weights to 8 or 11 bits shows.
LOGIT_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
CHECK_INSTRUCTION = "pick up the red block and place it on the blue plate"


@dataclass(frozen=True)
class Args:
    """Merge a LoRA adapter into its base model and write a complete folder, without a GPU."""

    vla_path: Path
    """Base model folder: the one that the adapter was trained on."""
    adapter_dir: Path
    """peft folder: adapter_config.json and adapter_model.safetensors."""
    output_dir: Path
    """Folder to write. It must not exist, unless --overwrite is given."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the merged floating-point weights; the sums are float32 in any case."""
    check: Literal["auto", "logits", "weights"] = "auto"
    """logits: compare weights and logits; weights: only the weights, matrix by matrix (bounded memory); auto: logits
    too where the float32 model takes at most half of the free memory."""
    overwrite: bool = False
    """Replace --output_dir, if it is a model that this program wrote."""


def validate(args: Args) -> None:
    """Check the folders before anything is read in full.

    Raises:
        ValueError: all problems at once: incomplete folders, an adapter for another base, an output in the way.
    """
    problems = path_problems("--vla_path", args.vla_path) or check_model_dir(args.vla_path)
    problems += path_problems("--adapter_dir", args.adapter_dir) or check_adapter_dir(
        args.adapter_dir
    )
    problems += _output_problems(args)
    if not problems:
        problems += base_mismatches(load_adapter(args.adapter_dir), args.vla_path)
        if problems:
            known_base = load_adapter(args.adapter_dir).config.get("base_model_name_or_path")
            problems.insert(
                0, f"{args.adapter_dir} is an adapter for another base (it names {known_base}):"
            )
    if problems:
        raise CommandLineError(
            "cannot merge:\n" + "\n".join(f"- {problem}" for problem in problems)
        )


def _output_problems(args: Args) -> list[str]:
    inputs = {"vla_path": args.vla_path, "adapter_dir": args.adapter_dir}
    return output_problems(
        "--output_dir", args.output_dir, MERGED_MODEL, inputs=inputs, overwrite=args.overwrite
    )


def merge(args: Args) -> dict[str, Any]:
    """Write the merged folder and return what its merge_metadata.json holds.

    Raises:
        ValueError: see `validate`.
        RuntimeError: the merged model differs from base + adapter; nothing is left under --output_dir.
    """
    validate(args)
    adapter = load_adapter(args.adapter_dir)
    if recorded_fingerprint(args.adapter_dir) is None:
        logger.warning(
            "%s does not record its base: only names and shapes are checked", args.adapter_dir
        )
    with atomic_directory(args.output_dir, overwrite=args.overwrite) as folder:
        num_tensors = merge_weights(args.vla_path, adapter, folder, DTYPES[args.dtype])
        logger.info(
            "merged %d matrices, wrote %d tensors as %s",
            len(adapter.scaling),
            num_tensors,
            args.dtype,
        )
        _copy_files(args, folder)
        metadata = _metadata(args, adapter, num_tensors) | {"checks": _check(args, adapter, folder)}
        (folder / "merge_metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    logger.info("%s is complete", args.output_dir)
    return metadata


def _copy_files(args: Args, folder: Path) -> None:
    """Config with the new dtype; statistics of the adapter folder if it has them; all else from the base."""
    config = json.loads((args.vla_path / "config.json").read_text())
    for key in [k for k in ("dtype", "torch_dtype") if k in config] or ["torch_dtype"]:
        config[key] = args.dtype
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    statistics = args.adapter_dir / "dataset_statistics.json"
    if statistics.exists():
        (folder / statistics.name).write_bytes(statistics.read_bytes())
    copied = copy_model_files(args.vla_path, folder)
    logger.info("copied from the base: %s", ", ".join(copied))


def _metadata(args: Args, adapter: LoraAdapter, num_tensors: int) -> dict[str, Any]:
    packages = ("torch", "transformers", "peft", "safetensors")
    return {
        "base": str(args.vla_path.resolve()),
        "adapter": str(args.adapter_dir.resolve()),
        "timestamp": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "dtype": args.dtype,
        "num_tensors": num_tensors,
        "num_merged_matrices": len(adapter.scaling),
        "num_replaced_tensors": len(adapter.replaced),
        "base_fingerprint": base_fingerprint(args.vla_path),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in packages},
    }


def _check(args: Args, adapter: LoraAdapter, folder: Path) -> dict[str, Any]:
    """Run the weight check and, where it fits or is asked for, the logits check; return what was found."""
    problems, worst = check_merged_weights(args.vla_path, adapter, folder, DTYPES[args.dtype])
    if problems:
        raise RuntimeError(
            f"the merged weights are not base + adapter, {args.output_dir} is not written:\n"
            + "\n".join(problems[:20])
        )
    found: dict[str, Any] = {"weights": {"max_error_over_rounding_bound": worst}}
    float32_bytes = 4 * sum(
        torch.Size(shape).numel() for _, shape in tensor_specs(args.vla_path).values()
    )
    fits = float32_bytes <= psutil.virtual_memory().available // 2
    if args.check == "weights" or (args.check == "auto" and not fits):
        found["logits"] = (
            f"not compared ({float32_bytes / 2**30:.1f} GiB in float32, --check {args.check})"
        )
        logger.info("weights agree; logits %s", found["logits"])
        return found
    return found | {"logits": compare_logits(args, folder)}


def compare_logits(args: Args, merged_dir: Path) -> dict[str, float]:
    """Compare merged logits with base + adapter's (peft) on one fixed image and prompt, both in float32.

    Raises RuntimeError beyond LOGIT_TOLERANCE.
    """
    reference = PeftModel.from_pretrained(load_model(args.vla_path), str(args.adapter_dir))  # type: ignore[arg-type]
    expected = _logits(reference.get_base_model(), args.vla_path)
    del reference
    merged = _logits(load_model(merged_dir), merged_dir)
    difference, scale = (
        float((merged - expected).abs().max()),
        max(1.0, float(expected.abs().max())),
    )
    tolerance = LOGIT_TOLERANCE[args.dtype]
    if not difference <= tolerance * scale:
        raise RuntimeError(
            f"the merged model's logits differ from base + adapter by {difference:.3g} (largest logit {scale:.3g}, "
            f"tolerance {tolerance:g} of it for {args.dtype}): {args.output_dir} is not written"
        )
    logger.info("logits agree: largest difference %.3g of %.3g", difference, scale)
    return {"max_difference": difference, "max_abs_logit": scale, "relative_tolerance": tolerance}


@torch.inference_mode()
def _logits(model: Any, model_dir: Path) -> Tensor:
    """Logits (1, sequence, vocabulary) in float32 for a fixed noise image and instruction."""
    processor = load_processor(model_dir)
    ids, mask = processor.collate_prompts([processor.prompt_ids(CHECK_INSTRUCTION)])
    height = width = model.config.image_sizes[0]
    image = torch.randint(
        0, 256, (1, height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    pixel_values = processor.image_processor.normalize(image, torch.float32)
    return model.eval()(
        input_ids=ids, attention_mask=mask, pixel_values=pixel_values
    ).logits.float()


def main() -> None:
    """Command line."""
    args = tyro.cli(Args, use_underscores=True)
    logger.info("merging %s", {key: str(value) for key, value in asdict(args).items()})
    try:
        merge(args)
    except CommandLineError as error:
        logger.error("%s", error)
        raise SystemExit(REFUSED) from error
    except RuntimeError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
