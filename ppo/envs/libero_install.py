"""Finding LIBERO on this machine: the package, its assets, its task lists, its fixed states and a GL library.

LIBERO's own import asks a question on standard input when its configuration file is missing, its benchmark module
imports torch, and its assets come from a hub when the wheel has none. Nothing of that happens here: environment
processes stay small, and what is missing is named together with the command that installs it.
"""

import contextlib
import ctypes
import hashlib
import importlib
import importlib.util
import io
import os
import pickle
import re
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
SETUP = "bash scripts/setup_env.sh --libero"
# The steps that OpenVLA's evaluation allows.
MAX_STEPS = {
    "libero_spatial": 220,
    "libero_object": 280,
    "libero_goal": 300,
    "libero_10": 520,
    "libero_90": 400,
}
SUITES = tuple(MAX_STEPS)
NUM_INIT_STATES = 50
# MuJoCo later than this draws differently (users report libero_object falling from 88 to 69 %).
MUJOCO_VERSION = "3.3.2"
# Files that were made because LIBERO's own were not at hand, by their SHA-256.
STAND_INS = {
    "stable_scanned_objects/akita_black_bowl/visual/akita_black_bowl_vis.msh":
        "713cb80d0a9cd2c85c7713b87156cbe35f2cff152db5a81be9822c127d1fae3a",
    "stable_scanned_objects/akita_black_bowl/texture.png":
        "67ddbf55e57871cfd1d2a877e620bb685e79ef2e962a12673ddf32798c192bab",
    "stable_scanned_objects/plate/texture.png":
        "d92385975571227bb641acaad27acd3db3688ee5ffa887035a48ecd463b17df0",
}  # fmt: skip
GL_PACKAGES = {"osmesa": "libosmesa6", "egl": "libegl1 libglvnd0 libgl1 libglx0"}


class LiberoMissingError(ImportError):
    """LIBERO, its assets or a GL library is not on this machine; the message says how to get it."""


