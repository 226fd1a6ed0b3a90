"""One word of a caption changed: the image with only what that word touches sampled anew, beside a free generation.

    python benchmarks/attribute_lock.py models/clothing

For each of eight captions of garments: an image (`before`), then the caption with another colour with `changed_from` (`locked`: engine/pipeline/
token_choice.py) and without an init image, with the same seed (`free`). Figures of both beside the image before:

    kept           share of its tokens that are kept
    silhouette     intersection over union of what differs from the ground
    lite0          distance in EfficientNet-Lite0's features, as metrics measure it
    new_colour     whether the subject's colour is nearer to the new word's than to the old one's
    seconds        of the choice of tokens: processor time of one thread

and with `strength` under the same caption, at four strengths, for the first captions: a sheet of its own.

Writes attribute_lock.json, sheet.png and strength.png into benchmarks/results/attribute_lock/ (`--out`). Nothing is chosen by hand: captions
and seeds are those below.
"""

import argparse
import sys
import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sheet_benchmark import run_sheets, sheet_parser, write_sheet

from engine.data.kfashion.colours import K_FASHION_COLOURS
from engine.metrics.colour import srgb_to_lab
from engine.metrics.lite0_features import Lite0Encoder
from engine.models.efficientnet_lite0 import HEAD_CHANNELS
from engine.pipeline.generation import Candidate
from engine.pipeline.init_image import InitImage
from engine.pipeline.pipeline import Pipeline

_NAME = "attribute_lock"
_PAIRS = (
    ("상의에서 색상은 {}이다. 상의에서 카테고리는 티셔츠이다. 상의에서 소매기장은 반팔이다.", "레드", "네이비"),
    ("상의에서 색상은 {}이다. 상의에서 카테고리는 셔츠이다. 상의에서 소매기장은 긴팔이다.", "블랙", "화이트"),
    ("원피스에서 기장은 미니이다. 원피스에서 색상은 {}이다. 원피스에서 카테고리는 드레스이다.", "핑크", "블랙"),
    ("하의에서 기장은 발목이다. 하의에서 색상은 {}이다. 하의에서 카테고리는 팬츠이다.", "블루", "베이지"),
    ("아우터에서 색상은 {}이다. 아우터에서 카테고리는 점퍼이다.", "카키", "레드"),
    ("상의에서 색상은 {}이다. 상의에서 카테고리는 후드티이다. 상의에서 소매기장은 긴팔이다.", "그레이", "그린"),
    ("하의에서 기장은 미니이다. 하의에서 색상은 {}이다. 하의에서 카테고리는 스커트이다.", "화이트", "레드"),
    ("상의에서 색상은 {}이다. 상의에서 카테고리는 티셔츠이다. 상의에서 소매기장은 반팔이다.", "화이트", "옐로우"),
)
_STRENGTHS = (0.0, 0.2, 0.4, 0.8)
_STRENGTH_ROWS = 3
_GROUND_DISTANCE = 12.0  # in Lab, as in engine/metrics/colour.py


def main() -> int:
    return run_sheets(_NAME, sheet_parser(__doc__, _NAME, candidates=4, seed=11).parse_args(), measure)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures of attribute_lock.json; writes the sheets."""
    pipeline, encoder = Pipeline.from_pretrained(arguments.model), Lite0Encoder(torch.device("cpu"))
    rows: list[dict[str, Any]] = []
    images, texts, befores = [], [], []
    for form, old, new in _PAIRS:
        captions = form.format(old), form.format(new)
        before = _best(pipeline, captions[0], arguments)
        befores.append((captions[0], before))
        locked_from = InitImage(before.image, changed_from=captions[0])
        started = time.process_time()
        prepared = pipeline.prepare(captions[1:], init_image=locked_from)[0]
        seconds = time.process_time() - started
        assert prepared.init_tokens is not None
        locked = _best(pipeline, captions[1], arguments, locked_from)
        free = _best(pipeline, captions[1], arguments)
        figures = {
            name: _figures(encoder, np.asarray(before.image), np.asarray(one.image), old, new)
            for name, one in (("locked", locked), ("free", free))
        }
        kept = float((prepared.init_tokens >= 0).float().mean())
        rows.append({"caption": captions[0], "old": old, "new": new, "kept": kept, "seconds": seconds, **figures})
        images += [before.image, locked.image, free.image]
        iou = figures["locked"]["silhouette"], figures["free"]["silhouette"]
        texts += [
            [captions[0]],
            [f"{new}, kept {kept:.0%}", f"IoU {iou[0]:.2f}"],
            [f"{new}, free", f"IoU {iou[1]:.2f}"],
        ]
        print(f"{old} -> {new}: kept {kept:.2f}, silhouette {iou[0]:.2f}, free {iou[1]:.2f}", flush=True)
    write_sheet(arguments.out / "sheet.png", images, texts, benchmark=_NAME, columns=6)
    _write_strengths(pipeline, arguments, befores[:_STRENGTH_ROWS])
    means = {
        name: {key: float(np.mean([row[name][key] for row in rows])) for key in ("silhouette", "lite0", "new_colour")}
        for name in ("locked", "free")
    }
    return {
        "config": {"candidates": arguments.candidates, "seed": arguments.seed},
        "kept": float(np.mean([row["kept"] for row in rows])),
        "means": means,
        "pairs": rows,
    }


def _best(
    pipeline: Pipeline, caption: str, arguments: argparse.Namespace, init_image: InitImage | None = None
) -> Candidate:
    generations = pipeline([caption], candidates=arguments.candidates, seed=arguments.seed, init_image=init_image)
    return generations[0].candidates[0]


def _figures(
    encoder: Lite0Encoder, before: NDArray[np.uint8], after: NDArray[np.uint8], old: str, new: str
) -> dict[str, Any]:
    pair = torch.from_numpy(np.stack([before, after])).permute(0, 3, 1, 2).float() / 255
    features = encoder.encode([pair])[:, :HEAD_CHANNELS]
    subjects = [_subject(image) for image in (before, after)]
    colour = np.median(srgb_to_lab(after)[subjects[1]], axis=0) if subjects[1].any() else np.zeros(3)
    away = [np.linalg.norm(colour - srgb_to_lab(np.array(K_FASHION_COLOURS[name], np.uint8))) for name in (new, old)]
    return {
        "silhouette": float((subjects[0] & subjects[1]).sum() / max(1, (subjects[0] | subjects[1]).sum())),
        "lite0": float((features[0] - features[1]).norm()),
        "new_colour": bool(away[0] < away[1]),
    }


def _subject(image: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """(S, S): what differs from the ground, which is the median of the border."""
    lab = srgb_to_lab(image)
    border = np.concatenate([lab[0], lab[-1], lab[:, 0], lab[:, -1]])
    return np.asarray(np.linalg.norm(lab - np.median(border, axis=0), axis=-1) > _GROUND_DISTANCE)


def _write_strengths(pipeline: Pipeline, arguments: argparse.Namespace, befores: list[tuple[str, Candidate]]) -> None:
    images, texts = [], []
    for caption, before in befores:
        images.append(before.image)
        texts.append([caption])
        for strength in _STRENGTHS:
            init_image = InitImage(before.image, strength=strength)
            images.append(_best(pipeline, caption, arguments, init_image).image)
            texts.append([f"strength {strength}"])
    write_sheet(arguments.out / "strength.png", images, texts, benchmark=_NAME, columns=1 + len(_STRENGTHS))


if __name__ == "__main__":
    sys.exit(main())
