import math
import re
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from engine.data import cut_out
from engine.data.crops import PixelBox
from engine.data.cut_out import (
    Extent,
    Layer,
    OutlineFault,
    crosses_itself,
    fit_outline,
    outline_extent,
    outline_mask,
    outlined_layer,
    place_on_ground,
    visible_layer,
)
from engine.data.ground import DEFAULT_GROUND, ground_rgb
from engine.data.label_format import Outline
from engine.errors import InputError

GROUND = (238, 238, 236)
RED = (200, 30, 40)


def rectangle(left: float, top: float, right: float, bottom: float) -> Outline:
    return (left, top), (right, top), (right, bottom), (left, bottom)


def ellipse(x: float, y: float, a: float, b: float, corners: int = 60) -> Outline:
    angles = [2 * math.pi * n / corners for n in range(corners)]
    return tuple((x + a * math.cos(angle), y + b * math.sin(angle)) for angle in angles)


def red(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), RED)


def is_ground(image: Image.Image) -> np.ndarray:
    """(size, size) bool."""
    whole: np.ndarray = (np.asarray(image) == GROUND).all(axis=2)
    return whole


def shown(image: Image.Image, x: int, y: int) -> tuple[int, ...]:
    return tuple(np.asarray(image)[y, x].tolist())


def cut(photo: Image.Image, outline: Outline, size: int, margin: float = 0.0) -> Image.Image:
    return place_on_ground(outlined_layer(photo, outline), size, ground=GROUND, margin=margin)


# ------------------------------------------------------------------------------------------------------------- masks


def test_a_mask_equals_the_distance_to_the_outline() -> None:
    """Of a circle: 255 deeper than one pixel and a half diagonal, 0 outside, a soft edge between."""
    mask = np.asarray(outline_mask(ellipse(40, 35, 30, 30, corners=400), PixelBox(5, 2, 75, 70))) / 255
    x, y = np.meshgrid(np.arange(5, 75) + 0.5, np.arange(2, 70) + 0.5)
    depth = 30 - np.hypot(x - 40, y - 35)  # of the pixels' centres
    assert (mask[depth > 2.5] == 1).all()
    assert (mask[depth < 0] == 0).all()
    edge = mask[(depth >= 0) & (depth <= 2.5)]
    assert 0.3 < ((edge > 0) & (edge < 1)).mean() < 0.9
    assert mask.sum() == pytest.approx(math.pi * 29**2, rel=0.02)


def test_the_edge_is_one_pixel_wide() -> None:
    outline = ((20.0, 5.0), (100.0, 45.0), (100.0, 100.0), (20.0, 100.0))  # its upper edge is slanted
    mask = np.asarray(outline_mask(outline, PixelBox(0, 0, 110, 110)))
    soft = (mask > 0) & (mask < 255)
    per_column = soft[:80, 30:90].sum(axis=0)
    assert per_column.min() >= 1
    assert per_column.max() <= 2
    assert (np.diff(mask[:80, 30:90].astype(int), axis=0) >= 0).all()  # from nothing to all, once


def test_masks_do_not_depend_on_the_strips_they_are_drawn_in(monkeypatch: pytest.MonkeyPatch) -> None:
    outline, window = ellipse(60, 200, 55, 190), PixelBox(3, 5, 117, 395)
    whole = np.asarray(outline_mask(outline, window))
    for rows in (1, 7, 10_000):
        monkeypatch.setattr(cut_out, "_STRIP", rows)
        assert np.array_equal(np.asarray(outline_mask(outline, window)), whole)


def test_holes_are_left_open() -> None:
    """Even-odd: a frame drawn in one line, and the middle of a five-pointed star."""
    frame = (*rectangle(0, 0, 60, 60), (0.0, 0.0), *rectangle(20, 20, 40, 40)[::-1], (20.0, 20.0))
    mask = np.asarray(outline_mask(frame, PixelBox(0, 0, 60, 60)))
    assert (mask[25:35, 25:35] == 0).all()
    assert (mask[5:15, 25:55] == 255).all()
    star = tuple(ellipse(50, 50, 45, 45, corners=5)[2 * n % 5] for n in range(5))
    mask = np.asarray(outline_mask(star, PixelBox(0, 0, 100, 100)))
    assert mask[50, 50] == 0
    assert mask[50, 85] == 255


# ---------------------------------------------------------------------------------------------------------- pictures


def test_outside_is_the_ground_exactly_and_inside_the_photo() -> None:
    image = cut(red(200, 160), ellipse(100, 80, 60, 50), 96, margin=0.1)
    pixels = np.asarray(image).astype(int)
    x, y = np.meshgrid(np.arange(96) + 0.5, np.arange(96) + 0.5)
    scale = 120 * 1.2 / 96
    distance = np.hypot((x - 48) * scale / 60, (y - 48) * scale / 50)  # 1 on the outline
    assert is_ground(image)[distance > 1.04].all()
    assert (np.abs(pixels[distance < 0.93] - RED) <= 1).all()
    between = np.minimum(GROUND, RED), np.maximum(GROUND, RED)  # no halo, neither lighter nor darker than both
    assert (pixels >= between[0] - 1).all()
    assert (pixels <= between[1] + 1).all()


