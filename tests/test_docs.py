"""Command lines in scripts/, README and docs parse; every flag is read; the flag lists are frozen.

After a wanted change of flags: `UPDATE_FLAGS=1 .venv/bin/python -m pytest tests/test_docs.py -k frozen`.
"""

import ast
import dataclasses
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import tyro

import ppo_vllm_ray_fsdp_vla as driver
from ppo.arguments import parse_trainers_per_node, warnings
from utils.hub import hub_flags
from utils.placement import Demand, Node, placement_problems

ROOT = Path(__file__).parent.parent
PROGRAMS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [*ROOT.glob("*.py"), *ROOT.glob("vla-scripts/*.py")]
    if "tyro.cli(" in path.read_text()
)
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FLAG_LISTS = ROOT / "tests/data"


class ParsedError(Exception):
    """Carries what a program's own tyro.cli call made of its command line."""

    def __init__(self, args):
        self.args_object = args


def parse(program: str, argv: list[str], monkeypatch) -> object:
    """Run a program's __main__ up to the point where its flags are parsed, with its own tyro settings."""

    real_cli = tyro.cli

    def cli(args_type, **options):
        raise ParsedError(real_cli(args_type, **options))

    monkeypatch.setattr(tyro, "cli", cli)
    monkeypatch.setattr(sys, "argv", [program, *argv])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises((ParsedError, SystemExit)) as raised:
        runpy.run_path(str(ROOT / program), run_name="__main__")
    monkeypatch.undo()
    if isinstance(raised.value, SystemExit):
        assert "--help" in argv and raised.value.code == 0, f"{program} {argv}"
        return None
    return raised.value.args_object


@cache
def args_class(program: str) -> type:
    """The dataclass of a program's flags."""
    return runpy.run_path(str(ROOT / program), run_name="not_main")["Args"]


def find_commands(text: str) -> list[str]:
    """Lines of a document's code blocks, continuation lines joined."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.M | re.S)
    return [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def split_command(line: str) -> list[str] | None:
    """Words of a line that calls one of our programs or scripts, from its name on; None for other lines."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError:
        return None
    for i, word in enumerate(words):
        if word in PROGRAMS or re.fullmatch(r"scripts/\w+\.(sh|sbatch)", word):
            return words[i:]
    return None


def documented_commands() -> list[tuple[str, list[str]]]:
    """(file, words) of every command line in README and docs, and of the programs' own docstrings."""
    found = []
    for doc in DOCS:
        for line in find_commands(doc.read_text()):
            if words := split_command(line):
                found.append((doc.name, words))
    for program in PROGRAMS:
        docstring = ast.get_docstring(ast.parse((ROOT / program).read_text())) or ""
        lines = re.findall(r"^    (.+)$", docstring.replace("\\\n", " "), flags=re.M)
        found += [
            (program, words)
            for line in lines
            if (words := split_command(line)) and "..." not in words
        ]
    return found


COMMANDS = documented_commands()


class Call(list[str]):
    """Words of a Python command line, and the environment variables it ran with."""

    environment: dict[str, str]


