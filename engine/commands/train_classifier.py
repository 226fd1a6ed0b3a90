"""`kodalle train-classifier`: an independent classifier of a prepared folder's caption classes, for `kodalle evaluate`."""

from pathlib import Path
from typing import Annotated

import typer

from engine.commands.argument_checks import check_device, check_pairs
from engine.commands.heavy_imports import heavy_imports


def train_classifier(
    pairs: Annotated[Path, typer.Argument(help="prepared folder; its training split is learnt", show_default=False)],
    out: Annotated[Path, typer.Option(help="folder for the classifier; replaces one that is there")],
    views: Annotated[
        int, typer.Option(min=1, max=100, help="of each photograph: mirrored, shifted, cropped, blurred")
    ] = 4,
    seed: Annotated[int, typer.Option(min=0, help="of the views")] = 1,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …; default: cuda when there is one")] = "",
) -> None:
    """Trains the classifier that `kodalle evaluate --independent-classifier` uses, and measures it on held-out photographs."""
    check_device(device)
    check_pairs(pairs)
    with heavy_imports():
        from engine.data.pairs import load_pairs
        from engine.device import fit_to_machine, pick_device
        from engine.metrics.classifier_training import train_classifier as train
        from engine.metrics.independent_classifier import LEAST_ACCURACY, check_classifier_place, save_classifier
        from engine.progress import PhaseBars

    check_classifier_place(out)
    fit_to_machine()
    with PhaseBars() as bars:
        classifier, record = train(
            load_pairs(pairs), views=views, seed=seed, device=pick_device(device), on_progress=bars.update
        )
    save_classifier(out, classifier, record)
    held = record["held_out"]
    for row in held["classes"]:
        print(f"  {row['class']}: {row['right']} of {row['images']}")
    print(
        f"{out}: names {held['accuracy']:.1%} of {held['images']} held-out photographs rightly, {held['balanced_accuracy']:.1%} "
        f"averaged over classes; the commonest class alone is {held['majority']:.1%}"
    )
    if not held["usable"]:
        print(f"Below {LEAST_ACCURACY:.0%} its word is worth nothing: `kodalle evaluate` leaves it out.")
