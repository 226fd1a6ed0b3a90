"""The transformer on held-out pairs: how surprised it is by the captions and image tokens of photographs it never saw.

B images, T text positions.
"""

from collections.abc import Sequence
from typing import Any

import torch

from engine.data.pairs import Pair
from engine.metrics.parts import EvaluationRun
from engine.pipeline.pipeline import Pipeline


@torch.no_grad()
def likelihood(run: EvaluationRun, pipeline: Pipeline, held: Sequence[Pair]) -> dict[str, Any]:
    """Of each pair's first caption: loss_text and loss_image in nats a token, image_top1 as a share."""
    transformer, vqgan = pipeline.transformer, pipeline.vqgan
    captions = [pair.captions[0] for pair in held]
    text = pipeline.tokenizer.encode(captions, transformer.config.text_seq_len)
    sums = torch.zeros(3, dtype=torch.float64, device="cpu")
    start = 0
    for images in run.images(held, vqgan.config.image_size, "kodalle"):
        text_tokens = text.tokens[start : start + len(images)].to(run.device)  # (B, T)
        found = transformer(text_tokens, vqgan.encode(images))
        means = torch.stack([found.loss_text, found.loss_image, found.image_top1]).double().cpu()
        sums += len(images) * means  # all sequences are equally long, so means of batches may be weighted
        start += len(images)
    loss_text, loss_image, image_top1 = (sums / len(held)).tolist()
    return {
        "pairs": len(held),
        "captions_cut": sum(cut > 0 for cut in text.cut),
        "loss_text": loss_text,
        "loss_image": loss_image,
        "image_top1": image_top1,
    }
