"""A codec's decoder on a GPU: channels last, GroupNorm and SiLU of VQGANs in one kernel, all of it one CUDA graph.

A decoder is some 180 launches, many of them shorter than the launch: the graph makes them one. It is captured once, for
`graph_images`, and always runs so many: cuDNN picks a convolution's algorithm by the batch size, so a graph for each size
would not be batch-invariant. An image's place in the batch changes nothing. Another grid of tokens than the trained one has a graph of its
own, of which the last one is kept.

The graph runs on a stream of its own. Decoding tokens is bound by memory, decoding images by arithmetic: a caller that
does not wait for `enqueue` at once overlaps the two.

    images, done = decoder.enqueue(image_tokens)    # returns at once
    ...                                             # the next request's tokens, on the caller's stream
    done.wait()                                     # the caller's stream waits; done.synchronize(): the host does

Not measured on a GPU: captured and checked by the tests marked `gpu`.

B images, N image tokens, h = w side of the token grid, Z latent channels, S pixels, C channels.
Source of the network: CompVis/taming-transformers `Decoder`.
"""

import copy
import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from taming.modules.diffusionmodules.model import AttnBlock, Decoder, ResnetBlock
from torch import Tensor, nn

from engine.codec.captured import Captured
from engine.models.image_codec import ImageCodec
from kernels.group_norm import group_norm


class CudaDecoder:
    """A decoder from tokens on, captured.

    Args:
        codec: on a GPU; its decoder is copied.
        table: (K, Z), the latent vector of each code.
        dtype: float32, float16 or bfloat16, of weights and feature maps; normalisation sums are float32.
        graph_images: batch of the graph; fewer images are padded, more are decoded in turn.
        graphed: False runs the same operations without a CUDA graph.
    """

    def __init__(
        self, codec: ImageCodec, table: Tensor, *, dtype: torch.dtype, graph_images: int = 4, graphed: bool = True
    ) -> None:
        decoder: nn.Module = copy.deepcopy(codec.decoder).eval().to(dtype=dtype)
        self._decoder = decoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._decoder.requires_grad_(False)
        self._table = table.to(dtype)
        self._grid = (codec.config.grid_size, codec.config.grid_size)
        self._cell: int = codec.config.image_size // codec.config.grid_size
        self._to_images = codec.to_images
        self._device = table.device
        self._graph_images = graph_images
        self._stream = torch.cuda.Stream(self._device)
        self._graphed = graphed
        self._run = self._program(self._grid)
        self._larger: tuple[tuple[int, int], Callable[[Tensor], Tensor]] | None = None

    @torch.no_grad()
    def enqueue(self, image_tokens: Tensor, *, grid: tuple[int, int] | None = None) -> tuple[Tensor, torch.cuda.Event]:
        """Starts decoding (B, N) int64 tokens of the codebook, unchecked, after the caller's stream; returns at once.

        Args:
            grid: rows and columns of tokens; None: the trained grid. The first images of another one wait for its capture.

        Returns:
            images (B, 3, S, S) float32 in [0, 1], not to be read before the event; and the event.
        """
        grid = grid or self._grid
        run = self._run_of(grid)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        parts = []
        with torch.cuda.stream(self._stream):
            for part in image_tokens.split(self._graph_images):
                padded = part.new_zeros(self._graph_images, part.shape[1])
                padded[: len(part)] = part
                parts.append(run(padded)[: len(part)])
            empty = (0, 3, grid[0] * self._cell, grid[1] * self._cell)
            images = torch.cat(parts) if parts else torch.empty(empty, dtype=torch.float32, device=self._device)
            done = torch.cuda.Event()
            done.record(self._stream)
        image_tokens.record_stream(self._stream)
        images.record_stream(torch.cuda.current_stream(self._device))
        return images, done

    def _run_of(self, grid: tuple[int, int]) -> Callable[[Tensor], Tensor]:
        if grid == self._grid:
            return self._run
        if self._larger is None or self._larger[0] != grid:
            self._larger = None  # its memory first
            self._larger = (grid, self._program(grid))
        return self._larger[1]

    def _program(self, grid: tuple[int, int]) -> Callable[[Tensor], Tensor]:
        """The decoder of tokens (graph_images, N) of a grid, captured."""
        images = functools.partial(self._images, grid=grid)
        if not self._graphed:
            return images
        example = torch.zeros(self._graph_images, grid[0] * grid[1], dtype=torch.int64, device=self._device)
        return Captured(images, example, stream=self._stream)

    def _images(self, image_tokens: Tensor, *, grid: tuple[int, int]) -> Tensor:
        # The same algorithm in each process, not chosen by timing; and no TF32.
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            latents = F.embedding(image_tokens, self._table)  # (B, N, Z)
            latents = latents.unflatten(1, grid).permute(0, 3, 1, 2)  # (B, Z, h, w), channels last
            if isinstance(self._decoder, Decoder):
                return self._to_images(decode_channels_last(self._decoder, latents))
            return self._to_images(self._decoder(latents))


def decode_channels_last(decoder: Decoder, latents: Tensor) -> Tensor:
    """taming's `Decoder.forward` with the GroupNorm kernel: (B, Z, h, w) channels last -> (B, 3, S, S)."""
    stream = decoder.conv_in(latents)
    stream = _block(decoder.mid.block_1, stream)
    stream = _attention(decoder.mid.attn_1, stream)
    stream = _block(decoder.mid.block_2, stream)
    for level in reversed(decoder.up):
        for number, block in enumerate(level.block):
            stream = _block(block, stream)
            if len(level.attn):
                stream = _attention(level.attn[number], stream)
        if hasattr(level, "upsample"):
            stream = level.upsample.conv(F.interpolate(stream, scale_factor=2.0, mode="nearest"))
    return decoder.conv_out(_normalised(decoder.norm_out, stream, silu=True))


def _block(block: ResnetBlock, stream: Tensor) -> Tensor:
    branch = block.conv1(_normalised(block.norm1, stream, silu=True))
    branch = block.conv2(_normalised(block.norm2, branch, silu=True))
    return (block.nin_shortcut(stream) if block.in_channels != block.out_channels else stream) + branch


def _attention(block: AttnBlock, stream: Tensor) -> Tensor:
    """Products in the maps' dtype, softmax in float32; written out, so that no algorithm is chosen by the batch size."""
    B, C, H, W = stream.shape
    normed = _normalised(block.norm, stream, silu=False)
    q, k, v = (conv(normed).permute(0, 2, 3, 1).reshape(B, H * W, C) for conv in (block.q, block.k, block.v))
    q = q / math.sqrt(C)  # before the product, which float16 may not hold
    weights = torch.softmax((q @ k.transpose(1, 2)).float(), dim=2).to(v.dtype)  # (B, HW, HW)
    seen = (weights @ v).unflatten(1, (H, W)).permute(0, 3, 1, 2)  # (B, C, H, W), channels last
    return stream + block.proj_out(seen)


def _normalised(norm: nn.GroupNorm, stream: Tensor, *, silu: bool) -> Tensor:
    """(B, C, H, W) channels last -> the same."""
    B, C, H, W = stream.shape
    pixels = stream.permute(0, 2, 3, 1).reshape(B, H * W, C)  # a view
    made = group_norm(pixels.contiguous(), norm.weight, norm.bias, groups=norm.num_groups, eps=norm.eps, silu=silu)
    return made.view(B, H, W, C).permute(0, 3, 1, 2)
