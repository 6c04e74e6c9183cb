"""Outcomes of ended episodes against the values predicted on the way, by hand and on a critic that knows nothing."""

import pytest
import torch

from ppo.gae import gae
from ppo.losses import explained_variance
from ppo.outcomes import EpisodeOutcomes, discounted_outcomes
from ppo.rollout import Rollout


def rollout_of(
    reward_TB: list[list[float]] | torch.Tensor,
    *,
    terminated: tuple[tuple[int, int], ...] = (),
    truncated: tuple[tuple[int, int], ...] = (),
    dropped: tuple[tuple[int, int], ...] = (),
    episode_step: list[int] | None = None,
) -> Rollout:
    """A rollout in which only rewards and ends matter; of a dropped episode the steps before its end stay valid."""
    reward_TB = torch.as_tensor(reward_TB, dtype=torch.float32)
    num_steps, num_envs = reward_TB.shape
    terminated_TB, truncated_TB = (torch.zeros(num_steps, num_envs, dtype=torch.bool) for _ in "12")
    valid_TB = torch.ones(num_steps, num_envs, dtype=torch.bool)
    for t, b in terminated + dropped:
        terminated_TB[t, b] = True
    for t, b in truncated:
        truncated_TB[t, b] = True
    for t, b in dropped:
        valid_TB[t, b] = False
    images = torch.zeros(num_steps, num_envs, 1, 1, 3, dtype=torch.uint8)
    return Rollout(
        prompts=[[1]],
        images_TBHWC=images,
        action_ids_TBA=torch.zeros(num_steps, num_envs, 7, dtype=torch.int64),
        logprob_TBA=torch.zeros(num_steps, num_envs, 7),
        reward_TB=reward_TB,
        terminated_TB=terminated_TB,
        truncated_TB=truncated_TB,
        task_id_TB=torch.zeros(num_steps, num_envs, dtype=torch.int64),
        valid_TB=valid_TB,
        last_images_BHWC=images[0],
        last_task_id_B=torch.zeros(num_envs, dtype=torch.int64),
        episode_step_B=torch.tensor(episode_step or [0] * num_envs),
        final_images_KHWC=images[0, :1].expand(len(truncated), 1, 1, 3),
        final_t_K=torch.tensor([t for t, _ in truncated], dtype=torch.int64),
        final_b_K=torch.tensor([b for _, b in truncated], dtype=torch.int64),
    )


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values)[:, None]


def test_an_outcome_is_the_discounted_sum_of_the_rewards_to_the_end():
    assert discounted_outcomes(torch.tensor([0.0, 2.0, 0.0, 1.0]), 0.5).tolist() == [
        1.125,
        2.25,
        0.5,
        1.0,
    ]


def test_an_episode_over_three_rollouts_counts_with_all_its_steps_once_it_ends():
    outcomes = EpisodeOutcomes()
    first = outcomes.add(rollout_of([[0.0], [0.0]]), column(0.1, 0.2), 0.5)
    second = outcomes.add(rollout_of([[1.0], [0.0]], episode_step=[2]), column(0.3, 0.4), 0.5)
    assert first.num_episodes == second.num_episodes == len(first.outcome_M) == 0
    # the end of this one, and all of the next: two more steps
    third = rollout_of([[4.0], [0.0], [3.0]], terminated=((0, 0), (2, 0)), episode_step=[4])
    ended = outcomes.add(third, column(0.5, 0.6, 0.7), 0.5)
    assert ended.num_episodes == 2
    assert ended.outcome_M.tolist() == [0.5, 1.0, 2.0, 2.0, 4.0, 1.5, 3.0]
    assert ended.value_M.tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7])


def test_the_outcome_at_a_time_limit_is_what_came_within_it():
    ended = EpisodeOutcomes().add(
        rollout_of([[1.0], [0.0]], truncated=((1, 0),)), column(5.0, 6.0), 0.5
    )
    assert ended.outcome_M.tolist() == [1.0, 0.0], "no value of the last observation is added"


