"""Fonts with Korean letters, as the system has them. Without torch."""

from PIL import ImageFont

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


def hangul_font(size: int) -> ImageFont.FreeTypeFont | None:
    """A font that has Korean letters, or None where the system has none."""
    for name in HANGUL_FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return None
