"""What refinement by a ranker's gradient does to images of held-out captions, by measures that did not guide it.

    python benchmarks/refinement.py models/clothing data/clothing128 --independent-classifier runs/clothing/classifier

The top-ranked image of each caption before and after `refine_generation`: the score that guided it, and three that did not: the colour
that is read from the pixels, the garment class by the independent classifier, and how likely the transformer finds the tokens. A score
that rises while these stay or fall has learned to please the ranker. (The classifier reads features of EfficientNet-Lite0's ImageNet
weights; a KoCLIP that was trained from these is no stranger to it.)

Writes refinement.json and sheet.png (the first captions of the seed's order, before above after, none chosen by hand) into
benchmarks/results/refinement/ (`--out`).
"""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine_facts import REPOSITORY, print_document, stored_path
from PIL import Image

from engine.data.caption_classes import find_caption_classes
from engine.data.pairs import Pair, Pairs, load_pairs
from engine.device import fit_to_machine
from engine.errors import InputError
from engine.facts import facts
from engine.files import write_json
from engine.interop.clip_scorer import open_ranker
from engine.metrics.agreement import ImageReader, Right, colour_names
from engine.metrics.generations import chosen_pairs
from engine.metrics.independent_classifier import load_classifier
from engine.metrics.lite0_features import Lite0Encoder
from engine.pipeline.generation import Candidate, Generation
from engine.pipeline.image_encoding import save_png
from engine.pipeline.image_files import captioned_sheet
from engine.pipeline.pipeline import Pipeline
from engine.pipeline.provenance import Refinement
from engine.pipeline.refinement import GuidingRanker, refine_generation
from engine.progress import PhaseBars

