"""The sampling benchmark as one image: where our time goes, and seconds an image beside what others published."""

from pathlib import Path
from typing import Any

from machine_facts import hardware_name

from engine.files import atomic_file
from sampling.rows import PHASES, Row

_COLOURS = {
    "prefill": "#9ecae1",
    "decode": "#2171b5",
    "vqgan": "#fd8d3c",
    "ranking": "#74c476",
    "encoding": "#969696",
}
_MEASURED, _BASELINE = "#2171b5", "#bdbdbd"
_NAMES = {"uncached": "ancestors' algorithm", "cached": "plain cached loop", "dalle-pytorch": "dalle-pytorch"}


def write_plot(document: dict[str, Any], path: Path) -> None:
    """Writes a PNG. Upper panel: phases of our rows. Lower: seconds an image, log scale; hatched is published."""
    from matplotlib.figure import Figure  # half a second, and not needed where no plot is drawn

    ours = [row for row in document["rows"] if row["what"] == "ours"]
    bars = comparison_bars(document)
    heights = [0.7 + 0.42 * len(ours), 0.7 + 0.34 * len(bars)]
    figure = Figure(figsize=(11, sum(heights) + 1.6), layout="constrained")
    upper, lower = figure.subplots(2, 1, height_ratios=heights)
    size = document["config"]["vqgan"]["image_size"]
    figure.suptitle(
        f"Generating {size} x {size} images, {hardware_name(document)}, {document['date'][:10]}", fontsize=12
    )
    _plot_phases(upper, ours)
    _plot_comparison(lower, bars)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def comparison_bars(document: dict[str, Any]) -> list[tuple[str, float, str]]:
    """(label, seconds an image, kind), slowest first; kind is ours, baseline or published.

    A baseline is plotted with our VQGAN and encoding added to its tokens; ours leaves ranking out.
    """
    ours = {(row["variant"], row["images"]): row for row in document["rows"] if row["what"] == "ours"}
    bars = []
    for row in document["rows"]:
        if row["what"] not in ("ours", *_NAMES) or "tokens_s" not in row:
            continue
        mine = ours[row["variant"], row["images"]]["phases_s"]
        tokens_s = mine["prefill"] + mine["decode"] if row["what"] == "ours" else row["tokens_s"]
        name = "this engine" if row["what"] == "ours" else _NAMES[row["what"]]
        label = f"{name}, {row['variant']}, {_images(row)}"
        seconds = (tokens_s + mine["vqgan"] + mine["encoding"]) / row["images"]
        bars.append((label, seconds, "ours" if row["what"] == "ours" else "baseline"))
    for row in document["published"]:
        if row["plot"]:
            label = f"{row['system']} on {row['hardware']}, {_images(row)}"
            bars.append((label, row["seconds_per_image"], "published"))
    return sorted(bars, key=lambda bar: -bar[1])


def _images(row: Row) -> str:
    return "1 image" if row["images"] == 1 else f"{row['images']} images"


def _plot_phases(axes: Any, ours: list[Row]) -> None:
    labels = [f"{row['variant']}, {_images(row)}" for row in ours]
    widest = max(row["total_s"] for row in ours)
    for number, row in enumerate(ours):
        left = 0.0
        for phase in PHASES:
            seconds = row["phases_s"][phase]
            axes.barh(number, seconds, left=left, color=_COLOURS[phase], label=phase if number == 0 else None)
            left += seconds
        axes.text(left + 0.01 * widest, number, f"{row['total_s']:.3g} s", va="center", fontsize=9)
    axes.set_yticks(range(len(ours)), labels)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * widest)
    axes.set_xlabel("seconds, all images of one caption", fontsize=9)
    axes.legend(ncols=len(PHASES), loc="lower right", bbox_to_anchor=(1, 1), frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def _plot_comparison(axes: Any, bars: list[tuple[str, float, str]]) -> None:
    styles: dict[str, dict[str, Any]] = {
        "ours": {"color": _MEASURED, "label": "this engine, measured here"},
        "baseline": {"color": _BASELINE, "label": "others' way with our weights, measured here"},
        "published": {
            "facecolor": "white", "edgecolor": "#cb181d", "hatch": "////", "linewidth": 0.8,
            "label": "published by others, on other hardware, not measured here",
        },
    }  # fmt: skip
    shown = set()
    for number, (_, seconds, kind) in enumerate(bars):
        style = dict(styles[kind])
        if kind in shown:
            del style["label"]
        shown.add(kind)
        axes.barh(number, seconds, **style)
        axes.text(seconds * 1.06, number, f"{seconds:.3g} s", va="center", fontsize=9)
    axes.set_yticks(range(len(bars)), [label for label, _, _ in bars])
    axes.invert_yaxis()
    axes.set_xscale("log")
    lowest, highest = min(bar[1] for bar in bars), max(bar[1] for bar in bars)
    axes.set_xlim(lowest / 2, highest * 2.5)
    axes.set_xlabel("seconds an image, without ranking (log scale, shorter is better)", fontsize=9)
    axes.legend(loc="lower right", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
