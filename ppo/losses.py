"""PPO's losses as pure functions of float32 tensors (Schulman et al. 2017, arXiv:1707.06347).

Every mean here is a weighted mean, sum(weight * x) / normalizer. Left alone, all weights are 1 and the normaliser is
their sum: the plain mean. For exact gradient accumulation give every micro-batch (on every rank) its own weights and
the *same* normaliser, the sum of weights of the whole minibatch; then losses, gradients and the averaged statistics
of the micro-batches add up to those of the minibatch, whatever their sizes. Where the ranks' gradients are averaged
(FSDP, DDP) instead of summed, divide the normaliser by the number of ranks.

Statistics are detached. Shapes: B batch, A action tokens, V action vocabulary.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

RatioLevel = Literal["action", "token"]


@dataclass
class PolicyLoss:
    """Result of `policy_loss`; all scalars. Everything but the maximum adds up over micro-batches.

    Attributes:
        loss: to be minimised; carries the gradient.
        clip_fraction: share of ratios (actions or tokens) outside [1 - clip_low, 1 + clip_high].
        approx_kl_k3: k3 estimate of KL(old || new) of whole actions, in nats, at either ratio level.
        approx_kl_k1: the same by mean(old - new) log-prob: unbiased too, noisier, can be negative.
        ratio_mean: mean ratio; 1 in expectation.
        ratio_max_abs_dev: largest |ratio - 1| among samples of positive weight (maximum over micro-batches).
    """

    loss: Tensor
    clip_fraction: Tensor
    approx_kl_k3: Tensor
    approx_kl_k1: Tensor
    ratio_mean: Tensor
    ratio_max_abs_dev: Tensor


@dataclass
class ValueLoss:
    """Result of `value_loss`; scalars that add up over micro-batches.

    Attributes:
        loss: 0.5 * mean squared error with clipping, without vf_coef; carries the gradient.
        clip_fraction: share of samples whose clipped error was the larger one; no gradient flows through those.
    """

    loss: Tensor
    clip_fraction: Tensor


def weighted_mean(
    x_B: Tensor, weight_B: Tensor | None = None, normalizer: Tensor | float | None = None
) -> Tensor:
    """Return sum(weight * x) / normalizer, a scalar; weight 1 and normaliser sum(weight) when left out.

    Entries of weight 0 count for nothing, in the value and in the gradient. Over entries of total weight 0 the result
    is 0 with a gradient of 0, not NaN: a rank whose samples are all void must still take part in the backward pass.
    """
    if weight_B is None:
        weight_B = torch.ones_like(x_B)
    weight_B = weight_B.to(x_B.dtype)
    if normalizer is None:
        total = weight_B.sum()
        normalizer = torch.where(total > 0, total, torch.ones_like(total))
    return (torch.where(weight_B != 0, x_B, torch.zeros_like(x_B)) * weight_B).sum() / normalizer


def action_logprobs(
    logits_BAV: Tensor, action_index_BA: Tensor, temperature: float = 1.0
) -> Tensor:
    """Return the log-probability of each action token, (B, A) float32, under softmax(logits / temperature).

    Args:
        logits_BAV: raw logits over the action tokens only, ascending token id.
        action_index_BA: token id minus the first action token's id, 0 .. V - 1.
        temperature: that of the rollout, > 0.

    Raises:
        ValueError: temperature is not positive.
    """
    logprob_BAV = _log_softmax(logits_BAV, temperature)
    return logprob_BAV.gather(-1, action_index_BA.long().unsqueeze(-1)).squeeze(-1)


def entropy(logits_BAV: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the entropy of each token's distribution in nats, (B, A) float32; see `action_logprobs`."""
    logprob_BAV = _log_softmax(logits_BAV, temperature)
    return -(logprob_BAV.exp() * logprob_BAV).sum(-1)


