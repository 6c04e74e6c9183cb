"""PPO updates of OpenVLA-7B: samples/s, model FLOPs utilisation, peak memory, and where the time goes.

    python benchmarks/gpu_update.py [--cases lora lora-compile] [--micros 16 32] [--profile] [--output FILE]
    torchrun --nproc_per_node 2 benchmarks/gpu_update.py --cases full-budget --minibatch 128 --num_samples 256
    python benchmarks/gpu_update.py --size tiny --device cpu          the same code without a GPU

Every case builds the real thing (random weights made on the GPU, LoRA, FSDP, fused AdamW, the shared critic) and
calls `PPOLearner.update` on a synthetic rollout once to warm up and once for the figures. The ceiling is a matrix
product in the same run. Under torchrun every rank trains on samples of its own; sizes, memory and MFU are a GPU's,
samples/s and tokens/s those of all together.

FLOPs counted, two for a multiply-add, over real tokens only: a forward pass is 2 N for each token of vision,
projector, prompt and six fed actions, plus attention (causal half) and the 256 action logits. The policy phase counts
forward + dgrad, + wgrad where the base weights train (4 N with LoRA, 6 N full); attention's backward is twice its
forward; a frozen vision backbone and the projector before it count no backward, cached features no forward either.
Recomputation and the adapter's own products count nothing. The prepare phase counts one forward, vision included.
"""

import gc
import itertools
import os
import time
import traceback
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from types import SimpleNamespace
from typing import Any, Literal

# A full 7B leaves little room for holes between blocks of memory; read when CUDA starts.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
import torch.distributed as dist
import tyro
from gpu_common import (
    ModelFlops,
    describe_hardware,
    device_seconds,
    matmul_ceiling,
    model_flops,
    print_table,
    synchronize,
    write_json,
)
from peft.tuners.lora.layer import Linear as PeftLoraLinear

from ppo.critic import ValueHead
from ppo.learner import PPOLearner, Trainable
from ppo.rollout import Rollout
from prismatic.extern.hf.modeling_prismatic import OpenVLAForActionPrediction
from prismatic.extern.hf.processing_prismatic import PrismaticImageProcessor, PrismaticProcessor
from prismatic.extern.hf.random_prismatic import (
    build_llama_sized_tokenizer,
    openvla_7b_config,
    random_tensor,
)
from prismatic.extern.hf.tiny_prismatic import MEANS, STDS, TinyVLAConfig, build_tiny_vla
from utils import fsdp_utils, peft_utils
from utils.logging_utils import PhaseTimer
from utils.lora_linear import FusedLoraLinear

# With Llama's tokenizer these and OpenVLA's template are 30 to 40 tokens.
INSTRUCTIONS = (
    "pick up the red block",
    "pick up the black bowl between the plate and the ramekin and place it on the plate",
    "open the top drawer and put the bowl inside it",
)
NUM_ACTION_TOKENS = 7


@dataclass(frozen=True)
class Case:
    """One way to train, at several micro-batch sizes."""

    kind: Literal["lora", "full"]
    micros: tuple[int, ...]
    freeze_vision: bool = False
    compile: bool = False
    checkpointing: bool = False
    zero: Literal[2, 3] = 2
    peft_forward: bool = False
    budgets: tuple[float, ...] = (1.0,)
    """Shares of the compiled blocks' activations that are kept, tried at every micro-batch size."""


CASES = {
    "lora-frozen": Case("lora", (8, 16, 32, 64), freeze_vision=True),
    "lora-frozen-peft": Case("lora", (32,), freeze_vision=True, peft_forward=True),
    "lora-frozen-compile": Case("lora", (32, 64), freeze_vision=True, compile=True),
    "lora": Case("lora", (16, 32)),
    "lora-compile": Case("lora", (32, 64), compile=True),
    "lora-ckpt": Case("lora", (64,), checkpointing=True),
    "full": Case("full", (8, 16), zero=3),
    "full-compile": Case("full", (16,), zero=3, compile=True),
    "full-ckpt": Case("full", (16, 32), checkpointing=True),
    "full-ckpt-compile": Case("full", (32,), checkpointing=True, compile=True),
    "full-budget": Case("full", (16, 32), zero=3, compile=True, budgets=(0.4, 0.2)),
}
COLUMNS = (
    "case", "micro", "budget", "samples/s", "tokens/s", "TFLOP/sample", "attention %", "MFU policy", "MFU all",
    "peak GiB", "prepare s", "value s", "policy s", "optimizer s",
)  # fmt: skip


