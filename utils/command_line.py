"""What all programs share about their flags: the error, its exit code, and bounds of numbers. Imports no torch."""

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Exit code of a refused command line in every program and script. argparse and tyro use it too.
REFUSED = 2

# Limits of the file system: a name in bytes, and a path with room for the names of files inside.
MAX_NAME_BYTES, MAX_PATH_BYTES = 255, 3800
# Room for the suffixes of temporary neighbours: `.NAME.partial-PID`.
MAX_FOLDER_NAME_BYTES = 200


class CommandLineError(ValueError):
    """Flags, files or folders that cannot work; the message lists every problem."""


def raise_problems(problems: Sequence[str]) -> None:
    """Raise CommandLineError with all `problems`, one a line, if there are any."""
    problems = list(dict.fromkeys(problems))
    if problems:
        raise CommandLineError(
            f"{len(problems)} problem(s) with this command line:\n- " + "\n- ".join(problems)
        )


@dataclass(frozen=True)
class Bound:
    """Allowed values of a number. NaN is never allowed, infinity only where `high` is infinite.

    Attributes:
        low: smallest value; with `above` the value must be larger.
        high: largest value; with `below` the value must be smaller.
        reason: why the limits are where they are, in words that fit behind a colon.
    """

    low: float
    high: float
    above: bool = False
    below: bool = False
    reason: str = ""

    def holds(self, value: float) -> bool:
        """Whether `value` is allowed."""
        low_holds = value > self.low if self.above else value >= self.low
        high_holds = value < self.high if self.below else value <= self.high
        return bool(low_holds and high_holds)

    def __str__(self) -> str:
        if self.low == 0 and not self.above and self.high == float("inf"):
            return "at least 0"
        low = f"above {self.low:g}" if self.above else f"at least {self.low:g}"
        high = f"below {self.high:g}" if self.below else f"at most {self.high:g}"
        return low if self.high == float("inf") else f"{low} and {high}"


def bound_problems(args: Any, bounds: Mapping[str, Bound]) -> list[str]:
    """A problem for each number of `args` outside its bound. Flags that are None are left out.

    `bounds` maps flag names, several separated by spaces, to their bound.
    """
    problems = []
    for names, bound in bounds.items():
        for name in names.split():
            value = getattr(args, name)
            values = value if isinstance(value, tuple) else () if value is None else (value,)
            wrong = [v for v in values if not bound.holds(v)]
            if wrong:
                reason = f": {bound.reason}" if bound.reason else ""
                shown = " ".join(_short(v) for v in wrong)
                problems.append(f"--{name} {shown} must be {bound}{reason}")
    return problems


def _short(value: float) -> str:
    """The number as typed, cut where it has hundreds of digits (str of an int of 5,000 digits is an error)."""
    if isinstance(value, int) and abs(value) >= 10**20:
        return f"{'-' if value < 0 else ''}(a number above 1e20)"
    return str(value)


def repeated_problems(flag: str, values: Iterable[Any]) -> list[str]:
    """A problem that names what occurs more than once among `values`."""
    values = tuple(values)
    twice = list(dict.fromkeys(value for value in values if values.count(value) > 1))
    if not twice:
        return []
    shown = " ".join(map(str, values))
    return [f"{flag} {shown} names {', '.join(map(str, twice))} twice: give each once"]


def path_problems(flag: str, path: str | Path) -> list[str]:
    """Texts that no path can be: empty, too long, or with characters that file names cannot have."""
    text = str(path)
    if not text:
        return [f"{flag} is empty: give a path, or leave the flag out"]
    if problem := _text_problem(text):
        return [f"{flag} {text[:80]!r} {problem}"]
    longest = max(len(os.fsencode(part)) for part in text.split("/"))
    if longest > MAX_NAME_BYTES or len(os.fsencode(text)) > MAX_PATH_BYTES:
        return [
            f"{flag} {text[:40]}... has {len(os.fsencode(text))} bytes, its longest name {longest}: "
            f"at most {MAX_PATH_BYTES} and {MAX_NAME_BYTES} are possible"
        ]
    return []


def folder_name_problems(flag: str, name: str, *, whole: bool = True) -> list[str]:
    """Why `name` cannot be the name of a folder that a program makes; with `whole` False a part at the end of one.

    Such a name is one component of a path: it cannot lead out of the folder that it is put in.
    """
    max_bytes = MAX_FOLDER_NAME_BYTES if whole else MAX_FOLDER_NAME_BYTES // 2
    rule = f"use at most {max_bytes} bytes without '/' or control characters"
    if whole:
        rule += ", not beginning with '.', '-' or a space"
    problem = _text_problem(name)
    if problem is None and "/" in name:
        problem = "is a path, not a name"
    elif problem is None and len(name.encode()) > max_bytes:
        problem = f"has {len(name.encode())} bytes"
    elif problem is None and whole and (not name.strip() or name[0] in ".- "):
        problem = "is no name for a folder"
    return [f"{flag} {name[:80]!r} {problem}: {rule}"] if problem else []


def cut_name(name: str, max_bytes: int) -> str:
    """`name`, or as many of its characters as `max_bytes` of UTF-8 hold."""
    return name.encode()[:max_bytes].decode(errors="ignore")


def _text_problem(text: str) -> str | None:
    try:
        text.encode()
    except UnicodeEncodeError:
        return "is not UTF-8"
    if any(ord(character) < 32 or ord(character) == 127 for character in text):
        return "holds a control character"
    return None


@dataclass(frozen=True)
class Effect:
    """Flags that do something only together with others.

    A flag counts as given if it differs from its default. If it asks for results that would never
    come (`promises`), the command line is refused. If it only tunes a part that is switched off, it
    gets a warning.

    Attributes:
        flags: names, separated by spaces.
        is_on: whether the flags have an effect; takes the program's Args.
        needs: what would give them one.
        promises: whether the user would wait in vain for a result.
    """

    flags: str
    is_on: Callable[[Any], bool]
    needs: str
    promises: bool = False


def idle_flags(args: Any, effects: Iterable[Effect], *, promises: bool) -> list[str]:
    """One sentence for each flag that was given and has no effect, of those with this value of `promises`."""
    defaults = {field.name: field.default for field in dataclasses.fields(args)}
    return [
        f"--{name} {getattr(args, name)} has no effect without {effect.needs}: "
        f"add that, or leave --{name} out"
        for effect in effects
        if effect.promises == promises and not effect.is_on(args)
        for name in effect.flags.split()
        if getattr(args, name) != defaults[name]
    ]


def parse_engine_options(text: str) -> dict[str, Any]:
    """Read `--engine_args`. Raises ValueError if it is no JSON object, or names an option twice."""
    start = f"--engine_args {text[:80]!r}"
    try:
        options = json.loads(text, object_pairs_hook=_no_repeated_keys, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{start} is not JSON ({error}): quote it like '{{\"block_size\": 32}}'"
        ) from error
    if not isinstance(options, dict):
        raise ValueError(
            f"{start} is not a JSON object: give names and values, '{{\"block_size\": 32}}'"
        )
    return options


def _no_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if problems := repeated_problems("the object", (name for name, _ in pairs)):
        raise ValueError(problems[0])
    return dict(pairs)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
