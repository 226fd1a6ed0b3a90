"""Drawings of held-out captions, scored: KoCLIP score, FID, KID, agreement of colours and kinds.

The captions are chosen by the seed, never by hand, and each one's top-ranked drawing goes on the sheet as it is. A
random candidate is told as the mean over all candidates, which is what to expect of one. Every number about drawings
stands beside the same number of real pictures: what cannot be beaten, or what nothing learnt would get.

G captions, n candidates of each, S pixels.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from engine.data.kfashion.garment_classes import commonest_share
from engine.data.pairs import Pair, Pairs, load_image
from engine.metrics.colour import Lab, dominant_colour, nearest_colour_name
from engine.metrics.fid import LEAST_FOR_FID, LEAST_FOR_KID, feature_distances, koclip_features
from engine.metrics.independent_classifier import IndependentClassifier
from engine.metrics.parts import EvaluationRun
from engine.models.koclip import KoClip
from engine.pipeline.generation import Generation
from engine.pipeline.image_encoding import save_png
from engine.pipeline.image_files import paste_grid
from engine.pipeline.pipeline import Pipeline

_ROWS_AT_ONCE = 64  # candidates drawn together: bounds the memory of their caches
_SHEET_COLUMNS = 10


@dataclass(frozen=True)
class ColourNames:
    attribute: str
    palette: dict[str, Lab]

    def asked_for(self, pair: Pair) -> str | None:
        """The colour that a pair names; None if it names none, several, or one that the palette lacks."""
        value = pair.attributes.get(self.attribute)
        return value if isinstance(value, str) and value in self.palette else None

    def of(self, picture: np.ndarray) -> str:
        return nearest_colour_name(dominant_colour(picture), self.palette)


@dataclass
class _Tally:
    """What is kept of drawings; the pictures themselves are let go, all but the best."""

    best: list[Image.Image] = field(default_factory=list)
    listed: list[dict[str, Any]] = field(default_factory=list)
    top_scores: list[float] = field(default_factory=list)
    all_scores: list[float] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)
    top_colours: list[bool] = field(default_factory=list)
    all_colours: list[bool] = field(default_factory=list)
    differences: list[float] = field(default_factory=list)
    named: list[list[int]] = field(default_factory=list)  # of each caption the judge's kinds of its candidates

    def add(self, generation: Generation, asked_for: str | None, names: ColourNames | None) -> None:
        top = generation.candidates[0]
        self.best.append(top.image)
        self.listed.append(
            {"caption": generation.caption, "seed": top.seed, "candidate": top.candidate, "score": top.score}
        )
        scores = [one.score for one in generation.candidates if one.score is not None]
        self.top_scores += scores[:1]
        self.all_scores += scores
        if names is not None and asked_for is not None:
            right = [names.of(np.asarray(one.image)) == asked_for for one in generation.candidates]
            self.top_colours.append(right[0])
            self.all_colours += right


def colour_names(pairs: Pairs, attribute: str | None, palette: Mapping[str, Lab]) -> ColourNames | None:
    """Only names that occur: gold and silver, say, would take from yellow and grey what no label ever gives them."""
    occurring = {value for pair in pairs.all if isinstance(value := pair.attributes.get(attribute or ""), str)}
    kept = {name: colour for name, colour in palette.items() if name in occurring}
    return ColourNames(attribute, kept) if attribute is not None and kept else None


def score_generations(
    run: EvaluationRun,
    pipeline: Pipeline,
    pairs: Pairs,
    names: ColourNames | None,
    judge: IndependentClassifier | None,
    *,
    count: int,
    candidates: int,
    sheet: Path | None,
) -> dict[str, Any]:
    """Draws `count` different held-out captions, all when there are fewer.

    Args:
        names: colours that are read from pixels.
        judge: names the kind of garment; not the KoCLIP that ranks.

    Returns:
        captions, candidates, seed, captions_cut (captions too long for the model, their ends cut), sampling_params (the
        model's own);
        difference: how much the candidates of a caption differ: the standard deviation of a pixel over them, of
            [0, 1], averaged; None for one candidate;
        koclip_score, distances: when the model has a KoCLIP, see `_scores` and `_distances`;
        colour_agreement: when there are `names`, see `_colours`;
        kind_agreement: when there is a `judge`, see `_kinds`;
        sheet: when asked for, its file name and columns;
        top_ranked: of each caption, in the sheet's order, which drawing it is.
    """
    chosen = _chosen(pairs.validation, count, run.generator())
    tally, captions_at_once = _Tally(), max(1, _ROWS_AT_ONCE // candidates)
    captions_cut = 0
    run.on_progress("drawing", 0, len(chosen))
    for start in range(0, len(chosen), captions_at_once):
        part = chosen[start : start + captions_at_once]
        for pair, generation in zip(
            part, pipeline([pair.captions[0] for pair in part], candidates=candidates, seed=run.seed), strict=True
        ):
            tally.add(generation, names.asked_for(pair) if names is not None else None, names)
            captions_cut += generation.tokens_cut > 0
            images = torch.stack([_as_floats(one.image) for one in generation.candidates])  # (n, 3, S, S)
            batches = [batch.to(run.device) for batch in images.split(run.batch_size)]
            if candidates > 1:
                tally.differences.append(float(images.std(dim=0).mean()))
            if pipeline.koclip is not None:
                tally.features.append(koclip_features(pipeline.koclip, batches))
            if judge is not None:
                tally.named.append(judge.name(batches))
        run.on_progress("drawing", start + len(part), len(chosen))
    found: dict[str, Any] = {
        "captions": len(chosen), "candidates": candidates, "seed": run.seed, "captions_cut": captions_cut,
        "sampling_params": pipeline.default_sampling_params.generation_values(),
        "difference": sum(tally.differences) / len(tally.differences) if tally.differences else None,
    }  # fmt: skip
    if pipeline.koclip is not None:
        found["koclip_score"] = _scores(run, pipeline, chosen, tally)
        found["distances"] = _distances(run, pipeline, pipeline.koclip, pairs, torch.cat(tally.features))
    if names is not None:
        found["colour_agreement"] = _colours(pipeline.vqgan.config.image_size, pairs.validation, names, tally)
    if judge is not None:
        found["kind_agreement"] = _kinds(run, pipeline.vqgan.config.image_size, judge, pairs.validation, chosen, tally)
    if sheet is not None:
        save_png(sheet, paste_grid(tally.best, columns=_SHEET_COLUMNS), {"captions": tally.listed})
        found["sheet"] = {"file": sheet.name, "columns": _SHEET_COLUMNS}
    return found | {"top_ranked": tally.listed}


def _chosen(held: Sequence[Pair], count: int, generator: torch.Generator) -> list[Pair]:
    """`count` pairs of different captions at random, in the order of their keys."""
    different: dict[str, Pair] = {}
    for index in torch.randperm(len(held), generator=generator).tolist():
        different.setdefault(held[index].captions[0], held[index])
    return sorted(list(different.values())[:count], key=lambda pair: pair.key)


def _scores(run: EvaluationRun, pipeline: Pipeline, chosen: Sequence[Pair], tally: _Tally) -> dict[str, Any]:
    """KoCLIP's mean score of a caption with: its real picture, another caption's, the top-ranked, a random drawing."""
    captions = [pair.captions[0] for pair in chosen]
    batches = run.pictures(chosen, pipeline.vqgan.config.image_size, "scores of real pictures")
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


def _distances(run: EvaluationRun, pipeline: Pipeline, koclip: KoClip, pairs: Pairs, drawn: Tensor) -> dict[str, Any]:
    """FID and KID to the held-out pictures: of all drawings, and of as many training pictures, for a floor."""
    size = pipeline.vqgan.config.image_size  # that of the drawings, so that both are resized alike
    needed = min(LEAST_FOR_FID, LEAST_FOR_KID)
    if min(len(drawn), len(pairs.validation)) < needed:
        return {"left_out": f"{len(drawn)} drawings, {len(pairs.validation)} held-out pictures: {needed} are needed"}
    real = koclip_features(koclip, run.pictures(pairs.validation, size, "features of held-out pictures"))
    some = torch.randperm(len(pairs.train), generator=run.generator())[: len(drawn)].tolist()
    trained_on = [pairs.train[index] for index in some]
    floor = koclip_features(koclip, run.pictures(trained_on, size, "features of training pictures"))
    return {
        "drawings": feature_distances(real, drawn, seed=run.seed),
        "training_pictures": feature_distances(real, floor, seed=run.seed),
    }


def _colours(image_size: int, held: Sequence[Pair], names: ColourNames, tally: _Tally) -> dict[str, Any]:
    """Share of pictures whose colour, read from pixels, has the name that the caption's attribute gives.

    `real` over all held-out pairs with a colour is the ceiling; `commonest` is what naming every picture alike gets.
    """
    with_colour = [pair for pair in held if names.asked_for(pair)]
    right = [names.of(load_image(pair, image_size)) == names.asked_for(pair) for pair in with_colour]
    counts = Counter(names.asked_for(pair) for pair in with_colour)
    return {
        "attribute": names.attribute,
        "names": len(names.palette),
        "real": _share(right),
        "num_real": len(right),
        "commonest": counts.most_common(1)[0][1] / len(right) if right else None,
        "top_ranked": _share(tally.top_colours),
        "random": _share(tally.all_colours),
        "num_captions": len(tally.top_colours),
    }


def _kinds(
    run: EvaluationRun,
    image_size: int,
    judge: IndependentClassifier,
    held: Sequence[Pair],
    chosen: Sequence[Pair],
    tally: _Tally,
) -> dict[str, Any]:
    """Share of pictures whose kind, as the judge names it, is one that the caption may mean.

    `real`, over all held-out pairs of a known kind, tells what the judge is worth: drawings show what is typical and may
    be named rightly more often. `commonest` is what naming every drawing alike gets.
    """
    fitting = [judge.kinds.fitting(pair.captions[0]) for pair in held]
    named = judge.name(run.pictures(held, image_size, "kinds of held-out pictures"))
    right = [one in kinds for one, kinds in zip(named, fitting, strict=True) if kinds]
    asked = [judge.kinds.fitting(pair.captions[0]) for pair in chosen]
    drawn = [[one in kinds for one in named] for named, kinds in zip(tally.named, asked, strict=True) if kinds]
    return {
        "kinds": len(judge.kinds.told),
        "real": _share(right),
        "num_real": len(right),
        "commonest": commonest_share([kinds for kinds in asked if kinds]),
        "top_ranked": _share([one[0] for one in drawn]),
        "random": _share([one for row in drawn for one in row]),
        "num_captions": len(drawn),
    }


def _share(right: Sequence[bool]) -> float | None:
    return sum(right) / len(right) if right else None


def _as_floats(picture: Image.Image) -> Tensor:
    """(3, S, S) in [0, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
