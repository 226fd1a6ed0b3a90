"""Counts candidates that are the same picture however a server is asked for them.

    python benchmarks/serve_seeds.py --model models/garments --out benchmarks/results/serve_seeds

Requests of ten candidates, with captions, seeds and options that differ, are drawn again and again:

    pipeline   by engine.pipeline.Pipeline alone: the pixels that all others must have
    crowd      over HTTP, eight requests at once: the bytes that all others must have
    alone      one at a time, and only some of the candidates asked for
    streamed   as a stream with previews, four at once
    workers    Ray Serve with two workers, eight at once; both must have drawn

A candidate counts when every way gave the same bytes of PNG, and these the pipeline's pixels. The last line is one JSON
document.
"""

import argparse
import asyncio
import base64
import io
import json
import random
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import torch
from machine_facts import hardware_name, print_document, slug
from PIL import Image
from sampling.plan import write_random_model
from serving.client import GENERATIONS, read_metrics, served_model
from serving.process import Server, end_on_sigterm, serving
from serving.traffic import captions

from engine.facts import facts
from engine.files import write_json
from engine.pipeline.pipeline import Pipeline
from engine.sampling_params import SamplingParams

EACH = 10  # candidates of a request
_OPTIONS: tuple[dict[str, float], ...] = (
    {},
    {"temperature": 0.7, "top_k": 50},
    {"guidance": 2.0},
    {"top_p": 0.9},
    {"temperature": 0.0},
)
Json = dict[str, Any]
Pictures = dict[int, bytes]  # candidate -> PNG


@dataclass(frozen=True)
class Request:
    """What is asked for in every way."""

    caption: str
    seed: int
    options: dict[str, float]
    num_alone: int  # candidates asked for when it is alone

    def body(self, count: int) -> Json:
        return {"prompt": self.caption, "seed": self.seed, "n": 1, "candidates": count, **self.options}


@dataclass
class Count:
    """Of one way: candidates compared, and those that are the same."""

    compared: int = 0
    equal: int = 0


@dataclass
class Counts:
    """Of all ways; a candidate that differs in one is not exact."""

    ways: dict[str, Count] = field(default_factory=dict)
    inexact: set[tuple[int, int]] = field(default_factory=set)  # (request, candidate)

    def compare(self, way: str, request: int, found: Pictures, wanted: Pictures, count: int) -> None:
        """The first `count` candidates of a request; a picture that is missing differs."""
        row = self.ways.setdefault(way, Count())
        for candidate in range(count):
            is_equal = candidate in found and found[candidate] == wanted.get(candidate)
            row.compared += 1
            row.equal += is_equal
            if not is_equal:
                self.inexact.add((request, candidate))