def test_dropped_and_given_up_episodes_do_not_count_and_the_next_ones_do():
    outcomes = EpisodeOutcomes()
    outcomes.add(rollout_of([[0.0, 0.0]]), torch.zeros(1, 2), 0.5)
    # environment 0 dies, environment 1 begins another episode although its last one did not end
    second = rollout_of(
        [[0.0, 0.0], [1.0, 2.0]],
        terminated=((1, 0), (1, 1)),
        dropped=((0, 0),),
        episode_step=[1, 0],
    )
    ended = outcomes.add(second, torch.tensor([[0.1, 0.2], [0.3, 0.4]]), 0.5)
    assert ended.num_episodes == 2
    assert ended.outcome_M.tolist() == [1.0, 1.0, 2.0]
    assert ended.value_M.tolist() == pytest.approx([0.3, 0.2, 0.4])


def test_an_episode_whose_start_was_not_seen_does_not_count():
    outcomes = EpisodeOutcomes()
    first = rollout_of([[0.0], [0.0]], episode_step=[2])
    assert outcomes.add(first, column(0.1, 0.2), 0.5).num_episodes == 0
    second = rollout_of([[1.0], [0.0], [1.0]], terminated=((0, 0), (2, 0)), episode_step=[4])
    ended = outcomes.add(second, column(0.3, 0.4, 0.5), 0.5)
    assert (ended.num_episodes, ended.outcome_M.tolist()) == (1, [0.5, 1.0])


def test_running_episodes_go_through_a_checkpoint():
    straight, resumed = EpisodeOutcomes(), EpisodeOutcomes()
    assert straight.tensors() == {}
    first = rollout_of([[0.0, 1.0], [0.0, 0.0]], terminated=((1, 1),))
    straight.add(first, torch.rand(2, 2), 0.5)
    resumed.load({name: tensor.clone() for name, tensor in straight.tensors().items()})
    second = rollout_of([[1.0, 1.0]], terminated=((0, 0), (0, 1)), episode_step=[2, 0])
    one, two = (outcomes.add(second, torch.ones(1, 2), 0.5) for outcomes in (straight, resumed))
    assert one.num_episodes == two.num_episodes == 2 and len(one.value_M) == 4
    assert torch.equal(one.outcome_M, two.outcome_M) and torch.equal(one.value_M, two.value_M)
    resumed.load({})
    third = rollout_of([[1.0, 1.0]], terminated=((0, 0), (0, 1)))
    assert resumed.add(third, torch.ones(1, 2), 0.5).num_episodes == 2


def test_a_critic_that_knows_nothing_looks_good_against_lambda_returns_and_bad_against_outcomes():
    """The value is one random number per episode; whether it succeeds, at its last step, is drawn apart."""
    num_envs, length, num_steps = 2000, 120, 40
    generator = torch.Generator().manual_seed(0)
    reward_TB = torch.zeros(length, num_envs)
    reward_TB[-1] = (torch.rand(num_envs, generator=generator) < 0.45).float()
    value_B = 0.4 + 0.15 * torch.randn(num_envs, generator=generator)
    value_TB = value_B.expand(num_steps, num_envs)
    outcomes, targets = EpisodeOutcomes(), []
    for start in range(0, length, num_steps):
        is_last = start + num_steps == length
        rollout = rollout_of(
            reward_TB[start : start + num_steps],
            terminated=tuple((num_steps - 1, b) for b in range(num_envs)) if is_last else (),
            episode_step=[start] * num_envs,
        )
        done_TB = rollout.done_TB
        _, return_TB = gae(rollout.reward_TB, value_TB, value_TB, done_TB, done_TB, 0.99, 0.9)
        targets.append(return_TB)
        ended = outcomes.add(rollout, value_TB, 0.99)
    assert ended.num_episodes == num_envs and len(ended.value_M) == length * num_envs
    against_targets = explained_variance(value_B.expand(length, num_envs), torch.cat(targets))
    assert against_targets == pytest.approx(0.56, abs=0.02)
    assert explained_variance(ended.value_M, ended.outcome_M) == pytest.approx(-0.19, abs=0.02)
