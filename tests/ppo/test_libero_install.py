"""Finding LIBERO and reading its lists and states; most of it with a made-up package and no simulator."""

import ctypes
import hashlib
import importlib
import importlib.util
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ppo.envs import libero_install
from ppo.envs.base import get_suite, split_options
from ppo.envs.libero_install import LiberoMissingError
from utils.check_install import gl_problems

ROOT = Path(__file__).resolve().parents[2]
SETUP = "bash scripts/setup_env.sh --libero"
CACHED = ("find_package", "asset_remarks", "task_names", "load_init_states")


@pytest.fixture
def no_memory():
    """What was found before is forgotten, and what a test finds is too."""
    functions = [getattr(libero_install, name) for name in CACHED]
    for function in functions:
        function.cache_clear()
    yield
    for function in functions:
        function.cache_clear()


@pytest.fixture
def package(tmp_path, monkeypatch, no_memory) -> Path:
    """A package like LIBERO's with the suite `toy` of two tasks, and no assets anywhere."""
    folder = tmp_path / "site" / "libero" / "libero"
    for name in ("bddl_files/toy", "init_files/toy", "benchmark"):
        (folder / name).mkdir(parents=True)
    tasks = ["KITCHEN_SCENE10_open_the_drawer", "push_the_plate"]
    (folder / "benchmark" / "libero_suite_task_map.py").write_text(
        f"libero_task_map = {{'toy': {tasks}}}\n"
    )
    spec = SimpleNamespace(
        submodule_search_locations=[str(tmp_path / "elsewhere"), str(folder.parent)]
    )
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: spec if name == "libero" else find_spec(name)
    )
    monkeypatch.setattr(libero_install, "ROOT", tmp_path / "checkout")
    monkeypatch.delenv("LIBERO_ASSETS", raising=False)
    return folder


def make_assets(folder: Path) -> Path:
    (folder / "scenes").mkdir(parents=True)
    return folder


def run_python(program: str, **variables: str) -> subprocess.CompletedProcess:
    """The program in the checkout, with nothing on standard input; a variable of "" is unset."""
    environment = {k: v for k, v in (os.environ | variables).items() if v}
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=500,
    )  # fmt: skip


# --- Where things are ---


def test_the_package_is_found_without_importing_it(package):
    assert libero_install.find_package() == package
    assert libero_install.task_names("toy") == ("KITCHEN_SCENE10_open_the_drawer", "push_the_plate")
    assert libero_install.bddl_file("toy", 1) == package / "bddl_files/toy/push_the_plate.bddl"


def test_without_the_package_the_command_that_installs_it_is_named(monkeypatch, no_memory):
    for spec in (None, SimpleNamespace(submodule_search_locations=["/nowhere"])):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, spec=spec: spec)
        with pytest.raises(LiberoMissingError, match=f"LIBERO is not installed: run `{SETUP}`"):
            libero_install.find_package()
        assert libero_install.find_problems() == [f"LIBERO is not installed: run `{SETUP}`"]


def test_assets_are_the_ones_named_else_the_packages_else_the_checkouts(
    package, monkeypatch, tmp_path
):
    assert libero_install.find_assets() is None
    unpacked = make_assets(tmp_path / "checkout/.cache/libero_assets/assets")
    assert libero_install.find_assets() == unpacked
    own = make_assets(package / "assets")
    assert libero_install.find_assets() == own
    named = make_assets(tmp_path / "named")
    monkeypatch.setenv("LIBERO_ASSETS", str(named))
    assert libero_install.find_assets() == named
    monkeypatch.setenv("LIBERO_ASSETS", str(tmp_path))
    message = f"LIBERO_ASSETS={tmp_path}: no folder of LIBERO's assets"
    with pytest.raises(LiberoMissingError, match=message):
        libero_install.find_assets()
    (problem,) = libero_install.find_problems()
    assert problem.startswith(message)


