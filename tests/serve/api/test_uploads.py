import io
import pickle
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from engine.pipeline.init_image import InitImage
from serve.api import uploads
from serve.api.errors import Failure
from serve.api.schemas import EditRequest
from serve.api.uploads import open_upload, read_init_image
from tests.live_server import INFO
from tests.paths import REPOSITORY

MAX_PIXELS = 1_000_000


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, form, **options)
    file.seek(0)
    return file


def photo(size: tuple[int, int] = (64, 64)) -> Image.Image:
    generator = np.random.default_rng(3)
    return Image.fromarray(generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


class Arrays(NamedTuple):
    """An init image as the model takes it."""

    pixels: bytes
    regenerated_pixels: bytes
    regenerated_tokens: bytes
    paste: bool


def read(image: io.BytesIO, mask: io.BytesIO | None = None, **fields: Any) -> Arrays:
    request = EditRequest.model_validate({"prompt": "a"} | fields)
    read = read_init_image(image, mask, request, INFO, MAX_PIXELS)
    assert read.image.size == (32, 32), "brought to the model's size before it is sent to a worker"
    return expected(pickle.loads(pickle.dumps(read)))


def expected(init_image: InitImage) -> Arrays:
    return Arrays(
        init_image.pixels(32).tobytes(),
        init_image.regenerated_pixels(32, 8).tobytes(),
        init_image.regenerated_tokens(32, 8).tobytes(),
        init_image.pastes,
    )


def holed(image: Image.Image, *, transparent: int = 0) -> Image.Image:
    """`image` with a transparent square."""
    image = image.convert("RGBA")
    alpha = np.full((image.height, image.width), 255, np.uint8)
    alpha[20:30, 20:30] = transparent
    image.putalpha(Image.fromarray(alpha))
    return image


def white_square() -> Image.Image:
    mask = np.zeros((64, 64), np.uint8)
    mask[20:30, 20:30] = 255
    return Image.fromarray(mask)


def test_a_black_and_white_mask_is_that_of_the_pipeline() -> None:
    image = photo()
    assert read(encoded(image), encoded(white_square())) == expected(InitImage(image, mask_image=white_square()))


def test_openais_mask_marks_transparent_pixels() -> None:
    image = photo()
    as_ours = read(encoded(image), encoded(white_square()))
    for ground in (photo(), Image.new("RGB", (64, 64)), Image.new("RGB", (64, 64), "white")):
        assert read(encoded(image), encoded(holed(ground))) == as_ours  # in any colours
    palette = holed(Image.new("RGB", (64, 64), "red")).quantize(8)
    assert read(encoded(image), encoded(palette)) == as_ours
    opaque = white_square().convert("RGBA")
    assert read(encoded(image), encoded(opaque)) == as_ours  # an opaque alpha channel


def test_an_image_with_transparent_pixels_is_its_own_mask() -> None:
    own = read(encoded(holed(photo())))
    assert own.regenerated_tokens == read(encoded(photo()), encoded(white_square())).regenerated_tokens
    rows = read(encoded(holed(photo())), keep_rows=2)
    assert np.frombuffer(rows.regenerated_tokens, np.uint8).tolist() == [0] * 16 + [1] * 48


def test_without_a_mask_rows_are_kept() -> None:
    assert read(encoded(photo()), keep_rows=3) == expected(InitImage(photo(), keep_rows=3))
    assert read(encoded(photo()), paste=False) == expected(InitImage(photo(), paste=False))


def test_what_the_model_chooses_is_read_without_a_mask() -> None:
    edit = EditRequest(prompt="a", strength=0.25, changed_from="초록")
    for image in (photo(), holed(photo())):  # transparency then is ground, and no mask
        found = pickle.loads(pickle.dumps(read_init_image(encoded(image), None, edit, INFO, MAX_PIXELS)))
        assert (found.strength, found.changed_from, found.mask_image, found.pastes) == (0.25, "초록", None, False)
        assert np.array_equal(found.pixels(32), InitImage(image).pixels(32))


@pytest.mark.parametrize("form", ["PNG", "WEBP", "JPEG"])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "1"])
def test_images_of_all_formats_and_modes_are_read(form: str, mode: str) -> None:
    image = photo((50, 40)).convert(mode)
    if form == "JPEG" and mode in ("RGBA", "P"):
        image = image.convert("RGB")
    if form == "PNG" and mode == "CMYK":
        image = image.convert("RGB")
    file = encoded(image, form)
    assert read(file).pixels == expected(InitImage(Image.open(io.BytesIO(file.getvalue())))).pixels


