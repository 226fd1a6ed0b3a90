"""Views of an image: crops of it, in its own colours where colours matter."""

import numpy as np

from engine.data.ssl_views import ssl_view


def _striped(size: int = 32) -> np.ndarray:
    image = np.zeros((size, size, 3), np.uint8)
    image[:, : size // 2] = (200, 30, 40)
    image[:, size // 2 :] = (20, 60, 180)
    return image


def test_equal_generators_make_equal_views_and_others_do_not() -> None:
    image = _striped()
    before = image.copy()
    one, same, other = (ssl_view(image, np.random.default_rng(seed), colour=1.0) for seed in (1, 1, 2))
    assert one.shape == image.shape
    assert one.dtype == np.uint8
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)
    assert np.array_equal(image, before)


def test_colours_stay_at_strength_0_and_change_at_1() -> None:
    """Of an even image crops, mirrors and blurs are the image."""
    even = np.full((32, 32, 3), (200, 30, 40), np.uint8)
    for colour, least, most in ((0.0, 0, 0), (1.0, 60, 120)):
        changed = sum(
            not np.array_equal(ssl_view(even, np.random.default_rng(seed), colour=colour), even) for seed in range(200)
        )
        assert least <= changed <= most, colour  # 0.3 + 0.7 * 0.2 of 200: 88
    greys = sum(
        bool((view := ssl_view(even, np.random.default_rng(seed), colour=1.0)).std(axis=2).max() == 0) and view.size > 0
        for seed in range(200)
    )
    assert 20 <= greys <= 60


def test_views_are_crops_of_a_fifth_at_least_and_often_mirrored() -> None:
    """The share of the left colour tells where a crop lies."""
    left_first = both = 0
    for seed in range(200):
        view = ssl_view(_striped(), np.random.default_rng(seed), colour=0.0)
        is_left = view[16, :, 0] > view[16, :, 2]
        both += bool(is_left.any() and not is_left.all())
        left_first += bool(is_left[0] and not is_left[-1])
    assert both > 60  # a crop of the whole image's fifth is 14 of 32 pixels wide
    assert 0.3 < left_first / both < 0.7