def test_stand_ins_among_the_assets_are_told_by_their_content(package, monkeypatch):
    assert libero_install.asset_remarks() == []
    assets = make_assets(package / "assets")
    for name, content in (("made.png", b"made"), ("original.png", b"original")):
        (assets / name).write_bytes(content)
    digest = hashlib.sha256(b"made").hexdigest()
    stand_ins = {"made.png": digest, "original.png": digest, "absent.png": digest}
    monkeypatch.setattr(libero_install, "STAND_INS", stand_ins)
    libero_install.asset_remarks.cache_clear()
    (remark,) = libero_install.asset_remarks()
    assert remark.startswith(
        f"1 files of the LIBERO assets in {assets} are stand-ins (made.png): success rates are not"
    )
    (assets / "made.png").write_bytes(b"downloaded since")
    libero_install.asset_remarks.cache_clear()
    assert libero_install.asset_remarks() == []


def test_a_download_that_is_forbidden_is_a_problem(package, monkeypatch):
    monkeypatch.setattr(libero_install, "load_gl", lambda backend: None)
    monkeypatch.delitem(sys.modules, "huggingface_hub", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (problem,) = libero_install.find_problems()
    assert "HF_HUB_OFFLINE forbids their download: set LIBERO_ASSETS" in problem
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert libero_install.find_problems() == []


# --- Tasks and states ---


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("push_the_plate", "push the plate"),
        ("KITCHEN_SCENE10_open_the_drawer", "open the drawer"),
        ("LIVING_ROOM_SCENE2_put_the_box_in_the_basket", "put the box in the basket"),
        ("STUDY_SCENE1_pick_up_the_book_and_place_it_in_the_back_compartment_of_the_caddy",
         "pick up the book and place it in the back compartment of the caddy"),
    ],
)  # fmt: skip
def test_instructions_are_the_words_of_the_tasks_name(name, text):
    assert libero_install.instruction(name) == text


def save_states(package: Path, content) -> Path:
    import torch

    file = package / "init_files/toy/push_the_plate.pruned_init"
    torch.save(content, file)
    return file


def test_states_are_read_as_torch_reads_them(package):
    import torch

    states = np.random.default_rng(0).normal(size=(50, 7))
    file = save_states(package, states)
    read = libero_install.load_init_states("toy", 1)
    np.testing.assert_array_equal(read, torch.load(file, weights_only=False))
    np.testing.assert_array_equal(read, states)
    assert read.dtype == np.float64


class Harmful:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def test_a_file_of_states_can_make_nothing_but_arrays(package, tmp_path):
    trace = tmp_path / "trace"
    for content, name in (
        (Harmful(trace), "posix.mkdir"),
        (np.array([Harmful(trace)], dtype=object), "posix.mkdir"),
        (SimpleNamespace(), "types.SimpleNamespace"),
    ):
        save_states(package, content)
        with pytest.raises(
            pickle.UnpicklingError, match=f"{name} has no place in a file of initial states"
        ):
            libero_install.load_init_states("toy", 1)
    assert not trace.exists()
    for too_little in (np.zeros((49, 7)), np.zeros(50), [1.0]):
        file = save_states(package, too_little)
        with pytest.raises(ValueError, match=f"{file.name} does not hold 50 states"):
            libero_install.load_init_states("toy", 1)


BENCHMARK = """
import hashlib, json, sys
from ppo.envs import libero_install
libero_install.prepare()
from libero.libero import benchmark
facts = {}
for name in libero_install.SUITES:
    suite = benchmark.get_benchmark_dict()[name]()
    states = [suite.get_task_init_states(i) for i in range(suite.n_tasks)]
    facts[name] = {
        "names": suite.get_task_names(),
        "texts": [suite.get_task(i).language for i in range(suite.n_tasks)],
        "files": [suite.get_task_bddl_file_path(i) for i in range(suite.n_tasks)],
        "states": [[list(s.shape), hashlib.sha256(s.tobytes()).hexdigest()] for s in states],
    }
print("FACTS" + json.dumps(facts))
"""


