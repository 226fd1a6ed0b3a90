"""Records that are not used, with their causes, and kinds of records that are used but worth knowing.

Each is counted, and the first of each kind are kept for the report; all records that are not used go to a file.
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from engine.errors import InputError

EXAMPLES = 20  # of each kind, in reports
# Incomplete labels are normal in large data sets: counted and named, but no fault. So are labels without a photograph, of
# which deliveries have more than with one: where the two do not find each other, photographs are left over too.
NORMAL = (
    ("object_without_box", "object_without_label", "label_without_object", "no_outline")
    + ("label_without_photo", "duplicate_label", "duplicate_photo", "in_both_splits")
)  # fmt: skip


@dataclass(frozen=True)
class Skipped:
    """A record of the source that is not used."""

    record: str
    cause: str
    reason: str

    @property
    def is_bad(self) -> bool:
        return self.cause not in NORMAL


@dataclass(frozen=True)
class Examples:
    """How many there are of a kind, and the first ones as (record, reason)."""

    count: int
    first: tuple[tuple[str, str], ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "count": self.count,
            "examples": [{"record": record, "reason": reason} for record, reason in self.first],
        }


class Finds:
    """Counts by kind, with the first examples."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._first: dict[str, list[tuple[str, str]]] = {}

    def add(self, kind: str, record: str, reason: str) -> None:
        self._counts[kind] = self._counts.get(kind, 0) + 1
        first = self._first.setdefault(kind, [])
        if len(first) < EXAMPLES:
            first.append((record, reason))

    def by_kind(self) -> dict[str, Examples]:
        """Sorted by kind."""
        return {kind: Examples(self._counts[kind], tuple(self._first[kind])) for kind in sorted(self._counts)}

    def count(self, kind: str) -> int:
        return self._counts.get(kind, 0)


class Skips:
    """Records set aside: each goes to a file, counts and first ones stay here.

    Args:
        strict: the first that is bad is an InputError.
    """

    def __init__(self, *, strict: bool) -> None:
        self._strict = strict
        self._finds = Finds()
        self._file: TextIO | None = None
        self._first_bad: Skipped | None = None
        self.count = 0
        self.bad = 0

    @contextlib.contextmanager
    def writing(self, path: Path) -> Iterator[None]:
        """Writes what is added within the block to `path`, one line of JSON a record."""
        with path.open("w", encoding="utf-8") as self._file:
            yield

    def add(self, item: Skipped) -> None:
        """Raises InputError if strict and the record is bad."""
        if self._strict and item.is_bad:
            raise InputError(item.record, item.cause, f"{item.reason} (without strict it is set aside)")
        self.count += 1
        self.bad += item.is_bad
        if item.is_bad and self._first_bad is None:
            self._first_bad = item
        self._finds.add(item.cause, item.record, item.reason)
        if self._file is not None:
            self._file.write(json.dumps(asdict(item), ensure_ascii=False) + "\n")

    def by_cause(self) -> dict[str, Examples]:
        """Sorted by cause."""
        return self._finds.by_kind()

    def summary_of_bad(self) -> str:
        """Counts of the bad by cause, the commonest first, and the first bad record."""
        counts = {cause: each.count for cause, each in self.by_cause().items() if cause not in NORMAL}
        causes = ", ".join(f"{cause} {counts[cause]}" for cause in sorted(counts, key=lambda cause: -counts[cause]))
        first = self._first_bad
        return f"({causes}), the first: {first.record}: {first.reason}" if first is not None else "(none)"
