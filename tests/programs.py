"""The programs in vla-scripts/ as modules: a call costs a test nothing, a process takes seconds to import torch."""

import importlib.util
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]


def load_program(name: str) -> ModuleType:
    """vla-scripts/NAME.py without running it."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "vla-scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