@dataclass
class Args:
    """What to measure."""

    cases: list[str] = field(default_factory=lambda: list(CASES))
    """Names of CASES."""
    micros: list[int] = field(default_factory=list)
    """Micro-batch sizes instead of each case's own."""
    budgets: list[float] = field(default_factory=list)
    """Memory budgets instead of each case's own, largest first."""
    num_samples: int = 128
    """Samples of the measured update."""
    minibatch: int = 64
    """Samples per optimizer step."""
    size: Literal["7b", "tiny"] = "7b"
    """Model."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Where."""
    lora_rank: int = 32
    """Rank of the LoRA cases."""
    profile: bool = False
    """Print the kernels of one more update of each case's last micro-batch size."""
    output: str = ""
    """JSON file for the results."""


class SyncedTimer(PhaseTimer):
    """Phases that end when the device is done with them."""

    def phase(self, name: str) -> Any:
        """Time the block under `name`, the device idle before and after."""
        synchronize()
        return _Synced(super().phase(name))


class _Synced:
    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __enter__(self) -> None:
        self.inner.__enter__()

    def __exit__(self, *error: Any) -> Any:
        if error[0] is None:
            synchronize()
        return self.inner.__exit__(*error)


class TimedLearner(PPOLearner):
    """A PPOLearner that also times its optimizer steps (they are part of the value and policy phases)."""

    def _optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        with self.timer.phase("optimizer"):
            super()._optimizer_step(*args, **kwargs)


