"""Whether a tokenizer's rules can make an endless text of a short one.

Rules that replace run one after the other: nine that turn one letter into 16 make 16^9 of it, 69 GB. The factor by which the
rules of a file may lengthen a text is bounded before they are run, which loading does with the added entries.
"""

from pathlib import Path
from typing import Any

from engine.errors import InputError
from engine.files import read_json

MOST_TIMES = 2000  # ALBERT's rules, the longest of the usual ones: 972
_MOST_RULES = 64
_TIMES = {
    "NFC": 3, "NFD": 4, "NFKC": 18, "NFKD": 18, "Precompiled": 18, "Lowercase": 3, "BertNormalizer": 6,
    "Strip": 1, "StripAccents": 1, "Nmt": 1, "Sequence": 1, "BertPreTokenizer": 1, "Whitespace": 1, "WhitespaceSplit": 1,
    "Split": 1, "Punctuation": 1, "Digits": 1,
}  # fmt: skip
_TIMES_OF_OTHERS = 4


def check_tokenizer_file(path: Path) -> None:
    """Raises InputError for a tokenizer.json that is no JSON object, or whose rules may lengthen a text too much."""
    tree = read_json(path, field="text.tokenizer", remedy="export the model again")
    if not isinstance(tree, dict):
        raise InputError("text.tokenizer", path, "is no tokenizer: export the model again")
    rules = [*_rules(tree.get("normalizer")), *_rules(tree.get("pre_tokenizer"))]
    times = 1
    for rule in rules:
        times *= _times(rule)
        if times > MOST_TIMES or len(rules) > _MOST_RULES:
            remedy = f"its rules may make a text more than {MOST_TIMES:,} times as long: use another tokenizer"
            raise InputError("text.tokenizer", path, remedy)


def _rules(tree: Any) -> list[dict[str, Any]]:
    if not isinstance(tree, dict):
        return []
    nested = [*(tree.get("normalizers") or []), *(tree.get("pretokenizers") or [])]
    return [tree, *(rule for one in nested for rule in _rules(one))]


def _times(rule: dict[str, Any]) -> int:
    if rule.get("type") == "Replace":
        pattern = rule.get("pattern")
        replaced = len(str(pattern.get("String") or "")) if isinstance(pattern, dict) else 0
        content = len(str(rule.get("content", "")))
        return max(1, -(-content // replaced)) if replaced else 1 + content  # a regular expression may match nothing
    if rule.get("type") in ("Prepend", "Metaspace"):
        return 1 + len(str(rule.get("prepend", "")) or str(rule.get("replacement", "")))
    return _TIMES.get(str(rule.get("type")), _TIMES_OF_OTHERS)
