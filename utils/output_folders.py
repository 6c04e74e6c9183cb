"""Output folders: whether a program can write to one, and whether it may remove what is there.

Every program asks `output_problems` before anything starts, and removes a folder only with
`remove_output`, which asks again. A folder is removed only if it is recognisably an output of the
same program and neither is, contains nor lies inside one of the inputs. Imports no torch.
"""

import fnmatch
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from prismatic.model_files import CHECKSUMS_NAME, read_json_object
from utils.command_line import (
    MAX_FOLDER_NAME_BYTES,
    CommandLineError,
    folder_name_problems,
    path_problems,
)

CHECKOUT = Path(__file__).resolve().parents[1]
# What `_write_problem` makes for an instant; another rank of the same program may see it.
_PROBE_PREFIX = ".write-test-"
# First line of a log file, see utils.logging_utils.add_log_file.
_LOG_LINE = re.compile(rb"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ ppo_vla\b")

Inputs = Mapping[str, str | Path | None]


@dataclass(frozen=True)
class OutputKind:
    """What one program leaves in its folder, by which the folder is recognised.

    Attributes:
        name: for messages, with an article.
        is_ours: whether the folder holds what only this program writes.
        entries: patterns (fnmatch) of everything that the program puts at the top of the folder.
            What checksums.json lists there belongs to it too.
    """

    name: str
    is_ours: Callable[[Path], bool]
    entries: tuple[str, ...]


def _has_fields(file: Path, *fields: str) -> bool:
    """Whether `file` is a JSON object with these fields."""
    try:
        return read_json_object(file).keys() >= set(fields)
    except (OSError, ValueError):
        return False


def _is_run(folder: Path, *fields: str) -> bool:
    """A run's folder: args.json has these flags. A run that died before it wrote one has a log."""
    if os.path.lexists(folder / "args.json"):
        return _has_fields(folder / "args.json", *fields)
    return _is_log(folder / "log.txt")


def _is_log(file: Path) -> bool:
    """Whether `file` is a log of ours, or an empty file."""
    try:
        if not stat.S_ISREG(file.lstat().st_mode):
            return False
        with file.open("rb") as log:
            start = log.read(100)
    except OSError:
        return False
    return not start or _LOG_LINE.match(start) is not None


def _is_demonstrations(folder: Path) -> bool:
    try:
        description = read_json_object(folder / "dataset_info.json").get("description")
    except (OSError, ValueError):
        return False
    return isinstance(description, str) and description.startswith("Scripted demonstrations")


_RUN_ENTRIES = (
    "args.json", "log.txt", "metrics.jsonl", "events.out.tfevents.*", "wandb", "step_[0-9]*", ".step_[0-9]*",
    ".final", ".final.*", "metadata.json", "dataset_statistics.json", "adapter_config.json",
    "adapter_model.safetensors", "base_model.json", CHECKSUMS_NAME,
)  # fmt: skip
PPO_RUN = OutputKind(
    "a PPO run",
    lambda folder: _is_run(folder, "vla_path", "task_suite_name", "total_episodes"),
    (*_RUN_ENTRIES, "curriculum.json", "eval_final.json", "best_return", ".best_return.*", "cut", "videos",
     ".metrics.jsonl.partial"),
)  # fmt: skip
FINETUNING_RUN = OutputKind(
    "a fine-tuning run",
    lambda folder: _is_run(folder, "vla_path", "data_root_dir", "max_steps"),
    _RUN_ENTRIES,
)
DEMONSTRATIONS = OutputKind(
    "a dataset of make_demos.py",
    _is_demonstrations,
    ("dataset_info.json", "features.json", "*.tfrecord-*", "dataset_statistics_*.json", CHECKSUMS_NAME),
)  # fmt: skip
RECORDING = OutputKind(
    "an interrupted recording",
    lambda folder: True,  # a hidden folder whose name only this program uses: its entries decide
    ("recording.json", ".recording.json*", "lock", "episode_*.npz", ".episode_*"),
)
MERGED_MODEL = OutputKind(
    "a model that merge.py wrote",
    lambda folder: _has_fields(folder / "merge_metadata.json", "base", "adapter"),
    ("merge_metadata.json", "config.json", "dataset_statistics.json", "model*.safetensors",
     "model.safetensors.index.json", "*tokenizer*", "special_tokens_map.json", "added_tokens.json",
     "*processor_config.json", "generation_config.json", CHECKSUMS_NAME),
)  # fmt: skip
QUICK_START = OutputKind(
    "a quick start",
    lambda folder: _has_fields(folder / "quickstart.json", "seed", "run_dir"),
    ("quickstart.json", "logs", "data", "sft", "ppo", "merged", "eval_sft", "eval_merged", "videos", "report.html",
     "summary.json", ".*.partial-*", ".*.old-*"),
)  # fmt: skip


