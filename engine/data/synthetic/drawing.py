"""Draws one garment of the demo data set from its attributes: flat-lay illustrations, readable at 64x64 pixels.

The images must be learnable in minutes on a processor, so geometry is fixed for each (category, length, sleeve), a
garment nearly fills the frame, and colours are saturated and far apart. Only place, scale, light and shade vary.

    x: -0.5 … 0.5 from left to right, y: 0 … 1 from top to bottom, both in shares of the image's side.
    Garments are symmetric: a half outline runs down the right side from the top centre to the bottom centre.
    S: side of the image in pixels. Shapes are drawn at 4S and averaged down, which makes smooth edges.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from engine.errors import InputError

Point = tuple[float, float]
Rgb = tuple[int, int, int]
# One step of an outline: (x, y) is a straight line to there, (cx, cy, x, y) a quadratic Bézier curve with control c.
Step = tuple[float, float] | tuple[float, float, float, float]

SUPERSAMPLING = 4
# Warm grey: darker than white cloth, and beside the white-to-ink mixtures at the edges of stripes.
BACKGROUND: Rgb = (190, 180, 164)
# name -> (cloth, ink of its prints). Inks are chosen so that a blurred print never turns into another cloth colour:
# white on red, for one, would blur to pink.
COLOURS: dict[str, tuple[Rgb, Rgb]] = {
    "레드": ((214, 30, 40), (255, 214, 110)),
    "블루": ((32, 84, 210), (236, 244, 255)),
    "그린": ((28, 146, 72), (240, 248, 190)),
    "옐로우": ((250, 208, 30), (150, 80, 10)),
    "블랙": ((38, 38, 44), (152, 152, 160)),
    "민트": ((84, 206, 190), (250, 250, 244)),
    "핑크": ((252, 104, 168), (255, 250, 252)),
    "퍼플": ((124, 52, 172), (244, 214, 90)),
}
PRINTS = ("무지", "스트라이프", "도트")


@dataclass(frozen=True)
class DrawnGarment:
    """A drawn garment: `image` RGB (S, S) and `coverage` uint8 (S, S), 0 background … 255 garment."""

    image: Image.Image
    coverage: np.ndarray


@dataclass(frozen=True)
class _Sheet:
    """Canvas of the category functions: the 4S image, its coverage and the cloth to cut parts from."""

    image: Image.Image
    coverage: Image.Image
    fabric: Image.Image
    shaded_fabric: Image.Image
    line: Rgb
    trim: Rgb
    inside: Rgb
    accent: Rgb
    scale: float

    def pixels(self, points: Sequence[Point]) -> list[Point]:
        """Shares of the side to pixels of the 4S image."""
        side = self.image.width
        return [((0.5 + x * self.scale) * side, (0.5 + (y - 0.5) * self.scale) * side) for x, y in points]

    def width(self, share: float) -> int:
        """A stroke's width in pixels of the 4S image."""
        return max(1, round(share * self.scale * self.image.width))


def draw_garment(
    attributes: Mapping[str, str | list[str]], *, generator: np.random.Generator | None, image_size: int = 64
) -> DrawnGarment:
    """Draws a garment with these attributes.

    Args:
        attributes: 카테고리 and 색상, and as the category needs them 기장, 소매기장, 프린트, 넥라인, 디테일.
        generator: decides place and scale (±3 %), light and shade; equal states give equal pixels. None draws the
            standard view: centred, at scale 1, in middling light.
        image_size: S in pixels.

    Raises:
        InputError: a category or colour that the demo set does not draw.
    """
    category, colour = str(attributes["카테고리"]), str(attributes["색상"])
    if category not in _DRAW:
        raise InputError("카테고리", category, f"choose one of {', '.join(_DRAW)}")
    if colour not in COLOURS:
        raise InputError("색상", colour, f"choose one of {', '.join(COLOURS)}")
    sheet = _new_sheet(colour, _print_of(attributes), generator, image_size)
    _DRAW[category](sheet, attributes)
    shift = _shift(sheet.coverage, generator)
    image = np.asarray(ImageChops.offset(sheet.image, *shift).reduce(SUPERSAMPLING), dtype=np.float32)
    coverage = ImageChops.offset(sheet.coverage, *shift).reduce(SUPERSAMPLING)
    lit = image * _light(coverage, generator)[:, :, None]
    return DrawnGarment(Image.fromarray(np.clip(np.rint(lit), 0, 255).astype(np.uint8)), np.asarray(coverage).copy())


