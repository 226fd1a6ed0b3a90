"""DALL-E's near-central crops of training images and a reproduction's variant of them, beside shifts and nothing, at equal steps.

    python benchmarks/crop_trials.py data/clothing64

`dalle` and `dalle-prototype` are values of `data.crop` (engine/data/near_central_crop.py). The pairs' images are to be larger than
`--image-size`, or crops have no room: the paper's go to 9/8 of it. Each variant trains the small transformer of
benchmarks/unseen_words.py, with a WordPiece of the captions, for the same steps and seeds. Beside each image as it is,
`VIEWS` augmented ones are encoded, by the variant's rule; `none` has the image alone.

What counts is the loss of the image tokens of held-out images, resized and not cropped, the same for all; a variant's difference to
`none` has the standard error of its mean over images, of the seeds' mean. Cropping resamples also what it does not move, so
a variant's own validation would be on other tokens.

Runs lie in `--runs`, one a variant and seed, and are read again. Stores benchmarks/results/crop_trials/<pairs>.json after each seed,
prints a table and the document.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine_facts import REPOSITORY, print_document, stored_path
from text_table import table
from torch import Tensor
from training_minutes import stage_minutes
from unseen_words import SMALL, codec_for, image_losses
from unseen_words import VARIANTS as VOCABULARIES

from engine.data.pairs import Pair, load_image, load_pairs
from engine.facts import facts
from engine.files import write_json
from engine.models.folder import load_folder_tokenizer, load_part

VIEWS = 3
VARIANTS: dict[str, dict[str, object]] = {
    "none": {},
    "shifted": {"augmented_views": VIEWS, "augment_shift": "{shift}"},
    "dalle": {"augmented_views": VIEWS, "data.crop": "dalle"},
    "dalle-prototype": {"augmented_views": VIEWS, "data.crop": "dalle-prototype"},
}
_SETTINGS: dict[str, object] = {**SMALL, **VOCABULARIES["captions, WordPiece"]}

Row = dict[str, Any]


def main() -> int:
    arguments = _arguments()
    held = load_pairs(arguments.pairs).validation
    codec = codec_for(arguments)
    tokens = _tokens(codec, held, arguments.image_size)
    document: Row = {
        "benchmark": "crop_trials", **facts(torch.device("cpu")),
        "config": {
            "pairs": stored_path(arguments.pairs), "codec": stored_path(arguments.codec),
            "image_size": arguments.image_size, "steps": arguments.steps, "seeds": arguments.seeds,
            "held_out": len(held), "settings": _SETTINGS, "variants": VARIANTS,
        },
        "runs": [],
    }  # fmt: skip
    losses: dict[str, list[Tensor]] = {}
    for seed in arguments.seeds:
        for variant in VARIANTS:
            run = train(arguments, variant, seed, codec)
            model, tokenizer = load_part(run / "model", "transformer"), load_folder_tokenizer(run / "model")
            with torch.no_grad():
                found = image_losses(model, tokenizer, [pair.captions[0] for pair in held], tokens)
            losses.setdefault(variant, []).append(found)
            document["runs"].append(
                {"variant": variant, "seed": seed, **stage_minutes(run), "loss_image": float(found.mean())}
            )
        document["variants"] = summary(losses)
        write_json(arguments.out / f"{arguments.pairs.name}.json", document)
    print(_table(document))
    print_document(document)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path, help="prepared folder of images larger than --image-size")
    parser.add_argument("--codec", type=Path, default=REPOSITORY / "models" / "clothing")
    parser.add_argument("--image-size", type=int, default=32, help="pixels of the model; multiple of 8")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--runs", type=Path, default=REPOSITORY / "runs" / "crop_trials")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks" / "results" / "crop_trials")
    return parser.parse_args()


@torch.no_grad()
def _tokens(codec: Path, pairs: tuple[Pair, ...], image_size: int) -> Tensor:
    """(N, S) of the images as they are, resized."""
    images = torch.from_numpy(np.stack([load_image(pair, image_size) for pair in pairs]))
    network = load_part(codec, "vqgan")
    return torch.cat([network.encode(part.permute(0, 3, 1, 2).float() / 255) for part in images.split(32)])


def overrides(arguments: argparse.Namespace, variant: str, seed: int, run: Path) -> dict[str, object]:
    """Config keys and values of a variant's training, but for its codec."""
    once = dict.fromkeys(
        ("loop.steps", "loop.validate_every", "loop.sample_every", "loop.checkpoint_every"), arguments.steps
    )
    settings = _SETTINGS | VARIANTS[variant] | {"run": run, "seed": seed, "data.pairs": arguments.pairs} | once
    return {name: arguments.image_size // 16 if value == "{shift}" else value for name, value in settings.items()}


def train(arguments: argparse.Namespace, variant: str, seed: int, codec: Path) -> Path:
    """The run of a variant; trains it if it has not ended."""
    run: Path = arguments.runs / f"{variant}-{seed}"
    if not (run / "model").is_dir():
        settings = overrides(arguments, variant, seed, run) | {
            "vqgan": codec, "model.image_grid_size": load_part(codec, "vqgan").config.grid_size,
        }  # fmt: skip
        config = REPOSITORY / "configs" / "clothing" / "kodalle-bpe.yaml"
        command = [sys.executable, str(REPOSITORY / "engine" / "train.py"), "--config", str(config)]
        command += [f"{name}={value}" for name, value in settings.items()]
        subprocess.run(command, cwd=REPOSITORY, env={"DS_ACCELERATOR": "cpu"} | dict(os.environ), check=True)
    return run


def summary(losses: dict[str, list[Tensor]]) -> dict[str, Row]:
    """Of each variant's losses, (N,) a seed: their mean, each seed's, and the mean difference to `none` over the same images."""
    means = {variant: torch.stack(own).mean(0) for variant, own in losses.items()}
    found: dict[str, Row] = {}
    for variant, own in losses.items():
        difference = means[variant] - means["none"]
        found[variant] = {
            "loss_image": float(means[variant].mean()),
            "by_seed": [float(one.mean()) for one in own],
            "minus_none": float(difference.mean()),
            "standard_error": float(difference.std() / len(difference) ** 0.5),
        }
    return found


def _table(document: Row) -> str:
    rows = [
        [name, f"{row['loss_image']:.3f}", f"{row['minus_none']:+.3f} ± {row['standard_error']:.3f}",
         " / ".join(f"{loss:.3f}" for loss in row["by_seed"])]
        for name, row in document["variants"].items()
    ]  # fmt: skip
    steps = document["config"]["steps"]
    return table(f"{steps} steps", ["views", "held-out loss", "minus none", "by seed"], rows)


if __name__ == "__main__":
    sys.exit(main())
