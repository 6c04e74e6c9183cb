"""A hidden folder that keeps finished episodes while a recording goes on, so that an interrupted one can continue.

It holds `recording.json` (what decides the content of the episodes) and one file per episode, numbered and written
under its name only when whole. T steps of an episode.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prismatic.model_files import read_json_object, reading, write_whole
from prismatic.regular_files import check_file, file_problems
from prismatic.vla.datasets.writer import EncodedDemonstration

_ARRAYS = ("actions_T7", "states_T8", "joint_states_T7", "rewards_T")
_EPISODE_NAME = re.compile(r"episode_(\d{6,})\.npz")


@dataclass(frozen=True)
class StoredEpisode:
    """An episode and what was counted when it was recorded."""

    demonstration: EncodedDemonstration
    counts: dict[str, int]


class EpisodeStore:
    """Finished episodes by number in `folder`; any process may add one.

    Args:
        folder: made when first needed.
        identity: whatever decides what episode i is, as JSON values.
    """

    def __init__(self, folder: str | Path, identity: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.identity: dict[str, Any] = json.loads(json.dumps(identity))

    @property
    def _identity_file(self) -> Path:
        return self.folder / "recording.json"

    def problems(self) -> list[str]:
        """Why the episodes that are there cannot be continued with this identity; empty if they can, or are none."""
        try:
            found = read_json_object(self._identity_file)
        except FileNotFoundError:
            return []
        except ValueError as error:
            return [f"{error}: delete {self.folder}"]
        keys = sorted({*found, *self.identity})
        return [
            f"{self.folder} holds episodes of an interrupted recording with --{key} {found.get(key)}, "
            f"not {self.identity.get(key)}: go on with that value, or pass --overwrite to start anew"
            for key in keys
            if found.get(key) != self.identity.get(key)
        ]

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Make the folder, claim it for this process, and remove it afterwards if it holds no episode.

        Raises BlockingIOError when another process has it open, ValueError if the lock is no regular file.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(self.folder / "lock"):
            check_file(self.folder / "lock")
        with (self.folder / "lock").open("w") as lock:
            try:
                fcntl.flock(
                    lock, fcntl.LOCK_EX | fcntl.LOCK_NB
                )  # ends with the process, however that ends
            except BlockingIOError as error:
                raise BlockingIOError(
                    f"another process is recording into {self.folder}: wait for it"
                ) from error
            write_whole(self._identity_file, json.dumps(self.identity, indent=2))
            try:
                yield
            finally:
                if self.folder.exists() and not self.finished():
                    self.remove()

    def remove(self) -> None:
        """Delete the folder and all its episodes."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def finished(self) -> set[int]:
        """Numbers of the episodes that are there, whole."""
        matches = [
            (path, _EPISODE_NAME.fullmatch(path.name)) for path in self.folder.glob("episode_*.npz")
        ]
        return {
            int(match[1])
            for path, match in matches
            if match and not file_problems([path]) and zipfile.is_zipfile(path)
        }

    def _path(self, index: int) -> Path:
        return self.folder / f"episode_{index:06d}.npz"

    def add(self, index: int, demo: EncodedDemonstration, counts: Mapping[str, int]) -> None:
        """Keep episode `index`; an existing one is replaced."""
        texts = {
            "instruction": demo.instruction,
            "file_path": demo.file_path,
            "terminal": demo.terminal,
        }
        arrays = {name: getattr(demo, name) for name in _ARRAYS}
        arrays |= _packed("images", demo.images)
        if demo.wrist_images is not None:
            arrays |= _packed("wrist_images", demo.wrist_images)
        partial = self.folder / f".episode_{index:06d}.{os.getpid()}"
        with partial.open("wb") as file:
            np.savez(file, meta=np.array(json.dumps(texts | {"counts": dict(counts)})), **arrays)
        partial.replace(self._path(index))

    def load(self, index: int) -> StoredEpisode:
        """Read episode `index`. Raises FileNotFoundError if it is not there, ValueError naming it if it is damaged."""
        path = self._path(index)
        check_file(path)
        with reading(path, "an episode"), np.load(path, allow_pickle=False) as arrays:
            meta = json.loads(str(arrays["meta"]))
            demo = EncodedDemonstration(
                _unpacked("images", arrays),
                instruction=meta["instruction"],
                file_path=meta["file_path"],
                terminal=meta["terminal"],
                wrist_images=_unpacked("wrist_images", arrays)
                if "wrist_images" in arrays
                else None,
                **{name: arrays[name] for name in _ARRAYS},
            )
        return StoredEpisode(demo, meta["counts"])


def _packed(name: str, frames: Sequence[bytes]) -> dict[str, np.ndarray]:
    """Frames of different lengths as one array of bytes and one of lengths."""
    lengths = np.array([len(frame) for frame in frames], dtype=np.int64)
    return {name: np.frombuffer(b"".join(frames), np.uint8), f"{name}_lengths": lengths}


def _unpacked(name: str, arrays: Mapping[str, np.ndarray]) -> list[bytes]:
    data, ends = arrays[name].tobytes(), np.cumsum(arrays[f"{name}_lengths"]).tolist()
    return [data[start:end] for start, end in zip([0, *ends], ends, strict=False)]
