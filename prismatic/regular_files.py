"""Opening files of untrusted folders: regular files of bounded size, and nothing else.

A name in such a folder may be a link to a device that never ends, a pipe that nobody writes to, a socket, a folder, or
a sparse file of an exabyte. Reading one hangs, or fills the memory. Files are therefore opened here; where a library
opens them itself, by path, `check_file` or `folder_problems` comes first.
"""

import errno
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

# JSON, tokenizers, templates. The largest of openvla-7b, tokenizer.json, has 2 MB.
MAX_TEXT_BYTES = 64 << 20
# Weights, TFRecord shards, tensors of a checkpoint: 70 billion parameters in float32.
MAX_FILE_BYTES = 256 << 30
WEIGHTS_SUFFIX = ".safetensors"
# What transformers, tokenizers, peft, vLLM or this project may read in a model or adapter folder.
_READ_SUFFIXES = (".json", WEIGHTS_SUFFIX, ".model", ".jinja", ".tiktoken")
_READ_NAMES = ("merges.txt", "vocab.txt")
_TEMPLATES = "additional_chat_templates"
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe (FIFO)"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
    (stat.S_ISSOCK, "a socket"),
)


def check_file(file: str | Path, max_bytes: int = MAX_FILE_BYTES) -> os.stat_result:
    """The status of `file`, which is a regular file of at most `max_bytes`; links are followed.

    Raises FileNotFoundError if it is not there, another OSError if it cannot be reached, ValueError for anything else.
    """
    try:
        status = os.stat(file)
    except FileNotFoundError as error:
        if os.path.islink(file):
            reason = f"it is a link to {os.readlink(file)}, which does not exist"
            raise FileNotFoundError(errno.ENOENT, reason, str(file)) from error
        raise
    _check_status(file, status, max_bytes)
    return status


def _check_status(file: str | Path, status: os.stat_result, max_bytes: int) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = next((name for holds, name in _KINDS if holds(status.st_mode)), "no file")
        link = f", reached through a link to {os.readlink(file)}" if os.path.islink(file) else ""
        raise ValueError(
            f"{file} is {kind}{link}: only regular files are read. Put the file itself there"
        )
    if status.st_size > max_bytes:
        raise ValueError(
            f"{file} has {status.st_size} bytes, the limit for such a file is {max_bytes}: "
            "the file is damaged, or it is something else"
        )


def open_file(file: str | Path, max_bytes: int = MAX_FILE_BYTES) -> BinaryIO:
    """Open a file for reading bytes, after `check_file`; raises what it raises.

    The descriptor is checked again, because the name may have come to mean another file, and opening never blocks.
    """
    check_file(file, max_bytes)  # not only afterwards: to open a device can be an order to it
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    try:
        _check_status(file, os.fstat(descriptor), max_bytes)
    except ValueError:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def read_file(file: str | Path, max_bytes: int = MAX_TEXT_BYTES) -> bytes:
    """The content of a small file; raises what `open_file` raises.

    No more is read than the file's size says: files of /proc say 0 and can go on forever.
    """
    with open_file(file, max_bytes) as data:
        return data.read(os.fstat(data.fileno()).st_size)


def file_problems(files: Iterable[str | Path], max_bytes: int = MAX_FILE_BYTES) -> list[str]:
    """Why some of `files` must not or cannot be opened; a file that is not there is one of them."""
    problems = []
    for file in files:
        try:
            check_file(file, max_bytes)
            if not os.access(file, os.R_OK, effective_ids=True):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))
        except (OSError, ValueError) as error:
            problems.append(str(error))
    return problems


def folder_problems(folder: str | Path) -> list[str]:
    """Entries of a model or adapter folder that a library may open by name and must not; empty if there are none."""
    try:
        names = sorted(os.listdir(folder))
        templates = Path(folder, _TEMPLATES)
        if _TEMPLATES in names and templates.is_dir():
            names += sorted(f"{_TEMPLATES}/{name}" for name in os.listdir(templates))
    except OSError as error:
        return [str(error)]
    read = [name for name in names if name.endswith(_READ_SUFFIXES) or name in _READ_NAMES]
    weights = [name for name in read if name.endswith(WEIGHTS_SUFFIX)]
    texts = [name for name in read if not name.endswith(WEIGHTS_SUFFIX)]
    return file_problems([Path(folder, name) for name in weights]) + file_problems(
        [Path(folder, name) for name in texts], MAX_TEXT_BYTES
    )
