"""Make the base model of the tabletop quick start: it sees and reads, and has never seen one of the ten tasks.

    python vla-scripts/make_base_model.py --output_dir assets/tabletop-base --seed 0

A random tiny OpenVLA policy (vla-scripts/make_tiny_vla.py's) learns to answer questions about single pictures
(ppo/envs/tabletop_pretraining.py) in the action-token format: where a named thing is, how high the gripper is, what it
holds, one step towards a thing. Frames are drawn first, by `--num_workers` processes, and kept in the device's memory.
The command writes a complete model folder and `pretraining.jsonl`, its log: settings, losses, and the answers' accuracy
on frames that were not trained on. A GPU needs minutes; a CPU takes hours.
"""

import json
import math
import multiprocessing
import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from prismatic.extern.hf.tiny_config import TinyVLAConfig

# Small, because the quick start's two cores pay for every token: 16 patches, a prompt of about 15 tokens.
BASE_SIZES = TinyVLAConfig(
    vision_dim=64,
    vision_heads=2,
    llm_dim=128,
    llm_depth=3,
    llm_mlp_dim=384,
    extra_words=("ball", "gripper", "height"),
)
NUM_HELD_OUT = 2048
# Frames of one unit of work; its number and the seed decide what they show.
CHUNK = 512


@dataclass(frozen=True)
class Args:
    """Pre-train a tiny policy on questions about tabletop pictures."""

    output_dir: str
    """Folder to write; it must be empty or not exist."""
    model: TinyVLAConfig = field(default_factory=lambda: BASE_SIZES)
    """Sizes of the policy; the default is the quick start's, about 1.5 million parameters."""
    kinds: tuple[str, ...] = ("point", "move", "height", "hold", "carry")
    """Kinds of questions; each frame has one of each."""
    num_frames: int = 512_000
    """Frames to draw, at least 4096."""
    num_updates: int = 7000
    """Optimizer steps."""
    batch_size: int = 1024
    """Questions per optimizer step."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW (300 steps of warm-up, then a cosine to zero)."""
    weight_decay: float = 0.02
    """Weight decay of AdamW."""
    seed: int = 0
    """Decides the frames and their order; the weights' first values are `--model.seed`'s."""
    num_workers: int = 15
    """Processes that draw frames."""
    max_time_s: float = math.inf
    """Wall-clock limit of the updates in seconds; the learning rate reaches zero then if that comes first."""
    device: str = "auto"
    """Torch device; auto: cuda where there is a GPU, else cpu."""


if __name__ == "__main__":
    # Here, because the imports below take ten seconds, and --help and mistyped flags need none of them.
    arguments = tyro.cli(Args)

import numpy as np
import torch
from torch import Tensor

from ppo.envs.tabletop_pretraining import instructions, make_frame
from prismatic.extern.hf.modeling_prismatic import OpenVLAForActionPrediction, bars_for
from prismatic.extern.hf.processing_prismatic import PrismaticProcessor
from prismatic.extern.hf.tiny_prismatic import build_tiny_vla, validate_tiny
from utils.command_line import (
    REFUSED,
    Bound,
    CommandLineError,
    bound_problems,
    raise_problems,
    repeated_problems,
)
from utils.logging_utils import get_logger
from utils.output_folders import output_problems

logger = get_logger(__name__)


KINDS = Args.kinds
# Every number that a flag takes, with the reason for a limit that its meaning does not set.
BOUNDS: dict[str, Bound] = {
    "num_frames": Bound(1, 10_000_000, reason="all stay in memory"),
    "num_updates": Bound(1, 1e9, reason="optimizer steps"),
    "batch_size": Bound(1, 1_000_000, reason="its activations fill any memory"),
    "learning_rate": Bound(
        0, 1, above=True, reason="AdamW moves every weight by about this much at each step"
    ),
    "weight_decay": Bound(0, 1000, reason="times learning_rate it must stay below 1"),
    "seed": Bound(0, 1e12, reason="a larger one is a slip"),
    "num_workers": Bound(1, 1024, reason="processes"),
    "max_time_s": Bound(0, math.inf, above=True, reason="in seconds"),
}  # fmt: skip


