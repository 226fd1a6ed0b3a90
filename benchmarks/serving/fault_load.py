"""Steady requests at a server in which things are killed, each answer compared with what the pipeline draws.

As a program, for a client on another host (benchmarks/serving/hosts.py): reads a `Plan` as JSON from standard input, sends
until `seconds` are over, and prints the outcomes.
"""

import asyncio
import base64
import hashlib
import io
import itertools
import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from PIL import Image

from engine.pipeline.pipeline import Pipeline
from serving.client import GENERATIONS, percentile
from serving.traffic import Asked

_CLIENT_TIMEOUT_S = 180.0


@dataclass(frozen=True)
class Outcome:
    """How one request ended."""

    sent_s: float  # time.monotonic, which all processes of a machine share
    ended_s: float
    status: int  # 0: no whole answer
    code: str  # of an error; the exception's name without an answer
    picture: str  # SHA-256 of the PNG; empty without one
    is_right: bool  # its pixels are the pipeline's


@dataclass
class Seen:
    """All outcomes of a load, and the different files that came for one request."""

    outcomes: list[Outcome] = field(default_factory=list)
    files: dict[int, set[str]] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """Counts for the record."""
        answered = [one for one in self.outcomes if one.status == 200]
        took_s = [one.ended_s - one.sent_s for one in answered]
        return {
            "requests": len(self.outcomes),
            "answered": len(answered),
            "refused": sum(one.status == 429 for one in self.outcomes),
            "lost": dict(Counter(f"{one.status} {one.code}" for one in self.outcomes if one.status not in (200, 429))),
            "wrong_pixels": sum(not one.is_right for one in answered),
            "requests_with_two_files": sum(len(files) > 1 for files in self.files.values()),
            "latency_s": {"p50": percentile(took_s, 0.5), "most": max(took_s)} if took_s else None,
        }


def pipeline_pictures(model: Path, asked: Sequence[Asked]) -> dict[int, str]:
    """SHA-256 of the pixels that the pipeline alone returns for each request, by its number."""
    pipeline = Pipeline.from_pretrained(model)
    pictures = {}
    for one in asked:
        (generation,) = pipeline([one.caption], candidates=one.num_candidates, seed=one.seed)
        pictures[one.number] = _pixels(generation.top(1)[0].image)
    return pictures


def _pixels(image: Image.Image) -> str:
    return hashlib.sha256(np.ascontiguousarray(image.convert("RGB")).tobytes()).hexdigest()


@contextmanager
def steady_load(address: str, asked: Sequence[Asked], expected: dict[int, str], *, concurrency: int) -> Iterator[Seen]:
    """`concurrency` requests in flight while the block runs, and until the last of them has ended."""
    seen, is_over = Seen(), threading.Event()
    thread = threading.Thread(
        target=lambda: asyncio.run(_load(address, asked, expected, concurrency, seen, is_over.is_set))
    )
    thread.start()
    try:
        yield seen
    finally:
        is_over.set()
        thread.join()


async def _load(
    address: str,
    asked: Sequence[Asked],
    expected: dict[int, str],
    concurrency: int,
    seen: Seen,
    is_over: Callable[[], bool],
) -> None:
    coming = itertools.cycle(asked)
    timeout = aiohttp.ClientTimeout(total=_CLIENT_TIMEOUT_S)
    # A connection a request: one that was kept would be found closed after a fault that has long passed.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:

        async def sender() -> None:
            while not is_over():
                one = next(coming)
                outcome = await _ask(session, address + GENERATIONS, one, expected[one.number])
                seen.outcomes.append(outcome)
                if outcome.picture:
                    seen.files.setdefault(one.number, set()).add(outcome.picture)
                if outcome.status == 0:
                    await asyncio.sleep(0.1)  # nobody listens: once in a while is enough

        await asyncio.gather(*(sender() for _ in range(concurrency)))


async def _ask(session: aiohttp.ClientSession, url: str, one: Asked, expected: str) -> Outcome:
    sent_s = time.monotonic()
    try:
        headers = {"authorization": f"Bearer {one.key}"} if one.key else {}
        async with session.post(url, json=one.body(), headers=headers) as reply:
            body = await reply.read()
            status = reply.status
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        return Outcome(sent_s, time.monotonic(), 0, type(error).__name__, "", False)
    ended_s = time.monotonic()
    told = json.loads(body)
    if status != 200:
        return Outcome(sent_s, ended_s, status, str(told["error"]["code"]), "", False)
    content = base64.b64decode(told["data"][0]["b64_json"])
    is_right = _pixels(Image.open(io.BytesIO(content))) == expected
    return Outcome(sent_s, ended_s, status, "", hashlib.sha256(content).hexdigest(), is_right)


@dataclass(frozen=True)
class Plan:
    """A load of its own process."""

    address: str
    asked: list[Asked]
    expected: dict[int, str]
    concurrency: int
    seconds: float
    begun_file: str  # made when the first answer is there: the process takes seconds to start

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        tree = json.loads(text)
        tree["asked"] = [Asked(**one) for one in tree["asked"]]
        tree["expected"] = {int(number): picture for number, picture in tree["expected"].items()}
        return cls(**tree)


def seen_of(printed: str) -> Seen:
    """What such a process printed."""
    tree = json.loads(printed)
    files = {int(number): set(files) for number, files in tree["files"].items()}
    return Seen([Outcome(**one) for one in tree["outcomes"]], files)


def main() -> None:
    plan = Plan.from_json(sys.stdin.read())
    with steady_load(plan.address, plan.asked, plan.expected, concurrency=plan.concurrency) as seen:
        while not seen.outcomes:
            time.sleep(0.05)
        Path(plan.begun_file).touch()
        time.sleep(plan.seconds)
    told = {number: sorted(files) for number, files in seen.files.items()}
    print(json.dumps({"outcomes": [asdict(one) for one in seen.outcomes], "files": told}))


if __name__ == "__main__":
    main()
