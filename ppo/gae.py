"""Generalised advantage estimation (Schulman et al. 2016, arXiv:1506.02438, equations 11 and 16).

Shapes: T steps, B environments.
"""

import torch
from torch import Tensor


@torch.no_grad()
def gae(
    reward_TB: Tensor,
    value_TB: Tensor,
    next_value_TB: Tensor,
    terminated_TB: Tensor,
    done_TB: Tensor,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """Return the advantages and the returns (targets of the value function) of a rollout, both (T, B) float32.

        delta_t = r_t + gamma * V'_t * (1 - terminated_t) - V_t
        A_t     = delta_t + gamma * lam * (1 - done_t) * A_{t+1},   A_T = 0
        R_t     = A_t + V_t

    It deviates from the usual code in that V'_t, the value of the observation that step t really led to, is given
    and not read from V_{t+1}: after a reset that would be the next episode's first observation. So a time limit
    (done, not terminated) bootstraps from the episode's own last observation, while the recursion stops.

    Args:
        reward_TB: rewards.
        value_TB: values of the observations acted on.
        next_value_TB: values of the observations reached; unused where terminated (may be anything there, even NaN).
        terminated_TB: the episode ended for good at this step.
        done_TB: the episode ended at this step for whatever reason, or the chain is cut here; includes terminated.
        gamma: discount per step.
        lam: decay of the exponential average.

    Raises:
        ValueError: the shapes differ, or gamma or lam are outside [0, 1].
    """
    shapes = {tuple(x.shape) for x in (reward_TB, value_TB, next_value_TB, terminated_TB, done_TB)}
    if len(shapes) != 1 or reward_TB.ndim != 2:
        raise ValueError(f"gae needs five arrays of one shape (T, B), got {sorted(shapes)}")
    if not (0.0 <= gamma <= 1.0 and 0.0 <= lam <= 1.0):
        raise ValueError(f"gamma {gamma} and lam {lam} must lie in [0, 1]")
    reward_TB, value_TB, next_value_TB = reward_TB.float(), value_TB.float(), next_value_TB.float()
    terminated_TB = terminated_TB.bool()
    continues_TB = (~(done_TB.bool() | terminated_TB)).float()
    bootstrap_TB = torch.where(terminated_TB, torch.zeros_like(next_value_TB), next_value_TB)
    delta_TB = reward_TB + gamma * bootstrap_TB - value_TB

    advantage_TB = torch.empty_like(delta_TB)
    advantage_B = torch.zeros_like(delta_TB[0])
    for t in reversed(range(delta_TB.shape[0])):
        advantage_B = delta_TB[t] + gamma * lam * continues_TB[t] * advantage_B
        advantage_TB[t] = advantage_B
    return advantage_TB, advantage_TB + value_TB
