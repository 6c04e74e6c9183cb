import re
import xml.etree.ElementTree as ElementTree

import pytest

from utils.plots import (
    MINUTES,
    CurvePlot,
    CurvePoint,
    Rate,
    Series,
    bars,
    shifted,
    smooth,
    standalone,
)

POINTS = (CurvePoint(100, 0.2, 5, seconds=60.0), CurvePoint(200, 0.6, 5, seconds=180.0))


def series(label: str = "a <b>", points=POINTS) -> Series:
    return Series(
        label, "var(--c0)", points, ((300.0, Rate("greedy", 4, 5, 0.4, 0.96), "var(--c0)"),)
    )


def test_a_figure_is_a_well_formed_file_with_its_own_colours():
    rates = [Rate("supervised & co", 16, 50, 0.2, 0.45), Rate("ppo", 40, 50, 0.67, 0.89)]
    plot = CurvePlot([series()], 580, 300)
    content = bars(rates, ["var(--before)", "var(--c0)"], 300, 300) + shifted(plot.content(), 320)
    text = standalone(900, 300, "what it <shows>", content)
    root = ElementTree.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg" and root.get("width") == "900"
    assert root.get("aria-label") == "what it <shows>"
    assert "var(" not in text and not re.search(r"https?://(?!www.w3.org/2000/svg)", text)
    assert "32.0 %" in text and "80.0 %" in text and "supervised &amp; co" in text


def test_bars_are_as_high_as_the_rates_and_their_whiskers_as_the_intervals():
    drawing = bars([Rate("a", 1, 4, 0.0, 0.5)], ["red"], 140, 152)
    assert re.search(
        r'<rect x="[\d.]+" y="87.0" width="[\d.]+" height="25.0"', drawing
    )  # 100 pixels are 100 %
    assert 'V62.0" stroke="var(--ink)"' in drawing and "1 of 4" in drawing


def test_the_x_axis_can_be_time_and_holds_every_curve():
    other = series("b", (CurvePoint(50, 0.5, 1, seconds=600.0),))
    plot = CurvePlot(
        [Series("a", "red", POINTS), Series("b", "blue", other.points)], 800, 320, axis=MINUTES
    )
    assert plot.max_x == 10 and plot.x(10) == plot.right
    assert plot.svg().count("<polyline") == 2 and "start-ups left out</text>" in plot.svg()
    assert "<circle" not in plot.svg()  # dots would hide each other
    assert smooth(POINTS, 2, MINUTES) == [(1.0, 0.2), (3.0, pytest.approx(0.4))]


def test_greedy_evaluations_widen_the_axis():
    plot = CurvePlot([series()], 800, 320)
    assert plot.max_x == 300 and plot.svg().count('r="5"') == 1
