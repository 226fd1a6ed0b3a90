"""DALL-E's near-central crops against the paper's arithmetic written out pixel by pixel, and what the prototype does otherwise."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine.data.near_central_crop import NearCentralCrop, area_resize, load_photo, without_uncropped
from engine.data.pairs import Pair, Pairs
from engine.data.token_encoding import Encoding, write_shards
from engine.data.token_shards import AugmentedViews, open_shards
from engine.data.tokenizer import train_tokenizer
from engine.errors import InputError

Array = np.ndarray


def noise(height: int, width: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(1, 256, size=(height, width, 3), dtype=np.uint8)  # no zeros


def area_by_hand(image: Array, size: int) -> Array:
    """TensorFlow's kernel: of each output pixel the window, and of each input pixel how much of it lies inside."""
    n = len(image)
    scale = (n - 1) / (size - 1)
    found = np.zeros((size, size, 3))
    for y in range(size):
        for x in range(size):
            for i in range(math.floor(y * scale), math.ceil((y + 1) * scale)):
                for j in range(math.floor(x * scale), math.ceil((x + 1) * scale)):
                    inside = (min(i + 1, (y + 1) * scale) - max(i, y * scale)) * (
                        min(j + 1, (x + 1) * scale) - max(j, x * scale)
                    )
                    found[y, x] += inside * image[min(i, n - 1), min(j, n - 1)]
    return found / scale**2


