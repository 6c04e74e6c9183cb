import pytest
import torch

from ppo.gae import gae


def column(*numbers, dtype=torch.float32):
    return torch.tensor(numbers, dtype=dtype)[:, None]


def flags(*numbers):
    return column(*numbers, dtype=torch.bool)


def by_definition(reward, value, next_value, terminated, done, gamma, lam):
    """A_t = sum over l of (gamma lam)^l delta_{t+l} up to the end of the chain: O(T^2), python floats, one env."""
    advantage = []
    for t in range(len(reward)):
        total = 0.0
        for k in range(t, len(reward)):
            delta = reward[k] + (0.0 if terminated[k] else gamma * next_value[k]) - value[k]
            total += (gamma * lam) ** (k - t) * delta
            if done[k]:
                break
        advantage.append(total)
    return advantage


def test_terminated_episode_by_hand():
    # gamma 0.5, lam 0.5. delta_1 = 1 - 2 = -1 (terminal: next value 100 must not count)
    # delta_0 = 0 + 0.5 * 2 - 1 = 0;  A_0 = 0 + 0.25 * -1 = -0.25
    advantage, returns = gae(
        column(0, 1), column(1, 2), column(2, 100), flags(0, 1), flags(0, 1), 0.5, 0.5
    )
    torch.testing.assert_close(advantage, column(-0.25, -1.0))
    torch.testing.assert_close(returns, column(0.75, 1.0))


def test_truncated_episode_bootstraps_its_own_last_observation_by_hand():
    # Step 0 is truncated with final value 4; step 1 begins another episode of value 10, bootstrapped by 6.
    # delta_0 = 1 + 0.5 * 4 - 1 = 2, and nothing of step 1;  delta_1 = 0 + 0.5 * 6 - 10 = -7
    advantage, returns = gae(
        column(1, 0), column(1, 10), column(4, 6), flags(0, 0), flags(1, 0), 0.5, 0.5
    )
    torch.testing.assert_close(advantage, column(2.0, -7.0))
    torch.testing.assert_close(returns, column(3.0, 3.0))


def test_several_episodes_in_one_row_by_hand():
    # gamma = lam = 1: an advantage is the sum of rewards to the end of the episode (plus bootstrap) minus the value.
    reward, value = column(1, 2, 4, 8, 16), column(0.5, 0.5, 0.5, 0.5, 0.5)
    next_value = column(
        0.5, 99, 0.5, 3.0, 7.0
    )  # 99: after termination; 3: truncated; 7: the rollout's end
    terminated, done = flags(0, 1, 0, 0, 0), flags(0, 1, 0, 1, 0)
    advantage, returns = gae(reward, value, next_value, terminated, done, 1.0, 1.0)
    torch.testing.assert_close(returns, column(3.0, 2.0, 15.0, 11.0, 23.0))
    torch.testing.assert_close(advantage, returns - 0.5)


@pytest.mark.parametrize("num_envs", [1, 5])
def test_equals_the_definition_on_random_rollouts(num_envs):
    generator = torch.Generator().manual_seed(num_envs)
    shape = (17, num_envs)
    reward, value, next_value = (torch.randn(shape, generator=generator) for _ in range(3))
    terminated = torch.rand(shape, generator=generator) < 0.15
    done = terminated | (torch.rand(shape, generator=generator) < 0.15)
    assert (done & ~terminated).any() and terminated.any()
    advantage, returns = gae(reward, value, next_value, terminated, done, 0.93, 0.8)
    for env in range(num_envs):
        columns = [x[:, env].tolist() for x in (reward, value, next_value, terminated, done)]
        expected = torch.tensor(by_definition(*columns, 0.93, 0.8))
        torch.testing.assert_close(advantage[:, env], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(returns, advantage + value)


def test_a_nan_value_after_termination_has_no_effect():
    advantage, _ = gae(
        column(1, 1), column(0, 0), column(float("nan"), 2), flags(1, 0), flags(1, 0), 0.9, 0.9
    )
    torch.testing.assert_close(advantage, column(1.0, 2.8))


def test_lambda_0_is_the_one_step_error_and_low_precision_is_computed_in_float32():
    reward, value, next_value = (torch.randn(6, 2, dtype=torch.bfloat16) for _ in range(3))
    none = torch.zeros(6, 2, dtype=torch.bool)
    advantage, _ = gae(reward, value, next_value, none, none, 0.9, 0.0)
    assert advantage.dtype == torch.float32
    torch.testing.assert_close(advantage, reward.float() + 0.9 * next_value.float() - value.float())


def test_wrong_shapes_and_discounts_are_refused():
    ones, none = torch.ones(3, 2), torch.zeros(3, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="one shape"):
        gae(ones, ones[:2], ones, none, none, 0.9, 0.9)
    with pytest.raises(ValueError, match=r"gamma 1.1 .* must lie in"):
        gae(ones, ones, ones, none, none, 1.1, 0.9)
