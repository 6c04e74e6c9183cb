"""Calls to many Ray actors at once: what failed, died or hung is named; who may die is made again. Knows no PPO."""

import sys
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from utils.logging_utils import get_logger

logger = get_logger("driver")

POLL_S = 0.2
# An actor that computes answers a question about it within this.
ANSWER_TIMEOUT_S = 5.0
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class ActorFailure:
    """In place of a call's result: its actor died, or did not answer in time."""

    reason: str


class HangError(RuntimeError):
    """A call was not done within its time-out."""


def wait_all(
    refs: Sequence[Any],
    what: str,
    *,
    poll: Callable[[], None] | None = None,
    timeout_s: float | None = None,
    explain: Callable[[int], str] | None = None,
    replaceable: Collection[int] = (),
) -> list[Any]:
    """`ray.get` of all calls that fails as soon as any of them does, and says what was being done.

    Args:
        refs: the calls.
        what: for messages: "collecting the rollout of training step 3".
        poll: called a few times a second meanwhile; what it raises ends the waiting.
        timeout_s: how long all of it may take; None: for ever.
        explain: says of call i of `refs`, which is late, whose it is and where it hangs.
        replaceable: calls of actors that may die or hang: their result is an ActorFailure then. Once one is, the
            others' errors follow from it, perhaps, and are an ActorFailure in their results, too.

    Raises:
        RuntimeError: from the first failure, with the actor's traceback in its cause.
        HangError: the time-out has passed; names what every late call was doing.
    """
    pending = {ref: index for index, ref in enumerate(refs)}
    results: list[Any] = [None] * len(refs)
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    has_failed = False
    while pending:
        done, _ = ray.wait(
            list(pending), num_returns=1, timeout=POLL_S if poll or deadline else None
        )
        if poll:
            poll()
        for ref in done:
            index = pending.pop(ref)
            try:
                results[index] = ray.get(ref)
            except RayError as error:
                dead = index in replaceable and isinstance(error, RayActorError)
                if not dead and not has_failed:
                    raise RuntimeError(f"failed while {what}: {error}") from error
                has_failed = True
                results[index] = ActorFailure(str(error))
        if deadline is not None and time.monotonic() > deadline and pending:
            late = sorted(pending.values())
            where = "; ".join(explain(index) if explain else f"call {index}" for index in late)
            message = f"{what} is not done after {timeout_s:.0f} s (--hang_timeout_s): {where}"
            if not all(index in replaceable for index in late):
                raise HangError(message)
            for index in late:
                results[index] = ActorFailure(message)
            return results
    return results


class RevivableActor:
    """An actor whose state is kept here after every change, so that a new one can go on where it died.

    Args:
        start: makes the actor; it must have `state_dict` and `load_state_dict`.
    """

    def __init__(self, name: str, start: Callable[[], Any]) -> None:
        self.name, self._start, self._actor = name, start, start()
        self.state = ray.get(self._actor.state_dict.remote())

    def ask(self, method: str, *args: Any) -> Any:
        """Call a method that changes nothing."""
        while True:
            try:
                return ray.get(getattr(self._actor, method).remote(*args))
            except RayActorError as error:
                logger.warning(
                    f"the {self.name} died ({first_line(error)}): a new one goes on from its last state"
                )
                self._actor = self._start()
                ray.get(self._actor.load_state_dict.remote(self.state))

    def change(self, method: str, *args: Any) -> Any:
        """Call a method that changes the actor, and keep its new state."""
        while True:
            result = self.ask(method, *args)
            try:
                self.state = ray.get(self._actor.state_dict.remote())
            except RayActorError:
                continue  # what it did is gone with it: `ask` revives it and it is done again
            return result


