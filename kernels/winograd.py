"""3x3 convolutions of one image by Winograd's algorithm, for CPUs: 4x4 pixels a tile, a quarter of the products.

By torch's operators, where kernels.convolution was not compiled or has no such width; its weights are transformed here, too.

    out tile = A^T [ (G w G^T) * (B^T in tile B) ] A        summed over the channels in

A 6x6 tile goes in, a 4x4 tile comes out, 36 products for 144. The products of one frequency are a matrix product over
tiles and channels, so all of it is three GEMMs: the transforms are ones with their Kronecker squares (36 x 36 and
16 x 36), which in a cache beats the two dozen additions that they stand for. A few rows of tiles are
computed at a time, so that nothing leaves the cache between the three.

After a nearest-neighbour doubling the tile of the large image is E (small tile) E^T, E repeating each pixel: with the
points 0, 1, -1, p, -p the row of B^T E that belongs to -1 is zero, since its polynomial x (x - 1) (x^2 - p^2) has
coefficients that cancel in pairs. So 25 products for 144, and the large image is never computed.

One core of a busy machine, 128 channels, 256 x 256 pixels, GroupNorm and SiLU with it, ms: torch 495, this 200 (the
convolution alone 196 by oneDNN); 256 channels, 128 x 128: 301 and 137; 512 channels, 16 x 16: 19 and 12. Errors are 2.5 times those of a
direct convolution (8e-7 for outputs around 1), after a doubling 8 times (root mean square 1.3e-6).

H x W pixels, C channels in, K out, R rows of tiles, T tiles, F frequencies (36; 25 after doubling).
Sources: Lavin, Gray 2015, arXiv:1509.09308; points after Barabasz et al. 2018, arXiv:1803.10986.
"""

from collections.abc import Callable

import torch
from torch import Tensor

_CPU = torch.device("cpu")
TILE = 4  # pixels a tile has on a side, out
_EDGE = TILE + 2  # in, with the neighbours that a 3x3 kernel reads
# Four finite points beside 0, and infinity. The first four have a 2.5 times smaller error than the usual 1, -1, 2, -2
# (8e-7 and 2.1e-6). After a doubling they must be 1, -1, p, -p; of p from 0.4 to 2.5 this has the least largest error.
_POINTS = (0.5**0.5, -(0.5**0.5), 2**0.5, -(2**0.5))
_POINTS_DOUBLED = (1.0, -1.0, 1.5, -1.5)

Scratch = Callable[..., Tensor]
"""`scratch(name, *shape)`: a float32 buffer, contents undefined, that no other call writes while this one lasts."""


class WinogradConv:
    """A 3x3 convolution, stride 1, zero padding 1; with `doubled`, of the image enlarged twofold first.

    Args:
        weight: (K, C, 3, 3). Kept transformed, in float32: four times its size (with `doubled` 2.8 times).
        bias: (K,).
    """

    def __init__(self, weight: Tensor, bias: Tensor, *, doubled: bool = False) -> None:
        out_transform, weight_transform, in_transform = _image_transforms(doubled=doubled)
        self.channels_in, self.channels_out = weight.shape[1], weight.shape[0]
        self.scale = 2 if doubled else 1
        self._weight = _spectra(weight, weight_transform)
        self._bias = bias.detach().float().clone()
        self._in_transform = torch.kron(in_transform, in_transform).float()  # (F, in pixels of a tile)
        # The bias rides on the transform out, as one frequency more that every pixel has once.
        out = torch.kron(out_transform, out_transform)
        self._out_transform = torch.cat(
            [out, torch.ones(len(out), 1, dtype=out.dtype, device=_CPU)], dim=1
        ).float()  # (16, F + 1)

    @staticmethod
    def fits(height: int, width: int, *, doubled: bool = False) -> bool:
        """Whether an image (before doubling) is whole tiles."""
        side = TILE // 2 if doubled else TILE
        return height % side == 0 and width % side == 0

    def __call__(self, padded: Tensor, out: Tensor, *, add: bool, scratch: Scratch) -> None:
        """Convolves rows of one image.

        Args:
            padded: (H + 2, W + 2, C) float32, contiguous: H rows, a neighbour row above and below, a column left and
                right; zeros where the image ends. H and W must make whole tiles, see `fits`.
            out: (scale * H, scale * W, K) float32, contiguous; written.
            add: onto what `out` holds.
        """
        rows, columns = out.shape[0] // TILE, out.shape[1] // TILE
        step, edge = TILE // self.scale, _EDGE // 2 + 1 if self.scale == 2 else _EDGE
        C, K, F, T = self.channels_in, self.channels_out, len(self._weight), rows * columns
        down, right, _ = padded.stride()
        tiles = scratch("tiles", edge, edge, rows, columns, C)
        tiles.copy_(
            padded.as_strided(tiles.shape, (down, right, step * down, step * right, 1), padded.storage_offset())
        )
        spectrum = scratch("spectrum", F, T, C)
        torch.mm(self._in_transform, tiles.view(edge * edge, T * C), out=spectrum.view(F, T * C))
        products = scratch("products", F + 1, T, K)
        products[F].copy_(self._bias.expand(T, K))
        torch.bmm(spectrum, self._weight, out=products[:F])
        pixels = scratch("tiles", TILE, TILE, rows, columns, K)
        torch.mm(self._out_transform, products.view(F + 1, T * K), out=pixels.view(TILE * TILE, T * K))
        target = out.view(rows, TILE, columns, TILE, K).permute(1, 3, 0, 2, 4)  # (4, 4, R, W / 4, K)
        if add:
            target.add_(pixels)
        else:
            target.copy_(pixels)