@pytest.mark.parametrize("size", [40, 400])
def test_no_background_at_the_edge(size: int) -> None:
    """The photo is green around the object, and no pixel becomes greener than ground and object."""
    photo = Image.new("RGB", (200, 200), (0, 255, 0))
    outline = ellipse(100, 100, 70, 70, corners=200)
    inside = outline_mask(ellipse(100, 100, 71, 71, corners=200), PixelBox(0, 0, 200, 200))
    photo.paste(RED, mask=inside.point(lambda value: 255 * (value > 0)))
    pixels = np.asarray(cut(photo, outline, size, margin=0.1)).astype(int)
    assert (pixels[..., 1] <= pixels[..., 0] + 2).all()


@pytest.mark.parametrize(("width", "height"), [(120, 60), (60, 120), (100, 100), (150, 11)])
@pytest.mark.parametrize("margin", [0.0, 0.06, 0.5])
def test_proportions_and_margin(width: int, height: int, margin: float) -> None:
    image = cut(red(200, 200), rectangle(20, 30, 20 + width, 30 + height), 128, margin)
    rows, columns = np.nonzero(~is_ground(image))
    scale = 128 / (max(width, height) * (1 + 2 * margin))
    found = (np.ptp(columns) + 1, np.ptp(rows) + 1)
    # an edge's pixel goes with the background, and a soft edge reaches a pixel and a half further
    assert found == pytest.approx(((width - 2) * scale, (height - 2) * scale), abs=3.1)
    middle = (columns.min() + columns.max() + 1) / 2, (rows.min() + rows.max() + 1) / 2
    assert middle == pytest.approx((64, 64), abs=1)


def test_objects_at_the_photos_edge_get_ground_beyond_it() -> None:
    image = cut(red(50, 100), rectangle(0, 0, 50, 100), 64, margin=0.1)
    assert is_ground(image)[:4].all()
    assert is_ground(image)[:, :18].all()
    assert shown(image, 32, 32) == RED


def test_visible_parts_keep_their_soft_alpha() -> None:
    pixels = np.zeros((40, 60, 4), np.uint8)
    pixels[..., 1] = 255  # green hides under the transparency
    pixels[10:30, 20:50] = (*RED, 255)
    pixels[10:30, 35:50, 3] = 128
    pixels[0, 0] = (0, 0, 0, 12)  # a speck
    layer = visible_layer(Image.fromarray(pixels))
    assert layer is not None
    assert layer.extent == Extent(20, 10, 50, 30)
    image = place_on_ground(layer, 30, ground=GROUND)
    assert shown(image, 5, 15) == RED
    half = np.add(GROUND, RED) / 2
    assert np.abs(np.asarray(image)[15, 25] - half).max() <= 1
    assert is_ground(image)[:4].all()
    assert is_ground(image)[26:].all()


def test_nothing_visible() -> None:
    assert visible_layer(Image.new("RGBA", (20, 20), (255, 0, 0, 12))) is None
    assert visible_layer(Image.new("RGBA", (20, 20), (255, 0, 0, 13))) is not None


def test_whole_and_fractional_places_give_the_same_picture() -> None:
    """The square's place is a fraction of a pixel: an object moved by half a pixel on both sides stays in the middle."""
    layer = Image.new("RGBA", (80, 80))
    layer.paste((*RED, 255), (20, 20, 60, 60))
    whole = place_on_ground(Layer(layer, Extent(20, 20, 60, 60)), 50, ground=GROUND, margin=0.125)
    assert whole == whole.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert np.array_equal(~is_ground(whole), ~is_ground(whole).T)
    odd = place_on_ground(Layer(layer, Extent(19.75, 19.75, 60.25, 60.25)), 50, ground=GROUND, margin=0.125)
    assert odd == odd.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


@pytest.mark.parametrize(("left", "width", "margin"), [(209.8, 14.8, 0.5), (164.6, 108.4, 0.0), (209.1, 109.0, 0.1)])
def test_squares_whose_edge_rounds_past_a_pixel(left: float, width: float, margin: float) -> None:
    """(left - whole) + side is a little more than a whole number here, where left + side is none."""
    layer = Layer(Image.new("RGBA", (350, 350), (*RED, 255)), Extent(left, 10, left + width, 10 + width))
    assert shown(place_on_ground(layer, 16, ground=GROUND, margin=margin), 8, 8) == RED


# ------------------------------------------------------------------------------------------------------------ faults


def test_sound_outlines_stay_as_they_are() -> None:
    outline = ellipse(50, 50, 40, 30)
    assert fit_outline(outline, 100, 100) == outline
    assert fit_outline(outline, 100, 100, PixelBox(10, 20, 90, 80)) == outline
    assert outline_extent(rectangle(1, 2, 3.5, 4)) == (1, 2, 3.5, 4)


