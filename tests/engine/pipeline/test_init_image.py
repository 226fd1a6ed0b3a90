"""Init images: how they are cropped, what a mask marks, and what is refused."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from engine.data.crops import crop_and_resize
from engine.errors import InputError
from engine.pipeline.init_image import InitImage, _shrunk

S, GRID = 32, 8  # cells of 4 x 4 pixels


def _photo(width: int, height: int) -> Image.Image:
    generator = np.random.default_rng(width * height)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


def _mask(width: int, height: int, *marked: tuple[int, int]) -> Image.Image:
    """Black but for the pixels (x, y)."""
    mask = Image.new("L", (width, height))
    for place in marked:
        mask.putpixel(place, 255)
    return mask


def _cells(init_image: InitImage) -> set[tuple[int, int]]:
    """(row, column) of the regenerated tokens."""
    tokens = init_image.regenerated_tokens(S, GRID)
    assert tokens.shape == (GRID * GRID,)
    return {(int(place) // GRID, int(place) % GRID) for place in tokens.nonzero()[0]}


@pytest.mark.parametrize(("width", "height"), [(32, 32), (100, 60), (61, 100), (20, 9)])
def test_middle_square_resized_as_training_images_are(width: int, height: int) -> None:
    photo, side = _photo(width, height), min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    square = photo.crop((left, top, left + side, top + side))
    pixels = InitImage(photo).pixels(S)
    assert pixels.dtype == np.uint8
    assert np.array_equal(pixels, np.asarray(crop_and_resize(square, None, S)))


def test_any_mode_and_upright() -> None:
    grey = Image.fromarray(np.full((40, 40), 51, np.uint8))
    clear = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    deep = Image.fromarray(np.full((40, 40), 51 * 257, np.uint16))
    for image, level in ((grey, 51), (clear, 255), (deep, 51), (grey.convert("P"), 51), (grey.convert("1"), None)):
        pixels = InitImage(image).pixels(S)
        assert pixels.shape == (S, S, 3)
        assert level is None or (pixels == level).all()
    sideways = _photo(40, 40)
    turned = sideways.copy()
    turned.getexif()[0x0112] = 6  # to be turned by a quarter for display
    expected = InitImage(sideways.transpose(Image.Transpose.ROTATE_270)).pixels(S)
    assert np.array_equal(InitImage(turned).pixels(S), expected)


def test_first_rows_are_kept() -> None:
    for rows in range(1, GRID):
        init_image = InitImage(_photo(50, 40), keep_rows=rows)
        assert _cells(init_image) == {(row, column) for row in range(rows, GRID) for column in range(GRID)}
        regenerated = init_image.regenerated_pixels(S, GRID)
        assert not regenerated[: 4 * rows].any()
        assert regenerated[4 * rows :].all()


@pytest.mark.parametrize(("grid", "rows"), [(32, 14), (16, 7), (6, 2), (2, 1)])
def test_default_rows_are_dalles(grid: int, rows: int) -> None:
    assert (~InitImage(_photo(32, 32)).regenerated_tokens(2 * grid, grid)).sum() == rows * grid


def test_a_cell_is_regenerated_when_one_pixel_of_it_is_marked() -> None:
    assert _cells(InitImage(_photo(S, S), mask_image=_mask(S, S, (0, 0)))) == {(0, 0)}
    assert _cells(InitImage(_photo(S, S), mask_image=_mask(S, S, (3, 4)))) == {(1, 0)}
    assert _cells(InitImage(_photo(S, S), mask_image=_mask(S, S, (4, 3), (31, 31)))) == {(0, 1), (7, 7)}
    # One pixel of a large mask, of which an image filter would leave nothing: 800 x 800 in the middle of 1000 x 800.
    large = InitImage(_photo(1000, 800), mask_image=_mask(1000, 800, (100 + 399, 799)))
    assert _cells(large) == {(7, 3)}
    assert large.regenerated_pixels(S, GRID).sum() == 1
    # One pixel of a small mask covers several of the image: 16 x 16 to 32 x 32.
    assert InitImage(_photo(16, 16), mask_image=_mask(16, 16, (5, 0))).regenerated_pixels(S, GRID).sum() == 4


def test_grey_counts_as_white_from_the_middle_on() -> None:
    mask = _mask(S, S)
    mask.putpixel((0, 0), 127)
    mask.putpixel((9, 0), 128)
    for one in (mask, mask.convert("RGB"), mask.convert("RGBA")):
        assert _cells(InitImage(_photo(S, S), mask_image=one)) == {(0, 2)}


@pytest.mark.parametrize(("side", "size"), [(32, 8), (33, 8), (100, 32), (7, 32), (32, 32), (1, 5)])
def test_shrunk_is_any_overlapping_pixel(side: int, size: int) -> None:
    marked = np.random.default_rng(side).random((side, side)) < 0.1

    def overlapping(number: int) -> slice:
        return slice(number * side // size, -(-(number + 1) * side // size))

    expected: NDArray[np.bool_] = np.array(
        [[marked[overlapping(row), overlapping(column)].any() for column in range(size)] for row in range(size)]
    )
    assert np.array_equal(_shrunk(marked, size), expected)


def test_bad_masks() -> None:
    photo = _photo(60, 40)
    clear = Image.new("RGBA", (60, 40), (255, 255, 255, 0))
    for mask, message in (
        (_mask(40, 60, (1, 1)), "mask_image: 40 x 60: must be as large as the image, 60 x 40"),
        (_mask(60, 40), "mask_image: all black"),
        (_mask(60, 40, (9, 0), (50, 0)), "mask_image: all black"),  # white outside the middle square only
        (Image.new("1", (60, 40), 1), "mask_image: all white"),
        (clear, "mask_image: has transparent pixels"),
    ):
        with pytest.raises(InputError, match=message):
            InitImage(photo, mask_image=mask)
    with pytest.raises(InputError, match="keep_rows: 3: goes with no mask"):
        InitImage(photo, keep_rows=3, mask_image=_mask(60, 40, (20, 20)))
    every_cell = _mask(S, S, *((x, y) for x in range(0, S, 4) for y in range(0, S, 4)))
    with pytest.raises(InputError, match="touches each of the 8 x 8 cells"):
        InitImage(_photo(S, S), mask_image=every_cell).regenerated_tokens(S, GRID)


@pytest.mark.parametrize("rows", [-1, 0])
def test_too_few_rows(rows: int) -> None:
    with pytest.raises(InputError, match=f"keep_rows: {rows}: must be 1 or more"):
        InitImage(_photo(S, S), keep_rows=rows)


def test_too_many_rows_for_the_model() -> None:
    init_image = InitImage(_photo(S, S), keep_rows=GRID)
    with pytest.raises(InputError, match="keep_rows: 8: this model's images have 8 rows of tokens: keep 1 to 7"):
        init_image.regenerated_tokens(S, GRID)


@pytest.mark.parametrize("strength", [-0.1, 1.01, "0.5", True, float("nan")])
def test_strength_out_of_bounds(strength: object) -> None:
    with pytest.raises(InputError, match=r"strength: .*: must be a number, 0 to 1, or left out"):
        InitImage(_photo(S, S), strength=strength)  # type: ignore[arg-type]


@pytest.mark.parametrize("other", [{"keep_rows": 3}, {"mask_image": _mask(S, S, (1, 1))}])
@pytest.mark.parametrize("chosen", [{"strength": 0.5}, {"changed_from": "빨강"}])
def test_the_models_choice_goes_with_no_other(chosen: dict[str, Any], other: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="goes with neither a mask nor keep_rows"):
        InitImage(_photo(S, S), **chosen, **other)


def test_what_the_model_chooses_is_sent_as_it_is_and_not_pasted() -> None:
    init_image = InitImage(_photo(60, 40), strength=0.5, changed_from="  빨강\u1112\u1161\u11ab ")
    assert init_image.changed_from == "빨강한"  # in its normal form
    resized = init_image.resized(S, GRID)
    assert (resized.strength, resized.changed_from, resized.pastes) == (0.5, "빨강한", False)
    assert np.array_equal(resized.pixels(S), init_image.pixels(S))
    assert InitImage(_photo(S, S), strength=0.5, paste=True).pastes
    assert InitImage(_photo(S, S)).pastes
    with pytest.raises(InputError, match=r"changed_from: .*nothing"):
        InitImage(_photo(S, S), changed_from=" ")
