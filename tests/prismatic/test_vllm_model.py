"""The vLLM model and its engine against the Hugging Face model on the same weights: one engine, in a Ray actor."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from prismatic.extern.hf.modeling_prismatic import load_model
from prismatic.extern.hf.processing_prismatic import PrismaticProcessor, load_processor
from tests.weights import send_to_engine
from utils.fsdp_utils import iterate_merged_parameters
from utils.ray_utils import start_ray
from utils.vllm_utils import ActionEngine, EngineConfig, Generation, engine_env
from utils.weights.receiver import WeightUpdateError

INSTRUCTIONS = (
    "pick up the red block",
    "open",
    "push the blue plate to the left of the zyx table and then put the bowl on it",
    "put the mug on the plate",
) * 2
TOLERANCE = 1e-4


class EngineActor(ActionEngine):
    """An engine with what a Ray actor cannot expose itself."""

    def version(self) -> int:
        return self.policy_version

    def generate_stock(self, prompt_ids: list[list[int]], images: np.ndarray) -> list[list[int]]:
        """Greedy tokens by vLLM's usual input, through the class's own processor."""
        prompts = [
            {"prompt_token_ids": ids, "multi_modal_data": {"image": image}}
            for ids, image in zip(prompt_ids, images, strict=True)
        ]
        params = self._sampling_params(1, 1.0, True, None)[0]
        return [
            list(output.outputs[0].token_ids)
            for output in self._llm.generate(prompts, params, use_tqdm=False)
        ]

    def logits_of_ranks(self, hidden: Tensor, head: Tensor, starts: list[int]) -> list[Tensor]:
        """What each tensor-parallel rank adds to the logits when the head's rows are split at `starts`."""
        from types import SimpleNamespace

        from prismatic.extern.vllm import openvla

        parts = []
        for start, end in zip(starts, [*starts[1:], len(head)], strict=True):
            shard = SimpleNamespace(org_vocab_start_index=start, org_vocab_end_index=end)
            lm_head = SimpleNamespace(shard_indices=shard, weight=head[start:end])
            rank: Any = SimpleNamespace(
                config=self._model_config, language_model=SimpleNamespace(lm_head=lm_head)
            )
            parts.append(openvla.OpenVLAForActionPrediction.compute_logits(rank, hidden))
        return parts


@pytest.fixture(scope="module")
def model_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with pixel statistics that differ from `means` and `stds`, as openvla-7b's file has them."""
    folder = shutil.copytree(tiny_model_dir, tmp_path_factory.mktemp("engine") / "model")
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    settings["tvf_normalize_params"] = [
        {"inplace": False, "mean": [0.4, 0.45, 0.5], "std": [0.3, 0.2, 0.25]},
        {"inplace": False, "mean": [0.55, 0.6, 0.5], "std": [0.5, 0.4, 0.6]},
    ]
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def engine(model_dir: Path) -> Iterator[Any]:
    start_ray(None, num_gpus=0, num_cpu_slots=4)
    ray.cloudpickle.register_pickle_by_value(
        sys.modules[__name__]
    )  # Ray's workers cannot import this module
    actor_class = ray.remote(num_cpus=1, runtime_env={"env_vars": engine_env("cpu")})(EngineActor)
    actor = actor_class.remote(
        EngineConfig(str(model_dir), max_num_seqs=8, weight_transfer_backend="gloo")
    )
    yield actor
    ray.get(actor.close.remote())
    ray.shutdown()


@pytest.fixture(scope="module")
def processor(model_dir: Path) -> PrismaticProcessor:
    return load_processor(model_dir)


@pytest.fixture(scope="module")
def prompts(processor: PrismaticProcessor) -> list[list[int]]:
    ids = [processor.prompt_ids(text) for text in INSTRUCTIONS]
    assert len({len(row) for row in ids}) >= 3  # several lengths in one batch
    return ids