def test_points_a_little_outside_are_moved_to_the_edge() -> None:
    fitted = fit_outline(((-4, 10), (204, 10), (204, 104), (-4, 104)), 200, 100)  # 2 % of 200
    assert fitted == rectangle(0, 10, 200, 100)
    assert fit_outline(rectangle(-2, -2, 22, 22), 20, 20) == rectangle(0, 0, 20, 20)  # two pixels in small photos


BOW_TIE = ((10.0, 10.0), (90.0, 90.0), (90.0, 10.0), (10.0, 90.0))


@pytest.mark.parametrize(
    ("outline", "defect", "word"),
    [
        (lambda: rectangle(10, 10, 204.1, 90), "outline_outside_image", r"point \(204.1, 10\) is outside the image"),
        (lambda: rectangle(10, -5, 90, 90), "outline_outside_image", "outside the image of 200 x 100"),
        (lambda: rectangle(300, 300, 400, 400), "outline_outside_image", "outside"),
        (lambda: ((10.0, 10.0), (50.0, 50.0), (90.0, 90.0)), "zero_area_outline", "is a line"),
        (lambda: rectangle(10, 10, 90, 10), "zero_area_outline", "fills 0.0%"),
        (lambda: rectangle(50, 10, 50, 90), "zero_area_outline", "fills 0.0%"),
        (lambda: rectangle(10, 10, 90, 12), "zero_area_outline", "is 2.0 pixels wide"),
        # there and back again, and once round and back: by the even-odd rule next to nothing
        (lambda: (*BOW_TIE[:2], (91.0, 90.0), (11.0, 10.0)), "zero_area_outline", "line, or crosses itself"),
        (lambda: rectangle(10, 10, 90, 90) * 2, "zero_area_outline", "crosses itself"),
        (lambda: rectangle(10, 10, 40, 40), "outline_off_box", r"the box \(60, 20 to 120, 80\) overlap by 0%"),
        (lambda: rectangle(60, 20, 90, 79), "outline_off_box", "overlap by 49%"),
    ],
)
def test_bad_outlines_are_named(outline: Callable[[], Outline], defect: str, word: str) -> None:
    fault = fit_outline(outline(), 200, 100, PixelBox(60, 20, 120, 80) if defect == "outline_off_box" else None)
    assert isinstance(fault, OutlineFault)
    assert fault.defect == defect
    assert re.search(word, fault.reason)


def test_outlines_that_cross_themselves_are_used_as_they_fill() -> None:
    assert fit_outline(BOW_TIE, 200, 100) == BOW_TIE
    image = cut(red(200, 100), BOW_TIE, 80)
    assert shown(image, 70, 40) == RED
    assert shown(image, 40, 5) == GROUND


@pytest.mark.parametrize("ground", ["grey", "#eee", "#eeeeecff", "eeeeec", "#gggggg", "", None, 7])
def test_grounds_that_are_no_colour(ground: object) -> None:
    with pytest.raises(InputError, match="#rrggbb"):
        ground_rgb(ground)


def test_ground_colours() -> None:
    assert ground_rgb(DEFAULT_GROUND) == GROUND
    assert ground_rgb("#00FFa0") == (0, 255, 160)


@pytest.mark.parametrize(
    ("outline", "crosses"),
    [
        (((0, 0), (10, 10), (10, 0), (0, 10)), True),  # a bow tie
        (((0, 0), (10, 0), (10, 10), (5, -1), (0, 10)), True),
        (((0, 0), (10, 0), (10, 10), (0, 10)), False),
        (((0, 0), (10, 0), (10, 10), (5, 0), (0, 10)), False),  # touches a side
        (((0, 0), (10, 0), (10, 10), (10, 10), (0, 10), (0, 0)), False),  # points that are there twice
        (((0, 0), (10, 0), (5, 0), (5, 5)), False),  # along a side and back
        (((0.1, 0.1), (0.7, 0.7), (0.3, 0.3), (0.9, 0.1)), False),
        (tuple((100 + 50 * np.cos(n / 100), 100 + 50 * np.sin(n / 100)) for n in range(628)), False),
        (tuple((100 + 50 * np.cos(n / 100), 100 + 50 * np.sin(n / 50)) for n in range(628)), True),  # an eight
    ],
)
def test_outlines_that_cross_themselves(outline: Outline, crosses: bool) -> None:
    assert crosses_itself(outline) is crosses
    assert crosses_itself(outline[::-1]) is crosses
    assert crosses_itself((*outline[3:], *outline[:3])) is crosses


def test_outlines_of_very_many_points_are_refused_unread() -> None:
    outline = tuple((float(n % 97), float(n % 89)) for n in range(10_001))
    fault = fit_outline(outline, 100, 100)
    assert isinstance(fault, OutlineFault)
    assert (fault.defect, "10,001 points" in fault.reason) == ("long_outline", True)
