"""The engine on a GPU: compiled ViTs, CUDA graphs, the V2 model runner, and sleeping; in a Ray actor of its own."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from prismatic.extern.hf.modeling_prismatic import load_model
from prismatic.extern.hf.processing_prismatic import PrismaticProcessor, load_processor
from tests.weights import send_to_engine
from utils.ray_utils import start_ray
from utils.vllm_utils import ActionEngine, EngineConfig, Generation, engine_env

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs an NVIDIA GPU: there is none here"
    ),
]
INSTRUCTIONS = (
    "pick up the red block",
    "open",
    "push the blue plate to the left of the zyx table",
) * 4
# bfloat16 on both sides with different kernels; a policy of this size has logits of about one.
TOLERANCE = 0.05


class GpuEngineActor(ActionEngine):
    """An engine that also tells how much of the GPU is in use."""

    def used_bytes(self) -> int:
        free, total = torch.cuda.mem_get_info()
        return total - free


@pytest.fixture(scope="module")
def engine(tiny_model_dir: Path) -> Iterator[Any]:
    start_ray(None, num_gpus=1, num_cpu_slots=4)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    actor_class = ray.remote(num_gpus=1, runtime_env={"env_vars": engine_env("cuda")})(
        GpuEngineActor
    )
    config = EngineConfig(
        str(tiny_model_dir),
        dtype="bfloat16",
        enforce_eager=False,
        weight_transfer_backend="ipc",
        max_num_seqs=12,
        enable_sleep_mode=True,
        kv_cache_memory_bytes=1 << 30,
    )
    actor = actor_class.remote(config)
    yield actor
    ray.get(actor.close.remote())
    ray.shutdown()


@pytest.fixture(scope="module")
def processor(tiny_model_dir: Path) -> PrismaticProcessor:
    return load_processor(tiny_model_dir)


@pytest.fixture(scope="module")
def inputs(processor: PrismaticProcessor) -> tuple[list[list[int]], np.ndarray]:
    size = processor.image_processor.image_size[0]
    images = np.random.default_rng(0).integers(
        0, 256, (len(INSTRUCTIONS), size, size, 3), dtype=np.uint8
    )
    return [processor.prompt_ids(text) for text in INSTRUCTIONS], images


def logprob_gap(
    model: Any, processor: PrismaticProcessor, inputs: Any, generation: Generation, T: float
) -> float:
    """Largest difference between the engine's log-probs and the float32 model's, over all tokens."""
    prompts, images = inputs
    ids, mask = processor.collate_prompts(prompts)
    pixels = processor.image_processor.normalize(torch.from_numpy(images))
    tokens = torch.from_numpy(generation.token_ids.copy())
    with torch.no_grad():
        logits = model.forward_actions(ids, mask, tokens, pixel_values=pixels).logits_BAV
    first = model.config.first_action_token_id
    logprobs = (logits / T).log_softmax(-1).gather(-1, (tokens - first)[..., None])[..., 0]
    return float(np.abs(logprobs.numpy() - generation.logprobs).max())


def generate(engine: Any, inputs: Any, **kwargs: Any) -> Generation:
    return ray.get(engine.generate.remote(*inputs, **kwargs))


@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_engine_equals_the_model(engine, processor, inputs, tiny_model_dir, temperature) -> None:
    model = load_model(tiny_model_dir)
    generation = generate(engine, inputs, temperature=temperature)
    indices = generation.token_ids - model.config.first_action_token_id
    assert indices.min() >= 0 and indices.max() < 256 and len(np.unique(indices)) > 20
    assert logprob_gap(model, processor, inputs, generation, temperature) < TOLERANCE
    assert logprob_gap(model, processor, inputs, generation, 3 * temperature) > 5 * TOLERANCE


@pytest.mark.parametrize("size", [1, 2, 3, 5, 12])
def test_every_batch_size_is_right(engine, processor, inputs, tiny_model_dir, size) -> None:
    """One image takes a path of its own; other sizes are padded to a recorded graph."""
    part = (inputs[0][:size], inputs[1][:size])
    generation = generate(engine, part, temperature=1.0)
    assert logprob_gap(load_model(tiny_model_dir), processor, part, generation, 1.0) < TOLERANCE


def test_seeds_repeat(engine, inputs) -> None:
    first, again, other = (
        generate(engine, inputs, temperature=1.5, seed=seed) for seed in (5, 5, 6)
    )
    np.testing.assert_array_equal(first.token_ids, again.token_ids)
    assert (first.token_ids != other.token_ids).mean() > 0.5


def test_samples_follow_the_reported_probabilities(engine, inputs) -> None:
    prompts, images = inputs
    num = 400
    generation = generate(
        engine, ([prompts[0]] * num, images[:1].repeat(num, axis=0)), temperature=0.1
    )
    tokens, rows, counts = np.unique(
        generation.token_ids[:, 0], return_inverse=True, return_counts=True
    )
    probabilities = np.bincount(rows, np.exp(generation.logprobs[:, 0])) / counts
    assert len(tokens) > 1 and probabilities.sum() < 1.05
    deviation = np.sqrt(probabilities * (1 - probabilities) / num)
    assert (np.abs(counts / num - probabilities) < 5 * deviation + 0.01).all()


@pytest.mark.parametrize("round_trip", [1, 2])
def test_sleep_gives_memory_back_and_new_weights_wake_up(
    engine, processor, inputs, tiny_model_dir, round_trip
) -> None:
    """Level 2 drops all weights and buffers; those that are no weights (rotary, pixel statistics) must come back."""
    model = load_model(tiny_model_dir)
    generator = torch.Generator().manual_seed(round_trip)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(
                0.2 * parameter.abs().mean() * torch.randn(parameter.shape, generator=generator)
            )
    old = generate(engine, inputs, temperature=1.0)
    awake = ray.get(engine.used_bytes.remote())
    ray.get(engine.sleep.remote(2))
    asleep = ray.get(engine.used_bytes.remote())
    assert awake - asleep > 0.9 * (1 << 30)  # the KV cache at least
    ray.get(engine.wake_up.remote(["weights"]))
    weights = [(name, tensor.detach().clone()) for name, tensor in model.state_dict().items()]
    send_to_engine(engine, weights, round_trip, backend="ipc", bucket_bytes=1 << 20)
    ray.get(engine.wake_up.remote(["kv_cache"]))
    new = generate(engine, inputs, temperature=1.0)
    assert logprob_gap(model, processor, inputs, new, 1.0) < TOLERANCE
    assert (
        logprob_gap(model, processor, inputs, old, 1.0) > 5 * TOLERANCE
    )  # the old weights are far
