"""`kodalle calibrate`: what a model folder says of its captions and scores, renewed from its pairs."""

from pathlib import Path
from typing import Annotated

import typer

from engine.commands.argument_checks import check_device, check_model, check_pairs
from engine.commands.heavy_imports import heavy_imports


def calibrate(
    model: Annotated[Path, typer.Argument(help="model folder with a transformer; its files are renewed")],
    pairs: Annotated[Path, typer.Argument(help="prepared folder that it was trained on")],
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …; default: cuda when there is one")] = "",
) -> None:
    """Writes the words that a model knows, their synonyms and the scores of real pairs into its folder.

    `kodalle train PHOTOS` has done so. Needed for models joined by hand, after another ranker, and for older folders.
    """
    check_device(device)
    check_pairs(pairs)
    check_model(model, "transformer", "vqgan")
    with heavy_imports():
        from engine.metrics.calibration import calibrate as renew
        from engine.models.real_scores import REAL_SCORES_FILE
        from engine.progress import PhaseBars

    with PhaseBars() as bars:
        guide, scores = renew(model, pairs, device=device, on_progress=bars.update)
    print(f"{model / 'captions.json'}  {len(guide.words):,} words, {len(guide.synonyms):,} synonyms")
    if scores is None:
        print("note: the model has no ranker, so there are no scores of real pairs")
    else:
        table = scores.percentiles
        print(
            f"{model / REAL_SCORES_FILE}  {scores.pairs:,} real pairs: half score more than {table[50]:.3f}, one in ten more than "
            f"{table[90]:.3f}"
        )
