"""report.html and report.md of a whole training: one file each, readable without this program."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from engine.data.pairs import Pair, load_image
from engine.files import atomic_file, write_json
from engine.metrics.sheets import read_sheet
from engine.training.report import verdicts
from engine.training.report.charts import Line, line_chart
from engine.training.report.figures import CodeUse, StageLog
from engine.training.report.page import chart_figure, data_url, figure, page
from engine.training.report.verdicts import Verdict

STAGES = ("vqgan", "koclip", "kodalle")
_TITLES = {
    "vqgan": "VQGAN: images to tokens and back",
    "koclip": "KoCLIP: the ranker",
    "kodalle": "KoDALLE: image tokens from captions",
}
_SAMPLES = {
    "vqgan": "held-out images above, their reconstructions below",
    "koclip": "one row a held-out caption: the images that score highest, best first",
    "kodalle": "reconstructions of held-out images above, images generated for their captions below",
}
# name of a chart: (quantity in log.jsonl, name of its line); a chart without points is left out
_CHARTS: dict[str, dict[str, list[tuple[str, str]]]] = {
    "vqgan": {
        "error of reconstructions": [("validation_loss", "held out")],
        "training loss": [("loss", "training")],
        "share of the codebook in use": [("codebook_usage", "in a batch"), ("validation_codebook_usage", "held out")],
    },
    "koclip": {
        "loss": [("loss", "training"), ("validation_loss", "held out")],
        "the right caption wins": [("validation_recall_at_1", "held out")],
    },
    "kodalle": {
        "loss of image tokens": [("loss_image", "training"), ("validation_loss", "held out")],
        "loss of text tokens": [("loss_text", "training"), ("validation_loss_text", "held out")],
    },
}
_SHOWN_CAPTIONS = 24


@dataclass(frozen=True)
class ReportInput:
    """Everything that the report says.

    evaluation: as `kodalle evaluate` writes it; sheet is its grid of top-ranked images.
    choices: (what, value, reason) of the plan; commands: what to type next, with a comment each.
    choice: which model of the transformer's training was taken, and the scores of both where two were compared.
    """

    title: str
    logs: Mapping[str, StageLog]
    evaluation: Mapping[str, Any]
    sheet: Path | None
    held_out: Sequence[Pair]
    code_use: CodeUse
    choices: Sequence[tuple[str, str, str]]
    commands: Sequence[tuple[str, str]]
    choice: Mapping[str, Any]


def all_verdicts(given: ReportInput) -> list[Verdict]:
    """All verdicts, in the order of the stages."""
    evaluation = given.evaluation
    found = evaluation["reconstruction"]
    koclip, kodalle = evaluation["koclip"], evaluation["kodalle"]
    generations = evaluation.get("generations", {})
    scores = generations.get("koclip_score")
    ranker = verdicts.ranker(koclip["recall_at_1"], koclip["recall_among"], koclip["pairs"])
    found_verdicts = [
        verdicts.held_out(found["images"]),
        verdicts.captions_cut(kodalle["captions_cut"], kodalle["pairs"]),
        verdicts.reconstruction(found["psnr_db"]),
        verdicts.codebook(given.code_use.used, given.code_use.size, given.code_use.tokens),
        ranker,
        verdicts.transformer(kodalle["loss_image"], given.code_use.used),
        verdicts.best_step("the transformer", given.logs["kodalle"].validation(), given.choice),
        verdicts.by_oracle(generations["oracle"], generations["captions"]) if "oracle" in generations else None,
        verdicts.following(
            scores["real"],
            scores["real_of_another_caption"],
            scores["top_ranked"],
            scores["random"],
            captions=generations["captions"],
        )
        if scores and ranker.level in ("good", "fair")
        else None,
        verdicts.variety(generations.get("difference")),
    ]
    return [verdict for verdict in found_verdicts if verdict is not None]


def write_report(folder: Path, given: ReportInput) -> list[Verdict]:
    """Writes report.html and report.md into `folder`; returns the verdicts."""
    found_verdicts = all_verdicts(given)
    with atomic_file(folder / "report.html") as temporary:
        temporary.write_text(_html(given, found_verdicts), encoding="utf-8")
    with atomic_file(folder / "report.md") as temporary:
        temporary.write_text(markdown(given, found_verdicts), encoding="utf-8")
    write_json(folder / "verdicts.json", [verdict.__dict__ for verdict in found_verdicts])
    return found_verdicts


def verdict_lines(found_verdicts: Sequence[Verdict]) -> list[str]:
    """Markdown list items."""
    return [f"- {one.level}: {one.text}" + (f". Remedy: {one.remedy}" if one.remedy else "") for one in found_verdicts]


def markdown(given: ReportInput, found_verdicts: Sequence[Verdict]) -> str:
    """The report without curves and images."""
    choices = [f"| {name} | {value} | {reason} |" for name, value, reason in given.choices]
    commands = [f"{command}  # {comment}" for command, comment in given.commands]
    return "\n".join([
        f"# {given.title}", "", "## How good is it", "", *verdict_lines(found_verdicts), "",
        "## What to type next", "", "```sh", *commands, "```", "",
        "## What was chosen", "", "| what | choice | why |", "|---|---|---|", *choices, "",
        "Curves, samples and images of held-out captions are in report.html.", "",
    ])  # fmt: skip


def _html(given: ReportInput, found_verdicts: Sequence[Verdict]) -> str:
    escape = html.escape
    items = "".join(
        f'<li class="{one.level}">{escape(one.text)}'
        + (f"<br><small>remedy: {escape(one.remedy)}</small>" if one.remedy else "")
        + "</li>"
        for one in found_verdicts
    )
    commands = "\n".join(f"{command}  # {comment}" for command, comment in given.commands)
    choices = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(value)}</td><td>{escape(reason)}</td></tr>"
        for name, value, reason in given.choices
    )
    stages = "".join(_stage_html(stage, given.logs[stage]) for stage in STAGES)
    return page(
        given.title,
        f'<h2>How good is it</h2><ul class="verdicts">{items}</ul>'
        f"<h2>Held-out captions</h2><p>Left the real image, right the top-ranked generated one; chosen by the seed, not by "
        f"hand. No training saw them.</p>{_captions_html(given)}"
        f"<h2>What to type next</h2><pre>{escape(commands)}</pre>{stages}"
        f"<h2>What was chosen</h2><table>{choices}</table>",
    )


def _stage_html(stage: str, log: StageLog) -> str:
    figures = []
    for name, quantities in _CHARTS[stage].items():
        lines = [Line(label, log.scalars.get(key, [])) for key, label in quantities]
        figures.append(chart_figure(line_chart(lines, x_name="step"), name))
    for step, file in log.samples:
        with Image.open(file) as image:
            figures.append(figure(image.convert("RGB"), f"step {step:,}: {_SAMPLES[stage]}"))
    return f"<h2>{html.escape(_TITLES[stage])}</h2>{''.join(figures)}"


def _captions_html(given: ReportInput) -> str:
    generations = given.evaluation.get("generations", {})
    if given.sheet is None or not given.sheet.is_file() or not generations:
        return "<p>none were generated</p>"
    by_caption = {pair.captions[0]: pair for pair in reversed(given.held_out)}
    listed = generations["top_ranked"][:_SHOWN_CAPTIONS]
    parts = []
    for one, generated in zip(listed, read_sheet(given.sheet, len(listed)), strict=True):
        real = Image.fromarray(load_image(by_caption[one["caption"]], generated.width))
        parts.append(
            f'<figure class="pair"><img src="{data_url(real)}" alt="real"><img src="{data_url(generated)}" '
            f'alt="generated"><figcaption>{html.escape(one["caption"])}</figcaption></figure>'
        )
    return "".join(parts)