def validate(args: Args) -> None:
    """Raise CommandLineError with everything that cannot work."""
    problems = bound_problems(args, BOUNDS) + output_problems("--output_dir", args.output_dir)
    if args.num_frames // CHUNK * CHUNK <= NUM_HELD_OUT:
        problems.append(
            f"--num_frames {args.num_frames}: {NUM_HELD_OUT} are held out, and they come in {CHUNK}s: use at least "
            f"{NUM_HELD_OUT + CHUNK}"
        )
    if unknown := [kind for kind in args.kinds if kind not in KINDS]:
        problems.append(f"--kinds {' '.join(unknown)}: use some of {' '.join(KINDS)}")
    if not args.kinds:
        problems.append(f"--kinds is empty: give some of {' '.join(KINDS)}")
    problems += repeated_problems("--kinds", args.kinds)
    try:
        validate_tiny(args.model)
    except ValueError as error:
        problems += [f"--model.{line}" for line in str(error).splitlines()]
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", args.device):
        problems.append(f"--device {args.device!r}: use cpu, cuda or cuda:N")
    raise_problems(problems)


@dataclass
class Questions:
    """All frames and their questions on one device; N frames, K questions each, M texts, L prompt tokens, A = 7."""

    image_NHWC: Tensor
    text_NK: Tensor
    answer_NKA: Tensor
    prompt_ML: Tensor
    mask_ML: Tensor


