"""Charts as SVG: where points go, and what is left out."""

import itertools
import re
from xml.etree import ElementTree

from engine.training.report.charts import Line, line_chart


def _lines(svg: str) -> list[list[tuple[float, float]]]:
    tree = ElementTree.fromstring(svg)
    texts = [element.attrib["points"] for element in tree.iter("polyline")]
    return [[(float(x), float(y)) for x, y in (pair.split(",") for pair in text.split())] for text in texts]


def test_points_go_where_their_values_are() -> None:
    svg = line_chart([Line("loss", [(0, 4.0), (50, 3.0), (100, 2.0)])], x_name="step")
    [points] = _lines(svg)
    (left, top), (middle, centre), (right, bottom) = points
    assert left < middle < right
    assert top < centre < bottom  # y grows downwards
    assert abs(middle - (left + right) / 2) < 0.1
    assert abs(centre - (top + bottom) / 2) < 0.1


def test_a_wide_range_is_logarithmic() -> None:
    [points] = _lines(line_chart([Line("loss", [(0, 100.0), (1, 1.0), (2, 0.01)])], x_name="step"))
    assert abs(points[1][1] - (points[0][1] + points[2][1]) / 2) < 0.1


def test_long_lines_are_thinned_to_means() -> None:
    [points] = _lines(line_chart([Line("loss", [(step, 1.0 + step % 2) for step in range(8_000)])], x_name="step"))
    assert len(points) == 400
    assert len({y for _, y in points}) == 1


def test_what_is_not_finite_is_left_out_and_names_are_escaped() -> None:
    svg = line_chart([Line("a < b", [(0, float("nan")), (1, 1.0)]), Line("empty", [])], x_name="step & more")
    assert "a &lt; b" in svg
    assert "step &amp; more" in svg
    assert "nan" not in svg
    assert len(re.findall("<polyline", svg)) == 1
    assert line_chart([Line("empty", [(0, float("inf"))])], x_name="step") == ""


def test_doublings_are_equally_far_apart_and_each_has_its_number() -> None:
    svg = line_chart([Line("best of", [(1, 0.1), (2, 0.2), (4, 0.3), (96, 0.4)])], x_name="candidates", x_doubles=True)
    [points] = _lines(svg)
    steps = [right - left for (left, _), (right, _) in itertools.pairwise(points)]
    assert abs(steps[0] - steps[1]) < 0.2
    assert 4 < steps[2] / steps[0] < 5  # log2(96 / 4)
    assert {"1", "2", "4", "96", "candidates"} <= set(re.findall(">([^<]+)</text>", svg))