def _uniform(generator: np.random.Generator | None, low: float, high: float) -> float:
    return (low + high) / 2 if generator is None else float(generator.uniform(low, high))


def _print_of(attributes: Mapping[str, str | list[str]]) -> str:
    prints = attributes.get("프린트", ["무지"])
    return prints if isinstance(prints, str) else prints[0]


def _new_sheet(colour: str, print_name: str, generator: np.random.Generator | None, image_size: int) -> _Sheet:
    side = image_size * SUPERSAMPLING
    scale = _uniform(generator, 0.97, 1.03)
    cloth, ink = COLOURS[colour]
    cloth = _tone(cloth, _uniform(generator, 0.97, 1.03))
    shade = round(_uniform(generator, -6.5, 6.5))
    backdrop: Rgb = (BACKGROUND[0] + shade, BACKGROUND[1] + shade, BACKGROUND[2] + shade)
    fabric = _fabric(side, cloth, ink, print_name)
    return _Sheet(
        image=Image.new("RGB", (side, side), backdrop),
        coverage=Image.new("L", (side, side), 0),
        fabric=fabric,
        shaded_fabric=fabric.point([round(value * 0.9) for value in range(256)] * 3),
        # White and black cloth need a line of their own: the usual darker tone of black would vanish, and that of white
        # would blur with it to the very grey of the background.
        line={"블랙": (8, 8, 12)}.get(colour, _tone(cloth, 0.5)),
        trim={"블랙": (64, 64, 72)}.get(colour, _tone(cloth, 0.78)),
        inside={"블랙": (14, 14, 18)}.get(colour, _tone(cloth, 0.45)),
        accent={"옐로우": (122, 72, 20), "핑크": (150, 30, 90)}.get(colour, (246, 240, 226)),
        scale=scale,
    )


