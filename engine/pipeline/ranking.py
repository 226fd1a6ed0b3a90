"""How candidates of a caption are scored and ranked by KoCLIP.

`cosine` ranks by the score itself, how near image and caption are. Images differ in how near they are to captions of any
kind, and those that are near to all of them win. `contrast` asks instead which caption fits an image best: this one, or
one that differs from it in a single fact (engine.data.wrong_captions, with the values that the model knows):

    contrast(image, c) = log softmax over {c, wrong versions of c} of scale * cosine(image, caption), at c

A caption that states nothing which the model's caption guide knows has no wrong versions, and is ranked by cosine.

G captions, n images of each, S pixels, E embed_dim, W wrong versions.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from engine.codec.koclip_encoder import KoclipEncoder
from engine.codec.onnx_backend import OnnxKoClip
from engine.data.caption_guide import CaptionGuide
from engine.data.tokenizer import CaptionTokenizer
from engine.data.wrong_captions import wrong_captions_of_model
from engine.models.koclip import KoClip
from engine.models.ranker import Ranker

_IMAGES_AT_ONCE = 16
MOST_WRONG_CAPTIONS = (
    64  # each goes through the text encoder once: 0.4 ms with the shipped model's, 20 ms with RoBERTa-base
)


class Scores(NamedTuple):
    """Of the candidates of a caption, on the CPU.

    Args:
        score: (n,), the ranker's.
        contrast: (n,) nats, 0 at most; None where candidates are ranked by score.
    """

    score: Tensor
    contrast: Tensor | None


class CandidateScorer:
    """Scores of images by a ranker.

    Args:
        embedder: the ranker's encoders at the machine's speed.
        tokenizer: what the ranker reads captions with.
    """

    def __init__(
        self,
        ranker: Ranker,
        embedder: KoclipEncoder | OnnxKoClip,
        tokenizer: CaptionTokenizer,
        guide: CaptionGuide,
    ) -> None:
        self._ranker, self._embedder, self._tokenizer = ranker, embedder, tokenizer
        contrasts = isinstance(ranker, KoClip) and ranker.config.ranking == "contrast"
        self._wrong = wrong_captions_of_model(guide.examples, guide.attributes) if contrasts else None

    def __call__(self, caption: str, images: Tensor) -> Scores:
        """Of the candidates of a caption: (n, 3, S, S) in [0, 1]."""
        own, embeddings = self._embed_captions([caption]), self._embed_images(images)
        score = self._ranker.scores(embeddings, own)[0]  # (n,)
        wrong = [] if self._wrong is None else self._wrong.all_of(caption, most=MOST_WRONG_CAPTIONS)
        if not wrong or not isinstance(self._ranker, KoClip):
            return Scores(score.float().cpu(), None)
        texts = torch.cat([own, self._embed_captions(wrong)])  # (1 + W, E)
        logits = self._ranker.caption_scores(embeddings, texts).T * self._ranker.temperature_scale()  # (1 + W, n)
        return Scores(score.float().cpu(), logits.float().log_softmax(dim=0)[0].cpu())

    def scores(self, captions: Sequence[str], images: Tensor) -> Tensor:
        """The score of each caption's own images: (G, n, 3, S, S) in [0, 1] -> (G, n) on the CPU."""
        texts = self._embed_captions(captions)  # (G, E)
        embeddings = self._embed_images(images.flatten(0, 1)).unflatten(0, images.shape[:2])  # (G, n, E)
        rows = [self._ranker.scores(own, text[None])[0] for own, text in zip(embeddings, texts, strict=True)]
        return torch.stack(rows).float().cpu()

    def _embed_images(self, images: Tensor) -> Tensor:
        return torch.cat([self._embedder.embed_images(part) for part in images.split(_IMAGES_AT_ONCE)])

    def _embed_captions(self, captions: Sequence[str]) -> Tensor:
        tokens = self._tokenizer.encode(captions, self._ranker.config.text_seq_len).tokens
        return self._embedder.embed_texts(tokens.to(next(self._ranker.parameters()).device))
