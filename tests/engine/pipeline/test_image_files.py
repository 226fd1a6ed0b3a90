"""Contact sheets and grids: right sizes, right bits, Korean letters or a warning."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image

from engine.pipeline import fonts, image_files
from engine.pipeline.image_files import captioned_sheet, contact_sheet, image_grid, paste_grid, to_uint8


def _plain(colour: str, size: int = 8) -> Image.Image:
    return Image.new("RGB", (size, size), colour)


def test_to_uint8_rounds_and_clamps() -> None:
    values = torch.tensor([-0.5, 0.0, 0.499 / 255, 0.501 / 255, 1.0, 7.0])
    images = values.view(6, 1, 1, 1).expand(6, 3, 2, 2)
    pixels = to_uint8(images)
    assert pixels.shape == (6, 2, 2, 3)
    assert pixels[:, 0, 0, 0].tolist() == [0, 0, 0, 1, 255, 255]
    levels = torch.arange(256).float().div(255).view(1, 1, 1, 256).expand(1, 3, 1, 256)
    assert to_uint8(levels)[0, 0, :, 0].tolist() == list(range(256))
    assert torch.equal(to_uint8(levels.bfloat16()), to_uint8(levels.bfloat16().float()))


@pytest.mark.parametrize(("count", "columns", "size"), [(1, 1, (16, 16)), (4, 4, (52, 16)), (5, 3, (40, 28))])
def test_grid_sizes(count: int, columns: int, size: tuple[int, int]) -> None:
    assert image_grid(torch.zeros(count, 3, 8, 8), columns=columns).size == size


def test_grid_goes_row_by_row_on_white() -> None:
    grid = paste_grid([_plain("red"), _plain("lime"), _plain("blue")], columns=2, gap=4)
    assert [grid.getpixel(place) for place in ((4, 4), (16, 4), (4, 16), (16, 16), (0, 0))] == [
        (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (255, 255, 255),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("count", "columns", "scale", "size"), [(1, 1, 1, (16, 32)), (3, 2, 1, (28, 60)), (4, 4, 3, (116, 48))]
)
def test_sheet_sizes(count: int, columns: int, scale: int, size: tuple[int, int]) -> None:
    sheet = contact_sheet("", [_plain("red")] * count, ["#1"] * count, columns=columns, scale=scale)
    assert sheet.size == size


def test_sheet_shows_images_enlarged_pixel_by_pixel() -> None:
    image = Image.new("RGB", (2, 1))
    image.putpixel((0, 0), (255, 0, 0))
    image.putpixel((1, 0), (0, 0, 255))
    sheet = contact_sheet("", [image], [""], columns=1, scale=10)
    assert {sheet.getpixel((x, 4)) for x in range(4, 14)} == {(255, 0, 0)}
    assert {sheet.getpixel((x, 4)) for x in range(14, 24)} == {(0, 0, 255)}


def test_caption_wraps_above_the_images() -> None:
    short, long = (
        contact_sheet(caption, [_plain("red", 64)], ["#1"], columns=1) for caption in ("shirt", "long shirt " * 6)
    )
    assert short.width == long.width == 72
    assert short.height == 64 + 16 + 4 + 4 + 20
    assert long.height > short.height
    assert (long.height - short.height) % 20 == 0


def test_without_a_hangul_font_the_sheet_warns_once_and_has_no_boxes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fonts, "HANGUL_FONTS", ("no-such-font.ttf",))
    with caplog.at_level(logging.WARNING):
        sheet = contact_sheet("상의", [_plain("red")], ["#1"], columns=1)
    assert sheet.size == contact_sheet("", [_plain("red")], ["#1"], columns=1).size
    assert len(caplog.records) == 1
    assert "no font with Korean letters" in caplog.text
    caplog.clear()
    contact_sheet("shirt", [_plain("red")], ["#1"], columns=1)
    assert not caplog.records


def test_captioned_sheets_have_room_for_the_longest_text_of_a_row() -> None:
    images = [_plain("red", 20), _plain("lime", 20), _plain("blue", 20)]
    texts = [["shirt"], ["long shirt " * 6, "grey"], ["a"]]
    sheet = captioned_sheet(images, texts, columns=2, cell_width=60)
    wrapped = len(image_files._wrap("long shirt " * 6, fonts.hangul_font(12), 60))
    assert wrapped > 2
    first, second = 20 + 12 + (wrapped + 1) * 15, 20 + 12 + 15
    assert sheet.size == (4 + 2 * 68, 4 + first + second)
    places = [(4, 4), (4 + 68, 4), (4, 4 + first)]
    assert [sheet.getpixel(place) for place in places] == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    # text lies under its image, in the first row's second cell down to its last line
    last_line = sheet.crop((72, 4 + first - 8 - 15, 136, 4 + first - 8)).convert("L")
    assert np.asarray(last_line).min() < 200
    assert sheet.crop((4, 4 + 20 + 4 + 15, 64, 4 + first)).convert("L").getextrema() == (255, 255)


def test_captioned_sheets_enlarge_by_whole_numbers_and_widen_for_it() -> None:
    sheet = captioned_sheet([_plain("red", 20)], [[]], columns=1, cell_width=10, scale=3)
    assert sheet.size == (4 + 60 + 8, 4 + 60 + 12)
    assert {sheet.getpixel((x, 63)) for x in range(4, 64)} == {(255, 0, 0)}


def test_captioned_sheets_warn_once_without_a_hangul_font(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fonts, "HANGUL_FONTS", ("no-such-font.ttf",))
    images = [_plain("red")] * 2
    with caplog.at_level(logging.WARNING):
        sheet = captioned_sheet(images, [["상의", "Top"], ["하의", "Bottom"]], columns=2, cell_width=60)
    assert len(caplog.records) == 1
    assert sheet.size == captioned_sheet(images, [["Top"], ["Bottom"]], columns=2, cell_width=60).size