def run_script(script: str, argv: list[str], checkout: Path) -> list[Call]:
    """What `.venv/bin/python` is called with when a launch script runs in a checkout without set-up."""
    shutil.copytree(ROOT / "scripts", checkout / "scripts", dirs_exist_ok=True)
    (checkout / "scripts/setup_env.sh").write_text("exit 0\n")
    python = checkout / ".venv/bin/python"
    python.parent.mkdir(parents=True, exist_ok=True)
    python.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        'open("calls", "a").write(json.dumps([sys.argv[1:], dict(os.environ)]) + "\\n")'
    )
    python.chmod(0o755)
    for tool in ("ruff", "mypy"):
        (python.parent / tool).write_text("#!/bin/sh\n")
        (python.parent / tool).chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHON"}
    done = subprocess.run(
        ["bash", script, *argv], cwd=checkout, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    calls = []
    for line in (checkout / "calls").read_text().splitlines():
        words, variables = json.loads(line)
        calls.append(Call(words))
        calls[-1].environment = variables
    (checkout / "calls").unlink()
    return calls


LAUNCHES = {
    "scripts/quickstart.sh": ["--seed", "3"],
    "scripts/libero_spatial_from_scratch.sh": [
        "--variants",
        "base",
        "seed1",
        "--time_limit_s",
        "580",
        "--gpus",
        "1",
    ],
    "scripts/train_tabletop_cpu.sh": ["--vla_path", "runs/quickstart/sft", "--seed", "1"],
    "scripts/train_libero.sh": ["object", "0,1", "0"],
    "scripts/train_libero_spatial.sh": ["0,1,2,3", "0 1 2"],
    "scripts/train_libero_object.sh": ["0", "all"],
    "scripts/train_libero_goal.sh": ["2,3", "0,1,2", "--seed", "1"],
    "scripts/train_libero_10.sh": ["0,1,2,3,4,5,6,7", "all"],
    "scripts/train_libero_90.sh": ["0,1", "all"],
    "scripts/train_libero_cpu.sh": ["--vla_path", "runs/libero_sft", "--task_ids", "0", "1"],
    "scripts/make_libero_demos.sh": [],
    "scripts/eval_libero.sh": ["runs/model"],
    "scripts/test.sh": ["tests/ppo"],
}
NO_PROGRAM = {"scripts/setup_env.sh", "scripts/lock_requirements.sh"}
# These start Ray first; what they pass on are the driver's flags (tests/test_multinode.py runs the first).
MULTINODE = {"scripts/launch_multinode.sh", "scripts/slurm_multinode.sbatch"}
DRIVER = "ppo_vllm_ray_fsdp_vla.py"


@pytest.fixture(autouse=True)
def checkpoint_of_libero_90(monkeypatch):
    monkeypatch.setenv("VLA_PATH", "runs/sft")
    monkeypatch.delenv("LAYOUT", raising=False)


def multinode_flags(words: list[str]) -> list[str] | None:
    """The driver's flags in a line of the multi-node scripts, None for a worker's line."""
    if words[0].endswith(".sbatch"):
        return words[1:]
    role = " ".join(words[1:])
    if re.fullmatch(r"worker [\w.]+(:\d+)?", role):
        return None
    assert re.match(r"(head [\w.]+(:\d+)? [1-9]\d* -- |ssh [\w.]+(:\d+)? [\w.,-]+ -- )", role), role
    return words[5:]


def test_documents_hold_commands():
    assert len([doc for doc, _ in COMMANDS if doc == "README.md"]) >= 8
    programs = {words[0] for _, words in COMMANDS}
    assert {
        "scripts/quickstart.sh",
        "scripts/test.sh",
        "ppo_vllm_ray_fsdp_vla.py",
        "vla-scripts/merge.py",
    } <= programs


@pytest.mark.parametrize(
    ("doc", "words"), COMMANDS, ids=lambda value: value if isinstance(value, str) else value[0]
)
def test_documented_command_parses(doc, words, monkeypatch, tmp_path):
    if words[0] in PROGRAMS:
        parse(words[0], words[1:], monkeypatch)
    elif words[0] in MULTINODE:
        if flags := multinode_flags(words):
            driver.validate(parse(DRIVER, flags, monkeypatch))
    elif words[0] not in NO_PROGRAM:
        for program, *argv in run_script(words[0], words[1:], tmp_path):
            if program in PROGRAMS:
                parse(program, argv, monkeypatch)
    else:
        assert (ROOT / words[0]).exists()


@pytest.mark.parametrize(
    "script", sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("scripts/*.sh"))
)
def test_launch_script_parses(script, monkeypatch, tmp_path):
    if script in NO_PROGRAM | MULTINODE:
        return
    calls = run_script(script, LAUNCHES[script], tmp_path)
    assert calls
    for program, *argv in calls:
        if program in PROGRAMS:
            args = parse(program, argv, monkeypatch)
            if program == DRIVER:
                driver.validate(args)
                assert warnings(args) == [], "a launch script gives a flag that does nothing"
        else:
            assert (program, argv[0]) == ("-m", "pytest") and argv[-1] == "tests/ppo"


