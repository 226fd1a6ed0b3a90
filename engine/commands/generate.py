"""`kodalle generate`: a folder of images, a sheet and result.json for a caption, or an image once more from its metadata.

`kodalle continue`: captions on stdout.
"""

import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

from PIL import Image

from engine.commands.argument_checks import check_device, check_model, check_out_folder
from engine.commands.heavy_imports import heavy_imports
from engine.config.codec import CodecBackend
from engine.data.prompt_words import described
from engine.errors import InputError
from engine.files import atomic_file, write_json
from engine.models.folder_config import model_digest, part_config, read_ground
from engine.pipeline.image_encoding import encode_image, read_metadata, save_png
from engine.pipeline.image_size import ImageSize
from engine.pipeline.init_image import InitImage
from engine.pipeline.local_folder import local_folder
from engine.pipeline.provenance import InitImageRecord, Provenance, Refinement, digital_source, read_provenance
from engine.pipeline.rendition import Rendition, render
from engine.progress import PhaseBars, seconds_text
from engine.sampling_params import RankBy, SamplingParams, check_captions

if TYPE_CHECKING:
    import torch

    from engine.data.prompt_words import PromptWords
    from engine.decoding.cpu.packed_weights import Weights
    from engine.pipeline.generation import Candidate, Generation
    from engine.pipeline.pipeline import Pipeline
    from engine.pipeline.refinement import GuidingRanker

_MAX_SIZE = 4096  # pixels a side
_FILE_NAME = re.compile(r"\d+-seed\d+-candidate\d+\.png")  # as `file_name` makes them


def generate_to_folder(
    model: str,
    caption: str,
    folder: Path,
    *,
    sampling_params: Mapping[str, float | None],
    strict: bool = False,
    device: str = "",
    int8: bool = False,
    weights: str | None = None,
    codec_backend: str = "torch",
    init_image: InitImage | None = None,
    size: ImageSize | None = None,
    rank_by: str = "koclip",
    rendition: Rendition | None = None,
    refinement: Refinement | None = None,
    refine_with: Path | None = None,
) -> "Generation":
    """Generates and writes; result.json comes last, so its presence means that the rest is there.

    Args:
        weights: of the transformer, see `Pipeline.from_pretrained`.
        sampling_params: values of `SamplingParams`; where one is missing or None, the model's own counts.
        rendition: of the images, not of the sheet; None: as they were generated.
        size: see `Pipeline.prepare`.
        refinement: of the images that are written, see engine/pipeline/refinement.py.
        refine_with: folder of a ranker that guides it, see engine/interop/clip_scorer.py; None: the model's own.

    Raises:
        InputError: bad parameters, files, model or caption; nothing is written then.
    """
    SamplingParams().updated(**sampling_params)
    check_out_folder(folder)
    if rank_by not in get_args(RankBy):
        raise InputError("--rank-by", rank_by, f"write {' or '.join(get_args(RankBy))}")
    if rank_by == "log_likelihood" and (init_image is None or init_image.mask_image is None):
        raise InputError("--rank-by", rank_by, "is for inpainting: give --image and --mask, or rank by koclip")
    if codec_backend not in get_args(CodecBackend):
        raise InputError("--codec-backend", codec_backend, f"write {' or '.join(get_args(CodecBackend))}")
    if weights not in (None, "int8", "int4"):
        raise InputError("--weights", weights, "write int8 or int4")
    if size is not None and init_image is not None:
        raise InputError("--size", size, "an init image is of the model's own size: leave one of the two out")
    check_captions([caption])
    check_device(device)
    source = local_folder(model)
    check_model(source, "transformer", "vqgan")
    rendition = rendition or Rendition()
    _check_rendition(rendition, source)
    with heavy_imports():
        from engine.device import fit_to_machine, pick_device
        from engine.pipeline.pipeline import Pipeline

    guide = _guide(refine_with)
    fit_to_machine()
    started = time.perf_counter()
    backend = cast(CodecBackend, codec_backend)
    pipeline = Pipeline.from_pretrained(
        source, device=pick_device(device), int8=int8, weights=cast("Weights | None", weights), codec_backend=backend
    )
    pipeline.model_id = model
    loading_s = time.perf_counter() - started
    params = pipeline.default_sampling_params.updated(**sampling_params)
    with PhaseBars() as bars:
        generation = pipeline(
            [caption],
            params,
            init_image=init_image,
            size=size,
            rank_by=cast(RankBy, rank_by),
            strict=strict,
            on_position=lambda done, total: bars.update("generating", done, total),
        )[0]
        refined = None
        if refinement is not None:
            refined = _refined(pipeline, generation, refinement, guide, bars)
    if note := unknown_note(generation.request.words):
        print(note)
    if generation.tokens_cut:
        print(
            f"note: the caption is {generation.tokens_cut} tokens too long; its end was cut (--strict refuses instead)"
        )
    _write(folder, pipeline, generation, rendition, refined=refined, loading_s=loading_s)
    return refined or generation


