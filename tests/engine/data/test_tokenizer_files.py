"""Tokenizer folders are read as transformers reads them, without it where nothing but two files counts."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from engine.data import tokenizer_files
from engine.data.class_tokenizer import class_tokenizer
from engine.data.tokenizer import CaptionTokenizer, load_tokenizer, train_bpe_tokenizer, train_tokenizer
from engine.data.tokenizer_files import SpecialTokens

CAPTIONS = ["상의에서 색상은 레드이다.", "하의에서 Denim 팬츠, 블루", "", "[SEP] 모자"]


def _without_rules() -> CaptionTokenizer:
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.enable_truncation(3)
    backend.enable_padding()
    return CaptionTokenizer(backend, SpecialTokens(unk_token="[UNK]", eos_token="</s>", extra_special_tokens=("<x>",)))


TOKENIZERS: dict[str, Callable[[], CaptionTokenizer]] = {
    "word pieces": lambda: train_tokenizer(CAPTIONS, vocab_size=60),
    "byte pairs": lambda: train_bpe_tokenizer(CAPTIONS, vocab_size=300, lowercase=True),
    "classes": lambda: class_tokenizer(["a", "b c"]),
    "special tokens that are added": _without_rules,
}


@pytest.fixture(params=TOKENIZERS)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> CaptionTokenizer:
    tokenizer = TOKENIZERS[request.param]()
    tokenizer.save(tmp_path)
    return tokenizer


def _edit(folder: Path, **changes: object) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_saved_folder_is_what_transformers_reads(
    saved: CaptionTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    theirs = AutoTokenizer.from_pretrained(str(tmp_path))
    assert isinstance(theirs, PreTrainedTokenizerFast)
    monkeypatch.setattr(tokenizer_files, "_by_transformers", None)
    ours = load_tokenizer(str(tmp_path))
    assert ours.to_json() == saved.to_json() == theirs.backend_tokenizer.to_str()
    assert (ours.vocab_size, ours.special_ids) == (len(theirs), frozenset(theirs.all_special_ids))
    if not ours.names_classes:
        padded = ours.encode(CAPTIONS, 40).tokens.tolist()
        for tokens, expected in zip(padded, theirs(CAPTIONS)["input_ids"], strict=True):
            assert tokens[: len(expected)] == expected
            assert ours.decode(tokens) == theirs.decode(tokens, skip_special_tokens=True)
    theirs.save_pretrained(str(tmp_path / "again"))
    assert load_tokenizer(str(tmp_path / "again")).digest == saved.digest


@pytest.mark.parametrize(
    "changes",
    [
        {"tokenizer_class": "BertTokenizer"},
        {"cls_token": {"__type": "AddedToken", "content": "[CLS]", "lstrip": True}},
        {"add_bos_token": True},
        {"extra_special_tokens": {"image_token": "[IMG]"}},
    ],
)
def test_a_folder_that_says_more_is_left_to_transformers(
    changes: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = train_tokenizer(CAPTIONS, vocab_size=60)
    expected.save(tmp_path)
    _edit(tmp_path, **changes)
    read: list[str] = []

    def by_transformers(name: str) -> tuple[Tokenizer, SpecialTokens]:
        read.append(name)
        return Tokenizer.from_str(expected.to_json()), SpecialTokens(pad_token="[PAD]")

    monkeypatch.setattr(tokenizer_files, "_by_transformers", by_transformers)
    load_tokenizer(str(tmp_path))
    assert read == [str(tmp_path)]


def test_a_tokenizer_of_another_class_is_written_as_a_plain_one(tmp_path: Path) -> None:
    """As transformers made it, which then is not needed any more."""
    train_tokenizer(CAPTIONS, vocab_size=60).save(tmp_path / "theirs")
    _edit(tmp_path / "theirs", tokenizer_class="BertTokenizer", do_lower_case=False)
    theirs = load_tokenizer(str(tmp_path / "theirs"))
    theirs.save(tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "tokenizer_config.json").read_text())["tokenizer_class"] == (
        "TokenizersBackend"
    )
    ours = load_tokenizer(str(tmp_path / "ours"))
    assert (ours.digest, ours.special_ids, ours.end_ids) == (theirs.digest, theirs.special_ids, theirs.end_ids)
    assert ours.encode(CAPTIONS, 20).tokens.tolist() == theirs.encode(CAPTIONS, 20).tokens.tolist()