class ActorPool:
    """Actors of one kind, each of which is replaced when it dies or hangs.

    Args:
        name: of one of them.
        start: makes the one with an index.
        restore: brings new ones, by index, to where the lost ones were; their constructors have begun.
        ping: name of a method of theirs that changes nothing.
    """

    def __init__(
        self,
        name: str,
        start: Callable[[int], Any],
        size: int,
        restore: Callable[[list[int]], None],
        ping: str,
    ) -> None:
        self.name, self._start, self._restore, self._ping = name, start, restore, ping
        self.actors = [start(index) for index in range(size)]
        self.num_replaced = 0
        self._asked: dict[int, Any] = {}
        self._unrestored: list[int] = []

    def on_each(
        self, call: Callable[[int], Any], what: str, calls: Sequence[Any] = (), **limits: Any
    ) -> list[Any]:
        """Results of `call(i)` for every actor i; one that fails is replaced and called again.

        `calls` are those of the first round if they were made before; `limits` are options of `wait_all`.
        """
        everyone = range(len(self.actors))
        results = self._wait(calls or [call(i) for i in everyone], everyone, what, limits)
        if calls:
            results = self._without_the_dead(results, what, limits)
        while failed := {
            i: result for i, result in enumerate(results) if isinstance(result, ActorFailure)
        }:
            self.replace(failed, what)
            again = self._wait([call(i) for i in failed], list(failed), what, limits)
            for index, result in zip(failed, again, strict=True):
                results[index] = result
        return results

    def _without_the_dead(self, results: list[Any], what: str, limits: dict[str, Any]) -> list[Any]:
        """Failures in place of what came from actors that have died since: it may refer to what died with them."""
        asked = [
            i
            for i, r in enumerate(results)
            if i not in self._unrestored and not isinstance(r, ActorFailure)
        ]
        answers = self._wait([self._call_ping(i) for i in asked], asked, what, limits)
        failures = {
            i: answer
            for i, answer in zip(asked, answers, strict=True)
            if isinstance(answer, ActorFailure)
        }
        failures |= dict.fromkeys(self._unrestored, ActorFailure("died meanwhile"))
        return [failures.get(i, result) for i, result in enumerate(results)]

    def _call_ping(self, index: int) -> Any:
        return getattr(self.actors[index], self._ping).remote()

    def _wait(
        self, calls: Sequence[Any], indices: Sequence[int], what: str, limits: dict[str, Any]
    ) -> list[Any]:
        everyone = range(len(calls))
        return wait_all(
            calls,
            what,
            explain=lambda i: f"{self.name} {indices[i]}",
            replaceable=everyone,
            **limits,
        )

    def replace(self, failed: dict[int, ActorFailure], what: str) -> None:
        """New actors for those that failed."""
        for index, failure in failed.items():
            self._start_anew(index, failure.reason, what)
        self.restore_started()

    def start_for_dead(self, what: str) -> None:
        """Start new actors for those that have died, if any; they are of use after `restore_started`.

        To be called now and then while something else is done, `what`; does not wait for the actors that live.
        """
        for index in range(len(self.actors)):
            if index in self._unrestored:
                continue
            if index not in self._asked:
                self._asked[index] = self._call_ping(index)
            if not ray.wait([self._asked[index]], timeout=0)[0]:
                continue
            call = self._asked.pop(index)
            try:
                ray.get(call)
            except RayActorError as error:
                self._start_anew(index, str(error), what)

    def restore_started(self) -> bool:
        """Bring those that were started to where the lost ones were; whether there were any."""
        started, self._unrestored = self._unrestored, []
        if started:
            self._restore(started)
        return bool(started)

    def _start_anew(self, index: int, reason: str, what: str) -> None:
        if index in self._unrestored:
            return  # what failed is the lost one's call
        logger.warning(
            f"{self.name} {index} is replaced; it failed while {what}: {first_line(reason)}"
        )
        ray.kill(self.actors[index])
        self._asked.pop(index, None)
        self.actors[index] = self._start(index)
        self._unrestored.append(index)
        self.num_replaced += 1


def first_line(error: object) -> str:
    """Of an error's message, which may be as long as a remote traceback."""
    return str(error).strip().splitlines()[0]


def where_others_are() -> str:
    """Where the threads of this process are that run our code, innermost line of ours and what it called.

    For a method in a concurrency group of its own, which answers while another computes or hangs.
    """
    places = []
    for thread, frame in sys._current_frames().items():
        if thread == threading.get_ident():
            continue
        called, ours = frame.f_code.co_name, frame
        while ours is not None and not _is_ours(ours.f_code.co_filename):
            # The outermost function below our code is the operation: all_reduce, wait, backward.
            called, ours = ours.f_code.co_name, ours.f_back  # type: ignore[assignment]
        if ours is not None:
            file = Path(ours.f_code.co_filename).relative_to(ROOT)
            places.append(f"in {called} of {file}:{ours.f_lineno} ({ours.f_code.co_name})")
    return ", ".join(places) or "idle"


def _is_ours(file_name: str) -> bool:
    path = Path(file_name)
    return path.is_relative_to(ROOT) and ".venv" not in path.parts and path != Path(__file__)


def ask_where(actor: Any, name: str) -> str:
    """`name` and the answer of the actor's `where`, or that it gives none."""
    try:
        return f"{name}: {ray.get(actor.where.remote(), timeout=ANSWER_TIMEOUT_S)}"
    except RayError:
        return f"{name}: does not answer"
