from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from engine.data import compound_words
from engine.data.caption_guide import CaptionGuide, training_words
from engine.data.kfashion.caption_form import kfashion_form
from engine.data.kfashion.synonyms import SYNONYMS
from engine.data.prompt_words import PromptReader, PromptWords, UnknownWord, described
from engine.data.tokenizer import train_tokenizer
from serve.api.application import build_api
from serve.settings import ServeSettings
from tests.live_server import INFO, ScriptedPool, ask, post_json, serving

ENTRIES = {"[CLS]": 0, "[PAD]": 1, "[SEP]": 2, "[UNK]": 3, "빨강": 4, "셔츠": 5, "##는": 6, ".": 7, "a": 8}

CAPTIONS = [
    "상의에서 색상은 레드이다. 상의에서 카테고리는 티셔츠이다. 상의에서 소매기장은 반팔이다.",
    "상의에서 색상은 스카이블루이다. 상의에서 카테고리는 셔츠이다.",
    "하의에서 색상은 블랙이다. 하의에서 카테고리는 팬츠이다.",
]
ATTRIBUTES = {
    "상의": {"색상": ["레드", "스카이블루"], "카테고리": ["티셔츠", "셔츠"], "소매기장": ["반팔"]},
    "하의": {"색상": ["블랙"], "카테고리": ["팬츠"]},
}
GUIDE = CaptionGuide(
    attributes=ATTRIBUTES, form=kfashion_form(), synonyms=SYNONYMS, words=training_words([*CAPTIONS, *CAPTIONS[:1]])
)


@pytest.fixture(scope="module")
def reader() -> PromptReader:
    return PromptReader(train_tokenizer(CAPTIONS, vocab_size=400).to_json(), GUIDE)


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


def byte_level(texts: list[str]) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    from tokenizers import trainers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    return str(tokenizer.to_str())


def read(tokenizer_json: str, prompt: str) -> PromptWords:
    return PromptReader(tokenizer_json, CaptionGuide()).read(prompt)


@pytest.mark.parametrize(
    ("prompt", "counts", "unknown"),
    [
        ("빨강 셔츠는.", (6, 0, 2, 2), ()),
        ("하늘색 셔츠", (4, 1, 2, 1), ("하늘색",)),
        ("레두 티셔쓰 레두.", (6, 3, 3, 0), ("레두", "티셔쓰")),
        ("빨강하양 a", (4, 1, 2, 1), ("빨강하양",)),
        ("👕", (3, 1, 1, 0), ("👕",)),
        ("", (2, 0, 0, 0), ()),
    ],
)
def test_words_outside_the_vocabulary_are_counted_and_named_once(
    prompt: str, counts: tuple[int, ...], unknown: tuple[str, ...]
) -> None:
    found = read(word_piece(), prompt)
    assert (found.count, found.tokens_unknown, found.num_words, found.num_known) == counts
    assert found.words_unknown == unknown
    assert all(prompt[one.start : one.end] == one.word for one in found.unknown)


def test_a_class_is_one_token_known_or_not() -> None:
    assert read(classes(), "tench") == PromptWords(1, 0, 1, 1)
    assert read(classes(), "a cat") == PromptWords(1, 1, 1, 0, (UnknownWord("a cat", 0, 5),))


def test_the_whole_word_of_an_unknown_letter_is_named() -> None:
    found = read(byte_pairs(), "ab axb")
    assert (found.count, found.tokens_unknown, found.words_unknown) == (5, 1, ("axb",))


def test_punctuation_is_no_word_but_its_unknown_tokens_count() -> None:
    found = read(word_piece(), "? " * 500 + "!" * 500)
    assert (found.count, found.tokens_unknown, found.num_words, found.unknown) == (1002, 1000, 0, ())
    assert not found.all_known


@pytest.mark.parametrize("caption", CAPTIONS)
def test_every_training_caption_is_known(reader: PromptReader, caption: str) -> None:
    assert reader.read(caption).all_known


@pytest.mark.parametrize("tokenizer", [byte_level(CAPTIONS), byte_level(["some other text"])])
def test_a_tokenizer_that_has_pieces_for_everything_still_has_words_that_no_caption_had(tokenizer: str) -> None:
    reader = PromptReader(tokenizer, GUIDE)
    assert all(reader.read(caption).all_known for caption in CAPTIONS)
    found = reader.read("상의에서 색상은 qwert 이다.")
    assert "qwert" in found.words_unknown
    assert all(one.word == one.word.strip() for one in found.unknown)