@pytest.fixture(scope="module")
def images(model_dir: Path) -> np.ndarray:
    size = load_model(model_dir).config.image_sizes[0]
    return np.random.default_rng(0).integers(
        0, 256, (len(INSTRUCTIONS), size, size, 3), dtype=np.uint8
    )


def perturbed_model(model_dir: Path, seed: int = 0) -> torch.nn.Module:
    """The model with every parameter changed by a fifth."""
    model = load_model(model_dir)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(
                0.2 * parameter.abs().mean() * torch.randn(parameter.shape, generator=generator)
            )
    return model


def trainer_scores(
    model: Any,
    processor: PrismaticProcessor,
    prompts: list[list[int]],
    images: np.ndarray,
    generation: Generation,
    T: float,
) -> tuple[np.ndarray, np.ndarray]:
    """The trainer's log-probs of the engine's tokens, and the tokens it finds best after the engine's prefixes."""
    ids, mask = processor.collate_prompts(prompts)
    pixels = processor.image_processor.normalize(torch.from_numpy(images), torch.float32)
    tokens = torch.from_numpy(generation.token_ids.copy())
    with torch.no_grad():
        logits_BAV = model.forward_actions(ids, mask, tokens, pixel_values=pixels).logits_BAV
    first = model.config.first_action_token_id
    logprobs = (logits_BAV / T).log_softmax(-1).gather(-1, (tokens - first)[..., None])[..., 0]
    return logprobs.numpy(), logits_BAV.argmax(-1).numpy() + first


def generate(engine: Any, *args: Any, **kwargs: Any) -> Generation:
    return ray.get(engine.generate.remote(*args, **kwargs))


def state_of(model: torch.nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, tensor.detach().clone()) for name, tensor in model.state_dict().items()]


@pytest.mark.parametrize(("temperature", "greedy"), [(1.0, True), (1.0, False), (1.5, False)])
def test_engine_equals_trainer(
    engine, processor, prompts, images, model_dir, temperature, greedy
) -> None:
    model = load_model(model_dir)
    send_to_engine(engine, state_of(model), 1)
    generation = generate(engine, prompts, images, temperature=temperature, greedy=greedy, seed=3)
    logprobs, best = trainer_scores(model, processor, prompts, images, generation, temperature)
    np.testing.assert_allclose(generation.logprobs, logprobs, atol=TOLERANCE)
    if greedy:
        np.testing.assert_array_equal(generation.token_ids, best)
    else:
        assert (generation.token_ids != best).any()
    other = trainer_scores(model, processor, prompts, images, generation, 2 * temperature)[0]
    assert (
        np.abs(generation.logprobs - other).max() > 100 * TOLERANCE
    )  # the temperature matters at this tolerance
    swapped = trainer_scores(
        model, processor, prompts, images[::-1].copy(), generation, temperature
    )[0]
    assert np.abs(generation.logprobs - swapped).max() > 10 * TOLERANCE  # and so does the image


def test_greedy_ignores_temperature_and_seed(engine, prompts, images) -> None:
    first = generate(engine, prompts, images, temperature=1.0, greedy=True)
    second = generate(engine, prompts, images, temperature=2.5, greedy=True, seed=7)
    np.testing.assert_array_equal(first.token_ids, second.token_ids)
    np.testing.assert_array_equal(first.logprobs, second.logprobs)


def test_seed_makes_each_request_reproducible(engine, prompts, images) -> None:
    first = generate(engine, prompts, images, temperature=1.5, seed=5)
    again = generate(engine, prompts, images, temperature=1.5, seed=5)
    alone = generate(engine, prompts[:3], images[:3], temperature=1.5, seed=5)
    other = generate(engine, prompts, images, temperature=1.5, seed=6)
    np.testing.assert_array_equal(first.token_ids, again.token_ids)
    np.testing.assert_array_equal(first.logprobs, again.logprobs)
    np.testing.assert_array_equal(first.token_ids[:3], alone.token_ids)
    assert (first.token_ids != other.token_ids).mean() > 0.5
    twins = generate(
        engine, [prompts[0]] * 4, images[:1].repeat(4, axis=0), temperature=1.5, seed=5
    )
    assert (twins.token_ids[0] != twins.token_ids[1]).any()  # the same input does not draw the same


