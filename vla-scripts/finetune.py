"""Supervised fine-tuning of an OpenVLA policy on RLDS demonstrations: all weights or a LoRA, on one or many ranks.

    python vla-scripts/finetune.py --vla_path BASE --data_root_dir data --dataset_name tabletop --output_dir runs/sft
    torchrun --nproc_per_node 8 vla-scripts/finetune.py --vla_path openvla/openvla-7b --use_lora ...

The loss is the cross-entropy of the 7 action tokens and EOS, over the whole vocabulary (OpenVLA). Master weights and
Adam's moments are float32, compute is float32 or bfloat16 (FSDP2). The run's folder gets TensorBoard events,
`metrics.jsonl`, `args.json`, `step_<N>/` every `--save_freq` steps and, at the end, the model itself with
`dataset_statistics.json` (with `--use_lora` the adapter alone, unless `--merge_lora`).

Shapes: B samples of a micro-batch, A action tokens (7), N labelled tokens = B (A + 1), V vocabulary.
"""

import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import tyro


@dataclass(frozen=True)
class Args:
    """Supervised fine-tuning of an OpenVLA policy on RLDS demonstrations."""

    # ---- model and data ----
    vla_path: str = "openvla/openvla-7b"
    """Model folder in openvla-7b's format to start from, or its id on the Hugging Face hub."""
    revision: str | None = None
    """Branch, tag or commit of --vla_path where that is a hub id. Default: main."""
    data_root_dir: str = "data"
    """Folder of RLDS datasets, each in <name>/1.0.0."""
    dataset_name: str = "tabletop"
    """Dataset, named mixture (libero_4_task_suites_no_noops, ...) or name:weight,name:weight."""
    image_aug: bool = True
    """Augment images as OpenVLA does: random crop of 0.9 of the area, brightness, contrast, saturation, hue."""
    shuffle_buffer_size: int = 100_000
    """Transitions in the shuffle buffer of a dataset too large for cache_gib (OpenVLA's default); >= 1."""
    cache_gib: float = 4.0
    """Keep all decoded frames in memory, on every rank, if they take at most this many GiB; else stream. >= 0."""

    # ---- run ----
    run_root_dir: str = "runs"
    """Folder that gets one folder per run, named after its main settings, unless output_dir is given."""
    output_dir: str | None = None
    """The run's folder itself; the fine-tuned model ends up here."""
    run_id_note: str | None = None
    """Appended to the name of the run's folder (without output_dir)."""
    overwrite: bool = False
    """Delete an earlier fine-tuning run in the same folder. Other folders, and inputs, stay."""
    seed: int = 0
    """Everything random is derived from it; >= 0."""
    max_steps: int = 200_000
    """Optimizer steps; >= 1. The default is OpenVLA's."""
    save_freq: int = 5000
    """Optimizer steps between checkpoints step_<N>/ (0: only the final one). The default is OpenVLA's."""
    log_freq: int = 20
    """Optimizer steps between log lines; metrics are averaged over all of them. >= 1."""
    use_wandb: bool = False
    """Log to Weights & Biases too (TensorBoard and metrics.jsonl are always written)."""
    wandb_project: str | None = None
    """W&B project (required with use_wandb)."""
    wandb_mode: Literal["online", "offline"] = "online"
    """offline: written to the run's folder, nothing is sent."""

    # ---- optimisation ----
    per_device_train_batch_size: int = 16
    """Samples per forward/backward pass on each rank; >= 1. The default is OpenVLA's."""
    grad_accumulation_steps: int = 1
    """Passes per optimizer step; >= 1. An optimizer step sees the product of both and of the ranks."""
    learning_rate: float = 5e-4
    """Peak learning rate (AdamW); > 0. The default is OpenVLA's for LoRA; full fine-tuning of the 7B wants 2e-5."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    """Schedule after the warm-up; linear and cosine end at 0."""
    warmup_steps: int = 0
    """Optimizer steps over which the learning rate rises from 0; < max_steps."""
    weight_decay: float = 0.0
    """AdamW's weight decay; >= 0."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this global norm (0: not clipped)."""
    freeze_vision_backbone: bool = False
    """Do not train the two ViTs; no gradient is then computed through them."""

    # ---- LoRA ----
    use_lora: bool = False
    """Train a LoRA adapter on all linear layers instead of all weights."""
    lora_rank: int = 32
    """Rank; >= 1."""
    lora_alpha: float | None = None
    """Scaling is alpha / rank. Default: min(rank, 16), as OpenVLA."""
    lora_dropout: float = 0.0
    """Dropout on the adapter's input, in [0, 1)."""
    merge_lora: bool = False
    """Write whole models with the adapter merged in (in float32) instead of adapter folders."""

    # ---- machine ----
    save_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of whole models that are written; bfloat16 halves the folder and rounds the weights to 8 bits."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute precision; master weights are always float32. auto: bfloat16 on GPUs, float32 on CPUs."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: GPUs if this machine has any."""
    num_threads: int | None = None
    """CPU threads of each rank's torch; >= 1. Default: torch's own choice."""
    data_num_threads: int = 1
    """CPU threads of each rank's input pipeline (tensorflow); >= 1."""
    enable_gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    sharding_strategy: Literal["full-shard", "shard-grad-op"] = "full-shard"
    """FSDP: gather weights again for the backward pass (ZeRO-3), or keep them (ZeRO-2)."""
    offload: bool = False
    """Keep sharded parameters and optimizer states in CPU memory (GPU ranks)."""


