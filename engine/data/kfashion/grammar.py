"""K-Fashion's caption grammar as `engine.data.caption_grammar.CaptionGrammar`."""

from collections.abc import Sequence

from engine.data.caption_grammar import Fact
from engine.data.caption_guide import CaptionForm
from engine.data.kfashion.caption_form import kfashion_form
from engine.data.kfashion.captions import parse, write_sentence
from engine.data.kfashion.colours import COLOUR_ATTRIBUTE
from engine.data.kfashion.english import in_english
from engine.data.kfashion.synonyms import SYNONYMS


class KFashionGrammar:
    """Sentences `{garment}에서 {attribute}은 {value}이다.`; see engine.data.kfashion.captions."""

    subject_attribute = "garment"
    class_attribute = "카테고리"

    def facts(self, caption: str) -> list[Fact]:
        return parse(caption)

    def write(self, facts: Sequence[Fact]) -> str:
        return " ".join(write_sentence(fact) for fact in facts)

    def in_english(self, caption: str) -> str:
        return in_english(parse(caption)) or caption

    def subject_phrase(self, sentence: str) -> str:
        first = sentence.partition(" ")[0]
        return first if first.endswith("에서") else ""

    def is_colour(self, attribute: str) -> bool:
        return attribute.endswith(COLOUR_ATTRIBUTE)  # 색상, 서브색상

    def form(self) -> CaptionForm:
        return kfashion_form()

    def synonyms(self) -> dict[str, str]:
        return dict(SYNONYMS)