def test_samples_follow_the_reported_probabilities(engine, prompts, images) -> None:
    """At a low temperature every first token is frequent enough to compare with exp(log-prob)."""
    num = 400
    generation = generate(
        engine, [prompts[0]] * num, images[:1].repeat(num, axis=0), temperature=0.05, seed=1
    )
    tokens, rows, counts = np.unique(
        generation.token_ids[:, 0], return_index=True, return_counts=True
    )
    probabilities = np.exp(generation.logprobs[rows, 0])
    deviation = np.sqrt(probabilities * (1 - probabilities) / num)
    assert len(tokens) > 1
    assert (np.abs(counts / num - probabilities) < 5 * deviation + 1e-6).all()


def test_only_action_tokens_and_more_requests_than_slots(
    engine, prompts, images, model_dir
) -> None:
    config = load_model(model_dir).config
    generation = generate(
        engine, prompts * 3, np.concatenate([images] * 3), temperature=2.0, seed=2
    )
    assert generation.token_ids.shape == (24, 7) and generation.logprobs.dtype == np.float32
    indices = generation.token_ids - config.first_action_token_id
    assert indices.min() >= 0 and indices.max() < 256 and len(np.unique(indices)) > 64


def test_each_rank_adds_the_action_rows_it_has(engine, model_dir) -> None:
    config = load_model(model_dir).config
    first, end = config.first_action_token_id, config.action_vocab_size
    hidden, head = (
        torch.randn(3, 8).bfloat16(),
        torch.randn(config.text_config.vocab_size, 8).bfloat16(),
    )
    expected = hidden.float() @ head[first:end].float().T  # not rounded to bfloat16
    for starts in ([0], [0, first + 100], [0, first, end], [0, 50, end - 1], [0, end]):
        parts = ray.get(engine.logits_of_ranks.remote(hidden, head, starts))
        torch.testing.assert_close(sum(part[:, first:end] for part in parts), expected)
        for part in parts:
            assert part.dtype == torch.float32 and part.shape == (3, len(head))
            assert (part[:, :first] == -torch.inf).all() and (part[:, end:] == -torch.inf).all()


def test_usual_vllm_input_gives_the_same_tokens(engine, prompts, images) -> None:
    expected = generate(engine, prompts, images, temperature=1.0, greedy=True).token_ids
    np.testing.assert_array_equal(ray.get(engine.generate_stock.remote(prompts, images)), expected)


def test_update_brings_every_parameter(engine, processor, prompts, images, model_dir) -> None:
    base, model = load_model(model_dir), perturbed_model(model_dir)
    send_to_engine(engine, state_of(base), 1)
    old = generate(engine, prompts, images, temperature=1.0, greedy=True)
    report = send_to_engine(engine, state_of(model), 2)
    new = generate(engine, prompts, images, temperature=1.0, greedy=True)
    logprobs, best = trainer_scores(model, processor, prompts, images, new, 1.0)
    np.testing.assert_allclose(new.logprobs, logprobs, atol=TOLERANCE)
    np.testing.assert_array_equal(new.token_ids, best)
    # A sync that does nothing would be seen: the old engine is far from the new trainer.
    skipped = trainer_scores(model, processor, prompts, images, old, 1.0)[0]
    assert np.abs(old.logprobs - skipped).max() > 100 * TOLERANCE
    weights = dict(state_of(model))
    assert (report.num_params, report.version) == (len(weights), 2)
    assert report.num_bytes == sum(4 * tensor.numel() for tensor in weights.values())
    assert ray.get(engine.version.remote()) == 2


