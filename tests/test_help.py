"""--help and mistyped flags: answered by every program without what takes seconds to import."""

import subprocess
import sys

import pytest

from tests.test_docs import PROGRAMS, ROOT

BLOCKED = ("torch", "transformers", "peft", "ray", "vllm", "tensorflow")
RUN = f"""
import runpy, sys

class Refusing:
    def find_spec(name, path=None, target=None):
        if name in {BLOCKED!r}:
            raise ImportError(name + " must not be imported")

sys.meta_path.insert(0, Refusing)
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(program: str, *argv: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", RUN, program, *argv], cwd=ROOT, capture_output=True, text=True
    )


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_needs_none_of_the_slow_imports(program):
    done = run(program, "--help")
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout and "--help" in done.stdout


@pytest.mark.parametrize("program", PROGRAMS)
def test_mistyped_flags_need_none_of_the_slow_imports(program):
    done = run(program, "--no_such_flag", "1")
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "no_such_flag" in done.stdout + done.stderr