@pytest.mark.libero
def test_tasks_instructions_and_states_are_those_of_liberos_benchmark():
    """All five suites, 130 tasks; the limits are those of OpenVLA's evaluation."""
    ended = run_python(BENCHMARK)
    assert ended.returncode == 0, ended.stderr
    facts = json.loads(ended.stdout.partition("FACTS")[2])
    limits = {
        "libero_spatial": 220,
        "libero_object": 280,
        "libero_goal": 300,
        "libero_10": 520,
        "libero_90": 400,
    }
    assert facts.keys() == limits.keys()
    for name, fact in facts.items():
        suite = get_suite(name)
        assert (suite.name, suite.max_steps, suite.num_init_states) == (name, limits[name], 50)
        assert suite.num_tasks == (90 if name == "libero_90" else 10)
        assert libero_install.task_names(name) == tuple(
            fact["names"]
        ) and suite.instructions == tuple(fact["texts"])
        for task_id in range(suite.num_tasks):
            file = libero_install.bddl_file(name, task_id)
            assert file.is_file() and file.samefile(fact["files"][task_id])
            states = libero_install.load_init_states(name, task_id)
            assert [list(states.shape), hashlib.sha256(states.tobytes()).hexdigest()] == fact[
                "states"
            ][task_id]


# --- The import of LIBERO ---


@pytest.mark.libero
def test_liberos_import_asks_nothing_and_writes_its_settings_where_it_is_told(tmp_path):
    assets, config = make_assets(tmp_path / "assets"), tmp_path / "made" / "config"
    program = (
        "import sys, yaml\nfrom ppo.envs import libero_install\n"
        "libero_install.import_libero()\nimport libero.libero as L\n"
        "assert 'torch' not in sys.modules\n"
        "print([L.get_assets_path(), L.get_libero_path('bddl_files'), L.libero_config_path])"
    )
    variables = {
        "LIBERO_ASSETS": str(assets),
        "HOME": str(tmp_path / "home"),
        "LIBERO_CONFIG_PATH": str(config),
    }
    package = libero_install.find_package()
    ended = run_python(program, **variables)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == str(
        [str(assets), str(package / "bddl_files"), str(config)]
    )
    written = (config / "config.yaml").read_text()
    assert (
        f"assets: '{assets}'" in written and f"init_states: '{package / 'init_files'}'" in written
    )
    assert [p.name for p in config.iterdir()] == ["config.yaml"]
    (config / "config.yaml").write_text(written + "# mine\n")

    temporary = tmp_path / "temporary"
    temporary.mkdir()
    for where in (str(config), ""):  # as given, and none given
        ended = run_python(
            program, **variables | {"LIBERO_CONFIG_PATH": where, "TMPDIR": str(temporary)}
        )
        assert ended.returncode == 0, ended.stderr
    assert (config / "config.yaml").read_text().endswith("# mine\n"), (
        "what is there is not written again"
    )
    (own,) = temporary.glob("ppo_vla_libero_*/config.yaml")
    assert own.read_text() == written
    assert not (tmp_path / "home" / ".libero").exists()


# --- Drawing ---


def test_a_named_gpu_draws_with_egl_else_the_variable_decides_else_osmesa(monkeypatch):
    for value, gpu, expected in (
        ("", None, "osmesa"),
        ("osmesa", None, "osmesa"),
        (" EGL ", None, "egl"),
        ("osmesa", 3, "egl"),
        ("glfw", 0, "egl"),
    ):
        monkeypatch.setenv("MUJOCO_GL", value)
        assert libero_install.choose_gl(gpu) == expected
    monkeypatch.delenv("MUJOCO_GL")
    assert libero_install.choose_gl(None) == "osmesa"
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    with pytest.raises(ValueError, match="MUJOCO_GL=glfw: LIBERO draws off screen with egl"):
        libero_install.choose_gl(None)


