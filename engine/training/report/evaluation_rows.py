"""The figures of an evaluation as rows of one table: each beside chance, real photographs, and what the codec alone loses.

A figure without these says little: FID between two sets of real photographs is far from 0 where there are a few hundred, and a classifier
is wrong about photographs, too.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Report = Mapping[str, Any]
HIGHER, LOWER = "higher", "lower"


@dataclass(frozen=True)
class Row:
    """A figure.

    Attributes:
        features: the network whose features it is measured in; empty: none.
        better: `higher` or `lower`; empty: neither.
        value: of the model: of top-ranked images, or of the whole set of generations.
        random: of a candidate taken at random, or of a guess.
        real: of real photographs, measured alike.
        floor: of photographs as the codec reconstructs them: what no transformer over it can beat.
        of: what it was measured on.
    """

    section: str
    name: str
    features: str
    better: str
    value: float | None
    random: float | None = None
    real: float | None = None
    floor: float | None = None
    of: str = ""


_SETS = {
    "fid": ("FID", LOWER), "kid": ("KID", LOWER), "precision": ("precision", HIGHER), "recall": ("recall", HIGHER),
}  # fmt: skip
_AGREEMENTS = {
    "colour_agreement": "the colour in the pixels is the caption's",
    "class_agreement": "the class, by the independent classifier, is the caption's",
    "colour_and_class_agreement": "both",
}
_MEASURES = _AGREEMENTS | {
    "ranker_score": "the ranker's own score", "oracle": "right in all, by the oracle", "clip_score": "CLIP score",
}  # fmt: skip


def evaluation_rows(report: Report) -> list[Row]:
    """The rows of what `engine.metrics.evaluate` reported; what it lacks has none."""
    generations = report.get("generations", {})
    return [
        *_codec(report.get("reconstruction", {})),
        *_parts(report),
        *_captions(generations),
        *_sets(generations, report.get("reconstruction", {}).get("features", {})),
        *_best_of(generations.get("best_of_n", {})),
    ]


def measure_name(measure: str) -> str:
    """A measure of the curves of best-of-N in words."""
    return _MEASURES.get(measure, measure.replace("_", " "))


def _codec(reconstruction: Report) -> Iterator[Row]:
    section = "codec: photographs and their reconstructions"
    if "psnr_db" in reconstruction:
        of = f"{reconstruction['images']} held-out photographs"
        yield Row(section, "PSNR, dB", "", HIGHER, reconstruction["psnr_db"], of=of)
        yield Row(section, "share of the codebook in use", "", HIGHER, reconstruction["codebook_used"], of=of)
    title, name = (reconstruction.get("features", {}).get(key, "") for key in ("title", "name"))
    for which, words in (("held_out", "held-out photographs"), ("training_images", "training photographs")):
        row = reconstruction.get("distances", {}).get(which, {})
        for key in ("fid", "kid"):
            value = row.get(f"{key}_{name}_features")
            if value is not None:
                of = f"{row['num_real']:,} {words} against themselves"
                yield Row(section, f"reconstruction {_SETS[key][0]}", title, LOWER, value, of=of)


def _parts(report: Report) -> Iterator[Row]:
    kodalle, koclip, classifier = (report.get(name, {}) for name in ("kodalle", "koclip", "independent_classifier"))
    if kodalle:
        of = f"{kodalle['pairs']} held-out pairs"
        section = "transformer"
        yield Row(section, "loss of image tokens, nats", "", LOWER, kodalle["loss_image"], of=of)
        yield Row(section, "loss of text tokens, nats", "", LOWER, kodalle["loss_text"], of=of)
        yield Row(section, "image token predicted first", "", HIGHER, kodalle["image_top1"], of=of)
    if koclip:
        among = koclip["recall_among"]
        of = f"{koclip['pairs']} photographs, among {among} captions"
        for rank, words in ((1, "first"), (5, "among five")):
            random = min(1.0, rank / among)
            yield Row("ranker", f"right caption {words}", "", HIGHER, koclip[f"recall_at_{rank}"], random=random, of=of)
    if "accuracy" in classifier:
        of = f"{classifier['images']} photographs; it has no part in making or ranking images"
        yield Row(
            "independent classifier", "names held-out photographs rightly", "", HIGHER, classifier["accuracy"],
            random=classifier["majority"], of=of,
        )  # fmt: skip


def _captions(generations: Report) -> Iterator[Row]:
    section = "images of single captions"
    score = generations.get("koclip_score")
    captions = f"{generations.get('captions')} captions"
    if score:
        of = f"{captions}; another caption's photograph: {_text(score['real_of_another_caption'])}; it also ranked them"
        yield Row(
            section, "KoCLIP score", "", HIGHER, score["top_ranked"], random=score["random"], real=score["real"], of=of
        )
    clip = generations.get("clip_score")
    if clip:
        of = f"{captions} {clip['captions']}; another caption's photograph: {_text(clip['real_of_another_caption'])}"
        of += "; it also ranked them" if clip["also_ranked"] else ""
        yield Row(
            section, "CLIP score", clip["name"], HIGHER, clip["top_ranked"], random=clip["random"], real=clip["real"],
            of=of,
        )  # fmt: skip
    for key, words in _AGREEMENTS.items():
        shares = generations.get(key)
        if shares and shares["top_ranked"] is not None:
            constant = shares.get("commonest")
            of = f"{shares['num_captions']} captions"
            of += f"; a constant answer: {_text(constant)}" if constant is not None else ""
            yield Row(
                section, words, "", HIGHER, shares["top_ranked"], random=shares["random"], real=shares["real"], of=of
            )
    oracle = generations.get("oracle")
    if oracle:
        yield Row(
            section, _MEASURES["oracle"], "", HIGHER, oracle["top_ranked"]["all"], random=oracle["random"]["all"],
            real=oracle["real"]["all"], of=captions,
        )  # fmt: skip
    difference = generations.get("difference")
    if difference is not None:
        of = f"{generations['candidates']} candidates of each caption; 0: all alike"
        yield Row(section, "difference of candidates", "", "", difference, of=of)


def _sets(generations: Report, features: Report) -> Iterator[Row]:
    title, name = features.get("title", ""), features.get("name", "")
    sides = (
        ("to_held_out", "held-out", "training_images", "reconstructed_training_images"),
        ("to_training", "training", "held_out", "reconstructed_held_out"),
    )
    for to, words, real, floor in sides:
        rows = generations.get("distances", {}).get(to)
        if not rows:
            continue
        model = rows["generations"]
        of = f"{model['num_other']:,} generations, {model['num_real']:,} {words} photographs"
        for key, (shown, better) in _SETS.items():
            figure = f"{key}_{name}_features"
            if model.get(figure) is not None:
                yield Row(
                    "sets of images", f"{shown} to {words} photographs", title, better, model[figure],
                    real=rows[real][figure], floor=rows[floor][figure], of=of,
                )  # fmt: skip
    score = generations.get(f"inception_score_{name}_features")
    if score:
        model = score["generations"]
        of = f"{model['images']:,} images each, {model['splits']} split" + ("s" if model["splits"] > 1 else "")
        yield Row(
            "sets of images", "Inception Score", title, HIGHER, model["mean"], real=score["training_images"]["mean"],
            floor=score["reconstructed_training_images"]["mean"], of=of,
        )  # fmt: skip
    nearest = generations.get("nearest")
    if nearest:
        near = nearest["as_near_as_copies"]
        of = f"{len(nearest['distances'])} top-ranked images; floor: a training photograph's own copy; {near} are as near"
        yield Row(
            "sets of images", "distance to the nearest training photograph, median", title, "",
            nearest["generations"]["median"], real=nearest["held_out"]["median"],
            floor=nearest["reconstructed_training_images"]["median"], of=of,
        )  # fmt: skip


def _best_of(curves: Report) -> Iterator[Row]:
    for measure, found in curves.get("measures", {}).items():
        of = f"{found['captions']} captions; a perfect ranker: {_text(found['best'][-1])}"
        yield Row(
            f"best of {curves['candidates']}", measure_name(measure), "", HIGHER, found["top_ranked"][-1],
            random=found["top_ranked"][0], real=found["real"], of=of,
        )  # fmt: skip


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