@cache
def find_package() -> Path:
    """The folder of the package `libero.libero`, found without importing it.

    Raises:
        LiberoMissingError: it is not installed.
    """
    spec = importlib.util.find_spec("libero")
    folders = list(spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        if (Path(folder) / "libero" / "bddl_files").is_dir():
            return Path(folder) / "libero"
    raise LiberoMissingError(f"LIBERO is not installed: run `{SETUP}`")


def find_assets() -> Path | None:
    """The assets: $LIBERO_ASSETS, the package's own folder, what `setup_env.sh --libero` unpacked; None: none of them.

    Raises:
        LiberoMissingError: LIBERO_ASSETS names no folder of assets.
    """
    named = os.environ.get("LIBERO_ASSETS")
    if named:
        if not (Path(named) / "scenes").is_dir():
            raise LiberoMissingError(
                f"LIBERO_ASSETS={named}: no folder of LIBERO's assets (it has no `scenes`)"
            )
        return Path(named).resolve()
    for folder in (find_package() / "assets", ROOT / ".cache" / "libero_assets" / "assets"):
        if (folder / "scenes").is_dir():
            return folder
    return None


@cache
def asset_remarks() -> list[str]:
    """What must be said beside success rates: whether files of the assets are stand-ins for LIBERO's own."""
    assets = find_assets()
    if assets is None:
        return []
    found = [name for name, digest in STAND_INS.items() if _digest(assets / name) == digest]
    if not found:
        return []
    return [
        f"{len(found)} files of the LIBERO assets in {assets} are stand-ins ({', '.join(found)}): success rates are "
        "not comparable with published ones"
    ]


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""


def prepare() -> None:
    """Make `import libero.libero` possible in this process: no question, no download where assets are at hand.

    Writes LIBERO's configuration file to a folder of this user's under the system's temporary one and sets
    LIBERO_CONFIG_PATH to it, unless that variable is set already. Imports none of LIBERO's environments.

    Raises:
        LiberoMissingError: LIBERO is not installed, or LIBERO_ASSETS is wrong.
    """
    package, assets = find_package(), find_assets()
    config_dir = Path(os.environ.setdefault("LIBERO_CONFIG_PATH", _own_config_dir()))
    config = config_dir / "config.yaml"
    if not config.exists():
        folders = {"bddl_files": package / "bddl_files", "init_states": package / "init_files"}
        folders |= {"benchmark_root": package, "datasets": package.parent / "datasets"}
        folders["assets"] = assets or package / "assets"
        config_dir.mkdir(parents=True, exist_ok=True)
        partial = config_dir / f".config.{os.getpid()}"
        partial.write_text("".join(f"{name}: {str(path)!r}\n" for name, path in folders.items()))
        os.replace(partial, config)
    libero: Any = importlib.import_module("libero.libero")
    if assets is not None:
        libero._assets_path_cache = str(
            assets
        )  # its setting in config.yaml is not read by `get_assets_path`


def _own_config_dir() -> str:
    digest = hashlib.sha256(f"{find_package()} {find_assets()}".encode()).hexdigest()[:12]
    return str(Path(tempfile.gettempdir()) / f"ppo_vla_libero_{os.getuid()}_{digest}")


@cache
def task_names(suite: str) -> tuple[str, ...]:
    """Names of a suite's tasks (of their bddl files), in LIBERO's order.

    Read from the package's list without its benchmark module, which imports torch.
    """
    file = find_package() / "benchmark" / "libero_suite_task_map.py"
    spec = importlib.util.spec_from_file_location("libero_suite_task_map", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return tuple(module.libero_task_map[suite])


def instruction(task_name: str) -> str:
    """The instruction in a task's name, as LIBERO and OpenVLA read it: words after the scene's name, if it has one."""
    return re.sub(r"^[A-Z].*?SCENE\d+_", "", task_name).replace("_", " ")


def bddl_file(suite: str, task_id: int) -> Path:
    """The task's definition."""
    return find_package() / "bddl_files" / suite / f"{task_names(suite)[task_id]}.bddl"


@cache
def load_init_states(suite: str, task_id: int) -> np.ndarray:
    """The task's fixed initial states, (50, n) float64: time, positions, velocities of the simulator.

    The file is a torch archive of one numpy array; it is read without torch, and nothing but arrays can be made.
    """
    file = find_package() / "init_files" / suite / f"{task_names(suite)[task_id]}.pruned_init"
    with zipfile.ZipFile(file) as archive:
        name = next(n for n in archive.namelist() if n.endswith("/data.pkl"))
        states = _ArrayUnpickler(io.BytesIO(archive.read(name))).load()
    if not isinstance(states, np.ndarray) or states.ndim != 2 or len(states) < NUM_INIT_STATES:
        raise ValueError(f"{file} does not hold {NUM_INIT_STATES} states")
    return states


class _ArrayUnpickler(pickle.Unpickler):
    """Makes numpy arrays and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("numpy", "ndarray") or (module, name) == ("numpy", "dtype"):
            return getattr(np, name)
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name in (
            "_reconstruct",
            "scalar",
        ):
            return getattr(importlib.import_module("numpy._core.multiarray"), name)
        if (module, name) == ("_codecs", "encode"):
            return importlib.import_module("_codecs").encode
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a file of initial states")


def choose_gl(env_gpu_id: int | None) -> str:
    """`egl` where a GPU is named, else what MUJOCO_GL says, else `osmesa` (drawn on the CPU).

    Raises:
        ValueError: MUJOCO_GL is something else.
    """
    backend = (
        "egl"
        if env_gpu_id is not None
        else os.environ.get("MUJOCO_GL", "").lower().strip() or "osmesa"
    )
    if backend not in GL_PACKAGES:
        raise ValueError(
            f"MUJOCO_GL={backend}: LIBERO draws off screen with egl (GPU) or osmesa (CPU)"
        )
    return backend


def visible_gpus() -> tuple[int, ...]:
    """GPU numbers in CUDA_VISIBLE_DEVICES, in its order; () if it is not set or names GPUs by UUID.

    EGL ignores that variable and numbers all GPUs of the machine (of the container) in the order of nvidia-smi.
    """
    names = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    return tuple(map(int, names)) if all(name.isdecimal() for name in names) else ()


@contextlib.contextmanager
def environment(**variables: str | None) -> Iterator[None]:
    """Set environment variables (None: unset) within the block."""
    before = {name: os.environ.get(name) for name in variables}

    def apply(values: dict[str, str | None]) -> None:
        for name, value in values.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    apply(variables)
    try:
        yield
    finally:
        apply(before)


@contextlib.contextmanager
def mujoco_without_gl() -> Iterator[None]:
    """Import mujoco within this block, so that it binds to no GL library and `load_gl` can choose one later.

    With MUJOCO_GL=osmesa the import would bind PyOpenGL to OSMesa, and no GPU could draw in this process.
    """
    with environment(MUJOCO_GL="disabled"):
        yield


@contextlib.contextmanager
def osmesa_kept_apart(backend: str) -> Iterator[None]:
    """While the backend's library is loaded: keep the symbols of OSMesa's LLVM and of tensorflow's apart.

    PyOpenGL makes its symbols visible to every library loaded later, and tensorflow does so too: whichever comes
    second calls the other's LLVM and dies of a segmentation fault.
    """
    visible = ctypes.RTLD_GLOBAL
    if backend == "osmesa":
        setattr(ctypes, "RTLD_GLOBAL", os.RTLD_LOCAL | os.RTLD_DEEPBIND)  # noqa: B010 (read by PyOpenGL as it loads)
    try:
        yield
    finally:
        setattr(ctypes, "RTLD_GLOBAL", visible)  # noqa: B010


def load_gl(backend: str) -> ModuleType:
    """The module of mujoco for off-screen drawing with `backend`.

    Raises:
        LiberoMissingError: the system library is missing; names the Debian packages.
    """
    try:
        with osmesa_kept_apart(backend), environment(PYOPENGL_PLATFORM=backend):
            with mujoco_without_gl():
                importlib.import_module("mujoco")
            return importlib.import_module(f"mujoco.{backend}")
    except (ImportError, AttributeError, OSError) as error:  # PyOpenGL fails in all three ways
        raise LiberoMissingError(
            f"MUJOCO_GL={backend}: its library does not load ({error}): "
            f"apt-get install -y {GL_PACKAGES[backend]} (as root), or {SETUP}"
        ) from error


@contextlib.contextmanager
def _without_robosuite_drawing() -> Iterator[None]:
    """Both robosuite and mujoco bind to a GL library at their import; this project draws itself and needs neither's.

    robosuite overrides MUJOCO_GL by one of its macros: that module is loaded first, from its file, and changed.
    robosuite also refuses a MUJOCO_EGL_DEVICE_ID that is not in CUDA_VISIBLE_DEVICES. EGL has no such rule: it draws
    on any GPU of the machine, and environments may draw on another GPU than their engine's. So the number is hidden.
    """
    package = importlib.util.find_spec("robosuite")
    if package is None or package.origin is None:
        raise LiberoMissingError(f"robosuite is not installed: run `{SETUP}`")
    spec = importlib.util.spec_from_file_location(
        "robosuite.macros", Path(package.origin).parent / "macros.py"
    )
    assert spec is not None and spec.loader is not None
    macros = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(macros)
    macros.__dict__.update(
        MUJOCO_GPU_RENDERING=False, FILE_LOGGING_LEVEL=None, CONSOLE_LOGGING_LEVEL="ERROR"
    )
    sys.modules["robosuite.macros"] = macros
    with environment(MUJOCO_GL="disabled", MUJOCO_EGL_DEVICE_ID=None), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@cache
def import_libero() -> ModuleType:
    """LIBERO's module of environments, quietly and without drawing.

    Raises:
        LiberoMissingError: a package is missing.
    """
    prepare()
    try:
        with _without_robosuite_drawing():
            return importlib.import_module("libero.libero.envs")
    except ImportError as error:
        raise LiberoMissingError(f"LIBERO does not import ({error}): run `{SETUP}`") from error


def placement_error() -> type[Exception]:
    """What robosuite raises when it finds no free place for an object."""
    error: type[Exception] = importlib.import_module("robosuite.utils.errors").RandomizationError
    return error


def find_problems(env_gpu_id: int | None = None) -> list[str]:
    """What keeps LIBERO from running here, before anything starts; empty if nothing is known to."""
    try:
        find_package()
        assets = find_assets()
        load_gl(choose_gl(env_gpu_id))
    except (ValueError, ImportError) as error:
        return [str(error)]
    if assets is None and "huggingface_hub" not in sys.modules and os.environ.get("HF_HUB_OFFLINE"):
        return [
            "LIBERO's assets are not here and HF_HUB_OFFLINE forbids their download: set LIBERO_ASSETS"
        ]
    return []
