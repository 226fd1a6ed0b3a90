"""The report of `kodalle evaluate`: every figure in a table beside what it must be read beside, curves, pictures, and what a figure says."""

import html
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from engine.files import atomic_file
from engine.training.report import verdicts
from engine.training.report.charts import Line, line_chart
from engine.training.report.evaluation_rows import Row, evaluation_rows, measure_name
from engine.training.report.page import chart_figure, file_figure, page
from engine.training.report.verdicts import Verdict

_COLUMNS = ("figure", "features", "better", "model", "random", "real", "floor", "of")
_LEGEND = (
    "model: top-ranked images, or all generations of the set. random: a candidate taken at random, or a guess. real: photographs measured "
    "alike. floor: photographs as the codec reconstructs them, which no transformer over it can beat."
)
# What each figure says, and when it is not to be trusted; shown where the report has it.
_MEANINGS = {
    "FID": "distance of two Gaussians fitted to features. It shrinks as sets grow, and below some 10,000 images most of it is their number: "
    "read it only beside real and floor, which have as many. Figures in Lite0's features are never to be set beside a paper's.",
    "KID": "like FID, without the bias of small sets: the one to read with a few hundred images. Differences below twice its standard "
    "deviation (in the JSON) are noise.",
    "precision": "share of generations that lie among photographs (k = 3): are they good? With few photographs the neighbourhoods are "
    "wide: compare with real.",
    "recall": "share of photographs that lie among generations: is there variety? Strong guidance and low temperature lower it.",
    "Inception Score": "certain classes and many of them, by ImageNet's names. It never looks at a photograph and knows few garments: above "
    "real it means nothing good. Compare equally many images only.",
    "reconstruction FID": "what the codec alone loses; the same cautions as for FID.",
    "KoCLIP score": "the model's own ranker, which also chose the images: it confirms itself. For comparing models with one ranker.",
    "CLIP score": "100 x cosine of a CLIP that had no part in it. It knows nouns and colours, not cuts; only one CLIP and one language compare.",
    "the colour in the pixels is the caption's": "read as of photographs, which are misread, too: real is what a perfect model would get.",
    "the class, by the independent classifier, is the caption's": "as far as the classifier is right about photographs: its own row says so.",
}
_MEANING_OF_CURVES = (
    "What a user gets who lets the ranker choose among N candidates: the expectation over all ways of taking N of those generated. Where the "
    "curve of a measure that had no part in ranking is flat, more candidates are a waste of time; where a perfect ranker is far above, a "
    "better ranker is worth more than a better transformer."
)
_SHEETS = {
    "captioned": "Top-ranked images of held-out captions, chosen by the seed, not by hand",
    "reconstructions": "Held-out photographs, each above what the codec makes of it",
}


def write_evaluation_report(out: Path, report: Mapping[str, Any]) -> Path:
    """Writes <stem>-report.html and <stem>-report.md beside the JSON of an evaluation.

    Args:
        out: the JSON file; the sheets lie beside it.
        report: what it holds.

    Returns:
        The HTML file.
    """
    path = out.with_name(f"{out.stem}-report.html")
    for file, text in ((path, _html(out, report)), (path.with_suffix(".md"), _markdown(out, report))):
        with atomic_file(file) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return path


def evaluation_verdicts(report: Mapping[str, Any]) -> list[Verdict]:
    """In words, as the report of a training says them."""
    generations, koclip = report.get("generations", {}), report.get("koclip")
    scores = generations.get("koclip_score")
    found: list[Verdict | None] = [verdicts.held_out(report["pairs"]["validation"])]
    if "psnr_db" in report.get("reconstruction", {}):
        found.append(verdicts.reconstruction(report["reconstruction"]["psnr_db"]))
    ranker = koclip and verdicts.ranker(koclip["recall_at_1"], koclip["recall_among"], koclip["pairs"])
    found.append(ranker or None)
    if "oracle" in generations:
        found.append(verdicts.by_oracle(generations["oracle"], generations["captions"]))
    if scores and ranker and ranker.level in ("good", "fair"):
        found.append(
            verdicts.following(
                scores["real"],
                scores["real_of_another_caption"],
                scores["top_ranked"],
                scores["random"],
                captions=generations["captions"],
            )
        )
    found.append(verdicts.variety(generations.get("difference")))
    return [verdict for verdict in found if verdict is not None]


def _title(report: Mapping[str, Any]) -> str:
    return f"Evaluation of {report['model_name']}"


def _measured(report: Mapping[str, Any]) -> str:
    hardware, pairs = report["hardware"], report["pairs"]
    return (
        f"{pairs['validation']} held-out pairs of {pairs['validation'] + pairs['train']:,}; {report['date']}, commit "
        f"{report['commit']}, {hardware['cores']} cores of {hardware['cpu']}, {hardware['device']}"
    )


def _markdown(out: Path, report: Mapping[str, Any]) -> str:
    rows = evaluation_rows(report)
    lines = [f"# {_title(report)}", "", f"{_measured(report)}.", ""]
    lines += [f"- {one.level}: {one.text}" for one in evaluation_verdicts(report)]
    lines += ["", _LEGEND, "", f"| {' | '.join(_COLUMNS)} |", f"|{'---|' * len(_COLUMNS)}"]
    for section, own in groupby(rows, key=lambda row: row.section):
        lines.append(f"| **{section}** |{' |' * (len(_COLUMNS) - 1)}")
        lines += [f"| {' | '.join(_cells(row))} |" for row in own]
    lines += ["", *_left_out(report), "## What the figures say", ""]
    lines += [f"- **{name}**: {text}" for name, text in _meanings(rows)]
    if "best_of_n" in report.get("generations", {}):
        lines += ["", "## Best of N", "", _MEANING_OF_CURVES, "", *_curve_table(report["generations"]["best_of_n"])]
    lines += ["", f"Curves and pictures are in {out.stem}-report.html.", ""]
    return "\n".join(lines)


