import dataclasses

import pytest
import torch

from ppo.rollout import Rollout, minibatches


def make_rollout(num_steps=3, num_envs=4, *, offset=0, truncated=((0, 1), (2, 3)), version=5):
    """A rollout in which every number tells its step and environment."""
    t = torch.arange(num_steps)[:, None].expand(num_steps, num_envs)
    b = torch.arange(num_envs).expand(num_steps, num_envs) + offset
    code_TB = 10 * t + b
    truncated_TB = torch.zeros(num_steps, num_envs, dtype=torch.bool)
    for step, env in truncated:
        truncated_TB[step, env] = True
    final = torch.tensor([100 + code_TB[step, env] for step, env in truncated], dtype=torch.uint8)

    def images(code):
        return code.to(torch.uint8)[..., None, None, None].expand(*code.shape, 2, 2, 3).clone()

    return Rollout(
        prompts=[[1, 2], [1, 3, 4]],
        images_TBHWC=images(code_TB),
        action_ids_TBA=code_TB[..., None].expand(-1, -1, 7).clone(),
        logprob_TBA=-code_TB[..., None].float().expand(-1, -1, 7).clone(),
        reward_TB=code_TB.float(),
        terminated_TB=torch.zeros(num_steps, num_envs, dtype=torch.bool),
        truncated_TB=truncated_TB,
        task_id_TB=code_TB % 2,
        valid_TB=torch.ones(num_steps, num_envs, dtype=torch.bool),
        last_images_BHWC=images(10 * num_steps + b[0]),
        last_task_id_B=b[0] % 2,
        episode_step_B=b[0] * 3,
        final_images_KHWC=images(final),
        final_t_K=torch.tensor([step for step, _ in truncated]),
        final_b_K=torch.tensor([env for _, env in truncated]),
        policy_version=version,
    )


def assert_same(one, other):
    for field in dataclasses.fields(Rollout):
        a, b = getattr(one, field.name), getattr(other, field.name)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, field.name


def test_shards_hold_their_own_environments_and_add_up_to_the_rollout():
    rollout = make_rollout()
    shards = [rollout.shard(rank, 2) for rank in range(2)]
    assert [s.num_envs for s in shards] == [2, 2]
    assert shards[1].reward_TB[:, 0].tolist() == [2.0, 12.0, 22.0]
    assert shards[1].images_TBHWC[2, 1].unique().tolist() == [23]
    assert shards[1].last_images_BHWC[1].unique().tolist() == [33]
    # environment 3 was truncated at step 2; in the second shard it is environment 1
    assert (shards[1].final_t_K.tolist(), shards[1].final_b_K.tolist()) == ([2], [1])
    assert shards[1].final_images_KHWC.unique().tolist() == [123]
    assert shards[0].final_images_KHWC.unique().tolist() == [101]
    assert_same(Rollout.concat(shards), rollout)


def test_a_shard_does_not_share_memory_with_the_rollout():
    rollout = make_rollout()
    shard = rollout.shard(0, 2)
    shard.reward_TB += 1000
    assert rollout.reward_TB.max() < 1000


def test_concat_puts_workers_side_by_side_and_moves_the_final_observations():
    joined = Rollout.concat([make_rollout(), make_rollout(offset=4, truncated=((1, 0),))])
    assert joined.num_envs == 8
    assert joined.reward_TB[0].tolist() == list(range(8))
    assert joined.final_b_K.tolist() == [1, 3, 4]
    assert joined.final_images_KHWC[2].unique().tolist() == [114]
    other = make_rollout(version=6)
    for wrong in ([make_rollout(), other], [other, make_rollout()]):
        with pytest.raises(ValueError, match="policy version"):
            Rollout.concat(wrong)
    with pytest.raises(ValueError, match="no rollout"):
        Rollout.concat([])


