"""Micro-batches are checked against memory before the run: the arithmetic, and that a rehearsal leaves no trace."""

import pytest
import torch

from ppo.memory import (
    GIB,
    cached_bytes,
    candidate_sizes,
    check_memory,
    choose_size,
    optimizer_bytes,
)
from tests.distributed import in_ranks
from tests.learners import B, T, assert_same_update, flags, make_learner, make_rollout, weights

OPTIONS = "--enable_gradient_checkpointing or --offload"


class FakeGpu:
    """Passes that need 20 GiB and 2 GiB a sample, and fail where that is more than there is."""

    def __init__(self, available_gib: float, per_sample: float = 2.0) -> None:
        self.available, self.per_sample, self.runs = available_gib * GIB, per_sample, []

    def __call__(self, size: int) -> float:
        self.runs.append(size)
        needed = (20 + self.per_sample * size) * GIB
        if needed > self.available:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return needed


def test_candidates_are_divisors_that_at_least_halve():
    assert candidate_sizes(256) == [64, 32, 16, 8, 4, 2, 1]
    assert candidate_sizes(48) == [48, 24, 12, 6, 3, 1]
    assert candidate_sizes(7) == [7, 1]


def test_a_size_that_fits_is_rehearsed_itself_and_kept():
    gpu = FakeGpu(84.0)  # 32 samples need exactly that
    check = choose_size([32], gpu, gpu.available, may_skip=False, options=OPTIONS)
    assert (check.micro_batch_size, check.needed / GIB) == (32, 84.0)
    assert gpu.runs == [1, 2, 32]


def test_a_size_that_does_not_fit_is_refused_with_what_it_needs_and_what_would_fit():
    gpu = FakeGpu(79.1)
    with pytest.raises(ValueError) as error:
        choose_size([32], gpu, gpu.available, may_skip=False, options=OPTIONS)
    assert str(error.value) == (
        "--per_device_train_batch_size 32 needs about 84.0 GiB, 79.1 GiB are free: use 16, "
        + OPTIONS
    )


def test_the_largest_size_that_fits_with_headroom_is_chosen_and_larger_ones_are_never_run():
    gpu = FakeGpu(86.0)  # 32 would fit (84), but with 2 % to spare only
    assert (
        choose_size(
            [64, 32, 16, 8], gpu, gpu.available, may_skip=True, options=OPTIONS
        ).micro_batch_size
        == 16
    )
    assert gpu.runs == [1, 2, 16]


def test_memory_that_nothing_fits_into_is_refused():
    gpu = FakeGpu(20.5)
    with pytest.raises(
        ValueError, match="not even one sample fits into 20.5 GiB of GPU memory: use --enable"
    ):
        choose_size([8, 4], gpu, gpu.available, may_skip=True, options=OPTIONS)
    # the estimate fits, and what is kept beside the passes does not
    gpu = FakeGpu(100.0)
    with pytest.raises(
        ValueError, match="8 needs about 36.0 GiB, 30.0 GiB are free: use 4, --enable"
    ):
        choose_size([8], gpu, 30.0 * GIB, may_skip=False, options=OPTIONS)


def rehearsal(rank: int, model_dir: str) -> None:
    """An update after a rehearsal equals one without."""
    rollout, results = make_rollout(model_dir), []
    for rehearse in (False, True):
        learner = make_learner(model_dir, flags(), lora=True)
        before = weights(learner)
        torch.manual_seed(11)
        if rehearse:
            random_state = torch.get_rng_state()
            learner.micro_batch_size = 5
            learner.rehearse(rollout.prompts)
            learner.micro_batch_size = 4
            assert torch.equal(torch.get_rng_state(), random_state)
            unchanged = weights(learner)
            assert all(torch.equal(unchanged[name], before[name]) for name in before)
            grads = [p.grad for t in (learner.policy, learner.critic) for p in t.parameters]
            assert all(grad is None for grad in grads)
            assert not learner.policy.model.training and not learner.policy.optimizer.state
        metrics = learner.update(rollout, step=1)
        results.append({"metrics": metrics, "weights": weights(learner), "before": before})
    assert_same_update(*results)


def test_a_rehearsal_leaves_weights_gradients_and_random_state_alone(tiny_model_dir):
    in_ranks(1, rehearsal, str(tiny_model_dir))


def byte_counts(rank: int, model_dir: str) -> None:
    """Two float32 states for each trained number; P x vision_dim features and D of the prompt for each sample."""
    learner = make_learner(model_dir, flags(freeze_vision_backbone=True), lora=True)
    trained = sum(p.numel() for t in (learner.policy, learner.critic) for p in t.parameters)
    assert optimizer_bytes(learner) == 8 * trained
    assert cached_bytes(learner, 10) == 10 * (
        4 * 64 + 4 * 64 * 4
    )  # D = 64; 4 patches of 2 x 32 channels, float32
    assert check_memory(learner, [[1, 2]], 10) is None, "a CPU has no GPU memory"


def test_states_and_features_are_counted_in_bytes(tiny_model_dir):
    in_ranks(1, byte_counts, str(tiny_model_dir))


@pytest.mark.gpu
def test_what_a_check_measures_is_what_an_update_needs(tiny_model_dir):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    in_ranks(1, real_check, str(tiny_model_dir), device_type="cuda")


def real_check(rank: int, model_dir: str) -> None:
    """The check finds the update's peak and refuses a share that is too small; 0 chooses the whole minibatch."""
    rollout = make_rollout(model_dir)
    args = flags(per_device_train_batch_size=0, enable_gradient_checkpointing=False, offload=False)
    learner = make_learner(model_dir, args, adam=True)
    check = check_memory(learner, rollout.prompts, T * B)
    assert check is not None and check.micro_batch_size == learner.micro_batch_size == T * B
    learner.update(rollout, step=1)
    torch.cuda.reset_peak_memory_stats()
    learner.update(rollout, step=2)
    assert torch.cuda.max_memory_allocated() == pytest.approx(check.needed, rel=0.2)
    with pytest.raises(ValueError, match="free: use --enable_gradient_checkpointing or --offload"):
        check_memory(learner, rollout.prompts, T * B, share=1e-6)
