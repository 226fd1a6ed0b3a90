"""CLIP's score of images: 100 times the cosine, never below 0, of the caption as it is or in English."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from engine.data.formats import grammar_of
from engine.metrics.clip_score import ClipScorer, clip_report

CAPTION = "상의에서 색상은 블루이다. 상의에서 카테고리는 셔츠이다."


class Clip:
    """Embeds a picture as its mean colour, a caption as the colour that it names."""

    config = SimpleNamespace(text_seq_len=8)

    def embed_images(self, images: Tensor) -> Tensor:
        return torch.nn.functional.normalize(images.mean(dim=(2, 3)) - 0.5, dim=1)

    def embed_texts(self, tokens: Tensor) -> Tensor:
        return torch.nn.functional.normalize(tokens.float() - 0.5, dim=1)

    def scores(self, images: Tensor, texts: Tensor) -> Tensor:
        return texts @ images.T


class Tokenizer:
    """Notes what it reads."""

    def __init__(self) -> None:
        self.read: list[str] = []

    def encode(self, texts: list[str], length: int) -> SimpleNamespace:
        self.read += texts
        return SimpleNamespace(tokens=torch.tensor([[0, 0, 1]] * len(texts)))  # blue


def scorer(*, english: bool = False) -> tuple[ClipScorer, Tokenizer]:
    tokenizer = Tokenizer()
    grammar = grammar_of([CAPTION]) if english else None
    return ClipScorer(Clip(), tokenizer, "clip", "0" * 16, grammar), tokenizer  # type: ignore[arg-type]


def colour(red: float, green: float, blue: float) -> Tensor:
    return torch.tensor([red, green, blue], dtype=torch.float32)[:, None, None].expand(3, 4, 4)


def test_scores_are_cosines_times_100_and_never_negative() -> None:
    own, tokenizer = scorer()
    found = own.scores(CAPTION, torch.stack([colour(0, 0, 1), colour(1, 1, 0), colour(0, 1, 1)]))
    assert found == pytest.approx([100, 0, 100 / 3], abs=1e-4)
    assert tokenizer.read == [CAPTION]


def test_captions_are_read_in_english_for_a_clip_that_needs_it() -> None:
    own, tokenizer = scorer(english=True)
    own.scores(CAPTION, colour(0, 0, 1)[None])
    assert tokenizer.read[0].isascii()
    assert "blue" in tokenizer.read[0]
    assert own.describe()["captions"] == "in English"


def test_the_report_has_means() -> None:
    own, _ = scorer()
    found = clip_report(own, [30, 20], [10, 10], [25.0], [15, 25])
    assert {name: found[name] for name in ("real", "real_of_another_caption", "top_ranked", "random")} == {
        "real": 25, "real_of_another_caption": 10, "top_ranked": 25, "random": 20,
    }  # fmt: skip
    assert clip_report(own, [30], [], [25], [15])["real_of_another_caption"] is None
