"""A file of JSON lines that a killed process leaves whole up to a line, so that the next one goes on behind it.

Entries wait in memory for some seconds. Then everything that was written meanwhile, the images that they tell of among it, is
forced to the disk, and the entries after it: what a journal has is there, after a power failure too.
"""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

EVERY_S = 10.0
EVERY_ENTRIES = 2000  # in memory at most


class Journal:
    """Entries by number. Opening counts the whole lines of an earlier process and cuts off what is behind them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._waiting: list[str] = []
        self._written = time.monotonic()
        self._count = self._keep_whole_lines()

    def __len__(self) -> int:
        return self._count + len(self._waiting)

    def __iter__(self) -> Iterator[Any]:
        """All entries, in order; none may be added meanwhile."""
        self.flush()
        with self._path.open("rb") as file:
            for line in file:
                yield json.loads(line)

    def append(self, entry: Any) -> None:
        """Adds an entry, on the disk within some seconds."""
        self._waiting.append(json.dumps(entry, separators=(",", ":")) + "\n")  # ASCII: file names may be no UTF-8
        if len(self._waiting) >= EVERY_ENTRIES or time.monotonic() - self._written >= EVERY_S:
            self.flush()

    def flush(self) -> None:
        """Forces all entries to the disk, and before them all files of this machine."""
        if self._waiting:
            os.sync()  # one call: an fsync a file is a third of the time of preparing 3,000 images
            with self._path.open("ab") as file:
                file.write("".join(self._waiting).encode("ascii"))
                file.flush()
                os.fsync(file.fileno())
            self._count += len(self._waiting)
            self._waiting.clear()
        self._written = time.monotonic()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.flush()

    def _keep_whole_lines(self) -> int:
        self._path.touch()
        count, size = 0, 0
        with self._path.open("r+b") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                try:
                    json.loads(line)
                except ValueError:  # zeros, where a power failure took the content
                    break
                count += 1
                size += len(line)
            file.truncate(size)
        return count
