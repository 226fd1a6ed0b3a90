"""Tokenizers: fixed length, nothing cut in silence, equal tokens for equal captions."""

import random
from pathlib import Path

import pytest
import torch

from engine.data.tokenizer import SPECIAL_TOKENS, CaptionTokenizer, load_tokenizer, train_tokenizer
from engine.errors import InputError

CAPTIONS = [
    "상의에서 색상은 레드이다.",
    "상의에서 색상은 블루이다. 소매기장은 긴팔이다.",
    "하의에서 카테고리는 청바지이다.",
    "원피스에서 프린트는 무지이고 소재는 우븐이다.",
    "A plain T-shirt, size 42",
]


@pytest.fixture(scope="module")
def tokenizer() -> CaptionTokenizer:
    return train_tokenizer(CAPTIONS, vocab_size=200)


def test_layout_is_klue_robertas(tokenizer: CaptionTokenizer) -> None:
    tokens = tokenizer.encode([CAPTIONS[0], ""], 12).tokens
    assert tokens.shape == (2, 12)
    assert tokens.dtype == torch.int64
    assert tokens[0, 0] == SPECIAL_TOKENS.index("[CLS]") == 0
    length = int((tokens[0] != 1).sum())
    assert tokens[0, length - 1] == SPECIAL_TOKENS.index("[SEP]") == 2
    assert tokens[0, length:].eq(tokenizer.pad_id).all()
    assert tokenizer.pad_id == SPECIAL_TOKENS.index("[PAD]") == 1
    assert tokens[1].tolist() == [0, 2] + [1] * 10 == tokenizer.empty(12)[0].tolist()


def test_unknown_letters_are_unk_not_an_error(tokenizer: CaptionTokenizer) -> None:
    assert SPECIAL_TOKENS.index("[UNK]") in tokenizer.encode(["龍"], 5).tokens[0].tolist()


def test_alone_equals_batched(tokenizer: CaptionTokenizer) -> None:
    together = tokenizer.encode(CAPTIONS, 16)
    alone = [tokenizer.encode([caption], 16) for caption in CAPTIONS]
    assert torch.equal(together.tokens, torch.cat([one.tokens for one in alone]))
    assert together.cut == [one.cut[0] for one in alone]


def test_no_captions(tokenizer: CaptionTokenizer) -> None:
    encoded = tokenizer.encode([], 16)
    assert encoded.tokens.shape == (0, 16)
    assert encoded.cut == []


@pytest.mark.parametrize("text_seq_len", [1, 2, 5])
def test_what_is_cut_is_counted_and_sep_stays(tokenizer: CaptionTokenizer, text_seq_len: int) -> None:
    whole = tokenizer.encode([CAPTIONS[1]], 64)
    length = int((whole.tokens != 1).sum())
    assert whole.cut == [0]
    cut = tokenizer.encode([CAPTIONS[1]], text_seq_len)
    assert cut.cut == [length - text_seq_len]
    assert cut.tokens[0].tolist() == [*whole.tokens[0, : text_seq_len - 1].tolist(), 2]
    assert tokenizer.encode([CAPTIONS[1]], length, strict=True).cut == [0]
    with pytest.raises(InputError, match=f"is {length} tokens, {length - text_seq_len} more than"):
        tokenizer.encode([CAPTIONS[1], CAPTIONS[0]], text_seq_len, strict=True)


def test_decode_gives_the_words_back(tokenizer: CaptionTokenizer) -> None:
    tokens = tokenizer.encode(["상의에서 색상은 레드이다"], 16).tokens[0]
    assert tokenizer.decode(tokens.tolist()) == "상의에서 색상은 레드이다"


def test_training_does_not_depend_on_order() -> None:
    captions = [f"{a}{b} {b}{c}" for a in "가나다라마바" for b in "사아자차" for c in "카타파하"]
    digests = set()
    for seed in range(4):
        random.Random(seed).shuffle(captions)
        digests.add(train_tokenizer(captions, vocab_size=60).digest)
    assert len(digests) == 1
    assert train_tokenizer(captions[:-1] + ["다른 말"], vocab_size=60).digest not in digests


def test_vocabulary_is_bounded() -> None:
    assert train_tokenizer(CAPTIONS, vocab_size=20).vocab_size >= len(SPECIAL_TOKENS)
    assert train_tokenizer([f"낱말{number}" for number in range(500)], vocab_size=50).vocab_size == 50


def test_save_and_load_keep_digest_and_tokens(tokenizer: CaptionTokenizer, tmp_path: Path) -> None:
    tokenizer.encode(CAPTIONS, 8)
    tokenizer.save(tmp_path / "one")
    loaded = load_tokenizer(str(tmp_path / "one"))
    loaded.save(tmp_path / "two")
    for other in (loaded, load_tokenizer(str(tmp_path / "two"))):
        assert other.digest == tokenizer.digest
        assert (other.vocab_size, other.pad_id) == (tokenizer.vocab_size, tokenizer.pad_id)
        assert torch.equal(other.encode(CAPTIONS, 16).tokens, tokenizer.encode(CAPTIONS, 16).tokens)


def test_composed_and_decomposed_letters_are_the_same(tokenizer: CaptionTokenizer) -> None:
    import unicodedata

    decomposed = unicodedata.normalize("NFD", CAPTIONS[0])
    assert decomposed != CAPTIONS[0]
    assert torch.equal(tokenizer.encode([decomposed], 16).tokens, tokenizer.encode([CAPTIONS[0]], 16).tokens)


def test_missing_tokenizer_is_one_line(tmp_path: Path) -> None:
    for name in (str(tmp_path / "nowhere"), "nosuch/repository"):
        with pytest.raises(InputError, match=r"text.tokenizer: .*cannot be loaded") as caught:
            load_tokenizer(name)
        assert "\n" not in str(caught.value)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    for folder in ("empty", "broken"):
        with pytest.raises(InputError, match=f"text.tokenizer: .*{folder}"):
            load_tokenizer(str(tmp_path / folder))
