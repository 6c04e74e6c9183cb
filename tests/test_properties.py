"""Properties that hold for any input (hypothesis): flags, sharding, curriculum, action tokens."""

import dataclasses
import json
import math
import typing
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ppo_vllm_ray_fsdp_vla as driver
from ppo.arguments import CommandLineError
from ppo.rollout import Rollout
from ppo.utils.curriculum import Curriculum
from prismatic.vla.action_tokenizer import ActionTokenizer

# The same examples in every run, and no limit on one example's time: other work may have the cores.
settings.register_profile("tests", derandomize=True, deadline=None, database=None)
settings.load_profile("tests")

# ---------------------------------------------------------------------------------------------- flags

GOOD = {"num_steps": 8, "local_rollout_batch_size": 8, "local_mini_batch_size": 16, "per_device_train_batch_size": 8,
        "total_episodes": 640, "value_init_steps": 1}  # fmt: skip
SMALL_INTS = st.one_of(
    st.integers(0, 16), st.sampled_from((-1, 32, 64, 100, 4096, 10**6, 10**12, 10**400))
)
FLOATS = st.one_of(st.floats(), st.floats(0, 2), st.sampled_from((0.0, 1.0, 0.5, 1e-300, 1e300)))
TEXTS: dict[str, st.SearchStrategy[Any]] = {
    "task_suite_name": st.sampled_from(
        ("tabletop", "libero_spatial", "nowhere", "", "tests.worlds:SUITE", "os:b")
    ),
    "actor_num_gpus_per_node": st.one_of(
        st.sampled_from(
            (
                "[1]",
                "2",
                "[1,1]",
                "[]",
                "[0]",
                "x",
                "[true]",
                "[1.5]",
                "[[1]]",
                "null",
                "[" * 10**5,
                "-1",
            )
        ),
        st.lists(st.integers(-1, 9), max_size=4).map(json.dumps),
    ),
    "engine_args": st.sampled_from(("{}", "[]", "x")),
}


def strategy_of(field: Any, hint: Any) -> st.SearchStrategy[Any]:
    """Values of a flag's type, good and bad."""
    if field.name in TEXTS:
        return TEXTS[field.name]
    options = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return st.sampled_from(options)
    if typing.get_origin(hint) is tuple:
        return st.lists(st.integers(-1, 11), max_size=4).map(tuple)
    if type(None) in options:
        return st.one_of(
            st.none(),
            *(strategy_of(field, option) for option in options if option is not type(None)),
        )
    return {bool: st.booleans(), int: SMALL_INTS, float: FLOATS, str: st.text(max_size=5)}[hint]


HINTS = typing.get_type_hints(driver.Args)
FIELDS = {
    field.name: strategy_of(field, HINTS[field.name]) for field in dataclasses.fields(driver.Args)
}


def changed_flags(most: int) -> st.SearchStrategy[dict[str, Any]]:
    """Up to `most` flags with values of their types."""
    names = st.lists(st.sampled_from(sorted(FIELDS)), max_size=most, unique=True)
    return names.flatmap(
        lambda chosen: st.fixed_dictionaries({name: FIELDS[name] for name in chosen})
    )


def assert_consistent(args: driver.Args, plan: driver.Plan) -> None:
    """The plan's sizes follow from one another."""
    assert (
        plan.num_trainers * plan.num_minibatches * args.local_mini_batch_size
        == plan.samples_per_step
    )
    assert plan.samples_per_step == args.num_steps * plan.num_envs > 0
    assert plan.num_envs == args.local_rollout_batch_size * args.vllm_num_engines
    assert args.local_rollout_batch_size % plan.num_trainers == 0
    assert (
        args.local_mini_batch_size % (args.per_device_train_batch_size or 1) == 0
    )  # 0: chosen by memory
    assert (
        plan.num_training_steps >= 1
        and plan.policy_optimizer_steps >= 1
        and plan.value_optimizer_steps >= 1
    )
    assert plan.num_training_steps * plan.samples_per_step <= args.total_episodes
    assert 1 <= plan.demand.num_env_processes <= args.local_rollout_batch_size
    assert len(set(plan.task_ids)) == len(plan.task_ids) > 0
    assert plan.dtype in ("float32", "bfloat16") and plan.device in ("cpu", "cuda")
    Curriculum(
        plan.task_ids,
        ema_alpha=args.curriculum_ema_alpha,
        tau=args.curriculum_tau,
        min_prob=args.curriculum_min_prob,
    ).sample(2)


