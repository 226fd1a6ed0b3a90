"""The figures of benchmarks/attribute_lock.py on pictures whose figures are known."""

import importlib
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from tests.paths import REPOSITORY


class _MeanColour:
    """Features that anyone can compute: the mean colour, in the place of a network's."""

    def encode(self, batches: Iterable[Tensor]) -> Tensor:
        return torch.cat([images.mean((2, 3)) for images in batches])


def _square(colour: tuple[int, int, int], left: int) -> NDArray[np.uint8]:
    """(32, 32, 3): a square of 16 x 16 on light grey."""
    image = np.full((32, 32, 3), 238, np.uint8)
    image[8:24, left : left + 16] = colour
    return image


@pytest.mark.parametrize(("left", "silhouette"), [(8, 1.0), (12, 12 / 20), (0, 8 / 24)])
def test_outline_colour_and_distance(monkeypatch: pytest.MonkeyPatch, left: int, silhouette: float) -> None:
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    script = importlib.import_module("attribute_lock")
    before, after = _square((185, 40, 50), 8), _square((45, 50, 80), left)
    found = script._figures(_MeanColour(), before, after, "레드", "네이비")
    assert found["silhouette"] == pytest.approx(silhouette)
    assert found["new_colour"] is True
    assert script._figures(_MeanColour(), before, before, "레드", "네이비")["new_colour"] is False
    means = [torch.from_numpy(image).float().mean((0, 1)) / 255 for image in (before, after)]
    assert found["lite0"] == pytest.approx(float((means[0] - means[1]).norm()), abs=1e-5)
