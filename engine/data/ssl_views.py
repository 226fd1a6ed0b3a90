"""Random views of an image for self-supervised learning: crop, colours, blur, in which the same thing is still to be seen.

As x-clip makes them for SimCLR and SimSiam, but that crops have a fifth of the image at least, as in MoCo v2 and SimSiam: a tenth of a
garment on plain ground is often ground alone.

S pixels.
"""

import math

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

_LEAST_AREA = 0.2
_ASPECTS = (3 / 4, 4 / 3)
_JITTER = 0.8  # of brightness, contrast and saturation
_HUE = 0.2  # of the colour circle
_JITTERED, _GREY, _BLURRED = 0.3, 0.2, 0.2  # shares of the views


def ssl_view(image: np.ndarray, generator: np.random.Generator, *, colour: float) -> np.ndarray:
    """One view: a crop, mirrored or not, now and then in other colours, grey or blurred. (S, S, 3) uint8, a new array.

    Args:
        colour: strength of the changes of colour, 1 as in x-clip; with 0 colours stay.
    """
    view = _crop(Image.fromarray(image), generator)
    if generator.random() < 0.5:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if generator.random() < _JITTERED:
        view = _jitter(view, generator, colour)
    if generator.random() < _GREY * colour:
        view = view.convert("L").convert("RGB")
    if generator.random() < _BLURRED:
        view = view.filter(ImageFilter.GaussianBlur(generator.uniform(0.5, 1.0) * len(image) / 64))
    return np.array(view, dtype=np.uint8)


def _crop(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    size = image.width
    area = generator.uniform(_LEAST_AREA, 1.0) * size * size
    aspect = math.exp(generator.uniform(*np.log(_ASPECTS)))
    width, height = (min(size, max(1, round(math.sqrt(side)))) for side in (area * aspect, area / aspect))
    left, top = (int(generator.integers(0, size - side + 1)) for side in (width, height))
    box = (left, top, left + width, top + height)
    return image.resize((size, size), Image.Resampling.BILINEAR, box=box)


def _jitter(image: Image.Image, generator: np.random.Generator, strength: float) -> Image.Image:
    """Brightness, contrast, saturation and hue, in random order. No change at strength 0."""
    factors = 1 + strength * _JITTER * generator.uniform(-1, 1, size=3)
    turn = round(256 * strength * _HUE * generator.uniform(-1, 1)) % 256
    for number in generator.permutation(4).tolist():
        if number < 3:
            enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[number]
            image = enhance(image).enhance(factors[number])
        elif turn:
            hue, saturation, value = image.convert("HSV").split()
            turned = Image.fromarray((np.asarray(hue, dtype=np.int64) + turn).astype(np.uint8))
            image = Image.merge("HSV", (turned, saturation, value)).convert("RGB")
    return image
