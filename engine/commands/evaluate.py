"""`kodalle evaluate`: measures a model folder on held-out pairs."""

from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    model: Annotated[Path, typer.Argument(help="model folder; all of its parts are measured")],
    pairs: Annotated[Path, typer.Argument(help="prepared folder; its validation split is used")],
    out: Annotated[Path, typer.Option(help="JSON file to write; sheets of the top-ranked images go beside it")] = Path(
        "evaluation.json"
    ),
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
        int, typer.Option(min=0, help="generations for FID, KID and nearest training photographs; 0: none")
    ] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …; default: cuda when there is one")] = "",
) -> None:
    """Measures a model on held-out pairs: reconstruction error, losses, KoCLIP recall@1/5, its generations."""
    from engine.metrics.evaluate import evaluate_to_file

    evaluate_to_file(
        model,
        pairs,
        out,
        generations=generations,
        candidates=candidates,
        seed=seed,
        device=device,
        independent_classifier=independent_classifier,
        partial_captions=partial_captions,
        distance_images=distance_images,
    )