def monic_spectra(weight: Tensor, *, doubled: bool) -> Tensor:
    """(K, C, 3, 3) -> (F, C, K) float32, the transformed weights for a transform in whose rows have 1 as their last coefficient."""
    _, weight_transform, in_transform = _image_transforms(doubled=doubled)
    last = in_transform.abs().gt(1e-12).cumsum(1).argmax(1, keepdim=True)
    return _spectra(weight, weight_transform * in_transform.gather(1, last))


def _spectra(weight: Tensor, weight_transform: Tensor) -> Tensor:
    taps = weight.detach().double().permute(2, 3, 1, 0).reshape(9, -1)  # (9, C K)
    spectra = torch.kron(weight_transform, weight_transform) @ taps
    return spectra.float().view(-1, weight.shape[1], weight.shape[0])


def _image_transforms(*, doubled: bool) -> tuple[Tensor, Tensor, Tensor]:
    """A^T, G and B^T in float64; with `doubled` of the small image's tile, without the frequency that is zero."""
    out_transform, weight_transform, in_transform = _transforms(_POINTS_DOUBLED if doubled else _POINTS)
    if doubled:
        repeat = torch.zeros(_EDGE, TILE, dtype=torch.float64, device=_CPU)
        for row in range(_EDGE):  # row i of a tile lies in the small image's row (i + 1) // 2
            repeat[row, (row + 1) // 2] = 1
        in_transform = in_transform @ repeat
        lives = in_transform.abs().amax(1) > 1e-12
        out_transform, weight_transform = out_transform[:, lives], weight_transform[lives]
        in_transform = in_transform[lives]
    return out_transform, weight_transform, in_transform


def _transforms(points: tuple[float, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """A^T (4, 6), G (6, 3) and B^T (6, 6) in float64, of the points with 0 before and infinity behind them (Toom-Cook).

    Each frequency's B^T row is scaled to at most 1, its G row the other way: their sizes differ eightfold otherwise.
    """
    finite = torch.tensor((0.0, *points), dtype=torch.float64, device=_CPU)

    def powers(count: int) -> Tensor:
        """(6, count): each point's powers; infinity has the highest alone."""
        infinity = torch.zeros(1, count, dtype=torch.float64, device=_CPU)
        infinity[0, -1] = 1
        return torch.cat([finite[:, None] ** torch.arange(count, dtype=torch.int64, device=_CPU), infinity])

    in_transform = torch.linalg.inv(powers(_EDGE)).T
    in_transform[in_transform.abs() < 1e-12] = 0
    size = in_transform.abs().amax(1, keepdim=True)
    return powers(TILE).T.contiguous(), powers(3) * size, in_transform / size
