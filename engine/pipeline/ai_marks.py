"""Marks that say a picture was made by AI: for programs in every file (XMP), and on request for eyes, in its corner.

Korea's AI Basic Act (in force since January 2026) asks for such marks. The one for programs is IPTC's Digital Source Type
(Photo Metadata Standard 2025.1, controlled vocabulary `digitalsourcetype`), which image search and asset managers read.

Without torch.
"""

from typing import Literal

from PIL import Image, ImageDraw, ImageFont

from engine import __version__
from engine.pipeline.fonts import hangul_font
from engine.text import TextFault, clean_text

# All of it is a model's; or a model's beside what a person made, such as a photograph whose masked part was inpainted.
DigitalSource = Literal["trainedAlgorithmicMedia", "compositeWithTrainedAlgorithmicMedia"]
SOURCE_TYPE_URI = "http://cv.iptc.org/newscodes/digitalsourcetype/"

MOST_MARK_CHARACTERS = 24
_MARK_SHARE = 1 / 14  # of the image's side: the mark's letters
_LEAST_LETTERS = 9  # pixels: smaller ones cannot be read
_INK, _PLATE = (255, 255, 255, 255), (0, 0, 0, 150)  # legible on any ground


def xmp_packet(source: DigitalSource) -> str:
    """The XMP of an image file."""
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description rdf:about="" xmlns:xmp="http://ns.adobe.com/xap/1.0/" '
        'xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" '
        f'xmp:CreatorTool="KoDALLE engine {__version__}" '
        f'Iptc4xmpExt:DigitalSourceType="{SOURCE_TYPE_URI}{source}"/>'
        '</rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
    )


def checked_mark(text: str) -> str:
    """A visible mark's text in its normal form; raises ValueError: too long, or characters that no text has."""
    try:
        cleaned = clean_text(text, field="visible_mark")
    except TextFault as fault:
        raise ValueError(fault.remedy) from fault
    if len(cleaned) > MOST_MARK_CHARACTERS:
        raise ValueError(f"has {len(cleaned)} characters: write at most {MOST_MARK_CHARACTERS}, such as AI")
    return cleaned


def with_visible_mark(image: Image.Image, text: str) -> Image.Image:
    """A copy with the text on a dark plate in its lower right corner, smaller where it would be wider than the image.

    Args:
        image: RGB or RGBA.
        text: as `checked_mark` returns it.
    """
    letters = max(_LEAST_LETTERS, round(min(image.size) * _MARK_SHARE))
    font = _font(text, letters)
    while font.getlength(text) + letters > image.width and letters > 4:
        letters -= 1
        font = _font(text, letters)
    pad = max(2, letters // 3)
    left, top, right, bottom = font.getbbox(text)
    width, height = int(right - left) + 2 * pad, int(bottom - top) + 2 * pad
    plate = Image.new("RGBA", (width, height), _PLATE)
    ImageDraw.Draw(plate).text((pad - left, pad - top), text, font=font, fill=_INK)
    marked = image.convert("RGBA")
    marked.alpha_composite(plate, (max(0, image.width - width - pad), max(0, image.height - height - pad)))
    return marked if image.mode == "RGBA" else marked.convert("RGB")


def _font(text: str, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font for Latin letters; it has no Hangul."""
    found = None if text.isascii() else hangul_font(size)
    return found or ImageFont.load_default(size)