def test_a_photo_with_exif_orientation_is_rotated_with_its_mask() -> None:
    upright = holed(photo((64, 48)))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 270 degrees to see it upright
    turned = encoded(upright.transpose(Image.Transpose.ROTATE_90), exif=exif)
    assert read(turned) == read(encoded(upright))


def speckled() -> Image.Image:
    """A mask that touches each of the 8 x 8 cells."""
    mask = np.zeros((64, 64), np.uint8)
    mask[::8, ::8] = 255
    return Image.fromarray(mask)


def test_a_hole_with_a_kept_part_after_it_can_be_ranked_by_log_likelihood() -> None:
    assert read(encoded(photo()), encoded(white_square()), rank_by="log_likelihood") == read(
        encoded(photo()), encoded(white_square())
    )


@pytest.mark.parametrize(
    ("image", "mask", "fields", "code", "param"),
    [
        (encoded(photo()), encoded(photo((32, 32)).convert("L")), {}, "invalid_image", "mask"),
        (encoded(photo()), encoded(Image.new("L", (64, 64))), {}, "invalid_value", "mask"),
        (encoded(photo()), encoded(Image.new("L", (64, 64), 255)), {}, "invalid_value", "mask"),
        (encoded(photo()), encoded(Image.new("RGBA", (64, 64))), {}, "invalid_value", "mask"),
        (encoded(photo()), encoded(holed(photo(), transparent=9)), {}, "invalid_image", "mask"),
        (encoded(Image.new("RGBA", (64, 64))), None, {}, "invalid_value", "image"),
        (encoded(photo()), None, {"rank_by": "log_likelihood"}, "invalid_value", "rank_by"),
        (encoded(photo()), encoded(speckled()), {}, "invalid_value", "mask"),
        (encoded(photo()), encoded(white_square()), {"keep_rows": 2}, "invalid_value", "keep_rows"),
        (encoded(photo()), encoded(white_square()), {"strength": 0.5}, "invalid_value", "strength"),
        (encoded(photo()), encoded(white_square()), {"changed_from": "빨강"}, "invalid_value", "changed_from"),
        (encoded(photo()), None, {"keep_rows": 8}, "invalid_value", "keep_rows"),
        (encoded(photo()), None, {"keep_rows": 0}, "invalid_value", "keep_rows"),
        (io.BytesIO(b""), None, {}, "invalid_image", "image"),
        (io.BytesIO(b"not an image"), None, {}, "invalid_image", "image"),
        (encoded(photo(), "GIF"), None, {}, "invalid_image", "image"),
        (encoded(photo(), "BMP"), None, {}, "invalid_image", "image"),
        (encoded(photo()), io.BytesIO(b"no"), {}, "invalid_image", "mask"),
        (encoded(photo((1001, 1000))), None, {}, "image_too_large", "image"),
        (encoded(photo(), "PNG", save_all=True, append_images=[photo()]), None, {}, "invalid_image", "image"),
        (encoded(photo(), "WEBP", save_all=True, append_images=[white_square()]), None, {}, "invalid_image", "image"),
    ],
    ids=range(21),
)  # fmt: skip
def test_unusable_uploads_are_rejected_by_name(
    image: io.BytesIO, mask: io.BytesIO | None, fields: dict[str, Any], code: str, param: str
) -> None:
    with pytest.raises(Failure) as raised:
        read(image, mask, **fields)
    assert (raised.value.code, raised.value.param, raised.value.status) == (code, param, 400)
    korean = raised.value.message_ko.removeprefix(raised.value.kind.text_ko)
    assert re.search("[가-힣]", korean)


