"""An update that is stopped between minibatches, saved, loaded into another learner and finished."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ppo import trainer_state
from ppo.batch import required_tensors
from ppo.learner import PPOLearner
from ppo.progress import UpdateProgress
from tests.distributed import in_ranks
from tests.learners import AFTER_ONE, B, T, flags, make_learner, make_rollout, weights
from utils import fsdp_utils, training_state
from utils.training_state import BackgroundWriter


def make(model_dir: str, **changes) -> PPOLearner:
    """AdamW, schedules, and LoRA dropout: everything that has a state. Two epochs of two minibatches on two ranks."""
    values = {
        "num_epochs": 2,
        "local_mini_batch_size": T * B // 4,
        "per_device_train_batch_size": 3,
    }
    learner = make_learner(
        model_dir, flags(**(values | changes)), lora=True, dropout=0.3, adam=True
    )
    for trained in (learner.policy, learner.critic):
        trained.learning_rate = lambda place: 1.0 / (1.0 + place)
    return learner


def state_of(learner: PPOLearner) -> dict[str, torch.Tensor]:
    tensors = weights(learner)
    for name, trained in (("policy", learner.policy), ("critic", learner.critic)):
        saved = training_state.trained_tensors(name, trained.model, trained.optimizer)
        tensors |= {key: fsdp_utils.full_tensor(tensor).clone() for key, tensor in saved.items()}
        tensors[f"{name}.rate"] = torch.tensor(trained.optimizer.param_groups[0]["lr"])
    return tensors


def stop_after(learner: PPOLearner, num_minibatches: int, on_rank: int) -> None:
    """Ask for a stop on one rank, as another thread would, once so many optimizer steps are done."""
    count, original = [0], learner._optimizer_step

    def counted(*args):
        original(*args)
        count[0] += 1
        learner.stop_requested = count[0] >= num_minibatches and learner.rank == on_rank

    learner._optimizer_step = counted


def train_metrics(metrics: dict) -> dict:
    return {name: value for name, value in metrics.items() if name.startswith("train/")}


def stopped_updates(rank: int, model_dir: str, folder: str) -> None:
    world_size = dist.get_world_size()
    rollouts = [
        make_rollout(model_dir, 0).shard(rank, world_size),
        make_rollout(model_dir, 1, AFTER_ONE).shard(rank, world_size),
    ]

    def update(learner: PPOLearner, *args) -> dict | None:
        torch.manual_seed(100 + rank)  # the same dropout, wherever the generator was before
        return learner.update(*args)

    straight = make(model_dir)
    before = weights(straight)
    metrics = [update(straight, rollout, step) for step, rollout in enumerate(rollouts, 1)]
    assert [m["train/num_outcome_episodes"] for m in metrics] == [3, 3]
    expected = state_of(straight)
    assert max(float((expected[n] - before[n]).abs().max()) for n in before) > 1e-4, (
        "nothing was trained"
    )
    for stop in (1, 5):  # in the critic's epochs, between the two, in the policy's
        first, second = make(model_dir), make(model_dir, learning_rate=1.0)
        stop_after(first, stop, on_rank=stop % world_size)
        assert update(first, rollouts[0], 1) is None
        assert sum(first.progress.num_done.values()) == stop
        target = Path(folder) / f"{stop}"
        target.mkdir(parents=True, exist_ok=True)
        writer = BackgroundWriter()
        trainer_state.begin_saving(first, target, writer)
        writer.wait()
        torch.manual_seed(0)
        update(second, rollouts[1], 1)  # whatever it was before
        trainer_state.load(second, target, world_size, seed=(0, 0))
        again = [second.update(None, 1), update(second, rollouts[1], 2)]
        for one, two in zip(metrics, again, strict=True):
            assert train_metrics(one) == train_metrics(two), stop
        restored = state_of(second)
        assert [n for n in expected if not torch.equal(restored[n], expected[n])] == [], stop
        assert second.progress is None


@pytest.fixture(scope="module")
def stopped(tiny_model_dir, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stopped")
    in_ranks(2, stopped_updates, str(tiny_model_dir), str(folder))
    return folder


def test_a_stopped_update_ends_as_an_uninterrupted_one_to_the_last_bit(stopped):
    assert {path.name for path in stopped.iterdir()} == {"1", "5"}


def other_ranks(rank: int, model_dir: str, folder: str) -> None:
    """Two ranks stopped after 5 of 8 minibatches: the critic's are done, the policy's first epoch begins again."""
    world_size = dist.get_world_size()
    learner = make(model_dir)
    trainer_state.load(learner, Path(folder) / "5", 2, seed=(0, 1))
    assert learner.progress.num_done == {"value": 8 // world_size, "policy": 0}
    parts = [
        training_state.load_prefixed(Path(folder) / "5", f"rank_{part}.update.") for part in (0, 1)
    ]
    share = T * B // world_size
    for name, tensor in learner.progress.tensors().items():
        everything = torch.cat([part[name] for part in parts])
        assert torch.equal(tensor, everything[rank * share : (rank + 1) * share]), name
    metrics = learner.update(None, 1)
    # the means are over what both ranks had done and the two new epochs
    assert metrics["train/policy_loss"] is not None and metrics["train/value_mean"] is not None
    # of three episodes that end next, one began before the ranks were others
    second = make_rollout(model_dir, 1, AFTER_ONE).shard(rank, world_size)
    assert learner.update(second, 2)["train/num_outcome_episodes"] == 2
    # four minibatches on two ranks are eight on one and two on four, and the schedule follows them
    assert metrics["train/learning_rate"] == 1.0 / (1 + 8 // world_size)


@pytest.mark.parametrize("world_size", [1, 4])
def test_an_update_goes_on_with_another_number_of_ranks(stopped, tiny_model_dir, world_size):
    in_ranks(world_size, other_ranks, str(tiny_model_dir), str(stopped))


def stopped_in_preparation(rank: int, model_dir: str) -> None:
    learner = make(model_dir)
    before = weights(learner)
    learner.stop_requested = rank == 1
    assert learner.update(make_rollout(model_dir).shard(rank, 2), 1) is None
    assert learner.progress is None, "nothing was begun"
    after = weights(learner)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_stop_before_the_first_minibatch_leaves_everything_as_it_was(tiny_model_dir):
    in_ranks(2, stopped_in_preparation, str(tiny_model_dir))


def kl_guard(rank: int, model_dir: str) -> None:
    """The ranks' own KLs lie on both sides of the limit, their mean above it: both stop, at the same minibatch."""

    def own_kls(limit: float | None) -> tuple[list[float], dict]:
        learner = make_learner(
            model_dir, flags(num_epochs=4, max_approx_kl=limit, local_mini_batch_size=T * B // 2)
        )
        kls, original = [], learner._mean_over_ranks

        def noted(value: torch.Tensor) -> float:
            kls.append(float(value))
            return original(value)

        learner._mean_over_ranks = noted
        metrics = learner.update(make_rollout(model_dir).shard(rank, 2), 1)
        return kls, metrics

    kls = own_kls(1e9)[0][5::2]  # after the critic's four losses: loss, KL, loss, KL, ...
    everywhere: list[list[float]] = [[], []]
    dist.all_gather_object(everywhere, kls)
    low, high = sorted(values[1] for values in everywhere)  # the first minibatch's ratios are all 1
    assert low < high, everywhere
    mean = (low + high) / 2
    stopping, metrics = own_kls(mean * 0.999)
    assert metrics["train/stopped_by_kl"] == 1.0
    assert len(stopping) == 4 + 2 * 2, "four minibatches of the critic and two of the policy"
    assert len(own_kls(mean * 1.001)[0]) > 4 + 2 * 2, "the limit was not exceeded"


def test_the_kl_guard_acts_on_all_ranks_alike(tiny_model_dir):
    in_ranks(2, kl_guard, str(tiny_model_dir))


def non_finite_numbers(rank: int, model_dir: str) -> None:
    """Each is found before the optimizer's next step, with step, rank and group, on both ranks."""
    rollout = make_rollout(model_dir).shard(rank, 2)

    def failing(spoil) -> str:
        learner = make_learner(
            model_dir, flags(max_grad_norm=0.0, local_mini_batch_size=T * B // 2)
        )
        spoil(learner)
        before = weights(learner)
        with pytest.raises(FloatingPointError) as error:
            learner.update(rollout, 7)
        after = weights(learner)
        assert all(
            torch.equal(before[n].nan_to_num(), after[n].nan_to_num())
            for n in before
            if "policy" in n
        )
        assert "at training step 7" in str(error.value)
        return str(error.value)

    def spoiled_value(learner: PPOLearner) -> None:
        with torch.no_grad():
            learner.critic.model.fc2.bias.fill_(float("inf"))

    def spoiled_loss(learner: PPOLearner) -> None:
        original = learner._policy_loss

        def infinite_on_rank_1(micro, normalizer):
            loss, shares, deviation = original(micro, normalizer)
            return (
                loss + (float("inf") if rank == 1 else 0.0),
                shares,
                deviation,
            )  # its gradient is finite

        learner._policy_loss = infinite_on_rank_1

    def spoiled_gradient(learner: PPOLearner) -> None:
        original = learner._optimizer_step

        def step(group, trained, *args):
            if group == "policy" and rank == 0:
                next(p.grad for p in trained.parameters if p.grad is not None).to_local().fill_(
                    float("nan")
                )
            original(group, trained, *args)

        learner._optimizer_step = step

    assert "values of the advantages" in failing(spoiled_value)
    assert "the loss of the policy is inf" in failing(spoiled_loss)
    message = failing(spoiled_gradient)
    assert "of the policy is" in message and "its gradient norm is nan" in message
    assert "rank 0: the gradients of" in message


def test_numbers_that_are_not_finite_are_named_on_every_rank(tiny_model_dir):
    in_ranks(2, non_finite_numbers, str(tiny_model_dir))


def test_an_update_that_needs_no_images_any_more_can_be_restored():
    """With a frozen vision backbone and the shared critic they are dropped, and are not in the checkpoint."""
    tensors = {name: torch.zeros(2) for name in required_tensors()}
    numbers = {"num_done": {"value": 1, "policy": 0}, "averages": {"sums": {}, "maxima": {}}}
    restored = UpdateProgress.restore(tensors, numbers, torch.device("cpu"))
    assert restored.batch.images_NHWC is None
    assert restored.tensors().keys() == tensors.keys()
