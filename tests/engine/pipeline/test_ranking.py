"""Candidates are ranked by the score, or by how much better their caption fits than wrong ones, fact by fact."""

import math
from collections.abc import Sequence

import pytest
import torch
from pydantic import ValidationError

from engine.codec.koclip_encoder import KoclipEncoder
from engine.config.ranker import KoclipConfig
from engine.data.caption_guide import CaptionGuide
from engine.data.tokenizer import CaptionTokenizer, train_tokenizer
from engine.models.koclip import KoClip
from engine.pipeline.ranking import MOST_WRONG_CAPTIONS, CandidateScorer
from tests.engine.models.test_koclip import TINY

GREY, WHITE_TOO, SHIRT = (
    "상의에서 색상은 그레이이다.",
    "상의에서 서브색상은 화이트이다.",
    "상의에서 카테고리는 셔츠이다.",
)
CAPTION = f"{GREY} {WHITE_TOO} {SHIRT}"
GUIDE = CaptionGuide(
    examples=(CAPTION,),
    attributes={
        "상의": {"색상": ["블랙", "그레이"], "서브색상": ["화이트", "레드"], "카테고리": ["셔츠", "탑", "후드티"]},
        "하의": {"카테고리": ["팬츠", "스커트"]},
    },
)
QUESTIONS = [
    (f"{GREY} {SHIRT}", f"상의에서 색상은 블랙이다. {SHIRT}"),
    (CAPTION, f"{GREY} 상의에서 서브색상은 레드이다. {SHIRT}"),
    (
        f"{GREY} {SHIRT}",
        f"{GREY} 상의에서 카테고리는 탑이다.",
        f"{GREY} 상의에서 카테고리는 후드티이다.",
        "하의에서 카테고리는 팬츠이다.",
        "하의에서 카테고리는 스커트이다.",
    ),
    (CAPTION, f"상의에서 색상은 화이트이다. 상의에서 서브색상은 그레이이다. {SHIRT}"),
    (CAPTION, f"상의에서 색상은 화이트이다. {SHIRT}"),
]
ASKED = [text for question in QUESTIONS for text in question]


@pytest.fixture(scope="module")
def tokenizer() -> CaptionTokenizer:
    return train_tokenizer(ASKED, vocab_size=60)


def _scorer(
    tokenizer: CaptionTokenizer, *, ranking: str, guide: CaptionGuide = GUIDE
) -> tuple[CandidateScorer, KoClip]:
    torch.manual_seed(0)
    sizes = {"ranking": ranking, "text_vocab_size": 64, "text_seq_len": 24, "text_position_rows": 26}
    koclip = KoClip(KoclipConfig(**(TINY.model_dump() | sizes))).eval()
    return CandidateScorer(koclip, KoclipEncoder(koclip), tokenizer, guide), koclip


def _images(count: int) -> torch.Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_contrast_is_the_caption_s_log_probability_among_the_wrong_ones_of_each_question(
    tokenizer: CaptionTokenizer,
) -> None:
    scorer, koclip = _scorer(tokenizer, ranking="contrast")
    images = _images(5)
    found = scorer(CAPTION, images)
    assert found.contrast is not None
    tokens = tokenizer.encode([CAPTION, *ASKED], 24).tokens
    assert len({tuple(row.tolist()) for row in tokens}) == 10
    logits = (koclip.similarity(images, tokens) * koclip.temperature_scale()).double()
    for image in range(5):
        expected, left = 0.0, iter(logits[1:, image].tolist())
        for question in QUESTIONS:
            own, *others = (math.exp(next(left)) for _ in question)
            expected += math.log(own / (own + sum(others)))
        assert found.contrast[image].item() == pytest.approx(expected, abs=1e-4)
    assert found.guess == pytest.approx(-math.log(2 * 2 * 5 * 2 * 2))
    assert found.certainty is not None
    torch.testing.assert_close(found.certainty, 1 + found.contrast / math.log(80))
    torch.testing.assert_close(found.score, koclip.similarity(images, tokens[:1])[0])
    alone = scorer(CAPTION, images[3:4])  # an image's values do not depend on the others
    assert alone.contrast is not None
    torch.testing.assert_close(alone.contrast[0], found.contrast[3], rtol=0, atol=1e-5)
    torch.testing.assert_close(alone.score[0], found.score[3], rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize(
    ("ranking", "caption", "guide"),
    [
        ("cosine", CAPTION, GUIDE),
        ("contrast", "아름다운 옷", GUIDE),  # no fact in it
        ("contrast", "하의에서 색상은 레드이다.", GUIDE),  # no other value is known, and nothing else red
        ("contrast", CAPTION, CaptionGuide()),
    ],
)
def test_without_wrong_captions_the_score_ranks(
    ranking: str, caption: str, guide: CaptionGuide, tokenizer: CaptionTokenizer
) -> None:
    scorer, _ = _scorer(tokenizer, ranking=ranking, guide=guide)
    assert scorer(caption, _images(2)).contrast is None


def test_wrong_captions_are_bounded(tokenizer: CaptionTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    colours = [f"색{number}" for number in range(200)]
    guide = CaptionGuide(examples=(CAPTION,), attributes={"상의": {"색상": colours, "카테고리": ["셔츠", "탑"]}})
    scorer, _ = _scorer(tokenizer, ranking="contrast", guide=guide)
    seen: list[int] = []
    embed = scorer._embed_captions

    def counted(captions: Sequence[str], *_: object) -> torch.Tensor:
        seen.append(len(captions))
        return embed(captions)

    monkeypatch.setattr(scorer, "_embed_captions", counted)
    scorer(f"{GREY} {SHIRT}", _images(1))
    assert seen == [1 + MOST_WRONG_CAPTIONS]


def test_published_similarity_has_no_temperature_to_contrast_with() -> None:
    with pytest.raises(ValidationError, match="ranking contrast needs"):
        KoclipConfig(ranking="contrast", similarity="published")
