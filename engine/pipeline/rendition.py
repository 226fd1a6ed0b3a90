"""Renditions: what a generated image becomes before it is written. Nothing of it is the model's, and provenance states all of it.

    cut out     the plain ground becomes transparent (engine/pipeline/ground_removal.py)
    enlarged    by Lanczos: smooth, without new detail
    marked      a text in the corner (engine/pipeline/ai_marks.py)

Without torch, so that an API server can check a request.
"""

from dataclasses import dataclass

from PIL import Image

from engine.errors import InputError
from engine.pipeline.ai_marks import with_visible_mark
from engine.pipeline.ground_removal import remove_ground
from engine.pipeline.provenance import RenditionRecord


@dataclass(frozen=True)
class Rendition:
    """A requested rendition.

    size: pixels a side, at least the model's; None: the model's own.
    is_transparent: without the ground; for models whose folder names one, and not for JPEG.
    visible_mark: as `checked_mark` returns it; "": none.
    """

    size: int | None = None
    is_transparent: bool = False
    visible_mark: str = ""

    def record(self, image_size: int) -> RenditionRecord | None:
        """What provenance states, of a model's images of `image_size` pixels; None: an image is written as it was generated."""
        size = self.size or image_size
        if size == image_size and not self.is_transparent and not self.visible_mark:
            return None
        return RenditionRecord(
            size=size,
            enlarged_from=None if size == image_size else image_size,
            background="transparent" if self.is_transparent else "opaque",
            visible_mark=self.visible_mark,
        )

    @classmethod
    def recorded(cls, record: RenditionRecord | None) -> "Rendition":
        """The rendition that a file's provenance states."""
        if record is None:
            return cls()
        return cls(record.size, record.background == "transparent", record.visible_mark)


def render(image: Image.Image, rendition: Rendition, *, ground: str | None) -> Image.Image:
    """The image to write: RGB, or RGBA when transparent.

    Args:
        image: RGB, as it was generated.
        ground: `#rrggbb` around the objects in the model's images; None: they have no plain ground.

    Raises:
        InputError: transparent without a ground, or a size below the image's.
    """
    if rendition.is_transparent:
        if ground is None:
            raise InputError("background", "transparent", "is for models whose config.json names a `ground`")
        image = remove_ground(image, ground)
    size = rendition.size or image.width
    if size < image.width:
        raise InputError("size", size, f"must be {image.width}, the model's, or larger")
    if size > image.width:
        image = image.resize((size, size), Image.Resampling.LANCZOS)  # RGBA: Pillow weighs colours by alpha
    return with_visible_mark(image, rendition.visible_mark) if rendition.visible_mark else image
