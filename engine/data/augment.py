"""Random versions of a training image: mirrored, shifted."""

import numpy as np


def augment(image: np.ndarray, generator: np.random.Generator, *, flip: bool, shift: int) -> np.ndarray:
    """One version of `image`, (S, S, 3) uint8, as a new array.

    Args:
        flip: mirror left and right with probability 1/2.
        shift: largest shift in pixels, each way; the edges are repeated.
    """
    if flip and generator.random() < 0.5:
        image = image[:, ::-1]
    if shift:
        down, right = generator.integers(0, 2 * shift + 1, size=2)
        padded = np.pad(image, ((shift, shift), (shift, shift), (0, 0)), mode="edge")
        image = padded[down : down + image.shape[0], right : right + image.shape[1]]
    return np.ascontiguousarray(image)
