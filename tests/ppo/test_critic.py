import pytest
import torch

from ppo.critic import ValueHead, VLACritic
from prismatic.extern.hf.modeling_prismatic import load_model
from prismatic.extern.hf.processing_prismatic import load_processor


@pytest.fixture(scope="module")
def processor(tiny_model_dir):
    return load_processor(tiny_model_dir)


@pytest.fixture
def critic(tiny_model_dir):
    """A critic on the tiny model whose head is not zero any more."""
    torch.manual_seed(0)
    critic = VLACritic(load_model(tiny_model_dir).eval())
    torch.nn.init.normal_(critic.value_head.fc2.weight)
    return critic


def observation(processor, *instructions, seed=0):
    size = processor.image_processor.image_size[0]
    images = torch.randint(
        0, 256, (len(instructions), size, size, 3), generator=torch.Generator().manual_seed(seed)
    )
    ids, mask = processor.collate_prompts([processor.prompt_ids(text) for text in instructions])
    return ids, mask, processor.image_processor.normalize(images.to(torch.uint8), torch.float32)


def test_a_fresh_head_says_0_in_float32_and_can_learn():
    head = ValueHead(16)
    hidden = torch.randn(5, 16)
    assert head(hidden).tolist() == [0.0] * 5
    assert head(hidden.to(torch.bfloat16)).dtype == torch.float32
    target = torch.tensor([1.0, -1, 2, 0, 0.5])
    optimizer = torch.optim.Adam(head.parameters(), lr=0.02)
    for _ in range(200):
        loss = ((head(hidden) - target) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.01


def test_the_head_does_not_depend_on_the_scale_of_the_features():
    head = ValueHead(16)
    torch.nn.init.normal_(head.fc2.weight)
    hidden = torch.randn(5, 16)
    torch.testing.assert_close(head(hidden), head(1000 * hidden), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_the_value_depends_on_image_and_instruction(critic, processor):
    text, other = "pick up the red block", "push the green block"
    ids, mask, pixels = observation(processor, text, text)
    values = critic(ids, mask, pixel_values=pixels)
    assert values.shape == (2,) and abs(values[0] - values[1]) > 1e-4  # two images
    ids, mask, pixels = observation(processor, text, other)
    pixels[1] = pixels[0]
    values = critic(ids, mask, pixel_values=pixels)
    assert abs(values[0] - values[1]) > 1e-4


@torch.no_grad()
def test_padding_does_not_change_the_value(critic, processor):
    short, long = "push", "pick up the red block and place it on the blue plate"
    ids, mask, pixels = observation(processor, short, long)
    assert mask[0].sum() < mask[1].sum()
    together = critic(ids, mask, pixel_values=pixels)
    length = int(mask[0].sum())
    alone = critic(ids[:1, :length], mask[:1, :length], pixel_values=pixels[:1])
    torch.testing.assert_close(together[:1], alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_cached_vision_features_give_the_same_value(critic, processor):
    ids, mask, pixels = observation(processor, "push the red block", "push")
    features = critic.encode_vision(pixels)
    expected = critic(ids, mask, pixel_values=pixels)
    torch.testing.assert_close(
        critic(ids, mask, vision_features=features), expected, rtol=1e-4, atol=1e-5
    )


def test_the_backbone_trains_and_lm_head_does_not(critic, processor):
    ids, mask, pixels = observation(processor, "push the red block", "push")
    critic(ids, mask, pixel_values=pixels).sum().backward()
    assert critic.backbone.get_output_embeddings().weight.grad is None
    assert not critic.backbone.get_output_embeddings().weight.requires_grad
    for part in (
        critic.backbone.vision_backbone,
        critic.backbone.projector,
        critic.backbone.language_model.model,
    ):
        assert max(p.grad.abs().max() for p in part.parameters() if p.grad is not None) > 0


def test_with_lora_only_adapter_and_head_train(tiny_model_dir, processor):
    from utils.peft_utils import add_lora

    model = load_model(tiny_model_dir).eval()
    add_lora(model, rank=4)
    critic = VLACritic(model)
    torch.nn.init.normal_(critic.value_head.fc2.weight)
    trained = {name for name, p in critic.named_parameters() if p.requires_grad}
    assert all("lora_" in name or name.startswith("value_head.") for name in trained)
    assert any("lora_" in name for name in trained)
    ids, mask, pixels = observation(processor, "push the red block")
    critic(ids, mask, pixel_values=pixels).sum().backward()
    reached = {
        name
        for name, p in critic.named_parameters()
        if p.grad is not None and p.grad.abs().max() > 0
    }
    assert any(
        "language_model" in name and "lora_B" in name for name in reached
    )  # lora_A's gradient is 0 at B = 0
