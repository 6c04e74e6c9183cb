"""How long does a complete weight sync take, where does the time go, and does the engine then act on the new weights?

    python benchmarks/gpu_sync.py [--backend ipc] [--cases full lora] [--bucket_mib 256 1024] [--output FILE]
    python benchmarks/gpu_sync.py --size tiny --device cpu

Trainer ranks (FSDP2; float32 masters, or a bf16 base with a LoRA of rank 32) send to a receiver in a process of its
own: on the same GPU (ipc), on another one (nccl), or on the CPU (gloo). Receivers: `discard` reads nothing, `copy`
copies into tensors of its own as an engine must, `vllm` is the real engine. `export` is the trainers' part without a
channel. The limit counts the bytes that must move (masters read, bucket written, read, weights written) over the
device-copy bandwidth measured in this run; over nccl the broadcast's bytes over the copy bandwidth between two GPUs
instead, if that is longer. For `vllm` the log-probs of engine and trainer are compared before and after.
"""

import gc
import json
import os
import statistics
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Literal

import numpy as np
import torch
import tyro
from gpu_common import (
    describe_hardware,
    ensure_model,
    print_table,
    synchronize,
    wall_seconds,
    write_json,
)
from remote import Remote, serve
from torch import nn
from torch.distributed.tensor import DTensor

from prismatic.extern.hf.modeling_prismatic import load_model
from prismatic.extern.hf.processing_prismatic import load_processor
from utils import fsdp_utils, peft_utils
from utils.ray_utils import free_port
from utils.weights.buckets import BucketLayout
from utils.weights.channel import ChannelAddress, ReceivingEnd
from utils.weights.export import WeightExporter
from utils.weights.receiver import engine_info
from utils.weights.sender import WeightSender

INSTRUCTIONS = (
    "pick up the red block",
    "open the drawer",
    "push the bowl to the plate",
    "close the cabinet",
)
COLUMNS = (
    "case", "bucket MiB", "receiver", "GB", "seconds", "GB/s", "limit s", "times limit", "export s", "verified s",
    "first s", "peak GiB",
)  # fmt: skip
AGREEMENT_COLUMNS = ("case", "mean |d log-prob| before", "after", "max after", "actions")


@dataclass
class Args:
    """What to measure."""

    model_dir: str = ""
    """Model folder, made when it does not exist; empty for /dev/shm/vla-SIZE."""
    size: Literal["tiny", "small", "7b"] = "7b"
    """Size of the folder when it has to be made."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Where all of it runs; on CPU the wire's dtype is float32."""
    backend: Literal["auto", "ipc", "nccl", "gloo"] = "auto"
    """auto: ipc with one GPU, nccl with more, gloo on CPU."""
    cases: list[str] = field(default_factory=lambda: ["full", "lora"])
    """full: float32 masters. lora: bf16 base, LoRA of rank 32 on all linear layers."""
    receivers: list[str] = field(default_factory=lambda: ["discard", "copy", "vllm"])
    """Of discard, copy and vllm."""
    bucket_mib: list[int] = field(default_factory=lambda: [256, 1024])
    """Bucket sizes; vllm is measured at each."""
    num_trainers: int = 1
    """FSDP ranks, one GPU each (nccl, gloo)."""
    num_repeats: int = 5
    """Syncs of each kind after the first; medians are reported."""
    lora_rank: int = 32
    """Rank of the lora case."""
    enforce_eager: bool = False
    """No CUDA graphs in the engine: it starts quicker, but does not show that its graphs see the new weights."""
    gpu_memory_utilization: float = 0.3
    """The engine's share of its GPU."""
    output: str = ""
    """JSON file to write."""


# ------------------------------------------------------------------------------------------- receivers


