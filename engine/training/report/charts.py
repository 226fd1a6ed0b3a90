"""Line charts as inline SVG: no plotting library is installed with the training extra, and the report is one file."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

Point = tuple[float, float]
COLOURS = ("#2563eb", "#dc2626", "#059669", "#9333ea")
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 12, 28
_MOST_POINTS = 400  # a line; more are thinned out by means


@dataclass(frozen=True)
class Line:
    """One curve: finite (x, y) points by rising x."""

    name: str
    points: Sequence[Point]


def line_chart(
    lines: Sequence[Line], *, x_name: str, x_doubles: bool = False, width: int = 460, height: int = 220
) -> str:
    """An SVG element; an empty text where no line has a point.

    Points that are not finite are left out. The y axis is logarithmic where values span more than a factor of 20.

    Args:
        x_doubles: the x axis is logarithmic, each place with its number: for 1, 2, 4, ...
    """
    drawn = [Line(line.name, _thinned([p for p in line.points if math.isfinite(p[1])])) for line in lines]
    drawn = [line for line in drawn if line.points]
    if not drawn:
        return ""
    xs = [x for line in drawn for x, _ in line.points]
    ys = [y for line in drawn for _, y in line.points]
    is_log = min(ys) > 0 and max(ys) / min(ys) > 20
    scale = math.log10 if is_log else float
    x_scale = math.log2 if x_doubles else float
    x_range, y_range = _range(x_scale(min(xs)), x_scale(max(xs))), _range(scale(min(ys)), scale(max(ys)))

    def place(point: Point) -> tuple[float, float]:
        x = _LEFT + (x_scale(point[0]) - x_range[0]) / (x_range[1] - x_range[0]) * (width - _LEFT - _RIGHT)
        y = _TOP + (y_range[1] - scale(point[1])) / (y_range[1] - y_range[0]) * (height - _TOP - _BOTTOM)
        return x, y

    parts = [f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">']
    for step in range(5):
        raw = y_range[0] + step / 4 * (y_range[1] - y_range[0])
        value = 10**raw if is_log else raw
        y = place((xs[0], value))[1]
        parts.append(f'<line x1="{_LEFT}" x2="{width - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    ticks = sorted(set(xs)) if x_doubles else [min(xs), max(xs)]
    for x_value in ticks:
        x = place((x_value, ys[0]))[0]
        anchor = "start" if x_value == ticks[0] else "end" if x_value == ticks[-1] else "middle"
        parts.append(f'<text x="{x:.1f}" y="{height - 14}" text-anchor="{anchor}">{x_value:,.0f}</text>')
    parts.append(f'<text x="{width / 2}" y="{height - 2}" text-anchor="middle">{html.escape(x_name)}</text>')
    for number, line in enumerate(drawn):
        colour = COLOURS[number % len(COLOURS)]
        places = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, line.points))
        parts.append(f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        # What doubles rises to the right: the names go below.
        y = height - _BOTTOM - 8 - 15 * (len(drawn) - 1 - number) if x_doubles else _TOP + 12 + 15 * number
        parts.append(
            f'<text x="{width - _RIGHT - 4}" y="{y}" text-anchor="end" style="fill: {colour}">{html.escape(line.name)}</text>'
        )
    return "".join([*parts, "</svg>"])


def _thinned(points: Sequence[Point]) -> list[Point]:
    """At most `_MOST_POINTS`: means of equal runs of points."""
    run = -(-len(points) // _MOST_POINTS)
    groups = [points[start : start + run] for start in range(0, len(points), run)] if run else []
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def _range(low: float, high: float) -> tuple[float, float]:
    return (low, high) if high > low else (low - 0.5, high + 0.5)
