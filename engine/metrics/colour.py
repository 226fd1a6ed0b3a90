"""The colour of an image's subject, read from pixels: do generations have the colour that their caption states?

An image's subject is what lies in its middle and differs from its border. Four colours describe it: its largest cluster's, its
mean, its median, and how far its pixels spread. It has the name that most of the training photographs with the nearest such
colours have; no network is trained, and the ranker has no part in it.

Photographs are not paint charts: light, shade and prints move colours, and labels are not exact either (a dark grey one is
named black, and the other way round). So read a share of agreement beside that of real images: 0.82 on a fifth of 2,691
training cut-outs in 18 colours, left out (on these the constants below were chosen), 0.86 on 273 held-out ones. Fixed values
for each name instead of the photographs' own gave 0.71 there; a constant answer, the commonest colour, 0.28.

S pixels, N pixels of the subject, K clusters, P photographs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

_SIDE = 32  # images are averaged down to this: prints blend as they do to the eye, and 64 pixels agree no better
_BORDER = 0.03  # of the side, at each edge
_BORDER_CLUSTERS = 2  # a subject that touches the border is the smaller one
_GROUND_DISTANCE = 12.0  # in Lab; nearer to the border's colour is ground
# Weight of ground. Not 0: a white subject on a white sheet is all ground.
_GROUND_WEIGHT = 0.1
# Of the side: standard deviation of the weight round the centre. Crops to a box fill the middle, seldom the corners.
_CENTRE_SPREAD = 0.25
_CLUSTERS = 4
_ROUNDS = 10
_NEIGHBOURS = 11
# Light falls unevenly on a subject, so lightness counts less than hue.
_LIGHTNESS_WEIGHT = 0.8

_TO_XYZ = np.array(  # IEC 61966-2-1, D65
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
_WHITE = _TO_XYZ.sum(axis=1)

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ColourReader:
    """Colours of photographs whose colour is known.

    Args:
        colours: (P, 12), of `subject_colours`.
        names: the colour that each photograph's label states.
    """

    colours: Floats
    names: Sequence[str]

    def name_of(self, image: npt.NDArray[np.uint8]) -> str:
        """The name of an image's colour: (S, S, 3) sRGB -> the heaviest name of the nearest photographs; of equals the first.

        Raises:
            ValueError: wrong shape or type.
        """
        away = np.sqrt(np.square(self.colours - subject_colours(image)).sum(axis=1))  # (P,)
        nearest = np.argsort(away, kind="stable")[:_NEIGHBOURS]
        weights = dict.fromkeys((self.names[one] for one in nearest), 0.0)
        for one in nearest:
            weights[self.names[one]] += 1 / (1 + away[one])
        return max(weights, key=lambda name: weights[name])


def fit_colour_reader(images: Sequence[npt.NDArray[np.uint8]], names: Sequence[str]) -> ColourReader:
    """A reader of the colours that these images' labels name.

    Args:
        images: (S, S, 3) sRGB each.

    Raises:
        ValueError: no images, not as many names, wrong shape or type.
    """
    if not images or len(images) != len(names):
        raise ValueError(f"colours are read like those of named images: got {len(images)} images, {len(names)} names")
    return ColourReader(np.stack([subject_colours(image) for image in images]), tuple(names))


def subject_colours(image: npt.NDArray[np.uint8]) -> Floats:
    """An image's subject in CIE L*a*b* (D65): (S, S, 3) sRGB -> (12,), largest cluster, mean, median, standard deviation.

    Lightness is scaled by `_LIGHTNESS_WEIGHT`.

    Raises:
        ValueError: wrong shape or type.
    """
    if image.ndim != 3 or image.shape[0] != image.shape[1] or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"an image must be (S, S, 3) uint8, got {image.shape} {image.dtype}")
    if len(image) > _SIDE:
        image = np.asarray(Image.fromarray(image).resize((_SIDE, _SIDE), Image.Resampling.BOX))
    S = len(image)
    pixels = srgb_to_lab(image)  # (S, S, 3)
    away = np.sqrt(np.square(pixels - _border_colour(pixels)).sum(axis=-1))  # (S, S)
    offset = (np.arange(S) + 0.5) / S - 0.5
    weights = np.exp(-(np.square(offset)[:, None] + np.square(offset)) / (2 * _CENTRE_SPREAD**2))  # (S, S)
    weights = (weights * np.where(away > _GROUND_DISTANCE, 1.0, _GROUND_WEIGHT)).ravel()
    points = pixels.reshape(-1, 3)
    mean = np.average(points, axis=0, weights=weights)
    spread = np.sqrt(np.average(np.square(points - mean), axis=0, weights=weights))
    colours = [_largest_cluster(points, weights, _CLUSTERS), mean, _median(points, weights), spread]
    return (np.stack(colours) * (_LIGHTNESS_WEIGHT, 1, 1)).ravel()


def srgb_to_lab(colours: npt.NDArray[np.uint8]) -> Floats:
    """(…, 3) sRGB, 0 to 255 -> (…, 3) L*a*b* (D65)."""
    share = colours.astype(np.float64) / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    relative = linear @ _TO_XYZ.T / _WHITE
    bent = np.where(relative > 216 / 24389, np.cbrt(relative), (24389 / 27 * relative + 16) / 116)
    x, y, z = bent[..., 0], bent[..., 1], bent[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def _border_colour(pixels: Floats) -> Floats:
    """The border's commonest colour, (3,), of an image (S, S, 3) in Lab."""
    S = len(pixels)
    width = max(1, round(_BORDER * S))
    is_border = np.ones((S, S), bool)
    is_border[width : S - width, width : S - width] = False
    border = pixels[is_border]
    return _largest_cluster(border, np.ones(len(border)), _BORDER_CLUSTERS)


def _median(points: Floats, weights: Floats) -> Floats:
    """Weighted median of each coordinate: (N, 3) and (N,) -> (3,)."""
    order = np.argsort(points, axis=0, kind="stable")  # (N, 3)
    mass = np.cumsum(weights[order], axis=0)
    middle = (mass >= mass[-1] / 2).argmax(axis=0)  # (3,)
    return np.take_along_axis(points, np.take_along_axis(order, middle[None], axis=0), axis=0)[0]


def _largest_cluster(points: Floats, weights: Floats, clusters: int) -> Floats:
    """Centre of the heaviest cluster: (N, 3) and (N,) -> (3,), by k-means from starts that depend on the points alone."""
    mean = np.average(points, axis=0, weights=weights)
    centres = points[np.square(points - mean).sum(axis=1).argmin()][None]  # (1, 3)
    for _ in range(clusters - 1):  # then the point farthest from all centres so far
        nearest = np.square(points[:, None] - centres).sum(axis=-1).min(axis=1)
        centres = np.concatenate([centres, points[nearest.argmax()][None]])  # (K, 3)
    for _ in range(_ROUNDS):
        chosen = np.square(points[:, None] - centres).sum(axis=-1).argmin(axis=1)  # (N,)
        mass = np.bincount(chosen, weights, minlength=clusters)  # (K,)
        sums = np.stack([np.bincount(chosen, weights * part, minlength=clusters) for part in points.T], axis=1)
        # an empty cluster (fewer colours than clusters) keeps its centre
        centres = np.where(mass[:, None] > 0, sums / np.maximum(mass, 1e-12)[:, None], centres)
    return centres[mass.argmax()]
