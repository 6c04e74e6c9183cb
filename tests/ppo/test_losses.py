import math

import pytest
import torch

from ppo.losses import (
    action_logprobs,
    entropy,
    explained_variance,
    kl_k3,
    moments,
    normalize,
    policy_loss,
    truncated_importance_weight,
    value_loss,
    weighted_mean,
)

CLIP = {"clip_low": 0.2, "clip_high": 0.3}


def log(*numbers):
    return torch.tensor(numbers, dtype=torch.float32).log()


def batch(num=12, seed=0):
    """Random log-probs around old ones, advantages of both signs, and ratios on both sides of the clip range."""
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(num, 7, generator=generator) * 2
    new = old + 0.1 * torch.randn(num, 7, generator=generator)
    return new.requires_grad_(), old, torch.randn(num, generator=generator)


def test_logprobs_and_entropy_by_hand():
    logits = log(1, 2, 5).expand(1, 1, 3)  # probabilities 1/8, 2/8, 5/8
    torch.testing.assert_close(action_logprobs(logits, torch.tensor([[2]])), log(5 / 8)[None])
    # At temperature 0.5 the logits double: 1, 4, 25 of 30.
    torch.testing.assert_close(action_logprobs(logits, torch.tensor([[1]]), 0.5), log(4 / 30)[None])
    expected = -sum(p * math.log(p) for p in (1 / 30, 4 / 30, 25 / 30))
    torch.testing.assert_close(entropy(logits, 0.5), torch.tensor([[expected]]))


def test_entropy_is_that_of_the_distribution_and_logprobs_are_float32():
    logits = torch.zeros(2, 3, 256, dtype=torch.bfloat16)
    assert action_logprobs(logits, torch.zeros(2, 3)).dtype == torch.float32
    torch.testing.assert_close(entropy(logits), torch.full((2, 3), math.log(256)))
    with pytest.raises(ValueError, match="temperature 0"):
        entropy(logits, 0.0)


def test_policy_loss_by_hand():
    # Ratios of whole actions 1.5, 1.5, 0.5, 0.5 with advantages 1, -1, 1, -1, clipped to [0.8, 1.3]:
    # minima 1.3, -1.5, 0.5, -0.8 -> loss = -(1.3 - 1.5 + 0.5 - 0.8) / 4 = 0.125
    new = log(1.5, 1.5, 0.5, 0.5)[:, None] * torch.tensor([[0.5, 0.25, 0.25]])
    result = policy_loss(new, torch.zeros(4, 3), torch.tensor([1.0, -1.0, 1.0, -1.0]), **CLIP)
    assert result.loss.item() == pytest.approx(0.125)
    assert result.clip_fraction.item() == 1.0
    assert result.ratio_mean.item() == pytest.approx(1.0)
    assert result.ratio_max_abs_dev.item() == pytest.approx(0.5)
    k3 = (0.5 - math.log(1.5) - 0.5 - math.log(0.5)) / 2
    assert result.approx_kl_k3.item() == pytest.approx(k3)
    assert result.approx_kl_k1.item() == pytest.approx(-(math.log(1.5) + math.log(0.5)) / 2)


def test_token_ratios_by_hand_and_unlike_action_ratios():
    # Two tokens with ratios 2 and 1/2: the action's ratio is 1, the tokens' are clipped to 1.3 and 0.8.
    new, old, advantage = log(2.0, 0.5)[None], torch.zeros(1, 2), torch.tensor([1.0])
    action = policy_loss(new, old, advantage, level="action", **CLIP)
    token = policy_loss(new, old, advantage, level="token", **CLIP)
    assert action.loss.item() == pytest.approx(-1.0)
    assert token.loss.item() == pytest.approx(-(1.3 + 0.5) / 2)
    assert (action.clip_fraction.item(), token.clip_fraction.item()) == (0.0, 1.0)
    assert token.approx_kl_k3.item() == pytest.approx(
        action.approx_kl_k3.item(), abs=1e-6
    )  # of actions at both levels
    half = policy_loss(log(2.0, 1.0)[None], old, advantage, level="token", **CLIP)
    assert half.clip_fraction.item() == 0.5


@pytest.mark.parametrize("level", ["action", "token"])
def test_equal_policies_have_ratio_exactly_1_and_no_kl(level):
    new, _, advantage = batch()
    result = policy_loss(new, new.detach().clone(), advantage, level=level, **CLIP)
    assert result.ratio_mean.item() == 1.0 and result.ratio_max_abs_dev.item() == 0.0
    assert result.approx_kl_k3.item() == 0.0 and result.clip_fraction.item() == 0.0
    torch.testing.assert_close(result.loss, -advantage.mean())
    result.loss.backward()  # the policy gradient of REINFORCE with advantages
    expected = -advantage[:, None].expand(-1, 7) / (len(advantage) * (7 if level == "token" else 1))
    torch.testing.assert_close(new.grad, expected)


