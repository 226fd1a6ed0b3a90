"""AttnGAN beside the transformer, for equal minutes: the documents compared the two on 110,000 pictures and kept DALL-E.

    python benchmarks/attngan_comparison.py data/clothing64 --independent-classifier runs/clothing/classifier

`KoDALLE` is this project's own pipeline, `kodalle train` on the pairs with the steps of `--steps`: VQGAN, KoCLIP, transformer. `AttnGAN` is
benchmarks/baselines/attngan.py, trained for the minutes of a processor that the three trainings took, encoding of tokens and start of
processes in them; one thread each. Their images have the pairs' 64 pixels.

Measured for the same held-out captions, `--candidates` images of each: the colour read from the pixels and the class by the independent
classifier, of a random image and of the one that a model's own ranker puts first (KoCLIP; AttnGAN's matching model), beside the
photographs; FID on EfficientNet-Lite0's features of `--distance-images` images, as many of a caption as it has photographs, beside as many
training photographs. Both models were trained with the help of that network (perceptual distance and ranker; matching loss).

Runs lie in `--runs`, go on after an interruption, and what has ended is read again. `--only` trains one of the two and ends. Writes
benchmarks/results/attngan/<pairs>.json and .png: the first captions of the seed's order, top-ranked images, none chosen by hand.
"""

import argparse
import os
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before DeepSpeed is imported

import numpy as np
import torch
from baselines.attngan import AttnGan, train_attngan
from machine_facts import REPOSITORY, print_document, stored_path
from PIL import Image
from text_table import table
from torch import Tensor
from training_minutes import stage_minutes

from engine.commands.train_pictures import train_pictures
from engine.commands.train_plan import Request
from engine.data.caption_classes import find_caption_classes
from engine.data.pairs import Pair, Pairs, load_image, load_pairs
from engine.errors import InputError
from engine.facts import facts
from engine.files import read_json, write_json
from engine.metrics.agreement import ImageReader, Right, classifier_trust, colour_names
from engine.metrics.features import ImageFeatures, joined
from engine.metrics.fid import feature_distances
from engine.metrics.independent_classifier import load_classifier
from engine.metrics.lite0_features import Lite0Encoder, Lite0HeadEncoder
from engine.metrics.parts import EvaluationRun
from engine.pipeline.image_encoding import save_png
from engine.pipeline.image_files import captioned_sheet
from engine.pipeline.pipeline import Pipeline

MODELS = ("KoDALLE", "AttnGAN")
STAGES = ("vqgan", "koclip", "kodalle")
SHOWN, COLUMNS = 20, 10
_IMAGE_SIZE, _AT_ONCE = 64, 128
_CPU = torch.device("cpu")

Row = dict[str, Any]


@dataclass(frozen=True)
class Candidates:
    """Images of one caption, (n, S, S, 3) uint8 in the order of their numbers, and the scores of the model's own ranker."""

    images: np.ndarray
    scores: Sequence[float]

    @property
    def order(self) -> list[int]:
        """Numbers, best first."""
        return sorted(range(len(self.images)), key=lambda number: -self.scores[number])


Generate = Callable[[str, int, int], Candidates]
"""(caption, number of images, seed) -> candidates."""


def main() -> int:
    arguments = _arguments()
    try:
        pairs = load_pairs(arguments.pairs)
        trained = train_both(arguments, pairs)
        if arguments.only:
            return 0
        document = measure(arguments, pairs, trained)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(_table(document))
    print_document(document)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path, help="prepared folder, 64 pixels")
    parser.add_argument("--independent-classifier", type=Path, required=True)
    parser.add_argument("--steps", type=int, nargs=3, default=[700, 100, 240], metavar="N", help=" ".join(STAGES))
    parser.add_argument("--minutes", type=float, help="of AttnGAN (default: what the pipeline took)")
    parser.add_argument("--only", choices=MODELS)
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--distance-images", type=int, default=1092)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--runs", type=Path, default=REPOSITORY / "runs" / "attngan")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks" / "results" / "attngan")
    return parser.parse_args()


# ------------------------------------------------------------------------------------------------------------- training


def train_both(arguments: argparse.Namespace, pairs: Pairs) -> dict[str, Row]:
    """What each training took, in the order of MODELS; with `--only` of one."""
    torch.set_num_threads(1)
    found: dict[str, Row] = {}
    if arguments.only != "AttnGAN":
        found["KoDALLE"] = train_kodalle(arguments.runs / "kodalle", arguments.pairs, arguments.steps)
    if arguments.only != "KoDALLE":
        minutes = arguments.minutes or found.get("KoDALLE", {}).get("processor_minutes")
        if minutes is None:
            raise InputError("--only", "AttnGAN", "needs --minutes")
        _, found["AttnGAN"] = train_attngan(arguments.runs / "attngan", pairs.train, minutes=minutes)
    return found


