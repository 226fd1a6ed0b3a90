"""`kodalle evaluate`: measures a model folder on held-out pairs."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from engine.commands.argument_checks import check_device, check_model, check_pairs
from engine.commands.heavy_imports import heavy_imports
from engine.errors import InputError
from engine.files import check_file_place

if TYPE_CHECKING:
    from engine.metrics.evaluate import MetricName

_NAMES = "reconstruction,likelihood,retrieval,generations,distances,best-of-n"


def evaluate(
    model: Annotated[Path, typer.Argument(help="model folder; all of its parts are measured")],
    pairs: Annotated[Path, typer.Argument(help="prepared folder; its validation split is used")],
    out: Annotated[
        Path, typer.Option(help="JSON file to write; the report and sheets of the top-ranked images go beside it")
    ] = Path("evaluation.json"),
    metrics: Annotated[
        str, typer.Option(help=f"some of {_NAMES}; default: all that the other options give numbers for")
    ] = "",
    generations: Annotated[int, typer.Option(min=0, help="held-out captions to generate images for; 0: none")] = 40,
    candidates: Annotated[int, typer.Option(min=1, max=1024, help="images for each caption")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="same seed, same captions, same images")] = 7,
    independent_classifier: Annotated[
        Path | None, typer.Option(help="folder of `kodalle train-classifier`: do images show the requested class?")
    ] = None,
    partial_captions: Annotated[
        bool, typer.Option("--partial-captions", help="leave sentences of the captions out at random")
    ] = False,
    distance_images: Annotated[
        int,
        typer.Option(
            min=0,
            help="generations for FID, KID, precision, recall, Inception Score and nearest training photographs; 0: none",
        ),
    ] = 0,
    inception: Annotated[
        Path | None,
        typer.Option(
            help="pt_inception-2015-12-05-6726825d.pth: distances in its features; default: EfficientNet-Lite0's"
        ),
    ] = None,
    clip: Annotated[
        Path | None, typer.Option(help="folder of a CLIPModel, or a model folder with a KoCLIP: scores the images, too")
    ] = None,
    clip_english: Annotated[
        bool, typer.Option("--clip-english", help="the CLIP reads the captions in English (K-Fashion's form)")
    ] = False,
    best_of: Annotated[
        int, typer.Option(min=0, max=1024, help="candidates for the curve of best-of-N, e.g. 96; 0: none")
    ] = 0,
    best_of_captions: Annotated[int, typer.Option(min=1, help="captions that the curve is averaged over")] = 12,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …; default: cuda when there is one")] = "",
) -> None:
    """Measures a model on held-out pairs: reconstruction, losses, recall, its generations, distances between sets; writes a report."""
    if inception is not None and not distance_images:
        raise InputError("--inception", inception, "is what distances are measured in: give --distance-images, too")
    if clip_english and clip is None:
        raise InputError("--clip-english", True, "is for the captions of --clip: give one, or leave it out")
    for name in filter(None, metrics.split(",")):
        if name.strip() not in _NAMES.split(","):
            raise InputError("--metrics", name.strip(), f"is none: give some of {_NAMES}, with commas between")
    check_file_place(out, field="--out", beside=".png")
    check_device(device)
    for option, given in {"--independent-classifier": independent_classifier, "--clip": clip}.items():
        if given is not None and not given.is_dir():
            raise InputError(option, given, "no such folder")
    if inception is not None and not inception.is_file():
        raise InputError("--inception", inception, "no such file")
    check_model(model)
    check_pairs(pairs)
    with heavy_imports():
        from engine.device import pick_device
        from engine.metrics.evaluate import evaluate_to_file
        from engine.training.report.evaluation_report import write_evaluation_report

    chosen = pick_device(device)
    report = evaluate_to_file(
        model,
        pairs,
        out,
        metrics=cast("list[MetricName]", [name.strip() for name in metrics.split(",")]) if metrics else None,
        generations=generations,
        candidates=candidates,
        seed=seed,
        device=device,
        independent_classifier=independent_classifier,
        partial_captions=partial_captions,
        distance_images=distance_images,
        feature_encoder=None if inception is None else _inception(inception, chosen),
        clip=None if clip is None else _clip(clip, chosen, pairs if clip_english else None),
        best_of=best_of,
        best_of_captions=best_of_captions,
    )
    print(f"report: {write_evaluation_report(out, report)}")


def _inception(path: Path, device: Any) -> Any:
    from engine.interop.inception_reader import read_inception
    from engine.metrics.inception_features import InceptionEncoder

    found = read_inception(path)
    if not found.is_published:
        print(f"note: {path} is not the published file: its figures are named inception_other, no paper's compare")
    return InceptionEncoder(found.network, sha256=found.sha256, is_published=found.is_published, device=device)


def _clip(folder: Path, device: Any, pairs: Path | None) -> Any:
    """Args: pairs: whose captions are to be read in English."""
    from engine.data.formats import grammar_of
    from engine.data.pairs import load_pairs
    from engine.interop.clip_scorer import open_clip_scorer

    english = None
    if pairs is not None:
        english = grammar_of(pair.captions[0] for pair in load_pairs(pairs).validation)
        if english is None:
            raise InputError("--clip-english", pairs, "has captions whose form is not known: leave it out")
    return open_clip_scorer(folder, device, english=english)