def unknown_note(words: "PromptWords") -> str:
    """What to tell of a caption with words that the model does not know; "" where it knows them all."""
    if words.all_known:
        return ""
    if not words.num_words:
        return "note: the caption has no word: the images are of anything (--strict refuses instead)"
    number = "none" if words.num_known == 0 else f"{words.num_known}"
    scores = "; their scores say nothing" if words.num_known == 0 else ""
    return (
        f"note: the model knows {number} of the caption's {words.num_words} words, and makes images as if the others were not "
        f"there (--strict refuses instead){scores}: {described(words.unknown)}"
    )


def regenerate_to_folder(
    image: Path,
    folder: Path,
    *,
    model: str | None = None,
    device: str = "",
    init_image: Path | None = None,
    mask: Path | None = None,
    refine_with: Path | None = None,
) -> "Generation":
    """Makes an image again from its own metadata: same tokens, same pixels on a machine of the same arithmetic.

    Args:
        image: PNG, WebP or JPEG that the engine or its server wrote.
        model: None: the model that the metadata name.
        init_image, mask: what the image was made from, if it was; compared with the digests in the metadata.
        refine_with: the ranker that refined it, if another than the model's own did.

    Raises:
        InputError: no metadata, another model, another init image or mask than it was made from; nothing is written then.
    """
    check_device(device)
    made = provenance_of(image)
    check_out_folder(folder)
    source = local_folder(model or made.model)
    if model is None and not source.is_dir():
        raise InputError("MODEL", made.model, f"made {image} and is not here: give its folder before --from")
    if (digest := model_digest(source)) != made.model_digest:
        remedy = (
            f"is not the model that made {image}: its digest begins {digest[:12]}, not {str(made.model_digest)[:12]}"
        )
        raise InputError("MODEL", model or made.model, remedy)
    start = _init_image_of(made.init_image, image, init_image, mask, source)
    _note_size(image, made, source)
    rendition = Rendition.recorded(made.rendition)
    _check_rendition(rendition, source)
    with heavy_imports():
        from engine.device import fit_to_machine, pick_device
        from engine.pipeline.pipeline import Pipeline

    guide = _guide(refine_with)
    _check_guide(made, image, refine_with, guide)
    fit_to_machine()
    started = time.perf_counter()
    arithmetic = made.arithmetic
    pipeline = Pipeline.from_pretrained(
        source,
        device=pick_device(device),
        dtype=_dtype(arithmetic.dtype, image),
        int8=arithmetic.int8,
        weights=arithmetic.weights,
        codec_backend=cast(CodecBackend, arithmetic.codec_backend),
    )
    pipeline.model_id = made.model
    loading_s = time.perf_counter() - started
    if pipeline.arithmetic != arithmetic:
        print(
            f"note: made on {arithmetic.device}, this is {pipeline.arithmetic.device}: rounding may differ",
            file=sys.stderr,
        )
    request = pipeline.prepare(
        [made.caption], made.request_params, init_image=start, size=made.image_size, rank_by=made.rank_by,
        candidate_numbers=[made.candidate],
    )[0]  # fmt: skip
    timings_s: dict[str, float] = {}
    tokens = pipeline.decode([request], timings_s=timings_s)[0]
    generation = pipeline.finish(request, tokens, timings_s=timings_s)
    refined = None
    if made.refinement is not None:
        with PhaseBars() as bars:
            refined = _refined(pipeline, generation, made.refinement, guide, bars)
    _write(folder, pipeline, generation, rendition, refined=refined, loading_s=loading_s)
    return refined or generation


def provenance_of(image: Path) -> Provenance:
    """The provenance that an image file carries.

    Raises:
        InputError: no such file, not an image, or an image without.
    """
    remedy = "give an image that `kodalle generate` or the server wrote"
    try:
        tree = read_metadata(image.read_bytes())
    except OSError as error:
        raise InputError(
            "--from", image, f"cannot be read as PNG, WebP or JPEG ({type(error).__name__}): {remedy}"
        ) from error
    if tree is None:
        raise InputError("--from", image, f"carries no provenance: {remedy}")
    return read_provenance(tree, source=str(image))


def _note_size(image: Path, made: Provenance, model: Path) -> None:
    """A line on stderr where the file has been resized since: what its metadata describe is made, at its own size."""
    own = part_config(model, "vqgan").image_size if made.rendition is None else made.rendition.size
    described = made.image_size or ImageSize(own, own)
    with Image.open(image) as opened:
        found = ImageSize(*opened.size)
    if found != described:
        print(f"note: {image} is {found}, resized from {described}, which is made again", file=sys.stderr)