def policy_loss(
    logprob_BA: Tensor,
    old_logprob_BA: Tensor,
    advantage_B: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    level: RatioLevel = "action",
    importance_weight_B: Tensor | None = None,
    weight_B: Tensor | None = None,
    normalizer: Tensor | float | None = None,
) -> PolicyLoss:
    """Return the clipped surrogate -mean(min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A)).

    Args:
        logprob_BA: log-probs of the taken tokens under the present policy; carries the gradient.
        old_logprob_BA: the same under the policy at the start of the update (no gradient is taken).
        advantage_B: one advantage per action.
        clip_low: lower clip range, > 0 and at most 1.
        clip_high: upper clip range, > 0; larger than clip_low is DAPO's "clip-higher" (arXiv:2503.14476).
        level: "action": one ratio per action, exp of the summed token differences. "token": one per token, and the
            mean over an action's tokens is its loss.
        importance_weight_B: see `truncated_importance_weight`; multiplies each action's loss.
        weight_B: one weight per action, see the module.
        normalizer: see the module.

    Raises:
        ValueError: unknown level, clip range out of bounds, or shapes that do not belong together.
    """
    _check_policy_arguments(logprob_BA, old_logprob_BA, advantage_B, clip_low, clip_high, level)
    log_ratio_BA = logprob_BA.float() - old_logprob_BA.detach().float()
    log_ratio_BK = log_ratio_BA.sum(-1, keepdim=True) if level == "action" else log_ratio_BA
    ratio_BK = log_ratio_BK.exp()
    advantage_B1 = advantage_B.detach().float().unsqueeze(-1)
    clipped_BK = ratio_BK.clamp(1.0 - clip_low, 1.0 + clip_high)
    loss_B = -torch.minimum(ratio_BK * advantage_B1, clipped_BK * advantage_B1).mean(-1)
    if importance_weight_B is not None:
        loss_B = loss_B * importance_weight_B.detach().float()
    with torch.no_grad():
        outside_BK = ((ratio_BK < 1.0 - clip_low) | (ratio_BK > 1.0 + clip_high)).float()
        log_ratio_B = log_ratio_BA.sum(-1)
        counted_BK = (
            torch.ones_like(ratio_BK, dtype=torch.bool)
            if weight_B is None
            else weight_B.unsqueeze(-1) > 0
        )
        max_dev = torch.where(counted_BK, (ratio_BK - 1.0).abs(), torch.zeros_like(ratio_BK)).max()
        stats_B = (
            outside_BK.mean(-1),
            log_ratio_B.exp() - 1.0 - log_ratio_B,
            -log_ratio_B,
            ratio_BK.mean(-1),
        )
        clip_fraction, k3, k1, ratio_mean = (
            weighted_mean(x, weight_B, normalizer) for x in stats_B
        )
    return PolicyLoss(
        weighted_mean(loss_B, weight_B, normalizer), clip_fraction, k3, k1, ratio_mean, max_dev
    )


def value_loss(
    value_B: Tensor,
    old_value_B: Tensor,
    return_B: Tensor,
    cliprange_value: float | None = None,
    *,
    weight_B: Tensor | None = None,
    normalizer: Tensor | float | None = None,
) -> ValueLoss:
    """Return 0.5 * mean(max((v - R)^2, (clamp(v, v_old - c, v_old + c) - R)^2)), c = cliprange_value.

    Args:
        value_B: present values; carry the gradient.
        old_value_B: values at the start of the update.
        return_B: targets.
        cliprange_value: c, > 0; None: no clipping.
        weight_B: one weight per sample, see the module.
        normalizer: see the module.

    Raises:
        ValueError: shapes differ (broadcasting (B,) with (B, 1) would be silently wrong) or c is not positive.
    """
    if not (value_B.shape == old_value_B.shape == return_B.shape):
        raise ValueError(
            f"value {tuple(value_B.shape)}, old value {tuple(old_value_B.shape)} and return "
            f"{tuple(return_B.shape)} must have one shape"
        )
    value_B, old_value_B, return_B = (
        value_B.float(),
        old_value_B.detach().float(),
        return_B.detach().float(),
    )
    error_B = (value_B - return_B) ** 2
    if cliprange_value is None:
        loss = 0.5 * weighted_mean(error_B, weight_B, normalizer)
        return ValueLoss(loss, torch.zeros_like(loss.detach()))
    if cliprange_value <= 0:
        raise ValueError(
            f"cliprange_value {cliprange_value} must be positive: use None for no clipping"
        )
    clipped_B = torch.clamp(value_B, old_value_B - cliprange_value, old_value_B + cliprange_value)
    clipped_error_B = (clipped_B - return_B) ** 2
    loss = 0.5 * weighted_mean(torch.maximum(error_B, clipped_error_B), weight_B, normalizer)
    clip_fraction = weighted_mean((clipped_error_B > error_B).float(), weight_B, normalizer)
    return ValueLoss(loss, clip_fraction)