if __name__ == "__main__":
    # Here, because the imports below take ten seconds, and --help and mistyped flags need none of them.
    arguments = tyro.cli(Args, description=__doc__, use_underscores=True)


import torch
import torch.distributed as dist
from torch import Tensor
from transformers import get_scheduler

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from prismatic.extern.hf.modeling_prismatic import load_model
from prismatic.extern.hf.processing_prismatic import PrismaticProcessor, load_processor
from prismatic.model_files import read_json_object
from prismatic.vla.action_tokenizer import ActionTokenizer
from prismatic.vla.datasets.dataset import ActionCollator, RLDSDataset, iterate_batches, load_specs
from prismatic.vla.datasets.mixtures import check_mixture, resolve_mixture
from prismatic.vla.datasets.prefetch import prefetch
from prismatic.vla.datasets.sources import Reading
from prismatic.vla.datasets.transforms import get_transform
from utils import checkpoint_utils, fsdp_utils, hub, peft_utils
from utils.command_line import (
    REFUSED,
    Bound,
    CommandLineError,
    Effect,
    bound_problems,
    folder_name_problems,
    idle_flags,
    path_problems,
    raise_problems,
)
from utils.logging_utils import MetricWriter, add_log_file, format_duration, get_logger
from utils.output_folders import FINETUNING_RUN, output_problems, place_problems, remove_output

logger = get_logger(__name__)

# Every number that a flag takes, with the reason for a limit that its meaning does not set.
BOUNDS: dict[str, Bound] = {
    "max_steps": Bound(1, 1e12, reason="1e12 steps would take a century"),
    "save_freq warmup_steps": Bound(0, 1e12, reason="in optimizer steps"),
    "log_freq": Bound(1, 1e12, reason="in optimizer steps"),
    "seed": Bound(0, 1e12, reason="larger ones leave the rank no room in a generator's 64 bits"),
    "per_device_train_batch_size": Bound(1, 65_536, reason="its activations fill any memory"),
    "grad_accumulation_steps": Bound(1, 1_000_000, reason="passes of one optimizer step"),
    "learning_rate": Bound(
        0, 1, above=True, reason="AdamW moves every weight by about this much at each step"
    ),
    "weight_decay": Bound(0, 1000, reason="times learning_rate it must stay below 1"),
    "max_grad_norm": Bound(0, 1e6, reason="0 does not clip"),
    "lora_rank": Bound(1, 4096, reason="the width of the 7B's matrices"),
    "lora_alpha": Bound(0, 65_536, above=True, reason="larger merged weights overflow"),
    "lora_dropout": Bound(0, 1, below=True),
    "num_threads data_num_threads": Bound(1, 1024, reason="no machine has more cores"),
    "shuffle_buffer_size": Bound(1, 100_000_000, reason="frames in memory; OpenVLA's largest is 256,000"),
    "cache_gib": Bound(0, 65_536, reason="no machine has more memory"),
}  # fmt: skip
# Flags that need another one to do anything.
EFFECTS = (
    Effect("lora_rank lora_alpha lora_dropout", lambda a: a.use_lora, "--use_lora (all weights are trained)",
           promises=True),
    Effect("wandb_project wandb_mode", lambda a: a.use_wandb, "--use_wandb"),
)  # fmt: skip


