"""KoCLIP's options for similarity and loss, each alone against the plain one, at equal steps: what finds captions, and what ranks.

    python benchmarks/koclip_variants.py configs/clothing/koclip.yaml models/clothing data/clothing64 \
        --candidate-pairs data/clothing128 --independent-classifier runs/clothing/classifier

Every variant trains the config's KoCLIP from the start with the same pairs, batches and steps; without reconstructions and spliced
negatives, which would be the same for all. Two things count, on held-out photographs: recall of an image's caption among 100, and the
ranking gain. For that one model generates candidates of held-out captions once; each is read by the independent classifier (kind of
garment) and the colour reader; the gain is the share of top-ranked candidates that are right, minus that of all candidates.
`right_above_wrong`, over all pairs of a right and a wrong candidate of one caption, is how often the right one scores higher: 0.5 is
chance, and it is surer than the gain.

Candidates and runs lie in `--runs`, are resumed, and what has ended is read again. Stores
benchmarks/results/koclip_variants/<config's folder>-<steps>.json after each run, prints a table and the document.
"""

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before DeepSpeed is imported

import numpy as np
import torch
from machine_facts import REPOSITORY, print_document, stored_path
from text_table import table
from training.short_run import short_run
from training_minutes import stage_minutes

from engine.codec.koclip_encoder import KoclipEncoder
from engine.config_files import load_run
from engine.data.caption_classes import find_caption_classes
from engine.data.pairs import Pair, load_pairs
from engine.facts import facts
from engine.files import atomic_file, write_json
from engine.metrics.agreement import ImageReader, colour_names
from engine.metrics.evaluate import evaluate
from engine.metrics.independent_classifier import load_classifier
from engine.metrics.lite0_features import Lite0Encoder
from engine.models.folder import load_part, load_ranker_tokenizer
from engine.models.koclip import KoClip
from engine.pipeline.pipeline import Pipeline
from engine.training.trainer import train

_SSL = {"loss.image_ssl_hidden_dim": "512", "loss.image_ssl_dim": "128"}
VARIANTS: dict[str, dict[str, str]] = {
    "plain": {},
    "decoupled": {"loss.decoupled": "true"},
    "token_similarity": {"model.token_similarity": "true"},
    "direction_projections": {"model.direction_projections": "true"},
    "masked_language": {"loss.masked_language_weight": "0.05"},
    "simclr, colours kept": _SSL | {"loss.image_ssl": "simclr", "loss.image_ssl_colour": "0"},
    "simsiam": _SSL | {"loss.image_ssl": "simsiam"},
    "simclr": _SSL | {"loss.image_ssl": "simclr"},
}
_PARTS = ("colour", "class", "both")
_CANDIDATES_AT_ONCE = 64

Row = dict[str, Any]


def main() -> int:
    arguments = _arguments()
    document: Row = {"benchmark": "koclip_variants", **facts(torch.device("cpu")), "config": {}, "runs": []}
    document["config"] = {
        name: stored_path(value) if isinstance(value, Path) else value
        for name, value in vars(arguments).items()
        if name not in ("out", "runs")
    }
    store = arguments.out / f"{arguments.config.parent.name}-{arguments.steps}.json"
    candidates = Candidates(arguments)
    document["candidates"] = candidates.report()
    for seed in arguments.seeds:
        for variant in arguments.variants:
            document["runs"].append({"variant": variant, "seed": seed, **measure(arguments, variant, seed, candidates)})
            document["variants"] = summary(document["runs"])
            write_json(store, document)
    print(_table(document))
    print_document(document)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("model", type=Path, help="folder of the model that generates the candidates")
    parser.add_argument("pairs", type=Path, help="prepared folder to train on")
    parser.add_argument(
        "--candidate-pairs", type=Path, help="the same pairs at the model's image size (default: pairs)"
    )
    parser.add_argument("--independent-classifier", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--captions", type=int, default=40)
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--candidate-seed", type=int, default=7)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--runs", type=Path, default=REPOSITORY / "runs" / "koclip_variants")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks" / "results" / "koclip_variants")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="of every run")
    arguments = parser.parse_args()
    arguments.candidate_pairs = arguments.candidate_pairs or arguments.pairs
    return arguments


