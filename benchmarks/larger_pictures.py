"""Images larger than the trained grid by a sliding window: seconds, seams, and sheets to look at.

    python benchmarks/larger_pictures.py models/clothing "상의에서 색상은 레드이다. 상의에서 카테고리는 티셔츠이다." …

Each caption at each size (`--sizes`). The seam is measured where new cells of a window meet those of the window before: how much pixels
differ across that line, over how much they differ across the other lines between cells. 1 is no seam.

`--taming` generates one candidate of the first caption at the first size once more by taming-transformers' own rule: the window moves
with every cell, so that the cell lies in its middle, and is computed whole for each, without a cache. It costs minutes.

The transformer's steps take most of the time, as in plain generation; windows of one diagonal share them.

Writes larger_pictures.json and a sheet a size into benchmarks/results/larger_pictures/ (`--out`); nothing is chosen by hand.
"""

import argparse
import sys
import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sheet_benchmark import run_sheets, sheet_parser, write_sheet

from engine.decoding.sampling_tensors import SamplingTensors
from engine.decoding.sliding_window import TokenGrid, window_origins
from engine.pipeline.generation import PreparedRequest
from engine.pipeline.image_files import to_uint8
from engine.pipeline.image_size import ImageSize, parse_size
from engine.pipeline.pipeline import Pipeline
from engine.sampling_params import SequenceRequest

_NAME = "larger_pictures"


def main() -> int:
    parser = sheet_parser(__doc__, _NAME, candidates=2, seed=7)
    parser.add_argument("captions", nargs="+")
    parser.add_argument("--sizes", nargs="+", default=["192x128", "128x192", "256x256"])
    parser.add_argument("--taming", action="store_true")
    return run_sheets(_NAME, parser.parse_args(), measure)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures of larger_pictures.json; writes the sheets."""
    pipeline = Pipeline.from_pretrained(arguments.model)
    sizes = [parse_size(text, field="--sizes") for text in arguments.sizes]
    own = pipeline.vqgan.config.image_size
    rows = [_row(pipeline, arguments, size) for size in (ImageSize(own, own), *sizes)]
    return {
        "config": {"captions": arguments.captions, "candidates": arguments.candidates, "seed": arguments.seed},
        "sizes": rows,
        "taming": _taming_row(pipeline, arguments, sizes[0]) if arguments.taming else None,
    }


def _row(pipeline: Pipeline, arguments: argparse.Namespace, size: ImageSize) -> dict[str, Any]:
    started, wall = time.process_time(), time.perf_counter()
    generations = pipeline(arguments.captions, candidates=arguments.candidates, seed=arguments.seed, size=size)
    seconds = {"processor": time.process_time() - started, "wall": time.perf_counter() - wall}
    images = [(one, generation.caption) for generation in generations for one in generation.candidates]
    texts = [[f"{one.score:.2f}", caption] for one, caption in images]
    write_sheet(arguments.out / f"sheet-{size}.png", [one.image for one, _ in images], texts, benchmark=_NAME)
    return {
        "size": str(size),
        "images": len(images),
        "seconds": seconds,
        "score": float(np.mean([one.score for one, _ in images])),
        "seam": _mean_seam(pipeline, [np.asarray(one.image) for one, _ in images]),
    }


def _mean_seam(pipeline: Pipeline, images: list[NDArray[np.uint8]]) -> float | None:
    """Mean over images and both directions; None where there is one window."""
    g = pipeline.vqgan.config.grid_size
    cell = pipeline.vqgan.config.image_size // g
    found = [_seam(pixels, g, cell) for image in images for pixels in (image, image.transpose(1, 0, 2))]
    known = [value for value in found if value is not None]
    return float(np.mean(known)) if known else None


def _seam(pixels: NDArray[np.uint8], g: int, cell: int) -> float | None:
    """How much columns differ where windows meet, over the other lines between cells."""
    num_cells = pixels.shape[1] // cell
    meeting = {origin + g for origin in window_origins(num_cells, g)[:-1]}
    if not meeting:
        return None
    values = pixels.astype(np.float64)
    jumps = {line: np.abs(values[:, line * cell] - values[:, line * cell - 1]).mean() for line in range(1, num_cells)}
    others = np.mean([jump for line, jump in jumps.items() if line not in meeting])
    return float(np.mean([jumps[line] for line in meeting]) / others)


def _taming_row(pipeline: Pipeline, arguments: argparse.Namespace, size: ImageSize) -> dict[str, Any]:
    params = pipeline.default_sampling_params.updated(candidates=1, seed=arguments.seed)
    request = pipeline.prepare(arguments.captions[:1], params, size=size)[0]
    assert request.grid is not None, "the first size is larger than the model's own"
    started, wall = time.process_time(), time.perf_counter()
    tokens = _taming_tokens(pipeline, request, request.grid)
    seconds = {"processor": time.process_time() - started, "wall": time.perf_counter() - wall}
    pixels = to_uint8(pipeline.decode_images(tokens[None], grid=request.grid))[0].numpy()
    sheet = arguments.out / f"sheet-taming-{size}.png"
    write_sheet(sheet, [Image.fromarray(pixels)], [[request.caption]], benchmark=_NAME)
    return {"size": str(size), "images": 1, "seconds": seconds, "seam": _mean_seam(pipeline, [pixels])}


@torch.no_grad()
def _taming_tokens(pipeline: Pipeline, request: PreparedRequest, grid: TokenGrid) -> torch.Tensor:
    """(rows * columns,) by taming's rule: each cell from a whole pass over the window that has it in its middle."""
    model, g, params = pipeline.transformer, pipeline.transformer.config.image_grid_size, request.sampling_params
    tokens = torch.zeros(grid, dtype=torch.int64, device="cpu")
    texts = [request.text_tokens]
    if params.is_guided:
        texts.append(pipeline.tokenizer.empty(model.config.text_seq_len))
    text = torch.cat(texts)
    sampling = SamplingTensors([SequenceRequest(0, params)], torch.device("cpu"))
    for row in range(grid.rows):
        for column in range(grid.columns):
            top, left = (
                min(max(cell - g // 2, 0), length - g) for cell, length in zip((row, column), grid, strict=True)
            )
            place = (row - top) * g + column - left
            window = tokens[top : top + g, left : left + g].reshape(1, -1)[:, : place + 1]
            logits = model.logits(text, window.expand(len(text), -1))[1][:, -1]
            if params.is_guided:
                logits = logits[1:] + params.guidance_scale * (logits[:1] - logits[1:])
            position = torch.tensor([row * grid.columns + column], dtype=torch.int64, device="cpu")
            tokens[row, column] = sampling.sample(logits, position)[0]
    return tokens.flatten()


if __name__ == "__main__":
    sys.exit(main())
