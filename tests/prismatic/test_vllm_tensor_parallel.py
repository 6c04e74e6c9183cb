"""An engine with tensor parallelism 2 on CPUs (gloo) against the Hugging Face model on the same weights."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from prismatic.extern.hf.modeling_prismatic import load_model
from prismatic.extern.hf.processing_prismatic import load_processor
from tests.weights import send_to_engine
from utils.ray_utils import start_ray
from utils.vllm_utils import ActionEngine, EngineConfig, Generation, engine_env

INSTRUCTIONS = ("pick up the red block", "open", "push the blue plate to the left of the zyx table")


def logprob_gap(
    model: Any, processor: Any, prompts: list, images: np.ndarray, generation: Generation
) -> float:
    """Largest difference between the engine's and the model's log-probs of the sampled tokens."""
    ids, mask = processor.collate_prompts(prompts)
    tokens = torch.from_numpy(generation.token_ids.copy())
    with torch.no_grad():
        pixels = processor.image_processor.normalize(torch.from_numpy(images))
        logits = model.forward_actions(ids, mask, tokens, pixel_values=pixels).logits_BAV
    index = (tokens - model.config.first_action_token_id)[..., None]
    return float(
        np.abs(
            (logits / 1.5).log_softmax(-1).gather(-1, index)[..., 0].numpy() - generation.logprobs
        ).max()
    )


def check_two_ranks(
    tiny_model_dir: Path, device: str, dtype: str, tolerance: float, change: float
) -> None:
    """The engine's log-probs are the model's within `tolerance`, before an update that moves them and after it."""
    model, processor = load_model(tiny_model_dir), load_processor(tiny_model_dir)
    prompts = [processor.prompt_ids(text) for text in INSTRUCTIONS]
    size = model.config.image_sizes[0]
    images = np.random.default_rng(0).integers(
        0, 256, (len(prompts), size, size, 3), dtype=np.uint8
    )
    num_gpus = 2 if device == "cuda" else 0
    start_ray(None, num_gpus=num_gpus, num_cpu_slots=4)
    # Without entry points, as where the project is on PYTHONPATH only: the workers must find the class all the same.
    env = engine_env(device) | {"VLLM_PLUGINS": "none"}
    actor_class = ray.remote(num_cpus=2, num_gpus=num_gpus, runtime_env={"env_vars": env})(
        ActionEngine
    )
    backend = "ipc" if device == "cuda" else "gloo"
    config = EngineConfig(
        str(tiny_model_dir), max_num_seqs=4, tensor_parallel_size=2, dtype=dtype, enforce_eager=device == "cpu",
        gpu_memory_utilization=0.2, weight_transfer_backend=backend,
    )  # fmt: skip
    engine = actor_class.remote(config)
    try:
        old = ray.get(engine.generate.remote(prompts, images, temperature=1.5, seed=3))
        assert logprob_gap(model, processor, prompts, images, old) < tolerance
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(change * parameter.abs().mean() * torch.randn(parameter.shape))
        weights = [
            (name, tensor.detach().to(getattr(torch, dtype)))
            for name, tensor in model.state_dict().items()
        ]
        send_to_engine(engine, weights, 1, backend=backend, num_workers=2)
        new = ray.get(engine.generate.remote(prompts, images, temperature=1.5, seed=3))
        assert logprob_gap(model, processor, prompts, images, new) < tolerance
        assert logprob_gap(model, processor, prompts, images, old) > 5 * tolerance
        assert logprob_gap(model, processor, prompts, images[::-1].copy(), new) > 5 * tolerance
        ray.get(engine.close.remote())
    finally:
        ray.shutdown()


@pytest.mark.slow
def test_two_ranks_equal_the_model_before_and_after_an_update(tiny_model_dir: Path) -> None:
    check_two_ranks(tiny_model_dir, "cpu", "float32", 1e-4, change=0.2)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
def test_two_gpus_equal_the_model_before_and_after_an_update(tiny_model_dir: Path) -> None:
    check_two_ranks(tiny_model_dir, "cuda", "bfloat16", 0.05, change=1.0)