class BareReceiver:
    """A receiver without vLLM, with the calls of an ActionEngine that a sync needs."""

    def __init__(self, device: torch.device, copies: bool) -> None:
        self.device, self.copies = device, copies
        self.weights: dict[str, torch.Tensor] = {}
        self.end: ReceivingEnd | None = None

    def init_weight_transfer(self, backend: str, info: dict[str, Any]) -> None:
        """Join the trainer's channel."""
        self.close()
        layout = BucketLayout.from_dict(info["layout"])
        if self.copies:
            self.weights = {
                n: torch.empty(s, dtype=layout.dtype, device=self.device)
                for n, s in layout.manifest
            }
        (place,) = info["joins"]
        self.end = ReceivingEnd(
            ChannelAddress(**place["address"]), place["rank"], layout, self.device
        )

    def receive_weights(self, version: int) -> Any:
        """Receive a version; returns what came."""
        assert self.end is not None
        return self.end.receive(version, self._load)

    def _load(self, tensors: Any) -> None:
        for name, tensor in tensors:
            if self.copies:
                self.weights[name].copy_(tensor)

    def close(self) -> None:
        """Leave the channel."""
        if self.end is not None:
            self.end.close()
        self.end = None
        self.weights.clear()


def build_receiver(kind: str, args: Args, model_dir: str) -> Any:
    """One of `args.receivers`, in its own process."""
    on_gpu = args.device == "cuda"
    if kind != "vllm":
        return BareReceiver(
            torch.device("cuda", 0) if on_gpu else torch.device("cpu"), kind == "copy"
        )
    from utils.vllm_utils import ActionEngine, EngineConfig

    return ActionEngine(
        EngineConfig(
            model_dir,
            dtype="bfloat16" if on_gpu else "float32",
            enforce_eager=args.enforce_eager or not on_gpu,
            max_num_seqs=len(INSTRUCTIONS),
            gpu_memory_utilization=args.gpu_memory_utilization,
            weight_transfer_backend=args.backend,
        )
    )


def receiver_main(pipe: Connection, kind: str, args: Args, model_dir: str) -> None:
    """Serve calls by name until `close`."""
    receiver = build_receiver(kind, args, model_dir)
    pipe.send(("ready", None))
    serve(pipe, receiver)


# -------------------------------------------------------------------------------------------- trainers