def train_kodalle(run: Path, pairs: Path, steps: Sequence[int]) -> Row:
    """`kodalle train` with so many steps a stage; processor_minutes are those of the three trainings' processes."""
    record = run.with_name(f"{run.name}-training.json")
    spent = dict(read_json(record, field="--runs", remedy="remove it")) if record.is_file() else {"pieces": []}
    if spent.get("steps"):
        return spent
    overrides = [f"{stage}.loop.steps={count}" for stage, count in zip(STAGES, steps, strict=True)]
    overrides += [f"{stage}.loop.torch_threads=1" for stage in STAGES]
    if not (run / "model").is_dir():  # what comes behind it is the run's own evaluation, which may be missing
        started = _children_s()
        try:
            train_pictures(Request(pairs, run, tuple(overrides)))
        finally:
            spent["pieces"].append(_children_s() - started)
            write_json(record, spent)
    spent |= {
        "processor_minutes": sum(spent["pieces"]) / 60,
        "steps": {stage: stage_minutes(run / stage)["steps"] for stage in STAGES},
        "parameters": _parameters(run / "model"),
    }
    write_json(record, spent)
    return spent


def _children_s() -> float:
    """Processor seconds of the ended processes that this one started."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _parameters(model: Path) -> dict[str, int]:
    pipeline = Pipeline.from_pretrained(model)
    parts = {"vqgan": pipeline.vqgan, "koclip": pipeline.koclip, "transformer": pipeline.transformer}
    return {
        name: sum(weight.numel() for weight in part.parameters()) for name, part in parts.items() if part is not None
    }


# ------------------------------------------------------------------------------------------------------------ measuring


def measure(arguments: argparse.Namespace, pairs: Pairs, trained: dict[str, Row]) -> Row:
    """The document; writes it and the sheet."""
    pipeline = Pipeline.from_pretrained(arguments.runs / "kodalle" / "model")
    attngan, _ = train_attngan(arguments.runs / "attngan", pairs.train, minutes=0.0)
    generates = {"KoDALLE": _by_kodalle(pipeline), "AttnGAN": _by_attngan(attngan)}
    run = EvaluationRun(_CPU, arguments.seed, 32, lambda *_: None)
    photographs = Photographs.of(run, pairs, arguments)
    document: Row = {
        "benchmark": "attngan", **facts(_CPU), "pairs": stored_path(arguments.pairs), "image_size": _IMAGE_SIZE,
        "config": {name: getattr(arguments, name) for name in ("candidates", "distance_images", "seed")},
        "captions": len(photographs.chosen), "classifier": photographs.trust, "models": {},
        "training_photographs": photographs.floor,
    }  # fmt: skip
    shown: dict[str, list[Image.Image]] = {}
    for name, generate in generates.items():
        figures, shown[name] = photographs.figures(generate)
        document["models"][name] = trained[name] | figures
        write_json(arguments.out / f"{arguments.pairs.name}.json", document)
    save_png(arguments.out / f"{arguments.pairs.name}.png", _sheet(photographs.chosen, shown), {"benchmark": "attngan"})
    return document


def _by_kodalle(pipeline: Pipeline) -> Generate:
    def generate(caption: str, count: int, seed: int) -> Candidates:
        (generation,) = pipeline([caption], candidates=count, seed=seed)
        found = sorted(generation.candidates, key=lambda one: one.candidate)
        return Candidates(np.stack([np.asarray(one.image) for one in found]), [one.score or 0.0 for one in found])

    return generate


def _by_attngan(model: AttnGan) -> Generate:
    def generate(caption: str, count: int, seed: int) -> Candidates:
        images = model.generate([caption] * count, seed=seed)
        return Candidates(images.numpy(), model.scores(caption, images))

    return generate


@dataclass(frozen=True)
class Photographs:
    """The held-out photographs that both models are compared with, and what reads them.

    Attributes:
        chosen: a pair of each distinct caption, in the seed's order.
        needed: caption -> images for the distance.
        trust: of the classifier, see `classifier_trust`.
        floor: FID of as many training photographs.
    """

    run: EvaluationRun
    held: Sequence[Pair]
    chosen: Sequence[Pair]
    needed: Counter[str]
    candidates: int
    reader: ImageReader
    encoder: Lite0Encoder
    distance_encoder: Lite0HeadEncoder
    features: ImageFeatures
    real: Sequence[Right]
    trust: Row
    floor: Row

    @classmethod
    def of(cls, run: EvaluationRun, pairs: Pairs, arguments: argparse.Namespace) -> "Photographs":
        """Reads the photographs.

        Raises:
            InputError: captions that state no classes, or a classifier of others.
        """
        held, classes, folder = pairs.validation, find_caption_classes(pairs), arguments.independent_classifier
        if classes is None:
            raise InputError("pairs", arguments.pairs, "state fewer than two classes: give pairs of K-Fashion's form")
        classifier = load_classifier(folder).for_classes(classes, folder=folder)
        encoder, distance_encoder = Lite0Encoder(_CPU), Lite0HeadEncoder(_CPU)
        order = torch.randperm(len(held), generator=run.generator(), dtype=torch.int64, device="cpu").tolist()
        chosen = list({held[number].captions[0]: held[number] for number in reversed(order)}.values())[::-1]
        count = arguments.distance_images
        needed = Counter(held[order[place % len(held)]].captions[0] for place in range(count))
        reader = ImageReader(colour_names(pairs, _IMAGE_SIZE), classifier, classes)
        features = distance_encoder.encode(run.images(held, _IMAGE_SIZE, "held out"))
        some = torch.randperm(len(pairs.train), generator=run.generator(), dtype=torch.int64, device="cpu")[:count]
        training = [pairs.train[number] for number in some.tolist()]
        others = distance_encoder.encode(run.images(training, _IMAGE_SIZE, "training"))
        real = [
            reader.read(pair, [image], encoder.encode([_batch(image[None])]))[0]
            for pair in held
            for image in [load_image(pair, _IMAGE_SIZE)]
        ]
        trust = classifier_trust(run, encoder, classifier, classes, held, _IMAGE_SIZE)
        floor = feature_distances(features, others, seed=run.seed)
        return cls(
            run, held, chosen, needed, arguments.candidates, reader, encoder, distance_encoder, features, real, trust, floor
        )  # fmt: skip

    def figures(self, generate: Generate) -> tuple[Row, list[Image.Image]]:
        """Figures of a model, and the top-ranked image of the first captions."""
        rights, features, count = [], [], 0
        shown: list[Image.Image] = []
        started = time.process_time()
        for place, pair in enumerate(self.chosen):
            caption = pair.captions[0]
            needed = self.needed[caption]
            found = generate(caption, max(self.candidates, needed), self.run.seed)
            count += len(found.images)
            if needed:
                features.append(self.distance_encoder.encode(_batch(found.images[:needed]).split(_AT_ONCE)))
            ranked = [number for number in found.order if number < self.candidates]
            images = found.images[ranked]
            rights.append(self.reader.read(pair, list(images), self.encoder.encode([_batch(images)])))
            if len(shown) < SHOWN:
                shown.append(Image.fromarray(images[0]))
            if place % 20 == 19:
                print(f"{place + 1} of {len(self.chosen)} captions", file=sys.stderr, flush=True)
        return {
            "images": count,
            "generating_and_reading_s": time.process_time() - started,
            **self.reader.report(self.held, self.real, rights),
            "distances": feature_distances(self.features, joined(features), seed=self.run.seed),
        }, shown


def _batch(images: np.ndarray) -> Tensor:
    """(n, S, S, 3) uint8 -> (n, 3, S, S) float in [0, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


def _sheet(chosen: Sequence[Pair], shown: dict[str, list[Image.Image]]) -> Image.Image:
    """Ten captions a block: the photograph, then what each model makes of its caption, and the caption."""
    images: list[Image.Image] = []
    texts: list[list[str]] = []
    rows = {"photograph": [Image.fromarray(load_image(pair, _IMAGE_SIZE)) for pair in chosen[:SHOWN]]} | shown
    last = list(rows)[-1]
    for start in range(0, min(SHOWN, len(chosen)), COLUMNS):
        for name, own in rows.items():
            for image, pair in zip(own[start : start + COLUMNS], chosen[start : start + COLUMNS], strict=True):
                images.append(image)
                texts.append([name, *([pair.captions[0]] if name == last else [])])
    return captioned_sheet(images, texts, columns=min(COLUMNS, len(chosen)), cell_width=2 * _IMAGE_SIZE, scale=2)


def _table(document: Row) -> str:
    def shares(row: Row, name: str) -> list[str]:
        found = row[f"{name}_agreement"]
        return [f"{found['top_ranked']:.0%}", f"{found['random']:.0%}", f"{found['real']:.0%}"]

    header = ["model", "minutes", "FID, Lite0", "KID, Lite0"]
    parts = ("class", "colour", "colour_and_class")
    header += [f"{part.replace('_', ' ')}: {which}" for part in parts for which in ("top", "random", "photographs")]
    rows = []
    for name, row in document["models"].items():
        distances = [f"{row['distances'][f'{figure}_lite0_features']:.3g}" for figure in ("fid", "kid")]
        cells = [cell for part in parts for cell in shares(row, part)]
        rows.append([name, f"{row['processor_minutes']:.1f}", *distances, *cells])
    floor = [f"{document['training_photographs'][f'{figure}_lite0_features']:.3g}" for figure in ("fid", "kid")]
    rows.append(["training photographs", "", *floor, *("" for _ in header[4:])])
    return table(f"{document['pairs']}, {document['captions']} held-out captions", header, rows)


if __name__ == "__main__":
    sys.exit(main())
