"""`kodalle draw`: one caption to a folder of pictures, a sheet and result.json."""

import time
from pathlib import Path
from typing import Any

import torch

from engine.errors import InputError
from engine.files import atomic_file, write_json
from engine.progress import ProgressBar, seconds_text
from engine.sampling.options import SamplingOptions
from engine.sampling.pictures import contact_sheet, save_png
from engine.sampling.pipeline import Candidate, Drawing, Pipeline


def draw_to_folder(
    model: str,
    caption: str,
    folder: Path,
    *,
    candidates: int,
    top: int,
    seed: int,
    options: SamplingOptions,
    strict: bool,
    device: str,
) -> Drawing:
    """Draws and writes; result.json comes last, so its presence means that the rest is there.

    Raises:
        InputError: bad options, model or caption; nothing is written then.
    """
    if top > candidates:
        raise InputError("--top", top, f"is more than --candidates {candidates}: lower it")
    if folder.exists() and not folder.is_dir():
        raise InputError("--out", folder, "is a file: give a folder")
    begun = time.perf_counter()
    pipeline = Pipeline.from_pretrained(model, device=pick_device(device))
    loading_s = time.perf_counter() - begun
    with ProgressBar("drawing", total=pipeline.transformer.config.image_seq_len) as bar:
        drawing = pipeline(
            [caption],
            candidates=candidates,
            seed=seed,
            options=options,
            strict=strict,
            on_progress=lambda done, _: bar.update(done),
        )[0]
    if drawing.tokens_cut:
        print(f"note: the caption is {drawing.tokens_cut} tokens too long; its end was cut (--strict refuses instead)")
    begun = time.perf_counter()
    write_drawing(folder, drawing, top=top)
    encoding_s = time.perf_counter() - begun
    result = describe(drawing, options, top=top)
    result["timings_s"] |= {"loading": loading_s, "encoding": encoding_s}
    write_json(folder / "result.json", result)
    for kept in drawing.top(top):
        score = "" if kept.score is None else f"  score {kept.score:.3f}"
        print(f"{folder / file_name(kept)}{score}")
    print(f"{folder / 'sheet.png'}  ({candidates} drawn in {seconds_text(sum(drawing.timings_s.values()))})")
    return drawing


def pick_device(device: str) -> torch.device:
    """The device named, or CUDA where there is one.

    Raises:
        InputError: no such device here.
    """
    if not device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise InputError("--device", device, "is not a device: write cpu, cuda or cuda:1") from error
    if chosen.type not in ("cpu", "cuda"):
        raise InputError("--device", device, "is no device for drawing: write cpu, cuda or cuda:1")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise InputError("--device", device, f"{torch.cuda.device_count()} CUDA devices are visible: use cpu")
    return chosen


def write_drawing(folder: Path, drawing: Drawing, *, top: int) -> None:
    """The best `top` pictures with their making in the metadata, and the sheet of all."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").unlink(missing_ok=True)  # an earlier drawing's
    for kept in drawing.top(top):
        save_png(folder / file_name(kept), kept.image, metadata(drawing, kept))
    pictures = [one.image for one in drawing.candidates]
    labels = [
        f"#{one.rank} c{one.candidate}" + ("" if one.score is None else f" {one.score:.2f}")
        for one in drawing.candidates
    ]
    scale = max(1, 128 // pictures[0].width)
    sheet = contact_sheet(drawing.caption, pictures, labels, columns=min(8, len(pictures)), scale=scale)
    with atomic_file(folder / "sheet.png") as temporary:
        sheet.save(temporary, format="PNG")


def file_name(one: Candidate) -> str:
    return f"{one.rank:02d}-seed{one.seed}-candidate{one.candidate:03d}.png"


def metadata(drawing: Drawing, one: Candidate) -> dict[str, Any]:
    """What a PNG carries: enough to draw it again."""
    return {
        "caption": drawing.caption,
        "seed": one.seed,
        "candidate": one.candidate,
        "rank": one.rank,
        "score": one.score,
        "software": "KoDALLE engine",
    }


def describe(drawing: Drawing, options: SamplingOptions, *, top: int) -> dict[str, Any]:
    """result.json."""
    return {
        "caption": drawing.caption,
        "tokens_cut": drawing.tokens_cut,
        "options": {
            "temperature": options.temperature,
            "top_k": options.top_k,
            "top_p": options.top_p,
            "guidance_scale": options.guidance_scale,
        },
        "candidates": [
            {
                "rank": one.rank,
                "candidate": one.candidate,
                "seed": one.seed,
                "score": one.score,
                "file": file_name(one) if one.rank <= top else None,
            }
            for one in drawing.candidates
        ],
        "timings_s": dict(drawing.timings_s),
    }
