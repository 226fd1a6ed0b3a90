from dataclasses import replace

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from serve.api.application import build_api
from serve.api.prompt_tokens import PromptTokens, prompt_tokens
from serve.settings import ServeSettings
from tests.live_server import INFO, ScriptedPool, ask, post_json, serving

ENTRIES = {"[CLS]": 0, "[PAD]": 1, "[SEP]": 2, "[UNK]": 3, "빨강": 4, "셔츠": 5, "##는": 6, ".": 7, "a": 8}


def word_piece() -> str:
    """A tokenizer as trained ones are: words into pieces, [UNK] for a word with a piece that it lacks."""
    tokenizer = Tokenizer(models.WordPiece(ENTRIES, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 2)]
    )
    return str(tokenizer.to_str())


def classes() -> str:
    return str(Tokenizer(models.WordLevel({"tench": 0, "goldfish": 1}, unk_token="")).to_str())


def byte_pairs() -> str:
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "<unk>": 2}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return str(tokenizer.to_str())


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("빨강 셔츠는.", PromptTokens(6, 0, ())),
        ("하늘색 셔츠", PromptTokens(4, 1, ("하늘색",))),
        ("레두 티셔쓰 레두.", PromptTokens(6, 3, ("레두", "티셔쓰"))),
        ("빨강하양 a", PromptTokens(4, 1, ("빨강하양",))),
        ("👕", PromptTokens(3, 1, ("👕",))),
        ("", PromptTokens(2, 0, ())),
    ],
)
def test_words_outside_the_vocabulary_are_counted_and_named_once(prompt: str, expected: PromptTokens) -> None:
    assert prompt_tokens(word_piece(), prompt) == expected


def test_a_class_is_one_token_known_or_not() -> None:
    assert prompt_tokens(classes(), "tench") == PromptTokens(1, 0, ())
    assert prompt_tokens(classes(), "a cat") == PromptTokens(1, 1, ("a cat",))


def test_the_whole_word_of_an_unknown_letter_is_named() -> None:
    assert prompt_tokens(byte_pairs(), "ab axb") == PromptTokens(5, 1, ("axb",))


def test_tokenize_and_every_answer_name_the_words_that_the_model_does_not_know() -> None:
    pool = ScriptedPool(info=replace(INFO, tokenizer_json=word_piece()))
    unknown = {"tokens_unknown": 1, "words_unknown": ["하늘색"]}
    with serving(build_api(pool, ServeSettings(page=False))) as port:
        counted = post_json(port, "/v1/tokenize", {"prompt": "하늘색 셔츠"}).json()
        answer = post_json(port, "/v1/images/generations", {"prompt": "하늘색 셔츠"}).json()
        stream = post_json(port, "/v1/images/generations", {"prompt": "하늘색 셔츠", "stream": True}).body.decode()
        known = post_json(port, "/v1/images/generations", {"prompt": "빨강 셔츠"}).json()
        schemas = ask(port, "GET", "/openapi.json").json()["components"]["schemas"]
    for fields in (counted, answer):
        assert fields | unknown == fields
    assert '"tokens_unknown": 1, "words_unknown": ["하늘색"]' in stream
    assert (known["tokens_unknown"], known["words_unknown"]) == (0, [])
    assert {"tokens_unknown", "words_unknown"} <= set(schemas["Tokens"]["required"])


def test_a_prompt_of_unknown_marks_names_each_once() -> None:
    read = prompt_tokens(word_piece(), "? " * 500 + "!" * 500)
    assert (read.count, read.unknown, read.unknown_words) == (1002, 1000, ("?", "!"))