def _html(out: Path, report: Mapping[str, Any]) -> str:
    escape, rows = html.escape, evaluation_rows(report)
    items = "".join(f'<li class="{one.level}">{escape(one.text)}</li>' for one in evaluation_verdicts(report))
    left_out = "".join(f"<p>{escape(line)}</p>" for line in _left_out(report))
    meanings = "".join(f"<li><b>{escape(name)}</b>: {escape(text)}</li>" for name, text in _meanings(rows))
    return page(
        _title(report),
        f'<p>{escape(_measured(report))}</p><h2>How good is it</h2><ul class="verdicts">{items}</ul>'
        f"<h2>Every figure beside what it must be read beside</h2><p>{escape(_LEGEND)}</p>{_table(rows)}{left_out}"
        f"{_curves(report)}<h2>What the figures say</h2><ul>{meanings}</ul>{_pictures(out, report)}",
    )


def _table(rows: Sequence[Row]) -> str:
    kinds = ["", "", "", *[' class="number"'] * 4, ""]
    head = "".join(f"<th{kind}>{name}</th>" for kind, name in zip(kinds, _COLUMNS, strict=True))
    parts = [f'<table class="figures"><tr>{head}</tr>']
    for section, own in groupby(rows, key=lambda row: row.section):
        parts.append(f'<tr class="section"><td colspan="{len(_COLUMNS)}">{html.escape(section)}</td></tr>')
        for row in own:
            cells = [html.escape(cell) for cell in _cells(row)]
            cells[1], cells[-1] = f"<small>{cells[1]}</small>", f"<small>{cells[-1]}</small>"
            parts.append(
                "<tr>" + "".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(kinds, cells, strict=True)) + "</tr>"
            )
    return "".join([*parts, "</table>"])


def _cells(row: Row) -> list[str]:
    return [row.name, row.features, row.better, *map(_number, (row.value, row.random, row.real, row.floor)), row.of]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _left_out(report: Mapping[str, Any]) -> list[str]:
    """What was requested and could not be measured, with the reason."""
    distances = report.get("reconstruction", {}).get("distances", {}) or report.get("generations", {}).get(
        "distances", {}
    )
    found = {"distances between sets": distances, "independent classifier": report.get("independent_classifier", {})}
    return [f"Left out: {name}: {section['left_out']}" for name, section in found.items() if "left_out" in section]


def _meanings(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Of the figures that the table has."""
    names = {row.name for row in rows}
    return [
        (name, text)
        for name, text in _MEANINGS.items()
        if name in names or any(other.startswith(f"{name} to ") for other in names)
    ]


def _curves(report: Mapping[str, Any]) -> str:
    curves = report.get("generations", {}).get("best_of_n")
    if not curves:
        return ""
    numbers, charts = curves["numbers"], []
    for measure, found in curves["measures"].items():
        lines = [Line("best-ranked", list(zip(numbers, found["top_ranked"], strict=True)))]
        if found["best"] != found["top_ranked"]:  # a ranker by this measure itself is perfect
            lines.append(Line("a perfect ranker", list(zip(numbers, found["best"], strict=True))))
        if found["real"] is not None:
            lines.append(Line("the photographs", [(numbers[0], found["real"]), (numbers[-1], found["real"])]))
        chart = line_chart(lines, x_name="candidates", x_doubles=True)
        errors = [error for error in found["standard_error"] if error is not None]
        error = f"; standard error up to {max(errors):.2g}" if errors else ""
        charts.append(chart_figure(chart, f"{measure_name(measure)}, {found['captions']} captions{error}"))
    return f"<h2>What ranking is worth: best of N</h2><p>{html.escape(_MEANING_OF_CURVES)}</p>{''.join(charts)}"


def _curve_table(curves: Mapping[str, Any]) -> list[str]:
    numbers = curves["numbers"]
    lines = [f"| best-ranked of | {' | '.join(map(str, numbers))} | photographs |", f"|{'---|' * (len(numbers) + 2)}"]
    for measure, found in curves["measures"].items():
        for label, key in ((measure_name(measure), "top_ranked"), ("... by a perfect ranker", "best")):
            if key == "top_ranked" or found["best"] != found["top_ranked"]:
                values = " | ".join(f"{value:.3g}" for value in found[key])
                lines.append(f"| {label} | {values} | {_number(found['real']) if key == 'top_ranked' else ''} |")
    return lines


def _pictures(out: Path, report: Mapping[str, Any]) -> str:
    generations = report.get("generations", {})
    files = [(generations.get("sheets", {}).get(key), text) for key, text in _SHEETS.items()]
    best_of, nearest = (generations.get(key, {}).get("sheet") for key in ("best_of_n", "nearest"))
    files.insert(1, (best_of, "The best-ranked of the first N candidates, a row a caption; last its photograph"))
    files.append((nearest, "Top-ranked images, each beside its nearest training photograph, with their distance"))
    shown = [file_figure(out.with_name(name), text) for name, text in files if name and out.with_name(name).is_file()]
    return f"<h2>Pictures</h2>{''.join(shown)}" if shown else ""