def test_a_word_of_known_letters_that_training_never_read_is_unknown(reader: PromptReader) -> None:
    """`레드` is two entries of the vocabulary, made for numbering letters; no caption was ever tokenised so."""
    without = read(train_tokenizer(CAPTIONS, vocab_size=400).to_json(), "레드")
    assert without.all_known  # as far as the vocabulary says
    found = reader.read("레드")
    assert (found.num_known, found.words_unknown) == (0, ("레드",))


@pytest.mark.parametrize(
    ("prompt", "word", "suggestion", "value"),
    [
        ("하늘색 셔츠", "하늘색", "스카이블루이다", "스카이블루"),  # a synonym
        ("상의에서 색상은 하늘색이다.", "하늘색이다", "스카이블루이다", "스카이블루"),  # with its ending
        ("하늘색으로 된 옷", "하늘색으로", "스카이블루이다", "스카이블루"),
        ("남방", "남방", "셔츠이다", "셔츠"),
        ("a RED thing", "RED", "레드이다", "레드"),  # the form's English name
        ("light-blue shirt", "light-blue", "스카이블루이다", "스카이블루"),  # several words are one term
        ("short sleeved", "short sleeved", "반팔이다", "반팔"),
        ("레두", "레두", "레드이다", "레드"),  # one letter of four
        ("티셔쓰", "티셔쓰", "티셔츠이다", "티셔츠"),
        ("상의애서", "상의애서", "상의에서", None),  # a word of captions that is no value
        ("하늘섹", "하늘섹", "스카이블루이다", "스카이블루"),  # a synonym misspelt
        ("린넨", "린넨", None, None),  # a value that this model has never seen
        ("주황색", "주황색", None, None),
        ("퍼", "퍼", None, None),  # fur, and not the beginning of 퍼플이다
        ("스카이 블루 셔츠", "스카이 블루", "스카이블루이다", "스카이블루"),  # a value in two words
        ("청바지", "청바지", "팬츠이다", "팬츠"),  # what it is, where the model lacks it
        ("jeans", "jeans", "팬츠이다", "팬츠"),
        ("ＲＥＤ", "ＲＥＤ", "레드이다", "레드"),  # full width
        ("ⓡⓔⓓ", "ⓡⓔⓓ", "레드이다", "레드"),
        ("𝓻𝓮𝓭", "𝓻𝓮𝓭", "레드이다", "레드"),
        ("ﾩￇﾧￚ", "ﾩￇﾧￚ", "레드이다", "레드"),  # letters of half width
        ("ㄹㅔㄷㅡ", "ㄹㅔㄷㅡ", "레드이다", "레드"),  # letters one by one
        ("fpem", "fpem", "레드이다", "레드"),  # typed in the other keyboard layout
        ("TUCMFH", "TUCMFH", "셔츠이다", "셔츠"),  # … with Caps Lock, and an ending
        ("ㄱㄷㅇ", "ㄱㄷㅇ", "레드이다", "레드"),
        ("xltuCm", "xltuCm", "티셔츠이다", "티셔츠"),
        ("xltucmf", "xltucmf", "티셔츠이다", "티셔츠"),  # … and a letter too many
        ("하늘색 팬츠", "하늘색", "스카이블루이다", "스카이블루"),  # two values, and not one with an ending
        ("xl", "xl", None, None),  # 티 by its keys, and a size
        ("👕", "👕", None, None),
        ("👩‍👩‍👧", "👩‍👩‍👧", None, None),
        ("레" * 300, "레" * 300, None, None),
        ("봄에", "봄에", None, None),
    ],
)
def test_what_to_write_instead(
    reader: PromptReader, prompt: str, word: str, suggestion: str | None, value: str | None
) -> None:
    found = {one.word: one for one in reader.read(prompt).unknown}
    assert (found[word].suggestion, found[word].value) == (suggestion, value)
    if suggestion is not None:
        assert reader.read(suggestion).all_known


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("레드셔츠", ["레드: 레드이다", "셔츠: 셔츠이다"]),
        ("블랙팬츠", ["블랙: 블랙이다", "팬츠: 팬츠이다"]),
        ("하늘색바지", ["하늘색: 스카이블루이다", "바지: 팬츠이다"]),
        ("스카이블루티셔츠", ["스카이블루: 스카이블루이다", "티셔츠: 티셔츠이다"]),
        ("레드반팔티셔츠", ["레드: 레드이다", "반팔: 반팔이다", "티셔츠: 티셔츠이다"]),  # and not 반팔티, 셔츠
        ("검정티", ["검정: 블랙이다", "티: 티셔츠이다"]),
        ("셔츠레드", ["셔츠: 셔츠이다", "레드: 레드이다"]),  # in the order of the prompt
        ("레드셔츠를", ["레드: 레드이다", "셔츠를: 셔츠이다"]),  # an ending
        ("레드색셔츠입니다", ["레드: 레드이다", "색: None", "셔츠입니다: 셔츠이다"]),
        ("레드이다셔츠", ["레드이다: 레드이다", "셔츠: 셔츠이다"]),  # a word of captions
        ("상의에서색상은레드이다", ["상의에서: 상의에서", "색상은: 색상은", "레드이다: 레드이다"]),
        ("오버핏셔츠", ["오버핏: None", "셔츠: 셔츠이다"]),  # one part that this model has not
        ("레드벨벳셔츠", ["레드: 레드이다", "벨벳: None", "셔츠: 셔츠이다"]),
        ("레드불", ["레드: 레드이다", "불: None"]),
        ("레두셔츠", ["레두: 레드이다", "셔츠: 셔츠이다"]),  # misspelt
        ("redshirt", ["red: 레드이다", "shirt: 셔츠이다"]),
        ("RedShirts", ["Red: 레드이다", "Shirts: 셔츠이다"]),
        ("red-shirt", ["red: 레드이다", "shirt: 셔츠이다"]),
        ("t-shirt", ["t-shirt: 티셔츠이다"]),
        ("skyblueshirt", ["skyblue: 스카이블루이다", "shirt: 셔츠이다"]),
        ("blackjeans", ["black: 블랙이다", "jeans: 팬츠이다"]),
        ("linenshirt", ["linen: None", "shirt: 셔츠이다"]),
        ("red셔츠", ["red: 레드이다", "셔츠: 셔츠이다"]),
        ("fpemtucm", ["fpemtucm: 레드이다 셔츠이다"]),  # typed in the other keyboard layout
        ("커뮤니티", ["커뮤니티: None"]),  # 티 is in many words
        ("티비", ["티비: None"]),
        ("sacred", ["sacred: None"]),  # and red
        ("stopping", ["stopping: None"]),
    ],
)
def test_a_compound_is_named_by_its_parts(reader: PromptReader, prompt: str, parts: list[str]) -> None:
    """Its first part was suggested for all of it, or nothing."""
    found = reader.read(prompt).unknown
    assert [f"{one.word}: {one.suggestion}" for one in found] == parts
    assert all(prompt[one.start : one.end] == one.word for one in found)


