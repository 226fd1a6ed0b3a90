"""Encoded images: the pixels that the format promises, the metadata back as it was, the same bytes each time."""

import io
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from engine.pipeline.ai_marks import DigitalSource
from engine.pipeline.image_encoding import ImageFormat, encode_image, read_metadata, save_png
from engine.pipeline.provenance import Arithmetic, ModelRecord, digital_source, provenance, read_provenance
from engine.sampling_params import SamplingParams

METADATA = {
    "caption": '상의에서 색상은 레드이다. "인용" & <b>',
    "seed": 2**63 + 1,
    "candidate": 3,
    "sampling_params": {"top_k": None, "temperature": 0.7},
}
LOSSLESS: list[ImageFormat] = ["png", "webp"]


@pytest.fixture
def image() -> Image.Image:
    ramp = np.linspace(0, 255, 48, dtype=np.uint8)
    return Image.fromarray(
        np.stack([*np.broadcast_arrays(ramp[:, None], ramp[None]), np.full((48, 48), 9, np.uint8)], -1)
    )


@pytest.mark.parametrize("image_format", LOSSLESS)
def test_lossless_formats_keep_every_pixel(image: Image.Image, image_format: ImageFormat) -> None:
    data = encode_image(image, image_format, compression=100, metadata=METADATA)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")), np.asarray(image))


@pytest.mark.parametrize(("image_format", "compression"), [("webp", 80), ("jpeg", 95), ("jpeg", 0)])
def test_lossy_formats_are_smaller_and_near(image: Image.Image, image_format: ImageFormat, compression: int) -> None:
    data = encode_image(image, image_format, compression=compression, metadata={})
    error = np.abs(np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), float) - np.asarray(image)).mean()
    assert error < (5 if compression else 60)
    assert len(data) < 48 * 48 * 3


@pytest.mark.parametrize("image_format", ["png", "webp", "jpeg"])
def test_metadata_comes_back_as_it_was_and_the_bytes_are_the_same_each_time(
    image: Image.Image, image_format: ImageFormat
) -> None:
    data = encode_image(image, image_format, compression=90, metadata=METADATA)
    assert read_metadata(data) == METADATA
    assert data == encode_image(image, image_format, compression=90, metadata=METADATA)


@pytest.mark.parametrize("image_format", ["png", "webp", "jpeg"])
@pytest.mark.parametrize("source", ["trainedAlgorithmicMedia", "compositeWithTrainedAlgorithmicMedia"])
def test_every_file_says_that_it_is_ai_made_beside_its_provenance(
    image: Image.Image, image_format: ImageFormat, source: DigitalSource
) -> None:
    data = encode_image(image, image_format, compression=90, metadata=METADATA, source=source)
    assert read_metadata(data) == METADATA
    with Image.open(io.BytesIO(data)) as opened:
        xmp = opened.info["xmp"]
    (found,) = ElementTree.fromstring(xmp).iter("{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description")
    stated = found.get("{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType")
    assert stated == f"http://cv.iptc.org/newscodes/digitalsourcetype/{source}"


def test_an_edit_is_a_composite() -> None:
    assert digital_source({"init_image": None}) == "trainedAlgorithmicMedia"
    assert digital_source({"init_image": {"image_sha256": "0"}}) == "compositeWithTrainedAlgorithmicMedia"


def test_an_image_without_metadata_has_none(image: Image.Image) -> None:
    for name in ("PNG", "JPEG", "WEBP"):
        buffer = io.BytesIO()
        image.save(buffer, format=name)
        assert read_metadata(buffer.getvalue()) is None


def test_a_caption_that_reads_like_json_stays_text(image: Image.Image) -> None:
    for image_format in ("png", "webp"):
        data = encode_image(image, image_format, compression=100, metadata={"caption": "12"})
        assert read_metadata(data) == {"caption": "12"}


def test_other_programs_metadata_is_none_of_ours(image: Image.Image) -> None:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"ASCII\x00\x00\x00shot on a phone"
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", exif=exif)
    assert read_metadata(buffer.getvalue()) is None
    with pytest.raises(OSError, match="cannot identify"):
        read_metadata(b"no image")


def test_png_shows_its_caption_to_viewers_and_is_written_at_once(image: Image.Image, tmp_path: Path) -> None:
    save_png(tmp_path / "a.png", image, METADATA)
    with Image.open(tmp_path / "a.png") as opened:
        assert opened.text["Description"] == METADATA["caption"]  # type: ignore[attr-defined]
    assert read_metadata((tmp_path / "a.png").read_bytes()) == METADATA
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("text", ["[" * 100_000, '{"seed": ' + "1" * 5000 + "}", "{"])
def test_a_comment_of_another_kind_is_none(text: str) -> None:
    info, file = PngInfo(), io.BytesIO()
    info.add_itxt("provenance", text)
    Image.new("RGB", (8, 8)).save(file, "PNG", pnginfo=info)
    assert read_metadata(file.getvalue()) is None


@pytest.mark.parametrize("caption", ["~/shirt", "~no such user"])
def test_a_caption_is_no_path(caption: str) -> None:
    """Paths in configs may start with `~`, and a request's record is read as configs are."""
    arithmetic = Arithmetic(device="cpu", dtype="float32", int8=False, codec_backend="torch")
    model = ModelRecord(model="m", model_digest=None, arithmetic=arithmetic)
    stated = provenance(model, caption, SamplingParams(), 0, rank_by="koclip", init_image=None)
    assert read_provenance(stated, source="it").caption == caption