@pytest.mark.parametrize(("side", "size"), [(23, 8), (16, 9), (9, 8), (8, 8), (40, 9)])
def test_area_resize_is_the_direct_formula(side: int, size: int) -> None:
    image = noise(side, side)
    np.testing.assert_allclose(area_resize(image, size), area_by_hand(image, size), rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", [(30, 21), (20, 33), (24, 24), (17, 16), (16, 16)])
def test_paper_crop_is_the_direct_formula(shape: tuple[int, int]) -> None:
    image, crop = noise(*shape), NearCentralCrop("dalle", 16)
    for seed in range(10):
        generator = np.random.default_rng(seed)
        (h, w), s = shape, min(shape)
        off_h = generator.integers(3 * (h - s) // 8, max(3 * (h - s) // 8 + 1, 5 * (h - s) // 8))
        off_w = generator.integers(3 * (w - s) // 8, max(3 * (w - s) // 8 + 1, 5 * (w - s) // 8))
        t = generator.integers(16, min(s, 18) + 1)
        top, left = generator.integers(0, t - 16 + 1, size=2)
        square = image[off_h : off_h + s, off_w : off_w + s]
        expected = area_by_hand(square, int(t))[top : top + 16, left : left + 16]
        found = crop.random(image, np.random.default_rng(seed))
        assert found.dtype == np.uint8
        assert found.shape == (16, 16, 3)
        assert np.abs(found - expected).max() <= 0.5 + 1e-9  # rounded; halves either way, as sums of floats have it


def test_paper_crop_stays_near_the_centre_and_takes_all_it_may() -> None:
    """Rows are numbered by their brightness: from a crop at full size one reads where it began."""
    image = np.broadcast_to(np.arange(16 + 40, dtype=np.uint8)[:, None, None], (56, 16, 3))
    crop = NearCentralCrop("dalle", 16)
    begins = {int(crop.random(image, np.random.default_rng(seed))[0, 0, 0]) for seed in range(300)}
    assert begins == set(range(15, 25))  # 3/8 to 5/8 of 40, without the end
    sides = {
        (int(found[0, 0, 0]), int(found[0, 0, 1]))
        for found in (NearCentralCrop("dalle", 16).random(_numbered(18), np.random.default_rng(s)) for s in range(200))
    }
    assert {(0, 0), (0, 2), (2, 0), (2, 2)} <= sides  # every corner of 18 x 18


def _numbered(side: int) -> Array:
    rows, columns = np.mgrid[:side, :side].astype(np.uint8)
    return np.stack([rows, columns, rows], axis=-1)


def test_prototype_deviates_in_four_ways() -> None:
    crop, paper = NearCentralCrop("dalle-prototype", 16), NearCentralCrop("dalle", 16)
    small = noise(12, 20)  # 1: stretched
    expected = np.asarray(Image.fromarray(small).resize((16, 16), Image.Resampling.BILINEAR))
    assert np.array_equal(crop.random(small, np.random.default_rng(0)), expected)
    assert (crop.fault(12, 20), crop.fault(16, 90)) == (None, None)
    assert "has to have 16 pixels" in str(paper.fault(12, 20))
    assert "more than twice as long as wide" in str(paper.fault(16, 33))
    assert paper.fault(16, 32) is None

    square = noise(18, 18)  # 2 to 4: bilinear, the centre, and a square that may begin a pixel too far
    seen = set()
    for seed in range(60):
        generator = np.random.default_rng(seed)
        top, left = generator.integers(0, 1, endpoint=True), generator.integers(0, 1, endpoint=True)
        t = int(generator.integers(16, 18, endpoint=True))
        moved = np.pad(square, ((0, 1), (0, 1), (0, 0)))[top : top + 18, left : left + 18]
        resized = np.asarray(Image.fromarray(moved).resize((t, t), Image.Resampling.BILINEAR))
        first = round((t - 16) / 2)
        found = crop.random(square, np.random.default_rng(seed))
        assert np.array_equal(found, resized[first : first + 16, first : first + 16])
        seen.add((int(top), int(left)))
        if top == 1 and t == 18:
            assert not moved[-1].any()  # the border of zeros
        assert paper.random(square, np.random.default_rng(seed)).min() > 0
    assert seen == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_central_crop_is_the_middle_without_chance() -> None:
    image = noise(21, 16)
    assert np.array_equal(NearCentralCrop("dalle", 16).central(image), image[2:18])
    assert np.array_equal(NearCentralCrop("dalle-prototype", 16).central(image), image[2:18])


@pytest.fixture
def photos(tmp_path: Path) -> Pairs:
    """Photographs of several shapes: 0 to 5 fit 16 pixels, 6 is too small, 7 too long."""
    shapes = [(20, 30), (24, 18), (16, 16), (40, 33), (19, 20), (17, 30), (12, 40), (16, 50)]
    pairs = []
    for number, shape in enumerate(shapes):
        path = tmp_path / f"{number}.png"
        Image.fromarray(noise(*shape, seed=number)).save(path)
        split = "validation" if number in (4, 5) else "train"
        pairs.append(Pair(str(number), path, (f"a {number}",), str(number), split))  # type: ignore[arg-type]
    return Pairs(tuple(pairs))


def test_what_cannot_be_cropped_is_left_out_and_reported(photos: Pairs) -> None:
    lines: list[str] = []
    kept = without_uncropped(photos, NearCentralCrop("dalle", 16), note=lines.append)
    assert [pair.key for pair in kept.all] == list("012345")
    assert lines == ["note: data.crop dalle leaves out 2 of 8 images, the first: 6 is 40 x 12, and its shorter side has "
                     "to have 16 pixels"]  # fmt: skip
    assert without_uncropped(photos, NearCentralCrop("dalle-prototype", 16), note=lines.append) is photos
    assert without_uncropped(photos, None, note=lines.append) is photos
    with pytest.raises(InputError, match=r"data.crop: dalle: leaves no image to train on: 0 is 30 x 20"):
        without_uncropped(photos, NearCentralCrop("dalle", 64), note=lines.append)
    assert len(lines) == 1


def test_visits_are_cropped_and_held_out_images_are_not_moved(photos: Pairs) -> None:
    from engine.data.order import BatchOrder
    from engine.training.batches import Images, image_source

    crop = NearCentralCrop("dalle", 16)
    pairs = photos.all[:6]
    order = BatchOrder(6, 3, seed=7)
    cached, read = (
        image_source(Images(pairs, 16, cache=cache, crop=crop), order, flip=False) for cache in (True, False)
    )
    for number in (0, 5):
        batch = cached(number)["images"]
        assert torch.equal(batch, read(number)["images"])
        for row, position in zip(batch, order.positions(number), strict=True):
            photo = load_photo(pairs[order.index(position)])
            assert np.array_equal(row.permute(1, 2, 0), crop.random(photo, order.generator(position)))
    assert not torch.equal(cached(0)["images"], cached(2)["images"])  # the same images in another order, cropped anew
    held_out = Images(pairs, 16, cache=False, crop=crop, held_out=True)
    for index, pair in enumerate(pairs):
        assert np.array_equal(held_out.random(index, np.random.default_rng(1)), crop.central(load_photo(pair)))


def test_shards_hold_the_central_view_and_random_ones(photos: Pairs, tmp_path: Path) -> None:
    crop, views = NearCentralCrop("dalle", 16), AugmentedViews(count=2, crop="dalle")
    pairs = replace(photos, all=photos.all[:6])
    seen: list[Array] = []

    def encode(images: torch.Tensor) -> torch.Tensor:
        seen.append((images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())
        return torch.full((len(images), 4), len(seen), dtype=torch.int64)

    tokenizer = train_tokenizer(["a 1"], vocab_size=20)
    encoding = Encoding(pairs, tokenizer, encode, identity={}, image_size=16, text_seq_len=4, views=views, batch_size=4)
    write_shards(tmp_path / "shards", encoding)
    assert len(seen) == 4  # three views of the four to train on, one of the two held out
    for place, pair in enumerate(pairs.train):
        photo = load_photo(pair)
        assert np.array_equal(seen[0][place], crop.central(photo))
        for view in (0, 1):
            generator = np.random.Generator(np.random.Philox(key=[place, view]))
            assert np.array_equal(seen[1 + view][place], crop.random(photo, generator))
    assert np.array_equal(seen[3][1], crop.central(load_photo(pairs.validation[1])))
    shard = open_shards(tmp_path / "shards", "train", image_vocab_size=9).shard(0)
    assert shard.image_tokens[0, :, 0].tolist() == [1, 2, 3]


def test_shards_without_crops_state_what_older_ones_state() -> None:
    assert AugmentedViews(True, 2, 3).identity == {"flip": True, "count": 2, "shift": 3}
    assert AugmentedViews(crop="dalle").identity["crop"] == "dalle"