class Trainer:
    """One FSDP rank: the model of a case, its exporter and its sender."""

    def __init__(self, rank: int, args: Args, model_dir: str) -> None:
        self.rank, self.args, self.model_dir = rank, args, model_dir
        # The GPU is the only one this process sees.
        os.environ["LOCAL_RANK"] = "0"
        self.device = fsdp_utils.setup_distributed(device_type=args.device).device
        self.dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
        self.model: Any = None
        self.exporter: Any = None
        self.sender: Any = None

    def build(self, case: str) -> float:
        """Load and shard the model of `case`, changed a little; returns its parameters' bytes on this rank."""
        self.close()
        self.model = self.exporter = self.sender = None
        gc.collect()
        torch.manual_seed(0)
        master = torch.float32 if case == "full" else self.dtype
        model = load_model(self.model_dir, self.dtype, self.device).to(master)
        if case == "lora":
            peft_utils.add_lora(model, rank=self.args.lora_rank)
        self._change(model, case)
        self.model = fsdp_utils.shard_model(model, param_dtype=self.dtype)
        return float(self._held_bytes())

    def _held_bytes(self) -> int:
        """Bytes of this rank's parameters."""
        shards = [p.to_local() if isinstance(p, DTensor) else p for p in self.model.parameters()]
        return sum(shard.numel() * shard.element_size() for shard in shards)

    @torch.no_grad()
    def _change(self, model: nn.Module, case: str) -> None:
        """Move every matrix (full) or every adapter (lora): what an engine of the folder's weights would not know."""
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=2e-3)
            elif case == "full" and parameter.dim() == 2:
                parameter.add_(torch.randn_like(parameter), alpha=0.05 * float(parameter.std()))

    def export_seconds(self, bucket_mib: int) -> float:
        """Plan buckets, and measure filling all of them without a channel."""
        self.exporter = WeightExporter(self.model, self.dtype, bucket_mib << 20)
        buffer = self.exporter.new_buffer()

        def export() -> None:
            for index in range(self.exporter.num_buckets):
                self.exporter.fill(index, buffer)

        return wall_seconds(export, self.args.num_repeats)

    def open(self) -> dict[str, Any] | None:
        """Open a channel for a new receiver."""
        if self.sender is not None:
            self.sender.close()
        self.sender = WeightSender(
            self.exporter, self.args.backend, rank=self.rank, timeout_s=120.0
        )
        return self.sender.open()

    def connect(self) -> None:
        """Wait for the receiver."""
        self.sender.connect()

    def send(self, version: int, verify: bool) -> tuple[float, int]:
        """Send a version; returns seconds until the receiver has loaded it, and its bytes."""
        synchronize()
        start = time.perf_counter()
        report = self.sender.send(version, verify=verify)
        synchronize()
        return time.perf_counter() - start, report.num_bytes

    def peak_gib(self) -> float | None:
        """Most memory beyond what the model itself holds, since the last call."""
        if self.device.type != "cuda":
            return None
        peak = (torch.cuda.max_memory_allocated() - self._held_bytes()) / 2**30
        torch.cuda.reset_peak_memory_stats()
        return peak

    @torch.no_grad()
    def logprobs(self, token_ids: np.ndarray, images: np.ndarray) -> np.ndarray:
        """Return this model's log-probs (B, 7) of action tokens, as the PPO update computes them. A collective."""
        processor = load_processor(self.model_dir)
        ids, mask = processor.collate_prompts(prompts_of(self.model_dir))
        pixels = processor.image_processor.normalize(torch.from_numpy(images), torch.float32)
        tokens = torch.from_numpy(token_ids.copy()).to(self.device)
        logits_BAV = self.model.forward_actions(
            ids.to(self.device),
            mask.to(self.device),
            tokens,
            pixel_values=pixels.to(self.device, self.dtype),
        ).logits_BAV
        chosen = (tokens - self.model.config.first_action_token_id)[..., None]
        return logits_BAV.float().log_softmax(-1).gather(-1, chosen)[..., 0].cpu().numpy()

    def close(self) -> None:
        """Leave the channel."""
        if self.sender is not None:
            self.sender.close()


def trainer_main(pipe: Connection, rank: int, args: Args, model_dir: str) -> None:
    """Serve calls by name until `close`."""
    trainer = Trainer(rank, args, model_dir)
    pipe.send(("ready", None))
    serve(pipe, trainer)


def prompts_of(model_dir: str) -> list[list[int]]:
    """Token ids of the instructions."""
    processor = load_processor(model_dir)
    return [processor.prompt_ids(text) for text in INSTRUCTIONS]


# --------------------------------------------------------------------------------------------- limits


