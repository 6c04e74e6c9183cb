"""The model against an independent forward of the same weights, and what must not change its numbers."""

import copy
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from prismatic.extern.hf.modeling_prismatic import OpenVLAForActionPrediction, load_model
from prismatic.extern.hf.processing_prismatic import PrismaticProcessor, load_processor

INSTRUCTIONS = [
    "push the red block onto the orange mat",
    "open the drawer",
    "pick up the ball and place it in the bowl",
]
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def prefixed(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value
        for name, value in weights.items()
        if name.startswith(prefix)
    }


def independent_vision(
    model: OpenVLAForActionPrediction, weights: dict[str, Tensor], pixels: Tensor
) -> Tensor:
    """Hook the second-to-last block of timm's own ViTs, so that nothing of our forward is used."""
    features = []
    for index, name in enumerate(["featurizer", "fused_featurizer"]):
        kwargs = model.config.timm_model_kwargs[index]
        vit = timm.create_model(
            model.config.timm_model_ids[index], num_classes=0, img_size=28, **kwargs
        ).eval()
        state = prefixed(weights, f"vision_backbone.{name}.")
        vit.load_state_dict(
            {key.replace("scale_factor", "gamma"): value for key, value in state.items()}
        )
        captured: list[Tensor] = []
        vit.blocks[-2].register_forward_hook(
            lambda _m, _i, output, store=captured: store.append(output)
        )
        vit(pixels[:, 3 * index : 3 * index + 3])
        features.append(captured[0][:, vit.num_prefix_tokens :])
    return torch.cat(features, -1)


@torch.no_grad()
def independent_forward(
    model: OpenVLAForActionPrediction, prompt: list[int], actions: list[int], pixels: Tensor
) -> tuple[Tensor, Tensor]:
    """One row, no padding, full logits: (7, 256) restricted logits and the hidden state at the prompt's end."""
    weights = model.state_dict()
    text = model.config.text_config
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=text.vocab_size,
            hidden_size=text.hidden_size,
            intermediate_size=text.intermediate_size,
            num_hidden_layers=text.num_hidden_layers,
            num_attention_heads=text.num_attention_heads,
            rms_norm_eps=1e-6,
            attn_implementation="eager",
        )
    ).eval()
    llama.load_state_dict(prefixed(weights, "language_model."))
    x = independent_vision(model, weights, pixels[None])
    for layer in ("fc1", "fc2", "fc3"):
        x = F.linear(x, weights[f"projector.{layer}.weight"], weights[f"projector.{layer}.bias"])
        x = F.gelu(x) if layer != "fc3" else x
    text_embeddings = llama.model.embed_tokens(torch.tensor([prompt + actions]))
    output = llama(
        inputs_embeds=torch.cat([text_embeddings[:, :1], x, text_embeddings[:, 1:]], 1),
        output_hidden_states=True,
    )
    end = x.shape[1] + len(prompt) - 1
    first = text.vocab_size - 64 - 256
    return output.logits[0, end : end + 7, first : first + 256], output.hidden_states[-1][0, end]


@pytest.fixture(scope="module")
def processor(tiny_model_dir: Path) -> PrismaticProcessor:
    return load_processor(tiny_model_dir)


def shaken_model(model_dir: Path) -> OpenVLAForActionPrediction:
    """A model whose every weight matters: fresh LayerScales are 1, biases 0 and greedy tokens all alike otherwise."""
    model = load_model(model_dir)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
        model.language_model.lm_head.weight.mul_(3)
    return model


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> OpenVLAForActionPrediction:
    return shaken_model(tiny_model_dir)


@pytest.fixture(scope="module")
def batch(model: OpenVLAForActionPrediction, processor: PrismaticProcessor) -> SimpleNamespace:
    """Three rows with prompts of different lengths."""
    rng = np.random.default_rng(0)
    prompts = [processor.prompt_ids(instruction) for instruction in INSTRUCTIONS]
    ids, mask = processor.collate_prompts(prompts)
    images = torch.from_numpy(rng.integers(0, 256, (3, 28, 28, 3), dtype=np.uint8))
    actions = torch.from_numpy(rng.integers(0, 256, (3, 7))) + model.config.first_action_token_id
    return SimpleNamespace(
        prompts=prompts,
        ids=ids,
        mask=mask,
        images=images,
        actions=actions,
        pixels=processor.image_processor.normalize(images),
    )