def _draw_chunk(
    job: tuple[int, int, int, tuple[str, ...]],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    seed, chunk, image_size, kinds = job
    rng = np.random.default_rng((seed, chunk))
    frames = [make_frame(rng, image_size, kinds) for _ in range(CHUNK)]
    number = {text: index for index, text in enumerate(instructions())}
    texts = np.array([[number[text] for text in frame.instructions] for frame in frames])
    return (
        np.stack([frame.image for frame in frames]),
        texts,
        np.stack([frame.answers for frame in frames]),
    )


def draw_questions(
    args: Args, model: OpenVLAForActionPrediction, processor: PrismaticProcessor
) -> Questions:
    """Draw all frames in parallel and turn their questions into tokens on the device."""
    jobs = [
        (args.seed, chunk, args.model.image_size, args.kinds)
        for chunk in range(args.num_frames // CHUNK)
    ]
    with multiprocessing.get_context("fork").Pool(args.num_workers) as pool:
        images, texts, answers = zip(*pool.imap(_draw_chunk, jobs), strict=True)
    answer_ids = model.action_tokenizer.encode(np.concatenate(answers))
    arrays = (np.concatenate(images), np.concatenate(texts), answer_ids)
    prompts = processor.collate_prompts([processor.prompt_ids(text) for text in instructions()])
    tensors = [torch.from_numpy(array) for array in arrays]
    return Questions(*(tensor.to(args.device) for tensor in (*tensors, *prompts)))


def answer_logits(
    forward: Callable, processor: PrismaticProcessor, data: Questions, pick: Tensor
) -> Tensor:
    """Logits (B, 7, 256) of the chosen questions; `pick` (B,) counts them frame by frame."""
    num_kinds = data.text_NK.shape[1]
    frame, kind = pick // num_kinds, pick % num_kinds
    pixels = processor.image_processor.normalize(data.image_NHWC[frame])
    text, answer_BA = data.text_NK[frame, kind], data.answer_NKA[frame, kind]
    return forward(
        data.prompt_ML[text], data.mask_ML[text], answer_BA, pixel_values=pixels
    ).logits_BAV


def targets(model: OpenVLAForActionPrediction, data: Questions, pick: Tensor) -> Tensor:
    """Action indices (B, 7) of the chosen questions' answers."""
    num_kinds = data.text_NK.shape[1]
    return data.answer_NKA[pick // num_kinds, pick % num_kinds] - model.config.first_action_token_id


@torch.no_grad()
def held_out_accuracy(
    model: OpenVLAForActionPrediction,
    processor: PrismaticProcessor,
    data: Questions,
    kinds: tuple[str, ...],
) -> dict[str, float]:
    """Per kind of question, the share of held-out answers with all tokens right; of "point", the mean bins off."""
    pick = torch.arange(NUM_HELD_OUT * len(kinds), device=data.answer_NKA.device)
    parts = [
        answer_logits(model.forward_actions, processor, data, part).argmax(-1)
        for part in pick.split(4096)
    ]
    predicted = torch.cat(parts)
    error = (predicted - targets(model, data, pick)).abs()
    result = {}
    for index, kind in enumerate(kinds):
        mine = error[index :: len(kinds)].float()
        value = mine[:, :3].mean() if kind == "point" else (mine.amax(1) == 0).float().mean()
        result[f"held_out/{kind}"] = round(value.item(), 4)
    return result


def train(
    args: Args, model: OpenVLAForActionPrediction, processor: PrismaticProcessor, data: Questions
) -> list[dict]:
    """Train in place; returns the log's rows."""
    on_gpu = args.device == "cuda"
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.98), weight_decay=args.weight_decay, fused=on_gpu
    )
    generator = torch.Generator(device=args.device).manual_seed(args.seed)
    num_questions = data.answer_NKA.shape[0] * len(args.kinds)
    start, rows = time.monotonic(), []
    forward = torch.compile(model.forward_actions) if on_gpu else model.forward_actions
    for update in range(args.num_updates):
        progress = max(update / args.num_updates, (time.monotonic() - start) / args.max_time_s)
        if progress >= 1.0:
            break
        rate = (
            args.learning_rate
            * min(1.0, (update + 1) / 300)
            * 0.5
            * (1.0 + math.cos(math.pi * progress))
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        first = NUM_HELD_OUT * len(args.kinds)
        pick = torch.randint(
            first, num_questions, (args.batch_size,), generator=generator, device=args.device
        )
        logits = answer_logits(forward, processor, data, pick)
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets(model, data, pick).flatten()
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if update % 500 == 499 or update == args.num_updates - 1:
            accuracy = held_out_accuracy(model, processor, data, args.kinds)
            seconds = round(time.monotonic() - start, 1)
            rows.append(
                {
                    "update": update + 1,
                    "loss": round(loss.item(), 5),
                    "seconds": seconds,
                    **accuracy,
                }
            )
            logger.info("%s", rows[-1])
    return rows


def main(args: Args) -> None:
    """Draw, train, save. Raises CommandLineError with all problems of the arguments before anything starts."""
    validate(args)
    if args.device == "auto":
        args = replace(args, device="cuda" if torch.cuda.is_available() else "cpu")
    output_dir = Path(args.output_dir)
    torch.backends.cuda.matmul.allow_tf32 = True
    model, processor = build_tiny_vla(args.model)
    torch.nn.Module.to(model, args.device)
    started = time.monotonic()
    data = draw_questions(args, model, processor)
    draw_s = time.monotonic() - started
    logger.info(
        "%d frames in %.0f s; %d parameters", len(data.image_NHWC), draw_s, model.num_parameters()
    )
    rows = train(args, model, processor, data)
    torch.nn.Module.to(model, "cpu")
    with bars_for(0):
        model.save_pretrained(output_dir)
    processor.save_pretrained(output_dir)
    (output_dir / "dataset_statistics.json").write_text("{}\n")
    settings = {"command": " ".join(sys.argv), "settings": asdict(args), "torch": torch.__version__}
    lines = [json.dumps(row) for row in (settings, *rows)]
    (output_dir / "pretraining.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    try:
        main(arguments)
    except CommandLineError as error:
        logger.error("%s", error)
        sys.exit(REFUSED)
