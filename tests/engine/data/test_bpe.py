"""Byte-pair encoding: nothing is unknown, dropped merges follow a generator, and without dropout the library's tokens come out."""

import itertools
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.data.caption_guide import CaptionGuide, training_words
from engine.data.prompt_words import PromptReader
from engine.data.tokenizer import (
    SPECIAL_TOKENS,
    CaptionTokenizer,
    load_tokenizer,
    train_bpe_tokenizer,
    train_tokenizer,
)
from engine.errors import InputError

CAPTIONS = [
    f"{garment}에서 색상은 {colour}이다. {garment}에서 소매기장은 {sleeve}이다."
    for garment in ("상의", "하의", "원피스")
    for colour in ("레드", "블루", "스카이블루")
    for sleeve in ("긴팔", "반팔")
] + ["A plain T-shirt, size 42", "a PLAIN shirt"]
STRANGE = ["여친룩 ootd 쿨톤 고급스러운", "龍の服", "платье 👗 x̂", "<0xEC> [CLS] ▁▁ 상의", "  ", ""]


@pytest.fixture(scope="module")
def tokenizer() -> CaptionTokenizer:
    return train_bpe_tokenizer(CAPTIONS, vocab_size=400, lowercase=True)


def rows(tokenizer: CaptionTokenizer, captions: list[str], length: int = 64) -> np.ndarray:
    return tokenizer.encode(captions, length).tokens.numpy()


def test_layout_is_klue_robertas(tokenizer: CaptionTokenizer) -> None:
    tokens = rows(tokenizer, [CAPTIONS[0], ""], 32)
    ends = [int((row != tokenizer.pad_id).sum()) for row in tokens]
    assert (tokenizer.pad_id, tokens[0, 0], tokens[0, ends[0] - 1]) == (1, 0, 2)
    assert tokens[1].tolist() == [0, 2] + [1] * 30


def test_nothing_is_unknown_and_no_two_words_are_the_same(tokenizer: CaptionTokenizer) -> None:
    unknown = SPECIAL_TOKENS.index("[UNK]")
    for text in STRANGE[:3]:
        row = rows(tokenizer, [text])[0]
        assert unknown not in row
        assert tokenizer.decode(row.tolist()) == text
        assert PromptReader(tokenizer.to_json(), CaptionGuide()).read(text).tokens_unknown == 0
    words = STRANGE[0].split()
    assert len({rows(tokenizer, [word]).tobytes() for word in words}) == len(words)
    of_captions = train_tokenizer(CAPTIONS, vocab_size=400)
    assert len({rows(of_captions, [word]).tobytes() for word in words[:3]}) == 1  # [CLS] [UNK] [SEP]


def test_every_word_of_the_captions_is_known_and_no_other(tokenizer: CaptionTokenizer) -> None:
    guide = CaptionGuide(words=training_words(CAPTIONS))
    reader = PromptReader(tokenizer.to_json(), guide)
    for caption in CAPTIONS:
        assert reader.read(caption).words_unknown == ()
    assert reader.read("상의에서 쿨톤, 레드이다.").words_unknown == ("쿨톤",)


def test_upper_case_is_lower_case_where_asked_for(tokenizer: CaptionTokenizer) -> None:
    assert tokenizer.lowercases
    assert np.array_equal(*rows(tokenizer, ["OOTD Shirt", "ootd sHIRT"]))
    kept = train_bpe_tokenizer(CAPTIONS, vocab_size=400)
    assert not kept.lowercases
    assert kept.decode(rows(kept, ["OOTD"])[0].tolist()) == "OOTD"
    assert train_tokenizer(CAPTIONS, vocab_size=400, lowercase=True).lowercases


@pytest.mark.parametrize("vocab_size", [290, 400])  # at 290 some letters are left to the bytes, by ties
def test_training_does_not_depend_on_order(vocab_size: int) -> None:
    captions, digests = list(CAPTIONS), set()
    for seed in range(4):
        random.Random(seed).shuffle(captions)
        digests.add(train_bpe_tokenizer(captions, vocab_size=vocab_size).digest)
    assert len(digests) == 1
    assert train_bpe_tokenizer(captions[:-1], vocab_size=vocab_size).digest not in digests


def test_vocabulary_is_bounded_from_both_sides() -> None:
    words = [f"{a}{b}{c}" for a, b, c in itertools.product("가나다라마바", "사아자차", "카타파하")] * 2
    assert train_bpe_tokenizer(words, vocab_size=300).vocab_size == 300
    least = train_bpe_tokenizer(words, vocab_size=262)
    assert least.decode(rows(least, [words[0]])[0].tolist()) == words[0]
    with pytest.raises(InputError, match=r"text.vocab_size: 261: train-bpe needs 262 at least, 256 of them for bytes"):
        train_bpe_tokenizer(words, vocab_size=261)


