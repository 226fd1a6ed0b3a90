"""Images beside each other: contact sheets with their caption, grids for logs.

B images, S pixels.
"""

import logging
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

# Fonts with Hangul, where the common systems keep them. Pillow's own font has none: a caption would be empty boxes.
HANGUL_FONTS = (
    "NanumGothic.ttf",
    "NotoSansCJK-Regular.ttc",
    "NotoSansKR-Regular.otf",
    "AppleSDGothicNeo.ttc",
    "AppleGothic.ttf",
    "malgun.ttf",
    "UnDotum.ttf",
)
_GAP = 4


def to_uint8(images: Tensor) -> Tensor:
    """(B, 3, S, S) float in [0, 1] -> (B, S, S, 3) uint8 on the CPU."""
    return (images.float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()


def image_grid(images: Tensor, *, columns: int) -> Image.Image:
    """One image of (B, 3, S, S) in [0, 1], row by row, white between."""
    return paste_grid([Image.fromarray(pixels.numpy()) for pixels in to_uint8(images)], columns=columns)


def paste_grid(images: Sequence[Image.Image], *, columns: int, gap: int = _GAP) -> Image.Image:
    """Images of one size, row by row."""
    width, height = images[0].size
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), "white")
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        grid.paste(image, (gap + column * (width + gap), gap + row * (height + gap)))
    return grid


def hangul_font(size: int) -> ImageFont.FreeTypeFont | None:
    """A font that has Korean letters, or None where the system has none."""
    for name in HANGUL_FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return None


def contact_sheet(
    caption: str, images: Sequence[Image.Image], labels: Sequence[str], *, columns: int, scale: int = 1
) -> Image.Image:
    """Images under their caption, each with a short Latin label (rank, score, seed) beneath.

    Args:
        scale: whole-number enlargement, nearest neighbour: small images stay what they are.
    """
    font = hangul_font(15)
    if font is None and not caption.isascii():
        logging.getLogger(__name__).warning(
            "no font with Korean letters found: the sheet has no caption (it is in the metadata). "
            "Install one, e.g. the package fonts-nanum"
        )
        caption = ""
    width, height = (side * scale for side in images[0].size)
    rows = -(-len(images) // columns)
    label_height, sheet_width = 16, columns * (width + _GAP) + _GAP
    lines = _wrap(caption, font, sheet_width - 2 * _GAP) if caption else []
    top = _GAP + 20 * len(lines)
    sheet = Image.new("RGB", (sheet_width, top + rows * (height + label_height + _GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate(lines):
        draw.text((_GAP, _GAP + 20 * number), line, fill="black", font=font)
    small = ImageFont.load_default(11)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        row, column = divmod(number, columns)
        x, y = _GAP + column * (width + _GAP), top + row * (height + label_height + _GAP)
        sheet.paste(image.resize((width, height), Image.Resampling.NEAREST), (x, y))
        draw.text((x + 2, y + height + 1), label, fill="black", font=small)
    return sheet


def _wrap(text: str, font: ImageFont.FreeTypeFont | None, width: int) -> list[str]:
    """Lines of at most `width` pixels, broken at spaces."""
    measure = font or ImageFont.load_default(15)
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and measure.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