class Candidates:
    """One model's candidates of held-out captions, and whether each shows what its caption states.

    G captions, n candidates of each. `images` (G, n, S, S, 3) uint8; `right` (G, n) for colour, class and both: 1, 0, or -1 where the
    caption states none.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.settings = {
            "model": stored_path(arguments.model), "pairs": stored_path(arguments.candidate_pairs),
            "captions": arguments.captions, "candidates": arguments.candidates, "seed": arguments.candidate_seed,
        }  # fmt: skip
        place = arguments.runs / "candidates.npz"
        stored = np.load(place) if place.is_file() else {}
        if "settings" not in stored or json.loads(str(stored["settings"])) != self.settings:
            stored = self._generate(arguments)
            place.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(place) as temporary, temporary.open("wb") as file:
                np.savez(file, allow_pickle=False, **stored)
        self.captions = [str(caption) for caption in stored["captions"]]
        self.images: np.ndarray = stored["images"]
        self.right = {part: stored[part] for part in _PARTS}

    def _generate(self, arguments: argparse.Namespace) -> dict[str, np.ndarray]:
        pairs = load_pairs(arguments.candidate_pairs)
        pipeline = Pipeline.from_pretrained(arguments.model)
        classes, encoder = find_caption_classes(pairs), Lite0Encoder(torch.device("cpu"))
        assert classes is not None, "captions of clothes state their kind"
        classifier = load_classifier(arguments.independent_classifier)
        classifier = classifier.for_classes(classes, folder=arguments.independent_classifier)
        reader = ImageReader(colour_names(pairs, pipeline.vqgan.config.image_size), classifier, classes)
        images, right, chosen = [], [], _chosen(pairs.validation, arguments.captions, arguments.candidate_seed)
        at_once = max(1, _CANDIDATES_AT_ONCE // arguments.candidates)
        for start in range(0, len(chosen), at_once):
            part = chosen[start : start + at_once]
            captions = [pair.captions[0] for pair in part]
            made = pipeline(captions, candidates=arguments.candidates, seed=arguments.candidate_seed)
            for pair, generation in zip(part, made, strict=True):
                in_order = sorted(generation.candidates, key=lambda one: one.candidate)  # not as its own ranker ranks
                own = np.stack([np.asarray(one.image) for one in in_order])
                features = encoder.encode([torch.from_numpy(own).permute(0, 3, 1, 2).float() / 255])
                images.append(own)
                right.append([(one.colour, one.class_, one.both) for one in reader.read(pair, list(own), features)])
            print(f"candidates of {start + len(part)} of {len(chosen)} captions", file=sys.stderr, flush=True)
        rights = np.array([[[-1 if r is None else int(r) for r in one] for one in row] for row in right], np.int8)
        return {
            "settings": np.array(json.dumps(self.settings)),
            "captions": np.array([pair.captions[0] for pair in chosen]),
            "images": np.stack(images),
            **{part: rights[:, :, number] for number, part in enumerate(_PARTS)},
        }

    def report(self) -> Row:
        """What a random candidate, the best of each caption, gets: bounds of every ranker."""
        found: Row = dict(self.settings)
        for part in _PARTS:
            rows = [row for row in self.right[part] if row.min() >= 0]
            found[part] = {
                "captions": len(rows),
                "random": float(np.mean(rows)),
                "best": float(np.mean([row.max() for row in rows])),
            }
        return found


def _chosen(held: Sequence[Pair], count: int, seed: int) -> list[Pair]:
    """Pairs of `count` distinct captions at random, those that `kodalle evaluate` takes."""
    order = torch.randperm(
        len(held), generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.int64, device="cpu"
    )
    distinct: dict[str, Pair] = {}
    for number in order.tolist():
        distinct.setdefault(held[number].captions[0], held[number])
    return list(distinct.values())[:count]


# ---------------------------------------------------------------------------------------------------------- one variant


def measure(arguments: argparse.Namespace, variant: str, seed: int, candidates: Candidates) -> Row:
    """Trains a variant if it has not ended, and what its ranker does."""
    run: Path = arguments.runs / f"{variant.replace(', ', '-').replace(' ', '-')}-{seed}"
    started_s = time.process_time()
    ended = (run / "model" / "config.json").is_file()
    model = train(load_run(arguments.config, _overrides(arguments, variant, seed, run)))
    if not ended:
        write_json(run / "processor.json", {"minutes": round((time.process_time() - started_s) / 60, 2)})
    retrieval = evaluate(model, arguments.pairs, generations=0)["koclip"]
    koclip: KoClip = load_part(model, "koclip")
    encoder, tokenizer = KoclipEncoder(koclip), load_ranker_tokenizer(model)
    tokens = tokenizer.encode(candidates.captions, koclip.config.text_seq_len).tokens
    scores = []
    for text, images in zip(encoder.embed_texts(tokens), candidates.images, strict=True):
        embedded = encoder.embed_images(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255)
        scores.append(koclip.scores(embedded, text[None])[0].numpy())
    return {
        **stage_minutes(run),
        "processor_minutes": json.loads((run / "processor.json").read_text(encoding="utf-8"))["minutes"],
        "parameters": sum(weight.numel() for weight in koclip.parameters()),
        "recall": {name: value for name, value in retrieval.items() if name.startswith("recall")},
        "ranking": {part: ranking(np.stack(scores), candidates.right[part]) for part in _PARTS},
    }


def _overrides(arguments: argparse.Namespace, variant: str, seed: int, run: Path) -> list[str]:
    steps = arguments.steps
    settings = VARIANTS[variant] | {
        "run": str(run), "seed": str(seed), "data.pairs": str(arguments.pairs), "codec": "null", "spliced_negatives": "0",
        "model.image_size": str(arguments.image_size), "augment_shift": str(arguments.image_size // 24),
    }  # fmt: skip
    settings |= short_run(steps, batch=arguments.batch, checkpoint_every=max(1, steps // 3), warmup=steps // 8)
    return [f"{name}={value}" for name, value in settings.items()] + arguments.set


def ranking(scores: np.ndarray, right: np.ndarray) -> Row:
    """What scores (G, n) do with candidates that are right, 1, or not, 0; captions with -1 are left out.

    Returns:
        top_ranked, random: shares of right candidates; gain, their difference, and gain_error, its standard error over captions;
        right_above_wrong over all pairs of a right and a wrong candidate of one caption, equal scores counting half.
    """
    stating = right.min(axis=1) >= 0
    scores, right = scores[stating], right[stating].astype(bool)
    top = np.take_along_axis(right, scores.argmax(axis=1)[:, None], axis=1)[:, 0].astype(float)
    gains = top - right.mean(axis=1)
    above = pairs = 0.0
    for own, is_right in zip(scores, right, strict=True):
        differences = own[is_right][:, None] - own[~is_right]
        above += float((differences > 0).sum() + (differences == 0).sum() / 2)
        pairs += differences.size
    return {
        "captions": int(stating.sum()),
        "top_ranked": float(top.mean()),
        "random": float(right.mean()),
        "gain": float(gains.mean()),
        "gain_error": float(gains.std(ddof=1) / math.sqrt(len(gains))) if len(gains) > 1 else None,
        "right_above_wrong": above / pairs if pairs else None,
    }


def summary(runs: list[Row]) -> dict[str, Row]:
    """Of each variant, means over its seeds, and the least and most of the first two."""
    found: dict[str, Row] = {}
    for variant in dict.fromkeys(run["variant"] for run in runs):
        own = [run for run in runs if run["variant"] == variant]

        def values(read: Callable[[Row], float], own: list[Row] = own) -> list[float]:
            return [read(run) for run in own]

        recalls = {rank: values(lambda run, rank=rank: run["recall"][f"recall_at_{rank}"]) for rank in (1, 5)}  # type: ignore[misc]
        found[variant] = {
            "seeds": len(own),
            "minutes": statistics.mean(values(lambda run: run["minutes"])),
            "processor_minutes": statistics.mean(values(lambda run: run["processor_minutes"])),
            **{f"recall_at_{rank}": statistics.mean(found) for rank, found in recalls.items()},
            **{f"recall_at_{rank}_range": [min(found), max(found)] for rank, found in recalls.items()},
            **{
                f"{name}_{part}": statistics.mean(
                    values(lambda run, part=part, name=name: run["ranking"][part][name])  # type: ignore[misc]
                )
                for part in _PARTS
                for name in ("gain", "right_above_wrong")
            },
        }
    return found


def _table(document: Row) -> str:
    names = (
        "recall_at_1",
        "recall_at_5",
        *(f"{name}_{part}" for part in _PARTS for name in ("gain", "right_above_wrong")),
    )
    rows = [
        [variant, f"{row['processor_minutes']:.1f}", *(f"{row[name]:.1%}" for name in names), str(row["seeds"])]
        for variant, row in document["variants"].items()
    ]
    header = ["variant", "processor minutes", "first", "among five"]
    header += [f"{name}, {part}" for part in _PARTS for name in ("gain", "right above wrong")]
    return table(f"{document['config']['steps']} steps of {document['config']['batch']}", [*header, "seeds"], rows)


if __name__ == "__main__":
    sys.exit(main())
