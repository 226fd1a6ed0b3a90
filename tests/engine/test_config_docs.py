"""docs/configuration.md describes what engine/config/ accepts."""

from collections.abc import Iterator

import pytest

from engine.config.section import Section
from engine.config_docs import COMMAND, RUNS, configuration_page
from tests.paths import REPOSITORY

PAGE = REPOSITORY / "docs" / "configuration.md"


def _sections(kind: type[Section]) -> Iterator[type[Section]]:
    yield kind
    for field in kind.model_fields.values():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from _sections(field.annotation)


SECTIONS = sorted({section for run in RUNS for section in _sections(run)}, key=lambda section: section.__name__)


def test_stored_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == configuration_page(), f"docs/configuration.md is stale: run {COMMAND}"


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_key_is_on_the_page(section: type[Section]) -> None:
    page = configuration_page()
    for name, field in section.model_fields.items():
        is_section = isinstance(field.annotation, type) and issubclass(field.annotation, Section)
        assert (f"### `{name}:`" if is_section else f"| `{name}` |") in page
        assert is_section or field.description or name == "stage", name


def test_a_row_has_type_bounds_default_and_description() -> None:
    page = configuration_page()
    assert "| `dropout` | number, ≥ 0, < 1 | `0.1` | in the projections and the text encoder |" in page
    assert "| `steps` | integer or `null`, > 0 | `null` |" in page
    assert "| `tokenizer` | text | `klue/roberta-base` |" in page  # KoCLIP's own default
    assert "| `pairs` | path | required |" in page
    assert "| `channel_multipliers` | list of integers | `[1, 1, 2, 2, 4]` |" in page
    assert "| `order_annealing` | section or `null` | `null` |" in page
    assert "### `order_annealing:`" in page
    assert "| `end` | number, ≥ 0, ≤ 1 | `0.75` |" in page
    assert "| `flip` | `true` or `false` | `false` |" in page
