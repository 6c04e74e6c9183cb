"""An engine with tensor parallelism 2 on CPUs (gloo) against the Hugging Face model on the same weights."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from prismatic.extern.hf.modeling_prismatic import load_model
from prismatic.extern.hf.processing_prismatic import load_processor
from utils.fsdp_utils import bucketize
from utils.ray_utils import start_ray
from utils.vllm_utils import ActionEngine, EngineConfig, Generation, engine_env

INSTRUCTIONS = ("pick up the red block", "open", "push the blue plate to the left of the zyx table")
TOLERANCE = 1e-4


def logprob_gap(model: Any, processor: Any, prompts: list, images: np.ndarray, generation: Generation) -> float:
    """Largest difference between the engine's and the model's log-probs of the sampled tokens."""
    ids, mask = processor.collate_prompts(prompts)
    tokens = torch.from_numpy(generation.token_ids.copy())
    with torch.no_grad():
        pixels = processor.image_processor.normalize(torch.from_numpy(images))
        logits = model.forward_actions(ids, mask, tokens, pixel_values=pixels).logits_BAV
    index = (tokens - model.config.first_action_token_id)[..., None]
    return float(np.abs((logits / 1.5).log_softmax(-1).gather(-1, index)[..., 0].numpy() - generation.logprobs).max())


@pytest.mark.slow
def test_two_ranks_equal_the_model_before_and_after_an_update(tiny_model_dir: Path) -> None:
    model, processor = load_model(tiny_model_dir), load_processor(tiny_model_dir)
    prompts = [processor.prompt_ids(text) for text in INSTRUCTIONS]
    size = model.config.image_sizes[0]
    images = np.random.default_rng(0).integers(0, 256, (len(prompts), size, size, 3), dtype=np.uint8)
    start_ray(None, num_gpus=0, num_cpu_slots=4)
    # Without entry points, as where the project is on PYTHONPATH only: the workers must find the class all the same.
    env = engine_env("cpu") | {"VLLM_PLUGINS": "none"}
    actor_class = ray.remote(num_cpus=2, runtime_env={"env_vars": env})(ActionEngine)
    engine = actor_class.remote(EngineConfig(str(tiny_model_dir), max_num_seqs=4, tensor_parallel_size=2))
    try:
        old = ray.get(engine.generate.remote(prompts, images, temperature=1.5, seed=3))
        assert logprob_gap(model, processor, prompts, images, old) < TOLERANCE
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * parameter.abs().mean() * torch.randn(parameter.shape))
        weights = [(name, tensor.detach().clone()) for name, tensor in model.state_dict().items()]
        ray.get(engine.update_weights.remote(list(bucketize(weights, 100_000)), 1))
        new = ray.get(engine.generate.remote(prompts, images, temperature=1.5, seed=3))
        assert logprob_gap(model, processor, prompts, images, new) < TOLERANCE
        assert logprob_gap(model, processor, prompts, images, old) > 100 * TOLERANCE
        assert logprob_gap(model, processor, prompts, images[::-1].copy(), new) > 10 * TOLERANCE
        ray.get(engine.close.remote())
    finally:
        ray.shutdown()
