"""Steady load on a server whose processes are killed, with every image compared with the pipeline's.

As a program, for a client on another host (benchmarks/serving/hosts.py): reads a `LoadSpec` as JSON from standard input,
sends requests for `seconds`, and prints the outcomes.
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
from serving.traffic import LoadRequest

_CLIENT_TIMEOUT_S = 180.0


@dataclass(frozen=True)
class Outcome:
    """The outcome of one request."""

    sent_s: float  # time.monotonic, which all processes of a machine share
    ended_s: float
    status: int  # 0: no complete response
    code: str  # of an error; the exception's name without a response
    image: str  # SHA-256 of the PNG; empty without one
    is_right: bool  # its pixels equal the pipeline's


@dataclass
class Outcomes:
    """All outcomes of a load, and the different files received for each request."""

    all: list[Outcome] = field(default_factory=list)
    files: dict[int, set[str]] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """Counts for the benchmark's document."""
        answered = [one for one in self.all if one.status == 200]
        took_s = [one.ended_s - one.sent_s for one in answered]
        return {
            "requests": len(self.all),
            "answered": len(answered),
            "refused": sum(one.status == 429 for one in self.all),
            "lost": dict(Counter(f"{one.status} {one.code}" for one in self.all if one.status not in (200, 429))),
            "wrong_pixels": sum(not one.is_right for one in answered),
            "requests_with_two_files": sum(len(files) > 1 for files in self.files.values()),
            "latency_s": {"p50": percentile(took_s, 0.5), "most": max(took_s)} if took_s else None,
        }


def pipeline_images(model: Path, requests: Sequence[LoadRequest]) -> dict[int, str]:
    """SHA-256 of the pixels that the pipeline alone returns for each request, by its number."""
    pipeline = Pipeline.from_pretrained(model)
    images = {}
    for one in requests:
        (generation,) = pipeline([one.caption], candidates=one.num_candidates, seed=one.seed)
        images[one.number] = _pixels(generation.top(1)[0].image)
    return images


def _pixels(image: Image.Image) -> str:
    return hashlib.sha256(np.ascontiguousarray(image.convert("RGB")).tobytes()).hexdigest()


@contextmanager
def steady_load(
    address: str, requests: Sequence[LoadRequest], expected: dict[int, str], *, concurrency: int
) -> Iterator[Outcomes]:
    """`concurrency` requests in flight while the block runs; on exit waits for the last of them."""
    outcomes, is_over = Outcomes(), threading.Event()
    thread = threading.Thread(
        target=lambda: asyncio.run(_load(address, requests, expected, concurrency, outcomes, is_over.is_set))
    )
    thread.start()
    try:
        yield outcomes
    finally:
        is_over.set()
        thread.join()


async def _load(
    address: str,
    requests: Sequence[LoadRequest],
    expected: dict[int, str],
    concurrency: int,
    outcomes: Outcomes,
    is_over: Callable[[], bool],
) -> None:
    pending = itertools.cycle(requests)
    timeout = aiohttp.ClientTimeout(total=_CLIENT_TIMEOUT_S)
    # One connection per request: a kept one could turn out closed long after a fault.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:

        async def sender() -> None:
            while not is_over():
                one = next(pending)
                outcome = await _send(session, address + GENERATIONS, one, expected[one.number])
                outcomes.all.append(outcome)
                if outcome.image:
                    outcomes.files.setdefault(one.number, set()).add(outcome.image)
                if outcome.status == 0:
                    await asyncio.sleep(0.1)  # no listener: retry slowly

        await asyncio.gather(*(sender() for _ in range(concurrency)))


async def _send(session: aiohttp.ClientSession, url: str, one: LoadRequest, expected: str) -> Outcome:
    sent_s = time.monotonic()
    try:
        headers = {"authorization": f"Bearer {one.key}"} if one.key else {}
        async with session.post(url, json=one.body(), headers=headers) as reply:
            body = await reply.read()
            status = reply.status
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        return Outcome(sent_s, time.monotonic(), 0, type(error).__name__, "", False)
    ended_s = time.monotonic()
    answer = json.loads(body)
    if status != 200:
        return Outcome(sent_s, ended_s, status, str(answer["error"]["code"]), "", False)
    content = base64.b64decode(answer["data"][0]["b64_json"])
    is_right = _pixels(Image.open(io.BytesIO(content))) == expected
    return Outcome(sent_s, ended_s, status, "", hashlib.sha256(content).hexdigest(), is_right)


@dataclass(frozen=True)
class LoadSpec:
    """A load to be run by a process of its own."""

    address: str
    requests: list[LoadRequest]
    expected: dict[int, str]
    concurrency: int
    seconds: float
    started_file: str  # created at the first answer, because the process takes seconds to start

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "LoadSpec":
        tree = json.loads(text)
        tree["requests"] = [LoadRequest(**one) for one in tree["requests"]]
        tree["expected"] = {int(number): image for number, image in tree["expected"].items()}
        return cls(**tree)


def parse_outcomes(printed: str) -> Outcomes:
    """The outcomes that such a process printed."""
    tree = json.loads(printed)
    files = {int(number): set(files) for number, files in tree["files"].items()}
    return Outcomes([Outcome(**one) for one in tree["outcomes"]], files)


def main() -> None:
    spec = LoadSpec.from_json(sys.stdin.read())
    with steady_load(spec.address, spec.requests, spec.expected, concurrency=spec.concurrency) as outcomes:
        while not outcomes.all:
            time.sleep(0.05)
        Path(spec.started_file).touch()
        time.sleep(spec.seconds)
    file_lists = {number: sorted(files) for number, files in outcomes.files.items()}
    print(json.dumps({"outcomes": [asdict(one) for one in outcomes.all], "files": file_lists}))


if __name__ == "__main__":
    main()
