"""Files of model folders as untrusted input: JSON, the safetensors index, checksums.

A folder may come from anywhere. Nothing here runs code, reads outside of the folder that was named, or trusts a size:
whatever is wrong ends in a ValueError that names the file (a file that cannot be opened: an OSError).
"""

import contextlib
import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from prismatic.regular_files import (
    MAX_TEXT_BYTES,
    WEIGHTS_SUFFIX,
    check_file,
    file_problems,
    open_file,
    read_file,
)

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
CHECKSUMS_NAME = "checksums.json"
MAX_JSON_BYTES = MAX_TEXT_BYTES
# The library's own limit. openvla-7b's largest header has 60 KB.
MAX_HEADER_BYTES = 100_000_000
# Threads that hash files: sha256 does 1.5 GB/s a core and releases the GIL.
MAX_HASH_THREADS = 8
_READ_BYTES = 1 << 20
# A file system reads a gigabyte in about a second: below, a progress bar is gone before it is seen.
SHOWN_BYTES = 10**9
_SHA256 = re.compile(r"[0-9a-f]{64}")


@contextlib.contextmanager
def reading(path: str | Path, what: str) -> Iterator[None]:
    """Name `path` in whatever a library raises while it parses `what` there.

    Raises ValueError. The one broad `except` of this project: parsers of transformers, tokenizers, timm, peft and tfds
    raise bare Exception, AssertionError, KeyError and more on malformed input, and a caller must be able to tell a bad
    file from a bug. The original error is the cause.
    """
    try:
        yield
    except (OSError, MemoryError):
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise ValueError(
            f"{path}: {what} cannot be read ({type(error).__name__}: {reason})"
        ) from error


def read_json_object(file: str | Path) -> dict[str, Any]:
    """The JSON object in `file`.

    Raises what `read_json` raises, and ValueError if it is another value.
    """
    value = read_json(file)
    if not isinstance(value, dict):
        raise ValueError(f"{file} is not a JSON object but a {type(value).__name__}")
    return value


def read_json(file: str | Path) -> Any:
    """The value in a JSON file.

    Raises OSError if the file cannot be opened, ValueError if it is no regular file, is too large or not JSON, or if an
    object in it has a key twice: parsers differ in which of the two they take.
    """
    content = read_file(file, MAX_JSON_BYTES)
    try:
        return json.loads(content.decode(), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{file} is not valid JSON ({error}): the folder is damaged or half-written"
        ) from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {twice[:80]!r} appears twice in one object, remove one of them")
    return found


def is_plain_name(name: Any) -> bool:
    """Whether `name` is the name of a file and nothing more: no folder, no way out of one."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0")


def is_number(value: Any) -> bool:
    """A finite int or float (True and False are none), within what a float can hold."""
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) < 1 << 1023  # JSON has longer ones, for which math.isfinite raises
    return isinstance(value, float) and math.isfinite(value)


def is_int(value: Any, low: int, high: int) -> bool:
    """An int (no bool) in [low, high]."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def is_list_of(value: Any, holds: Callable[[Any], bool], length: int | None = None) -> bool:
    """A list, of `length` if given, all of whose items hold."""
    return (
        isinstance(value, list)
        and (length is None or len(value) == length)
        and all(map(holds, value))
    )


def read_index(file: str | Path) -> dict[str, str]:
    """Tensor name -> file name of a safetensors index.

    Raises ValueError if the index is not the JSON it should be, or names anything but safetensors files beside it.
    """
    fields = read_json_object(file)
    weight_map = fields.get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not isinstance(fields.get("metadata", {}), dict)
    ):
        raise ValueError(
            f"{file} is not a safetensors index: weight_map must map tensor names to file names"
        )
    for name in weight_map.values():
        if not is_plain_name(name) or not name.endswith(".safetensors"):
            raise ValueError(
                f"{file} names {name!r}: an index may only name .safetensors files in its own folder"
            )
    return weight_map


