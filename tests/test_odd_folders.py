"""Every case of `tests/odd_folders.py` is refused with an error that names a file, or is legitimate and accepted."""

import copy
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ppo import inputs, resume
from prismatic.extern.hf.modeling_prismatic import load_model
from prismatic.vla.datasets.rlds import iterate_episodes
from prismatic.vla.datasets.schema import check_dataset_dir
from prismatic.vla.datasets.statistics import load_dataset_statistics
from prismatic.vla.datasets.store import EpisodeStore
from prismatic.vla.datasets.writer import EncodedDemonstration
from tests.malformed import watched
from tests.odd_folders import CASES, Case
from tests.ppo.test_resume import ARGS, make_state, write_checkpoint
from tests.test_malformed_files import adapter, rlds, sharded_model, tiny_dir  # noqa: F401
from utils import checkpoint_utils, peft_utils

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Models:
    """Model folders, adapters and what loads them; the model is read once."""

    def __init__(self, tiny: Path, root: Path) -> None:
        self.good = {"model": tiny, "sharded": sharded_model(tiny, root / "sharded")}
        self.good["adapter"] = adapter(tiny, root / "adapters" / "adapter")
        self.base = root / "adapters" / "base"
        self.model = load_model(self.base)

    def use_model(self, folder: Path) -> list[str]:
        """Check a model folder, and load it if nothing is found."""
        problems = checkpoint_utils.check_model_dir(folder)
        if not problems:
            load_model(folder)
        return problems

    def use_adapter(self, folder: Path) -> list[str]:
        """Check an adapter folder, and load it if nothing is found."""
        problems = checkpoint_utils.check_adapter_dir(folder)
        problems = problems or peft_utils.check_adapter_fits(folder, self.base)
        if not problems:
            peft_utils.load_lora(copy.deepcopy(self.model), folder)
        return problems


def use_dataset(folder: Path) -> list[str]:
    """Check a dataset, and read it and its statistics if nothing is found."""
    problems = check_dataset_dir(folder)
    if not problems:
        list(iterate_episodes(folder))
        load_dataset_statistics(folder.parents[1], folder.parent.name)
    return problems


def use_checkpoint(folder: Path) -> list[str]:
    """What `--resume FOLDER` says before anything starts."""
    args = dataclasses.replace(ARGS, resume=str(folder))
    inputs.choose_checkpoint(args, folder.parent)
    return []


def use_recording(folder: Path) -> list[str]:
    """Continue an interrupted recording."""
    store = EpisodeStore(folder, {"seed": 0})
    problems = store.problems()
    if not problems:
        with store.opened():
            for index in store.finished():
                store.load(index)
    return problems


@pytest.fixture(scope="module")
def models(tiny_dir, tmp_path_factory) -> Models:  # noqa: F811
    return Models(tiny_dir, tmp_path_factory.mktemp("odd"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return rlds(tmp_path_factory.mktemp("odd"))


def recording(folder: Path) -> Path:
    store = EpisodeStore(folder, {"seed": 0})
    arrays = (np.zeros((2, 7)), np.zeros((2, 8)), np.zeros((2, 7)), np.zeros(2))
    with store.opened():
        for index in range(2):
            store.add(index, EncodedDemonstration([b"a", b"b"], *arrays, "push", "file"), {})
    return folder


def fresh(case: Case, models: Models, dataset: Path, root: Path) -> tuple[Path, Callable]:
    """A good folder of the case's kind, and what uses it."""
    if case.kind == "recording":
        return recording(root / "recording"), use_recording
    if case.kind in ("checkpoint", "update"):
        num_minibatches = 3 if case.kind == "update" else None
        folder = write_checkpoint(root / "run", make_state(2, num_minibatches))
        return folder, use_checkpoint
    if case.kind == "dataset":
        folder = root / dataset.parent.name / dataset.name
        shutil.copytree(dataset, folder)
        return folder, use_dataset
    use = models.use_adapter if case.kind == "adapter" else models.use_model
    return Path(shutil.copytree(models.good[case.kind], root / case.kind)), use


def outcome(use: Callable[[Path], list[str]], folder: Path) -> tuple[str, str]:
    """(refused, accepted or a fault, message) of using a folder."""
    try:
        with watched():
            problems = use(folder)
    except (ValueError, OSError) as error:
        problems = str(error).splitlines()
    except BaseException as error:
        return f"traceback {type(error).__name__}", str(error)
    if not problems:
        return "accepted", ""
    if not any(str(folder.parent) in problem for problem in problems):
        return "names no file", "\n".join(problems)
    return "refused", "\n".join(problems)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kind}: {case.name}")
def test_an_odd_folder_is_refused_by_name_unless_it_is_right(case, models, dataset, tmp_path):
    folder, use = fresh(case, models, dataset, tmp_path)
    case.damage(folder)
    found, message = outcome(use, folder)
    assert found == ("accepted" if case.is_fine else "refused"), message
    assert case.says in message


@pytest.mark.parametrize(
    "kind", ["model", "sharded", "adapter", "dataset", "checkpoint", "update", "recording"]
)
def test_the_folders_that_are_damaged_are_right_before(kind, models, dataset, tmp_path):
    folder, use = fresh(Case(kind, "", lambda path: None), models, dataset, tmp_path)
    assert outcome(use, folder) == ("accepted", "")


def test_an_older_checkpoint_is_taken_where_the_newest_is_odd(tmp_path):
    older, newer = (write_checkpoint(tmp_path / "run", make_state(step)) for step in (2, 3))
    rank = newer / "training_state" / "rank_0.json"
    for content in ([1], {"update": {"num_done": {"value": "1", "policy": 1}}}):
        rank.write_text(json.dumps(content))
        assert resume.find_checkpoint("auto", tmp_path / "run") == (older, [])


@pytest.mark.parametrize(
    "path",
    [
        "",
        "a" * 5000,
        "/dev/null",
        "/proc/self/fd/0",
        "nul\0byte",
        "half\udcff",
        "tiny/config.json/x",
    ],
)
def test_a_path_that_is_no_folder_is_refused(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text("{}")
    for check in (
        checkpoint_utils.check_model_dir,
        checkpoint_utils.check_adapter_dir,
        check_dataset_dir,
        lambda path: resume.find_checkpoint(path, Path(path))[1],
    ):
        (problem, *_) = check(path)
        assert isinstance(problem, str)
