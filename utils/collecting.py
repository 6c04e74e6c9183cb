"""A run's results as a few files of bounded size, for machines that give back no more than that."""

import shutil
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from utils.logging_utils import get_logger

logger = get_logger(__name__)

MAX_FILES = 8
MAX_BYTES = 15 << 20  # of one file; what is larger becomes parts, which `cat` puts together again


def split_file(file: Path, max_bytes: int = MAX_BYTES) -> list[Path]:
    """Replace a file that is larger than `max_bytes` by parts `<name>.part00`, ...; returns what there is now."""
    if file.stat().st_size <= max_bytes:
        return [file]
    parts: list[Path] = []
    with file.open("rb") as whole:
        while piece := whole.read(max_bytes):
            parts.append(file.with_name(f"{file.name}.part{len(parts):02d}"))
            parts[-1].write_bytes(piece)
    file.unlink()
    return parts


def write_archive(archive: Path, root: Path, files: Iterable[Path]) -> list[Path]:
    """Write files as a tar (gzip for .gz), named relative to `root`, in parts if it is large; returns the paths.

    A file outside of `root` gets its parent folder's name and its own.
    """
    with tarfile.open(archive, "w:gz" if archive.suffix == ".gz" else "w") as tar:
        for file in sorted(set(files)):
            inside = file.is_relative_to(root)
            tar.add(
                file,
                arcname=str(
                    file.relative_to(root) if inside else Path(file.parent.name) / file.name
                ),
            )
    return split_file(archive)


def collect(
    target: Path, plain: Sequence[Path], archives: dict[str, tuple[Path, Iterable[Path]]]
) -> list[Path]:
    """Fill the folder `target`: copies of the `plain` files that exist, and archives {name: (root, files)}.

    Earlier files of the same names are replaced. Warns when it holds more than MAX_FILES files.
    """
    target.mkdir(parents=True, exist_ok=True)
    for name in [*(file.name for file in plain), *archives]:
        for old in [*target.glob(name), *target.glob(f"{name}.part*")]:
            old.unlink()
    written: list[Path] = []
    for file in plain:
        if file.exists():
            shutil.copyfile(file, target / file.name)
            written += split_file(target / file.name)
    for name, (root, files) in archives.items():
        written += write_archive(target / name, root, files)
    count = len(list(target.iterdir()))
    if count > MAX_FILES:
        logger.warning("%s holds %d files, more than %d", target, count, MAX_FILES)
    return written
