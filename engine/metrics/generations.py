"""Generations of held-out captions, scored: KoCLIP score, FID, KID, agreement of colours and of caption classes.

The captions are chosen by the seed, never by hand, and the top-ranked image of each goes on the sheet as it is. `random` is
the mean over all candidates, the expectation of one. Every number about generations stands beside the same number of real
images, or beside what a constant answer gets.

G captions, n candidates of each, S pixels.
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

from engine.data.caption_classes import commonest_share
from engine.data.formats import palette_of
from engine.data.pairs import Pair, Pairs, load_image
from engine.metrics.colour import Lab, dominant_colour, lab_palette, nearest_colour_name
from engine.metrics.fid import LEAST_FOR_FID, LEAST_FOR_KID, feature_distances, koclip_features
from engine.metrics.independent_classifier import IndependentClassifier
from engine.metrics.parts import EvaluationRun
from engine.models.koclip import KoClip
from engine.pipeline.generation import Generation
from engine.pipeline.image_encoding import save_png
from engine.pipeline.image_files import paste_grid
from engine.pipeline.pipeline import Pipeline

_BATCH_SEQUENCES = 64  # candidates decoded together: bounds the memory of their KV cache
_SHEET_COLUMNS = 10


@dataclass(frozen=True)
class ColourNames:
    """The colours that a set's captions name."""

    attribute: str
    palette: dict[str, Lab]

    def stated(self, pair: Pair) -> str | None:
        """The colour that a pair states; None if it states none, several, or one that the palette lacks."""
        value = pair.attributes.get(self.attribute)
        return value if isinstance(value, str) and value in self.palette else None

    def of(self, image: np.ndarray) -> str:
        """The name of an image's colour."""
        return nearest_colour_name(dominant_colour(image), self.palette)


@dataclass
class _Tally:
    """Results for each caption, and the top-ranked images; the other images are not kept."""

    best: list[Image.Image] = field(default_factory=list)
    listed: list[dict[str, Any]] = field(default_factory=list)
    top_scores: list[float] = field(default_factory=list)
    all_scores: list[float] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)
    top_colours: list[bool] = field(default_factory=list)
    all_colours: list[bool] = field(default_factory=list)
    differences: list[float] = field(default_factory=list)
    classes: list[list[int]] = field(default_factory=list)  # for each caption, the classes of its candidates

    def add(self, generation: Generation, stated: str | None, names: ColourNames | None) -> None:
        top = generation.candidates[0]
        self.best.append(top.image)
        self.listed.append(
            {"caption": generation.caption, "seed": top.seed, "candidate": top.candidate, "score": top.score}
        )
        scores = [one.score for one in generation.candidates if one.score is not None]
        self.top_scores += scores[:1]
        self.all_scores += scores
        if names is not None and stated is not None:
            right = [names.of(np.asarray(one.image)) == stated for one in generation.candidates]
            self.top_colours.append(right[0])
            self.all_colours += right


def colour_names(pairs: Pairs) -> ColourNames | None:
    """The colours that the pairs' attributes name; None if they name none."""
    palette = palette_of(pair.attributes for pair in pairs.all)
    return None if palette is None else ColourNames(palette.attribute, lab_palette(palette.colours))