class Bandwidth:
    """Copies on one device and between two, measured before anything else runs."""

    def __init__(self, device: str) -> None:
        self.device = device

    def measure(self) -> dict[str, float | None]:
        """Bytes per second: `device` counts the read and the written bytes of a copy, `peer` those that arrive."""
        size = (1 << 30) if self.device == "cuda" else (1 << 26)
        source = torch.zeros(size, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        result: dict[str, float | None] = {
            "device": 2 * size / wall_seconds(lambda: target.copy_(source)),
            "peer": None,
        }
        if self.device == "cuda" and torch.cuda.device_count() > 1:
            far = torch.empty(size, dtype=torch.uint8, device="cuda:1")
            result["peer"] = size / wall_seconds(lambda: far.copy_(source))
        return result

    def close(self) -> None:
        """Nothing is held."""


def bandwidth_main(pipe: Connection, device: str) -> None:
    """Serve calls by name until `close`."""
    pipe.send(("ready", None))
    serve(pipe, Bandwidth(device))


def limit_seconds(
    receiver: str, master_bytes: float, num_bytes: int, bandwidth: dict[str, Any], backend: str
) -> float:
    """Shortest time of a sync if only memory and wire counted; see the module's docstring."""
    export = master_bytes + num_bytes
    load = 0 if receiver == "discard" else 2 * num_bytes
    if backend == "nccl" and bandwidth["peer"]:
        # Trainer, wire and engine work at the same time, each on its own bytes.
        return max(
            export / bandwidth["device"],
            num_bytes / bandwidth["peer"],
            (num_bytes + load) / bandwidth["device"],
        )
    return (export + load) / bandwidth["device"]


# ------------------------------------------------------------------------------------------------ runs


class Benchmark:
    """The processes of one run and what was measured."""

    def __init__(self, args: Args) -> None:
        self.args = args
        self.model_dir = ensure_model(args.model_dir or f"/dev/shm/vla-{args.size}", args.size)
        if args.device == "cuda":
            torch.cuda.empty_cache()  # a folder is made on the GPU
        self.images = random_images(self.model_dir)
        self.rows: list[dict[str, Any]] = []
        self.agreements: list[dict[str, Any]] = []
        self.version = 0
        self.remotes: list[Remote] = []
        prober = self._remote(bandwidth_main, args.device, gpu=None)
        self.bandwidth = prober.call("measure")
        prober.stop()
        self.receivers: dict[str, Remote] = {}
        self.trainers: list[Remote] = []

    def _remote(self, main: Any, *args: Any, gpu: int | None, **env: str) -> Remote:
        remote = Remote(main, *args, gpu=gpu, **env)
        self.remotes.append(remote)
        remote.answer()
        return remote

    def start(self) -> None:
        """Start the engine (alone on its GPU, whose memory it measures), then the other receivers and trainers."""
        from utils.vllm_utils import engine_env

        args, on_gpu = self.args, self.args.device == "cuda"
        receiver_gpu = (0 if args.backend == "ipc" else args.num_trainers) if on_gpu else None
        for kind in sorted(args.receivers, key=lambda kind: kind != "vllm"):
            start = time.perf_counter()
            env = engine_env(args.device) if kind == "vllm" else {}
            self.receivers[kind] = self._remote(
                receiver_main, kind, args, self.model_dir, gpu=receiver_gpu, **env
            )
            print(f"  receiver {kind}: ready after {time.perf_counter() - start:.1f} s", flush=True)
        address = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "WORLD_SIZE": str(args.num_trainers),
        }
        starting = []
        for rank in range(args.num_trainers):
            gpu = rank if on_gpu else None
            starting.append(
                Remote(trainer_main, rank, args, self.model_dir, gpu=gpu, RANK=str(rank), **address)
            )
        self.remotes += starting
        self.trainers = starting
        for trainer in self.trainers:
            trainer.answer()

    def on_trainers(self, method: str, *args: Any) -> list[Any]:
        """Call `method` on every rank at once."""
        for trainer in self.trainers:
            trainer.start(method, *args)
        return [trainer.answer() for trainer in self.trainers]

    def run(self) -> None:
        """Measure every case with every receiver at every bucket size."""
        self.start()
        for case in self.args.cases:
            start = time.perf_counter()
            master_bytes = max(self.on_trainers("build", case))
            print(f"  trainers, {case}: built in {time.perf_counter() - start:.1f} s", flush=True)
            for bucket_mib in self.args.bucket_mib:
                export_s = max(self.on_trainers("export_seconds", bucket_mib))
                for kind in self.args.receivers:
                    is_first = kind == "vllm" and bucket_mib == self.args.bucket_mib[0]
                    before = self.disagreement() if is_first else None
                    row = {
                        "case": case,
                        "bucket MiB": bucket_mib,
                        "receiver": kind,
                        "export s": export_s,
                    }
                    self.rows.append(row | self.measure(kind, master_bytes))
                    if before is not None:
                        self.agreements.append(
                            {"case": case} | compare(before, self.disagreement())
                        )

    def measure(self, kind: str, master_bytes: float) -> dict[str, Any]:
        """Connect, sync once, `num_repeats` times, and once verified."""
        receiver, args = self.receivers[kind], self.args
        infos = self.on_trainers("open")
        self.on_trainers("peak_gib")
        start = time.perf_counter()
        receiver.start("init_weight_transfer", args.backend, engine_info(infos, args.backend, 0))
        self.on_trainers("connect")
        receiver.answer()
        connect_s = time.perf_counter() - start
        first_s, num_bytes = self.sync(kind, False)
        seconds = statistics.median(self.sync(kind, False)[0] for _ in range(args.num_repeats))
        verified_s, _ = self.sync(kind, True)
        peaks = [peak for peak in self.on_trainers("peak_gib") if peak is not None]
        limit_s = limit_seconds(kind, master_bytes, num_bytes, self.bandwidth, args.backend)
        return {
            "GB": num_bytes / 1e9, "seconds": seconds, "GB/s": num_bytes / 1e9 / seconds, "limit s": limit_s,
            "times limit": seconds / limit_s, "verified s": verified_s, "first s": first_s, "connect s": connect_s,
            "peak GiB": max(peaks, default=None),
        }  # fmt: skip

    def sync(self, kind: str, verify: bool) -> tuple[float, int]:
        """One complete sync: seconds of the slowest rank, bytes; the receiver's report must be this version's."""
        self.version += 1
        self.receivers[kind].start("receive_weights", self.version)
        results = self.on_trainers("send", self.version, verify)
        report = self.receivers[kind].answer()
        assert report.version == self.version and report.num_bytes == results[0][1], report
        assert report.num_verified == (report.num_params if verify else 0), report
        return max(seconds for seconds, _ in results), results[0][1]

    def disagreement(self) -> np.ndarray:
        """|engine's log-probs - trainer's| (B, 7) of actions that the engine samples now."""
        prompts = prompts_of(self.model_dir)
        generation = self.receivers["vllm"].call(
            "generate", prompts, self.images, temperature=1.0, seed=0
        )
        expected = self.on_trainers("logprobs", generation.token_ids, self.images)[0]
        return np.abs(expected - generation.logprobs)

    def close(self) -> None:
        """End every process."""
        for remote in self.remotes:
            remote.stop()