def weight_files(model_dir: str | Path) -> list[Path]:
    """The safetensors files of a model folder, in name order (from the index where there is one).

    Raises ValueError if the index is not what it should be, there is a single file too, or one of them is no regular
    file. Files that the index names and that are missing are among the result.
    """
    files = _named_weight_files(Path(model_dir))
    for file in files:
        if os.path.lexists(file):
            check_file(file)
    return files


def _named_weight_files(folder: Path) -> list[Path]:
    single, index = folder / WEIGHTS_NAME, folder / INDEX_NAME
    if single.exists() and index.exists():
        raise ValueError(
            f"{folder} has both {WEIGHTS_NAME} and {INDEX_NAME}: remove the one that is not the model"
        )
    if index.exists():
        return [folder / name for name in sorted(set(read_index(index).values()))]
    return [single] if single.exists() else []


def weight_bytes(model_dir: str | Path) -> int:
    """Size of a model folder's safetensors files."""
    return sum(file.stat().st_size for file in weight_files(model_dir))


def read_headers(model_dir: str | Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype (safetensors' name) and shape of every tensor of a model folder.

    Raises ValueError naming the file if a file is missing, cannot be read, holds no tensors, or differs from the index.
    """
    files = weight_files(model_dir)
    headers: dict[str, tuple[str, tuple[int, ...]]] = {}
    where: dict[str, str] = {}
    for file in files:
        found = read_header(file)
        if twice := sorted(found.keys() & headers.keys()):
            raise ValueError(f"{file} holds {twice[0]}, which {where[twice[0]]} holds too")
        headers |= found
        where |= dict.fromkeys(found, file.name)
    index = Path(model_dir) / INDEX_NAME
    if index.exists() and (weight_map := read_index(index)) != where:
        name = sorted(weight_map.items() ^ where.items())[0][0]
        raise ValueError(
            f"{index} says {name} is in {weight_map.get(name)}, it is in {where.get(name)}"
        )
    others = {path.name for path in Path(model_dir).glob(f"*{WEIGHTS_SUFFIX}")}
    if files and (others := others - {file.name for file in files}):
        # vLLM reads every file of this kind, and prefers consolidated*.safetensors to all others.
        raise ValueError(
            f"{Path(model_dir) / min(others)} is not part of the model "
            f"({index.name if index.exists() else files[0].name}): remove it, an engine would load it too"
        )
    return headers


def read_header(file: str | Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of every tensor of one safetensors file; see `read_headers`.

    The library compares the header's offsets with one another and with the file's size. It takes the last of two
    entries of the same name, so these are looked for here.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(file).exists():
        raise ValueError(f"{file} is missing: the folder is half-written")
    _check_header_keys(file)
    try:
        with safe_open(file, "pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            headers = {
                name: (str(s.get_dtype()), tuple(s.get_shape())) for name, s in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} cannot be read ({error}): the folder is damaged or half-written"
        ) from error
    if not headers:
        raise ValueError(f"{file} holds no tensors")
    return headers


def _check_header_keys(file: str | Path) -> None:
    """Raise ValueError if a safetensors file's header is too long, not JSON, or has a key twice."""
    with open_file(file) as data:
        length = int.from_bytes(data.read(8), "little")
        size = os.fstat(data.fileno()).st_size
        if length > min(size - 8, MAX_HEADER_BYTES):
            raise ValueError(
                f"{file} cannot be read (a header of {length} bytes, the file has {size} and headers at most "
                f"{MAX_HEADER_BYTES}): the folder is damaged or half-written"
            )
        header = data.read(length)
    try:
        json.loads(header.decode(), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{file} cannot be read (its header: {error}): the folder is damaged or half-written"
        ) from error


def write_whole(file: str | Path, content: str | bytes) -> None:
    """Write a small file so that a reader never sees half of it.

    Raises OSError naming the file if the disk is full or cannot be written; an earlier file is unchanged then.
    """
    target = Path(file)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(partial, target)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        error.filename = str(target)
        raise


def leaves_folder(file: Path) -> bool:
    """Whether `file` is a link out of its folder; one into the blobs of a Hugging Face cache does not count."""
    folder = file.parent.resolve()
    allowed = (folder, folder.parent.parent / "blobs")
    target = file.resolve()
    return not any(place in target.parents for place in allowed)


def write_checksums(folder: str | Path) -> None:
    """Write checksums.json: the SHA-256 of every file in `folder` and below, by relative path."""
    root = Path(folder)
    files = sorted(p for p in root.rglob("*") if p.is_file() and p.name != CHECKSUMS_NAME)
    hashes = dict(
        zip((p.relative_to(root).as_posix() for p in files), _sha256_all(files), strict=True)
    )
    (root / CHECKSUMS_NAME).write_text(json.dumps({"sha256": hashes}, indent=1) + "\n")


def is_always_listed(name: str) -> bool:
    """Whether a file of this name is part of every model or adapter that is written with checksums."""
    return name.endswith(".safetensors") or name in ("config.json", "adapter_config.json")


def is_never_read(name: str) -> bool:
    """Whether a file of a model's folder is code or text that nothing here reads. Downloads from the hub have none."""
    return "/" not in name and Path(name).suffix in ("", ".md", ".py", ".txt")


def checksum_problems(
    folder: str | Path, wanted: Callable[[str], bool] = lambda name: True
) -> list[str]:
    """Files that are not those that checksums.json lists; empty without it (a folder from elsewhere).

    `wanted` picks by relative path. Files that are not listed were added later and are not looked at, but weights and
    configurations must be listed: if they are not, checksums.json is damaged.
    """
    manifest = Path(folder) / CHECKSUMS_NAME
    if not os.path.lexists(manifest):
        return []
    try:
        hashes = read_json_object(manifest).get("sha256")
    except (ValueError, OSError) as error:
        return [str(error)]
    if not isinstance(hashes, dict) or not all(
        all(map(is_plain_name, name.split("/")))
        and isinstance(value, str)
        and _SHA256.fullmatch(value)
        for name, value in hashes.items()
    ):
        return [
            f"{manifest} is damaged: it must map files in its folder to SHA-256 sums under the key sha256"
        ]
    present_names = (path.name for path in Path(folder).iterdir() if path.is_file())
    unlisted = sorted(
        name
        for name in present_names
        if is_always_listed(name) and wanted(name) and name not in hashes
    )
    if unlisted:
        return [
            f"{manifest} does not list {name}: it is damaged, or the file is another model's"
            for name in unlisted
        ]
    names = sorted(filter(wanted, hashes))
    missing = [name for name in names if not os.path.lexists(Path(folder) / name)]
    problems = [
        f"{Path(folder) / name} is missing, {CHECKSUMS_NAME} lists it"
        for name in missing
        if not is_never_read(name)
    ]
    present = [name for name in names if name not in missing]
    if unreadable := file_problems([Path(folder) / name for name in present]):
        return problems + unreadable
    found = _sha256_all([Path(folder) / name for name in present])
    return problems + [
        f"{Path(folder) / name} is not what was written (its SHA-256 differs from {CHECKSUMS_NAME}): the file is "
        f"damaged; if it was edited on purpose, delete {manifest}"
        for name, actual in zip(present, found, strict=True)
        if actual != hashes[name]
    ]


def _sha256_all(files: Iterable[Path]) -> list[str]:
    """SHA-256 of each file in hexadecimal, several at a time."""
    with ThreadPoolExecutor(min(MAX_HASH_THREADS, os.cpu_count() or 1)) as pool:
        return list(pool.map(_sha256, files))


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open_file(file) as data:
        while block := data.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def raise_file_problems(problems: Iterable[str]) -> None:
    """Raise one ValueError with all `problems`, one a line, if there are any."""
    if text := "\n".join(problems):
        raise ValueError(text)


def field_problems(
    fields: Mapping[str, Any], rules: Mapping[str, tuple[Callable[[Any], bool], str]]
) -> list[str]:
    """The fields that are there and break their rule: name -> (holds, description)."""
    return [
        f"{name} is {str(fields[name])[:80]!r}: it must be {description}"
        for name, (holds, description) in rules.items()
        if name in fields and not holds(fields[name])
    ]
