"""Sheets of images for looking at: generations without and with their captions, best of N, reconstructions, nearest photographs.

Nothing on them is chosen or edited: they show the first captions of the seed's order, the top-ranked image of each. An
image pixel is one pixel, or a whole number of them where a file says so. Captions are in each file's metadata, too.

S pixels.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from engine.data.formats import grammar_of
from engine.data.pairs import Pair
from engine.metrics.parts import EvaluationRun
from engine.pipeline.ai_marks import DigitalSource
from engine.pipeline.image_encoding import save_png
from engine.pipeline.image_files import captioned_sheet, cut_grid, paste_grid, to_uint8
from engine.pipeline.pipeline import Pipeline

SHEET_IMAGES = 40
LARGE_IMAGES = 8
LARGE_SCALE = 2
_COLUMNS = 10  # of images alone
_CAPTIONED_COLUMNS, _CAPTION_WIDTH = 8, 156
_LARGE_COLUMNS = 4
_PAIR_COLUMNS = 5
BEST_OF_ROWS = 6
_BESIDE_PHOTOGRAPHS: DigitalSource = "compositeWithTrainedAlgorithmicMedia"


class Shown(NamedTuple):
    """A top-ranked image and its caption."""

    image: Image.Image
    caption: str


class BestOfRow(NamedTuple):
    """A caption, and what would be shown for it: (what it is, image, the ranker's score) of each column."""

    caption: str
    columns: Sequence[tuple[str, Image.Image, float | None]]


def write_sheets(
    run: EvaluationRun,
    pipeline: Pipeline,
    held: Sequence[Pair],
    shown: Sequence[Shown],
    path: Path,
    *,
    made: Sequence[Mapping[str, Any]],
) -> dict[str, str]:
    """Writes the sheets of top-ranked images beside `path`, which is the one without captions.

    Args:
        held: held-out pairs, for reconstructions.
        made: caption, seed, candidate and score of each image shown, for the metadata.

    Returns:
        File names:
        plain: the images alone, for naming what they show before reading;
        captioned: the same with captions, their English where the grammar knows it, seeds and candidate numbers;
        large: the first 8 of them, each pixel as 2 x 2;
        reconstructions: held-out photographs, each above what the codec makes of it.
    """
    images, captions = [one.image for one in shown], [one.caption for one in shown]
    grammar = grammar_of(captions)
    texts = [[text] if grammar is None else [text, grammar.in_english(text)] for text in captions]
    for own, one in zip(texts, made, strict=False):  # more may be made than shown
        own.append(f"seed {one['seed']}, candidate {one['candidate']}")
    sheets = {
        "plain": paste_grid(images, columns=_COLUMNS),
        "captioned": captioned_sheet(images, texts, columns=_CAPTIONED_COLUMNS, cell_width=_CAPTION_WIDTH),
        "large": captioned_sheet(
            images[:LARGE_IMAGES], texts[:LARGE_IMAGES], columns=_LARGE_COLUMNS, cell_width=0, scale=LARGE_SCALE
        ),
    }
    files = {}
    for name, sheet in sheets.items():
        file = path if name == "plain" else _beside(path, name)
        save_png(file, sheet, {"captions": list(made[: len(images)])})
        files[name] = file.name
    photographs = held[:SHEET_IMAGES]
    file = _beside(path, "reconstructions")
    metadata = {"photographs": [pair.key for pair in photographs]}
    save_png(file, _reconstructions(run, pipeline, photographs), metadata, source=_BESIDE_PHOTOGRAPHS)
    return files | {"reconstructions": file.name}


def read_sheet(path: Path, count: int) -> list[Image.Image]:
    """The first images of a sheet without captions."""
    with Image.open(path) as sheet:
        return cut_grid(sheet, min(count, SHEET_IMAGES), columns=_COLUMNS)


def write_nearest_sheet(
    path: Path, shown: Sequence[Shown], photographs: Sequence[np.ndarray], distances: Sequence[float]
) -> str:
    """Each generation beside its nearest training photograph, the distance beneath; returns the file's name.

    Args:
        photographs: (S, S, 3) uint8 each.
    """
    couples = [
        paste_grid([one.image, Image.fromarray(photograph)], columns=2, gap=0)
        for one, photograph in zip(shown, photographs, strict=True)
    ]
    texts = [[f"{distance:.2f}"] for distance in distances]
    file = _beside(path, "nearest")
    sheet = captioned_sheet(couples, texts, columns=_PAIR_COLUMNS, cell_width=0)
    metadata = {"captions": [one.caption for one in shown], "distances": list(distances)}
    save_png(file, sheet, metadata, source=_BESIDE_PHOTOGRAPHS)
    return file.name


def write_best_of_sheet(path: Path, rows: Sequence[BestOfRow]) -> str:
    """The best-ranked of the first 1, 2, 4, ... candidates, a row a caption, its photograph last; returns the file's name."""
    columns = [column for row in rows for column in row.columns]
    texts = [[what, *([] if score is None else [f"score {score:.2f}"])] for what, _, score in columns]
    file = _beside(path, "best-of-n")
    sheet = captioned_sheet([image for _, image, _ in columns], texts, columns=len(rows[0].columns), cell_width=72)
    save_png(file, sheet, {"captions": [row.caption for row in rows]})
    return file.name


def _reconstructions(run: EvaluationRun, pipeline: Pipeline, photographs: Sequence[Pair]) -> Image.Image:
    """Rows of photographs, each row above that of their reconstructions."""
    originals, decoded = [], []
    for images in run.images(photographs, pipeline.vqgan.config.image_size, "reconstructions"):
        with torch.no_grad():
            tokens = pipeline.vqgan.encode(images)
        originals += [Image.fromarray(pixels.numpy()) for pixels in to_uint8(images)]
        decoded += [Image.fromarray(pixels.numpy()) for pixels in to_uint8(pipeline.decode_images(tokens))]
    couples = [paste_grid(list(couple), columns=1, gap=0) for couple in zip(originals, decoded, strict=True)]
    return paste_grid(couples, columns=_COLUMNS)


def _beside(path: Path, name: str) -> Path:
    return path.with_name(f"{path.stem}-{name}.png")