def compare(before: np.ndarray, after: np.ndarray) -> dict[str, Any]:
    """The agreement table's row."""
    means = {"mean |d log-prob| before": float(before.mean()), "after": float(after.mean())}
    return means | {"max after": float(after.max()), "actions": len(after)}


def random_images(model_dir: str) -> np.ndarray:
    """One image of random colours for each instruction (B, H, W, 3)."""
    with open(os.path.join(model_dir, "config.json")) as file:
        size = json.load(file)["image_sizes"][0]
    shape = (len(INSTRUCTIONS), 7, 7, 3)
    coarse = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    return np.ascontiguousarray(
        coarse.repeat(-(-size // 7), 1).repeat(-(-size // 7), 2)[:, :size, :size]
    )


def main(args: Args) -> None:
    """Measure, print two tables and write them."""
    if args.backend == "auto":
        args.backend = (
            "gloo" if args.device == "cpu" else "nccl" if torch.cuda.device_count() > 1 else "ipc"
        )
    benchmark = Benchmark(args)
    try:
        benchmark.run()
    finally:
        benchmark.close()
        speeds = {name: value and value / 1e9 for name, value in benchmark.bandwidth.items()}
        title = f"Weight sync, {args.size}, {args.backend}, {args.num_trainers} trainer(s); {describe_hardware()}"
        copies = ", ".join(f"{name} {value:.0f} GB/s" for name, value in speeds.items() if value)
        print_table(
            f"{title}\ncopies: {copies}",
            COLUMNS,
            [[row[name] for name in COLUMNS] for row in benchmark.rows],
        )
        if benchmark.agreements:
            rows = [[row[name] for name in AGREEMENT_COLUMNS] for row in benchmark.agreements]
            print_table("Engine and trainer, the same actions", AGREEMENT_COLUMNS, rows)
        results = {
            "syncs": benchmark.rows,
            "agreement": benchmark.agreements,
            "copies GB/s": speeds,
        }
        write_json(
            args.output,
            "gpu_sync",
            results | {"backend": args.backend, "num_trainers": args.num_trainers},
        )


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, use_underscores=True))