def score_generations(
    run: EvaluationRun,
    pipeline: Pipeline,
    pairs: Pairs,
    names: ColourNames | None,
    classifier: IndependentClassifier | None,
    *,
    count: int,
    candidates: int,
    sheet: Path | None,
) -> dict[str, Any]:
    """Generates images for `count` distinct held-out captions, for all when there are fewer.

    Args:
        names: colours to read from pixels.
        classifier: assigns images to caption classes; not the KoCLIP that ranks.

    Returns:
        captions, candidates, seed, captions_cut (captions too long for the model, their ends cut), sampling_params (the
        model's own);
        difference: how much the candidates of a caption differ: the standard deviation of a pixel over them, of
            [0, 1], averaged; None for one candidate;
        koclip_score, distances: when the model has a KoCLIP, see `_scores` and `_distances`;
        colour_agreement: with `names`, see `_colour_agreement`;
        class_agreement: with `classifier`, see `_class_agreement`;
        sheet: with `sheet`, its file name and columns;
        top_ranked: caption, seed, candidate and score of each image on the sheet, in its order.
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
            tally.add(generation, names.stated(pair) if names is not None else None, names)
            captions_cut += generation.tokens_cut > 0
            images = torch.stack([_as_floats(one.image) for one in generation.candidates])  # (n, 3, S, S)
            batches = [batch.to(run.device) for batch in images.split(run.batch_size)]
            if candidates > 1:
                tally.differences.append(float(images.std(dim=0).mean()))
            if pipeline.koclip is not None:
                tally.features.append(koclip_features(pipeline.koclip, batches))
            if classifier is not None:
                tally.classes.append(classifier.classify(batches))
        run.on_progress("generating", start + len(part), len(chosen))
    found: dict[str, Any] = {
        "captions": len(chosen), "candidates": candidates, "seed": run.seed, "captions_cut": captions_cut,
        "sampling_params": pipeline.default_sampling_params.generation_values(),
        "difference": sum(tally.differences) / len(tally.differences) if tally.differences else None,
    }  # fmt: skip
    if pipeline.koclip is not None:
        found["koclip_score"] = _scores(run, pipeline, chosen, tally)
        found["distances"] = _distances(run, pipeline, pipeline.koclip, pairs, torch.cat(tally.features))
    if names is not None:
        found["colour_agreement"] = _colour_agreement(pipeline.vqgan.config.image_size, pairs.validation, names, tally)
    if classifier is not None:
        size = pipeline.vqgan.config.image_size
        found["class_agreement"] = _class_agreement(run, size, classifier, pairs.validation, chosen, tally)
    if sheet is not None:
        save_png(sheet, paste_grid(tally.best, columns=_SHEET_COLUMNS), {"captions": tally.listed})
        found["sheet"] = {"file": sheet.name, "columns": _SHEET_COLUMNS}
    return found | {"top_ranked": tally.listed}


def _chosen(held: Sequence[Pair], count: int, generator: torch.Generator) -> list[Pair]:
    """`count` pairs of distinct captions at random, in the order of their keys."""
    distinct: dict[str, Pair] = {}
    for index in torch.randperm(len(held), generator=generator, dtype=torch.int64, device="cpu").tolist():
        distinct.setdefault(held[index].captions[0], held[index])
    return sorted(list(distinct.values())[:count], key=lambda pair: pair.key)


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


def _distances(
    run: EvaluationRun, pipeline: Pipeline, koclip: KoClip, pairs: Pairs, generated: Tensor
) -> dict[str, Any]:
    """FID and KID to the held-out images: of all generations, and of as many training images, for a floor."""
    size = pipeline.vqgan.config.image_size  # that of the generations, so that both are resized alike
    needed = min(LEAST_FOR_FID, LEAST_FOR_KID)
    if min(len(generated), len(pairs.validation)) < needed:
        counts = f"{len(generated)} generations, {len(pairs.validation)} held-out images"
        return {"left_out": f"{counts}: {needed} are needed"}
    real = koclip_features(koclip, run.images(pairs.validation, size, "features of held-out images"))
    order = torch.randperm(len(pairs.train), generator=run.generator(), dtype=torch.int64, device="cpu")
    trained_on = [pairs.train[index] for index in order[: len(generated)].tolist()]
    floor = koclip_features(koclip, run.images(trained_on, size, "features of training images"))
    return {
        "generations": feature_distances(real, generated, seed=run.seed),
        "training_images": feature_distances(real, floor, seed=run.seed),
    }


def _colour_agreement(image_size: int, held: Sequence[Pair], names: ColourNames, tally: _Tally) -> dict[str, Any]:
    """Share of images whose colour, read from pixels, has the name that the caption's attribute states.

    `real` over all held-out pairs with a colour is the ceiling; `commonest` is the best constant answer.
    """
    with_colour = [pair for pair in held if names.stated(pair)]
    right = [names.of(load_image(pair, image_size)) == names.stated(pair) for pair in with_colour]
    counts = Counter(names.stated(pair) for pair in with_colour)
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


def _class_agreement(
    run: EvaluationRun,
    image_size: int,
    classifier: IndependentClassifier,
    held: Sequence[Pair],
    chosen: Sequence[Pair],
    tally: _Tally,
) -> dict[str, Any]:
    """Share of images whose class, by the independent classifier, is one that the caption may mean.

    `real`, over all held-out pairs of a known class, shows how good the classifier is: generations show typical images and
    may be classified better. `commonest` is the best constant answer.
    """
    matching = [classifier.classes.matching(pair) for pair in held]
    found = classifier.classify(run.images(held, image_size, "classes of held-out images"))
    right = [number in classes for number, classes in zip(found, matching, strict=True) if classes]
    stated = [classifier.classes.matching(pair) for pair in chosen]
    generated = [
        [number in classes for number in numbers]
        for numbers, classes in zip(tally.classes, stated, strict=True)
        if classes
    ]
    return {
        "classes": len(classifier.classes.facts),
        "real": _share(right),
        "num_real": len(right),
        "commonest": commonest_share([classes for classes in stated if classes]),
        "top_ranked": _share([candidates[0] for candidates in generated]),
        "random": _share([one for candidates in generated for one in candidates]),
        "num_captions": len(generated),
    }


def _share(right: Sequence[bool]) -> float | None:
    return sum(right) / len(right) if right else None


def _as_floats(image: Image.Image) -> Tensor:
    """(3, S, S) in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