def _shift(coverage: Image.Image, generator: np.random.Generator | None) -> tuple[int, int]:
    """Pixels to the right and down that centre the garment, give or take 3 % of the side.

    The finished image is moved, prints and all, so that a print lies the same way on every garment of a kind.
    """
    left, top, right, bottom = coverage.getbbox() or (0, 0, *coverage.size)
    side = coverage.width
    x, y = (round(_uniform(generator, -0.03, 0.03) * side) for _ in range(2))
    # A pixel of the finished image stays free: what leaves on one side would come back on the other.
    edge = SUPERSAMPLING
    x = min(max(x + (side - left - right) // 2, edge - left), side - right - edge)
    y = min(max(y + (side - top - bottom) // 2, edge - top), side - bottom - edge)
    return x, y


def _tone(colour: Rgb, factor: float) -> Rgb:
    red, green, blue = (min(255, round(channel * factor)) for channel in colour)
    return red, green, blue


def _fabric(side: int, cloth: Rgb, ink: Rgb, print_name: str) -> Image.Image:
    """A sheet of cloth as large as the image; ink covers at most about a third, so that cloth stays dominant."""
    fabric = Image.new("RGB", (side, side), cloth)
    draw = ImageDraw.Draw(fabric)
    if print_name == "스트라이프":
        # Thinned ink: in full ink, a garment whose stripes lie a little lower differs more than one of another kind.
        red, green, blue = (round(0.4 * a + 0.6 * b) for a, b in zip(cloth, ink, strict=True))
        for index in range(7):
            top = (0.03 + 0.15 * index) * side
            draw.rectangle((0, top, side, top + 0.05 * side), fill=(red, green, blue))
    elif print_name == "도트":
        radius = 0.026 * side
        for row in range(10):
            for column in range(9):
                x, y = (column * 0.125 + (row % 2) * 0.0625) * side, (0.03 + row * 0.105) * side
                draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=ink)
    return fabric


def _light(coverage: Image.Image, generator: np.random.Generator | None) -> np.ndarray:
    """Brightness factors, float32 (S, S): cloth rounds off towards its edges and has soft folds; the ground is even."""
    side = coverage.width
    mask = np.asarray(coverage, dtype=np.float32) / 255
    soft = np.asarray(coverage.filter(ImageFilter.GaussianBlur(side * 0.035)), dtype=np.float32) / 255
    reach = max(1, round(side * 0.03))
    relief = np.roll(soft, (-reach, -reach), (0, 1)) - np.roll(soft, (reach, reach), (0, 1))
    y, x = np.mgrid[0:side, 0:side].astype(np.float32) / side
    phase, strength = _uniform(generator, 0, 2 * np.pi), _uniform(generator, 0.012, 0.028)
    folds = strength * np.sin(2 * np.pi * (3.1 * x + 0.7 * y) + phase).astype(np.float32)
    cloth = 0.88 + 0.13 * soft + 0.10 * relief + folds
    ground = 1.015 - 0.03 * y
    return (mask * cloth + (1 - mask) * ground).astype(np.float32)


def _path(steps: Sequence[Step]) -> list[Point]:
    """Points along an outline of straight and curved steps; the first step is a point."""
    points: list[Point] = []
    for step in steps:
        if len(step) == 2:
            points.append(step)
            continue
        (x0, y0), (cx, cy, x1, y1) = points[-1], step
        for t in (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0):
            a, b, c = (1 - t) ** 2, 2 * t * (1 - t), t * t
            points.append((a * x0 + b * cx + c * x1, a * y0 + b * cy + c * y1))
    return points


def _both(half: Sequence[Point]) -> list[Point]:
    """Closes a right half outline with its mirror image."""
    return [*half, *((-x, y) for x, y in reversed(half))]


def _part(sheet: _Sheet, outline: Sequence[Point], *, fill: Rgb | None = None, shaded: bool = False) -> None:
    """Cuts a part out of the fabric (or a plain `fill`), lays it down and draws its outline."""
    points = sheet.pixels(outline)
    ImageDraw.Draw(sheet.coverage).polygon(points, fill=255)
    if fill is None:
        mask = Image.new("1", sheet.image.size, 0)
        ImageDraw.Draw(mask).polygon(points, fill=1)
        sheet.image.paste(sheet.shaded_fabric if shaded else sheet.fabric, (0, 0), mask)
    else:
        ImageDraw.Draw(sheet.image).polygon(points, fill=fill)
    for canvas, tone in ((sheet.image, sheet.line), (sheet.coverage, 255)):
        ImageDraw.Draw(canvas).line([*points, *points[:2]], fill=tone, width=sheet.width(0.015), joint="curve")


def _pair(sheet: _Sheet, outline: Sequence[Point], *, fill: Rgb | None = None, shaded: bool = False) -> None:
    """A part on the right and its mirror image on the left."""
    _part(sheet, outline, fill=fill, shaded=shaded)
    _part(sheet, [(-x, y) for x, y in outline], fill=fill, shaded=shaded)


def _stroke(sheet: _Sheet, points: Sequence[Point], *, width: float = 0.012, tone: Rgb | None = None) -> None:
    draw, tone = ImageDraw.Draw(sheet.image), tone or sheet.line
    draw.line(sheet.pixels(points), fill=tone, width=sheet.width(width), joint="curve")


def _strokes(sheet: _Sheet, points: Sequence[Point], *, width: float = 0.012, tone: Rgb | None = None) -> None:
    """A stroke on the right and its mirror image on the left."""
    _stroke(sheet, points, width=width, tone=tone)
    _stroke(sheet, [(-x, y) for x, y in points], width=width, tone=tone)


def _button(sheet: _Sheet, x: float, y: float, *, radius: float = 0.019) -> None:
    ((left, top), (right, bottom)) = sheet.pixels([(x - radius, y - radius), (x + radius, y + radius)])
    ImageDraw.Draw(sheet.image).ellipse((left, top, right, bottom), fill=sheet.accent, outline=sheet.line)


def _neckline(sheet: _Sheet, neckline: str, *, half_width: float, top: float) -> None:
    """The opening at the neck: the inside of the back shows, and a band runs along the front edge."""
    depth = 0.22 if neckline == "브이넥" else 0.12
    control = (half_width * 0.5, top + depth * 0.5) if neckline == "브이넥" else (half_width * 0.95, top + depth)
    front = _path([(0, top + depth), (*control, half_width, top)])
    back = _path([(half_width, top), (half_width * 0.6, top + 0.03, 0, top + 0.03)])
    ImageDraw.Draw(sheet.image).polygon(sheet.pixels(_both([*reversed(back), *reversed(front)])), fill=sheet.inside)
    _strokes(sheet, front, width=0.034, tone=sheet.trim)
    _strokes(sheet, front)


def _tshirt(sheet: _Sheet, attributes: Mapping[str, str | list[str]]) -> None:
    hem = {"크롭": 0.72, "노멀": 0.83, "롱": 0.94}[str(attributes["기장"])]
    sleeve = attributes["소매기장"]
    if sleeve == "민소매":
        body: list[Step] = [(0, 0.10), (0.14, 0.07), (0.215, 0.07), (0.19, 0.30, 0.31, 0.37), (0.31, hem), (0, hem)]
    else:
        body = [(0, 0.10), (0.12, 0.08), (0.25, 0.12), (0.235, 0.36), (0.235, hem), (0, hem)]
        if sleeve == "반팔":
            _pair(sheet, [(0.20, 0.10), (0.27, 0.125), (0.46, 0.30), (0.375, 0.40), (0.22, 0.30)], shaded=True)
            _strokes(sheet, [(0.435, 0.28), (0.352, 0.378)], tone=sheet.trim, width=0.02)
        else:
            _pair(sheet, [(0.20, 0.10), (0.28, 0.14), (0.465, 0.66), (0.375, 0.70), (0.22, 0.34)], shaded=True)
            _strokes(sheet, [(0.45, 0.615), (0.36, 0.655)], tone=sheet.trim, width=0.024)
    _part(sheet, _both(_path(body)))
    edge = 0.31 if sleeve == "민소매" else 0.235
    _stroke(sheet, [(-edge + 0.01, hem - 0.035), (edge - 0.01, hem - 0.035)], tone=sheet.trim)
    _strokes(sheet, _path([(edge - 0.02, 0.44), (edge - 0.09, 0.50, edge - 0.10, 0.58)]), tone=sheet.trim)
    _neckline(sheet, str(attributes["넥라인"]), half_width=0.13 if sleeve == "민소매" else 0.12, top=0.085)


def _hoodie(sheet: _Sheet, attributes: Mapping[str, str | list[str]]) -> None:
    hem = {"크롭": 0.77, "노멀": 0.86, "롱": 0.95}[str(attributes["기장"])]
    sleeve = attributes["소매기장"]
    wide = 0.32 if sleeve == "민소매" else 0.26
    hood = _path([(0, 0.05), (0.19, 0.05, 0.20, 0.20), (0.20, 0.30, 0.14, 0.36), (0, 0.38)])
    if sleeve == "반팔":
        _pair(sheet, [(0.18, 0.24), (0.28, 0.27), (0.46, 0.44), (0.38, 0.54), (0.24, 0.46)], shaded=True)
    elif sleeve == "긴팔":
        arm = _path([(0.18, 0.24), (0.29, 0.27), (0.44, 0.50, 0.455, 0.74), (0.36, 0.75), (0.24, 0.48)])
        _pair(sheet, arm, shaded=True)
        _pair(sheet, [(0.455, 0.735), (0.45, 0.80), (0.37, 0.80), (0.36, 0.745)], fill=sheet.trim)
    shoulder: list[Step] = [(0, 0.22), (0.15, 0.23)]
    if sleeve == "민소매":
        shoulder += [(0.26, 0.26), (0.23, 0.42, wide, 0.48)]
    else:
        shoulder += [(0.25, 0.26), (0.25, 0.46)]
    _part(sheet, _both(_path([*shoulder, (wide + 0.02, hem - 0.15, wide - 0.03, hem - 0.06), (0, hem - 0.06)])))
    _part(sheet, _both([(0, hem - 0.065), (wide - 0.045, hem - 0.065), (wide - 0.05, hem), (0, hem)]), fill=sheet.trim)
    _part(sheet, _both(hood), shaded=True)
    opening = _path([(0, 0.11), (0.11, 0.11, 0.115, 0.22), (0.11, 0.31, 0, 0.36)])
    _part(sheet, _both(opening), fill=sheet.inside)
    _strokes(sheet, [(0.055, 0.36), (0.06, 0.50)], width=0.02, tone=sheet.accent)
    pocket = [(0, hem - 0.24), (0.11, hem - 0.24), (0.17, hem - 0.10), (0.17, hem - 0.07), (0, hem - 0.07)]
    _part(sheet, _both(pocket), shaded=True)


def _shirt(sheet: _Sheet, attributes: Mapping[str, str | list[str]]) -> None:
    hem = {"크롭": 0.74, "노멀": 0.85, "롱": 0.95}[str(attributes["기장"])]
    sleeve = attributes["소매기장"]
    wide = 0.31 if sleeve == "민소매" else 0.25
    if sleeve == "반팔":
        _pair(sheet, [(0.18, 0.13), (0.29, 0.17), (0.44, 0.44), (0.32, 0.50), (0.22, 0.36)], shaded=True)
        _strokes(sheet, [(0.425, 0.405), (0.31, 0.46)])
    elif sleeve == "긴팔":
        arm = _path([(0.18, 0.13), (0.28, 0.16), (0.40, 0.24, 0.45, 0.72), (0.35, 0.73), (0.24, 0.40)])
        _pair(sheet, arm, shaded=True)
        _pair(sheet, [(0.45, 0.715), (0.455, 0.79), (0.355, 0.80), (0.35, 0.725)], fill=sheet.trim)
    shoulder: list[Step] = [(0, 0.10), (0.12, 0.10), (0.27, 0.155)]
    shoulder += [(0.23, 0.30, wide, 0.38)] if sleeve == "민소매" else [(0.25, 0.38)]
    body = [*shoulder, (wide, hem - 0.13), (wide - 0.02, hem, wide - 0.14, hem), (0, hem)]
    _part(sheet, _both(_path(body)))
    _part(sheet, [(-0.035, 0.16), (0.035, 0.16), (0.035, hem), (-0.035, hem)], fill=sheet.trim)
    for index in range(4):
        _button(sheet, 0, 0.27 + index * (hem - 0.35) / 3)
    _part(sheet, _both([(0, 0.07), (0.11, 0.06), (0.10, 0.12), (0, 0.20)]), fill=sheet.inside)
    # In the buttons' colour: a collar in the cloth's is what a T-shirt's neck looks like after a small codec.
    _pair(sheet, [(0.0, 0.19), (0.09, 0.045), (0.135, 0.075), (0.175, 0.21), (0.095, 0.27)], fill=sheet.accent)
    _stroke(sheet, [(0.09, 0.38), (0.19, 0.38), (0.19, 0.48), (0.14, 0.51), (0.09, 0.48), (0.09, 0.38)])


def _dress(sheet: _Sheet, attributes: Mapping[str, str | list[str]]) -> None:
    hem, flare = {"미니": (0.76, 0.37), "미디": (0.85, 0.41), "맥시": (0.95, 0.45)}[str(attributes["기장"])]
    sleeve = attributes["소매기장"]
    if sleeve == "반팔":
        _pair(sheet, _path([(0.14, 0.07), (0.34, 0.07, 0.36, 0.25), (0.25, 0.31), (0.16, 0.26)]), shaded=True)
    elif sleeve == "긴팔":
        arm = _path([(0.14, 0.07), (0.23, 0.09), (0.36, 0.20, 0.44, 0.53), (0.35, 0.56), (0.17, 0.30)])
        _pair(sheet, arm, shaded=True)
    if sleeve == "민소매":
        bodice: list[Step] = [(0, 0.12), (0.105, 0.05), (0.155, 0.05), (0.13, 0.20, 0.18, 0.27)]
    else:
        bodice = [(0, 0.10), (0.105, 0.05), (0.19, 0.075), (0.18, 0.27)]
    skirt: list[Step] = [(0.15, 0.40), (0.20, 0.52, flare, hem - 0.03), (flare * 0.5, hem + 0.01, 0, hem)]
    _part(sheet, _both(_path([*bodice, *skirt])))
    for share in (0.25, 0.62):
        _strokes(sheet, _path([(0.15 * share, 0.46), (0.2 * share, 0.56, flare * share, hem - 0.03)]), tone=sheet.trim)
    _part(sheet, _both([(0, 0.375), (0.152, 0.375), (0.155, 0.43), (0, 0.43)]), fill=sheet.trim)
    _neckline(sheet, str(attributes["넥라인"]), half_width=0.10, top=0.06)


def _coat(sheet: _Sheet, attributes: Mapping[str, str | list[str]]) -> None:
    hem, flare = {"하프": (0.80, 0.27), "롱": (0.88, 0.28), "맥시": (0.96, 0.29)}[str(attributes["기장"])]
    sleeve = _path([(0.14, 0.08), (0.25, 0.12), (0.35, 0.18, 0.39, 0.57), (0.30, 0.59), (0.19, 0.30)])
    _pair(sheet, sleeve, shaded=True)
    _pair(sheet, [(0.387, 0.54), (0.395, 0.60), (0.30, 0.615), (0.292, 0.56)], fill=sheet.trim)
    body: list[Step] = [(0, 0.08), (0.11, 0.06), (0.235, 0.11), (0.205, 0.32), (0.19, 0.41), (flare, hem), (0.018, hem)]
    _part(sheet, _both(_path([*body, (0, hem - 0.14)])))
    _part(sheet, _both([(0, 0.06), (0.09, 0.05), (0.08, 0.16), (0, 0.30)]), fill=sheet.inside)
    _stroke(sheet, [(0, 0.30), (0, hem - 0.12)])
    _pair(sheet, [(0.0, 0.33), (0.065, 0.05), (0.115, 0.04), (0.175, 0.20), (0.13, 0.21)], fill=sheet.trim)
    double = "더블브레스티드" in attributes.get("디테일", [])
    for y in (0.35, 0.51, 0.60, 0.69):
        for x in (-0.065, 0.065) if double else (0.04,):
            _button(sheet, x, y, radius=0.021)
    _part(sheet, _both([(0, 0.395), (0.197, 0.395), (0.197, 0.445), (0, 0.445)]), fill=sheet.trim)
    _strokes(sheet, [(0.12, 0.58), (0.20, 0.555)], width=0.022)


def _pants(sheet: _Sheet, attributes: Mapping[str, str | list[str]]) -> None:
    waist, outer, inner, crotch, hem = {
        "미니": (0.27, 0.38, 0.05, 0.46, 0.70),
        "니렝스": (0.25, 0.34, 0.06, 0.44, 0.82),
        "발목": (0.23, 0.31, 0.08, 0.40, 0.95),
    }[str(attributes["기장"])]
    leg: list[Step] = [(0, 0.07), (waist, 0.07), (waist + 0.06, 0.25, outer, hem), (inner, hem), (0, crotch)]
    _part(sheet, _both(_path(leg)))
    _part(sheet, _both([(0, 0.05), (waist, 0.05), (waist + 0.005, 0.125), (0, 0.125)]), fill=sheet.trim)
    _stroke(sheet, [(0, 0.125), (0, crotch)])
    _stroke(sheet, _path([(0.05, 0.13), (0.05, 0.25, 0, 0.28)]))
    _strokes(sheet, _path([(waist - 0.10, 0.13), (waist - 0.07, 0.22, waist + 0.02, 0.24)]))
    middle = (outer + inner) / 2
    _strokes(sheet, [(middle * 0.85, crotch), (middle, hem - 0.04)], tone=sheet.trim)
    _strokes(sheet, [(inner, hem - 0.035), (outer - 0.01, hem - 0.035)], tone=sheet.trim)
    _button(sheet, 0, 0.088)


def _skirt(sheet: _Sheet, attributes: Mapping[str, str | list[str]]) -> None:
    lengths = {"미니": (0.23, 0.43, 0.70), "미디": (0.19, 0.42, 0.83), "맥시": (0.16, 0.40, 0.94)}
    waist, flare, hem = lengths[str(attributes["기장"])]
    outline: list[Step] = [(0, 0.07), (waist, 0.07), (waist + 0.06, 0.24, flare, hem - 0.03)]
    _part(sheet, _both(_path([*outline, (flare * 0.5, hem + 0.015, 0, hem)])))
    for share in (0.0, 0.34, 0.68):
        pleat = _path([(waist * share, 0.14), ((waist + 0.03) * share, 0.26, flare * share, hem - 0.01)])
        _strokes(sheet, pleat, tone=sheet.trim, width=0.016)
    _part(sheet, _both([(0, 0.05), (waist, 0.05), (waist + 0.01, 0.13), (0, 0.13)]), fill=sheet.trim)


_DRAW = {
    "티셔츠": _tshirt,
    "후드티": _hoodie,
    "셔츠": _shirt,
    "코트": _coat,
    "드레스": _dress,
    "팬츠": _pants,
    "스커트": _skirt,
}
