import re
from html.parser import HTMLParser

import pytest

from utils.reports.figures import Rate
from utils.reports.page import (
    Clip,
    Clips,
    Evaluation,
    Key,
    Page,
    Plot,
    Section,
    Table,
    TaskRates,
    Tile,
    TimeSplit,
    rate_tiles,
    render,
    settings_table,
)

VOID = {"meta", "br", "path"}


def rate(name: str, successes: int, episodes: int = 50) -> Rate:
    value = successes / episodes
    return Rate(name, successes, episodes, max(0.0, value - 0.1), min(1.0, value + 0.1))


def evaluation(label: str, successes: tuple[int, ...]) -> Evaluation:
    tasks = tuple(rate(f"put the {i} block <there>", n) for i, n in enumerate(successes))
    return Evaluation(label, rate(label, sum(successes), 50 * len(successes)), tasks)


BEFORE, AFTER = evaluation("supervised", (20, 25)), evaluation("after PPO", (45, 50))


def make_page(*sections: Section) -> Page:
    everything = [
        Section("Curve", [Plot("<svg><path/></svg>", (Key("a & b", "red", True),))], "A note."),
        Section("Tasks", [TaskRates(BEFORE, AFTER)]),
        Section("Rows", [Table((("x", "<1>"),), ("name", "value"), "A caption")]),
        Section("Time", [TimeSplit("PPO", {"collect": 40.0, "update": 15.0})]),
        Section("Clips", [Clips((Clip(b"\0mp4", "PPO", "put <it>", True), Clip(b"b", "x", "y")))]),
        Section("Settings", [settings_table({"seed": "3"})]),
        Section("Empty", []),
    ]
    tiles = [*rate_tiles(BEFORE, AFTER), Tile("94.0 %", "merged model")]
    return Page("A run & its report", "Seed 3.", tiles, sections or everything)


class Checker(HTMLParser):
    """Collects attributes and text; fails on a tag that is closed in the wrong order."""

    def __init__(self):
        super().__init__()
        self.open, self.attributes, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += attrs

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def check(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    return checker


def test_a_page_is_well_formed_self_contained_and_shows_the_figures():
    page = render(make_page())
    checker = check(page)
    for name, value in checker.attributes:
        if name in ("src", "href"):
            assert value.startswith("data:")
    assert not re.search(r"https?://|url\(|@import|<script|\{\{|\{%", page)
    figures = (
        "45.0 %", "95.0 %", "+50.0 points", "94.0 %", "45 of 100 episodes", "95 of 100", "0:55",
        "A caption", "A note.", "a & b", "seed",
    )  # fmt: skip
    for figure in figures:
        assert figure in checker.text, figure


def test_text_from_outside_is_escaped():
    page = render(make_page())
    assert "<there>" not in page and "put the 0 block &lt;there&gt;" in page
    assert "put &lt;it&gt;" in page and "&lt;1&gt;" in page and "A run &amp; its report" in page


def test_each_task_shows_its_own_marks():
    rows = render(make_page()).split('<div class="task">')[1:]
    assert len(rows) == 3  # two tasks and the scale
    assert 'class="mark b" style="left:40.0%"' in rows[0]
    assert 'class="mark a" style="left:90.0%"' in rows[0]
    assert 'class="whisker a" style="left:80.0%;width:20.0%"' in rows[0]
    assert 'class="mark b" style="left:50.0%"' in rows[1]


def test_evaluations_of_different_tasks_are_refused():
    with pytest.raises(ValueError, match="different tasks"):
        TaskRates(BEFORE, evaluation("after PPO", (45, 50, 50)))


def test_sections_without_content_are_left_out():
    page = render(make_page())
    assert "<h2>Tasks</h2>" in page and "<h2>Empty</h2>" not in page
    assert "<video" not in render(make_page(Section("Rows", [Table(())])))


def test_an_outcome_is_marked_on_each_clip():
    page = render(make_page())
    assert page.count("✓ success") == 1 and page.count("✗ failure") == 1
    assert page.count("data:video/mp4;base64,") == 2
