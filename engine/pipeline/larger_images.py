"""The tokens of images, of a model's own size in one piece, of a larger one in windows (engine/decoding/sliding_window.py).

B sequences, N image tokens.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from engine.config.codec import CodecBackend
from engine.decoding.kv_cache import Prefix
from engine.decoding.sampler import Sampler
from engine.decoding.sliding_window import TokenGrid, generate_grid, num_positions
from engine.errors import InputError
from engine.pipeline.generation import PreparedRequest, batch_init_tokens
from engine.pipeline.image_size import ImageSize, larger_size
from engine.pipeline.init_image import InitImage
from engine.sampling_params import SequenceRequest

OnPosition = Callable[[int, int], None]
"""Called with (image tokens that every sequence has, N); of larger images with (positions decoded in all windows, their number)."""


def larger_grid(
    size: ImageSize | None,
    init_image: InitImage | None,
    image_size: int,
    grid_size: int,
    *,
    codec_backend: CodecBackend,
) -> tuple[ImageSize, TokenGrid] | tuple[None, None]:
    """A requested size and its tokens; None where it is the model's own.

    Args:
        image_size, grid_size: the model's pixels and image tokens along a side.

    Raises:
        InputError: a size that the model does not generate, one beside an init image, one that the backend cannot decode.
    """
    size = larger_size(size, image_size=image_size, grid_size=grid_size)
    if size is None:
        return None, None
    if init_image is not None:
        raise InputError("size", size, "an init image is of the model's own size: leave one of the two out")
    if codec_backend == "onnx":
        raise InputError("size", size, "exported networks decode the model's own size: use codec_backend=torch")
    cell = image_size // grid_size
    return size, TokenGrid(size.height // cell, size.width // cell)


def decode_sequences(
    sampler: Sampler,
    prefix: Prefix,
    sequences: list[SequenceRequest],
    requests: Sequence[PreparedRequest],
    *,
    on_position: OnPosition | None = None,
) -> Tensor:
    """(B, N) tokens of the sequences of requests, which are of one size."""
    grid, config = requests[0].grid, sampler.model.config
    if any(request.grid != grid for request in requests):
        raise ValueError("requests of several sizes are decoded apart")
    if grid is None:
        N = config.image_seq_len
        on_step = None if on_position is None else lambda position, _: on_position(position + 1, N)
        init_tokens = batch_init_tokens(requests, N, sampler.model.head.weight.device)  # (B, N) or None
        return sampler.decode(prefix, sequences, init_tokens=init_tokens, on_step=on_step)
    total = num_positions(grid, config.image_grid_size, len(sequences))
    on_progress = None if on_position is None else lambda done: on_position(done, total)
    return generate_grid(sampler, prefix, sequences, grid, on_progress=on_progress)