def validate(args: Args) -> list[str]:
    """All problems that show without reading a file; each names the value, the rule and the fix."""
    problems = bound_problems(args, BOUNDS) + idle_flags(args, EFFECTS, promises=True)
    if args.warmup_steps >= args.max_steps:
        problems.append(
            f"--warmup_steps {args.warmup_steps} must be below --max_steps {args.max_steps}"
        )
    for flag in ("vla_path", "data_root_dir", "run_root_dir", "output_dir"):
        if getattr(args, flag) is not None:
            problems += path_problems(f"--{flag}", getattr(args, flag))
    if args.run_id_note is not None:
        problems += folder_name_problems("--run_id_note", args.run_id_note, whole=False)
    return problems + _combination_problems(args)


def _combination_problems(args: Args) -> list[str]:
    problems = []
    if args.merge_lora and not args.use_lora:
        problems.append(
            "--merge_lora needs --use_lora: without an adapter the whole model is written anyway"
        )
    if args.save_dtype != "float32" and args.use_lora and not args.merge_lora:
        problems.append(
            f"--save_dtype {args.save_dtype} is of whole models: an adapter is float32 (or add --merge_lora)"
        )
    if args.use_wandb and not args.wandb_project:
        problems.append("--use_wandb needs --wandb_project: there is no default project")
    if args.output_dir and args.run_id_note:
        problems.append(
            "--run_id_note is appended to the default name only: put it into --output_dir"
        )
    if args.device == "cpu" and args.offload:
        problems.append(
            "--offload moves GPU memory to the CPU: it has no meaning with --device cpu"
        )
    try:
        for name, _ in resolve_mixture(args.dataset_name):
            get_transform(name)
    except ValueError as error:
        problems.append(str(error))
    return problems


def check_files(args: Args) -> list[str]:
    """All problems of the folders that the arguments name: model, datasets, run. Reads weights, no records."""
    problems = checkpoint_utils.check_model_dir(args.vla_path)
    problems = problems or checkpoint_utils.check_model_values(args.vla_path)
    problems += check_mixture(args.data_root_dir, args.dataset_name)
    exp_dir = run_dir(args)
    if args.output_dir is None and (root := place_problems("--run_root_dir", exp_dir.parent)):
        return problems + root
    return problems + output_problems(
        "--output_dir",
        exp_dir,
        FINETUNING_RUN,
        inputs=input_folders(args),
        overwrite=args.overwrite,
        instead="choose another --output_dir",
    )


def input_folders(args: Args) -> dict[str, str | None]:
    """Folders that the run reads, by flag: none of them may be removed or written to."""
    return {"vla_path": args.vla_path, "data_root_dir": args.data_root_dir}


def run_dir(args: Args) -> Path:
    """`--output_dir`, or a folder in `--run_root_dir` named as OpenVLA names its runs."""
    if args.output_dir is not None:
        return Path(args.output_dir)
    batch_size = args.per_device_train_batch_size * args.grad_accumulation_steps
    data = args.dataset_name.replace(",", "+").replace(":", "-").replace("/", "-")
    name = f"{hub.model_name(args.vla_path)}+{data}+b{batch_size}+lr-{args.learning_rate}"
    name += f"+lora-r{args.lora_rank}+dropout-{args.lora_dropout}" if args.use_lora else ""
    name += "--image_aug" if args.image_aug else ""
    name += f"--{args.run_id_note}" if args.run_id_note else ""
    return Path(args.run_root_dir) / name