def build_model(
    size: str, device: torch.device, dtype: torch.dtype
) -> tuple[Any, PrismaticProcessor]:
    """An OpenVLA of `size` with random weights, made on `device` in `dtype` without a file, and its processor."""
    if size == "7b":
        config, image_processor = openvla_7b_config(), PrismaticImageProcessor(
            use_fused_vision_backbone=True, image_resize_strategy="resize-naive", input_sizes=[[3, 224, 224]] * 2,
            interpolations=["bicubic"] * 2, means=MEANS, stds=STDS,
        )  # fmt: skip
        processor = PrismaticProcessor(image_processor, build_llama_sized_tokenizer())
    else:
        tiny, processor = build_tiny_vla(TinyVLAConfig())
        config = tiny.config
    with torch.device("meta"):
        model = OpenVLAForActionPrediction(config)
    model = model.to(dtype).to_empty(device=device)
    generator, num_layers = (
        torch.Generator(device).manual_seed(0),
        config.text_config.num_hidden_layers,
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(random_tensor(name, tuple(parameter.shape), generator, num_layers))
    # Its buffers are not in the weights: made anew, with their values and in float32.
    decoder = model.language_model.model
    decoder.rotary_emb = type(decoder.rotary_emb)(config=decoder.config).to(device)
    others = [name for name, _ in model.named_buffers() if "rotary_emb" not in name]
    assert not others, f"buffers without values: {others}"
    return model, processor


def build_learner(case: Case, args: Args) -> PPOLearner:
    """Policy, critic and optimizers as the driver builds them."""
    device = (
        torch.device(args.device, torch.cuda.current_device())
        if args.device == "cuda"
        else torch.device("cpu")
    )
    compute = torch.bfloat16 if args.device == "cuda" else torch.float32
    torch.manual_seed(0)
    model, processor = build_model(
        args.size, device, compute if case.kind == "lora" else torch.float32
    )
    model.eval()
    if case.checkpointing:
        model.recompute_activations()
    if case.kind == "lora":
        peft_utils.add_lora(model, rank=args.lora_rank, freeze_vision_backbone=case.freeze_vision)
    if case.peft_forward:
        for module in model.modules():
            if isinstance(module, FusedLoraLinear):
                module.__class__ = PeftLoraLinear
    if case.freeze_vision:
        model.vision_backbone.requires_grad_(False)
    fsdp_utils.cast_frozen(model, compute)
    hidden_size = model.config.text_config.hidden_size

    def trainable(module: torch.nn.Module, dtype: torch.dtype, learning_rate: float) -> Trainable:
        module = fsdp_utils.shard_model(
            module, param_dtype=dtype, reshard_after_forward=case.zero == 3
        )
        parameters = peft_utils.trainable_parameters(module)
        optimizer = torch.optim.AdamW(
            parameters, lr=learning_rate, weight_decay=0.0, fused=args.device == "cuda"
        )
        return Trainable(module, parameters, optimizer, lambda place: learning_rate)

    policy = trainable(model, compute, 1e-6)
    if case.compile:
        fsdp_utils.compile_blocks(policy.model)
    critic = trainable(ValueHead(hidden_size).to(device), torch.float32, 1e-4)
    learner = TimedLearner(update_flags(case, args), policy, critic, processor, dtype=compute)
    learner.timer = SyncedTimer()
    return learner


def update_flags(case: Case, args: Args) -> SimpleNamespace:
    """The flags that the update reads."""
    return SimpleNamespace(
        seed=0, temperature=1.0, num_epochs=1, num_value_epochs=None, local_mini_batch_size=args.minibatch,
        per_device_train_batch_size=args.minibatch, per_device_forward_batch_size=None, max_grad_norm=1.0,
        cliprange=0.2, cliprange_high=None, ratio_level="action", gamma=0.99, lam=0.95, norm_adv=True,
        bootstrap_truncated=True, entropy_coef=0.0, beta=0.0, max_approx_kl=None, old_logprobs="recompute",
        value_model_type="shared", value_init_steps=0, cliprange_value=0.2, vf_coef=1.0,
        freeze_vision_backbone=case.freeze_vision, compile=case.compile, async_depth=0, importance_weight_cap=2.0,
        sharding_strategy="full-shard" if case.zero == 3 else "shard-grad-op", offload=False,
        enable_gradient_checkpointing=case.checkpointing,
    )  # fmt: skip


def make_rollout(learner: PPOLearner, num_samples: int) -> Rollout:
    """`num_samples` steps of one environment: random images, actions and rewards, prompts of several lengths."""
    size, first = learner.processor.image_processor.image_size, learner.first_action_id
    shape, generator = (num_samples, 1), torch.Generator().manual_seed(learner.rank)
    images = torch.randint(0, 256, (*shape, *size, 3), dtype=torch.uint8, generator=generator)
    empty = torch.zeros(0, dtype=torch.long)
    return Rollout(
        prompts=[learner.processor.prompt_ids(text) for text in INSTRUCTIONS],
        images_TBHWC=images,
        action_ids_TBA=torch.randint(
            first, first + 256, (*shape, NUM_ACTION_TOKENS), generator=generator
        ),
        logprob_TBA=torch.full((*shape, NUM_ACTION_TOKENS), -5.5),
        reward_TB=torch.rand(shape, generator=generator),
        terminated_TB=torch.zeros(shape, dtype=torch.bool),
        truncated_TB=torch.zeros(shape, dtype=torch.bool),
        task_id_TB=torch.randint(0, len(INSTRUCTIONS), shape, generator=generator),
        valid_TB=torch.ones(shape, dtype=torch.bool),
        last_images_BHWC=images[-1],
        last_task_id_B=torch.zeros(1, dtype=torch.long),
        episode_step_B=torch.zeros(1, dtype=torch.long),
        final_images_KHWC=images[:0, 0],
        final_t_K=empty,
        final_b_K=empty,
    )


@dataclass(frozen=True)
class Work:
    """FLOPs of one sample."""

    prepare: float
    policy: float
    attention: float  # part of `policy`
    tokens: float


def count_work(case: Case, flops: ModelFlops, lengths: list[int]) -> Work:
    """Average over prompts of `lengths` tokens; see the module's docstring."""
    totals = [0.0] * 4
    for length in lengths:
        tokens = flops.num_patches + length + NUM_ACTION_TOKENS - 1
        linear, head = tokens * flops.llm_token, NUM_ACTION_TOKENS * flops.head_token
        attention = flops.sequence(0, tokens) - linear
        passes = 2 if case.kind == "lora" else 3
        policy = passes * (linear + head) + 3 * attention
        if case.freeze_vision:
            policy += flops.projector * (1 if case.kind == "lora" else 2)
        else:
            policy += passes * (flops.projector + flops.vision)
        sample = (flops.action(length), policy, 3 * attention, tokens)
        totals = [total + value / len(lengths) for total, value in zip(totals, sample, strict=True)]
    return Work(*totals)


def measure(
    learner: PPOLearner, case: Case, micro: int, args: Args, ceiling: float, flops: ModelFlops
) -> dict:
    """One row: an update to warm up (of one minibatch), then one that counts."""
    learner.micro_batch_size = micro
    learner.update(make_rollout(learner, args.minibatch), step=1)
    rollout = make_rollout(learner, args.num_samples)
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    synchronize()
    start = time.perf_counter()
    metrics = learner.update(rollout, step=2)
    synchronize()
    seconds = time.perf_counter() - start
    lengths = [len(rollout.prompts[i]) for i in rollout.task_id_TB.flatten().tolist()]
    work, num, ranks = count_work(case, flops, lengths), args.num_samples, learner.world_size
    policy_s = metrics["time/trainer_policy_s"] or 0.0
    return {
        "micro": micro,
        "samples/s": ranks * num / seconds,
        "tokens/s": ranks * num * work.tokens / seconds,
        "TFLOP/sample": (work.prepare + work.policy) / 1e12,
        "attention %": 100 * work.attention / work.policy,
        "MFU policy": num * work.policy / policy_s / ceiling,
        "MFU all": num * (work.prepare + work.policy) / seconds / ceiling,
        "peak GiB": torch.cuda.max_memory_allocated() / 2**30 if args.device == "cuda" else None,
        **{
            f"{n} s": metrics[f"time/trainer_{n}_s"]
            for n in ("prepare", "value", "policy", "optimizer")
        },
    }


def run_case(name: str, args: Args, ceiling: float, flops: ModelFlops) -> Iterator[dict]:
    """Rows of one case; an out-of-memory error is a row, and ends the case (larger micro-batches would fail too)."""
    case = CASES[name]
    micros = args.micros or list(case.micros)
    if args.device == "cpu":
        micros = [4]
    micro, learner = micros[0], None
    try:
        start = time.perf_counter()
        learner = build_learner(case, args)
        print(f"  {name}: built in {time.perf_counter() - start:.1f} s", flush=True)
        for micro, budget in itertools.product(micros, args.budgets or case.budgets):
            if case.compile:
                torch._dynamo.reset()  # else the second size is compiled with a symbolic batch
                torch._functorch.config.activation_memory_budget = budget
            yield {
                "case": name,
                "budget": budget,
                **measure(learner, case, micro, args, ceiling, flops),
            }
        if args.profile:
            profile(learner, args)
    except torch.OutOfMemoryError as error:
        end_if_others_wait(error)
        yield {"case": name, "micro": micro, "samples/s": "out of memory"}
        print(f"  {name} {micro}: {str(error).splitlines()[0][:200]}")
    except (
        Exception
    ) as error:  # a run on a lent GPU goes on with the next case, whatever this one met
        end_if_others_wait(error)
        traceback.print_exc()
        yield {"case": name, "micro": micro, "samples/s": type(error).__name__}


def end_if_others_wait(error: Exception) -> None:
    """Let torchrun end the run where other ranks would wait for this one for ever."""
    if dist.get_world_size() > 1:
        raise error


CATEGORIES = (
    ("attention", ("flash", "fmha", "attention", "cudnn_generated")),
    (
        "matrix products",
        ("gemm", "nvjet", "cutlass", "xmma", "sm90_", "splitk", "addmm", "aten::mm", "bmm"),
    ),
    ("compiled pointwise", ("triton",)),
    ("optimizer and foreach", ("multi_tensor", "adam")),
    ("reductions", ("reduce", "norm")),
    ("copies and casts", ("memcpy", "memset", "copy", "cat")),
    ("elementwise", ("elementwise", "vectorized")),
)


def profile(learner: PPOLearner, args: Args) -> None:
    """Print the 25 costliest kernels of one update (one minibatch) and the sum by category."""
    on_gpu = args.device == "cuda"
    activities = [
        torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    ]
    rollout = make_rollout(learner, args.minibatch)
    with torch.profiler.profile(activities=activities) as profiler:
        learner.update(rollout, step=3)
        synchronize()
    events = [(e.key, e.self_device_time_total if on_gpu else e.self_cpu_time_total, e.count)
              for e in profiler.key_averages()]  # fmt: skip
    events.sort(key=lambda event: -event[1])
    if learner.rank:
        return
    total = sum(microseconds for _, microseconds, _ in events)
    sums: dict[str, float] = defaultdict(float)
    for name, microseconds, _ in events:
        lowered = name.lower()
        sums[next((c for c, words in CATEGORIES if any(w in lowered for w in words)), "other")] += (
            microseconds
        )
    rows = [(name[:110], us / 1e3, 100 * us / total, count) for name, us, count in events[:25]]
    print_table(
        "kernels of one minibatch, prepare included",
        ("kernel", "ms", "%", "calls"),
        rows,
        width=160,
    )
    categories = sorted(sums.items(), key=lambda item: -item[1])
    print_table(
        "by category",
        ("category", "ms", "%"),
        [(c, us / 1e3, 100 * us / total) for c, us in categories],
    )


def shape_ceilings(num_tokens: int = 9440) -> dict[str, float]:
    """FLOP/s of the products of a micro-batch of 32 of the 7B, forward; the model cannot be faster than these."""
    rates = {}
    for name, (columns, inner) in {
        "q k v o": (4096, 4096),
        "gate up": (11008, 4096),
        "down": (4096, 11008),
    }.items():
        left = torch.randn(num_tokens, inner, device="cuda", dtype=torch.bfloat16)
        right = torch.randn(columns, inner, device="cuda", dtype=torch.bfloat16)

        def product(left: torch.Tensor = left, right: torch.Tensor = right) -> torch.Tensor:
            return left @ right.T

        rates[name] = 2.0 * num_tokens * columns * inner / device_seconds(product, 20, 5)
    return rates


def main(args: Args) -> None:
    """Measure every case and print one table."""
    begin = time.perf_counter()
    info = fsdp_utils.setup_distributed(timeout_s=300.0, device_type=args.device)
    if args.device == "cpu":
        args.num_samples, args.minibatch = 16, 8
    # With every GPU at work, as in the update: they may share a power limit.
    ceiling = (
        fsdp_utils.all_reduce_sums({"": matmul_ceiling(args.device)}, info.device)[""]
        / info.world_size
    )
    shapes = shape_ceilings() if args.device == "cuda" else {}
    config = openvla_7b_config() if args.size == "7b" else build_tiny_vla(TinyVLAConfig())[0].config
    flops = model_flops(config)
    rows: list[dict] = []
    for name in args.cases:
        for row in run_case(name, args, ceiling, flops):
            if info.rank:
                continue
            rows.append(row)
            print(f"{time.perf_counter() - begin:6.1f} s  {row}", flush=True)
            results = {
                "ceiling": ceiling,
                "shapes": shapes,
                "cases": {n: asdict(c) for n, c in CASES.items()},
            }
            write_json(args.output, "gpu_update", {**results, "rows": rows})
        gc.collect()
        torch._dynamo.reset()
        if args.device == "cuda":
            torch.cuda.empty_cache()
    if info.rank:
        return
    title = f"PPO update, {args.size}, {info.world_size} rank(s), {describe_hardware()}"
    title += f"\nmatrix product ceiling {ceiling / 1e12:.1f} TFLOP/s"
    title += "".join(f"; {name} {rate / 1e12:.0f}" for name, rate in shapes.items())
    print_table(title, COLUMNS, [[row.get(c) for c in COLUMNS] for row in rows], width=170)


if __name__ == "__main__":
    main(tyro.cli(Args, use_underscores=True))
