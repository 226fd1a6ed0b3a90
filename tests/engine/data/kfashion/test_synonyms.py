"""The table of synonyms leads to K-Fashion's values, and takes no value's own name away from it."""

from engine.data.kfashion.caption_form import ENGLISH
from engine.data.kfashion.labels import VOCABULARY
from engine.data.kfashion.synonyms import BROADER, SYNONYMS

VALUES = {value for values in VOCABULARY.values() for value in values}


def test_every_synonym_leads_to_a_value() -> None:
    assert set(SYNONYMS.values()) <= VALUES
    assert SYNONYMS["하늘색"] == "스카이블루"
    assert SYNONYMS["남방"] == "셔츠"


def test_no_synonym_is_itself_a_value_or_the_english_name_of_another() -> None:
    assert set(SYNONYMS) & VALUES == BROADER.keys()  # for models that lack them
    named = {shown.casefold(): value for value, shown in ENGLISH.items() if value in VALUES}
    assert {word: value for word, value in SYNONYMS.items() if named.get(word, value) != value} == {}


def test_synonyms_are_written_as_they_are_looked_up() -> None:
    assert all(word == word.casefold().strip() for word in SYNONYMS)
