import re
import xml.etree.ElementTree as ElementTree

import pytest
from matplotlib.figure import Figure

from utils.reports.figures import (
    MINUTES,
    CurvePoint,
    Rate,
    Series,
    comparison,
    learning_curves,
    percent,
    rate_bars,
    smooth,
    to_svg,
)

POINTS = (CurvePoint(100, 0.2, 5, seconds=60.0), CurvePoint(200, 0.6, 15, seconds=180.0))
GREEDY = ((300.0, Rate("greedy", 4, 5, 0.4, 0.96), "red"),)


def series(label: str = "run", points=POINTS) -> Series:
    return Series(label, "blue", points, GREEDY)


def line_of(figure: Figure, label: str) -> tuple[list[float], list[float]]:
    (ax,) = figure.axes
    (line,) = [line for line in ax.lines if line.get_label() == label]
    return list(line.get_xdata()), list(line.get_ydata())


def test_bars_and_whiskers_are_the_rates_and_their_intervals():
    rates = [Rate("supervised & co", 16, 50, 0.2, 0.45), Rate("ppo", 40, 50, 0.67, 0.89)]
    (ax,) = rate_bars(rates, ["grey", "blue"]).axes
    assert [bar.get_height() for bar in ax.patches] == [0.32, 0.8]
    whiskers = [c.get_segments()[0][:, 1].tolist() for c in ax.collections]
    assert whiskers == [pytest.approx([0.2, 0.45]), pytest.approx([0.67, 0.89])]
    assert [text.get_text() for text in ax.texts] == ["32.0 %", "80.0 %"]


def test_a_curve_is_the_moving_average_with_each_steps_rate_as_a_dot():
    figure = learning_curves([series()], window=2)
    x, y = line_of(figure, "run")
    assert x == [100, 200] and y == pytest.approx([0.2, (0.2 * 5 + 0.6 * 15) / 20])
    dots = figure.axes[0].lines[0]
    assert dots.get_marker() == "." and list(dots.get_ydata()) == [0.2, 0.6]


def test_the_x_axis_can_be_time():
    other = series("b", (CurvePoint(50, 0.5, 1, seconds=600.0),))
    figure = learning_curves([series("a"), other], axis=MINUTES, window=1)
    assert line_of(figure, "a")[0] == [1.0, 3.0] and line_of(figure, "b")[0] == [10.0]
    assert figure.axes[0].get_xlabel() == "minutes of training, without start-up"


def test_the_axis_reaches_every_point_and_evaluation():
    (ax,) = learning_curves([series()]).axes
    assert ax.get_xlim()[1] >= 300
    (ax,) = learning_curves([series()], max_x=1000.0).axes
    assert ax.get_xlim()[1] >= 1000


def test_the_critics_warm_up_is_shaded():
    (ax,) = learning_curves([series()], warmup_x=150.0).axes
    assert [patch.get_width() for patch in ax.patches] == [150.0]
    assert not learning_curves([series()]).axes[0].patches


def test_an_svg_is_well_formed_reproducible_and_needs_no_other_file():
    rates = [Rate("supervised & <co>", 16, 50, 0.2, 0.45)]
    texts = [to_svg(comparison(rates, ["grey"], [series()], 1), "a <label>") for _ in range(2)]
    assert texts[0] == texts[1]
    root = ElementTree.fromstring(texts[0])
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "supervised &amp; &lt;co&gt;" in texts[0] and "32.0 %" in texts[0]
    links = re.findall(r'(?:href|src)="([^"]+)"', texts[0])
    assert all(link.startswith("#") for link in links)


def test_smoothing_weights_by_episodes_and_skips_steps_without_any():
    points = [CurvePoint(1, 0.5, 10), CurvePoint(2, 0.0, 0), CurvePoint(3, 0.9, 30)]
    assert smooth(points, 1) == [(1.0, 0.5), (3.0, 0.9)]
    assert smooth(points, 3)[-1] == (3.0, pytest.approx((0.5 * 10 + 0.9 * 30) / 40))
    assert smooth(points[1:2], 2) == []


def test_percent():
    assert percent(0.9344) == "93.4 %"