def test_rollouts_of_a_replaced_engine_are_joined_and_the_oldest_version_is_kept():
    old, new = make_rollout(), make_rollout(offset=4, truncated=((1, 0),), version=6)
    for rollouts in ([old, new], [new, old]):
        joined = Rollout.concat(rollouts, mixed_versions=True)
        assert joined.policy_version == old.policy_version == 5
        expected = torch.cat([r.logprob_TBA for r in rollouts], dim=1)
        assert torch.equal(joined.logprob_TBA, expected), "each action keeps its engine's log-probs"
    with pytest.raises(ValueError, match="prompts"):
        Rollout.concat([old, dataclasses.replace(new, prompts=[[1]])], mixed_versions=True)


def test_uneven_shards_are_refused():
    with pytest.raises(
        ValueError, match="4 environments does not divide among 3 ranks: use a multiple of 3"
    ):
        make_rollout().shard(0, 3)
    with pytest.raises(ValueError, match="rank 2 is not among 2"):
        make_rollout().shard(2, 2)


def test_next_values_are_of_the_real_next_observations():
    rollout = make_rollout()
    value_TB = rollout.reward_TB  # the value of image `code` is `code`
    next_TB = rollout.next_values(
        value_TB, torch.tensor([30.0, 31, 32, 33]), torch.tensor([101.0, 123.0])
    )
    assert next_TB.tolist() == [[10, 101, 12, 13], [20, 21, 22, 23], [30, 31, 32, 123]]
    assert value_TB[1, 1] == 11  # the input is left alone


def test_a_truncated_step_without_its_observation_is_an_error():
    rollout = make_rollout(truncated=((0, 1),))
    truncated_TB = rollout.truncated_TB.clone()
    truncated_TB[1, 2] = True
    with pytest.raises(AssertionError, match="lacks its final observation"):
        dataclasses.replace(rollout, truncated_TB=truncated_TB)


def test_no_truncated_episode_at_all():
    rollout = make_rollout(truncated=())
    rollout = dataclasses.replace(
        rollout,
        final_t_K=torch.zeros(0, dtype=torch.int64),
        final_b_K=torch.zeros(0, dtype=torch.int64),
        final_images_KHWC=torch.zeros(0, 2, 2, 3, dtype=torch.uint8),
    )
    assert not rollout.done_TB.any()
    assert_same(Rollout.concat([rollout.shard(rank, 4) for rank in range(4)]), rollout)
    next_TB = rollout.next_values(rollout.reward_TB, torch.zeros(4), torch.zeros(0))
    assert next_TB[:2].tolist() == rollout.reward_TB[1:].tolist()


def test_images_are_stored_as_bytes():
    rollout = make_rollout()
    assert rollout.images_TBHWC.dtype == torch.uint8
    images = (3 * 4 + 4 + 2) * 2 * 2 * 3
    assert (
        images
        < rollout.nbytes
        < images + 3 * 4 * (7 * (8 + 4) + 4 + 8 + 3) + 2 * 4 * 8 + 2 * 16 + 1
    )


def test_minibatches_are_a_fresh_partition_every_epoch_step_and_rank():
    seeds = [(0, 0, 1, 0), (0, 0, 1, 1), (0, 0, 2, 0), (0, 1, 1, 0), (1, 0, 1, 0)]
    orders = [torch.cat(list(minibatches(24, 6, seed=seed))) for seed in seeds]
    for order in orders:
        assert sorted(order.tolist()) == list(range(24))
    assert len({tuple(order.tolist()) for order in orders}) == len(seeds)
    again = torch.cat(list(minibatches(24, 6, seed=seeds[0])))
    assert torch.equal(orders[0], again)
    assert [len(m) for m in minibatches(24, 6, seed=(0,))] == [6, 6, 6, 6]


def test_minibatches_that_do_not_divide_are_refused():
    with pytest.raises(
        ValueError,
        match="minibatch size 48 does not divide the 320 samples of a rank: use 40 or 64",
    ):
        next(minibatches(320, 48, seed=(0,)))
