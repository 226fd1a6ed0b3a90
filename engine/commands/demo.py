"""`kodalle demo`: `kodalle train` on a drawn data set, with sizes that were tried on it and an oracle that reads its images.

    <out>/photos/       drawn images with K-Fashion labels (engine/data/synthetic/garments.py)
    <out>/report.json   share of images with the right colour, category, sleeve; seconds by step

and everything that engine/commands/train_pictures.py writes. Held-out captions are combinations of category, colour and sleeve
that no training image shows.
"""

import json
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from engine.commands.steps import Steps
from engine.commands.train import check_deepspeed
from engine.commands.train_pictures import train_pictures
from engine.commands.train_plan import Preset, Request
from engine.data.pairs import Pair
from engine.data.synthetic.garments import make_demo
from engine.data.synthetic.oracle import read, score
from engine.errors import InputError
from engine.files import write_json
from engine.training.plan.sizes import STAGES


def run_demo(
    out: Path,
    configs: Path,
    *,
    images: int = 5000,
    held_out: int = 72,
    candidates: int = 16,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Runs every step that is left and writes report.json.

    Args:
        out: folder of the demo.
        configs: folder with vqgan.yaml, koclip.yaml and kodalle.yaml.
        images: drawn for training.
        held_out: captions that are scored.
        candidates: images a caption.
        overrides: `stage.key=value`, e.g. `vqgan.loop.steps=20` (the tests' tiny demo).

    Raises:
        InputError: a step failed; its own message is above.
    """
    check_deepspeed()
    for stage in STAGES:
        if not (configs / f"{stage}.yaml").is_file():
            raise InputError("--configs", configs, f"has no {stage}.yaml: give configs/demo of the source repository")
    photos = out / "photos"
    if not photos.is_dir():
        steps = Steps({"data": f"drawing {images} images"})
        steps.run("data", lambda: make_demo(photos, count=images, seed=1, held_out=held_out, progress=True))
    preset = Preset(configs, box_margin=0.04, cut_out=False, captions=held_out, candidates=candidates)
    request = Request(photos, out, tuple(overrides), preset=preset, title="A model of drawn garments")
    from engine.device import pick_device
    from engine.facts import facts

    seconds = train_pictures(request, oracle=right_of)
    found = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))["generations"]
    report = {
        "held_out_captions": found["captions"],
        "candidates": found["candidates"],
        "seed": found["seed"],
        "sampling_params": found["sampling_params"],
        "share_right": found["oracle"],
        "seconds": seconds,
        "machine": facts(pick_device("")),
    }
    write_json(out / "report.json", report)
    return report


def right_of(pair: Pair, images: Sequence[Image.Image]) -> list[dict[str, bool]]:
    """Whether each image shows the colour, category and sleeve that the pair's label states."""
    return score([read(image) for image in images], [pair.attributes] * len(images))


def shipped_configs() -> Path:
    """configs/demo of the checkout; of an installed wheel, where its data files lie."""
    checkout = Path(__file__).parents[2] / "configs" / "demo"
    return checkout if checkout.is_dir() else Path(sysconfig.get_path("data"), "share/kodalle-engine/configs/demo")
