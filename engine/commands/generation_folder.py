"""What `kodalle generate` leaves in its folder: the best images, a sheet of all candidates, and result.json."""

import json
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.files import atomic_file, write_json
from engine.pipeline.image_encoding import encode_image, save_png
from engine.pipeline.provenance import digital_source
from engine.pipeline.rendition import Rendition, render
from engine.progress import seconds_text

if TYPE_CHECKING:
    from engine.pipeline.generation import Candidate, Generation
    from engine.pipeline.pipeline import Pipeline

_FILE_NAME = re.compile(r"\d+-seed\d+-candidate\d+\.png")  # as `file_name` makes them


def write_generation(
    folder: Path,
    pipeline: "Pipeline",
    generation: "Generation",
    rendition: Rendition,
    *,
    refined: "Generation | None",
    loading_s: float,
) -> None:
    """Writes the best images, refined where they were, the sheet of all and, last, result.json; reports them on stdout.

    Args:
        rendition: of the images, not of the sheets.
        refined: of the best ones, in their place.
        loading_s: seconds that loading the model took, for result.json.
    """
    started = time.perf_counter()
    top = generation.request.sampling_params.num_returned
    candidates = generation.candidates if refined is None else (*refined.candidates, *generation.candidates[top:])
    request_of = {one.candidate: generation.request for one in candidates}
    if refined is not None:
        request_of |= {one.candidate: refined.request for one in refined.candidates}
    provenances = {
        number: pipeline.provenance(request, number, rendition=rendition) for number, request in request_of.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    _clear(folder)
    for one in candidates[:top]:
        made = provenances[one.candidate]
        image = render(one.image, rendition, ground=pipeline.ground)
        save_png(folder / file_name(one), image, made, source=digital_source(made))
    _write_sheet(folder / "sheet.png", generation)
    if refined is not None:
        _write_refined_sheet(folder / "refined.png", generation, refined)
    result = describe(generation, candidates, provenances, top=top)
    result["timings_s"] |= {"loading": loading_s, "encoding": time.perf_counter() - started}
    write_json(folder / "result.json", result)
    for one in candidates[:top]:
        score = "" if one.score is None else f"  score {one.score:.3f}"
        score += "" if one.contrast is None else f"  contrast {one.contrast:.2f}"
        score += "" if one.score_percentile is None else f", closer than {int(one.score_percentile)} % of real pairs"
        score += "" if one.log_likelihood is None else f"  log-likelihood {one.log_likelihood:.2f}"
        print(f"{folder / file_name(one)}{score}")
    seconds = seconds_text(sum(generation.timings_s.values()))
    print(f"{folder / 'sheet.png'}  ({len(generation.candidates)} candidates in {seconds})")


def _write_sheet(path: Path, generation: "Generation") -> None:
    from engine.pipeline.image_files import contact_sheet

    images = [one.image for one in generation.candidates]
    labels = [
        f"#{one.rank} c{one.candidate}" + ("" if one.ranked_by is None else f" {one.ranked_by:.2f}")
        for one in generation.candidates
    ]
    scale = max(1, 128 // images[0].width)
    sheet = contact_sheet(generation.caption, images, labels, columns=min(8, len(images)), scale=scale)
    with atomic_file(path) as temporary:
        temporary.write_bytes(encode_image(sheet, "png", metadata={}, png_level=6))


def _write_refined_sheet(path: Path, generation: "Generation", refined: "Generation") -> None:
    """The refined images, each beneath what it was made from."""
    from engine.pipeline.image_files import contact_sheet

    before = {one.candidate: one for one in generation.candidates}
    images, labels = [], []
    for name, row in (("before", [before[one.candidate] for one in refined.candidates]), ("after", refined.candidates)):
        images += [one.image for one in row]
        labels += [f"{name} c{one.candidate}" + ("" if one.score is None else f" {one.score:.2f}") for one in row]
    scale = max(1, 128 // images[0].width)
    sheet = contact_sheet(generation.caption, images, labels, columns=len(refined.candidates), scale=scale)
    with atomic_file(path) as temporary:
        temporary.write_bytes(encode_image(sheet, "png", metadata={}, png_level=6))


def _clear(folder: Path) -> None:
    """Removes the images of an earlier generation, which its result.json names: they are not of this one."""
    result = folder / "result.json"
    if not result.is_file():
        return
    try:
        named = [one["file"] for one in json.loads(result.read_text(encoding="utf-8"))["candidates"]]
    except (ValueError, KeyError, TypeError):
        named = []  # not ours, or from another version: its images stay
    result.unlink()
    (folder / "refined.png").unlink(missing_ok=True)
    for name in named:
        if isinstance(name, str) and _FILE_NAME.fullmatch(name):
            (folder / name).unlink(missing_ok=True)


def file_name(one: "Candidate") -> str:
    return f"{one.rank:02d}-seed{one.seed}-candidate{one.candidate:03d}.png"


def describe(
    generation: "Generation", candidates: "Sequence[Candidate]", provenances: Mapping[int, dict[str, Any]], *, top: int
) -> dict[str, Any]:
    """result.json.

    Args:
        candidates: best first; of a refined generation the refined ones, then the others.
        provenances: of each candidate, by its number.
    """
    init_tokens, words = generation.init_tokens or (), generation.request.words
    scores = {one.candidate: one.score for one in generation.candidates}
    return {
        "caption": generation.caption,
        "tokens_cut": generation.tokens_cut,
        "tokens_unknown": words.tokens_unknown,
        "words_unknown": words.words_unknown,
        "words_total": words.num_words,
        "words_known": words.num_known,
        "init_tokens": sum(token >= 0 for token in init_tokens),
        "candidates": [
            {
                "rank": one.rank,
                "candidate": one.candidate,
                "seed": one.seed,
                "score": one.score,
                "score_as_generated": scores[one.candidate],
                "contrast": one.contrast,
                "score_percentile": one.score_percentile,
                "log_likelihood": one.log_likelihood,
                "file": file_name(one) if one.rank <= top else None,
                "provenance": provenances[one.candidate],
            }
            for one in candidates
        ],
        "timings_s": dict(generation.timings_s),
    }
