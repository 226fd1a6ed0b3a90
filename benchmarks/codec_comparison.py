"""VAE, VQ-VAE and VQGAN beside each other: the three codecs that DALL-E's descendants chose between, trained for equal minutes.

    python benchmarks/codec_comparison.py clothing --pairs data/clothing64 --minutes 8     # photographs, cut out, 64 pixels
    python benchmarks/codec_comparison.py demo --minutes 5                                 # the demo's drawn garments, 48 pixels

VAE is DALL-E's own, the dVAE (`stage: dvae`, logit-Laplace likelihood, relaxed codes). VQ-VAE is `stage: vqgan` with the squared
error alone, VQGAN the same network with perceptual distance and discriminator from 60 % of the steps on. All have as many tokens
an image and entries in the codebook, batches of 8 and the same images.

Minutes are a processor's, on one thread, since the machines of such runs are shared: two short trainings give the seconds of a
step and of the start, and the steps follow. What a training took in the end, start, validation and export in it, is
`processor_minutes`. Measured on held-out images: the error of reconstructions from hard codes; entries of the codebook in use, and
their perplexity; `feature_distance`, engine.models.perceptual's in EfficientNet-Lite0, which the VQGAN alone minimises; `sharpness`,
the mean absolute Laplacian over that of the images themselves.

Writes benchmarks/results/codec_comparison/<set>.json and .png (the first held-out images above what each codec makes of them), after
each training. Runs lie in runs/codec_comparison/ (`--runs`) and go on after an interruption; `--quick` is a try and no record.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from machine_facts import REPOSITORY, child_environment, print_document
from PIL import Image
from text_table import table
from torch import Tensor
from training.short_run import short_run

from engine.data.pairs import load_pairs
from engine.data.prepare import prepare
from engine.data.sources import PrepareOptions
from engine.data.synthetic.garments import make_demo
from engine.facts import facts
from engine.files import read_json, write_json
from engine.metrics.parts import EvaluationRun
from engine.metrics.reconstruction import reconstruction_error
from engine.models.efficientnet_lite0 import load_efficientnet_lite0
from engine.models.folder import load_part
from engine.models.image_codec import ImageCodec
from engine.models.perceptual import Lite0Distance
from engine.pipeline.image_encoding import save_png
from engine.pipeline.image_files import contact_sheet, to_uint8

Row = dict[str, Any]
BATCH, SHOWN = 8, 10
CALIBRATION_STEPS = (3, 12)
_CPU = torch.device("cpu")
_VQGAN = {"codebook_reset.start_step": 0.13, "codebook_reset.reset_every": 1 / 75}  # shares of the steps
_PIXELS_ALONE = {"loss.pixel": "l2", "loss.perceptual": "none", "loss.disc_weight": "0", "loss.feature_weight": "0"}
_ADVERSARIAL = {  # as configs/clothing/vqgan.yaml: the demo's own codec has the pixels' error alone
    "loss.perceptual": "efficientnet-lite0",
    "loss.perceptual_weight": "0.4",
    "loss.disc_weight": "0.3",
    "loss.feature_weight": "1.0",
    "loss.disc_channels": "32",
}
_CLOTHING = {
    "model.image_size": "64",
    "model.base_channels": "16",
    "model.codebook_size": "512",
    "loss.disc_channels": "32",
}
# Of each set and codec: its config, what differs from it, and what follows from the steps, as a share of them.
SETS: dict[str, dict[str, tuple[str, dict[str, str], dict[str, float]]]] = {
    "clothing": {
        "dVAE": ("configs/clothing/dvae.yaml", {}, {}),
        "VQ-VAE": ("configs/clothing/vqgan.yaml", _CLOTHING | _PIXELS_ALONE, _VQGAN),
        "VQGAN": ("configs/clothing/vqgan.yaml", _CLOTHING, _VQGAN | {"loss.disc_start": 0.6}),
    },
    "demo": {
        "dVAE": ("configs/demo/dvae.yaml", {}, {}),
        "VQ-VAE": ("configs/demo/vqgan.yaml", _PIXELS_ALONE, _VQGAN),
        "VQGAN": ("configs/demo/vqgan.yaml", _ADVERSARIAL, _VQGAN | {"loss.disc_start": 0.6}),
    },
}  # fmt: skip


def main() -> int:
    arguments = _arguments()
    pairs = arguments.pairs or _drawn_garments(arguments.runs)
    document: Row = {
        "benchmark": "codec_comparison", **facts(_CPU), "set": arguments.set, "pairs": pairs.name,
        "minutes": arguments.minutes, "threads": 1, "codecs": {},
    }  # fmt: skip
    codecs: dict[str, ImageCodec] = {}
    for name, (config, changes, shares) in SETS[arguments.set].items():
        run = arguments.runs / arguments.set / name.lower()
        row = train_for(run, REPOSITORY / config, changes, shares, pairs=pairs, minutes=arguments.minutes)
        codecs[name] = load_part(run / "run" / "model", "vqgan")
        document["codecs"][name] = {"config": config, "changes": changes, **row, **measured(codecs[name], pairs)}
        write_json(arguments.out / f"{arguments.set}.json", document)
    save_png(arguments.out / f"{arguments.set}.png", _sheet(codecs, pairs), {"codecs": list(codecs)})
    print(_table(document))
    print_document(document)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=SETS)
    parser.add_argument("--pairs", type=Path, help="a prepared folder; of the demo: drawn where it is missing")
    parser.add_argument("--minutes", type=float, default=8.0, help="of a processor, a codec")
    parser.add_argument("--runs", type=Path, default=REPOSITORY / "runs" / "codec_comparison")
    parser.add_argument("--out", type=Path, help="folder (benchmarks/results/codec_comparison)")
    parser.add_argument("--quick", action="store_true", help="a dozen steps each; figures to runs/benchmarks/")
    arguments = parser.parse_args()
    if arguments.pairs is None and arguments.set != "demo":
        parser.error(
            "--pairs: give a prepared folder, e.g. data/clothing64 (configs/clothing/dvae.yaml says how to make it)"
        )
    if arguments.quick:
        arguments.minutes = 0.0
        arguments.runs = arguments.runs / "quick"
    root = REPOSITORY / "runs" / "benchmarks" if arguments.quick else REPOSITORY / "benchmarks" / "results"
    arguments.out = arguments.out or root / "codec_comparison"
    return arguments


def train_for(
    run: Path, config: Path, changes: dict[str, str], shares: dict[str, float], *, pairs: Path, minutes: float
) -> Row:
    """Trains one codec in `<run>/run`; steps, images, and the processor's minutes. Read again where it has ended.

    Args:
        minutes: 0: the least steps.
    """
    stored = run / "training.json"
    if stored.is_file():
        return dict(read_json(stored, field="--runs", remedy="remove it"))
    plan = run / "plan.json"
    if not plan.is_file():  # how long steps take is measured once: an interrupted training goes on with the same steps
        few, many = (
            _train(run / f"calibration-{steps}", config, overrides(changes, shares, steps, pairs=pairs))
            for steps in CALIBRATION_STEPS
        )
        step_s = (many - few) / (CALIBRATION_STEPS[1] - CALIBRATION_STEPS[0])
        start_s = max(0.0, few - CALIBRATION_STEPS[0] * step_s)
        steps = max(CALIBRATION_STEPS[1], round((60 * minutes - start_s) / step_s))
        write_json(plan, {"steps": steps, "step_s": step_s, "start_s": start_s})
    planned = dict(read_json(plan, field="--runs", remedy="remove it"))
    started_s = time.monotonic()
    seconds = _train(run / "run", config, overrides(changes, shares, planned["steps"], pairs=pairs))
    row = {
        "steps": planned["steps"], "training_images": planned["steps"] * BATCH, "processor_s_per_step": planned["step_s"],
        "processor_minutes": seconds / 60, "wall_minutes": (time.monotonic() - started_s) / 60,
    }  # fmt: skip
    write_json(stored, row)
    return row


def overrides(changes: dict[str, str], shares: dict[str, float], steps: int, *, pairs: Path) -> dict[str, str]:
    """`key=value` of a training of so many steps."""
    follows = {name: str(max(1, round(share * steps))) for name, share in shares.items()}
    known = {"data.pairs": str(pairs), "loop.validation_batches": "4"}
    run = short_run(steps, batch=BATCH, checkpoint_every=max(100, steps // 4), warmup=steps // 50)
    return changes | follows | known | run


def _train(run: Path, config: Path, settings: dict[str, str]) -> float:
    """One training, resumed where it was; seconds of a processor, of all its pieces."""
    spent = run.with_name(f"{run.name}-pieces.json")
    command = [sys.executable, str(REPOSITORY / "engine" / "train.py"), "--config", str(config), f"run={run}"]
    command += [f"{name}={value}" for name, value in settings.items()]
    environment = child_environment() | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(command, cwd=REPOSITORY, env=environment)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    earlier = read_json(spent, field="--runs", remedy="remove it") if spent.is_file() else []
    pieces = [*earlier, usage.ru_utime + usage.ru_stime]
    write_json(spent, pieces)
    if child.returncode:
        raise SystemExit(f"{config.name} ended with exit code {child.returncode}: run the same command to go on")
    return float(sum(pieces))


@torch.no_grad()
def measured(codec: ImageCodec, pairs: Path) -> Row:
    """Figures of a codec on the held-out images."""
    batches = _held_out(codec, pairs)
    network = Lite0Distance(load_efficientnet_lite0(field="feature_distance"))
    distances, sharpness, originals = [], 0.0, 0.0
    for images in batches:
        decoded = codec.decode(codec.encode(images))
        distances += network(2 * decoded - 1, 2 * images - 1).tolist()
        sharpness, originals = sharpness + _laplacian(decoded), originals + _laplacian(images)
    found = reconstruction_error(codec, batches)
    return {
        "parameters": sum(parameter.numel() for parameter in codec.parameters()),
        "image_tokens": codec.config.image_seq_len, "codebook_size": codec.config.codebook_size, **found,
        "codes_in_use": round(found["codebook_used"] * codec.config.codebook_size),
        "feature_distance": sum(distances) / len(distances), "sharpness": sharpness / originals,
    }  # fmt: skip


def _held_out(codec: ImageCodec, pairs: Path) -> list[Tensor]:
    """The held-out images in batches, (B, 3, S, S) in [0, 1]."""
    held = load_pairs(pairs).validation
    run = EvaluationRun(_CPU, seed=0, batch_size=32, on_progress=lambda *_: None)
    return list(run.images(held, codec.config.image_size, "images"))


def _laplacian(images: Tensor) -> float:
    """Sum over the images of the mean absolute Laplacian."""
    kernel = torch.tensor(
        [[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]], dtype=images.dtype, device=images.device
    )
    edges = F.conv2d(images.flatten(0, 1)[:, None], kernel[None, None])
    return float(edges.abs().mean()) * len(images)


@torch.no_grad()
def _sheet(codecs: dict[str, ImageCodec], pairs: Path) -> Image.Image:
    """The first held-out images, and below them what each codec makes of them."""
    images = _held_out(next(iter(codecs.values())), pairs)[0][:SHOWN]
    rows = {"image": images} | {name: codec.decode(codec.encode(images)) for name, codec in codecs.items()}
    shown = [Image.fromarray(pixels.numpy()) for row in rows.values() for pixels in to_uint8(row)]
    labels = [name for name in rows for _ in images]
    return contact_sheet("", shown, labels, columns=len(images), scale=2)


def _drawn_garments(runs: Path) -> Path:
    """The demo's drawings, 2,000 to train on, as pairs."""
    pairs = runs / "demo-pairs"
    if not (pairs / "pairs.jsonl").is_file():
        photos = runs / "demo-photos"
        if not photos.is_dir():
            make_demo(photos, count=2000, seed=1)
        prepare(photos, pairs, PrepareOptions(image_size=48, keep_aspect=True, box_margin=0.04), workers=1)
    return pairs


def _table(document: Row) -> str:
    columns = ["codec", "minutes", "steps", "PSNR, dB", "feature distance", "sharpness", "codes in use", "perplexity"]
    rows: list[Sequence[str]] = [
        [name, f"{row['processor_minutes']:.1f}", f"{row['steps']:,}", f"{row['psnr_db']:.1f}", f"{row['feature_distance']:.2f}",
         f"{row['sharpness']:.2f}", f"{row['codes_in_use']} of {row['codebook_size']}", f"{row['codebook_perplexity']:.0f}"]
        for name, row in document["codecs"].items()
    ]  # fmt: skip
    return table(f"{document['set']}: {document['pairs']}", columns, [list(row) for row in rows])


if __name__ == "__main__":
    sys.exit(main())