_SHOWN, _COLUMNS = 16, 8
_AT_ONCE = 20  # captions generated together


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("pairs", type=Path, help="prepared folder; its validation split is used")
    parser.add_argument("--independent-classifier", type=Path, required=True)
    parser.add_argument("--refine-with", type=Path, help="model folder whose ranker guides (the model's own)")
    parser.add_argument("--captions", type=int, default=40)
    parser.add_argument("--candidates", type=int, default=1, help="of which the top-ranked one is refined")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--step-size", type=float, default=0.2)
    parser.add_argument("--cut-outs", type=int, default=6)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks" / "results" / "refinement")
    arguments = parser.parse_args()
    try:
        print_document(measure(arguments))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The document of refinement.json; writes it and the sheet."""
    fit_to_machine()
    machine = facts(torch.device("cpu"))
    arguments.out.mkdir(parents=True, exist_ok=True)
    pipeline, pairs = Pipeline.from_pretrained(arguments.model), load_pairs(arguments.pairs)
    reader, encoder = _class_reader(arguments, pairs), Lite0Encoder(pipeline.device)  # what may be refused comes first
    guide = None
    if arguments.refine_with is not None:
        guide = GuidingRanker(*open_ranker(arguments.refine_with, field="--refine-with"))
    refinement = Refinement(steps=arguments.steps, step_size=arguments.step_size, cut_outs=arguments.cut_outs)
    generator = torch.Generator("cpu").manual_seed(arguments.seed)
    chosen = chosen_pairs(pairs.validation, arguments.captions, generator)
    before, after, seconds = [], [], {"generating": 0.0, "refining": 0.0}
    with PhaseBars() as bars:
        started = time.process_time()
        for start in range(0, len(chosen), _AT_ONCE):
            captions = [pair.captions[0] for pair in chosen[start : start + _AT_ONCE]]
            before += pipeline(captions, candidates=arguments.candidates, seed=arguments.seed)
            bars.update("generating", len(before), len(chosen))
        seconds["generating"] = time.process_time() - started
        started = time.process_time()
        for generation in before:
            after.append(refine_generation(pipeline, generation, refinement, count=1, guide=guide))
            bars.update("refining", len(after), len(chosen))
        seconds["refining"] = time.process_time() - started
    tops = {"before": [one.candidates[0] for one in before], "after": [one.candidates[0] for one in after]}
    captions = [pair.captions[0] for pair in chosen]
    document = {
        "benchmark": "refinement",
        **machine,
        "model": stored_path(arguments.model),
        "pairs": stored_path(arguments.pairs),
        "guided_by": "the model's own ranker" if guide is None else stored_path(arguments.refine_with),
        "config": {"captions": len(chosen), "candidates": arguments.candidates, "seed": arguments.seed}
        | refinement.model_dump(),
        "processor_seconds": seconds,
        "koclip_score": {name: float(np.mean([one.score for one in own])) for name, own in tops.items()}
        | {"rose": sum(a.score > b.score for a, b in zip(tops["after"], tops["before"], strict=True))},  # type: ignore[operator]
        "codes_changed": float(np.mean([_changed(*both) for both in zip(tops["before"], tops["after"], strict=True)])),
        "nats_per_token": {name: _nats(pipeline, captions, own) for name, own in tops.items()},
        "right": {name: _right(reader, encoder, chosen, own) for name, own in tops.items()},
        "images": [
            {"caption": caption, "candidate": one.candidate, "score_before": one.score, "score_after": other.score}
            for caption, one, other in zip(captions, tops["before"], tops["after"], strict=True)
        ],
    }
    write_json(arguments.out / "refinement.json", document)
    _write_sheet(arguments.out / "sheet.png", before, after)
    # Colours are read like those of all training photographs, which takes longest: the rest is stored already.
    reader = replace(reader, names=colour_names(pairs, pipeline.vqgan.config.image_size))
    document["right"] = {name: _right(reader, encoder, chosen, own) for name, own in tops.items()}
    write_json(arguments.out / "refinement.json", document)
    return document


def _class_reader(arguments: argparse.Namespace, pairs: Pairs) -> ImageReader:
    classes, folder = find_caption_classes(pairs), arguments.independent_classifier
    if classes is None:
        remedy = "state fewer than two classes: give pairs that a classifier was trained on"
        raise InputError("pairs", arguments.pairs, remedy)
    return ImageReader(None, load_classifier(folder).for_classes(classes, folder=folder), classes)


def _right(reader: ImageReader, encoder: Lite0Encoder, pairs: list[Pair], images: list[Candidate]) -> dict[str, Any]:
    """Shares of images whose colour, class, and both are those of their captions, of the captions that state them."""
    pixels = [np.asarray(one.image) for one in images]
    batches = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float().div(255).split(8)
    features = encoder.encode(iter(batches))
    rights = [
        reader.read(pair, [own], feature[None])[0] for pair, own, feature in zip(pairs, pixels, features, strict=True)
    ]
    return {name: _share(rights, name) for name in ("colour", "class_", "both")}


def _share(rights: list[Right], name: str) -> dict[str, Any]:
    stated = [value for one in rights if (value := getattr(one, name)) is not None]
    return {"right": sum(stated), "of": len(stated)}


def _changed(one: Candidate, other: Candidate) -> float:
    """Share of the codes that differ."""
    return float(np.mean(np.array(one.image_tokens) != np.array(other.image_tokens)))


@torch.no_grad()
def _nats(pipeline: Pipeline, captions: list[str], images: list[Candidate]) -> float:
    """The transformer's mean negative log-likelihood of an image token, without guidance."""
    text = pipeline.tokenizer.encode(captions, pipeline.transformer.config.text_seq_len).tokens
    tokens = torch.tensor([one.image_tokens for one in images], dtype=torch.int64, device="cpu")
    losses = [
        float(pipeline.transformer(*both).loss_image) for both in zip(text.split(1), tokens.split(1), strict=True)
    ]
    return float(np.mean(losses))


def _write_sheet(path: Path, before: list[Generation], after: list[Generation]) -> None:
    """Eight captions a row: the image before above the one after, each with its score."""
    images: list[Image.Image] = []
    texts: list[list[str]] = []
    for start in range(0, min(_SHOWN, len(before)), _COLUMNS):
        for name, generations in (("before", before), ("after", after)):
            for one in generations[start : start + _COLUMNS]:
                top = one.candidates[0]
                images.append(top.image)
                texts.append([f"{name} {top.score:.2f}", *([one.caption] if name == "after" else [])])
    sheet = captioned_sheet(images, texts, columns=min(_COLUMNS, len(before)), cell_width=images[0].width)
    save_png(path, sheet, {"benchmark": "refinement"})


if __name__ == "__main__":
    sys.exit(main())
