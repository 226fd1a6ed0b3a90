"""Cut-outs from generated images: the plain ground around the object becomes transparent, with a soft edge.

For models that learned from cut-outs (engine/data/cut_out.py), whose folder names the ground's colour. A codec renders the
ground a few grey levels off, and an edge pixel as a mixture of object and ground. So:

    ground    pixels near the ground's colour that are joined to the image's border through such pixels; nearness is that of
              the image's own ground, measured on its border. What is enclosed by the object stays, however pale it is
    specks    what is nowhere more than a few pixels wide and hangs on nothing that is: the codec's, mostly in corners
    edge      a pixel beside the ground shows a share a of the object: c = a f + (1 - a) g, with g the ground and f the colour
              of the object further in. a becomes the alpha and f the colour, so that no rim of the old ground is left
    pale      where f is nearly g, as with white cloth, a cannot be read from colours: it is the object's share of the pixels
              around

Without torch. S pixels.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engine.data.ground import ground_rgb

Mask = NDArray[np.bool_]
Floats = NDArray[np.float32]

# Grey levels, the largest of the three channels' differences.
_NEAR = 7.0  # of ground: the shipped codec's stays within 4
_FAR = 40.0  # of another ground than the model's: a border that differs by more is none
_LEAST_BORDER = 0.5  # of the border's pixels that have to be ground
_DISTINCT = 24.0  # of an object's colour from the ground, for its share to be read from a mixture
_REACH = 2  # pixels from the ground, into the object, within which a pixel may be a mixture
_LEAST_UNMIXED = 0.25  # share of the object; what is left of its colour in less is noise
_LEAST_SHARE = np.array([0.0, 0.0, 0.5, 1.0], np.float32)  # that is believed, by a pixel's depth in the object


def has_ground(pixels: NDArray[np.uint8], ground: str, *, where: Mask) -> bool:
    """Whether most of an image's border is of the ground's colour, so that it can be removed.

    Args:
        pixels: (S, S, 3).
        ground: `#rrggbb`.
        where: (S, S), the part of the image that counts; no border in it counts as ground.
    """
    border = _border(pixels.astype(np.float32))[_border(where)]
    near = _difference(border, np.array(ground_rgb(ground), np.float32)) <= _FAR
    return bool(len(near) == 0 or near.mean() >= _LEAST_BORDER)


def remove_ground(image: Image.Image, ground: str) -> Image.Image:
    """RGBA of an RGB image (S, S): transparent where the ground was.

    Args:
        ground: `#rrggbb`, as the model folder names it.
    """
    pixels = np.asarray(image.convert("RGB"), np.float32)  # (S, S, 3)
    own = _own_ground(pixels, np.array(ground_rgb(ground), np.float32))
    near = _difference(pixels, own) <= _NEAR
    wide = _all_around(near)  # gaps of one or two pixels, such as a fold of white cloth, let no ground in
    is_ground = near & ~_all_around(~_joined(_outermost(wide), wide))
    object_pixels = _joined(_depth(is_ground) > _REACH, ~is_ground)
    alpha, colours = _edge(pixels, ~object_pixels, own)
    layers = np.dstack([np.where(alpha[..., None] > 0, colours, 0.0), 255 * alpha])
    return Image.fromarray(layers.round().clip(0, 255).astype(np.uint8), "RGBA")


def _border(pixels: NDArray[Any]) -> NDArray[Any]:
    """(4 S - 4, …): the outermost pixels."""
    return np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])


def _difference(pixels: Floats, colour: Floats) -> Floats:
    difference: Floats = np.abs(pixels - colour).max(axis=-1)
    return difference


def _own_ground(pixels: Floats, ground: Floats) -> Floats:
    """(3,): the ground's colour in this image, the median of the border's pixels that are near the model's."""
    border = _border(pixels)
    near = border[_difference(border, ground) <= _FAR]
    return ground if len(near) == 0 else np.median(near, axis=0).astype(np.float32)


def _outermost(mask: Mask) -> Mask:
    """Those of a mask's pixels that are on the image's border."""
    outermost = mask.copy()
    outermost[1:-1, 1:-1] = False
    return outermost


