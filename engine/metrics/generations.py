"""Generations of held-out captions, scored: KoCLIP and CLIP score, colours, caption classes, what ranking is worth, distances.

The captions are chosen by the seed, never by hand, and the top-ranked image of each goes on the sheets as it is. `random` is
the mean over all candidates, the expectation of one. Every number about generations stands beside the same number of real
images, or beside what a constant answer gets. Each image is generated once: what is read, ranked and compared is the same one.

G captions, n candidates of each, S pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from engine.data.pairs import Pair, Pairs, load_image
from engine.metrics.agreement import Right
from engine.metrics.best_of_n import BestOfCurves, best_of_numbers
from engine.metrics.clip_score import clip_report
from engine.metrics.distance_generations import DistanceGenerations
from engine.metrics.oracle import shares_right
from engine.metrics.parts import EvaluationRun
from engine.metrics.readings import CandidateReader, Readings
from engine.metrics.sheets import (
    BEST_OF_ROWS,
    SHEET_IMAGES,
    BestOfRow,
    Shown,
    write_best_of_sheet,
    write_sheets,
)
from engine.pipeline.generation import Generation
from engine.pipeline.pipeline import Pipeline

_BATCH_SEQUENCES = 64  # candidates decoded together: bounds the memory of their KV cache


@dataclass(frozen=True)
class GenerationCounts:
    """How much is generated.

    Attributes:
        captions: distinct held-out captions that are scored; 0: none.
        candidates: images of each.
        best_of: candidates of each of the first `best_of_captions` captions, for the curves of best-of-N; 0: no curves.
    """

    captions: int
    candidates: int
    best_of: int = 0
    best_of_captions: int = 0

    def of(self, place: int) -> int:
        """Candidates of the caption at a place."""
        own = self.candidates if place < self.captions else 0
        return max(own, self.best_of if place < self.best_of_captions else 0)


@dataclass
class _Tally:
    """Results for each caption, and the first top-ranked images; the other images are not kept."""

    shown: list[Shown] = field(default_factory=list)
    listed: list[dict[str, Any]] = field(default_factory=list)
    top_scores: list[float] = field(default_factory=list)
    all_scores: list[float] = field(default_factory=list)
    differences: list[float] = field(default_factory=list)
    readings: list[Readings] = field(default_factory=list)  # for each caption, of its candidates, best first
    captions_cut: int = 0

    def add(self, pair: Pair, generation: Generation, readings: Readings) -> None:
        top = generation.candidates[0]
        made = {"caption": generation.caption, "seed": top.seed, "candidate": top.candidate, "score": top.score}
        self.listed.append(made | {"key": pair.key})
        if len(self.shown) < SHEET_IMAGES:
            self.shown.append(Shown(top.image, generation.caption))
        scores = [one.score for one in generation.candidates if one.score is not None]
        self.top_scores += scores[:1]
        self.all_scores += scores
        self.readings.append(readings)
        self.captions_cut += generation.tokens_cut > 0
        if len(generation.candidates) > 1:
            pixels = [np.asarray(one.image) for one in generation.candidates]
            self.differences.append(float(np.std(pixels, axis=0, ddof=1).mean() / 255))


@dataclass(frozen=True)
class ScoredGenerations:
    """The report, and the images that the sheets show."""

    report: dict[str, Any]
    shown: list[Shown]


def score_generations(
    run: EvaluationRun,
    pipeline: Pipeline,
    pairs: Pairs,
    reader: CandidateReader,
    counts: GenerationCounts,
    *,
    distances: DistanceGenerations | None = None,
    sheets: Path | None = None,
) -> ScoredGenerations:
    """Generates images for distinct held-out captions, for all when there are fewer than `counts` says.

    Args:
        distances: takes the candidates that distances need.
        sheets: where PNGs of top-ranked images go, see engine.metrics.sheets.

    Returns, where captions are scored:
        captions, candidates, seed, captions_cut (captions too long for the model, their ends cut), sampling_params (the
        model's own);
        difference: how much the candidates of a caption differ: the standard deviation of a pixel over them, of
            [0, 1], averaged; None for one candidate;
        koclip_score: when the model has a KoCLIP, see `_scores`;
        clip_score: with a CLIP, see `clip_report`;
        colour_agreement, class_agreement, colour_and_class_agreement: see `ImageReader.report`;
        oracle: with one, see `shares_right`;
        sheets: with `sheets`, their file names;
        top_ranked: caption, held-out pair, seed, candidate and score of each top-ranked image, the sheets' first.
    And with `counts.best_of`, best_of_n: see `BestOfCurves.report`, and its sheet's name.
    """
    captions = max(counts.captions, counts.best_of_captions if counts.best_of else 0)
    chosen = chosen_pairs(pairs.validation, captions, run.generator())
    tally, curves, rows = _Tally(), BestOfCurves(counts.best_of), list[BestOfRow]()
    run.on_progress("generating", 0, len(chosen))
    for start, part in _parts(chosen, counts):
        generations = pipeline([pair.captions[0] for pair in part], candidates=counts.of(start), seed=run.seed)
        for place, (pair, generation) in enumerate(zip(part, generations, strict=True), start):
            readings = reader.read(pair, [one.image for one in generation.candidates])
            if distances is not None:
                distances.add(generation)
            if counts.best_of and place < counts.best_of_captions:
                some, own = _first(generation, readings, counts.best_of)
                _add_to_curves(curves, rows, pipeline, reader, pair, some, own)
            if place < counts.captions:
                tally.add(pair, *_first(generation, readings, counts.candidates))
        run.on_progress("generating", start + len(part), len(chosen))
    found: dict[str, Any] = {}
    if counts.captions:
        found = _report(run, pipeline, pairs, reader, chosen[: counts.captions], counts, tally, sheets)
    if counts.best_of:
        found["best_of_n"] = curves.report()
        if sheets is not None:
            found["best_of_n"]["sheet"] = write_best_of_sheet(sheets, rows)
    return ScoredGenerations(found | ({"top_ranked": tally.listed} if counts.captions else {}), tally.shown)


def _parts(chosen: Sequence[Pair], counts: GenerationCounts) -> list[tuple[int, Sequence[Pair]]]:
    """Captions that are decoded together, with the place of the first: they have equally many candidates."""
    parts, start = [], 0
    while start < len(chosen):
        end, candidates = start + 1, counts.of(start)
        most = start + max(1, _BATCH_SEQUENCES // candidates)
        while end < min(most, len(chosen)) and counts.of(end) == candidates:
            end += 1
        parts.append((start, chosen[start:end]))
        start = end
    return parts


def _first(generation: Generation, readings: Readings, count: int) -> tuple[Generation, Readings]:
    """A generation as if only its first candidates had been made, best first as they are."""
    places = [place for place, one in enumerate(generation.candidates) if one.candidate < count]
    return replace(generation, candidates=tuple(generation.candidates[place] for place in places)), readings.first(
        places
    )


def _report(
    run: EvaluationRun,
    pipeline: Pipeline,
    pairs: Pairs,
    reader: CandidateReader,
    chosen: Sequence[Pair],
    counts: GenerationCounts,
    tally: _Tally,
    sheets: Path | None,
) -> dict[str, Any]:
    found: dict[str, Any] = {
        "captions": len(chosen), "candidates": counts.candidates, "seed": run.seed, "captions_cut": tally.captions_cut,
        "sampling_params": pipeline.default_sampling_params.generation_values(),
        "difference": sum(tally.differences) / len(tally.differences) if tally.differences else None,
    }  # fmt: skip
    if pipeline.koclip is not None:
        found["koclip_score"] = _scores(run, pipeline, chosen, tally)
    if reader.clip is not None:
        found["clip_score"] = _clip_scores(run, pipeline, reader, chosen, tally)
    right = [readings.right for readings in tally.readings]
    found |= reader.colours_and_classes.report(pairs.validation, _real(run, pipeline, pairs, reader), right)
    if reader.oracle is not None:
        size = pipeline.vqgan.config.image_size
        real = [reader.oracle(pair, [Image.fromarray(load_image(pair, size))])[0] for pair in chosen]
        found["oracle"] = shares_right([readings.oracle for readings in tally.readings], real)
    if sheets is not None:
        found["sheets"] = write_sheets(run, pipeline, pairs.validation, tally.shown, sheets, made=tally.listed)
    return found


def chosen_pairs(held: Sequence[Pair], count: int, generator: torch.Generator) -> list[Pair]:
    """`count` pairs of distinct captions at random; more of them begin with the same."""
    distinct: dict[str, Pair] = {}
    for index in torch.randperm(len(held), generator=generator, dtype=torch.int64, device="cpu").tolist():
        distinct.setdefault(held[index].captions[0], held[index])
    return list(distinct.values())[:count]


def _real(run: EvaluationRun, pipeline: Pipeline, pairs: Pairs, reader: CandidateReader) -> list[Right]:
    """Whether each held-out photograph shows what its own caption states."""
    size, held, colours_and_classes = pipeline.vqgan.config.image_size, pairs.validation, reader.colours_and_classes
    if reader.encoder is None:
        features = torch.empty(len(held), 0, dtype=torch.float32, device="cpu")
    else:
        features = reader.encoder.encode(run.images(held, size, "classes of held-out photographs"))
    return [
        colours_and_classes.read(pair, [load_image(pair, size)], own[None])[0]
        for pair, own in zip(held, features, strict=True)
    ]


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


def _clip_scores(
    run: EvaluationRun, pipeline: Pipeline, reader: CandidateReader, chosen: Sequence[Pair], tally: _Tally
) -> dict[str, Any]:
    assert reader.clip is not None
    images = torch.cat(list(run.images(chosen, pipeline.vqgan.config.image_size, "CLIP scores of real images")))
    captions = [pair.captions[0] for pair in chosen]
    real, other = (
        [
            score
            for caption, one in zip(captions, some, strict=True)
            for score in reader.clip_scores(caption, [one[None]])
        ]
        for some in (images, images.roll(1, dims=0))
    )
    every = [score for readings in tally.readings for score in readings.clip]
    top = [readings.clip[0] for readings in tally.readings]
    return clip_report(reader.clip, real, other if len(chosen) > 1 else [], top, every)


def _add_to_curves(
    curves: BestOfCurves,
    rows: list[BestOfRow],
    pipeline: Pipeline,
    reader: CandidateReader,
    pair: Pair,
    generation: Generation,
    readings: Readings,
) -> None:
    photograph = Image.fromarray(load_image(pair, pipeline.vqgan.config.image_size))
    [pixels] = reader.run.batches([photograph])
    real_score = pipeline.rank_scores([pair.captions[0]], pixels[None])
    assert real_score is not None, "the model has a ranker"
    measures = {"ranker_score": [one.score for one in generation.candidates], **readings.measures()}
    real = {name: values[0] for name, values in reader.read(pair, [photograph]).measures().items()}
    curves.add(measures, {"ranker_score": float(real_score[0, 0]), **real})
    if len(rows) < BEST_OF_ROWS:
        best = [
            next(one for one in generation.candidates if one.candidate < number)
            for number in best_of_numbers(curves.num_candidates)
        ]
        images = [
            (f"best of {number}", one.image, one.score)
            for number, one in zip(best_of_numbers(curves.num_candidates), best, strict=True)
        ]
        rows.append(BestOfRow(generation.caption, [*images, ("photograph", photograph, float(real_score[0, 0]))]))
