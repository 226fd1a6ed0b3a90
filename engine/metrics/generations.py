"""Generations of held-out captions, scored: KoCLIP score, colours, caption classes, distances from photographs.

The captions are chosen by the seed, never by hand, and the top-ranked image of each goes on the sheets as it is. `random` is
the mean over all candidates, the expectation of one. Every number about generations stands beside the same number of real
images, or beside what a constant answer gets.

G captions, n candidates of each, S pixels, H features.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from engine.data.pairs import Pair, Pairs, load_image
from engine.metrics.agreement import ImageReader, Right
from engine.metrics.distances import nearest_report, photograph_features, set_distances
from engine.metrics.fid import LEAST_FOR_KID
from engine.metrics.lite0_features import NUM_FEATURES, Lite0Encoder, head_mean
from engine.metrics.oracle import Oracle, shares_right
from engine.metrics.oracle import Right as OracleRight
from engine.metrics.parts import EvaluationRun
from engine.metrics.sheets import SHEET_IMAGES, Shown, write_nearest_sheet, write_sheets
from engine.pipeline.generation import Generation
from engine.pipeline.pipeline import Pipeline

_BATCH_SEQUENCES = 64  # candidates decoded together: bounds the memory of their KV cache


@dataclass
class _Tally:
    """Results for each caption, and the first top-ranked images; the other images are not kept."""

    shown: list[Shown] = field(default_factory=list)
    listed: list[dict[str, Any]] = field(default_factory=list)
    top_scores: list[float] = field(default_factory=list)
    all_scores: list[float] = field(default_factory=list)
    differences: list[float] = field(default_factory=list)
    right: list[list[Right]] = field(default_factory=list)  # for each caption, of its candidates, best first
    oracle_right: list[list[OracleRight]] = field(default_factory=list)  # the same, by the oracle
    top_features: list[Tensor] = field(default_factory=list)  # (H,)
    features: dict[str, Tensor] = field(default_factory=dict)  # caption -> (n, 1280), in the order of candidates

    def add(self, pair: Pair, generation: Generation) -> None:
        top = generation.candidates[0]
        made = {"caption": generation.caption, "seed": top.seed, "candidate": top.candidate, "score": top.score}
        self.listed.append(made | {"key": pair.key})
        if len(self.shown) < SHEET_IMAGES:
            self.shown.append(Shown(top.image, generation.caption))
        scores = [one.score for one in generation.candidates if one.score is not None]
        self.top_scores += scores[:1]
        self.all_scores += scores


def score_generations(
    run: EvaluationRun,
    pipeline: Pipeline,
    pairs: Pairs,
    reader: ImageReader,
    encoder: Lite0Encoder | None,
    *,
    count: int,
    candidates: int,
    distance_images: int = 0,
    oracle: Oracle | None = None,
    sheets: Path | None = None,
) -> dict[str, Any]:
    """Generates images for `count` distinct held-out captions, for all when there are fewer.

    Args:
        reader: of colours and classes.
        encoder: for the reader's classifier and for distances; may be None without both.
        distance_images: generations whose distances from photographs are measured, for the held-out captions as often as
            they occur; 0: none.
        oracle: reads from pixels whether an image is right.
        sheets: where PNGs of top-ranked images go, see engine.metrics.sheets.

    Returns:
        captions, candidates, seed, captions_cut (captions too long for the model, their ends cut), sampling_params (the
        model's own);
        difference: how much the candidates of a caption differ: the standard deviation of a pixel over them, of
            [0, 1], averaged; None for one candidate;
        koclip_score: when the model has a KoCLIP, see `_scores`;
        colour_agreement, class_agreement, colour_and_class_agreement: see `ImageReader.report`;
        oracle: with one, see `shares_right`;
        distances, nearest: with `distance_images`, see engine.metrics.distances;
        sheets: with `sheets`, their file names;
        top_ranked: caption, held-out pair, seed, candidate and score of each top-ranked image, the sheets' first.
    """
    chosen = _chosen(pairs.validation, count, run.generator())
    tally, captions_at_once = _Tally(), max(1, _BATCH_SEQUENCES // candidates)
    captions_cut = 0
    run.on_progress("generating", 0, len(chosen))
    for start in range(0, len(chosen), captions_at_once):
        part = chosen[start : start + captions_at_once]
        for pair, generation in zip(
            part, pipeline([pair.captions[0] for pair in part], candidates=candidates, seed=run.seed), strict=True
        ):
            tally.add(pair, generation)
            if oracle is not None:
                tally.oracle_right.append(oracle(pair, [one.image for one in generation.candidates]))
            captions_cut += generation.tokens_cut > 0
            pixels = [np.asarray(one.image) for one in generation.candidates]
            if candidates > 1:
                tally.differences.append(float(np.std(pixels, axis=0, ddof=1).mean() / 255))
            features = _features(run, encoder, generation)
            tally.right.append(reader.read(pair, pixels, features))
            tally.top_features.append(head_mean(features)[0] if len(features) else features)
            order = [one.candidate for one in generation.candidates]
            tally.features[generation.caption] = head_mean(features)[np.argsort(order)] if len(features) else features
        run.on_progress("generating", start + len(part), len(chosen))
    found: dict[str, Any] = {
        "captions": len(chosen), "candidates": candidates, "seed": run.seed, "captions_cut": captions_cut,
        "sampling_params": pipeline.default_sampling_params.generation_values(),
        "difference": sum(tally.differences) / len(tally.differences) if tally.differences else None,
    }  # fmt: skip
    if pipeline.koclip is not None:
        found["koclip_score"] = _scores(run, pipeline, chosen, tally)
    found |= reader.report(pairs.validation, _real(run, pipeline, pairs, reader, encoder), tally.right)
    if oracle is not None:
        size = pipeline.vqgan.config.image_size
        real = [oracle(pair, [Image.fromarray(load_image(pair, size))])[0] for pair in chosen]
        found["oracle"] = shares_right(tally.oracle_right, real)
    if sheets is not None:
        found["sheets"] = write_sheets(run, pipeline, pairs.validation, tally.shown, sheets, made=tally.listed)
    if distance_images and encoder is not None:
        found |= _distances(run, pipeline, pairs, encoder, tally, num_images=distance_images, sheets=sheets)
    return found | {"top_ranked": tally.listed}


def _chosen(held: Sequence[Pair], count: int, generator: torch.Generator) -> list[Pair]:
    """`count` pairs of distinct captions at random; more of them begin with the same."""
    distinct: dict[str, Pair] = {}
    for index in torch.randperm(len(held), generator=generator, dtype=torch.int64, device="cpu").tolist():
        distinct.setdefault(held[index].captions[0], held[index])
    return list(distinct.values())[:count]


def _features(run: EvaluationRun, encoder: Lite0Encoder | None, generation: Generation) -> Tensor:
    """(n, H) of a caption's candidates, best first; (0, H) without an encoder."""
    if encoder is None:
        return torch.empty(0, NUM_FEATURES, dtype=torch.float32, device="cpu")
    images = torch.from_numpy(np.stack([np.asarray(one.image) for one in generation.candidates]))  # (n, S, S, 3)
    images = images.permute(0, 3, 1, 2).float() / 255
    return encoder.encode(batch.to(run.device) for batch in images.split(run.batch_size))


def _real(
    run: EvaluationRun, pipeline: Pipeline, pairs: Pairs, reader: ImageReader, encoder: Lite0Encoder | None
) -> list[Right]:
    """Whether each held-out photograph shows what its own caption states."""
    size, held = pipeline.vqgan.config.image_size, pairs.validation
    if encoder is None:
        features = torch.empty(len(held), 0, dtype=torch.float32, device="cpu")
    else:
        features = encoder.encode(run.images(held, size, "classes of held-out photographs"))
    return [reader.read(pair, [load_image(pair, size)], own[None])[0] for pair, own in zip(held, features, strict=True)]


def _scores(run: EvaluationRun, pipeline: Pipeline, chosen: Sequence[Pair], tally: _Tally) -> dict[str, Any]:
    """KoCLIP's mean score of a caption with: its real image, another caption's, the top-ranked, a random candidate."""
    captions = [pair.captions[0] for pair in chosen]
    batches = run.images(chosen, pipeline.vqgan.config.image_size, "scores of real images")
    images = torch.cat(list(batches))[:, None]  # (G, 1, 3, S, S)
    own, other = pipeline.rank_scores(captions, images), pipeline.rank_scores(captions, images.roll(1, dims=0))
    assert own is not None, "the model has a KoCLIP"
    assert other is not None, "the model has a KoCLIP"
    return {
        "real": float(own.mean()),
        "real_of_another_caption": float(other.mean()) if len(chosen) > 1 else None,
        "top_ranked": sum(tally.top_scores) / len(tally.top_scores),
        "random": sum(tally.all_scores) / len(tally.all_scores),
    }


# ---------------------------------------------------------------------------------------------------------- distances


def _distances(
    run: EvaluationRun,
    pipeline: Pipeline,
    pairs: Pairs,
    encoder: Lite0Encoder,
    tally: _Tally,
    *,
    num_images: int,
    sheets: Path | None,
) -> dict[str, Any]:
    if min(num_images, len(pairs.validation), len(pairs.train)) < LEAST_FOR_KID:
        counts = f"{num_images} generations, {len(pairs.validation)} held-out, {len(pairs.train)} training photographs"
        return {"distances": {"left_out": f"{counts}: {LEAST_FOR_KID} of each are needed"}}
    photographs = photograph_features(run, pipeline, encoder, pairs, num_reconstructed=num_images)
    generated = _as_often_as_held_out(run, pipeline, pairs.validation, encoder, tally, num_images)
    shown = len(tally.shown)
    report, numbers = nearest_report(photographs, torch.stack(tally.top_features[:shown]))
    nearest_pairs = [pairs.train[number] for number in numbers]
    report["photographs"] = [pair.key for pair in nearest_pairs]
    if sheets is not None:
        size = pipeline.vqgan.config.image_size
        photos = [load_image(pair, size) for pair in nearest_pairs]
        report["sheet"] = write_nearest_sheet(sheets, tally.shown, photos, report["distances"])
    return {"distances": set_distances(photographs, generated, seed=run.seed), "nearest": report}


def _as_often_as_held_out(
    run: EvaluationRun,
    pipeline: Pipeline,
    held: Sequence[Pair],
    encoder: Lite0Encoder,
    tally: _Tally,
    num_images: int,
) -> Tensor:
    """Features, (num_images, 1280), of generations for the held-out captions, each as often as it occurs there.

    Otherwise rare captions would count as much as common ones, and sets of perfect images would differ. A caption's first
    candidates are those that were ranked; what it lacks is generated, with the next numbers.
    """
    order = torch.randperm(len(held), generator=run.generator(), dtype=torch.int64, device="cpu").tolist()
    needed = Counter(held[order[place % len(held)]].captions[0] for place in range(num_images))
    kept = [tally.features[caption][:number] for caption, number in needed.items() if caption in tally.features]
    lacking: dict[range, list[str]] = {}  # candidate numbers -> captions that lack just these, decoded together
    for caption, number in needed.items():
        ranked = len(tally.features.get(caption, ()))
        for first in range(ranked, number, _BATCH_SEQUENCES):
            lacking.setdefault(range(first, min(number, first + _BATCH_SEQUENCES)), []).append(caption)
    params = pipeline.default_sampling_params.updated(seed=run.seed)
    done = sum(map(len, kept))
    run.on_progress("generating for distances", done, num_images)
    for numbers, captions in lacking.items():
        at_once = max(1, _BATCH_SEQUENCES // len(numbers))
        for start in range(0, len(captions), at_once):
            requests = pipeline.prepare(captions[start : start + at_once], params, candidate_numbers=numbers)
            tokens = torch.cat(pipeline.decode(requests))
            kept.append(head_mean(encoder.encode(map(pipeline.decode_images, tokens.split(run.batch_size)))))
            done += len(tokens)
            run.on_progress("generating for distances", done, num_images)
    return torch.cat(kept)