def test_forward_actions_equals_an_independent_forward(model, batch) -> None:
    assert len({len(prompt) for prompt in batch.prompts}) == 3, "the rows must need padding"
    output = model.forward_actions(batch.ids, batch.mask, batch.actions, pixel_values=batch.pixels)
    assert output.logits_BAV.dtype == torch.float32
    for row in range(3):
        logits, hidden = independent_forward(
            model, batch.prompts[row], batch.actions[row].tolist(), batch.pixels[row]
        )
        torch.testing.assert_close(output.logits_BAV[row], logits, **TOLERANCE)
        torch.testing.assert_close(output.prompt_hidden_BD[row], hidden, **TOLERANCE)
    assert logits.std() > 1, "logits so flat that a wrong one would pass"


def test_cached_vision_features_and_no_actions_change_nothing(model, batch) -> None:
    full = model.forward_actions(batch.ids, batch.mask, batch.actions, pixel_values=batch.pixels)
    features = model.encode_vision(batch.pixels)
    assert features.shape == (3, model.vision_backbone.num_patches, model.vision_backbone.embed_dim)
    cached = model.forward_actions(batch.ids, batch.mask, batch.actions, vision_features=features)
    torch.testing.assert_close(cached.logits_BAV, full.logits_BAV)
    state_only = model.forward_actions(batch.ids, batch.mask, vision_features=features)
    assert state_only.logits_BAV is None
    torch.testing.assert_close(state_only.prompt_hidden_BD, full.prompt_hidden_BD, **TOLERANCE)


def test_padded_rows_equal_the_same_rows_alone(model, batch) -> None:
    together = model.forward_actions(
        batch.ids, batch.mask, batch.actions, pixel_values=batch.pixels
    )
    # What stands in the padding must not matter either.
    garbage = torch.where(batch.mask.bool(), batch.ids, 17)
    dirty = model.forward_actions(garbage, batch.mask, batch.actions, pixel_values=batch.pixels)
    torch.testing.assert_close(dirty.logits_BAV, together.logits_BAV)
    for row, prompt in enumerate(batch.prompts):
        ids, one = torch.tensor([prompt]), slice(row, row + 1)
        alone = model.forward_actions(
            ids, torch.ones_like(ids), batch.actions[one], pixel_values=batch.pixels[one]
        )
        torch.testing.assert_close(together.logits_BAV[one], alone.logits_BAV, **TOLERANCE)
        torch.testing.assert_close(
            together.prompt_hidden_BD[one], alone.prompt_hidden_BD, **TOLERANCE
        )


def test_state_sees_the_image_and_the_instruction_and_not_the_actions(model, batch) -> None:
    def state(ids: Tensor, mask: Tensor, actions: Tensor, pixels: Tensor) -> Tensor:
        return model.forward_actions(ids, mask, actions, pixel_values=pixels).prompt_hidden_BD

    reference = state(batch.ids, batch.mask, batch.actions, batch.pixels)
    other_image = state(batch.ids, batch.mask, batch.actions, batch.pixels.flip(-1))
    assert ((other_image - reference).abs().amax(-1) > 1e-2).all()
    for channels in (slice(0, 3), slice(3, 6)):  # either ViT alone
        pixels = batch.pixels.clone()
        pixels[:, channels] = pixels[:, channels].flip(-1)
        assert (
            (state(batch.ids, batch.mask, batch.actions, pixels) - reference).abs().amax(-1) > 1e-2
        ).all()
    order = [1, 2, 0]
    assert (
        (state(batch.ids[order], batch.mask[order], batch.actions, batch.pixels) - reference).abs()
        > 1e-2
    ).any()
    torch.testing.assert_close(
        state(batch.ids, batch.mask, batch.actions.flip(1), batch.pixels), reference
    )


@torch.no_grad()
def naive_greedy(model: OpenVLAForActionPrediction, prompt: list[int], pixels: Tensor) -> list[int]:
    """Recompute the whole sequence for each token, over the full vocabulary, through `forward`."""
    ids = list(prompt)
    first = model.config.first_action_token_id
    for _ in range(7):
        logits = model(torch.tensor([ids]), pixel_values=pixels[None]).logits[0, -1]
        ids.append(first + int(logits[first : first + 256].argmax()))
    return ids[-7:]


def test_greedy_tokens_equal_a_naive_loop_with_and_without_padding(model, batch) -> None:
    expected = [
        naive_greedy(model, prompt, batch.pixels[row]) for row, prompt in enumerate(batch.prompts)
    ]
    assert len({token for row in expected for token in row}) > 10, (
        "greedy tokens must differ to tell anything"
    )
    together = model.generate_actions(batch.ids, batch.mask, pixel_values=batch.pixels)
    assert together.tolist() == expected
    ids = torch.tensor([batch.prompts[0]] * 2)
    alike = model.generate_actions(ids, torch.ones_like(ids), pixel_values=batch.pixels[[0, 0]])
    assert alike.tolist() == [expected[0]] * 2


