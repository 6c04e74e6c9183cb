"""Fixtures that several packages' tests share."""

import importlib.util
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

# Two cores for everything: a test that starts a thread pool on each would only disturb the others.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MUJOCO_GL", "osmesa")

# One scene of each suite tells whether its assets are at hand.
SUITE_SCENES = {
    "libero_spatial": "libero_tabletop_base_style.xml",
    "libero_goal": "libero_tabletop_base_style.xml",
    "libero_object": "libero_floor_base_style.xml",
    "libero_10": "libero_kitchen_tabletop_base_style.xml",
    "libero_90": "libero_kitchen_tabletop_base_style.xml",
}

# Tests that start Ray and with it five to ten large processes. `pytest -n 2` begins with them, since they take longest.
# Those that use `straight_run` stay on one worker, and so do the others; where memory is short all of them do.
STRAIGHT_RUN_TESTS = ("tests/test_faults", "tests/test_resume_run.py")
RAY_TESTS = (
    "tests/test_driver.py", "tests/test_hub_models.py", "tests/test_libero_end_to_end.py",
    "tests/test_multinode.py", "tests/utils/test_actors.py", "tests/utils/test_ray_utils.py",
    "tests/utils/test_spares.py", "tests/utils/weights/test_sync.py",
)  # fmt: skip
MEMORY_OF_TWO_RUNS_GIB = 12.0


def group_of(nodeid: str, has_room: bool) -> str:
    """What a test shares a worker with; other files each form a group, for their fixtures."""
    if nodeid.startswith(STRAIGHT_RUN_TESTS):
        return "straight run"
    if nodeid.startswith(RAY_TESTS):
        return "ray" if has_room else "straight run"
    return nodeid.partition("::")[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Tests that stay on one worker, see `group_of`.

    `--dist loadgroup` would do, but xdist 3.8 loses its groups with pytest 9.2 (pytest-xdist's issue 1386).
    """
    from xdist.scheduler import LoadScopeScheduling

    from utils.machine import available_memory_gib

    has_room = available_memory_gib() >= MEMORY_OF_TWO_RUNS_GIB

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid, has_room)

    config.option.loadscopereorder = False
    return Scheduling(config, log)


def libero_skip_reason(suites: Iterable[str]) -> str | None:
    """Why tests of these LIBERO suites cannot run here, None if they can. Loads no simulator."""
    from utils.check_install import chosen_renderers, gl_problems

    if importlib.util.find_spec("libero") is None or importlib.util.find_spec("mujoco") is None:
        return "LIBERO's simulator is not installed: bash scripts/setup_env.sh --libero"
    if problems := [
        problem for renderer in chosen_renderers() for problem in gl_problems(renderer)
    ]:
        return problems[0]
    from ppo.envs.libero_install import find_assets

    try:
        assets = find_assets()
    except ImportError as error:
        return str(error)
    for suite in suites:
        if assets is None or not (assets / "scenes" / SUITE_SCENES[suite]).exists():
            return f"the assets of {suite} are not at hand ({assets or 'none'}): set LIBERO_ASSETS"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `libero` (its arguments: the suites) where they cannot run; the longest group first."""
    for item in items:
        if markers := list(item.iter_markers("libero")):
            suites = {suite for marker in markers for suite in marker.args} or {"libero_spatial"}
            if reason := libero_skip_reason(sorted(suites)):
                item.add_marker(pytest.mark.skip(reason=reason))
    if "PYTEST_XDIST_WORKER" in os.environ:
        order = ["straight run", "ray"]
        groups = [group_of(item.nodeid, True) for item in items]
        ranks = [order.index(group) if group in order else len(order) for group in groups]
        items[:] = [items[i] for i in sorted(range(len(items)), key=ranks.__getitem__)]


def save_tiny_model(folder: Path) -> Path:
    """Write a random tiny policy (28 px, 4 patches, 0.4 M parameters) with statistics for `tabletop`."""
    import json

    from prismatic.extern.hf.tiny_prismatic import TinyVLAConfig, save_tiny_vla

    output_dir = folder / "tiny"
    vision: dict[str, Any] = {
        "image_size": 28,
        "patch_size": 14,
        "vision_dim": 32,
        "vision_depth": 3,
        "vision_heads": 2,
    }
    llm: dict[str, Any] = {"llm_dim": 64, "llm_depth": 2, "llm_heads": 2, "llm_mlp_dim": 128}
    save_tiny_vla(TinyVLAConfig(seed=0, **vision, **llm), output_dir)
    action = {
        "q01": [-1.0, -0.5, -0.9, 0.0, 0.0, -0.25, 0.0],
        "q99": [1.0, 0.5, 0.3, 0.0, 0.0, 0.25, 1.0],
        "min": [-1.0, -0.6, -1.0, 0.0, 0.0, -0.3, 0.0],
        "max": [1.0, 0.6, 0.4, 0.0, 0.0, 0.3, 1.0],
        "mask": [True] * 6 + [False],
    }
    statistics = {"tabletop": {"action": action, "num_transitions": 100, "num_trajectories": 10}}
    (output_dir / "dataset_statistics.json").write_text(json.dumps(statistics))
    return output_dir


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `save_tiny_model`, made once."""
    return save_tiny_model(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def straight_run(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a deterministic run that nothing disturbs, for disturbed ones to be equal to."""
    from tests.test_driver import run_driver
    from tests.test_resume_run import run_args

    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PPO_VLA_TEST_STEPS", str(folder / "straight.steps"))
        run_driver(run_args(tiny_model_dir, folder, "straight"))
    return folder / "straight"