@pytest.mark.parametrize("most", [2, 5, len(FIELDS)])
def test_flags_are_refused_as_ours_or_give_a_consistent_plan(most):
    outcomes = {"refused": 0, "planned": 0}

    @settings(max_examples=700)
    @given(changed_flags(most))
    def check(changes):
        args = driver.Args(**(GOOD | changes))
        try:
            driver.validate(args)
        except CommandLineError as error:
            outcomes["refused"] += 1
            assert "problem(s) with this command line:\n- " in str(error)
            return
        outcomes["planned"] += 1
        for has_gpus in (False, True):
            assert_consistent(args, driver.make_plan(args, has_gpus=has_gpus))

    check()
    assert outcomes["refused"] > 50 and (outcomes["planned"] > 50 or most == len(FIELDS)), outcomes


# ---------------------------------------------------------------------------------------------- sharding


@st.composite
def rollouts(draw: st.DrawFn) -> tuple[Rollout, int]:
    """A rollout of random contents and a number of ranks that divides its environments."""
    ranks, per_rank, num_steps = (
        draw(st.integers(1, 4)),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 4)),
    )
    shape = (num_steps, ranks * per_rank)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def random(*size: int, below: int = 256, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.randint(0, below, size, generator=generator).to(dtype)

    truncated_TB = random(*shape, below=2, dtype=torch.bool)
    final_t_K, final_b_K = truncated_TB.nonzero(as_tuple=True)
    num_final = len(final_t_K)
    rollout = Rollout(
        prompts=[[1, 2], [1, 3, 4]],
        images_TBHWC=random(*shape, 2, 2, 3, dtype=torch.uint8),
        action_ids_TBA=random(*shape, 7),
        logprob_TBA=random(*shape, 7, dtype=torch.float32),
        reward_TB=random(*shape, dtype=torch.float32),
        terminated_TB=random(*shape, below=2, dtype=torch.bool) & ~truncated_TB,
        truncated_TB=truncated_TB,
        task_id_TB=random(*shape, below=2),
        valid_TB=random(*shape, below=2, dtype=torch.bool),
        last_images_BHWC=random(shape[1], 2, 2, 3, dtype=torch.uint8),
        last_task_id_B=random(shape[1], below=2),
        episode_step_B=random(shape[1], below=100),
        final_images_KHWC=random(num_final, 2, 2, 3, dtype=torch.uint8),
        final_t_K=final_t_K,
        final_b_K=final_b_K,
        policy_version=3,
    )
    return rollout, ranks


@settings(max_examples=150)
@given(rollouts())
def test_shards_partition_the_environments_and_add_up_to_the_rollout(drawn):
    rollout, ranks = drawn
    shards = [rollout.shard(rank, ranks) for rank in range(ranks)]
    assert sum(shard.num_envs for shard in shards) == rollout.num_envs
    assert sum(len(shard.final_t_K) for shard in shards) == len(rollout.final_t_K)
    joined = Rollout.concat(shards)
    order, joined_order = ((r.final_b_K * 1000 + r.final_t_K).argsort() for r in (rollout, joined))
    for field in dataclasses.fields(Rollout):
        whole, parts = getattr(rollout, field.name), getattr(joined, field.name)
        if (
            "_K" in field.name
        ):  # a shard lists its own first: the same observations in another order
            whole, parts = whole[order], parts[joined_order]
        assert torch.equal(whole, parts) if isinstance(whole, torch.Tensor) else whole == parts, (
            field.name
        )
    values_K = torch.arange(len(rollout.final_t_K)).float()
    next_TB = rollout.next_values(rollout.reward_TB, rollout.reward_TB[-1], values_K)
    assert torch.equal(next_TB[rollout.final_t_K, rollout.final_b_K], values_K)


# ---------------------------------------------------------------------------------------------- curriculum


@st.composite
def curricula(draw: st.DrawFn) -> Curriculum:
    """Any curriculum that its own checks allow."""
    task_ids = draw(st.lists(st.integers(0, 100), min_size=1, max_size=12, unique=True))
    return Curriculum(
        task_ids,
        ema_alpha=draw(st.floats(0, 1, exclude_min=True)),
        tau=draw(st.floats(0, 1e6, exclude_min=True)),
        min_prob=draw(st.floats(0, 1)) / len(task_ids),
        seed=draw(st.integers(0, 2**32)),
        uniform=draw(st.booleans()),
    )


REPORTS = st.lists(st.tuples(st.integers(0, 11), st.booleans()), max_size=60)


def report(curriculum: Curriculum, reports: list[tuple[int, bool]]) -> None:
    tasks = curriculum.task_ids
    curriculum.update(
        [tasks[i % len(tasks)] for i, _ in reports], [success for _, success in reports]
    )


@settings(max_examples=300)
@given(curricula(), REPORTS)
def test_task_probabilities_add_up_to_one_and_respect_the_floor(curriculum, reports):
    report(curriculum, reports)
    probability = curriculum.probabilities()
    assert math.isclose(probability.sum(), 1, abs_tol=1e-9)
    assert (probability >= curriculum.min_prob - 1e-9).all()
    assert set(curriculum.sample(20)) <= set(curriculum.task_ids)
    assert ((curriculum.ema >= 0) & (curriculum.ema <= 1)).all()


@settings(max_examples=150)
@given(curricula(), REPORTS, REPORTS)
def test_a_saved_curriculum_goes_on_as_if_nothing_had_happened(curriculum, before, after):
    report(curriculum, before)
    curriculum.sample(3)
    saved = json.loads(json.dumps(curriculum.state_dict()))
    other = Curriculum(
        curriculum.task_ids, ema_alpha=curriculum.ema_alpha, tau=curriculum.tau, min_prob=curriculum.min_prob,
        uniform=curriculum.uniform,
    )  # fmt: skip
    other.load_state_dict(saved)
    for each in (curriculum, other):
        report(each, after)
    assert curriculum.sample(30) == other.sample(30) and curriculum.stats() == other.stats()


JSON_VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3)),
    lambda values: st.one_of(
        st.lists(values, max_size=3), st.dictionaries(st.text(max_size=3), values, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=300)
@given(
    st.sampled_from(("ema", "num_episodes", "num_successes", "rng", "task_ids", None)), JSON_VALUES
)
def test_a_damaged_curriculum_is_refused_and_changes_nothing(key, value):
    curriculum = Curriculum(3)
    curriculum.update([0, 1], [True, False])
    before = curriculum.state_dict()
    state = value if key is None else before | {key: value}
    try:
        curriculum.load_state_dict(state)
    except ValueError as error:
        assert "the saved curriculum" in str(error)
        assert curriculum.state_dict() == before
    else:
        assert curriculum.state_dict() == state


# ---------------------------------------------------------------------------------------------- action tokens


@settings(max_examples=200)
@given(
    st.integers(2, 400), st.integers(0, 40000), st.lists(st.floats(-1, 1), min_size=1, max_size=14)
)
def test_actions_come_back_within_half_a_bin_in_order(num_bins, offset, values):
    tokenizer = ActionTokenizer(num_bins + offset, num_bins)
    actions = np.array(values)
    ids = tokenizer.encode(actions)
    assert set(ids.tolist()) <= set(tokenizer.action_token_ids.tolist())
    decoded = tokenizer.decode(ids)
    assert np.abs(decoded - actions).max() <= 1 / (num_bins - 1) + 1e-12
    assert (np.diff(ids[np.argsort(actions, kind="stable")]) <= 0).all(), (
        "a larger action has a larger id"
    )


@given(st.integers(2, 400), st.integers(0, 40000))
def test_tokens_come_back_but_for_the_smallest(num_bins, offset):
    tokenizer = ActionTokenizer(num_bins + offset, num_bins)
    ids = tokenizer.action_token_ids
    again = tokenizer.encode(tokenizer.decode(ids))
    assert again[1:].tolist() == ids[1:].tolist()
    assert again[0] == ids[1], "the two smallest share the last bin's centre"