def test_predict_action_gives_unnormalised_greedy_actions(model, batch, processor) -> None:
    tokens = model.generate_actions(batch.ids, batch.mask, pixel_values=batch.pixels).numpy()
    stats = model.norm_stats["tabletop"]["action"]
    low, high = np.array(stats["q01"]), np.array(stats["q99"])
    centre = 2 * (model.config.action_vocab_size - tokens - 1 + 0.5) / 255 - 1
    centre = np.where(tokens == model.config.first_action_token_id, 254 / 255, centre)
    expected = 0.5 * (centre + 1) * (high - low) + low
    expected[:, 6] = centre[:, 6]
    images = list(batch.images.numpy())
    actions = model.predict_action(images, INSTRUCTIONS, "tabletop", processor=processor)
    np.testing.assert_allclose(actions, expected, atol=1e-5)
    single = model.predict_action(images[1], INSTRUCTIONS[1], "tabletop", processor=processor)
    np.testing.assert_allclose(single, expected[1], atol=1e-5)
    # As other OpenVLA code calls it: the prompt without the empty piece, which is then appended.
    prompts = [f"In: What action should the robot take to {text}?\nOut:" for text in INSTRUCTIONS]
    inputs = processor(prompts, images)
    assert processor.empty_piece_token_id not in inputs["input_ids"]
    np.testing.assert_allclose(
        model.predict_action(**inputs, unnorm_key="tabletop"), expected, atol=1e-5
    )
    # Rows that already end with the empty piece, in one batch with rows that do not, are left alone.
    mixed, _ = processor.collate_prompts(
        [batch.prompts[0], batch.prompts[1][:-1], batch.prompts[2]]
    )
    mixed_mask = (mixed != processor.pad_token_id).long()
    again = model.predict_action(
        input_ids=mixed, attention_mask=mixed_mask, pixel_values=batch.pixels
    )
    np.testing.assert_allclose(again, expected, atol=1e-5)


def test_predict_action_refuses_an_unknown_key_and_missing_inputs(model, batch, processor) -> None:
    with pytest.raises(ValueError, match=r"'bridge' is not in.*\['tabletop'\]"):
        model.predict_action(
            list(batch.images.numpy()), INSTRUCTIONS, "bridge", processor=processor
        )
    with pytest.raises(ValueError, match="lacks.*pixel_values"):
        model.predict_action(input_ids=batch.ids, unnorm_key="tabletop")


def supervised_batch(batch: SimpleNamespace) -> tuple[Tensor, Tensor, Tensor]:
    """Prompt, seven actions and EOS, right-padded, labels on the last eight."""
    rows = [
        prompt + actions.tolist() + [2]
        for prompt, actions in zip(batch.prompts, batch.actions, strict=True)
    ]
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    labels = torch.tensor(
        [[-100] * (len(row) - 8) + row[-8:] + [-100] * (length - len(row)) for row in rows]
    )
    return ids, mask, labels


def test_supervised_loss_equals_the_independent_log_probs(model, batch) -> None:
    ids, mask, labels = supervised_batch(batch)
    output = model(ids, mask, pixel_values=batch.pixels, labels=labels)
    assert output.logits.shape[:2] == (3, ids.shape[1] + model.vision_backbone.num_patches)
    only = model(ids, mask, pixel_values=batch.pixels, labels=labels, logits_at="labels")
    torch.testing.assert_close(only.loss, output.loss)
    assert only.label_ids.tolist() == labels[labels != -100].tolist()
    # Hand-aligned: row 0's labels sit at len(prompt).. in the text, their logits one before, shifted by the patches.
    losses = []
    for row, prompt in enumerate(batch.prompts):
        start = model.vision_backbone.num_patches + len(prompt) - 1
        logits = output.logits[row, start : start + 8]
        losses.append(
            F.cross_entropy(logits, labels[row, len(prompt) : len(prompt) + 8], reduction="sum")
        )
        restricted, _ = independent_forward(
            model, prompt, batch.actions[row].tolist(), batch.pixels[row]
        )
        first = model.config.first_action_token_id
        torch.testing.assert_close(logits[:7, first : first + 256], restricted, **TOLERANCE)
    torch.testing.assert_close(output.loss, sum(losses) / 24)


def test_left_padding_and_ambiguous_vision_are_refused(model, batch) -> None:
    with pytest.raises(ValueError, match="padded on the left"):
        model(batch.ids, batch.mask.flip(1), pixel_values=batch.pixels)
    with pytest.raises(ValueError, match="either pixel_values or vision_features"):
        model.forward_actions(batch.ids, batch.mask)


