"""`kodalle data`: captions from labels, preparing and checking folders, the drawn demo set.

Holds commands only; each calls a function of engine/data and prints its report. A user's mistake raises InputError, which
`kodalle` prints as one line, with exit code 2. `check` exits 1 when it finds errors.
"""

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from engine.data.ground import DEFAULT_GROUND
from engine.data.kfashion.caption_options import OPTION_HELP, CaptionScope, ListValues
from engine.files import check_file_place, write_json

if TYPE_CHECKING:
    from engine.data.check import CheckReport
    from engine.data.prepare import PrepareReport

app = typer.Typer(help="Labels to captions, crops and pairs; checks; the demo set.", no_args_is_help=True)

Labels = Annotated[list[Path], typer.Argument(help="K-Fashion label files (.json)", show_default=False)]
Source = Annotated[
    Path,
    typer.Argument(help="folder with K-Fashion labels and photos, or with name.jpg + name.txt", show_default=False),
]
Destination = Annotated[Path, typer.Argument(help="a folder that is new or empty", show_default=False)]
Workers = Annotated[int | None, typer.Option(help="processes; default: one a CPU core", min=1)]


@app.command("captions")
def captions(
    files: Labels,
    style: Annotated[bool, typer.Option(help=OPTION_HELP["style"])] = True,
    subject_once: Annotated[bool, typer.Option(help=OPTION_HELP["subject_once"])] = False,
    per_garment: Annotated[bool, typer.Option(help=OPTION_HELP["per_garment"])] = False,
    list_values: Annotated[ListValues, typer.Option(help=OPTION_HELP["list_values"])] = "all",
) -> None:
    """Prints the caption of each label file, one a line (an empty line for a label without attributes)."""
    from engine.data.kfashion.label_format import KFashionLabels

    labels = KFashionLabels(style=style, subject_once=subject_once, list_values=list_values)
    for file in files:
        lines = labels.captions(file, per_garment=per_garment)
        for line in lines:
            typer.echo(line)
        if not any(lines):
            typer.echo(f"{file}: has no labelled object", err=True)


@app.command("prepare")
def prepare(
    source: Source,
    destination: Destination,
    image_size: Annotated[int, typer.Option(help="side of the square images, in pixels")] = 256,
    image_format: Annotated[Literal["png", "jpg"], typer.Option(help="of the images written")] = "png",
    keep_aspect: Annotated[bool, typer.Option(help="pad crops to a square (published: stretch)")] = False,
    box_margin: Annotated[float, typer.Option(help="around boxes and outlines, as a share of their longer side")] = 0.0,
    box_origin: Annotated[
        Literal["top_left", "center"], typer.Option(help="the point that x and y of a box mean; K-Fashion: top_left")
    ] = "top_left",
    scale_boxes: Annotated[bool, typer.Option(help="photos were resized after labelling: scale the boxes")] = False,
    cut_out: Annotated[
        bool, typer.Option("--cut-out", help="cut along the labels' polygons, or the transparency of name.png")
    ] = False,
    ground: Annotated[
        str | None, typer.Option(help=f'colour around cut-outs, as "#rrggbb"; default: {DEFAULT_GROUND}')
    ] = None,
    keep_uncut: Annotated[
        bool, typer.Option("--keep-uncut", help="with --cut-out: use what has no outline as it is")
    ] = False,
    caption_scope: Annotated[CaptionScope, typer.Option(help=OPTION_HELP["caption_scope"])] = "garment",
    style: Annotated[bool, typer.Option(help=OPTION_HELP["style"])] = False,
    subject_once: Annotated[bool, typer.Option(help=OPTION_HELP["subject_once"])] = False,
    list_values: Annotated[ListValues, typer.Option(help=OPTION_HELP["list_values"])] = "all",
    validation_fraction: Annotated[
        float, typer.Option(help="share of photos held out, unless SOURCE has train/ and validation/")
    ] = 0.05,
    seed: Annotated[int, typer.Option(help="of that split")] = 42,
    max_bad: Annotated[float, typer.Option(help="stop when more than this share of the records is faulty")] = 0.05,
    strict: Annotated[bool, typer.Option("--strict", help="stop at the first faulty record")] = False,
    form: Annotated[Literal["labels", "plain"] | None, typer.Option(help="of SOURCE; default: detected")] = None,
    workers: Workers = None,
) -> None:
    """Crops and captions SOURCE into DESTINATION, the folder that training reads."""
    from engine.data.kfashion.label_format import KFashionLabels
    from engine.data.prepare import prepare as prepare_folder
    from engine.data.sources import PrepareOptions

    options = PrepareOptions(
        image_size=image_size,
        image_format=image_format,
        keep_aspect=keep_aspect,
        box_margin=box_margin,
        box_origin=box_origin,
        scale_boxes=scale_boxes,
        cut_out=cut_out,
        ground=ground,
        keep_uncut=keep_uncut,
        label_format=KFashionLabels(caption_scope, style, subject_once, list_values),
        validation_fraction=validation_fraction,
        seed=seed,
        max_bad=max_bad,
        form=form,
    )
    workers = workers or os.cpu_count() or 1
    report = prepare_folder(source, destination, options, strict=strict, workers=workers, progress=True)
    _print_prepared(report, destination)


