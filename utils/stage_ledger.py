"""What has been done of a run that is made in pieces: a marker for each finished stage, and the time each piece took.

`<stage>.json` is written last, when a stage is done: its command line, the settings that decide its result, and the
seconds it took. `<stage>.pieces.json` exists as soon as it was begun: its settings, and for each piece when it began,
how long it took and how it ended, kept up to date while it runs so that a machine that is taken away loses seconds.
"""

import contextlib
import fcntl
import json
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prismatic.model_files import read_json_object, write_whole
from utils.logging_utils import get_logger
from utils.pipeline import SHOWN, Stage, StageError, TimeLimit, run_command

logger = get_logger(__name__)

HEARTBEAT_S = 5.0


class StageBusyError(RuntimeError):
    """Another invocation is at this stage."""


def write_json(file: Path, content: Any) -> None:
    """Write a JSON file whole: it appears under its name only when it is complete."""
    write_whole(file, json.dumps(content, indent=2) + "\n")


class Piece:
    """One piece of a stage under way; its record is written every few seconds.

    Record: `started` (seconds since 1970), `seconds`, `outcome` (running, done, stopped, failed), and from the first
    training step of its log on `first_step` (its number) and `first_step_s` (seconds after the start).
    """

    def __init__(self, file: Path, content: dict[str, Any]) -> None:
        self._file, self._content = file, content
        self.record: dict[str, Any] = {"started": time.time(), "seconds": 0.0, "outcome": "running"}
        content["pieces"].append(self.record)
        self._start = self._written = time.monotonic()
        self._write()

    def beat(self, step: int | None = None) -> None:
        """Note that it still runs; `step`: the training step that its log has just reported."""
        self.record["seconds"] = time.monotonic() - self._start
        if step is not None and "first_step" not in self.record:
            self.record |= {"first_step": step, "first_step_s": self.record["seconds"]}
            self._write()
        elif time.monotonic() - self._written > HEARTBEAT_S:
            self._write()

    def end(self, outcome: str) -> None:
        """Note how it ended."""
        self.record |= {"seconds": time.monotonic() - self._start, "outcome": outcome}
        self._write()

    def _write(self) -> None:
        self._written = time.monotonic()
        write_json(self._file, self._content)