def _joined(reached: Mask, allowed: Mask) -> Mask:
    """Which allowed pixels are joined to reached ones through allowed pixels, side by side."""
    count = -1
    while (now := int(reached.sum())) != count:
        count = now
        reached = _along_rows(_along_rows(reached, allowed).T, allowed.T).T
    return reached


def _along_rows(reached: Mask, allowed: Mask) -> Mask:
    """Each run of allowed pixels in a row is reached when one of its pixels is."""
    runs = np.cumsum(~allowed, axis=1) + np.arange(len(allowed))[:, None] * (allowed.shape[1] + 1)
    hit = np.zeros(int(runs.max()) + 1, bool)
    hit[runs[reached]] = True
    return allowed & hit[runs]


def _edge(pixels: Floats, is_ground: Mask, ground: Floats) -> tuple[Floats, Floats]:
    """Each pixel's alpha (S, S) in 0 to 1, and its colour without the ground's share (S, S, 3)."""
    depth = _depth(is_ground)
    colours = _inner_colours(pixels, depth, ground)
    apart = colours - ground
    distance = np.abs(apart).max(axis=-1)
    share = ((pixels - ground) * apart).sum(axis=-1) / np.maximum((apart**2).sum(axis=-1), 1.0)
    share = np.maximum(share.clip(0, 1), _LEAST_SHARE[depth])
    certainty = (distance / _DISTINCT).clip(0, 1)
    covered = _sum_around((~is_ground)[..., None].astype(np.float32))[..., 0] / 9  # (S, S), of the pixels around
    alpha = np.where(depth <= _REACH, certainty * share + (1 - certainty) * covered, 1.0)
    alpha[is_ground] = 0
    # The pixel itself without the ground's share, the more of it is left; f alone would break a dark seam into dashes.
    own = ground + (pixels - ground) / np.maximum(alpha, _LEAST_UNMIXED)[..., None]
    unmixed = colours + alpha[..., None] * (own - colours)
    return alpha.astype(np.float32), unmixed.astype(np.float32)


def _depth(is_ground: Mask) -> NDArray[np.int64]:
    """(S, S): how many pixels a pixel is inside the object, 0 for ground, at most `_REACH` + 1."""
    depth = np.zeros(is_ground.shape, np.int64)
    inside = ~is_ground
    for _ in range(_REACH + 1):
        depth += inside
        inside = _all_around(inside)
    return depth


def _inner_colours(pixels: Floats, depth: NDArray[np.int64], ground: Floats) -> Floats:
    """(S, S, 3): of pixels that may be mixtures, the mean colour of the nearest ones that are not.

    Where none is near, as in a strap, the colour of the pixel around that is least like the ground.
    """
    known = depth > _REACH
    colours = np.where(known[..., None], pixels, 0.0)
    for _ in range(_REACH):
        sums = _sum_around(np.dstack([colours, known]))  # (S, S, 4)
        reached = ~known & (depth > 0) & (sums[..., 3] > 0)
        colours[reached] = sums[reached, :3] / sums[reached, 3:]
        known |= reached
    thin = ~known & (depth > 0)  # m of them
    around = np.stack([moved[thin] for moved in _shifted(pixels, _REACH)])  # (window, m, 3)
    least_like = _difference(around, ground).argmax(axis=0) if thin.any() else np.zeros(0, np.int64)  # (m,)
    colours[thin] = around[least_like, np.arange(len(least_like))]
    return colours.astype(np.float32)


def _sum_around(values: Floats) -> Floats:
    """(S, S, k): of a pixel and its eight neighbours."""
    summed: Floats = np.sum(list(_shifted(values, 1)), axis=0)
    return summed


def _shifted(values: Floats, reach: int) -> Iterator[Floats]:
    """(S, S, k) moved by up to `reach` pixels in each direction, its edge repeated."""
    padded, side = np.pad(values, ((reach, reach), (reach, reach), (0, 0)), mode="edge"), len(values)
    for y in range(2 * reach + 1):
        for x in range(2 * reach + 1):
            yield padded[y : y + side, x : x + side]


def _all_around(mask: Mask) -> Mask:
    """Where a pixel and its eight neighbours are all set; beyond the image counts as set."""
    padded = np.pad(mask, 1, constant_values=True)
    rows = padded[:-2] & padded[1:-1] & padded[2:]
    around: Mask = rows[:, :-2] & rows[:, 1:-1] & rows[:, 2:]
    return around
