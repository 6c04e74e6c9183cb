"""The base model's script, and the model that it made: it sees and reads, and cannot do any of the tasks."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ppo.envs.base import ResetRequest
from ppo.envs.tabletop import MAX_STEPS, SUITE, TabletopEnv
from ppo.envs.tabletop_pretraining import make_frame
from prismatic.extern.hf.modeling_prismatic import load_model
from prismatic.extern.hf.processing_prismatic import load_processor
from prismatic.extern.hf.tiny_prismatic import TinyVLAConfig
from prismatic.vla.action_normalization import to_env_action

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "assets" / "tabletop-base"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location(
        "make_base_model", ROOT / "vla-scripts" / "make_base_model.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_base_model"] = module  # its worker processes look it up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def base():
    return load_model(BASE), load_processor(BASE)


def answers(base, images, texts):
    """What the model answers, (n, 7) in [-1, 1]."""
    model, processor = base
    ids, mask = processor.collate_prompts([processor.prompt_ids(text) for text in texts])
    pixels = processor.image_processor.normalize(torch.from_numpy(images))
    return model.action_tokenizer.decode(
        model.generate_actions(ids, mask, pixel_values=pixels).numpy()
    )


def test_shipped_base_needs_image_and_instruction(base):
    frames = [
        make_frame(np.random.default_rng((9, index)), 56, ("move", "hold")) for index in range(200)
    ]
    images, targets = np.stack([f.image for f in frames]), np.stack([f.answers[0] for f in frames])
    texts = [f.instructions[0] for f in frames]

    def share_right(images, texts):
        return (np.abs(answers(base, images, texts) - targets)[:, :2].max(axis=1) < 0.05).mean()

    assert share_right(images, texts) > 0.8
    assert share_right(np.full_like(images, 128), texts) < 0.3
    # The same pictures with a question about another thing that lies there.
    others = [
        make_frame(np.random.default_rng((9, i)), 56, ("move", "move")).instructions
        for i in range(200)
    ]
    different = np.array([pair[0] != pair[1] for pair in others])
    wrong = answers(base, images, [pair[1] for pair in others])
    assert (np.abs(wrong - targets)[different, :2].max(axis=1) < 0.05).mean() < 0.3


def test_shipped_base_solves_no_task(base):
    envs = [TabletopEnv(56) for _ in range(40)]
    images = [env.reset(ResetRequest(i % 10, i // 10, 0)) for i, env in enumerate(envs)]
    texts = [SUITE.instructions[i % 10] for i in range(40)]
    done, solved = np.zeros(40, dtype=bool), 0
    for _ in range(MAX_STEPS):
        raw = to_env_action(answers(base, np.stack(images), texts))
        for i in np.flatnonzero(~done):
            result = envs[i].step(raw[i])
            images[i], done[i] = result.image, result.terminated or result.truncated
            solved += result.success
    assert done.all() and solved <= 2


def test_script_writes_a_model_that_loads_and_logs_what_it_did(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "NUM_HELD_OUT", 16)
    sizes = TinyVLAConfig(
        vision_dim=16, vision_heads=2, vision_depth=2, llm_dim=16, llm_depth=1, llm_heads=2
    )
    args = script.Args(
        str(tmp_path / "base"),
        model=sizes,
        num_frames=512,
        num_updates=2,
        batch_size=8,
        num_workers=1,
        device="cpu",
    )
    script.main(args)
    assert load_model(tmp_path / "base").num_parameters() > 0
    settings, row = map(
        json.loads, (tmp_path / "base" / "pretraining.jsonl").read_text().splitlines()
    )
    assert (
        settings["settings"]["num_updates"] == 2
        and row["update"] == 2
        and 0 <= row["held_out/move"] <= 1
    )
    with pytest.raises(ValueError, match="exists and is not empty"):
        script.main(args)


def test_training_fits_the_questions(script, monkeypatch):
    """Targets, prompts and pictures belong together, and the optimizer steps: some updates must fit most answers."""
    monkeypatch.setattr(script, "NUM_HELD_OUT", 0)
    monkeypatch.setattr(script, "held_out_accuracy", lambda *_: {})
    kinds = ("hold",)
    args = script.Args(
        "", num_frames=512, num_updates=25, batch_size=32, num_workers=1, device="cpu", kinds=kinds
    )
    model, processor = script.build_tiny_vla(args.model)
    data = script.draw_questions(args, model, processor)
    pick = torch.arange(64)
    before = loss(script, model, processor, data, pick)
    script.train(args, model, processor, data)
    assert loss(script, model, processor, data, pick) < 0.5 * before


@torch.no_grad()
def loss(script, model, processor, data, pick):
    logits = script.answer_logits(model.forward_actions, processor, data, pick)
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), script.targets(model, data, pick).flatten()
    ).item()
