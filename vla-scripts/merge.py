"""Merge a LoRA adapter into its base model and write a complete folder, without a GPU.

    python vla-scripts/merge.py --vla_path BASE --adapter_dir ADAPTER --output_dir OUT

The base's shards are read one matrix at a time, W + scaling * B @ A is computed in float32, and shards with the same
names are written: the memory needed is a few matrices and the mapped pages of one shard, for any model size. The
folder appears under its name only when it is complete and has passed two checks:

1. weights: every value of every adapted matrix against the base plus peft's own delta weight,
   rounded to the output type; everything else bit for bit. An adapter that was forgotten or scaled
   wrongly is found in any type, unless every value rounds to the right number all the same;
2. logits: the folder, loaded as a model, against base + adapter loaded by peft, on a fixed image
   and prompt. It needs the whole model in float32, so with `--check auto` it is left out where that
   does not fit; `merge_metadata.json` says which ran.
"""

import datetime
import json
import platform
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.hub import ModelPath


@dataclass(frozen=True)
class Args:
    """Merge a LoRA adapter into its base model and write a complete folder, without a GPU."""

    vla_path: ModelPath
    """Base model, a folder or a hub id: the one that the adapter was trained on."""
    adapter_dir: ModelPath
    """peft's adapter, a folder or a hub id: adapter_config.json and adapter_model.safetensors."""
    output_dir: Path
    """Folder to write. It must not exist, unless --overwrite is given."""
    revision: str | None = None
    """Branch, tag or commit of --vla_path where that is a hub id. Default: main."""
    adapter_revision: str | None = None
    """Branch, tag or commit of --adapter_dir where that is a hub id. Default: main."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the merged floating-point weights; the sums are float32 in any case."""
    check: Literal["auto", "logits", "weights"] = "auto"
    """logits: compare weights and logits; weights: only the weights, matrix by matrix (bounded memory); auto: logits
    too where the float32 model takes at most half of the free memory."""
    overwrite: bool = False
    """Replace --output_dir, if it is a model folder."""


if __name__ == "__main__":
    # Here, because the imports below take ten seconds, and --help and mistyped flags need none of them.
    arguments = tyro.cli(Args, use_underscores=True)


import psutil
import torch
from peft import PeftModel
from torch import Tensor

from prismatic.extern.hf.modeling_prismatic import load_model
from prismatic.extern.hf.processing_prismatic import load_processor
from prismatic.model_files import read_json_object
from prismatic.regular_files import read_file
from utils.checkpoint_utils import (
    atomic_directory,
    check_adapter_dir,
    check_model_dir,
    copy_model_files,
)
from utils.command_line import REFUSED, CommandLineError, path_problems
from utils.hub import fetch_models, recorded_path
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
from utils.progress import ProgressReport

logger = get_logger(__name__)

# Largest |difference| of a logit, relative to the largest |logit| (at least 1). Both models compute
# in float32 with weights rounded to the output type, so only the order of summation differs.
LOGIT_TOLERANCE = 1e-4
CHECK_INSTRUCTION = "pick up the red block and place it on the blue plate"


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
    args = fetch_models(args, {"vla_path": args.revision, "adapter_dir": args.adapter_revision})
    validate(args)
    adapter = load_adapter(args.adapter_dir)
    if recorded_fingerprint(args.adapter_dir) is None:
        logger.warning(
            "%s does not record its base: only names and shapes are checked", args.adapter_dir
        )
    with atomic_directory(args.output_dir, overwrite=args.overwrite) as folder:
        with ProgressReport(logger, "tensors merged", len(tensor_specs(args.vla_path))) as progress:
            num_tensors = merge_weights(
                args.vla_path, adapter, folder, DTYPES[args.dtype], progress.advance
            )
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
    config = read_json_object(args.vla_path / "config.json")
    for key in [k for k in ("dtype", "torch_dtype") if k in config] or ["torch_dtype"]:
        config[key] = args.dtype
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    statistics = args.adapter_dir / "dataset_statistics.json"
    if statistics.exists():
        (folder / statistics.name).write_bytes(read_file(statistics))
    copied = copy_model_files(args.vla_path, folder)
    logger.info("copied from the base: %s", ", ".join(copied))


def _metadata(args: Args, adapter: LoraAdapter, num_tensors: int) -> dict[str, Any]:
    packages = ("torch", "transformers", "peft", "safetensors")
    base, source = recorded_path(args.vla_path.resolve()), recorded_path(args.adapter_dir.resolve())
    return {
        "base": base["path"],
        "base_revision": base.get("revision"),
        "adapter": source["path"],
        "adapter_revision": source.get("revision"),
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
    with ProgressReport(logger, "tensors checked", len(tensor_specs(args.vla_path))) as progress:
        problems, counts = check_merged_weights(
            args.vla_path, adapter, folder, DTYPES[args.dtype], progress.advance
        )
    if problems:
        raise RuntimeError(
            f"the merged weights are not base + adapter, {args.output_dir} is not written:\n"
            + "\n".join(problems[:20])
        )
    found: dict[str, Any] = {"weights": counts}
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

    With --dtype float32 the reference computes base and adapter side by side. Otherwise peft merges
    them in float32 and the result is rounded to --dtype; `rounding_difference` is by how much that
    rounding changes the logits.

    Raises RuntimeError beyond LOGIT_TOLERANCE.
    """
    reference = PeftModel.from_pretrained(load_model(args.vla_path), str(args.adapter_dir))  # type: ignore[arg-type]
    exact = expected = _logits(reference.get_base_model(), args.vla_path)
    if args.dtype != "float32":
        whole: Any = reference.merge_and_unload()  # type: ignore[operator]
        _round_weights(whole, DTYPES[args.dtype])
        expected = _logits(whole, args.vla_path)
        del whole
    del reference
    merged = _logits(load_model(merged_dir), merged_dir)
    difference = float((merged - expected).abs().max())
    scale = max(1.0, float(expected.abs().max()))
    if not difference <= LOGIT_TOLERANCE * scale:
        raise RuntimeError(
            f"the merged model's logits differ from base + adapter by {difference:.3g} (largest logit {scale:.3g}, "
            f"tolerance {LOGIT_TOLERANCE:g} of it): {args.output_dir} is not written"
        )
    logger.info("logits agree: largest difference %.3g of %.3g", difference, scale)
    return {
        "max_difference": difference,
        "max_abs_logit": scale,
        "relative_tolerance": LOGIT_TOLERANCE,
        "rounding_difference": float((expected - exact).abs().max()),
    }


@torch.no_grad()
def _round_weights(model: Any, dtype: torch.dtype) -> None:
    """Round the values of `model` that a checkpoint has to those of `dtype`; its type stays."""
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(tensor.to(dtype))


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


def main(args: Args) -> None:
    """Command line."""
    logger.info("merging %s", {key: str(value) for key, value in asdict(args).items()})
    try:
        merge(args)
    except CommandLineError as error:
        logger.error("%s", error)
        raise SystemExit(REFUSED) from error
    except RuntimeError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main(arguments)