def test_save_and_load_keep_digest_and_tokens(tokenizer: CaptionTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert (loaded.digest, loaded.vocab_size, loaded.pad_id) == (tokenizer.digest, tokenizer.vocab_size, 1)
    assert np.array_equal(rows(loaded, CAPTIONS + STRANGE), rows(tokenizer, CAPTIONS + STRANGE))
    dropped, again = tokenizer.dropout(0.3), loaded.dropout(0.3)
    assert dropped is not None
    assert again is not None
    row = rows(tokenizer, [CAPTIONS[0]])[0]
    assert np.array_equal(dropped(row, np.random.default_rng(5)), again(row, np.random.default_rng(5)))


def test_without_dropout_the_tokens_are_the_librarys(tokenizer: CaptionTokenizer) -> None:
    assert tokenizer.dropout(0.0) is None
    none = tokenizer.dropout(1e-300)
    assert none is not None
    for row in rows(tokenizer, CAPTIONS + STRANGE):
        assert np.array_equal(none(row, np.random.default_rng(0)), row)


def test_dropped_merges_leave_the_text_and_follow_the_generator(tokenizer: CaptionTokenizer) -> None:
    dropout = tokenizer.dropout(0.1)
    assert dropout is not None
    lengths = []
    for number, row in enumerate(rows(tokenizer, CAPTIONS + STRANGE)):
        visits = [dropout(row, np.random.default_rng([number, visit])) for visit in range(20)]
        assert np.array_equal(visits[3], dropout(row, np.random.default_rng([number, 3])))
        assert {tokenizer.decode(visit.tolist()) for visit in visits} == {tokenizer.decode(row.tolist())}
        assert all((visit.dtype, visit.shape) == (row.dtype, row.shape) for visit in visits)
        if number < 18:
            assert len({visit.tobytes() for visit in visits}) > 5
        lengths += [int((visit != 1).sum()) - int((row != 1).sum()) for visit in visits]
    assert np.mean(lengths) > 0


def test_share_of_dropped_merges() -> None:
    """Two merges follow each other, a + b and ▁ + ab: each is left out with the rate's probability, independently."""
    tokenizer = train_bpe_tokenizer(["ab ab ab"], vocab_size=400)
    whole = rows(tokenizer, ["ab"], 6)[0]
    assert (whole != 1).sum() == 3  # [CLS] ▁ab [SEP]
    dropout, visits = tokenizer.dropout(0.2), 2000
    assert dropout is not None
    lengths = [int((dropout(whole, np.random.default_rng(visit)) != 1).sum()) for visit in range(visits)]
    for length, expected in ((3, 0.8 * 0.8), (4, 0.8 * 0.2), (5, 0.2)):
        assert abs(lengths.count(length) / visits - expected) < 4 * (expected * (1 - expected) / visits) ** 0.5


def test_nearly_all_merges_dropped_leave_letters(tokenizer: CaptionTokenizer) -> None:
    dropout = tokenizer.dropout(1 - 1e-12)
    assert dropout is not None
    row = rows(tokenizer, ["상의에서 색상은"])[0]
    assert int((dropout(row, np.random.default_rng(0)) != 1).sum()) == 2 + len("▁상의에서▁색상은")


def test_what_grows_too_long_is_cut_before_sep(tokenizer: CaptionTokenizer) -> None:
    dropout = tokenizer.dropout(0.9)
    assert dropout is not None
    row = rows(tokenizer, [CAPTIONS[0]], 12)[0]
    dropped = dropout(row, np.random.default_rng(0))
    assert len(dropped) == 12
    assert (dropped[0], dropped[-1]) == (0, 2)


def test_other_tokenizers_have_no_merges_to_drop() -> None:
    with pytest.raises(InputError, match=r"text.bpe_dropout: 0.1: leaves out merges of a tokenizer of `train-bpe`"):
        train_tokenizer(CAPTIONS, vocab_size=100).dropout(0.1)


def test_bytes_are_not_sampled_in_captions(tokenizer: CaptionTokenizer) -> None:
    from engine.pipeline.caption_continuation import allowed_tokens

    allowed = allowed_tokens(tokenizer)
    assert not allowed[5 : 5 + 256].any()
    assert bool(allowed[5 + 256 :].all())
    assert torch.equal(allowed[:5], torch.tensor([False, True, True, False, False]))
