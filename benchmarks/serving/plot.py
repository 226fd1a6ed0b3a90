"""Plot of the serving benchmark: latency and goodput by offered rate, of our servers and stock."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from machine_facts import hardware_name

from engine.files import atomic_file
from serving.goodput import rates_of

_STYLES = {
    "ray": ("#2171b5", "o", "ours, Ray Serve"),
    "direct": ("#6baed6", "s", "ours, one process"),
    "stock": ("#e6550d", "^", "stock @serve.batch"),
}


def plot(document: dict[str, Any], path: Path) -> None:
    """Writes a PNG. Upper panel: p50 and p95 of all requests, log scale, without infinite percentiles. Lower panel: share of
    requests within the bound."""
    from matplotlib.figure import Figure  # takes half a second to import

    row = document["goodput"]
    figure = Figure(figsize=(8.5, 7.5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    figure.suptitle(
        f"Requests of 1, 4 and 16 candidates, Poisson arrivals\n{hardware_name(document)}, {document['date'][:10]}",
        fontsize=12,
    )
    for kind, found in row["found_rates"].items():
        colour, marker, name = _STYLES[kind]
        points = by_rate(rates_of(row["points"], kind))
        for which, line in (("p95", "-"), ("p50", ":")):
            finite = [(rate, values[which]) for rate, values in points if math.isfinite(values[which])]
            if finite:
                rates, seconds = zip(*finite, strict=True)
                upper.plot(rates, seconds, line, marker=marker, color=colour, label=f"{name}, {which}", markersize=5)
        shares = [100 * values["share_within"] for _, values in points]
        lower.plot([rate for rate, _ in points], shares, "-", marker=marker, color=colour, label=name, markersize=5)
        if found:
            for axes in (upper, lower):
                axes.axvline(found, color=colour, linewidth=1, alpha=0.5)
            lower.annotate(f"{found:.2f}/s", (found, 2), color=colour, rotation=90, ha="right", va="bottom", fontsize=9)
    upper.axhline(row["bound_s"], color="#555555", linewidth=1, linestyle="--", label=f"bound, {row['bound_s']:.2g} s")
    lower.axhline(
        100 * row["good_share"], color="#555555", linewidth=1, linestyle="--", label=f"{row['good_share']:.0%}"
    )
    upper.set_yscale("log")
    upper.set_ylabel("seconds from the intended time to the image", fontsize=9)
    lower.set_ylabel("% of requests within the bound", fontsize=9)
    lower.set_xlabel("requests offered per second", fontsize=9)
    lower.set_ylim(-3, 105)
    lower.set_xlim(left=0)
    for axes in (upper, lower):
        axes.legend(fontsize=8, loc="best")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def by_rate(points: Sequence[dict[str, Any]]) -> list[tuple[float, dict[str, float]]]:
    """Points of the same rate as one, at their medians; a percentile of None is infinite."""
    found = []
    for rate in sorted({point["rate"] for point in points}):
        same = [point for point in points if point["rate"] == rate]
        values = {"share_within": statistics.median(point["share_within"] for point in same)}
        for which in ("p50", "p95"):
            waits = [point["latency_of_all_s"][which] for point in same]
            values[which] = statistics.median(math.inf if wait is None else wait for wait in waits)
        found.append((rate, values))
    return found
