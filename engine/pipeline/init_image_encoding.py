"""An init image as tokens and pixels on the model's device."""

import torch

from engine.models.image_codec import ImageCodec
from engine.pipeline.generation import PreparedInitImage
from engine.pipeline.init_image import InitImage, check_kept_after
from engine.pipeline.torch_state import inference
from engine.sampling_params import RankBy


def encode_init_image(
    vqgan: ImageCodec, init_image: InitImage | None, *, rank_by: RankBy, device: torch.device
) -> PreparedInitImage | None:
    """Tokens by the VQGAN's encoder, -1 where they are sampled, and the pixels to paste.

    Args:
        device: the VQGAN's.

    Returns:
        None without an init image.

    Raises:
        InputError: a mask or rows that leave nothing to generate, nothing kept, or nothing to rank by.
    """
    image_size, grid_size = vqgan.config.image_size, vqgan.config.grid_size
    regenerated_tokens = None if init_image is None else init_image.regenerated_tokens(image_size, grid_size)
    if rank_by == "log_likelihood":
        check_kept_after(regenerated_tokens)
    if init_image is None or regenerated_tokens is None:
        return None
    with inference(device):
        pixels = torch.from_numpy(init_image.pixels(image_size)).to(device)
        image = pixels.permute(2, 0, 1).float() / 255  # (3, S, S)
        sampled = torch.from_numpy(regenerated_tokens).to(device)
        tokens = vqgan.encode(image[None])[0].masked_fill(sampled, -1)
        may_change = torch.from_numpy(init_image.regenerated_pixels(image_size, grid_size)).to(device)
        pasted = ~may_change if init_image.paste else torch.zeros_like(may_change)
    return PreparedInitImage(tokens, image, pasted, init_image.record(image_size, grid_size))