@pytest.mark.parametrize(
    ("layout", "gpus", "trainers", "engines"),
    [
        ("", "3", 1, 1), ("", "0,1", 1, 1), ("separate", "4,5,6", 2, 1), ("", "0,1,2,3", 3, 1),
        ("", "0,1,2,3,4,5", 4, 2), ("", "0,1,2,3,4,5,6,7", 6, 2), ("colocate", "0,1", 2, 2),
        ("colocate", "0,1,2,3,4,5,6,7", 8, 8),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "suite", ["libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90"]
)
def test_libero_launch_lines_fit_the_gpus(
    suite, layout, gpus, trainers, engines, monkeypatch, tmp_path
):
    monkeypatch.setenv("LAYOUT", layout)
    monkeypatch.delenv("MUJOCO_GL")
    (call,) = run_script(f"scripts/train_{suite}.sh", [gpus, "0,5", "--seed", "7"], tmp_path)
    args = parse(call[0], call[1:], monkeypatch)
    driver.validate(args)  # sizes divide, flags go together
    assert args.task_suite_name == suite and args.task_ids == (0, 5) and args.seed == 7
    assert args.use_lora and args.center_crop
    assert call.environment["CUDA_VISIBLE_DEVICES"] == gpus
    # Every engine's environments draw on its GPU, unless the user names others or the CPU.
    assert args.env_gpu_id == () and call.environment["MUJOCO_GL"] == "egl"
    colocate = layout == "colocate" or len(gpus) == 1
    assert args.colocate is colocate
    demand = Demand(
        parse_trainers_per_node(args.actor_num_gpus_per_node),
        args.vllm_num_engines,
        colocate=colocate,
    )
    assert (demand.num_trainers, demand.num_engines) == (trainers, engines)
    assert (
        placement_problems(demand, [Node(gpus.count(",") + 1, 64)]) == []
        and demand.num_gpus == gpus.count(",") + 1
    )


@pytest.mark.parametrize("tasks", ["all", "0 1 2", "0,1,2"])
def test_libero_launch_lines_take_task_lists_and_all(tasks, monkeypatch, tmp_path):
    (call,) = run_script("scripts/train_libero_90.sh", ["0", tasks], tmp_path)
    args = parse(call[0], call[1:], monkeypatch)
    driver.validate(args)  # the curriculum's floor leaves room for 90 tasks
    assert args.task_ids == (() if tasks == "all" else (0, 1, 2))


@pytest.mark.parametrize(
    ("layout", "argv", "message"),
    [
        ("", ["0,1,2,3,4", "0"], "5 GPUs (0,1,2,3,4): use 1, 2, 3, 4, 6 or 8"),
        ("", ["0 1", "0"], "GPUs '0 1': give their numbers"),
        ("", ["0,1"], "train_libero_goal.sh <gpus> <task_ids>"),
        ("", ["0,1", "bowl"], "task ids 'bowl'"),
        ("separate", ["0", "0"], "use LAYOUT=colocate"),
        ("mixed", ["0", "0"], "LAYOUT=mixed: use separate or colocate"),
    ],
)
def test_libero_launch_lines_say_what_they_take(layout, argv, message):
    done = subprocess.run(
        ["bash", "scripts/train_libero_goal.sh", *argv],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "LAYOUT": layout},
    )  # fmt: skip
    assert done.returncode == 2 and message in done.stderr


@pytest.mark.parametrize(
    ("argv", "suite", "crop"),
    [
        (["m"], "libero_spatial", True),
        (["m", "libero_goal", "--no_center_crop"], "libero_goal", False),
    ],
)
def test_libero_evaluation_takes_a_suite_and_flags(argv, suite, crop, monkeypatch, tmp_path):
    (call,) = run_script("scripts/eval_libero.sh", argv, tmp_path)
    args = parse(call[0], call[1:], monkeypatch)
    assert (
        args.task_suite_name == suite and args.center_crop is crop and args.save_video == "failures"
    )


@pytest.mark.parametrize(
    ("gl", "gpu", "expected"),
    [("", True, "egl"), ("osmesa", True, "osmesa"), ("", False, "")],
)
@pytest.mark.parametrize("script", ["scripts/eval_libero.sh", "scripts/make_libero_demos.sh"])
def test_libero_is_drawn_on_the_gpu_where_there_is_one(
    script, gl, gpu, expected, monkeypatch, tmp_path
):
    program = tmp_path / "bin/nvidia-smi"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{'echo GPU 0: a card' if gpu else 'exit 9'}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("MUJOCO_GL", gl)
    (call,) = run_script(script, LAUNCHES[script], tmp_path)
    assert call.environment["MUJOCO_GL"] == expected
    assert not parse(call[0], call[1:], monkeypatch).env_gpu_id


@pytest.mark.parametrize(
    "script", sorted(set(LAUNCHES) - {"scripts/quickstart.sh", "scripts/test.sh"})
)
def test_launch_scripts_take_another_interpreter_and_set_nothing_up_then(script, tmp_path):
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    (tmp_path / "scripts/setup_env.sh").write_text("touch set_up\n")
    (tmp_path / "other").write_text("#!/bin/sh\ntouch called\n")
    (tmp_path / "other").chmod(0o755)
    subprocess.run(
        ["bash", script, *LAUNCHES[script]],
        cwd=tmp_path, check=True, env={**os.environ, "PYTHON": str(tmp_path / "other")},
    )  # fmt: skip
    assert (tmp_path / "called").exists() and not (tmp_path / "set_up").exists()