def test_the_gradient_raises_good_actions_and_lowers_bad_ones():
    logits = torch.zeros(2, 7, 256, requires_grad=True)
    index = torch.full((2, 7), 3)
    new = action_logprobs(logits, index, 0.5)
    policy_loss(new, new.detach(), torch.tensor([1.0, -1.0]), **CLIP).loss.backward()
    assert (logits.grad[0, :, 3] < 0).all() and (
        logits.grad[1, :, 3] > 0
    ).all()  # a step goes against the gradient


def test_no_gradient_beyond_the_clip_range_but_back_into_it():
    new = log(1.5, 1.5, 0.5, 0.5)[:, None].requires_grad_()
    policy_loss(
        new, torch.zeros(4, 1), torch.tensor([1.0, -1.0, 1.0, -1.0]), **CLIP
    ).loss.backward()
    assert new.grad[0] == 0 and new.grad[3] == 0  # already far enough
    assert new.grad[1] > 0 and new.grad[2] < 0  # gone the wrong way


@pytest.mark.parametrize("level", ["action", "token"])
def test_policy_gradient_equals_finite_differences(level):
    new, old, advantage = batch()
    weight = torch.tensor([1.0, 0.0] * 6)
    iw = torch.linspace(0.5, 2.0, 12)

    def loss(x):
        return policy_loss(
            x, old, advantage, level=level, importance_weight_B=iw, weight_B=weight, **CLIP
        ).loss

    loss(new).backward()
    # float32 throughout by contract, so a coarse step and tolerance; no ratio lies within a step of a kink
    step = 2e-3
    for row, token in [(0, 0), (2, 3), (5, 1), (8, 6), (10, 2)]:
        shift = torch.zeros_like(old)
        shift[row, token] = step
        numeric = (loss(new.detach() + shift) - loss(new.detach() - shift)) / (2 * step)
        assert new.grad[row, token].item() == pytest.approx(numeric.item(), abs=2e-4)
    assert new.grad[1::2].abs().max() == 0 and new.grad[::2].abs().max() > 0.01


def test_importance_weights_scale_each_action_and_are_truncated():
    old, behaviour = (
        log(0.5, 0.4)[None].repeat(3, 1),
        torch.stack([log(0.5, 0.4), log(0.1, 0.1), log(1.0, 0.8)]),
    )
    weight = truncated_importance_weight(old, behaviour, cap=2.0)
    torch.testing.assert_close(weight, torch.tensor([1.0, 2.0, 0.25]))  # 1, 20 cut to 2, 0.2 / 0.8
    advantage = torch.tensor([1.0, 10.0, 100.0])
    loss = policy_loss(old, old, advantage, importance_weight_B=weight, **CLIP).loss
    assert loss.item() == pytest.approx(-(1.0 + 20.0 + 25.0) / 3)


def test_value_loss_by_hand():
    # v, v_old, R, c = 0.5. 1: inside, (1.2 - 2)^2 = 0.64. 2: clamp(3, 0.5..1.5) = 1.5, max(1, 0.25) = 1.
    # 3: clamp(2, -0.5..0.5) = 0.5, max(0, 2.25) = 2.25, no gradient.
    value = torch.tensor([1.2, 3.0, 2.0], requires_grad=True)
    result = value_loss(value, torch.tensor([1.0, 1.0, 0.0]), torch.tensor([2.0, 2.0, 2.0]), 0.5)
    assert result.loss.item() == pytest.approx(0.5 * (0.64 + 1.0 + 2.25) / 3)
    assert result.clip_fraction.item() == pytest.approx(1 / 3)
    result.loss.backward()
    torch.testing.assert_close(value.grad, torch.tensor([-0.8, 1.0, 0.0]) / 3)


def test_value_loss_without_clipping_is_half_the_squared_error():
    value, returns = torch.randn(9, requires_grad=True), torch.randn(9)
    result = value_loss(value, torch.zeros(9), returns, None)
    torch.testing.assert_close(result.loss, 0.5 * ((value - returns) ** 2).mean())
    result.loss.backward()
    torch.testing.assert_close(value.grad, (value.detach() - returns) / 9)  # towards the return
    assert result.clip_fraction.item() == 0.0


def test_value_gradient_equals_finite_differences():
    generator = torch.Generator().manual_seed(3)
    value, old, returns = (torch.randn(16, generator=generator) for _ in range(3))
    value.requires_grad_()
    value_loss(value, old, returns, 0.4).loss.backward()
    for row in range(16):
        shift = torch.zeros(16)
        shift[row] = 1e-3
        up, down = (value_loss(value.detach() + s, old, returns, 0.4).loss for s in (shift, -shift))
        assert value.grad[row].item() == pytest.approx(((up - down) / 2e-3).item(), abs=1e-3)


