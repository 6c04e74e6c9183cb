"""Proves that the installed packages import, and says what to install when a system library is missing."""

import ctypes
import importlib
import importlib.util
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from utils.logging_utils import get_logger

logger = get_logger(__name__)

# One line each: what the project imports, quick ones first. cv2, torch and tensorflow load many shared libraries.
PACKAGES = (
    "numpy", "rich", "safetensors", "cv2", "simplejpeg", "imageio_ffmpeg", "torch", "torchvision", "timm",
    "transformers", "peft", "ray", "tensorflow", "tensorflow_datasets", "vllm",
)  # fmt: skip

# `libero.libero.envs` imports the renderer, every scene and every object; the others come first to be named themselves.
LIBERO_PACKAGES = (
    "mujoco",
    "scipy",
    "matplotlib",
    "gymnasium",
    "robosuite",
    "bddl",
    "libero.libero.envs",
)

# What MuJoCo's off-screen renderers load: OSMesa draws on the CPU, EGL on the GPU (libglvnd hands over to the driver).
GL_LIBRARIES = {
    "osmesa": ("libOSMesa.so.8",),
    "egl": ("libEGL.so.1", "libGLdispatch.so.0", "libGL.so.1", "libGLX.so.0"),
}

DEBIAN_PACKAGES = {
    "libnuma.so.1": "libnuma1",
    "libOSMesa.so.8": "libosmesa6",
    "libEGL.so.1": "libegl1",
    "libGLdispatch.so.0": "libglvnd0",
    "libGLX.so.0": "libglx0",
    "libGL.so.1": "libgl1",
    "libgthread-2.0.so.0": "libglib2.0-0",
    "libglib-2.0.so.0": "libglib2.0-0",
    "libgomp.so.1": "libgomp1",
    "libstdc++.so.6": "libstdc++6",
    "libz.so.1": "zlib1g",
    "libcuda.so.1": "the NVIDIA driver (not a Debian package of this project's choosing)",
}


@dataclass(frozen=True)
class Args:
    """Import every package that the project needs and say what is wrong."""

    kind: Literal["cpu", "gpu", "none"] = "cpu"
    """Which packages were installed; `none` checks nothing but what --libero asks for."""
    libero: bool = False
    """Import LIBERO's simulator too and load the GL libraries of MUJOCO_GL (unset: osmesa; with a GPU also egl)."""


def missing_library_hint(message: str) -> str | None:
    """Return what to install for an import error that names a shared library, None if it names none."""
    match = re.search(r"(lib[\w+.-]+\.so[\w.]*): cannot open shared object file", message)
    if match is None:
        return None
    package = DEBIAN_PACKAGES.get(match[1])
    if package is None:
        return f"the system library {match[1]} is missing: install the package of your system that has it"
    return f"{match[1]} is missing: apt-get install -y {package} (as root)"


def import_problem(name: str) -> str | None:
    """Import `name`; returns None, or what failed and what to do about it."""
    try:
        importlib.import_module(name)
    except ImportError as error:
        option = "--libero --force" if name in LIBERO_PACKAGES else "--force"
        hint = missing_library_hint(str(error)) or f"run `bash scripts/setup_env.sh {option}`"
        return f"{name} does not import ({error}): {hint}"
    except OSError as error:  # a shared library loaded through ctypes
        return f"{name} does not load ({error}): {missing_library_hint(str(error)) or 'see docs/TROUBLESHOOTING.md'}"
    except EOFError:  # LIBERO's first import asks where its data shall be
        return f"{name} asks a question on standard input: see docs/TROUBLESHOOTING.md"
    return None


def chosen_renderers() -> tuple[str, ...]:
    """Return MuJoCo's renderers to be used: MUJOCO_GL's, else osmesa, and egl too where there is an NVIDIA GPU."""
    if chosen := os.environ.get("MUJOCO_GL"):
        return (chosen,)
    try:
        gpus = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
    except OSError:
        gpus = ""
    return ("osmesa", "egl") if gpus.startswith("GPU") else ("osmesa",)


def gl_problems(renderer: str) -> list[str]:
    """Load the GL libraries of one renderer (`osmesa` or `egl`); returns one line for each that cannot be loaded."""
    if renderer not in GL_LIBRARIES:
        return [f"MUJOCO_GL={renderer} is not supported: use osmesa (CPU) or egl (GPU)"]
    problems = []
    for library in GL_LIBRARIES[renderer]:
        try:
            # DEEPBIND: OSMesa's LLVM must not call the functions of tensorflow's, which may be in this process.
            ctypes.CDLL(library, mode=os.RTLD_DEEPBIND)
        except OSError as error:
            problems.append(f"MUJOCO_GL={renderer}: {missing_library_hint(str(error)) or error}")
    return problems


def libero_problems() -> list[str]:
    """Import LIBERO's simulator as it is installed, without a question on standard input; returns what is wrong."""
    renderers = chosen_renderers()
    if problems := [problem for renderer in renderers for problem in gl_problems(renderer)]:
        return problems  # MuJoCo and robosuite load these on import
    os.environ["MUJOCO_GL"] = renderers[0]
    with tempfile.TemporaryDirectory() as folder:
        spec = importlib.util.find_spec("libero")
        if spec is not None and spec.submodule_search_locations:
            root = Path(spec.submodule_search_locations[0]) / "libero"
            # Without this file the import asks where the data shall be.
            (Path(folder) / "config.yaml").write_text(f"benchmark_root: {root}\n")
        os.environ["LIBERO_CONFIG_PATH"] = folder
        return [
            problem for name in LIBERO_PACKAGES if (problem := import_problem(name)) is not None
        ]


def vllm_problem(kind: str) -> str | None:
    """Return what is wrong with vLLM's compiled kernels: a failure there is only a warning in vLLM itself."""
    from vllm.platforms import current_platform

    found = current_platform.device_type
    if kind == "cpu" and found != "cpu":
        return f"vLLM found the platform {found!r}, not 'cpu': run `bash scripts/setup_env.sh --cpu --force`"
    if kind == "gpu" and found != "cuda":
        return None  # the GPU packages on a machine without a GPU, as asked for
    current_platform.import_kernels()
    import torch

    if not hasattr(torch.ops, "_C") or not hasattr(torch.ops._C, "silu_and_mul"):
        return "vLLM's compiled kernels did not load: see its warning above"
    return None


def main() -> None:
    """Log every problem; exit 1 if there is one."""
    args = tyro.cli(Args)
    problems = []
    if args.kind != "none":
        problems = [problem for name in PACKAGES if (problem := import_problem(name)) is not None]
        if not problems and (problem := vllm_problem(args.kind)) is not None:
            problems.append(problem)
    if args.libero:
        problems += libero_problems()
    for problem in problems:
        logger.error(problem)
    raise SystemExit(1 if problems else 0)


if __name__ == "__main__":
    main()
