"""`kodalle generate --from IMAGE`: an image once more, from its own metadata."""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, cast

from PIL import Image

from engine.commands.argument_checks import check_device, check_out_folder
from engine.commands.generate import check_rendition, open_guide, refine_best
from engine.commands.generation_folder import write_generation
from engine.commands.heavy_imports import heavy_imports
from engine.config.codec import CodecBackend
from engine.errors import InputError
from engine.models.folder_config import model_digest, part_config
from engine.pipeline.image_encoding import read_metadata
from engine.pipeline.image_size import ImageSize
from engine.pipeline.init_image import InitImage
from engine.pipeline.local_folder import local_folder
from engine.pipeline.provenance import InitImageRecord, Provenance, read_provenance
from engine.pipeline.rendition import Rendition
from engine.progress import PhaseBars

if TYPE_CHECKING:
    import torch

    from engine.pipeline.generation import Generation
    from engine.pipeline.refinement import GuidingRanker


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
    check_rendition(rendition, source)
    with heavy_imports():
        from engine.device import fit_to_machine, pick_device
        from engine.pipeline.pipeline import Pipeline

    guide = open_guide(refine_with)
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
            refined = refine_best(pipeline, generation, made.refinement, guide, bars)
    write_generation(folder, pipeline, generation, rendition, refined=refined, loading_s=loading_s)
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


def _dtype(name: str, image: Path) -> "torch.dtype":
    import torch

    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise InputError("--from", image, f"names a dtype that torch does not have: {name}")
    return dtype