@pytest.mark.parametrize("sizes", [[12], [5, 5, 2], [1] * 12])
def test_micro_batches_add_up_to_the_minibatch(sizes):
    """Unequal micro-batches of unequal valid counts: losses, gradients and statistics add up exactly."""
    new, old, advantage = batch()
    value = torch.randn(12, generator=torch.Generator().manual_seed(1), requires_grad=True)
    weight = torch.tensor([1.0, 1, 1, 0, 0, 1, 1, 1, 1, 0, 1, 1])
    valid = weight.bool()
    whole = policy_loss(new[valid], old[valid], advantage[valid], **CLIP)
    whole_value = value_loss(value[valid], value.detach()[valid] + 0.3, advantage[valid], 0.1)
    (whole.loss + whole_value.loss).backward()
    grads = new.grad.clone(), value.grad.clone()
    new.grad = value.grad = None
    sums: dict[str, float] = {}
    for rows in torch.arange(12).split(sizes):
        part = policy_loss(
            new[rows],
            old[rows],
            advantage[rows],
            weight_B=weight[rows],
            normalizer=weight.sum(),
            **CLIP,
        )
        part_value = value_loss(
            value[rows],
            value.detach()[rows] + 0.3,
            advantage[rows],
            0.1,
            weight_B=weight[rows],
            normalizer=weight.sum(),
        )
        (part.loss + part_value.loss).backward()
        for name in ("loss", "clip_fraction", "approx_kl_k3", "approx_kl_k1", "ratio_mean"):
            sums[name] = sums.get(name, 0.0) + getattr(part, name).item()
        sums["value_loss"] = sums.get("value_loss", 0.0) + part_value.loss.item()
    torch.testing.assert_close(new.grad, grads[0])
    torch.testing.assert_close(value.grad, grads[1])
    assert sums.pop("value_loss") == pytest.approx(whole_value.loss.item(), rel=1e-5)
    for name, total in sums.items():
        assert total == pytest.approx(getattr(whole, name).item(), rel=1e-5), name


def test_void_samples_count_for_nothing_and_a_wholly_void_batch_is_0():
    new, old, advantage = batch(4)
    advantage[1] = math.nan
    result = policy_loss(new, old, advantage, weight_B=torch.tensor([1.0, 0, 1, 1]), **CLIP)
    rest = [0, 2, 3]
    torch.testing.assert_close(
        result.loss, policy_loss(new[rest], old[rest], advantage[rest], **CLIP).loss
    )
    void = policy_loss(new, old, advantage, weight_B=torch.zeros(4), **CLIP)
    void.loss.backward()
    assert void.loss.item() == 0.0 and void.ratio_max_abs_dev.item() == 0.0
    assert weighted_mean(torch.tensor([2.0, 5.0]), torch.tensor([0.25, 0.25])).item() == 3.5


def test_kl_k3_is_never_negative_and_estimates_the_kl():
    generator = torch.Generator().manual_seed(0)
    policy, reference = (torch.randn(5, generator=generator).log_softmax(-1) for _ in range(2))
    estimate = kl_k3(policy, reference)
    assert (estimate >= 0).all()
    assert kl_k3(policy, policy).abs().max() == 0
    exact = (policy.exp() * (policy - reference)).sum()
    torch.testing.assert_close(
        (policy.exp() * estimate).sum(), exact
    )  # the expectation over the policy's samples
    sample = policy[:1].clone().requires_grad_()
    kl_k3(sample, sample.detach() - 1.0).sum().backward()
    assert (
        sample.grad.item() > 0
    )  # likelier than under the reference: its probability is to go down


def test_normalised_advantages_over_ranks():
    x, mask = torch.tensor([1.0, 2.0, 3.0, 100.0, 6.0]), torch.tensor([1, 1, 1, 0, 1]).bool()
    both = moments(x[:2], mask[:2]) + moments(x[2:], mask[2:])  # two ranks
    normal = normalize(x, both)[mask]
    assert normal.mean().item() == pytest.approx(0.0, abs=1e-6)
    assert normal.std(correction=0).item() == pytest.approx(1.0, rel=1e-5)
    assert normalize(torch.full((3,), 7.0), moments(torch.full((3,), 7.0))).abs().max() == 0


def test_explained_variance():
    returns = torch.tensor([0.0, 1.0, 2.0, 3.0])
    assert explained_variance(returns + 5.0, returns) == pytest.approx(
        1.0
    )  # an offset explains all the variance
    assert explained_variance(torch.full((4,), 1.5), returns) == pytest.approx(0.0)
    assert explained_variance(-returns, returns) == pytest.approx(-3.0)
    assert math.isnan(explained_variance(returns, torch.ones(4)))
    assert math.isnan(explained_variance(returns, torch.full((4,), 0.3)))  # no exact binary number
    assert math.isnan(explained_variance(returns[:1], returns[:1]))


def test_wrong_arguments_are_refused():
    new, old, advantage = batch(4)
    with pytest.raises(ValueError, match="ratio level 'sentence'"):
        policy_loss(new, old, advantage, level="sentence", **CLIP)
    with pytest.raises(ValueError, match="clip_low <= 1"):
        policy_loss(new, old, advantage, clip_low=1.5, clip_high=0.2)
    with pytest.raises(ValueError, match=r"\(B,\)"):
        policy_loss(new, old, advantage[:, None], **CLIP)
    with pytest.raises(ValueError, match="one shape"):
        value_loss(advantage, advantage, advantage[:, None], 0.2)
    with pytest.raises(ValueError, match="cliprange_value -1"):
        value_loss(advantage, advantage, advantage, -1.0)