def test_tabletop_launch_is_the_real_thing(monkeypatch, tmp_path):
    (call,) = run_script(
        "scripts/train_tabletop_cpu.sh", ["--vla_path", "x", "--learning_rate", "0.125"], tmp_path
    )
    args = parse(call[0], call[1:], monkeypatch)
    assert args.use_lora and args.value_init_steps > 0
    assert args.learning_rate == 0.125  # what the user adds wins


@pytest.mark.parametrize("suite", ["spatial", "object", "goal", "10"])
def test_libero_launch_lines_take_their_model_from_the_hub(suite, monkeypatch, tmp_path):
    monkeypatch.delenv("VLA_PATH")
    (call,) = run_script(f"scripts/train_libero_{suite}.sh", ["0", "all"], tmp_path)
    args = parse(call[0], call[1:], monkeypatch)
    assert hub_flags(args) == {"vla_path": f"openvla/openvla-7b-finetuned-libero-{suite}"}


@cache
def attributes_read(owner: str) -> set[str]:
    """Attributes read from something whose name matches `owner`, outside the functions that only validate."""
    names = set()
    files = [
        p for p in ROOT.rglob("*.py") if not {".venv", "tests"} & set(p.relative_to(ROOT).parts)
    ]
    for file in files:
        tree = ast.parse(file.read_text())
        validating = {
            id(node)
            for function in ast.walk(tree)
            if isinstance(function, ast.FunctionDef)
            and re.search(r"validate|problems", function.name)
            for node in ast.walk(function)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and id(node) not in validating:
                name = (
                    node.value.id
                    if isinstance(node.value, ast.Name)
                    else getattr(node.value, "attr", "")
                )
                if re.fullmatch(owner, name):
                    names.add(node.attr)
    return names


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_flag_is_read(program):
    cls = args_class(program)
    own = set(vars(cls)["__annotations__"])
    inherited = {field.name for field in dataclasses.fields(cls)} - own
    unread = (own - attributes_read("args|arguments")) | (
        inherited - attributes_read("args|arguments|config")
    )
    assert not unread, f"flags of {program} that nothing reads: {sorted(unread)}"


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_flag_is_documented(program):
    source = (ROOT / program).read_text()
    (cls,) = [n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == "Args"]
    for node, following in zip(cls.body, [*cls.body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign):
            documented = isinstance(following, ast.Expr) and isinstance(
                following.value, ast.Constant
            )
            assert documented, f"{program}: --{node.target.id} has no docstring"


@pytest.mark.parametrize("program", PROGRAMS)
def test_flag_list_is_frozen(program):
    file = FLAG_LISTS / f"flags_{Path(program).stem}.txt"
    present = "".join(f"{field.name}\n" for field in dataclasses.fields(args_class(program)))
    if os.environ.get("UPDATE_FLAGS"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(present)
    assert file.read_text() == present, (
        "flags changed: tell users, then UPDATE_FLAGS=1 (see the module's docstring)"
    )


def test_links_in_documents_lead_somewhere():
    for doc in DOCS:
        for target in re.findall(r"\]\(([^)#]+)\)", doc.read_text()):
            if not target.startswith("http"):
                assert (doc.parent / target).exists(), f"{doc.name}: {target}"


def test_every_metric_is_documented():
    known = set(re.findall(r"\w+/[\w<>]+", (ROOT / "docs/METRICS.md").read_text()))
    written = set()
    for name in (
        "ppo_vllm_ray_fsdp_vla.py",
        "ppo/learner.py",
        "ppo/run.py",
        "ppo/reporting.py",
        "vla-scripts/finetune.py",
    ):
        source = (ROOT / name).read_text()
        written |= set(
            re.findall(r'"((?:rollout|train|eval|curriculum|time|mem|sync)/\w+)"', source)
        )
        prefix = "time/trainer_" if name == "ppo/learner.py" else "time/"
        written |= {f"{prefix}{phase}_s" for phase in re.findall(r'\.phase\("(\w+)"\)', source)}
    assert len(written) > 30
    assert not written - known, f"not in docs/METRICS.md: {sorted(written - known)}"