def requests(count: int, *, seed: int) -> list[Request]:
    """`count` of them; seeds over the whole range."""
    chance, told = random.Random(seed), captions()
    return [
        Request(
            chance.choice(told),
            chance.choice((chance.randrange(2**32), chance.randrange(2**64))),
            _OPTIONS[number % len(_OPTIONS)],
            chance.randint(1, EACH),
        )
        for number in range(count)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="model folder (default: a tiny one of random weights)")
    parser.add_argument("--candidates", type=int, default=1000)
    parser.add_argument("--without-ray", action="store_true")
    parser.add_argument("--out", type=Path, help="folder for the JSON document")
    arguments = parser.parse_args()
    end_on_sigterm()
    asked, begun = requests(-(-arguments.candidates // EACH), seed=11), time.perf_counter()
    document = {"benchmark": "serve_seeds", **facts(torch.device("cpu"))}
    with tempfile.TemporaryDirectory(prefix="serve-seeds-") as folder:
        model = arguments.model or Path(folder, "tiny-random")
        if arguments.model is None:
            write_random_model(model, tiny=True)
        counts, workers, told = count_equal(model, asked, with_ray=not arguments.without_ray)
    total = len(asked) * EACH
    document |= {
        "config": {"model": told, "requests": len(asked), "each": EACH},
        "exact": total - len(counts.inexact),
        "of": total,
        "ways": {way: vars(count) for way, count in counts.ways.items()},
        "pictures_by_worker": workers,
        "seconds": time.perf_counter() - begun,
    }
    if arguments.out is not None:
        write_json(arguments.out / f"{slug(hardware_name(document))}.json", document)
    for way, count in counts.ways.items():
        print(f"{way:9} {count.equal} of {count.compared}")
    print(f"{document['exact']} of {total} candidates are the same in every way")
    print_document(document)
    return 0 if not counts.inexact else 1


def count_equal(model: Path, asked: Sequence[Request], *, with_ray: bool) -> tuple[Counts, list[float], Json]:
    """All ways; how many pictures each of two workers drew, [] without Ray; and what the server says of its model."""
    counts = Counts()
    with serving("direct", {"model": str(model)}) as server:
        told = asyncio.run(served_model(server.address))
        wanted = compare_one_worker(server, asked, counts)
    compare_pipeline(Pipeline.from_pretrained(model), asked, wanted, counts)
    if not with_ray:
        return counts, [], told
    with serving("ray", {"model": str(model), "num_workers": 2}) as server:
        return counts, compare_two_workers(server, asked, wanted, counts), told


def compare_one_worker(server: Server, asked: Sequence[Request], counts: Counts) -> list[Pictures]:
    """`alone` and `streamed` against `crowd`, whose pictures are returned."""
    wanted = asyncio.run(_all(server, asked, _drawn, at_once=8, is_whole=True))
    alone = asyncio.run(_all(server, asked, _drawn, at_once=1, is_whole=False))
    streamed = asyncio.run(_all(server, asked, _streamed, at_once=4, is_whole=True))
    for number, request in enumerate(asked):
        counts.compare("alone", number, alone[number], wanted[number], request.num_alone)
        counts.compare("streamed", number, streamed[number], wanted[number], EACH)
    return wanted


def compare_pipeline(pipeline: Pipeline, asked: Sequence[Request], wanted: Sequence[Pictures], counts: Counts) -> None:
    for number, request in enumerate(asked):
        pixels = {candidate: pixel_bytes(data) for candidate, data in wanted[number].items()}
        counts.compare("pipeline", number, pixels, _by_pipeline(pipeline, request), EACH)


def compare_two_workers(
    server: Server, asked: Sequence[Request], wanted: Sequence[Pictures], counts: Counts
) -> list[float]:
    """Raises RuntimeError: one of them drew nothing."""
    found = asyncio.run(_all(server, asked, _drawn, at_once=8, is_whole=True))
    workers = asyncio.run(_pictures_by_worker(server, at_least=len(asked) * EACH))
    for number in range(len(asked)):
        counts.compare("workers", number, found[number], wanted[number], EACH)
    if sum(drawn > 0 for drawn in workers) < 2:
        raise RuntimeError(f"one worker drew everything: {workers}")
    return workers


Ask = Callable[[aiohttp.ClientSession, str, Request, int], Awaitable[Pictures]]


async def _all(server: Server, asked: Sequence[Request], ask: Ask, *, at_once: int, is_whole: bool) -> list[Pictures]:
    limit = asyncio.Semaphore(at_once)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600)) as session:

        async def one(request: Request) -> Pictures:
            async with limit:
                return await ask(session, server.address, request, EACH if is_whole else request.num_alone)

        return await asyncio.gather(*(one(request) for request in asked))


async def _drawn(session: aiohttp.ClientSession, address: str, request: Request, count: int) -> Pictures:
    body = request.body(count) | {"all_candidates": True}
    async with session.post(address + GENERATIONS, json=body) as reply:
        reply.raise_for_status()
        answer = await reply.json()
    return _pictures([*answer["data"], *answer["candidates"]])


async def _streamed(session: aiohttp.ClientSession, address: str, request: Request, count: int) -> Pictures:
    body = request.body(count) | {"all_candidates": True, "stream": True, "partial_images": 2, "progress": True}
    events = []
    async with session.post(address + GENERATIONS, json=body) as reply:
        reply.raise_for_status()
        async for line in reply.content:
            if line.startswith(b"data: "):
                events.append(json.loads(line.removeprefix(b"data: ")))
    final = ("image_generation.completed", "image_generation.candidate")
    return _pictures([event for event in events if event["type"] in final])


def _pictures(told: Sequence[Json]) -> Pictures:
    return {one["candidate"]: base64.b64decode(one["b64_json"]) for one in told}


def _by_pipeline(pipeline: Pipeline, request: Request) -> Pictures:
    """Pixels, as `pixel_bytes` gives them."""
    told = dict(request.options)
    options = SamplingParams(
        temperature=told.get("temperature", 1.0),
        top_k=int(told["top_k"]) if "top_k" in told else None,
        top_p=told.get("top_p"),
        guidance_scale=told.get("guidance", 1.0),
    )
    generation = pipeline([request.caption], candidates=EACH, seed=request.seed, sampling_params=options)[0]
    return {one.candidate: np.asarray(one.image).tobytes() for one in generation.candidates}


def pixel_bytes(data: bytes) -> bytes:
    """A PNG's RGB values."""
    with Image.open(io.BytesIO(data)) as picture:
        return np.asarray(picture.convert("RGB")).tobytes()


async def _pictures_by_worker(server: Server, *, at_least: int) -> list[float]:
    """What each worker counted, once the processes have told each other all of it."""
    for _ in range(50):
        samples = await read_metrics(server.address)
        drawn = [one.value for one in samples if one.name == "kodalle_images_generated_total"]
        if sum(drawn) >= at_least:
            return drawn
        await asyncio.sleep(0.2)
    raise RuntimeError(f"the workers counted {drawn} pictures, {at_least} were answered")


if __name__ == "__main__":
    sys.exit(main())