def test_update_brings_lora_merged(engine, processor, prompts, images, model_dir) -> None:
    layers = ["q_proj", "v_proj", "down_proj", "fc2", "qkv", "lm_head"]
    lora = get_peft_model(
        load_model(model_dir), LoraConfig(r=4, lora_alpha=8, target_modules=layers)
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    before = generate(engine, prompts, images, temperature=1.5, seed=4)
    send_to_engine(engine, list(iterate_merged_parameters(lora)), 3)
    after = generate(engine, prompts, images, temperature=1.5, seed=4)
    model = lora.base_model.model
    logprobs = trainer_scores(model, processor, prompts, images, after, 1.5)[0]
    np.testing.assert_allclose(after.logprobs, logprobs, atol=TOLERANCE)
    skipped = trainer_scores(model, processor, prompts, images, before, 1.5)[0]
    assert np.abs(before.logprobs - skipped).max() > 100 * TOLERANCE


def test_incomplete_update_is_refused_before_anything_changes(
    engine, prompts, images, model_dir
) -> None:
    base = state_of(load_model(model_dir))
    send_to_engine(engine, base, 4)
    expected = generate(engine, prompts, images, temperature=1.0, greedy=True)
    missing = "language_model.model.layers.1.self_attn.v_proj.weight"
    without = [
        (name, tensor) for name, tensor in state_of(perturbed_model(model_dir)) if name != missing
    ]
    with pytest.raises(WeightUpdateError, match=f"1 missing: {missing}"):
        send_to_engine(engine, without, 5)
    with pytest.raises(WeightUpdateError, match="1 unexpected: head.weight"):
        send_to_engine(engine, [*base, ("head.weight", torch.zeros(3))], 5)
    with pytest.raises(WeightUpdateError, match=r"is \(3,\), not \("):
        send_to_engine(engine, [*without, (missing, torch.zeros(3))], 5)
    with pytest.raises(RuntimeError, match="version 5 failed .*send a complete update"):
        generate(engine, prompts, images, temperature=1.0)
    assert ray.get(engine.version.remote()) == 4
    send_to_engine(engine, base, 6)
    np.testing.assert_array_equal(
        generate(engine, prompts, images, temperature=1.0, greedy=True).logprobs, expected.logprobs
    )


def test_update_that_breaks_off_is_named_and_recovers(
    engine, processor, prompts, images, model_dir
) -> None:
    model = perturbed_model(model_dir, seed=1)
    weights = state_of(model)
    # Break off between the parts of a fused layer, after q and before k and v: one bucket a tensor.
    num_sent = 1 + [name for name, _ in weights].index(
        "language_model.model.layers.0.self_attn.q_proj.weight"
    )
    with pytest.raises(WeightUpdateError, match="version 7 failed.*sender"):
        send_to_engine(engine, weights, 7, bucket_bytes=1, num_sent=num_sent)
    with pytest.raises(RuntimeError, match="version 7"):
        generate(engine, prompts, images, temperature=1.0)
    send_to_engine(engine, weights, 8)
    generation = generate(engine, prompts, images, temperature=1.0, greedy=True)
    logprobs, best = trainer_scores(model, processor, prompts, images, generation, 1.0)
    np.testing.assert_allclose(generation.logprobs, logprobs, atol=TOLERANCE)
    np.testing.assert_array_equal(generation.token_ids, best)


def test_wrong_inputs_are_named(engine, prompts, images) -> None:
    with pytest.raises(ValueError, match="uint8"):
        generate(engine, prompts, images.astype(np.float32), temperature=1.0)
    with pytest.raises(ValueError, match="must be uint8"):
        generate(engine, prompts[:2], images, temperature=1.0)
    with pytest.raises(ValueError, match="temperature is 0"):
        generate(engine, prompts, images, temperature=0)
    with pytest.raises(ValueError, match="temperature is 5"):
        generate(engine, prompts, images, temperature=5)
    with pytest.raises(ValueError, match="0 to 130 tokens.*max_model_len"):
        generate(engine, [[], [1] * 130], images[:2], temperature=1)
    with pytest.raises(ValueError, match="nccl"):
        ray.get(engine.init_weight_transfer.remote("nccl", {}))
