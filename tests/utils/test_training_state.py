"""Checkpoints of sharded tensors: written while training goes on, read by any number of ranks, damage is noticed."""

import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

from tests.distributed import in_ranks
from utils import fsdp_utils, training_state


def make_trained(num_steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A sharded model whose rows do not divide evenly among ranks, after some AdamW steps; one layer is frozen."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3), nn.Linear(3, 3))
    model[2].requires_grad_(False)
    fsdp_utils.shard_model(model, min_unit_params=1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(num_steps):
        model(torch.full((4, 5), 1.0 + step)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def whole(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    tensors = training_state.trained_tensors("policy", model, optimizer)
    return {name: fsdp_utils.full_tensor(tensor).clone() for name, tensor in tensors.items()}


def save(rank: int, folder: str) -> None:
    model, optimizer = make_trained(3)
    expected = whole(model, optimizer)
    assert not any("2." in name for name in expected), "a frozen layer is not to be saved"
    writer = training_state.BackgroundWriter()
    tensors = training_state.trained_tensors("policy", model, optimizer)
    tensors[f"rank_{rank}.own"] = torch.full((2,), rank)
    finished = Path(f"{folder}.finished")
    writer.begin(folder, tensors, finished.touch if rank == 0 else None)
    with torch.no_grad():  # training goes on: what is written must be what was
        for parameter in model.parameters():
            parameter.add_(1.0)
        for state in optimizer.state.values():
            state["exp_avg"].zero_()
            state["step"] += 100
    writer.wait()
    if rank == 0:
        assert finished.exists()
        torch.save(expected, f"{folder}.pt")


def load(rank: int, folder: str) -> None:
    expected = torch.load(f"{folder}.pt", weights_only=True)
    assert len(expected) == 4 * 4  # two layers of weight and bias: value, two moments, step count
    for num_steps in (0, 1):  # with and without optimizer states of its own
        model, optimizer = make_trained(num_steps)
        training_state.load_trained(folder, "policy", model, optimizer)
        restored = whole(model, optimizer)
        assert restored.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(restored[name], tensor), name
    model(torch.ones(4, 5)).sum().backward()
    optimizer.step()
    assert float(optimizer.state[model[0].weight]["step"]) == 4
    assert training_state.load_prefixed(folder, "rank_1.")["own"].tolist() == [1, 1]
    smaller = nn.Sequential(nn.Linear(5, 7))
    fsdp_utils.shard_model(smaller)
    with pytest.raises(
        ValueError, match=r"is of another policy: 8 tensors differ, such as policy.exp_avg.1.bias"
    ):
        training_state.load_trained(
            folder, "policy", smaller, torch.optim.AdamW(smaller.parameters())
        )


def fail(rank: int, folder: str) -> None:
    model, optimizer = make_trained(0)
    writer = training_state.BackgroundWriter()
    Path(folder).mkdir(exist_ok=True)
    file = Path(folder) / "file"
    file.touch()
    dist.barrier()
    writer.begin(file / "below", training_state.trained_tensors("policy", model, optimizer))
    with pytest.raises(RuntimeError, match=r"could not be written: rank 0: NotADirectoryError"):
        writer.wait()
    writer.wait()  # it is told once


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "state"
    in_ranks(2, save, str(folder))
    return folder


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_checkpoint_of_two_ranks_is_read_by_any_number(saved, world_size):
    in_ranks(world_size, load, str(saved))


def test_a_checkpoint_that_cannot_be_written_is_an_error(tmp_path):
    in_ranks(1, fail, str(tmp_path / "state"))


class Harmful:
    def __reduce__(self):
        return exec, ("raise SystemExit('it ran')",)


def test_damage_is_found_before_anything_is_loaded(saved, tmp_path):
    assert training_state.tensor_problems(saved) == []
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in saved.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    data = folder / "__1_0.distcp"
    data.write_bytes(data.read_bytes()[:-100])
    assert "__1_0.distcp has" in training_state.tensor_problems(folder)[0]
    data.unlink()
    (problem,) = training_state.tensor_problems(folder)
    assert f"{folder}/__1_0.distcp is missing" in problem
    index = folder / ".metadata"
    content = index.read_bytes()
    for damaged in (
        content[:50],
        b"",
        pickle.dumps([1]),
        pickle.dumps(Harmful()),
        pickle.dumps(dist.init_process_group),
    ):
        index.write_bytes(damaged)
        (problem,) = training_state.tensor_problems(folder)
        assert ".metadata cannot be read" in problem
    index.unlink()
    assert "has no index" in training_state.tensor_problems(folder)[0]


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    partial, target = tmp_path / ".step_2.partial", tmp_path / "step_2"
    for content in ("old", "new"):
        partial.mkdir()
        (partial / "file").write_text(content)
        training_state.publish(partial, target)
        assert (target / "file").read_text() == content
        assert [p.name for p in tmp_path.iterdir()] == ["step_2"]


def test_random_states_go_on_where_they_were():
    state = training_state.random_states(torch.device("cpu"))
    first = torch.rand(3)
    training_state.set_random_states(state, torch.device("cpu"))
    assert torch.equal(torch.rand(3), first)


def test_what_is_frozen_comes_from_the_model_folder(tiny_model_dir):
    names = set(load_file(tiny_model_dir / "model.safetensors"))
    trained = {name for name in names if "vision" not in name}
    frozen = training_state.read_frozen(tiny_model_dir, trained)
    assert frozen.keys() == names - trained and frozen