# ---------------------------------------------------------------------------------------------- checks


def output_problems(
    flag: str,
    folder: str | Path,
    kind: OutputKind | None = None,
    *,
    inputs: Inputs | None = None,
    overwrite: bool = False,
    instead: str = "choose another folder",
) -> list[str]:
    """Why a program cannot write its results to `folder`; empty when it can.

    A folder is written to if it can be made, or is empty, or `overwrite` is given and the folder
    may be removed (`removal_problems`).

    Args:
        flag: named in the messages.
        folder: the folder that the program makes or replaces.
        kind: what the program writes; None: it never replaces anything.
        inputs: folders that the program reads, by flag.
        overwrite: whether the user asked to replace what is there.
        instead: what the user can do where the folder is taken.
    """
    if problems := path_problems(flag, folder):
        return problems
    folder = Path(folder)
    if reasons := _protected(folder):
        return [f"{flag} {folder} {reason}: {instead}" for reason in reasons]
    if folder.name in ("", ".."):
        return [f"{flag} {folder}: give the folder by its own name, {os.path.realpath(folder)}"]
    if len(os.fsencode(folder.name)) > MAX_FOLDER_NAME_BYTES:
        return folder_name_problems(flag, folder.name)
    if problems := place_problems(flag, folder):
        return problems
    if not holds_something(folder):
        return []
    if touched := _touched_inputs(folder, inputs or {}, inside=False):
        return [f"{flag} {folder} {reason}: {instead}" for reason in touched]
    if overwrite and kind is not None:
        problems = removal_problems(flag, folder, kind, inputs)
        return problems or _write_problems(flag, folder, folder.parent)
    if kind is not None and kind.is_ours(folder):
        return [
            f"{flag} {folder} already holds {kind.name}: {instead}, or pass --overwrite to replace it"
        ]
    return [f"{flag} {folder} exists and is not empty: {instead}"]


def removal_problems(
    flag: str, folder: str | Path, kind: OutputKind, inputs: Inputs | None = None
) -> list[str]:
    """Why `--overwrite` may not remove an existing `folder`; empty when it may."""
    folder = Path(folder)
    start = f"{flag} {folder}: --overwrite does not remove a folder that"
    end = "choose another, or remove it yourself"
    if folder.is_symlink():
        return [f"{start} is a link (to {os.path.realpath(folder)}): give the folder itself"]
    reasons = [*_protected(folder), *_touched_inputs(folder, inputs or {}, inside=True)]
    if not reasons and not kind.is_ours(folder):
        reasons = [f"is not recognisably {kind.name}"]
    if not reasons and (foreign := foreign_entries(folder, kind)):
        shown = ", ".join(foreign[:3]) + (f" and {len(foreign) - 3} more" if foreign[3:] else "")
        reasons = [f"holds {shown}, which {kind.name} does not"]
    return [f"{start} {reason}: {end}" for reason in reasons]


def overlap_problems(flag: str, folder: str | Path, inputs: Inputs) -> list[str]:
    """Inputs that `folder`, which is written to, is or contains."""
    return [
        f"{flag} {folder} {reason}: choose another folder"
        for reason in _touched_inputs(Path(folder), inputs, inside=False)
    ]


def remove_output(
    flag: str, folder: str | Path, kind: OutputKind, inputs: Inputs | None = None
) -> None:
    """Remove `folder` if it is there and holds something. Raises CommandLineError if that is not allowed."""
    if not holds_something(folder):
        return
    if problems := removal_problems(flag, folder, kind, inputs):
        raise CommandLineError("\n".join(problems))
    shutil.rmtree(folder)


