"""An init image as tokens and pixels on the model's device."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from engine.data.tokenizer import CaptionTokenizer
from engine.models.image_codec import ImageCodec
from engine.models.transformer import KoDalle
from engine.pipeline.generation import PreparedInitImage
from engine.pipeline.init_image import InitImage, check_kept_after
from engine.pipeline.interruption import BeforePart, uninterrupted
from engine.pipeline.token_choice import Captions, tokens_to_sample
from engine.pipeline.torch_state import exact, inference
from engine.sampling_params import RankBy

ChooseTokens = Callable[[Tensor], Tensor]
"""(N,) tokens of an init image -> (N,) bool, True where to sample."""


def prepare_init_image(
    init_image: InitImage | None,
    text_tokens: Sequence[Tensor],
    *,
    transformer: KoDalle,
    vqgan: ImageCodec,
    tokenizer: CaptionTokenizer,
    rank_by: RankBy,
    device: torch.device,
    before_pass: BeforePart = uninterrupted,
) -> Sequence[PreparedInitImage | None]:
    """The init image for each caption, which decides its tokens where the model chooses them; None where there is none.

    Args:
        text_tokens: (T,) a caption.
        device: the models'.
        before_pass: called before each pass of the model that chooses tokens.

    Raises:
        InputError: see `encode_init_image`.
    """
    if init_image is None:
        return [None] * len(text_tokens)
    encode = partial(encode_init_image, vqgan, init_image, rank_by=rank_by, device=device)
    if not init_image.chosen_by_model:
        return [encode()] * len(text_tokens)
    length = transformer.config.text_seq_len
    before = None
    if init_image.changed_from is not None:
        before = tokenizer.encode([init_image.changed_from], length).tokens[0]
    empty = None if tokenizer.names_classes else tokenizer.empty(length)[0]
    chosen = []
    for tokens in text_tokens:
        captions = Captions(tokens, before, empty)
        choose = partial(
            tokens_to_sample, transformer, vqgan.code_vectors(), captions, strength=init_image.strength,
            before_pass=before_pass,
        )  # fmt: skip
        with exact(device):
            chosen.append(encode(choose=choose))
    return chosen


def encode_init_image(
    vqgan: ImageCodec,
    init_image: InitImage,
    *,
    rank_by: RankBy,
    device: torch.device,
    choose: ChooseTokens | None = None,
) -> PreparedInitImage:
    """Tokens by the VQGAN's encoder, -1 where they are sampled, and the pixels to paste.

    Args:
        device: the VQGAN's.
        choose: which tokens are sampled, for an init image of which the model chooses them.

    Raises:
        InputError: a mask or rows that leave nothing to generate, nothing kept, or nothing to rank by.
    """
    image_size, grid_size = vqgan.config.image_size, vqgan.config.grid_size
    regenerated = None if choose else init_image.regenerated_tokens(image_size, grid_size)
    if rank_by == "log_likelihood":
        check_kept_after(regenerated)
    with inference(device):
        pixels = torch.from_numpy(init_image.pixels(image_size)).to(device)
        image = pixels.permute(2, 0, 1).float() / 255  # (3, S, S)
        tokens = vqgan.encode(image[None])[0]
    if regenerated is not None:
        sampled = torch.from_numpy(regenerated).to(device)
        may_change = torch.from_numpy(init_image.regenerated_pixels(image_size, grid_size)).to(device)
    else:
        assert choose is not None
        sampled = choose(tokens)
        cell = image_size // grid_size
        may_change = sampled.view(grid_size, grid_size).repeat_interleave(cell, 0).repeat_interleave(cell, 1)
    pasted = ~may_change if init_image.pastes else torch.zeros_like(may_change)
    return PreparedInitImage(tokens.masked_fill(sampled, -1), image, pasted, init_image.record(image_size, grid_size))
