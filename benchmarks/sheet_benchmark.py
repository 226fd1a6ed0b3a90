"""What benchmarks share that make sheets of images to look at: their folder, their document, their one-line faults."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine_facts import REPOSITORY, print_document, stored_path
from PIL import Image

from engine.device import fit_to_machine
from engine.errors import InputError
from engine.facts import facts
from engine.files import write_json
from engine.pipeline.image_encoding import save_png
from engine.pipeline.image_files import captioned_sheet

_WIDEST = 1024  # pixels of a sheet without a number of columns


def sheet_parser(doc: str | None, name: str, *, candidates: int, seed: int) -> argparse.ArgumentParser:
    """A model, candidates, a seed, and the folder `benchmarks/results/<name>/`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--candidates", type=int, default=candidates)
    parser.add_argument("--seed", type=int, default=seed)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks" / "results" / name)
    return parser


def run_sheets(
    name: str, arguments: argparse.Namespace, measure: Callable[[argparse.Namespace], dict[str, Any]]
) -> int:
    """Stores and prints what `measure` finds, beside the machine; returns the exit code."""
    fit_to_machine()
    document = {"benchmark": name, **facts(torch.device("cpu")), "model": stored_path(arguments.model)}
    arguments.out.mkdir(parents=True, exist_ok=True)
    try:
        document |= measure(arguments)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_json(arguments.out / f"{name}.json", document)
    print_document(document)
    return 0


def write_sheet(
    path: Path, images: list[Image.Image], texts: list[list[str]], *, benchmark: str, columns: int | None = None
) -> None:
    """Images with the lines of text below each; None: as many columns as are 1,024 pixels wide."""
    columns = columns or max(1, min(len(images), _WIDEST // images[0].width))
    sheet = captioned_sheet(images, texts, columns=columns, cell_width=images[0].width)
    save_png(path, sheet, {"benchmark": benchmark})
