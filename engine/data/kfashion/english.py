"""K-Fashion captions in English, for readers without Korean: `Top: grey, second colour white, T-shirt, short sleeves`.

One phrase for each fact, in the caption's order; the words are those of the page's form. Different facts have different
phrases, so nothing of a caption is lost. A value outside the vocabulary stays as it is.
"""

from collections.abc import Sequence

from engine.data.caption_grammar import Fact
from engine.data.kfashion.caption_form import ENGLISH
from engine.data.kfashion.captions import JOIN
from engine.data.kfashion.labels import STYLE

# Where the value alone would not say what it is a value of.
_PHRASES = {
    "서브색상": "second colour {}",
    "기장": "{} length",
    "핏": "{} fit",
    "프린트": "{} print",
    "디테일": "with {}",
    "서브스타일": "second style {}",
}
_WHOLE_PHRASES = {
    ("소매기장", "없음"): "no sleeves",
    ("소매기장", "7부소매"): "three-quarter sleeves",
    ("프린트", "무지"): "no print",
    ("기장", "니렝스"): "knee length",
    ("넥라인", "후드"): "hooded",
    ("소재", "패딩"): "padded",
}
_STYLES = {
    STYLE: "Style",
    "클래식": "classic",
    "프레피": "preppy",
    "매니시": "mannish",
    "톰보이": "tomboy",
    "페미닌": "feminine",
    "로맨틱": "romantic",
    "섹시": "sexy",
    "히피": "hippie",
    "웨스턴": "western",
    "오리엔탈": "oriental",
    "모던": "modern",
    "소피스트케이티드": "sophisticated",
    "아방가르드": "avant-garde",
    "컨트리": "country",
    "리조트": "resort",
    "젠더리스": "genderless",
    "스포티": "sporty",
    "레트로": "retro",
    "키치": "kitsch",
    "힙합": "hip-hop",
    "펑크": "punk",
    "밀리터리": "military",
    "스트리트": "street",
}


def in_english(facts: Sequence[Fact]) -> str:
    """The English of a caption's facts: subjects separated by `; `, "" for no facts."""
    phrases: dict[str, list[str]] = {}
    for fact in facts:
        phrases.setdefault(fact.subject, []).append(_phrase(fact))
    return "; ".join(f"{_word(subject)}: {', '.join(own)}" for subject, own in phrases.items())


def _phrase(fact: Fact) -> str:
    whole = _WHOLE_PHRASES.get((fact.attribute, fact.value))
    values = " and ".join(_lower(_word(value)) for value in fact.value.split(JOIN))
    return whole or _PHRASES.get(fact.attribute, "{}").format(values)


def _word(korean: str) -> str:
    return _STYLES.get(korean) or ENGLISH.get(korean, korean)


def _lower(word: str) -> str:
    """The word inside a sentence: `T-shirt`, `V neck` and `Peter Pan collar` keep their capitals."""
    return word if word.startswith("Peter Pan") or not word[1:2].islower() else word[0].lower() + word[1:]