@pytest.mark.parametrize("error", [ImportError, AttributeError, OSError])
@pytest.mark.parametrize(
    ("backend", "packages"),
    [("osmesa", "libosmesa6"), ("egl", "libegl1 libglvnd0 libgl1 libglx0")],
)
def test_a_library_that_does_not_load_is_named_with_its_debian_package(
    monkeypatch, error, backend, packages
):
    monkeypatch.setenv("PYOPENGL_PLATFORM", "before")
    visible, asked = ctypes.RTLD_GLOBAL, []

    def refuse(name):
        asked.append((name, visible == ctypes.RTLD_GLOBAL))
        raise error("no such library")

    with monkeypatch.context() as patch:
        patch.setattr(importlib, "import_module", refuse)
        with pytest.raises(LiberoMissingError) as caught:
            libero_install.load_gl(backend)
    assert f"MUJOCO_GL={backend}: its library does not load (no such library): " in str(
        caught.value
    )
    assert f"apt-get install -y {packages} (as root), or {SETUP}" in str(caught.value)
    # OSMesa's symbols stay its own; all is as before afterwards.
    assert asked == [("mujoco", backend == "egl")] and visible == ctypes.RTLD_GLOBAL
    assert os.environ["PYOPENGL_PLATFORM"] == "before"


@pytest.mark.libero
def test_looking_for_problems_leaves_nothing_behind_for_the_processes_that_start_later():
    # The driver looks once for all of its workers, whose environments draw on GPUs of their own.
    program = (
        "import os\nfrom ppo.envs import libero_install\nbefore = dict(os.environ)\n"
        "libero_install.find_problems(3)\nassert dict(os.environ) == before, os.environ"
    )
    ended = run_python(program, PYOPENGL_PLATFORM="", MUJOCO_EGL_DEVICE_ID="")
    assert ended.returncode == 0, ended.stderr


@pytest.mark.libero
def test_libero_imports_where_another_gpu_draws_than_the_one_that_cuda_may_use():
    program = (
        "import os\nfrom ppo.envs import libero_install\nlibero_install.import_libero()\n"
        "print([os.environ[n] for n in ('MUJOCO_GL', 'MUJOCO_EGL_DEVICE_ID', 'CUDA_VISIBLE_DEVICES')])"
    )
    variables = {"MUJOCO_GL": "egl", "MUJOCO_EGL_DEVICE_ID": "1", "CUDA_VISIBLE_DEVICES": "0"}
    ended = run_python(program, **variables)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == str(list(variables.values()))


def has_egl() -> bool:
    return not gl_problems("egl")


@pytest.mark.libero
@pytest.mark.skipif("not has_egl()", reason="no EGL here")
def test_a_gpu_that_is_named_draws_although_the_variable_says_osmesa():
    program = "from ppo.envs.libero_simulator import Drawing\nprint(Drawing(0, True).backend)"
    variables = {"MUJOCO_GL": "osmesa", "CUDA_VISIBLE_DEVICES": "1"}
    ended = run_python(program, PYOPENGL_PLATFORM="", MUJOCO_EGL_DEVICE_ID="", **variables)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == ["egl"]


