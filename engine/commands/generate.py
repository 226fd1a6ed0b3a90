"""`kodalle generate`: a folder of images, a sheet and result.json for a caption.

`kodalle generate --from`: engine/commands/regenerate.py. `kodalle continue`: captions on stdout.
"""

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast, get_args

from engine.commands.argument_checks import check_device, check_model, check_out_folder
from engine.commands.generation_folder import write_generation
from engine.commands.heavy_imports import heavy_imports
from engine.config.codec import CodecBackend
from engine.data.prompt_words import described
from engine.errors import InputError
from engine.models.folder_config import part_config, read_ground
from engine.pipeline.image_size import ImageSize
from engine.pipeline.init_image import InitImage
from engine.pipeline.local_folder import local_folder
from engine.pipeline.provenance import Refinement
from engine.pipeline.rendition import Rendition
from engine.progress import PhaseBars
from engine.sampling_params import RankBy, SamplingParams, check_captions

if TYPE_CHECKING:
    from engine.data.prompt_words import PromptWords
    from engine.decoding.cpu.packed_weights import Weights
    from engine.pipeline.generation import Generation
    from engine.pipeline.pipeline import Pipeline
    from engine.pipeline.refinement import GuidingRanker

_MAX_SIZE = 4096  # pixels a side


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
    check_rendition(rendition, source)
    with heavy_imports():
        from engine.device import fit_to_machine, pick_device
        from engine.pipeline.pipeline import Pipeline

    guide = open_guide(refine_with)
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
            refined = refine_best(pipeline, generation, refinement, guide, bars)
    if note := unknown_note(generation.request.words):
        print(note)
    if generation.tokens_cut:
        print(
            f"note: the caption is {generation.tokens_cut} tokens too long; its end was cut (--strict refuses instead)"
        )
    write_generation(folder, pipeline, generation, rendition, refined=refined, loading_s=loading_s)
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


def check_rendition(rendition: Rendition, model: Path) -> None:
    """Raises InputError: one that this model's images cannot have."""
    own = part_config(model, "vqgan").image_size
    if rendition.size is not None and not own <= rendition.size <= _MAX_SIZE:
        raise InputError("--enlarge", rendition.size, f"must be {own}, the model's, to {_MAX_SIZE} pixels a side")
    if rendition.is_transparent and read_ground(model) is None:
        raise InputError("--transparent", "given", "this model's images have no plain ground: leave it out")


def open_guide(refine_with: Path | None) -> "GuidingRanker | None":
    """The ranker of `--refine-with`; None without.

    Raises:
        InputError: see `open_ranker`.
    """
    if refine_with is None:
        return None
    from engine.interop.clip_scorer import open_ranker
    from engine.pipeline.refinement import GuidingRanker

    return GuidingRanker(*open_ranker(refine_with, field="--refine-with"))


def refine_best(
    pipeline: "Pipeline",
    generation: "Generation",
    refinement: Refinement,
    guide: "GuidingRanker | None",
    bars: PhaseBars,
) -> "Generation":
    """The images that are returned of a generation, refined; `guide` as `open_guide` gives it."""
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
