"""Images beside each other: contact sheets with their caption, grids for logs.

B images, S pixels.
"""

import logging
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from engine.pipeline.fonts import hangul_font

_GAP = 4
_CAPTION_SIZE, _LINE_HEIGHT = 12, 15  # pixels, of captions under single images


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


def cut_grid(grid: Image.Image, count: int, *, columns: int, gap: int = _GAP) -> list[Image.Image]:
    """The first images of a `paste_grid` of squares."""
    side = (grid.width - gap) // columns - gap
    places = [divmod(number, columns) for number in range(count)]
    corners = [(gap + column * (side + gap), gap + row * (side + gap)) for row, column in places]
    return [grid.crop((left, top, left + side, top + side)).convert("RGB") for left, top in corners]


def contact_sheet(
    caption: str, images: Sequence[Image.Image], labels: Sequence[str], *, columns: int, scale: int = 1
) -> Image.Image:
    """Images under their caption, each with a short Latin label (rank, score, seed) beneath.

    Args:
        scale: whole-number enlargement, nearest neighbour: small images stay what they are.
    """
    font = hangul_font(15)
    caption = _readable(caption, font)
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


def captioned_sheet(
    images: Sequence[Image.Image],
    texts: Sequence[Sequence[str]],
    *,
    columns: int,
    cell_width: int,
    scale: int = 1,
) -> Image.Image:
    """Images of one size, row by row, each with its own texts beneath: the first black, the others grey.

    Args:
        texts: paragraphs of each image, wrapped at `cell_width` pixels.
        cell_width: of an image and its texts; at least the image's width is taken.
        scale: whole-number enlargement, nearest neighbour: small images stay what they are.
    """
    font = hangul_font(_CAPTION_SIZE)
    width, height = (side * scale for side in images[0].size)
    cell_width = max(cell_width, width)
    # One warning at most: captions of one sheet are in one language.
    readable = font is not None or all(text.isascii() for own in texts for text in own)
    if not readable:
        _readable(next(text for own in texts for text in own if not text.isascii()), font)
    paragraphs = [[_wrap(text, font, cell_width) for text in own if readable or text.isascii()] for own in texts]
    tops, bottom = [], _GAP
    for start in range(0, len(images), columns):
        tops.append(bottom)
        lines = max(sum(map(len, own)) for own in paragraphs[start : start + columns])
        bottom += height + _GAP + lines * _LINE_HEIGHT + 2 * _GAP
    sheet = Image.new("RGB", (_GAP + columns * (cell_width + 2 * _GAP), bottom), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (image, own) in enumerate(zip(images, paragraphs, strict=True)):
        row, column = divmod(number, columns)
        x, y = _GAP + column * (cell_width + 2 * _GAP), tops[row]
        sheet.paste(image.resize((width, height), Image.Resampling.NEAREST), (x, y))
        y += height + _GAP
        for place, paragraph in enumerate(own):
            for line in paragraph:
                draw.text((x, y), line, fill="black" if place == 0 else "#555555", font=font)
                y += _LINE_HEIGHT
    return sheet


def _readable(caption: str, font: ImageFont.FreeTypeFont | None) -> str:
    """The caption, or "" with a warning where no font has its letters."""
    if font is not None or caption.isascii():
        return caption
    logging.getLogger(__name__).warning(
        "no font with Korean letters found: the sheet has no caption (it is in the metadata). "
        "Install one, e.g. the package fonts-nanum"
    )
    return ""


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
