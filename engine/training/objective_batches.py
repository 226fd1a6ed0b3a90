"""What the objectives beside KoCLIP's contrastive loss see of a batch: two views of each image, and the captions masked.

Each is a function of (seed, position), as everything in a batch is (engine.data.order), and of streams of its own: with an objective
or without, the rest of the batch is the same.

B images a micro batch and rank, S pixels, T text positions, K masked tokens of a caption at most.
"""

import numpy as np
import torch

from engine.config.stages import KoclipLossConfig
from engine.data.masked_captions import mask_tokens
from engine.data.order import BatchOrder
from engine.data.ssl_views import ssl_view
from engine.data.tokenizer import CaptionTokenizer
from engine.errors import InputError
from engine.training.batches import Batch, BatchSource, Images

# Streams beside those of engine.training.batches, at 0, 2**62 and 2**63.
_VIEWS, _MASKS = 2**61, 2**62 + 2**61


def objective_source(
    source: BatchSource, images: Images, order: BatchOrder, tokenizer: CaptionTokenizer, loss: KoclipLossConfig
) -> BatchSource:
    """`source` with `views`, (B, 2, 3, S, S) uint8, with `image_ssl`, and with `masked_tokens` (B, T), `masked_positions` (B, K) and
    `masked_originals` (B, K), int64, with `masked_language_weight`.

    Raises:
        InputError: captions are to be masked, and the tokenizer has no [MASK].
    """
    special = tokenizer.special_ids
    words = np.array([token for token in range(tokenizer.vocab_size) if token not in special], dtype=np.int64)
    mask = tokenizer.mask_id
    if loss.masked_language_weight and mask is None:
        remedy = (
            "needs a tokenizer with a token for what is masked, [MASK]: leave it out, or give another text.tokenizer"
        )
        raise InputError("loss.masked_language_weight", loss.masked_language_weight, remedy)

    def make(number: int) -> Batch:
        batch, positions = source(number), order.positions(number)
        if loss.image_ssl is not None:
            views = [
                ssl_view(images[order.index(position)], generator, colour=loss.image_ssl_colour)
                for position in positions
                for generator in [order.generator(position + _VIEWS)]
                for _ in range(2)
            ]
            batch["views"] = torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2).unflatten(0, (-1, 2))
        if loss.masked_language_weight:
            assert mask is not None
            rows = [
                mask_tokens(
                    tokens, order.generator(position + _MASKS),
                    share=loss.masked_language_share, mask=mask, special=special, words=words,
                )
                for tokens, position in zip(batch["text_tokens"].tolist(), positions, strict=True)
            ]  # fmt: skip
            for name, column in zip(("tokens", "positions", "originals"), zip(*rows, strict=True), strict=True):
                batch[f"masked_{name}"] = torch.from_numpy(np.stack(column))
        return batch

    return make
