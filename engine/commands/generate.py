"""`kodalle generate`: a folder of images, a sheet and result.json for a caption. `kodalle continue`: captions on stdout."""

import hashlib
import json
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

from PIL import Image

from engine.data.crops import FORMATS, open_image
from engine.device import fit_threads, pick_device
from engine.errors import InputError
from engine.files import atomic_file, write_json
from engine.pipeline.generation import Candidate, Generation
from engine.pipeline.image_files import contact_sheet, save_png
from engine.pipeline.init_image import InitImage
from engine.pipeline.pipeline import Pipeline, RankBy
from engine.progress import ProgressBar, seconds_text
from engine.sampling_params import SamplingParams

_FILE_NAME = re.compile(r"\d+-seed\d+-candidate\d+\.png")  # as `file_name` makes them


@dataclass(frozen=True)
class InitImageFiles:
    """A picture to start from, as files; the fields are those of `InitImage`."""

    image: Path
    keep_rows: int | None = None
    mask: Path | None = None
    paste: bool = True

    def read(self) -> InitImage:
        """Raises InputError: a file that cannot be read, a mask that does not fit, as `InitImage`."""
        image, mask = open_image(self.image), None
        if self.mask is not None:
            open_image(self.mask)  # the guard; it lays transparency on white, which a mask must not have
            with Image.open(self.mask, formats=FORMATS) as opened:
                opened.load()
                mask = opened
        return InitImage(image, keep_rows=self.keep_rows, mask_image=mask, paste=self.paste)

    def describe(self) -> dict[str, Any]:
        """Names, digests (SHA-256 of the files) and choices: enough to give the same again."""
        return {
            "image": self.image.name,
            "image_sha256": _sha256(self.image),
            "keep_rows": self.keep_rows,
            "mask": None if self.mask is None else self.mask.name,
            "mask_sha256": None if self.mask is None else _sha256(self.mask),
            "paste": self.paste,
        }


def generate_to_folder(
    model: str,
    caption: str,
    folder: Path,
    *,
    sampling_params: Mapping[str, float | None],
    strict: bool,
    device: str,
    int8: bool = False,
    init_image: InitImageFiles | None = None,
    rank_by: str = "koclip",
) -> Generation:
    """Generates and writes; result.json comes last, so its presence means that the rest is there.

    Args:
        sampling_params: values of `SamplingParams`; where one is missing or None, the model's own counts.

    Raises:
        InputError: bad parameters, files, model or caption; nothing is written then.
    """
    SamplingParams().updated(**sampling_params)  # before the model is loaded
    if folder.exists() and not folder.is_dir():
        raise InputError("--out", folder, "is a file: give a folder")
    if rank_by not in get_args(RankBy):
        raise InputError("--rank-by", rank_by, f"write {' or '.join(get_args(RankBy))}")
    if rank_by == "fit" and (init_image is None or init_image.mask is None):
        raise InputError("--rank-by", rank_by, "is for inpainting: give --image and --mask, or rank by koclip")
    read_image = None if init_image is None else init_image.read()
    fit_threads()
    begun = time.perf_counter()
    pipeline = Pipeline.from_pretrained(model, device=pick_device(device), int8=int8)
    loading_s = time.perf_counter() - begun
    params = pipeline.default_sampling_params.updated(**sampling_params)
    with ProgressBar("generating", total=pipeline.transformer.config.image_seq_len) as bar:
        generation = pipeline(
            [caption],
            params,
            init_image=read_image,
            rank_by=cast(RankBy, rank_by),
            strict=strict,
            on_progress=lambda done, _: bar.update(done),
        )[0]
    if generation.tokens_cut:
        print(
            f"note: the caption is {generation.tokens_cut} tokens too long; its end was cut (--strict refuses instead)"
        )
    begun = time.perf_counter()
    made = describe_request(params, init_image, rank_by, int8=int8)
    write_generation(folder, generation, made, top=params.num_returned)
    encoding_s = time.perf_counter() - begun
    result = describe(generation, made, top=params.num_returned)
    result["timings_s"] |= {"loading": loading_s, "encoding": encoding_s}
    write_json(folder / "result.json", result)
    for kept in generation.top(params.num_returned):
        score = "" if kept.score is None else f"  score {kept.score:.3f}"
        score += "" if kept.fit is None else f"  fit {kept.fit:.2f}"
        print(f"{folder / file_name(kept)}{score}")
    print(
        f"{folder / 'sheet.png'}  ({params.candidates} candidates in {seconds_text(sum(generation.timings_s.values()))})"
    )
    return generation


