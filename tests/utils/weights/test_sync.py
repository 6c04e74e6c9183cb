"""A trainer's shards to a real vLLM engine (CPU) over the channel: the engine's log-probs become the trainer's."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from torch import nn

from prismatic.extern.hf.modeling_prismatic import load_model
from prismatic.extern.hf.processing_prismatic import load_processor
from utils import peft_utils
from utils.ray_utils import start_ray
from utils.vllm_utils import ActionEngine, EngineConfig, Generation, engine_env
from utils.weights.channel import ChannelError
from utils.weights.export import WeightExporter
from utils.weights.receiver import WeightUpdateError, engine_info
from utils.weights.sender import WeightSender

TOLERANCE = 1e-4
BUCKET_BYTES = 100_000


def start_engine(model_dir: Path, tensor_parallel_size: int) -> Any:
    config = EngineConfig(
        str(model_dir),
        max_num_seqs=4,
        tensor_parallel_size=tensor_parallel_size,
        weight_transfer_backend="gloo",
    )
    return ray.remote(num_cpus=1, runtime_env={"env_vars": engine_env("cpu")})(ActionEngine).remote(
        config
    )


@pytest.fixture(scope="module")
def engine(tiny_model_dir: Path) -> Iterator[Any]:
    start_ray(None, num_gpus=0, num_cpu_slots=4)
    actor = start_engine(tiny_model_dir, 1)
    yield actor
    ray.get(actor.close.remote())
    ray.shutdown()


class Observations:
    """Prompts and images, and the trainer's log-probs of what an engine chose for them."""

    def __init__(self, model_dir: Path) -> None:
        self.processor = load_processor(model_dir)
        self.prompts = [
            self.processor.prompt_ids(text)
            for text in ("pick up the red block", "open the drawer now")
        ]
        self.images = np.random.default_rng(0).integers(0, 256, (2, 28, 28, 3), dtype=np.uint8)

    def act(self, engine: Any) -> Generation:
        return ray.get(engine.generate.remote(self.prompts, self.images, temperature=1.0, seed=1))

    def difference(self, model: Any, generation: Generation) -> float:
        """Largest difference between the engine's log-probs and those of `model`."""
        ids, mask = self.processor.collate_prompts(self.prompts)
        pixels = self.processor.image_processor.normalize(
            torch.from_numpy(self.images), torch.float32
        )
        tokens = torch.from_numpy(generation.token_ids.copy())
        with torch.no_grad():
            logits_BAV = model.forward_actions(ids, mask, tokens, pixel_values=pixels).logits_BAV
        indices = (tokens - model.config.first_action_token_id)[..., None]
        return float(
            np.abs(
                logits_BAV.log_softmax(-1).gather(-1, indices)[..., 0].numpy() - generation.logprobs
            ).max()
        )


@pytest.fixture(scope="module")
def observations(tiny_model_dir: Path) -> Observations:
    return Observations(tiny_model_dir)


def lora_model(model_dir: Path, seed: int) -> nn.Module:
    model = load_model(model_dir)
    peft_utils.add_lora(model, rank=4, alpha=8)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def connect(model: nn.Module, engine: Any, num_receivers: int = 1) -> WeightSender:
    exporter = WeightExporter(model, torch.float32, BUCKET_BYTES)
    sender = WeightSender(exporter, "gloo", rank=0, num_receivers=num_receivers)
    joined = engine.init_weight_transfer.remote(
        "gloo", engine_info([sender.open()], "gloo", 0, num_receivers)
    )
    sender.connect()
    ray.get(joined)
    return sender


def test_engine_equals_the_trainer_after_every_sync(engine, observations, tiny_model_dir) -> None:
    model = lora_model(tiny_model_dir, 0)
    sender = connect(model, engine)
    assert sender.exporter.num_buckets > 3
    for version in (1, 2):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name or "norm" in name:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        before = observations.difference(model, observations.act(engine))
        received = engine.receive_weights.remote(version)
        sent = sender.send(version, verify=version == 2)
        report = ray.get(received)
        after = observations.difference(model, observations.act(engine))
        assert after < TOLERANCE and before > 100 * TOLERANCE
        assert (report.num_params, report.num_bytes, report.version) == (
            sent.num_params,
            sent.num_bytes,
            version,
        )
        assert report.num_verified == (report.num_params if version == 2 else 0)
    sender.close()


def test_trainer_of_another_model_is_refused_and_the_engine_recovers(
    engine, observations, tiny_model_dir
) -> None:
    model = lora_model(tiny_model_dir, 1)
    model.extra = nn.Linear(2, 2)
    sender = connect(model, engine)
    received = engine.receive_weights.remote(7)
    with pytest.raises(
        ChannelError, match="refused by receiver 1: 2 unexpected: extra.weight, extra.bias"
    ):
        sender.send(7)
    with pytest.raises(WeightUpdateError, match="nothing was overwritten.*2 unexpected: extra"):
        ray.get(received)
    with pytest.raises(RuntimeError, match="version 7 failed"):
        observations.act(engine)
    sender.close()
    del model.extra
    sender = connect(model, engine)
    received = engine.receive_weights.remote(8)
    sender.send(8)
    ray.get(received)
    assert observations.difference(model, observations.act(engine)) < TOLERANCE


def test_trainer_that_stops_in_the_middle_and_the_engine_recovers(
    engine, observations, tiny_model_dir
) -> None:
    model = lora_model(tiny_model_dir, 2)
    sender = connect(model, engine)
    fill = sender.exporter.fill

    def fill_or_fail(index: int, buffer: Any) -> None:
        if index == 2:
            raise MemoryError("no room for bucket 2")
        fill(index, buffer)

    sender.exporter.fill = fill_or_fail
    received = engine.receive_weights.remote(9)
    with pytest.raises(MemoryError):
        sender.send(9)
    with pytest.raises(WeightUpdateError, match="version 9 failed.*the sender"):
        ray.get(received)
    with pytest.raises(RuntimeError, match="version 9"):
        observations.act(engine)
    sender = connect(model, engine)
    received = engine.receive_weights.remote(10)
    sender.send(10, verify=True)
    ray.get(received)
    assert observations.difference(model, observations.act(engine)) < TOLERANCE


@pytest.mark.slow
def test_every_tensor_parallel_worker_receives_and_refuses(
    engine, observations, tiny_model_dir
) -> None:
    pair, model = start_engine(tiny_model_dir, 2), lora_model(tiny_model_dir, 3)
    assert (
        observations.difference(model, observations.act(pair)) > 100 * TOLERANCE
    )  # and it has started
    sender = connect(model, pair, num_receivers=2)
    received = pair.receive_weights.remote(1)
    report = sender.send(1, verify=True)
    assert ray.get(received).num_verified == report.num_params
    assert observations.difference(model, observations.act(pair)) < TOLERANCE
    received = pair.receive_weights.remote(3)
    with pytest.raises(
        ChannelError, match="receiver 1: version 2 is sent, 3 was.*receiver 2: version 2 is sent"
    ):
        sender.send(2)
    with pytest.raises(
        WeightUpdateError, match="version 3 failed.*version 2 is sent, 3 was expected"
    ):
        ray.get(received)
    received = pair.receive_weights.remote(4)  # both workers still answer what they are asked
    sender.send(4)
    assert ray.get(received).version == 4
    assert observations.difference(model, observations.act(pair)) < TOLERANCE
    ray.get(pair.close.remote())