@app.command("check")
def check(
    source: Source,
    json: Annotated[Path | None, typer.Option(help="write all findings to this file too")] = None,
    names: Annotated[int, typer.Option(help="how many records to name for each defect", min=1)] = 20,
    workers: Workers = None,
) -> None:
    """Lists every defective record of SOURCE; exit code 1 when there are errors."""
    if json is not None:
        check_file_place(json, field="--json")
    from engine.data.check import check as check_folder

    report = check_folder(source, workers=workers or os.cpu_count() or 1, progress=True)
    if json is not None:
        write_json(json, report.to_json())
    _print_checked(report, names)
    if report.errors:
        raise typer.Exit(1)


@app.command("make-demo")
def make_demo_set(
    destination: Destination,
    count: Annotated[int, typer.Option(help="photos to train on", min=1)] = 2000,
    seed: Annotated[int, typer.Option(help="of the images", min=0)] = 0,
    image_size: Annotated[int, typer.Option(help="side of the square images, in pixels")] = 64,
) -> None:
    """Draws the demo data set (images with K-Fashion labels) into DESTINATION."""
    from engine.data.synthetic.garments import make_demo

    report = make_demo(destination, count=count, seed=seed, image_size=image_size, progress=True)
    for name, value in asdict(report).items():
        typer.echo(f"{name.replace('_', ' ')}: {value}")


def _print_prepared(report: "PrepareReport", destination: Path) -> None:
    from engine.data.pairs import REPORT_FILE
    from engine.data.prepare import SET_ASIDE_FILE

    typer.echo(
        f"{report.records} records: {report.used} used, {sum(report.causes.values())} set aside, {report.bad} of them bad"
    )
    if report.options.cut_out:
        typer.echo(f"{report.cut_outs} of the used are cut out, on a ground of {report.options.ground}")
    typer.echo(f"{report.train} pairs to train on, {report.validation} for validation (split by {report.split})")
    for title, kinds in (("set aside", report.set_aside), ("used, but worth a look", report.found)):
        if kinds:
            typer.echo(f"{title}:")
        for kind, examples in kinds.items():
            record, reason = examples.first[0]
            typer.echo(f"  {kind}: {examples.count}, the first: {record}: {reason}")
    typer.echo(
        f"more examples are in {destination / REPORT_FILE}, all records set aside in {destination / SET_ASIDE_FILE}"
    )


def _print_checked(report: "CheckReport", names: int) -> None:
    read = f"{report.labels} {'label' if report.form == 'labels' else 'caption'} files, {report.images} images"
    if not report.findings:
        typer.echo(f"{read}: nothing found")
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from engine.data.check import DEFECTS

    table = Table("defect", "severity", "count", "what it is")
    for defect, count in report.counts.items():
        severity, description = DEFECTS[defect]
        table.add_row(defect, severity, str(count), escape(description))
    Console().print(table)
    for defect, count in report.counts.items():
        for finding in [finding for finding in report.findings if finding.defect == defect][:names]:
            typer.echo(f"{defect}  {finding.record}  {finding.detail}")
        if count > names:
            typer.echo(f"{defect}  … and {count - names} more (--names {count}, or --json FILE)")
    typer.echo(f"{read}: {len(report.errors)} errors, {len(report.warnings)} warnings")
