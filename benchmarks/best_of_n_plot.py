"""Plot of what ranking is worth: the best of 1, 2, 4, ... candidates, by every measure that an evaluation has.

    kodalle evaluate models/clothing data/clothing128 --best-of 96 --independent-classifier runs/clothing/classifier \
        --out benchmarks/results/evaluation/clothing.json
    python benchmarks/best_of_n_plot.py benchmarks/results/evaluation/clothing.json

Written into benchmarks/plots/best-of-n-<name>.png (`--out`). One panel a measure: the ranker's choice with its standard error over captions,
a perfect ranker, and the captions' own photographs.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from machine_facts import REPOSITORY, hardware_name

from engine.errors import InputError
from engine.files import atomic_file, read_json
from engine.training.report.evaluation_rows import measure_name

_LEAST_RANGE = 0.02  # of a vertical axis
_CHOSEN, _PERFECT, _REAL = "#2563eb", "#9ca3af", "#059669"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("evaluation", type=Path, help="JSON of `kodalle evaluate --best-of N`")
    parser.add_argument("--out", type=Path, help="PNG (benchmarks/plots/best-of-n-<name>.png)")
    arguments = parser.parse_args()
    out = arguments.out or REPOSITORY / "benchmarks" / "plots" / f"best-of-n-{arguments.evaluation.stem}.png"
    try:
        report = read_json(arguments.evaluation, field="evaluation", remedy="make it with `kodalle evaluate --best-of`")
        if "best_of_n" not in report.get("generations", {}):
            raise InputError("evaluation", arguments.evaluation, "has no curves: evaluate with --best-of 96")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    plot(report, out)
    print(f"stored {out}", file=sys.stderr)
    return 0


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Writes a PNG of the curves of a report."""
    from matplotlib.figure import Figure  # takes half a second to import

    curves = report["generations"]["best_of_n"]
    numbers, measures = curves["numbers"], curves["measures"]
    figure = Figure(figsize=(3.6 * len(measures), 3.8), layout="constrained")
    for axes, (name, found) in zip(figure.subplots(1, len(measures), squeeze=False)[0], measures.items(), strict=True):
        top, error = found["top_ranked"], [one or 0.0 for one in found["standard_error"]]
        lower, upper = ([value + sign * one for value, one in zip(top, error, strict=True)] for sign in (-1, 1))
        axes.fill_between(numbers, lower, upper, color=_CHOSEN, alpha=0.15, linewidth=0)
        axes.plot(numbers, top, "o-", color=_CHOSEN, markersize=4, label="the ranker's choice, +- standard error")
        if found["best"] != top:  # a ranker by this measure itself is perfect
            axes.plot(numbers, found["best"], "--", color=_PERFECT, label="a perfect ranker")
        if found["real"] is not None:
            axes.axhline(found["real"], color=_REAL, linewidth=1.5, label="the photographs")
        low, high = axes.get_ylim()
        if high - low < _LEAST_RANGE:  # all alike: a flat line, not its rounding
            axes.set_ylim((low + high - _LEAST_RANGE) / 2, (low + high + _LEAST_RANGE) / 2)
        axes.set_xscale("log", base=2)
        axes.set_xticks(numbers, [str(number) for number in numbers])
        axes.set_title(f"{measure_name(name)}\n{found['captions']} captions", fontsize=9)
        axes.set_xlabel("candidates", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    handles = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=8)
    figure.suptitle(
        f"{report['model_name']}: best of N; {hardware_name(dict(report))}, {report['date'][:10]}", fontsize=10
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


if __name__ == "__main__":
    sys.exit(main())