@pytest.mark.parametrize(
    ("variables", "options", "expected"),
    [
        ({"MUJOCO_GL": "egl", "CUDA_VISIBLE_DEVICES": "6"}, {}, [6, 6, 6]),
        ({"MUJOCO_GL": "egl", "CUDA_VISIBLE_DEVICES": "2, 3"}, {}, [2, 3, 2]),
        ({"MUJOCO_GL": "egl", "CUDA_VISIBLE_DEVICES": "2,3"}, {"env_gpu_id": 0}, [0, 0, 0]),
        ({"MUJOCO_GL": "osmesa", "CUDA_VISIBLE_DEVICES": "0"}, {"env_gpu_id": (5, 4)}, [5, 4, 5]),
        ({"MUJOCO_GL": "osmesa", "CUDA_VISIBLE_DEVICES": "2,3"}, {}, [None] * 3),
        ({"MUJOCO_GL": "egl"}, {}, [None] * 3),
        ({"MUJOCO_GL": "egl", "CUDA_VISIBLE_DEVICES": ""}, {}, [None] * 3),
        ({"MUJOCO_GL": "egl", "CUDA_VISIBLE_DEVICES": "GPU-8a1f,GPU-77"}, {}, [None] * 3),
        ({"MUJOCO_GL": "egl", "CUDA_VISIBLE_DEVICES": "2", "MUJOCO_EGL_DEVICE_ID": "1"}, {}, [None] * 3),
    ],
)  # fmt: skip
@pytest.mark.libero
def test_environments_draw_on_the_gpus_that_are_named_else_on_those_of_their_process(
    variables, options, expected, monkeypatch
):
    for name in ("CUDA_VISIBLE_DEVICES", "MUJOCO_EGL_DEVICE_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    suite = get_suite("libero_spatial")
    given = {"images": True, **options}
    taken = [suite.process_options(given, turn) for turn in range(3)]
    assert [each.get("env_gpu_id") for each in taken] == expected
    assert all(each["images"] for each in taken)


@pytest.mark.libero
def test_a_machine_without_osmesa_is_told_so_before_anything_starts():
    program = """
import ctypes
load = ctypes.CDLL.__init__
def without_osmesa(self, name, *args, **kwargs):
    if "OSMesa" in str(name):
        raise OSError("cannot open shared object file")
    load(self, name, *args, **kwargs)
ctypes.CDLL.__init__ = without_osmesa
import os
os.environ["MUJOCO_GL"] = "disabled"  # mujoco imports
import mujoco
os.environ["MUJOCO_GL"] = "osmesa"
from ppo.envs import libero_install
print(libero_install.find_problems())
"""
    ended = run_python(program)
    assert ended.returncode == 0, ended.stderr
    assert (
        "MUJOCO_GL=osmesa: its library does not load" in ended.stdout
        and "install -y libosmesa6" in ended.stdout
    )


# --- The suites' options ---


@pytest.mark.libero
def test_options_of_other_worlds_are_told_apart(monkeypatch):
    flags = {"render_quality": "eval", "env_gpu_id": None, "num_steps_wait": 0}
    spatial = get_suite("libero_spatial")
    assert split_options(spatial, **flags) == ({"render_quality": "eval", "num_steps_wait": 0}, [])
    taken, problems = split_options(get_suite("tabletop"), **flags)
    assert taken == {} and sorted(problems) == [
        "--num_steps_wait 0: tabletop has no such option",
        "--render_quality eval: tabletop has no such option",
    ]
    with pytest.raises(AttributeError, match="no attribute LIBERO_100"):
        importlib.import_module("ppo.envs.libero").LIBERO_100  # noqa: B018
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    assert spatial.training_options({}) == {"exact_physics": False, "render_quality": "fast"}
    assert spatial.training_options({"env_gpu_id": 0}) == {
        "exact_physics": False, "render_quality": "eval", "max_canvases": 2, "env_gpu_id": 0,
    }  # fmt: skip
    assert spatial.training_options({"env_gpu_id": (1, 0)})["render_quality"] == "eval"
    given = {"exact_physics": True, "render_quality": "fast"}
    assert spatial.training_options(given) == given
    assert get_suite("tabletop").training_options({"a": 1}) == {"a": 1}


@pytest.mark.libero
def test_problems_of_drawing_do_not_matter_where_nothing_is_drawn(monkeypatch):
    suite = get_suite("libero_spatial")
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    assert suite.find_problems() == []
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    (problem,) = suite.find_problems(render_quality="eval")
    assert problem.startswith("MUJOCO_GL=glfw: ")
    assert suite.find_problems(images=False) == []
