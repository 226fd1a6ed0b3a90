"""How benchmarks name their machine, and where their documents go."""

import contextlib
import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.files import write_json

REPOSITORY = Path(__file__).resolve().parent.parent


def child_environment() -> dict[str, str]:
    """This process's environment, with the repository and the benchmarks' own packages importable."""
    paths = [str(REPOSITORY), str(REPOSITORY / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def hardware_name(machine_facts: dict[str, Any]) -> str:
    """`facts` -> one line for tables."""
    hardware = machine_facts["hardware"]
    if hardware["gpu"]:
        return str(hardware["gpu"]["name"])
    return f"{hardware['cores']} cores of {hardware['cpu']}"


def stored_path(path: Path) -> str:
    """A path for documents that others read: below the repository as it lies there, elsewhere its last name alone."""
    absolute = path if path.is_absolute() else Path.cwd() / path
    below = absolute.is_relative_to(REPOSITORY)
    return absolute.relative_to(REPOSITORY).as_posix() if below else absolute.name


def slug(text: str) -> str:
    """A file name: lower case letters, digits and hyphens."""
    without_marks = re.sub(r"\((r|tm)\)|cpu @", " ", text.lower())
    return re.sub(r"[^a-z0-9.]+", "-", without_marks).strip("-.")


def store_served(document: dict[str, Any], out: Path | None, *, prefix: str = "") -> None:
    """Adds the load at the end, and writes <out>/<prefix><hardware>.json; out: None writes nothing."""
    document["hardware"]["load_after"] = round(os.getloadavg()[0], 2)
    if out is not None:
        write_json(out / f"{prefix}{slug(hardware_name(document))}.json", document)


def store_document(document: dict[str, Any], out: Path | None, *, quick: bool, tag: str = "") -> Path:
    """Writes <out>/results/<benchmark>/<hardware><tag>.json.

    Args:
        out: default: benchmarks/; for a quick run, whose figures are no record, runs/benchmarks/.

    Returns:
        Where its plot belongs: <out>/plots/<benchmark>-<hardware><tag>.png.
    """
    folder = out or (REPOSITORY / "runs" / "benchmarks" if quick else REPOSITORY / "benchmarks")
    name = slug(hardware_name(document)) + tag + ("-quick" if quick else "")
    results = folder / "results" / document["benchmark"] / f"{name}.json"
    write_json(results, document)
    print(f"stored {results}", file=sys.stderr, flush=True)
    return folder / "plots" / f"{document['benchmark']}-{name}.png"


@contextlib.contextmanager
def kept_when_stopped(document: dict[str, Any]) -> Iterator[None]:
    """SIGINT and SIGTERM end the block, not the program: what was measured so far is worth storing.

    `stopped` in the document records it. Blocks inside end as they end at Ctrl-C: what they started is stopped.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        document["stopped"] = True
        print("stopped: storing what was measured", file=sys.stderr, flush=True)


def print_document(document: dict[str, Any]) -> None:
    """The last line of standard output, as one JSON document."""
    sys.stdout.flush()
    print(json.dumps(document, ensure_ascii=False), flush=True)