def _init_image_of(
    record: InitImageRecord | None, made: Path, image: Path | None, mask: Path | None, model: Path
) -> InitImage | None:
    """Raises InputError: an init image or mask that is missing, not needed, or not the one on record."""
    if record is None:
        if image is not None:
            raise InputError("--image", image, f"{made} was made without an init image: leave it out")
        return None
    if image is None:
        begins = record.image_sha256[:12]
        raise InputError("--image", "(nothing)", f"{made} was made from an init image, SHA-256 {begins}…: give it")
    if record.mask_sha256 is not None and mask is None:
        raise InputError("--mask", "(nothing)", f"{made} was made with a mask: give it too")
    if record.mask_sha256 is None and mask is not None:
        raise InputError("--mask", mask, f"{made} was made without a mask: leave it out")
    found = InitImage.from_files(
        image,
        keep_rows=record.keep_rows,
        mask=mask,
        paste=record.paste,
        strength=record.strength,
        changed_from=record.changed_from,
    )
    config = part_config(model, "vqgan")
    stated = InitImageRecord(**found.record(config.image_size, config.grid_size))
    if stated.image_sha256 != record.image_sha256:
        raise InputError("--image", image, f"is not the init image that {made} was made from")
    if stated.mask_sha256 != record.mask_sha256:
        raise InputError("--mask", str(mask), f"is not the mask that {made} was made with")
    return found


def _guide(refine_with: Path | None) -> "GuidingRanker | None":
    if refine_with is None:
        return None
    from engine.interop.clip_scorer import open_ranker
    from engine.pipeline.refinement import GuidingRanker

    return GuidingRanker(*open_ranker(refine_with, field="--refine-with"))


def _check_guide(made: Provenance, image: Path, refine_with: Path | None, guide: "GuidingRanker | None") -> None:
    """Raises InputError: a guiding ranker that is missing, not needed, or not the one on record."""
    digest = None if made.refinement is None else made.refinement.ranker_digest
    if digest is None and guide is not None:
        raise InputError("--refine-with", refine_with, f"{image} was refined with no other ranker: leave it out")
    if digest is None:
        return
    if guide is None:
        remedy = f"{image} was refined with another ranker, digest {digest}: give its folder"
        raise InputError("--refine-with", "(nothing)", remedy)
    if guide.digest != digest:
        raise InputError("--refine-with", refine_with, f"has digest {guide.digest}, {image} was refined with {digest}")


def _refined(
    pipeline: "Pipeline",
    generation: "Generation",
    refinement: Refinement,
    guide: "GuidingRanker | None",
    bars: PhaseBars,
) -> "Generation":
    from engine.pipeline.refinement import refine_generation

    if guide is not None:
        guide.ranker.to(pipeline.device)
    return refine_generation(
        pipeline,
        generation,
        refinement,
        count=generation.request.sampling_params.num_returned,
        guide=guide,
        on_step=lambda done, total: bars.update("refining", done, total),
    )


def _dtype(name: str, image: Path) -> "torch.dtype":
    import torch

    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise InputError("--from", image, f"names a dtype that torch does not have: {name}")
    return dtype


def print_continuations(model: str, beginning: str, params: SamplingParams, *, count: int, device: str) -> None:
    """One caption a line on stdout.

    Raises:
        InputError: bad parameters or model; a beginning that fills the model's text.
    """
    check_device(device)
    check_model(local_folder(model), "transformer", "vqgan")
    with heavy_imports():
        from engine.device import fit_to_machine, pick_device
        from engine.pipeline.pipeline import Pipeline

    fit_to_machine()
    pipeline = Pipeline.from_pretrained(model, device=pick_device(device))
    for line in pipeline.continue_caption(beginning, params, count=count):
        print(line.text)
        if not line.is_complete:
            print(f"note: caption {line.candidate} fills the model's text and has no end", file=sys.stderr)


def _check_rendition(rendition: Rendition, model: Path) -> None:
    """Raises InputError: one that this model's images cannot have."""
    own = part_config(model, "vqgan").image_size
    if rendition.size is not None and not own <= rendition.size <= _MAX_SIZE:
        raise InputError("--enlarge", rendition.size, f"must be {own}, the model's, to {_MAX_SIZE} pixels a side")
    if rendition.is_transparent and read_ground(model) is None:
        raise InputError("--transparent", "given", "this model's images have no plain ground: leave it out")


def _write(
    folder: Path,
    pipeline: "Pipeline",
    generation: "Generation",
    rendition: Rendition,
    *,
    refined: "Generation | None",
    loading_s: float,
) -> None:
    """The best images, refined where they were, the sheet of all, result.json, and what was written on stdout."""
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
