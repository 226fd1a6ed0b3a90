"""Contact sheets and grids: right sizes, right bits, Korean letters or a warning."""

import logging

import pytest
import torch
from PIL import Image

from engine.pipeline import image_files
from engine.pipeline.image_files import contact_sheet, image_grid, paste_grid, to_uint8


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
    monkeypatch.setattr(image_files, "HANGUL_FONTS", ("no-such-font.ttf",))
    with caplog.at_level(logging.WARNING):
        sheet = contact_sheet("상의", [_plain("red")], ["#1"], columns=1)
    assert sheet.size == contact_sheet("", [_plain("red")], ["#1"], columns=1).size
    assert len(caplog.records) == 1
    assert "no font with Korean letters" in caplog.text
    caplog.clear()
    contact_sheet("shirt", [_plain("red")], ["#1"], columns=1)
    assert not caplog.records
