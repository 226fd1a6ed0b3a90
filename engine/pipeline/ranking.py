"""How candidates of a caption are scored and ranked by KoCLIP.

`cosine` ranks by the score itself, how near image and caption are. Images differ in how near they are to captions of any
kind, and those that are near to all of them win. `contrast` asks instead, of each fact that a caption states, whether its
value fits the image best among those that the model knows, its class among the classes of all subjects, and of two colours which
is the main one (questions of engine.data.wrong_captions):

    contrast(image, c) = sum over questions of log softmax over {right, wrong captions} of scale * cosine(image, .), at right

One softmax over all wrong versions of a caption would let a fact of many values drown the others: which of two colours is the
main one is a single caption among forty, and images in the second colour alone came first. A caption that states nothing which the
model's caption guide knows has no wrong versions, and is ranked by cosine.

Rankers take squares. What an oblong image has of anything is the mean over the squares that cover it.

G captions, n images of each, M captions of all questions, H x W pixels, Q squares, E embed_dim, W wrong captions of a question.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
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
from engine.pipeline.image_size import squares
from engine.pipeline.interruption import BeforePart, uninterrupted

_AT_ONCE = 16  # images or captions
MOST_WRONG_CAPTIONS = 64  # each goes through the text encoder: a caption of many facts has hundreds


@dataclass(frozen=True, eq=False)
class CaptionEmbeddings:
    """Captions in the ranker's space."""

    vectors: Tensor  # (M, E) float32 on the CPU
    text_tokens: int  # of all of them, [CLS] and [SEP] included
    tokens_cut: int  # that did not fit the ranker and were left out


class Scores(NamedTuple):
    """Of the candidates of a caption, on the CPU.

    Args:
        score: (n,), the ranker's.
        contrast: (n,) nats, 0 at most; None where candidates are ranked by score.
        guess: the contrast of an image that tells nothing, the sum over questions of -log(1 + W); below 0 with contrast.
    """

    score: Tensor
    contrast: Tensor | None
    guess: float = 0.0

    @property
    def certainty(self) -> Tensor | None:
        """(n,) how far contrast is from a guess (0) to certainty (1), below 0 if it is worse than a guess; None without.

        A share, so that captions of few and of many facts can be compared.
        """
        return None if self.contrast is None else 1 - self.contrast / self.guess


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

    def __call__(self, caption: str, images: Tensor, *, before_part: BeforePart = uninterrupted) -> Scores:
        """Of the candidates of a caption: (n, 3, H, W) in [0, 1]; `before_part` before each 16 images or captions."""
        embeddings = self._embed_squares(images, before_part)
        questions = [] if self._wrong is None else self._wrong.questions(caption, most=MOST_WRONG_CAPTIONS)
        if not questions or not isinstance(self._ranker, KoClip):
            return Scores(self._similarities(embeddings, self._embed_captions([caption]))[0].float().cpu(), None)
        asked = [text for question in questions for text in (question.right, *question.wrong)]
        captions = list(dict.fromkeys([caption, *asked]))  # a caption is in several questions
        texts = self._embed_captions(captions, before_part)  # (M, E)
        score = self._similarities(embeddings, texts[:1])[0]  # (n,)
        by_square = torch.stack([self._ranker.caption_scores(own, texts).T for own in embeddings])  # (Q, M, n)
        logits = (by_square.mean(0) * self._ranker.temperature_scale()).float()
        place = {text: number for number, text in enumerate(captions)}
        answers = [
            logits[[place[text] for text in (question.right, *question.wrong)]].log_softmax(dim=0)[0]  # (n,)
            for question in questions
        ]
        guess = -sum(math.log(1 + len(question.wrong)) for question in questions)
        return Scores(score.float().cpu(), torch.stack(answers).sum(0).cpu(), guess)

    def scores(self, captions: Sequence[str], images: Tensor) -> Tensor:
        """The score of each caption's own images: (G, n, 3, H, W) in [0, 1] -> (G, n) on the CPU."""
        texts = self._embed_captions(captions)  # (G, E)
        embeddings = self._embed_squares(images.flatten(0, 1)).unflatten(1, images.shape[:2])  # (Q, G, n, E)
        by_caption = zip(embeddings.unbind(1), texts, strict=True)
        return torch.stack([self._similarities(own, text[None])[0] for own, text in by_caption]).float().cpu()

    def embed_captions(self, captions: Sequence[str]) -> CaptionEmbeddings:
        """Captions in the ranker's space."""
        encoded = self._tokenizer.encode(captions, self._ranker.config.text_seq_len)
        vectors = self._embed_tokens(encoded.tokens).float().cpu()
        return CaptionEmbeddings(vectors, int((encoded.tokens != self._tokenizer.pad_id).sum()), sum(encoded.cut))

    def embed_images(self, images: Tensor, before_part: BeforePart = uninterrupted) -> Tensor:
        """(B, 3, any, any) -> (B, E), each as a whole."""
        parts = []
        for part in images.split(_AT_ONCE):
            before_part()
            parts.append(self._embedder.embed_images(part))
        return torch.cat(parts)

    def _similarities(self, embeddings: Tensor, texts: Tensor) -> Tensor:
        """Of images whose squares are (Q, n, E), to captions (M, E): (M, n)."""
        return torch.stack([self._ranker.scores(own, texts) for own in embeddings]).mean(0)

    def _embed_squares(self, images: Tensor, before_part: BeforePart = uninterrupted) -> Tensor:
        """(n, 3, H, W) -> (Q, n, E), of each of the squares; one, the whole image, unless it is oblong."""
        height, width = images.shape[-2:]
        return torch.stack(
            [self.embed_images(images[..., rows, columns], before_part) for rows, columns in squares(width, height)]
        )

    def _embed_captions(self, captions: Sequence[str], before_part: BeforePart = uninterrupted) -> Tensor:
        parts = []
        for part in self._tokenizer.encode(captions, self._ranker.config.text_seq_len).tokens.split(_AT_ONCE):
            before_part()
            parts.append(self._embed_tokens(part))
        return torch.cat(parts)

    def _embed_tokens(self, tokens: Tensor) -> Tensor:
        return self._embedder.embed_texts(tokens.to(next(self._ranker.parameters()).device))
