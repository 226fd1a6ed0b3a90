"""Temperature and guidance of a model: the settings whose images match the captions of training images best.

    python benchmarks/sampling_options.py models/clothing data/clothing64 \
        --independent-classifier runs/clothing/classifier --out benchmarks/results/clothing/sampling_options.json

Held-out pairs are left for `kodalle evaluate`: captions are those of training images, whole and with sentences left out,
the same for all settings. Reported for each setting: the share of images of the right class (by the independent
classifier) and of the right colour (read from pixels), and how much the candidates of one caption differ.
"""

import argparse
import dataclasses
import itertools
import sys
from pathlib import Path
from typing import Any

import torch
from machine_facts import print_document, stored_path

from engine.data.caption_classes import find_caption_classes
from engine.data.pairs import Pair, Pairs, load_pairs
from engine.data.partial_captions import with_partial_held_out
from engine.device import fit_to_machine, pick_device
from engine.errors import InputError
from engine.facts import facts
from engine.files import write_json
from engine.metrics.agreement import ImageReader, colour_names
from engine.metrics.generations import GenerationCounts, score_generations
from engine.metrics.independent_classifier import load_classifier
from engine.metrics.lite0_features import Lite0Encoder
from engine.metrics.parts import EvaluationRun
from engine.metrics.readings import CandidateReader
from engine.pipeline.pipeline import Pipeline

_SEED = 11  # not that of the stored evaluation


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("pairs", type=Path)
    parser.add_argument(
        "--independent-classifier", type=Path, required=True, help="folder of `kodalle train-classifier`"
    )
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.5, 0.7, 0.85, 1.0])
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 2.0, 3.0])
    parser.add_argument("--captions", type=int, default=40)
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--sheets", type=Path, help="folder for a sheet of the top-ranked images of each setting")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file")
    arguments = parser.parse_args()
    try:
        document = compare(arguments)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_json(arguments.out, document)
    print_document(document)
    return 0


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    device = pick_device("")
    fit_to_machine()
    machine = facts(device)  # before anything is computed: the load
    pairs = load_pairs(arguments.pairs)
    classes = find_caption_classes(pairs)
    if classes is None:
        raise InputError("pairs", arguments.pairs, "its training captions state fewer than two classes")
    folder = arguments.independent_classifier
    encoder = Lite0Encoder(device)
    run = EvaluationRun(device, _SEED, batch_size=16, on_progress=lambda *_: None)
    chosen_pairs = _training_captions(pairs, arguments.captions, run.generator())
    ways = {"whole": chosen_pairs, "partial": with_partial_held_out(chosen_pairs, _SEED)}
    pipeline = Pipeline.from_pretrained(arguments.model, device=device, dtype=torch.float32)
    colours = colour_names(pairs, pipeline.vqgan.config.image_size)
    images = ImageReader(colours, load_classifier(folder).for_classes(classes, folder=folder), classes)
    reader = CandidateReader(run, images, encoder)
    counts = GenerationCounts(captions=arguments.captions, candidates=arguments.candidates)
    chosen = pipeline.default_sampling_params
    rows = []
    for temperature, guidance in itertools.product(arguments.temperature, arguments.guidance):
        pipeline.default_sampling_params = chosen.updated(temperature=temperature, guidance_scale=guidance)
        row: dict[str, Any] = {"temperature": temperature, "guidance_scale": guidance}
        for way, some in ways.items():
            sheet = arguments.sheets and arguments.sheets / f"{way}-t{temperature:g}-g{guidance:g}.png"
            found = score_generations(run, pipeline, some, reader, counts, sheets=sheet).report
            row[way] = _row(found)
        rows.append(row)
        print(f"temperature {temperature:g}, guidance {guidance:g}: {row['whole']} {row['partial']}", file=sys.stderr)
    return {
        "benchmark": "sampling_options",
        **machine,
        "model": stored_path(arguments.model),
        "chosen": chosen.generation_values(),
        "captions": arguments.captions,
        "candidates": arguments.candidates,
        "seed": _SEED,
        "settings": rows,
    }


def _training_captions(pairs: Pairs, count: int, generator: torch.Generator) -> Pairs:
    """Training pairs of `count` distinct captions in place of the held-out ones."""
    distinct: dict[str, Pair] = {}
    for index in torch.randperm(len(pairs.train), generator=generator, dtype=torch.int64, device="cpu").tolist():
        pair = pairs.train[index]
        if len(distinct) < count:
            distinct.setdefault(pair.captions[0], dataclasses.replace(pair, split="validation"))
    return Pairs((*pairs.train, *distinct.values()))


def _row(found: dict[str, Any]) -> dict[str, Any]:
    """Shares that do not depend on the ranking (`random`), and after it (`top`); None where nothing could be read."""
    classes, colours = found.get("class_agreement", {}), found.get("colour_agreement", {})
    return {
        "class_random": classes.get("random"), "class_top": classes.get("top_ranked"),
        "colour_random": colours.get("random"), "colour_top": colours.get("top_ranked"),
        "difference": found["difference"],
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