def gradients(model: OpenVLAForActionPrediction, batch: SimpleNamespace) -> dict[str, Tensor]:
    model.train()
    model.zero_grad()
    output = model.forward_actions(batch.ids, batch.mask, batch.actions, pixel_values=batch.pixels)
    (output.logits_BAV.logsumexp(-1).sum() + output.prompt_hidden_BD.square().sum()).backward()
    model.eval()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradient_checkpointing_gives_equal_gradients_and_recomputes_both_parts(
    tiny_model_dir, batch
) -> None:
    model = shaken_model(tiny_model_dir)
    expected = gradients(model, batch)
    calls: list[str] = []
    for name in (
        "vision_backbone.featurizer.blocks.0.attn",
        "language_model.model.layers.0.self_attn",
    ):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
    model.gradient_checkpointing_enable()
    checkpointed = gradients(model, batch)
    assert sorted(Counter(calls).values()) == [2, 2], calls
    assert checkpointed.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-5, atol=1e-6, msg=name)
    model.gradient_checkpointing_disable()
    calls.clear()
    gradients(model, batch)
    assert len(calls) == 2


def test_unused_weights_get_no_gradient_and_all_others_do(tiny_model_dir, batch) -> None:
    model = shaken_model(tiny_model_dir)
    with_gradient = gradients(model, batch).keys()
    unused = {name for name, _ in model.named_parameters()} - with_gradient
    last = "blocks.2."
    assert unused and all(
        last in name or ".attn_pool." in name or "featurizer.norm." in name for name in unused
    ), unused


def test_lora_on_the_head_is_part_of_the_sliced_logits(tiny_model_dir, batch) -> None:
    from peft import LoraConfig, get_peft_model

    model = shaken_model(tiny_model_dir)
    modules = ["lm_head", "q_proj", "qkv", "fc1"]
    wrapped = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=6, target_modules=modules, init_lora_weights=False)
    )
    inner = wrapped.base_model.model
    assert type(inner.language_model.lm_head).__name__ == "Linear" and hasattr(
        inner.language_model.lm_head, "lora_A"
    )
    inputs = (batch.ids, batch.mask, batch.actions)
    adapted = inner.forward_actions(*inputs, pixel_values=batch.pixels).logits_BAV
    with wrapped.disable_adapter():
        plain = inner.forward_actions(*inputs, pixel_values=batch.pixels).logits_BAV
    torch.testing.assert_close(
        plain, shaken_model(tiny_model_dir).forward_actions(*inputs, pixel_values=batch.pixels)[0]
    )
    # The head's own forward, over the whole vocabulary, for the same hidden states.
    hidden = torch.randn(2, 3, model.config.text_config.hidden_size)
    first = model.config.first_action_token_id
    whole = inner.language_model.lm_head(hidden)[..., first : first + 256]
    torch.testing.assert_close(inner._action_logits(hidden), whole, **TOLERANCE)
    # Trained adapters are float32 on a bfloat16 model.
    half = copy.deepcopy(inner)
    half.language_model.lm_head.base_layer.bfloat16()
    torch.testing.assert_close(half._action_logits(hidden.bfloat16()), whole, rtol=0.05, atol=0.2)
    merged = (
        wrapped.merge_and_unload().forward_actions(*inputs, pixel_values=batch.pixels).logits_BAV
    )
    torch.testing.assert_close(adapted, merged, rtol=1e-3, atol=1e-3)
    assert (adapted - plain).abs().max() > 0.1


@pytest.mark.parametrize("variant", ["use_dora", "lora_bias"])
def test_other_adapters_on_the_head_go_through_their_own_forward(
    tiny_model_dir, batch, variant: str
) -> None:
    from peft import LoraConfig, get_peft_model

    options = {variant: True, "init_lora_weights": variant == "lora_bias"}
    config = LoraConfig(r=4, target_modules=["lm_head"], **options)
    inner = get_peft_model(shaken_model(tiny_model_dir), config).base_model.model
    with torch.no_grad():  # as initialised, both equal plain LoRA
        for parameter in inner.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.rand(parameter.shape))
    hidden = torch.randn(2, 3, inner.config.text_config.hidden_size)
    first = inner.config.first_action_token_id
    whole = inner.language_model.lm_head(hidden)[..., first : first + 256]
    torch.testing.assert_close(inner._action_logits(hidden), whole, **TOLERANCE)


def test_bfloat16_runs_and_stays_near_float32(tiny_model_dir, batch) -> None:
    full = load_model(tiny_model_dir).forward_actions(
        batch.ids, batch.mask, batch.actions, pixel_values=batch.pixels
    )
    half_model = load_model(tiny_model_dir, dtype=torch.bfloat16)
    assert half_model.dtype == torch.bfloat16
    half = half_model.forward_actions(
        batch.ids, batch.mask, batch.actions, pixel_values=batch.pixels
    )
    assert half.logits_BAV.dtype == torch.float32
    assert (half.logits_BAV - full.logits_BAV).abs().max() < 0.1
