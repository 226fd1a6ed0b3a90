"""Renditions: cut out, enlarged and marked as provenance says, and nothing else done to an image."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from engine.errors import InputError
from engine.pipeline.ai_marks import checked_mark, with_visible_mark
from engine.pipeline.rendition import Rendition, render

GROUND = "#eeeeec"


@pytest.fixture
def image() -> Image.Image:
    """A red disc on the ground."""
    image = Image.new("RGB", (64, 64), GROUND)
    ImageDraw.Draw(image).ellipse((16, 16, 48, 48), fill=(200, 30, 40))
    return image


def test_an_image_as_it_was_generated_is_untouched_and_nothing_is_stated(image: Image.Image) -> None:
    for rendition in (Rendition(), Rendition(size=64)):
        assert render(image, rendition, ground=None) is image
        assert rendition.record(64) is None


@pytest.mark.parametrize(
    "rendition", [Rendition(200), Rendition(96, True), Rendition(None, True, "AI"), Rendition(64, visible_mark="AI")]
)
def test_what_is_stated_makes_the_same_file_again(image: Image.Image, rendition: Rendition) -> None:
    record = rendition.record(64)
    assert record is not None
    once, again = (render(image, one, ground=GROUND) for one in (rendition, Rendition.recorded(record)))
    assert (once.mode, once.size) == ("RGBA" if rendition.is_transparent else "RGB", (record.size, record.size))
    assert once.tobytes() == again.tobytes()
    assert record.enlarged_from == (64 if record.size > 64 else None)


def test_enlarging_is_lanczos_and_colours_under_clear_pixels_leave_no_halo(image: Image.Image) -> None:
    enlarged = render(image, Rendition(256), ground=None)
    assert enlarged.tobytes() == image.resize((256, 256), Image.Resampling.LANCZOS).tobytes()
    layer = np.asarray(render(image, Rendition(256, True), ground=GROUND), float)
    edge = (layer[..., 3] > 40) & (layer[..., 3] < 250)
    assert edge.any()
    assert np.abs(layer[edge][:, :3] - (200, 30, 40)).mean() < 6, "of 255: the ground is 160 away"


def test_smaller_or_transparent_without_a_ground_is_refused(image: Image.Image) -> None:
    with pytest.raises(InputError, match="must be 64, the model's, or larger"):
        render(image, Rendition(63), ground=GROUND)
    with pytest.raises(InputError, match="names a `ground`"):
        render(image, Rendition(None, True), ground=None)


@pytest.mark.parametrize("text", ["AI", "AI 생성", "Made by KoDALLE, not a photo"[:24]])
@pytest.mark.parametrize("side", [32, 128, 512])
def test_a_visible_mark_is_in_the_lower_right_corner_and_nowhere_else(side: int, text: str) -> None:
    ground = Image.new("RGB", (side, side), (250, 250, 250))
    changed = (np.asarray(with_visible_mark(ground, text)) != 250).any(axis=2)
    rows, columns = np.nonzero(changed)
    assert rows.size > 20, "it is there"
    assert rows.min() > side / 3
    assert rows.max() >= side * 0.8
    assert columns.max() >= side * 0.8
    clear = np.asarray(with_visible_mark(Image.new("RGBA", (side, side)), text).getchannel("A"))
    assert (clear.min(), clear.max() > 200) == (0, True)


def test_marks_are_short_visible_texts() -> None:
    assert checked_mark("  AI\u200b 생성 ") == "AI 생성"
    assert checked_mark("") == ""
    for text in ("A" * 25, "A\x07"):
        with pytest.raises(ValueError, match="character"):
            checked_mark(text)