def test_a_compound_counts_as_one_word(reader: PromptReader) -> None:
    found = reader.read("레드셔츠 블랙이다")
    assert (found.num_words, found.num_known, found.words_unknown) == (2, 1, ("레드", "셔츠"))
    assert "레드 (레드이다?), 셔츠 (셔츠이다?)" in found.fault


def test_a_long_word_takes_no_time_that_grows_with_its_square(
    reader: PromptReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_at: list[str] = []
    is_hangul = compound_words.is_hangul

    def counting(letter: str) -> bool:
        looked_at.append(letter)
        return is_hangul(letter)

    monkeypatch.setattr(compound_words, "is_hangul", counting)
    counts = []
    for length in (100, 1000):
        looked_at.clear()
        reader.read("가나다라" * (length // 4))
        reader.read("레두셔츠" * (length // 4))
        counts.append(len(looked_at))
    assert counts[1] < 20 * counts[0]


def test_without_attributes_suggestions_are_words_of_the_captions() -> None:
    guide = CaptionGuide(synonyms={"하늘색": "스카이블루", "bird": "새"}, words=training_words(CAPTIONS))
    reader = PromptReader(train_tokenizer(CAPTIONS, vocab_size=400).to_json(), guide)
    assert reader.read("하늘색 bird").unknown == (
        UnknownWord("하늘색", 0, 3, "스카이블루이다"),
        UnknownWord("bird", 4, 8),
    )


@settings(max_examples=60, deadline=None)
@given(prompt=st.text(alphabet=st.sampled_from("상의에서색은레드하늘 .-aTred shirt👕!"), max_size=60))
def test_marks_never_overlap_and_lie_in_the_prompt(reader: PromptReader, prompt: str) -> None:
    prompt = " ".join(prompt.split())
    found = reader.read(prompt)
    assert 0 <= found.num_known <= found.num_words
    assert (found.num_known < found.num_words) == bool(found.unknown)
    after = 0
    for one in found.unknown:
        assert after <= one.start < one.end
        assert prompt[one.start : one.end] == one.word
        after = one.end


def test_a_long_prompt_has_suggestions_for_its_first_words_alone(reader: PromptReader) -> None:
    """Each costs a comparison with every known word."""
    found = reader.read(" ".join(f"레두{chr(0xAC00 + number)}" for number in range(100)))
    assert len(found.unknown) == 100
    assert [one.suggestion for one in found.unknown[32:]] == [None] * 68


def test_unknown_words_in_a_line_of_text() -> None:
    words = (UnknownWord("레두", 0, 2, "레드이다"), UnknownWord("x", 3, 4), UnknownWord("x", 5, 6))
    assert described(words) == "레두 (레드이다?), x"


def test_tokenize_and_every_answer_name_the_words_that_the_model_does_not_know() -> None:
    pool = ScriptedPool(info=replace(INFO, tokenizer_json=word_piece()))
    unknown = {"tokens_unknown": 1, "words_unknown": ["하늘색"], "words_total": 2, "words_known": 1}
    with serving(build_api(pool, ServeSettings(page=False))) as port:
        counted = post_json(port, "/v1/tokenize", {"prompt": "하늘색 셔츠"}).json()
        answer = post_json(port, "/v1/images/generations", {"prompt": "하늘색 셔츠"}).json()
        stream = post_json(port, "/v1/images/generations", {"prompt": "하늘색 셔츠", "stream": True}).body.decode()
        known = post_json(port, "/v1/images/generations", {"prompt": "빨강 셔츠"}).json()
        schemas = ask(port, "GET", "/openapi.json").json()["components"]["schemas"]
    for fields in (counted, answer):
        assert fields | unknown == fields
    assert '"tokens_unknown": 1, "words_unknown": ["하늘색"], "words_total": 2, "words_known": 1' in stream
    assert (known["tokens_unknown"], known["words_unknown"], known["words_known"]) == (0, [], 2)
    assert counted["unknown"] == [{"word": "하늘색", "start": 0, "end": 3, "suggestion": None, "value": None}]
    assert {"tokens_unknown", "words_unknown", "unknown"} <= set(schemas["Tokens"]["required"])


@pytest.mark.parametrize(
    ("strict_server", "strict", "is_refused"),
    [(False, None, False), (False, True, True), (True, None, True), (True, False, False)],
)
def test_a_strict_request_or_server_refuses_unknown_words(
    strict_server: bool, strict: bool | None, is_refused: bool
) -> None:
    pool = ScriptedPool(info=replace(INFO, tokenizer_json=word_piece()))
    more = {} if strict is None else {"strict": strict}
    with serving(build_api(pool, ServeSettings(page=False, strict=strict_server))) as port:
        reply = post_json(port, "/v1/images/generations", {"prompt": "하늘색 셔츠", **more})
        known = post_json(port, "/v1/images/generations", {"prompt": "빨강 셔츠", **more})
        nothing = post_json(port, "/v1/images/generations", {"prompt": "!!", **more})
    assert (reply.status, nothing.status) == ((400, 400) if is_refused else (200, 200))
    assert known.status == 200
    if is_refused:
        assert (reply.error["code"], reply.error["param"]) == ("invalid_value", "prompt")
        assert "하늘색" in reply.error["message"]
        assert "하늘색" in reply.error["message_ko"]
    assert len(pool.jobs) == (1 if is_refused else 3)


@pytest.mark.parametrize("prompt", ["\u200b", "\u3164", "\ufeff \u200d", "\u2800"])
def test_a_prompt_in_which_nothing_is_visible_is_empty(prompt: str) -> None:
    with serving(build_api(ScriptedPool(), ServeSettings(page=False))) as port:
        reply = post_json(port, "/v1/images/generations", {"prompt": prompt})
    assert (reply.status, reply.error["param"]) == (400, "prompt")
    assert "empty" in reply.error["message"]