class Ledger:
    """The folder of the markers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def marker(self, name: str) -> dict[str, Any] | None:
        """What the marker of a finished stage holds; None if it is not finished."""
        return self._read(self.folder / f"{name}.json")

    def is_done(self, stage: Stage) -> bool:
        """Whether it is finished."""
        return self.marker(stage.name) is not None

    def pieces(self, name: str) -> list[dict[str, Any]]:
        """Records of its pieces so far, see `Piece`."""
        return (self._read(self.folder / f"{name}.pieces.json") or {"pieces": []})["pieces"]

    def seconds(self, name: str) -> float:
        """What all of its pieces took together."""
        return sum(piece["seconds"] for piece in self.pieces(name))

    def is_kept(self, stage: Stage) -> bool:
        """Whether something of an unfinished stage is kept, so that it goes on: it can, and has worked before."""
        worked = [
            p for p in self.pieces(stage.name) if p["outcome"] != "failed" or "first_step" in p
        ]
        return stage.stop_signal is not None and bool(worked)

    def problems(self, stage: Stage) -> list[str]:
        """A problem for each setting that a finished or begun stage had otherwise."""
        known = self.marker(stage.name)
        how = "is done"
        if known is None and self.is_kept(stage):
            known, how = self._read(self.folder / f"{stage.name}.pieces.json"), "has begun"
        if known is None:
            return []
        newer = [
            n
            for n in stage.after
            if (m := self.marker(n)) and m["finished"] > known.get("finished", m["finished"])
        ]
        if newer:
            return [f"stage {stage.name} {how}, but {', '.join(newer)} was made anew since: remove its results and "
                    f"{self.folder / stage.name}.*, or use another --run_dir"]  # fmt: skip
        before, now = known["settings"], dict(stage.settings)
        return [
            f"stage {stage.name} {how} with --{flag} {before.get(flag, '(absent)')}, now {now.get(flag, '(absent)')}: "
            f"give it as it was, or another --run_dir, or remove the results and {self.folder / stage.name}.*"
            for flag in sorted(before.keys() | now.keys())
            if before.get(flag) != now.get(flag)
        ]

    @contextlib.contextmanager
    def piece(self, stage: Stage) -> Iterator[Piece]:
        """Record a piece of a stage that the block runs; the block ends the record, an exception means it failed."""
        file = self.folder / f"{stage.name}.pieces.json"
        content = self._read(file) if self.is_kept(stage) else None
        earlier = content["pieces"] if content else []
        piece = Piece(file, {"settings": dict(stage.settings), "pieces": earlier})
        try:
            yield piece
        except Exception:
            piece.end("failed")
            raise
        except BaseException:
            piece.end("stopped")
            raise

    def finish(self, stage: Stage) -> None:
        """Write the marker."""
        content: dict[str, Any] = {
            "stage": stage.name,
            "title": stage.title,
            "command": list(stage.command),
        }
        content |= {"settings": dict(stage.settings), "seconds": round(self.seconds(stage.name), 2)}
        content |= {"num_pieces": len(self.pieces(stage.name)), "finished": time.time()}
        write_json(self.folder / f"{stage.name}.json", content)

    @contextlib.contextmanager
    def lock(self, name: str, *, wait: bool = False) -> Iterator[None]:
        """Keep other invocations out of a stage. Raises StageBusyError if one is in it, unless `wait`."""
        with (self.folder / f"{name}.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise StageBusyError(f"stage {name} is being run by another invocation") from None
            yield

    def is_busy(self, name: str) -> bool:
        """Whether another invocation is at a stage."""
        try:
            with self.lock(name):
                return False
        except StageBusyError:
            return True

    @staticmethod
    def _read(file: Path) -> dict[str, Any] | None:
        return read_json_object(file) if file.exists() else None


class OutOfTimeError(RuntimeError):
    """The time limit leaves too little for the next stage, or ended one that goes on next time."""


def run_stage(
    stage: Stage, ledger: Ledger, log_dir: Path, limit: TimeLimit, reserve_s: float
) -> None:
    """Run a stage that is not done, or go on with it, and write its marker.

    Args:
        stage: what to run.
        ledger: where it is recorded.
        log_dir: gets `<stage>.log`, to which each piece adds.
        limit: of this invocation.
        reserve_s: how long before the limit a stage that can go on later is asked to stop.

    Raises:
        OutOfTimeError: not begun for want of time, or stopped.
        StageError: it failed.
        StageBusyError: another invocation is at it.
    """
    with ledger.lock(stage.name):
        if ledger.is_done(stage):  # another invocation was quicker
            return
        if (
            ledger.is_kept(stage) and stage.is_complete()
        ):  # the last piece was cut off before its marker
            ledger.finish(stage)
            return
        needs_s = stage.needs_s + (reserve_s if stage.stop_signal is not None else 0.0)
        if limit.left_s < needs_s:
            left = f"{limit.left_s:.0f} s are left of {limit.limit_s:.0f}"
            raise OutOfTimeError(f"{stage.title} is not begun: {left}, it needs {needs_s:.0f}")
        if stage.scrap is not None and not ledger.is_kept(stage):
            shutil.rmtree(stage.scrap, ignore_errors=True)
        with ledger.piece(stage) as piece:
            done = _run_piece(stage, piece, log_dir, limit, reserve_s)
            piece.end("done" if done else "stopped")
        if not done:
            raise OutOfTimeError(f"{stage.title} was stopped and goes on next time")
        ledger.finish(stage)


def _run_piece(
    stage: Stage, piece: Piece, log_dir: Path, limit: TimeLimit, reserve_s: float
) -> bool:
    """Whether the stage is done; False: it was stopped."""

    def on_line(line: str) -> None:
        match = SHOWN.search(line)
        piece.beat(int(match[1]) if match else None)
        if match:
            logger.info("      %s", match[0])

    can_stop = stage.stop_signal is not None and limit.limit_s is not None
    ended = run_command(
        stage.command,
        log_dir / f"{stage.name}.log",
        on_line,
        environment=stage.environment,
        stop_after_s=limit.left_s - reserve_s if can_stop else None,
        stop_signal=stage.stop_signal or signal.SIGTERM,
    )
    if stage.is_complete():
        return True
    if ended and limit.left_s > reserve_s:
        raise StageError(
            f"{' '.join(stage.command)}\nended with code 0, but its result is not there: see its log"
        )
    return False