def print_continuations(model: str, beginning: str, params: SamplingParams, *, count: int, device: str) -> None:
    """One caption a line on stdout.

    Raises:
        InputError: bad parameters or model; a beginning that fills the model's text.
    """
    fit_threads()
    pipeline = Pipeline.from_pretrained(model, device=pick_device(device), codec_backend="torch")
    for line in pipeline.continue_caption(beginning, params, count=count):
        print(line.text)
        if not line.is_complete:
            print(f"note: caption {line.candidate} fills the model's text and has no end", file=sys.stderr)


def write_generation(folder: Path, generation: Generation, made: dict[str, Any], *, top: int) -> None:
    """The best `top` pictures with their making in the metadata, and the sheet of all."""
    folder.mkdir(parents=True, exist_ok=True)
    _clear(folder)
    for kept in generation.top(top):
        save_png(folder / file_name(kept), kept.image, metadata(generation, kept) | made)
    pictures = [one.image for one in generation.candidates]
    labels = [
        f"#{one.rank} c{one.candidate}" + ("" if told is None else f" {told:.2f}")
        for one in generation.candidates
        for told in [one.score if one.fit is None else one.fit]
    ]
    scale = max(1, 128 // pictures[0].width)
    sheet = contact_sheet(generation.caption, pictures, labels, columns=min(8, len(pictures)), scale=scale)
    with atomic_file(folder / "sheet.png") as temporary:
        sheet.save(temporary, format="PNG")


def _clear(folder: Path) -> None:
    """Removes an earlier drawing's pictures, so that nobody takes them for this one's: what its result.json names."""
    result = folder / "result.json"
    if not result.is_file():
        return
    try:
        named = [one["file"] for one in json.loads(result.read_text(encoding="utf-8"))["candidates"]]
    except (ValueError, KeyError, TypeError):
        named = []  # not ours, or from another version: its pictures stay
    result.unlink()
    for name in named:
        if isinstance(name, str) and _FILE_NAME.fullmatch(name):
            (folder / name).unlink(missing_ok=True)


def file_name(one: Candidate) -> str:
    return f"{one.rank:02d}-seed{one.seed}-candidate{one.candidate:03d}.png"


def metadata(generation: Generation, one: Candidate) -> dict[str, Any]:
    """What a PNG carries of its candidate; with `describe_request`, enough to draw it again."""
    return {
        "caption": generation.caption,
        "seed": one.seed,
        "candidate": one.candidate,
        "rank": one.rank,
        "score": one.score,
        "software": "KoDALLE engine",
    }


def describe_request(
    params: SamplingParams, init_image: InitImageFiles | None, rank_by: str, *, int8: bool = False
) -> dict[str, Any]:
    """What was asked for, beside caption and seed; in result.json and in every PNG."""
    return {
        "sampling_params": params.generation_values(),
        "int8": int8,
        "rank_by": rank_by,
        "init_image": None if init_image is None else init_image.describe(),
    }


def describe(generation: Generation, made: dict[str, Any], *, top: int) -> dict[str, Any]:
    """result.json."""
    kept = None if generation.init_tokens is None else sum(token >= 0 for token in generation.init_tokens)
    return {
        "caption": generation.caption,
        "tokens_cut": generation.tokens_cut,
        **made,
        "tokens_given": kept or 0,
        "candidates": [
            {
                "rank": one.rank,
                "candidate": one.candidate,
                "seed": one.seed,
                "score": one.score,
                "fit": one.fit,
                "file": file_name(one) if one.rank <= top else None,
            }
            for one in generation.candidates
        ],
        "timings_s": dict(generation.timings_s),
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