def kl_k3(logprob: Tensor, ref_logprob: Tensor) -> Tensor:
    """Return Schulman's k3 estimate of KL(policy || reference), elementwise, for samples of the policy.

    k3 = exp(d) - 1 - d with d = ref_logprob - logprob: never negative, unbiased (joschu.net/blog/kl-approx.html).
    The gradient flows through `logprob`. Sum token-wise values over an action's tokens for the KL of actions.
    """
    difference = ref_logprob.detach().float() - logprob.float()
    return difference.exp() - 1.0 - difference


def truncated_importance_weight(
    old_logprob_BA: Tensor, behaviour_logprob_BA: Tensor, cap: float
) -> Tensor:
    """Return min(pi_old / pi_behaviour, cap) per action, (B,) float32 without gradient.

    Corrects for actions sampled by a policy older than the one at the start of the update (`--async_depth 1`);
    the truncation bounds the variance (IMPALA, arXiv:1802.01561).

    Raises:
        ValueError: cap is not positive.
    """
    if cap <= 0:
        raise ValueError(f"importance weight cap {cap} must be positive")
    log_weight_B = (old_logprob_BA.detach().float() - behaviour_logprob_BA.detach().float()).sum(-1)
    return log_weight_B.exp().clamp(max=cap)


def moments(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return (count, sum, sum of squares) as a (3,) float64 tensor; sum it over ranks, then `normalize`."""
    x = x.detach().double()
    if mask is not None:
        x = x[mask.bool()]
    return torch.stack(
        [torch.tensor(float(x.numel()), dtype=x.dtype, device=x.device), x.sum(), (x * x).sum()]
    )


def normalize(x: Tensor, moments_3: Tensor, eps: float = 1e-8) -> Tensor:
    """Return (x - mean) / (std + eps) in float32 with the moments of `moments` (population standard deviation).

    Raises:
        ValueError: the moments are of no sample at all.
    """
    count, total, squares = (float(m) for m in moments_3)
    if count == 0:
        raise ValueError("cannot normalise with the moments of an empty set")
    mean = total / count
    std = max(squares / count - mean * mean, 0.0) ** 0.5
    return ((x.double() - mean) / (std + eps)).float()


def explained_variance(value: Tensor, return_: Tensor) -> float:
    """Return 1 - Var(return - value) / Var(return); NaN where it is undefined (fewer than two, or equal, returns).

    1 is a perfect critic, 0 one no better than a constant, below 0 one that is worse.
    """
    return explained_variance_of_moments(moments(return_ - value), moments(return_))


def explained_variance_of_moments(error_moments_3: Tensor, return_moments_3: Tensor) -> float:
    """Return `explained_variance` from the `moments` of return - value and of the returns, summed over ranks."""
    count, total, squares = return_moments_3.tolist()
    _, error_total, error_squares = error_moments_3.tolist()
    if count < 2:
        return math.nan
    variance = squares / count - (total / count) ** 2
    if variance <= 1e-14 * squares / count:  # round-off of two float64 sums: the returns are equal
        return math.nan
    return 1.0 - (error_squares / count - (error_total / count) ** 2) / variance


def _log_softmax(logits_BAV: Tensor, temperature: float) -> Tensor:
    if temperature <= 0:
        raise ValueError(
            f"temperature {temperature} must be positive: greedy actions have no log-probability"
        )
    return F.log_softmax(logits_BAV.float() / temperature, dim=-1)


def _check_policy_arguments(
    logprob_BA: Tensor,
    old_logprob_BA: Tensor,
    advantage_B: Tensor,
    clip_low: float,
    clip_high: float,
    level: str,
) -> None:
    if level not in ("action", "token"):
        raise ValueError(f"ratio level {level!r} is not known: use action or token")
    if not (0.0 < clip_low <= 1.0 and clip_high > 0.0):
        raise ValueError(
            f"clip range ({clip_low}, {clip_high}): need 0 < clip_low <= 1 and clip_high > 0"
        )
    if (
        logprob_BA.ndim != 2
        or logprob_BA.shape != old_logprob_BA.shape
        or advantage_B.shape != logprob_BA.shape[:1]
    ):
        raise ValueError(
            f"log-probs {tuple(logprob_BA.shape)} and {tuple(old_logprob_BA.shape)} must both be (B, A) "
            f"and the advantage {tuple(advantage_B.shape)} (B,)"
        )