def place_problems(flag: str, folder: str | Path) -> list[str]:
    """Why nothing can be written in `folder`, which is made if it is missing; leaves nothing behind."""
    if problems := path_problems(flag, folder):
        return problems
    folder = Path(folder)
    for place in (folder, *folder.absolute().parents):
        try:
            is_folder = stat.S_ISDIR(place.stat().st_mode)
        except (FileNotFoundError, NotADirectoryError):
            if place.is_symlink():
                target = os.readlink(place)
                return [
                    f"{flag} {folder}: {place} is a link to {target}, which is not there: choose another"
                ]
            continue
        except OSError as error:
            return [f"{flag} {folder}: {place} cannot be read ({error.strerror}): choose another"]
        if not is_folder:
            return [f"{flag} {folder}: {place} is a file, not a folder: choose another"]
        return _write_problems(flag, folder, place)
    return [f"{flag} {folder}: there is no such place"]


def output_file_problems(flag: str, file: Path, *fields: str) -> list[str]:
    """Why a program cannot write its JSON `file`; an existing one must have these fields to be replaced."""
    if problems := path_problems(flag, file) or place_problems(flag, file.parent):
        return problems
    if os.path.lexists(file) and not _has_fields(file, *fields):
        return [f"{flag} {file} exists and is not a result of this program: choose another"]
    return []


def holds_something(folder: str | Path) -> bool:
    """Whether `folder` is a folder with anything in it."""
    if not os.path.isdir(folder):
        return False
    return any(not name.startswith(_PROBE_PREFIX) for name in os.listdir(folder))


def foreign_entries(folder: Path, kind: OutputKind) -> list[str]:
    """Names at the top of `folder` that the program does not write."""
    listed = _listed(folder / CHECKSUMS_NAME) | _listed(folder / ".final" / CHECKSUMS_NAME)
    return sorted(
        name
        for name in os.listdir(folder)
        if name not in listed
        and not name.startswith(_PROBE_PREFIX)
        and not any(fnmatch.fnmatchcase(name, pattern) for pattern in kind.entries)
    )


def _listed(checksums: Path) -> set[str]:
    """Names at the top of a folder that its checksums.json lists."""
    try:
        content = read_json_object(checksums)
    except (OSError, ValueError):
        return set()
    files = content.get("sha256")
    return {name.partition("/")[0] for name in files} if isinstance(files, dict) else set()


def _protected(folder: Path) -> list[str]:
    """What `folder` is or contains that no program may touch."""
    real = Path(os.path.realpath(folder))
    places = {
        "the working directory": Path(os.path.realpath(".")),
        "the home folder": Path(os.path.realpath(os.path.expanduser("~"))),
        "this checkout": CHECKOUT,
    }
    if real == Path(real.anchor):
        return ["is the root of the file system"]
    return [
        f"{'is' if real == place else 'contains'} {what}"
        for what, place in places.items()
        if real == place or real in place.parents
    ]


def _touched_inputs(folder: Path, inputs: Inputs, *, inside: bool) -> list[str]:
    """How `folder` overlaps with inputs; with `inside` also where it lies inside one."""
    real = Path(os.path.realpath(folder))
    found = []
    for flag, value in inputs.items():
        if value is None or not os.path.exists(value):
            continue
        source = Path(os.path.realpath(value))
        if real == source or os.path.samefile(real, source):
            found.append(f"is --{flag}")
        elif real in source.parents:
            found.append(f"contains --{flag} {value}")
        elif inside and source in real.parents:
            found.append(f"lies inside --{flag} {value}")
    return found


def _write_problems(flag: str, folder: Path, place: Path) -> list[str]:
    """Try it: permissions, read-only mounts, /proc and full disks all show themselves."""
    try:
        os.rmdir(tempfile.mkdtemp(prefix=_PROBE_PREFIX, dir=place))
    except OSError as error:
        return [f"{flag} {folder}: {place} cannot be written to ({error.strerror}): choose another"]
    return []
