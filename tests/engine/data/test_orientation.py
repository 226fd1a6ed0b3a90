"""Labels of photographs that are stored turned, and files that hold more than one picture."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engine.data.check import check
from engine.data.crops import ImageFault, open_image
from engine.data.label_format import Box
from engine.data.orientation import label_frame, orientation_of, stored_size, turn_upright
from engine.data.prepare import prepare
from engine.data.sources import PrepareOptions
from tests.label_trees import TOP, label_tree, polygon

SIZE = (40, 60)  # of the stored photo
MARK = Box(6, 10, 12, 8)  # a red rectangle in its stored pixels


def stored_photo(path: Path, orientation: int, size: tuple[int, int] = SIZE) -> Path:
    """A grey of its own by the file's name, with a red rectangle at MARK of its stored pixels."""
    image = Image.new("RGB", size, (90 + 5 * (ord(path.stem[0]) - ord("0")),) * 3)
    image.paste((255, 0, 0), (6, 10, 18, 18))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=100, subsampling=0, exif=exif)
    return path


def add(source: Path, name: str, orientation: int, box: Box, labelled: tuple[int, int] | None, **more: Any) -> None:
    stored_photo(source / f"{name}.jpg", orientation, more.pop("size", SIZE))
    x, y, width, height = box
    boxes = {"상의": [{"X좌표": x, "Y좌표": y, "가로": width, "세로": height}]}
    corners = ((x, y), (x + width, y), (x + width, y + height), (x, y + height))
    tree = label_tree(name, boxes=boxes, polygons={"상의": [polygon(*corners)]}, 상의=[TOP])
    for field, side in zip(("이미지 너비", "이미지 높이"), labelled or (None, None), strict=True):
        tree["이미지 정보"].pop(field, None)
        if side is not None:
            tree["이미지 정보"][field] = side
    (source / f"{name}.json").write_text(json.dumps(tree, ensure_ascii=False), encoding="utf-8")


def upright_mark(orientation: int) -> Box:
    """Where MARK is seen, found by turning a picture of it."""
    image = Image.new("L", SIZE)
    image.paste(255, (6, 10, 18, 18))
    left, top, right, bottom = turn_upright(image, orientation).getbbox() or (0, 0, 0, 0)
    return Box(left, top, right - left, bottom - top)


def is_red(path: Path) -> bool:
    with Image.open(path) as image:
        pixels = np.asarray(image).astype(int)
    return bool((pixels[..., 0] > 240).all() and (pixels[..., 1:] < 20).all())


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("cut_out", [False, True])
def test_boxes_and_outlines_turn_with_their_photo(tmp_path: Path, orientation: int, cut_out: bool) -> None:
    source = tmp_path / "s"
    upright = stored_size(SIZE, orientation)
    add(source, "1", orientation, MARK, SIZE)  # drawn on the stored pixels
    add(source, "2", orientation, MARK, None)  # no size: the stored ones
    if upright != SIZE:
        add(source, "3", orientation, upright_mark(orientation), upright)  # drawn on what is seen
    more = {"cut_out": True, "ground": "#ff0000"} if cut_out else {}
    options = PrepareOptions(image_size=16, validation_fraction=0.0, **more)  # type: ignore[arg-type]
    report = prepare(source, tmp_path / "out", options)
    assert report.used == (2 if upright == SIZE else 3)
    assert report.cut_outs == (report.used if cut_out else 0)
    images = sorted((tmp_path / "out" / "images").glob("*.png"))
    assert len(images) == report.used
    for path in images:
        if cut_out:  # its outermost pixel is a blend with the ground, red too
            with Image.open(path) as image:
                assert image.getpixel((8, 8)) == pytest.approx((255, 0, 0), abs=8)
        else:
            assert is_red(path), path.name
    counts = check(source).counts
    assert not counts.keys() & {"size_mismatch", "box_outside_image", "outline_off_box", "outline_outside_image"}


@pytest.mark.parametrize("suffix", ["tif", "png", "webp", "avif"])
def test_labels_turn_with_photos_of_every_format(tmp_path: Path, suffix: str) -> None:
    add(tmp_path / "s", "1", 6, MARK, SIZE)
    options: dict[str, Any] = {"quality": 95} if suffix == "avif" else {}
    with Image.open(tmp_path / "s" / "1.jpg") as image:
        image.save(tmp_path / "s" / f"1.{suffix}", exif=image.getexif(), **options)
    (tmp_path / "s" / "1.jpg").unlink()
    prepare(tmp_path / "s", tmp_path / "out", PrepareOptions(image_size=16, validation_fraction=0))
    [path] = (tmp_path / "out" / "images").glob("*.png")
    with Image.open(path) as image:
        assert np.abs(np.asarray(image).astype(int) - (255, 0, 0))[2:-2, 2:-2].max() < 60


