"""Proves that the installed packages import, and says what to install when a system library is missing."""

import importlib
import re
from dataclasses import dataclass

import tyro

from utils.logging_utils import get_logger

logger = get_logger(__name__)

# One line each: what the project imports, quick ones first. cv2, torch and tensorflow load many shared libraries.
PACKAGES = (
    "numpy", "rich", "safetensors", "cv2", "imageio_ffmpeg", "torch", "torchvision", "timm", "transformers", "peft",
    "ray", "tensorflow", "tensorflow_datasets", "vllm",
)  # fmt: skip

DEBIAN_PACKAGES = {
    "libnuma.so.1": "libnuma1",
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

    kind: str = "cpu"
    """`cpu` or `gpu`: which packages were installed."""


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
        hint = missing_library_hint(str(error)) or "run `bash scripts/setup_env.sh --force`"
        return f"{name} does not import ({error}): {hint}"
    except OSError as error:  # a shared library loaded through ctypes
        return f"{name} does not load ({error}): {missing_library_hint(str(error)) or 'see docs/TROUBLESHOOTING.md'}"
    return None


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
    problems = [problem for name in PACKAGES if (problem := import_problem(name)) is not None]
    if not problems and (problem := vllm_problem(args.kind)) is not None:
        problems.append(problem)
    for problem in problems:
        logger.error(problem)
    raise SystemExit(1 if problems else 0)


if __name__ == "__main__":
    main()
