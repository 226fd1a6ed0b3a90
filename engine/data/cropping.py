"""The pictures of a prepared folder: what a label's box or outline says, cut from its photograph and made square."""

from pathlib import Path
from typing import Literal, NamedTuple

from PIL import Image

from engine.data.crops import (
    ImageFault,
    Photo,
    PixelBox,
    crop_and_resize,
    open_image,
    open_layered,
    open_photo,
    pixel_box,
)
from engine.data.cut_out import (
    Layer,
    OutlineFault,
    fit_outline,
    outlined_layer,
    place_on_ground,
    visible_layer,
)
from engine.data.ground import ground_rgb
from engine.data.names import readable_name
from engine.data.orientation import label_frame, size_difference
from engine.data.sources import Crop, CropJob, PrepareOptions
from engine.files import file_digest


class CropFault(NamedTuple):
    cause: str
    reason: str


Outcome = CropFault | Literal["crop", "cut-out"]


class CutPhoto(NamedTuple):
    """What became of one photo's crops, in their order; `digest` is of the image file's content."""

    digest: str
    outcomes: list[Outcome]


def cut_photo(job: CropJob, images: Path, options: PrepareOptions) -> CutPhoto:
    """Writes the crops or cut-outs of one photo into `images`, in a worker process."""
    is_layered = options.cut_out and job.crops[0].labelled_size is None
    try:
        photo = _open(job, is_layered, options)
        digest = file_digest(job.image_path).sha256[:32]
    except ImageFault as fault:
        name = readable_name(job.image_path.name)
        return CutPhoto("", [CropFault(fault.defect, f"{name} {fault.remedy}") for _ in job.crops])
    outcomes: list[Outcome] = []
    for crop in job.crops:
        found = _visible(photo.image, options) if is_layered else _labelled(crop, job.image_path, photo, options)
        if not isinstance(found, CropFault):
            _write(_square(photo.image, found, options), images / f"{crop.key}.{options.image_format}", crop, options)
        outcomes.append(found if isinstance(found, CropFault) else "cut-out" if isinstance(found, Layer) else "crop")
    return CutPhoto(digest, outcomes)


def _open(job: CropJob, is_layered: bool, options: PrepareOptions) -> Photo:
    """Raises ImageFault."""
    if is_layered:
        return open_layered(job.image_path)
    if job.crops[0].labelled_size is not None:
        return open_photo(job.image_path)
    # a plain source's image, all of which is used
    size, keep_aspect = options.image_size, options.keep_aspect
    return Photo(open_image(job.image_path, for_size=size, keep_aspect=keep_aspect), 1)


def _visible(photo: Image.Image, options: PrepareOptions) -> Layer | PixelBox | CropFault:
    """What is visible of a plain source's RGBA image."""
    if photo.getchannel("A").getextrema()[0] == 255:
        if options.keep_uncut:
            return PixelBox(0, 0, *photo.size)
        return CropFault("no_outline", "nothing of it is transparent (keep_uncut takes it)")
    return visible_layer(photo) or CropFault("bad_outline", "is transparent everywhere")


def _labelled(crop: Crop, image_path: Path, photo: Photo, options: PrepareOptions) -> Layer | PixelBox | CropFault:
    """What the label says of an object, in pixels of its photo."""
    image = photo.image
    frame = label_frame(image.size, photo.orientation, crop.labelled_size, is_resized=options.scale_boxes)
    if frame is None:
        sizes = size_difference(readable_name(image_path.name), image.size, photo.orientation, crop.labelled_size)
        return CropFault("size_mismatch", f"{sizes} (photos resized after labelling: scale_boxes)")
    margin, box = options.box_margin if crop.outline is None else 0.0, None
    if crop.box is not None:
        turned = frame.box(crop.box, is_centred=options.box_origin == "center")
        box, reason = pixel_box(turned, *image.size, origin=options.box_origin, margin=margin)
        if box is None:
            return CropFault("bad_box", reason)
    if crop.outline is None:
        return box or PixelBox(0, 0, *image.size)
    outline = fit_outline(frame.outline(crop.outline), *image.size, box)
    if isinstance(outline, OutlineFault):
        return CropFault("bad_outline", outline.reason)
    return outlined_layer(image, outline)


def _square(photo: Image.Image, found: Layer | PixelBox, options: PrepareOptions) -> Image.Image:
    if isinstance(found, Layer):
        assert options.ground is not None  # of every cut_out
        ground = ground_rgb(options.ground)
        return place_on_ground(found, options.image_size, ground=ground, margin=options.box_margin)
    return crop_and_resize(photo.convert("RGB"), found, options.image_size, keep_aspect=options.keep_aspect)


def _write(square: Image.Image, path: Path, crop: Crop, options: PrepareOptions) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if options.image_format == "png":
        square.save(path, "PNG")
    else:
        square.save(path, "JPEG", quality=95, subsampling=0)
    captions = path.with_name(path.name.removesuffix(path.suffix) + ".txt")
    captions.write_text("\n".join(crop.captions) + "\n", encoding="utf-8")
