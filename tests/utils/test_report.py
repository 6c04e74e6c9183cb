import dataclasses
import re
from html.parser import HTMLParser

import pytest

from utils.plots import CurvePoint, Rate, axis_step, percent, smooth
from utils.report import Clip, Evaluation, ReportData, curve_plot, render_report

VOID = {"meta", "br", "path", "rect", "circle", "polyline"}


def rate(name: str, successes: int, episodes: int = 50) -> Rate:
    value = successes / episodes
    return Rate(name, successes, episodes, max(0.0, value - 0.1), min(1.0, value + 0.1))


def evaluation(label: str, successes: tuple[int, ...]) -> Evaluation:
    tasks = tuple(rate(f"put the {i} block <there>", n) for i, n in enumerate(successes))
    return Evaluation(label, rate(label, sum(successes), 50 * len(successes)), tasks)


def make_data(**changes) -> ReportData:
    data = ReportData(
        title="A run & its report",
        lead="Seed 3.",
        before=evaluation("supervised", (20, 25)),
        after=evaluation("after PPO", (45, 50)),
        merged_success_rate=0.94,
        curve=(CurvePoint(1000, 0.5, 10), CurvePoint(2000, 0.9, 30)),
        warmup_env_steps=500,
        ppo_env_steps=2000,
        stage_s={"set-up": 1.0, "PPO": 59.0},
        ppo_phase_s={"collect": 40.0, "update": 15.0},
        clips=(Clip("after PPO", "put it there", True, b"\x00mp4"),),
        settings={"seed": "3"},
    )
    return dataclasses.replace(data, **changes)


class Checker(HTMLParser):
    """Collects attributes and fails on a tag that is closed in the wrong order."""

    def __init__(self):
        super().__init__()
        self.open, self.attributes, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

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


def test_page_is_well_formed_self_contained_and_shows_the_figures():
    page = render_report(make_data())
    checker = check(page)
    for name, value in checker.attributes:
        if name in ("src", "href"):
            assert value.startswith("data:")
    assert not re.search(r"https?://|url\(|@import|<script|\$\w", page)
    for figure in (
        "45.0 %",
        "95.0 %",
        "+50.0 points",
        "94.0 %",
        "45 of 100 episodes",
        "95 of 100",
        "1:00",
    ):
        assert figure in checker.text, figure


def test_text_from_outside_is_escaped():
    page = render_report(make_data())
    assert "<there>" not in page and "put the 0 block &lt;there&gt;" in page
    assert "A run &amp; its report" in page


def test_each_task_shows_its_own_marks():
    page = render_report(make_data())
    rows = page.split('<div class="task">')[1:]
    assert len(rows) == 3  # two tasks and the scale
    assert (
        'class="mark b" style="left:40.0%"' in rows[0]
        and 'class="mark a" style="left:90.0%"' in rows[0]
    )
    assert 'class="whisker a" style="left:80.0%;width:20.0%"' in rows[0]
    assert 'class="mark b" style="left:50.0%"' in rows[1]


def test_evaluations_of_different_tasks_are_refused():
    with pytest.raises(ValueError, match="different tasks"):
        render_report(make_data(after=evaluation("after PPO", (45, 50, 50))))


def test_optional_parts_are_left_out():
    page = render_report(make_data(clips=(), ppo_phase_s={}, warmup_env_steps=0, curve=()))
    check(page)
    assert "<video" not in page and "warm-up" not in page and "<p>PPO: " not in page
    assert "<p>PPO: 0:55</p>" in render_report(make_data())


def test_smooth_weights_by_episodes_and_skips_steps_without_any():
    points = [CurvePoint(1, 0.5, 10), CurvePoint(2, 0.0, 0), CurvePoint(3, 0.9, 30)]
    assert smooth(points, 1) == [(1.0, 0.5), (3.0, 0.9)]
    assert smooth(points, 3)[-1] == (3.0, pytest.approx((0.5 * 10 + 0.9 * 30) / 40))
    assert smooth(points[1:2], 2) == []


def test_curve_maps_rates_and_steps_to_pixels():
    plot = curve_plot(make_data(), 800, 320)
    plot.window = 1
    assert plot.y(0) == plot.bottom and plot.y(1) == plot.top
    assert plot.x(0) == plot.left and plot.x(2000) == plot.right
    line = re.search(r'points="([^"]+)"', plot.svg())[1]
    assert line == f"{plot.x(1000):.1f},{plot.y(0.5):.1f} {plot.x(2000):.1f},{plot.y(0.9):.1f}"


@pytest.mark.parametrize(
    ("maximum", "step"), [(7, 2), (40000, 10000), (65536, 20000), (100, 20), (3, 1)]
)
def test_axis_step(maximum, step):
    assert axis_step(maximum, 5) == step
    assert maximum / step <= 5


def test_percent():
    assert percent(0.9344) == "93.4 %"
