"""One self-contained HTML page about a run: plain data in, text out. No network, no JavaScript.

The page works on a phone and in light and dark mode. Plots are inline SVG, videos are embedded.
`page.html.j2` holds all of the HTML; Jinja2 escapes every text.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import jinja2
from markupsafe import Markup

from utils.logging_utils import format_duration
from utils.reports.figures import AFTER, BEFORE, Rate, percent, series_colour

TEMPLATE = Path(__file__).with_name("page.html.j2")


@dataclass(frozen=True)
class Evaluation:
    """Greedy success of one policy, overall and per task in the suite's order."""

    label: str
    overall: Rate
    tasks: tuple[Rate, ...]


@dataclass(frozen=True)
class Tile:
    """A headline figure."""

    value: str
    label: str
    detail: str = ""


@dataclass(frozen=True)
class Key:
    """A legend entry; `is_dot` draws a dot instead of a square."""

    label: str
    colour: str
    is_dot: bool = False


@dataclass(frozen=True)
class Plot:
    """A plot with its legend; `svg` as `utils.reports.figures.to_svg` returns it."""

    kind: ClassVar[str] = "plot"
    svg: str
    keys: tuple[Key, ...] = ()

    @property
    def markup(self) -> Markup:
        """The SVG, which matplotlib has escaped already."""
        return Markup(self.svg)


@dataclass(frozen=True)
class Table:
    """Rows of text. The first column names the row."""

    kind: ClassVar[str] = "table"
    rows: tuple[tuple[str, ...], ...]
    head: tuple[str, ...] = ()
    caption: str = ""
    is_code: bool = False


@dataclass(frozen=True)
class TaskRates:
    """Two policies' success on each task.

    Raises:
        ValueError: the evaluations are of different tasks.
    """

    kind: ClassVar[str] = "tasks"
    before: Evaluation
    after: Evaluation

    def __post_init__(self) -> None:
        if [rate.name for rate in self.before.tasks] != [rate.name for rate in self.after.tasks]:
            raise ValueError(
                "the two evaluations are of different tasks: "
                "evaluate both policies on the same suite and task ids"
            )

    @property
    def rows(self) -> list[tuple[Rate, Rate]]:
        """Both rates of each task."""
        return list(zip(self.before.tasks, self.after.tasks, strict=True))

    @property
    def keys(self) -> tuple[Key, ...]:
        """The legend."""
        return (Key(self.before.label, BEFORE, True), Key(self.after.label, AFTER, True))


@dataclass(frozen=True)
class TimeSplit:
    """Where time went: seconds by phase, as a stacked bar with a table."""

    kind: ClassVar[str] = "times"
    title: str
    seconds: Mapping[str, float]

    @property
    def total_s(self) -> float:
        """Seconds of all phases."""
        return sum(self.seconds.values())

    @property
    def rows(self) -> list[tuple[str, float, float, str]]:
        """Name, seconds, share and colour of each phase."""
        total = self.total_s or 1.0
        phases = enumerate(self.seconds.items())
        return [(name, s, s / total, series_colour(i)) for i, (name, s) in phases]


@dataclass(frozen=True)
class Clip:
    """An embedded H.264 mp4 with its caption. `success` is None for a video of several episodes."""

    mp4: bytes
    label: str = ""
    instruction: str = ""
    success: bool | None = None

    @property
    def source(self) -> str:
        """The video as a data URL."""
        return "data:video/mp4;base64," + base64.b64encode(self.mp4).decode()


@dataclass(frozen=True)
class Clips:
    """Videos side by side."""

    kind: ClassVar[str] = "clips"
    clips: tuple[Clip, ...]


Block = Plot | Table | TaskRates | TimeSplit | Clips


@dataclass(frozen=True)
class Section:
    """A card of the page; the note stands below its title."""

    title: str
    blocks: Sequence[Block]
    note: str = ""


@dataclass(frozen=True)
class Page:
    """Everything the page shows. Sections without blocks are left out."""

    title: str
    lead: str
    tiles: Sequence[Tile]
    sections: Sequence[Section] = field(default_factory=tuple)


def settings_table(settings: Mapping[str, str]) -> Table:
    """Return settings as a table of names and values."""
    return Table(tuple(settings.items()), is_code=True)


def rate_tiles(before: Evaluation, after: Evaluation) -> list[Tile]:
    """Return headline figures of two evaluations."""
    old, new = before.overall, after.overall
    gain = 100 * (new.value - old.value)
    counts = f"{new.successes} of {new.episodes}"
    return [
        Tile(percent(old.value), before.label, f"{old.successes} of {old.episodes} episodes"),
        Tile(percent(new.value), after.label, f"{gain:+.1f} points, {counts}"),
    ]


def render(page: Page) -> str:
    """Return the page as HTML text."""
    environment = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"percent": percent, "duration": format_duration}
    colours = {"before": BEFORE, "after": AFTER}
    return environment.from_string(TEMPLATE.read_text()).render(page=page, colours=colours)