def test_a_size_that_fits_neither_is_set_aside_by_name(tmp_path: Path) -> None:
    add(tmp_path / "s", "1", 6, MARK, SIZE)
    add(tmp_path / "s", "2", 6, MARK, (41, 60))
    report = prepare(tmp_path / "s", tmp_path / "out", PrepareOptions(image_size=16, validation_fraction=0, max_bad=1))
    assert (report.used, report.causes) == (1, {"size_mismatch": 1})
    record, reason = report.set_aside["size_mismatch"].first[0]
    assert record.startswith("2.json")
    assert "label says 41 x 60, 2.jpg is stored as 40 x 60, upright 60 x 40" in reason
    found = [finding for finding in check(tmp_path / "s").findings if finding.defect == "size_mismatch"]
    assert [finding.record for finding in found] == ["2.json"]


def test_square_photographs_mean_their_stored_pixels(tmp_path: Path) -> None:
    for orientation in range(1, 9):
        add(tmp_path / "s", str(orientation), orientation, MARK, (60, 60), size=(60, 60))
    prepare(tmp_path / "s", tmp_path / "out", PrepareOptions(image_size=16, validation_fraction=0))
    assert all(is_red(path) for path in (tmp_path / "out" / "images").glob("*.png"))


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_boxes_of_photos_that_were_resized_are_turned_and_scaled(orientation: int) -> None:
    upright = stored_size(SIZE, orientation)
    drawn = [(SIZE, MARK)]
    if upright != SIZE:  # else the stored pixels are meant
        drawn.append((upright, upright_mark(orientation)))
    for size, box in drawn:
        twice = label_frame(upright, orientation, (size[0] * 2, size[1] * 2), is_resized=True)
        assert twice is not None
        scaled = twice.box(Box(*(2 * number for number in box)), is_centred=False)
        assert tuple(scaled) == pytest.approx(tuple(upright_mark(orientation)))
    centre = label_frame(upright, orientation, SIZE)
    assert centre is not None
    x, y, width, height = centre.box(Box(12, 14, 12, 8), is_centred=True)
    assert (x - width / 2, y - height / 2, width, height) == upright_mark(orientation)


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_is_none(tmp_path: Path, value: int) -> None:
    path = stored_photo(tmp_path / "a.jpg", value)
    assert open_image(path).size == SIZE


def test_metadata_that_cannot_be_read_are_no_fault_of_the_picture(tmp_path: Path) -> None:
    path = stored_photo(tmp_path / "a.jpg", 6)
    content = path.read_bytes()
    start = content.index(b"Exif\0\0") + 6
    for damage in (b"XX" * 4, b"MM\0*\0\xff\xff\xff", b"II*\0\x08\0\0\0\xff\xff" + b"\xff" * 4):
        path.write_bytes(content[:start] + damage + content[start + len(damage) :])
        assert open_image(path).size in (SIZE, SIZE[::-1])
    image = Image.new("RGB", SIZE)
    image.save(path, exif=b"Exif\0\0" + b"\xff" * 60_000)
    with Image.open(path) as opened:
        assert orientation_of(opened) == 1
    assert open_image(path).size == SIZE


# ------------------------------------------------------------------------------------------ several pictures in a file


def test_a_file_with_more_pictures_behind_the_first_is_its_first(tmp_path: Path) -> None:
    for name, form in (("phone.jpg", "MPO"), ("scan.tif", "TIFF")):
        first, second = Image.new("RGB", (16, 8), "red"), Image.new("RGB", (8, 8), "blue")
        first.save(tmp_path / name, form, save_all=True, append_images=[second])
    for name in ("phone.jpg", "scan.tif"):
        image = open_image(tmp_path / name)
        assert image.size == (16, 8)
        assert image.getpixel((8, 4))[0] > 240  # type: ignore[index]


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "avif"])
def test_animations_are_named(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "blue")]
    path = tmp_path / f"a.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    with pytest.raises(ImageFault, match="animated") as raised:
        open_image(path)
    assert raised.value.defect == "animated_image"
    frames[0].save(path)
    assert open_image(path).size == (16, 16)
