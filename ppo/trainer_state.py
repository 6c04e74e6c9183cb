"""One trainer rank's part of a checkpoint: weights, optimizers, random states, and an update under way."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ppo.batch import Batch
from ppo.learner import PPOLearner
from ppo.progress import UpdateProgress, parts_of, redistribute
from ppo.state_checks import read_rank
from utils import training_state
from utils.training_state import BackgroundWriter


def begin_saving(
    learner: PPOLearner,
    folder: Path,
    writer: BackgroundWriter,
    after: Callable[[], None] | None = None,
) -> None:
    """Copy this rank's state and let `writer` write it into `folder`; `after` runs when all ranks have. A collective.

    An update that was stopped goes with it: its samples, averages and place.
    """
    progress = learner.progress
    own = {
        f"random.{name}": state
        for name, state in training_state.random_states(learner.device).items()
    }
    own |= {f"running.{name}": tensor for name, tensor in learner.outcomes.tensors().items()}
    if progress is not None:
        own |= {f"update.{name}": tensor for name, tensor in progress.tensors().items()}
    tensors = {f"rank_{learner.rank}.{name}": tensor for name, tensor in own.items()}
    for name, trained in (("policy", learner.policy), ("critic", learner.critic)):
        tensors |= training_state.trained_tensors(name, trained.model, trained.optimizer)
    numbers = {"update": progress.numbers() if progress else None}
    training_state.write_json(folder / f"rank_{learner.rank}.json", numbers)
    writer.begin(folder, tensors, after)


def load(learner: PPOLearner, folder: Path, num_saved: int, seed: tuple[int, ...]) -> None:
    """Load what `num_saved` ranks saved into `learner`; they may be more or fewer than now.

    With as many ranks everything goes on to the last bit. With another number the random states begin from `seed`, an
    update under way goes on as `redistribute` says, and the episodes under way do not count in
    `train/explained_variance_outcome`.

    Raises:
        ValueError: the weights are of another model.
    """
    rank = learner.rank
    numbers = [read_rank(folder, r) for r in range(num_saved)]
    for name, trained in (("policy", learner.policy), ("critic", learner.critic)):
        training_state.load_trained(folder, name, trained.model, trained.optimizer)
    is_same = num_saved == learner.world_size
    if is_same:
        states = training_state.load_prefixed(folder, f"rank_{rank}.random.")
        training_state.set_random_states(states, learner.device)
        learner.outcomes.load(training_state.load_prefixed(folder, f"rank_{rank}.running."))
    else:
        learner.outcomes.load({})  # the environments are other ones
        torch.manual_seed(int(np.random.SeedSequence((*seed, rank)).generate_state(1)[0]))
    learner.progress = None
    if numbers[0]["update"] is not None:
        updates = [part["update"] for part in numbers]
        learner.progress = _load_update(learner, folder, updates, is_same=is_same)


def _load_update(
    learner: PPOLearner, folder: Path, updates: list[dict[str, Any]], *, is_same: bool
) -> UpdateProgress:
    if is_same:
        tensors = training_state.load_prefixed(folder, f"rank_{learner.rank}.update.")
        return UpdateProgress.restore(tensors, updates[learner.rank], learner.device)
    batches = [
        Batch(**training_state.load_prefixed(folder, f"rank_{part}.update.")).to(learner.device)
        for part in parts_of(learner.rank, learner.world_size, len(updates))
    ]
    size = learner.args.local_mini_batch_size
    return redistribute(batches, updates, learner.rank, learner.world_size, size)