def action_metrics(
    logits_NV: Tensor, label_ids_N: Tensor, tokenizer: ActionTokenizer
) -> dict[str, float]:
    """Token accuracy and L1 error of greedy actions, as sums over samples (`num_samples` of them).

    Greedy over the action tokens, given the demonstrated tokens before (teacher forcing). `action_l1` is the mean
    over the 7 dimensions of |decoded - decoded label|, both bin centres of normalised actions.
    """
    first = int(tokenizer.action_token_ids[0])
    is_action_N = (label_ids_N >= first) & (label_ids_N < tokenizer.vocab_size)
    predicted = logits_NV[is_action_N, first : tokenizer.vocab_size].argmax(-1) + first
    label = label_ids_N[is_action_N]
    centers = [torch.from_numpy(tokenizer.decode(ids.cpu().numpy())) for ids in (predicted, label)]
    num_samples = len(label_ids_N) - len(label)  # one EOS each
    num_dims = len(label) / num_samples
    return {
        "action_token_accuracy": float((predicted == label).sum()) / num_dims,
        "action_l1": float((centers[0] - centers[1]).abs().sum()) / num_dims,
        "num_samples": float(num_samples),
    }


class Finetuner:
    """One rank: model, optimizer, data, and what is logged."""

    def __init__(self, args: Args, info: fsdp_utils.DistInfo) -> None:
        self.args, self.info = args, info
        self.dtype = compute_dtype(args, info.device)
        self.processor = load_processor(args.vla_path)
        self.adapter: Any = None
        torch.manual_seed(args.seed)  # a fresh adapter must be the same on every rank
        self.model = self._build_model()
        torch.manual_seed(args.seed * 1000 + info.rank)
        self.tokenizer = ActionTokenizer.from_config(self.model.config)
        parameters = peft_utils.trainable_parameters(self.model)
        self.optimizer = torch.optim.AdamW(
            parameters, lr=args.learning_rate, weight_decay=args.weight_decay, fused=True
        )
        name = (
            "constant_with_warmup"
            if args.lr_scheduler_type == "constant"
            else args.lr_scheduler_type
        )
        self.scheduler = get_scheduler(name, self.optimizer, args.warmup_steps, args.max_steps)
        self.dataset = build_dataset(args, info, self.processor, self.tokenizer)
        self.sums: dict[str, float] = {}

    def _build_model(self) -> Any:
        args = self.args
        model = load_model(args.vla_path, dtype=torch.float32, device=self.info.device)
        if args.enable_gradient_checkpointing:
            model.recompute_activations()
        if args.use_lora:
            self.adapter = peft_utils.add_lora(
                model, rank=args.lora_rank, alpha=args.lora_alpha, dropout=args.lora_dropout,
                freeze_vision_backbone=args.freeze_vision_backbone, base_name=args.vla_path,
            )  # fmt: skip
        if args.freeze_vision_backbone:
            model.vision_backbone.requires_grad_(False)
        # One rank in float32 has nothing to shard or to cast, and FSDP's bookkeeping costs 0.1 s a step on a CPU.
        if self.info.world_size > 1 or self.dtype != torch.float32 or args.offload:
            reshard = args.sharding_strategy == "full-shard"
            fsdp_utils.shard_model(
                model, param_dtype=self.dtype, offload=args.offload, reshard_after_forward=reshard
            )
        return model.train()

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """Endless collated micro-batches, prepared in a background thread."""
        collator = ActionCollator(
            self.processor.pad_token_id, self.processor.tokenizer.eos_token_id
        )
        return prefetch(
            iterate_batches(self.dataset, self.args.per_device_train_batch_size, collator)
        )

    def step(self, batches: Iterator[dict[str, Tensor]], number: int) -> None:
        """One optimizer step over `grad_accumulation_steps` micro-batches.

        Raises FloatingPointError, on every rank and before the optimizer steps, if loss or gradient is not finite.
        """
        passes = self.args.grad_accumulation_steps
        for index in range(passes):
            start = time.perf_counter()
            batch = next(batches)
            self._add({"data_s": time.perf_counter() - start})
            fsdp_utils.set_gradient_sync(self.model, index == passes - 1)
            self._backward(batch, passes)
        norm = fsdp_utils.clip_gradients(
            peft_utils.trainable_parameters(self.model), self.args.max_grad_norm
        )
        # The norm covers all ranks' gradients, so every rank stops here together.
        if not math.isfinite(norm):
            group = "the adapter" if self.args.use_lora else "the model"
            raise FloatingPointError(
                f"step {number}, rank {self.info.rank}: the gradient norm of {group} is {norm}; lower --learning_rate "
                f"{self.args.learning_rate}, or look at the data"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._add(
            {"grad_norm": norm, "learning_rate": self.scheduler.get_last_lr()[0], "steps": 1.0}
        )
        self.scheduler.step()

    def _backward(self, batch: dict[str, Tensor], passes: int) -> None:
        batch = {
            name: tensor.to(self.info.device, non_blocking=True) for name, tensor in batch.items()
        }
        output = self.model(
            batch["input_ids"],
            batch["attention_mask"],
            self.processor.image_processor.normalize(batch["images"], self.dtype),
            batch["labels"],
            logits_at="labels",
        )
        # Every sample has the same number of labels, so the mean of means is the mean over the whole batch.
        (output.loss / passes).backward()
        metrics = action_metrics(output.logits.detach(), output.label_ids, self.tokenizer)
        self._add({"loss": float(output.loss.detach()) * metrics["num_samples"], **metrics})

    def _add(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def pop_metrics(self, wall_s: float) -> dict[str, float]:
        """Averages over every sample and rank since the last call (a collective)."""
        sums, self.sums = fsdp_utils.all_reduce_sums(self.sums, self.info.device), {}
        num_samples = sums.pop("num_samples")
        metrics = {
            f"train/{n}": sums[n] / num_samples
            for n in ("loss", "action_token_accuracy", "action_l1")
        }
        metrics |= {f"train/{n}": sums[n] / sums["steps"] for n in ("grad_norm", "learning_rate")}
        metrics["time/step_s"] = wall_s * self.info.world_size / sums["steps"]
        metrics["time/data_wait_s"] = sums["data_s"] / sums["steps"]
        metrics["time/samples_per_s"] = num_samples / wall_s
        return metrics

    def save(self, folder: Path, step: int) -> None:
        """Write the model (or adapter) with its statistics, all or nothing. A collective; rank 0 writes."""
        args = self.args
        json_files = {
            "dataset_statistics.json": self.dataset.statistics,
            "metadata.json": metadata(args, step),
        }
        whole = self.adapter is None or args.merge_lora
        if whole:
            merged = fsdp_utils.iterate_merged_parameters(self.model)
            dtype = getattr(torch, args.save_dtype)
            state = {
                name: tensor.to("cpu", dtype) for name, tensor in merged if self.info.rank == 0
            }
            if args.save_dtype != "float32":
                json_files["config.json"] = config_of_type(args)
        else:
            state = fsdp_utils.full_state_dict(self.model, trainable_only=True)
        if self.info.rank == 0 and whole:
            checkpoint_utils.save_model_dir(folder, state, args.vla_path, json_files=json_files)
        elif self.info.rank == 0:
            with checkpoint_utils.atomic_directory(folder) as partial:
                peft_utils.save_adapter(self.adapter, state, partial)
                checkpoint_utils.write_json_files(partial, json_files)
        dist.barrier()


def config_of_type(args: Args) -> dict[str, Any]:
    """The base model's config.json with the type that is written."""
    config = read_json_object(Path(args.vla_path) / "config.json")
    for name in [n for n in ("dtype", "torch_dtype") if n in config] or ["torch_dtype"]:
        config[name] = args.save_dtype
    return config


def compute_dtype(args: Args, device: torch.device) -> torch.dtype:
    """The `--dtype`, or bfloat16 on a GPU and float32 on a CPU."""
    if args.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, args.dtype)


def build_dataset(
    args: Args, info: fsdp_utils.DistInfo, processor: PrismaticProcessor, tokenizer: ActionTokenizer
) -> RLDSDataset:
    """The training mixture of this rank at the model's image size."""
    if info.rank != 0:
        dist.barrier()  # rank 0 computes and caches the statistics first
    specs = load_specs(args.data_root_dir, args.dataset_name, num_threads=args.data_num_threads)
    if info.rank == 0:
        dist.barrier()
    reading = Reading(
        processor.image_processor.image_size,
        rank=info.rank,
        world_size=info.world_size,
        seed=args.seed,
        shuffle_buffer_size=args.shuffle_buffer_size,
        num_threads=args.data_num_threads,
    )
    return RLDSDataset(
        specs,
        reading,
        processor.prompt_ids,
        tokenizer,
        image_aug=args.image_aug,
        cache_gib=args.cache_gib,
    )


def metadata(args: Args, step: int) -> dict[str, Any]:
    """What a checkpoint says about itself."""
    timestamp = datetime.now().astimezone().isoformat(timespec="seconds")
    flags = hub.recorded_flags(dataclasses.asdict(args))
    return {"timestamp": timestamp, "training_step": step, "args": flags}


def progress_line(step: int, args: Args, metrics: dict[str, float], started: float) -> str:
    """One console line: how well, how fast, how long still."""
    left_s = (time.perf_counter() - started) / step * (args.max_steps - step)
    return (
        f"step {step}/{args.max_steps}  loss {metrics['train/loss']:.3f}  "
        f"accuracy {metrics['train/action_token_accuracy']:.3f}  L1 {metrics['train/action_l1']:.4f}  "
        f"{metrics['time/samples_per_s']:.0f} samples/s  ETA {format_duration(left_s)}"
    )


def train(finetuner: Finetuner, exp_dir: Path, writer: MetricWriter | None) -> None:
    """The training loop and the checkpoints on its way."""
    args, batches = finetuner.args, finetuner.batches()
    started = logged = time.perf_counter()
    for step in range(1, args.max_steps + 1):
        finetuner.step(batches, step)
        if step % args.log_freq == 0 or step == args.max_steps:
            now = time.perf_counter()
            metrics = finetuner.pop_metrics(now - logged)
            logged = now
            if writer is not None:
                writer.write(step, metrics)
                logger.info(progress_line(step, args, metrics, started))
        if args.save_freq and step % args.save_freq == 0 and step < args.max_steps:
            finetuner.save(exp_dir / f"step_{step}", step)
    batches.close()  # type: ignore[attr-defined]


def publish(finetuner: Finetuner, exp_dir: Path) -> None:
    """Write the final model into the run's own folder, `config.json` (or the adapter's) last."""
    final = exp_dir / ".final"
    finetuner.save(final, finetuner.args.max_steps)
    if finetuner.info.rank == 0:
        for file in sorted(final.iterdir(), key=lambda f: f.name.endswith("config.json")):
            os.replace(file, exp_dir / file.name)
        final.rmdir()
    dist.barrier()


def prepare_run(args: Args, exp_dir: Path) -> MetricWriter:
    """Make the run's folder (replacing one that `--overwrite` gives up) and its logs."""
    if args.overwrite:
        remove_output("--output_dir", exp_dir, FINETUNING_RUN, input_folders(args))
    exp_dir.mkdir(parents=True, exist_ok=True)
    add_log_file(exp_dir / "log.txt")
    for warning in idle_flags(args, EFFECTS, promises=False):
        logger.warning(warning)
    config = hub.recorded_flags(dataclasses.asdict(args))
    (exp_dir / "args.json").write_text(json.dumps(config, indent=2) + "\n")
    return MetricWriter(
        exp_dir,
        use_wandb=args.use_wandb,
        wandb_project=args.wandb_project,
        wandb_mode=args.wandb_mode,
        config=config,
    )


def main(args: Args) -> Path:
    """Fine-tune and return the run's folder. Raises ValueError with all problems of the arguments at once."""
    problems = validate(args)
    if not problems or not hub.hub_flags(args):  # nothing is downloaded for a line that cannot work
        args = hub.fetch_models(args, {"vla_path": args.revision})
        problems += [problem for problem in check_files(args) if problem not in problems]
    raise_problems(problems)
    if args.num_threads is not None:
        torch.set_num_threads(args.num_threads)
    device_type = None if args.device == "auto" else args.device
    info = fsdp_utils.setup_distributed(device_type=device_type)
    exp_dir = run_dir(args)
    dist.barrier()  # every rank has looked at the run's folder before rank 0 makes it
    writer = prepare_run(args, exp_dir) if info.rank == 0 else None
    finetuner = Finetuner(args, info)
    num_trained = sum(p.numel() for p in peft_utils.trainable_parameters(finetuner.model))
    if writer is not None:
        logger.info(
            f"training {num_trained / 1e6:.2f} M parameters on {info.world_size} rank(s); {exp_dir}"
        )
    train(finetuner, exp_dir, writer)
    publish(finetuner, exp_dir)
    if writer is not None:
        writer.close()
        logger.info(f"done: {exp_dir}")
    return exp_dir


if __name__ == "__main__":
    try:
        main(arguments)
    except CommandLineError as error:
        logger.error("%s", error)
        sys.exit(REFUSED)
