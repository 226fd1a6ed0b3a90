"""The pictures of a prepared folder: what a label's box or outline says, cut from its photograph and made square."""

from pathlib import Path
from typing import Literal, NamedTuple

from PIL import Image

from engine.data.crops import (
    ImageFault,
    PixelBox,
    crop_and_resize,
    open_image,
    open_layered,
    pixel_box,
)
from engine.data.cut_out import (
    Layer,
    OutlineFault,
    fit_outline,
    ground_rgb,
    outlined_layer,
    place_on_ground,
    visible_layer,
)
from engine.data.label_format import Box
from engine.data.names import readable_name
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
        photo = open_layered(job.image_path) if is_layered else open_image(job.image_path)
        digest = file_digest(job.image_path).sha256[:32]
    except ImageFault as fault:
        name = readable_name(job.image_path.name)
        return CutPhoto("", [CropFault(fault.defect, f"{name} {fault.remedy}") for _ in job.crops])
    outcomes: list[Outcome] = []
    for crop in job.crops:
        found = _visible(photo, options) if is_layered else _labelled(crop, job.image_path, photo, options)
        if not isinstance(found, CropFault):
            _write(_square(photo, found, options), images / f"{crop.key}.{options.image_format}", crop, options)
        outcomes.append(found if isinstance(found, CropFault) else "cut-out" if isinstance(found, Layer) else "crop")
    return CutPhoto(digest, outcomes)


def _visible(photo: Image.Image, options: PrepareOptions) -> Layer | PixelBox | CropFault:
    """What is visible of a plain source's RGBA image."""
    if photo.getchannel("A").getextrema()[0] == 255:
        if options.keep_uncut:
            return PixelBox(0, 0, *photo.size)
        return CropFault("no_outline", "nothing of it is transparent (keep_uncut takes it)")
    return visible_layer(photo) or CropFault("bad_outline", "is transparent everywhere")


def _labelled(
    crop: Crop, image_path: Path, photo: Image.Image, options: PrepareOptions
) -> Layer | PixelBox | CropFault:
    """What the label says of an object, in pixels of its photo."""
    width, height = crop.labelled_size or (None, None)
    x_scale, y_scale = photo.width / (width or photo.width), photo.height / (height or photo.height)
    if (x_scale, y_scale) != (1.0, 1.0) and not options.scale_boxes:
        sizes = f"label says {width} x {height}, {readable_name(image_path.name)} is {photo.width} x {photo.height}"
        return CropFault("size_mismatch", f"{sizes} (photos resized after labelling: scale_boxes)")
    margin, box = options.box_margin if crop.outline is None else 0.0, None
    if crop.box is not None:
        x, y, box_width, box_height = crop.box
        scaled = Box(x * x_scale, y * y_scale, box_width * x_scale, box_height * y_scale)
        box, reason = pixel_box(scaled, photo.width, photo.height, origin=options.box_origin, margin=margin)
        if box is None:
            return CropFault("bad_box", reason)
    if crop.outline is None:
        return box or PixelBox(0, 0, *photo.size)
    outline = fit_outline(tuple((x * x_scale, y * y_scale) for x, y in crop.outline), *photo.size, box)
    if isinstance(outline, OutlineFault):
        return CropFault("bad_outline", outline.reason)
    return outlined_layer(photo, outline)


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