@pytest.mark.parametrize("form", ["PNG", "WEBP", "JPEG"])
def test_a_truncated_image_is_rejected_at_every_length(form: str) -> None:
    whole = encoded(photo(), form).getvalue()
    for length in range(0, int(len(whole) * 0.95), max(1, len(whole) // 60)):
        with pytest.raises(Failure) as raised:
            open_upload(io.BytesIO(whole[:length]), "image", max_pixels=MAX_PIXELS)
        assert raised.value.code == "invalid_image", length


@pytest.mark.parametrize("form", ["PNG", "WEBP", "JPEG"])
def test_damaged_images_are_read_or_rejected_without_other_errors(form: str) -> None:
    generator = np.random.default_rng(11)
    whole = np.frombuffer(encoded(photo((40, 40)), form).getvalue(), np.uint8)
    statuses = set()
    for _ in range(150):
        damaged = whole.copy()
        where = generator.integers(0, len(damaged), generator.integers(1, 6))
        damaged[where] = generator.integers(0, 256, len(where))
        try:
            open_upload(io.BytesIO(damaged.tobytes()), "image", max_pixels=MAX_PIXELS)
            statuses.add(200)
        except Failure as failure:
            statuses.add(failure.status)
    assert statuses <= {200, 400}


def bomb(side: int) -> bytes:
    """A PNG of `side` x `side` black pixels, one bit each: 21 KB for 13,300."""
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(b"\0" * (side * (1 + (side + 7) // 8)), 9)
    chunks = [(b"IHDR", head), (b"IDAT", rows), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


def test_a_decompression_bomb_is_rejected_by_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    def decoded(_: Any) -> None:
        raise AssertionError("its pixels were decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decoded)
    for side in (4001, 13_300, 30_000):
        with pytest.raises(Failure) as raised:
            open_upload(io.BytesIO(bomb(side)), "image", max_pixels=16_000_000)
        assert raised.value.code == "image_too_large"


_GROWTH = """
import io, sys
from serve.api.errors import Failure
from serve.api.uploads import open_upload
def peak_mb():  # not getrusage: its peak is the parent's until this process passes it
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024
data = sys.stdin.buffer.read()
before = peak_mb()
try:
    open_upload(io.BytesIO(data), "image", max_pixels=int(sys.argv[1])).convert("RGB")
except Failure as failure:
    print(failure.code, end=" ")
print(peak_mb() - before)
"""


def _growth_mb(data: bytes, max_pixels: int) -> tuple[str, float]:
    """Opens an image in a process of its own: the code of its rejection, the growth of its peak memory."""
    root = REPOSITORY
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _GROWTH, str(max_pixels)], input=data, capture_output=True, check=True, cwd=root
    )  # fmt: skip
    *code, growth = answer.stdout.decode().split()
    return " ".join(code), float(growth)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_a_decompression_bomb_takes_no_memory_and_without_the_limit_it_does() -> None:
    data = bomb(13_300)
    assert len(data) < 25_000
    code, growth_mb = _growth_mb(data, 16_000_000)
    assert code == "image_too_large"
    assert growth_mb < 50
    code, growth_mb = _growth_mb(data, 10**9)
    assert code == ""
    assert growth_mb > 300


def test_missing_unknown_and_duplicate_parts_are_named() -> None:
    one = encoded(photo())
    for files, code, param in (
        ({}, "missing_required_parameter", "image"),
        ({"mask": one}, "missing_required_parameter", "image"),
        ({"image": one, "photo": one}, "unknown_parameter", "photo"),
        ({"image": one, "markup": one}, "unsupported_parameter", "markup"),
        ({"image": one, "image[]": one}, "invalid_image", "image"),
    ):
        with pytest.raises(Failure) as raised:
            uploads._parts(files)
        assert (raised.value.code, raised.value.param) == (code, param)


def test_an_empty_file_part_counts_as_absent() -> None:
    image, mask = encoded(photo()), encoded(white_square())
    assert uploads._parts({"image": image, "mask": io.BytesIO()}) == (image, None)
    assert uploads._parts({"image": image, "image[]": io.BytesIO(), "markup": io.BytesIO()}) == (image, None)
    assert uploads._parts({"image[]": image, "mask": mask}) == (image, mask)
    assert (image.tell(), mask.tell()) == (0, 0)
    for name, code in (("image", "missing_required_parameter"), ("photo", "unknown_parameter")):
        with pytest.raises(Failure) as raised:
            uploads._parts({name: io.BytesIO()})
        assert (raised.value.code, raised.value.param) == (code, name)


@pytest.mark.parametrize("name", ["image", "image[]", "mask"])
def test_a_picture_that_is_sent_as_text_is_named_as_such(name: str) -> None:
    """It was an unknown parameter, to be removed."""
    with pytest.raises(Failure, match="as a file") as raised:
        uploads.check_no_file_is_text({"prompt": "a", name: "data:"})
    assert (raised.value.code, raised.value.param) == ("invalid_type", name)
    uploads.check_no_file_is_text({"prompt": "a"})
