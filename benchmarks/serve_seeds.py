"""Counts candidates that are the same image in every way of requesting them from a server.

    python benchmarks/serve_seeds.py --model models/garments --out benchmarks/results/serve_seeds

Requests of ten candidates with different captions, seeds and sampling parameters are generated in several ways:

    pipeline     by engine.pipeline.Pipeline alone: the reference pixels
    concurrent   over HTTP, eight requests at a time: the reference bytes
    alone        one at a time, with fewer candidates
    streamed     as a stream with previews, four at a time
    workers      Ray Serve with two workers, eight at a time; both must have generated images

A candidate counts if every way gave the same PNG bytes, with the pipeline's pixels. The last line is one JSON document.
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

CANDIDATES = 10  # of a request
_OPTIONS: tuple[dict[str, float], ...] = (
    {},
    {"temperature": 0.7, "top_k": 50},
    {"guidance": 2.0},
    {"top_p": 0.9},
    {"temperature": 0.0},
)
Json = dict[str, Any]
CandidateImages = dict[int, bytes]  # candidate -> PNG


@dataclass(frozen=True)
class Request:
    """One request, sent in every way."""

    caption: str
    seed: int
    options: dict[str, float]
    num_alone: int  # candidates when it is sent alone

    def body(self, count: int) -> Json:
        return {"prompt": self.caption, "seed": self.seed, "n": 1, "candidates": count, **self.options}


@dataclass
class Count:
    """Compared and equal candidates of one way."""

    compared: int = 0
    equal: int = 0


@dataclass
class Counts:
    """Counts of all ways; a candidate that differs in any of them is inexact."""

    ways: dict[str, Count] = field(default_factory=dict)
    inexact: set[tuple[int, int]] = field(default_factory=set)  # (request, candidate)

    def compare(self, way: str, request: int, found: CandidateImages, wanted: CandidateImages, count: int) -> None:
        """Compares the first `count` candidates of a request; a missing image counts as different."""
        row = self.ways.setdefault(way, Count())
        for candidate in range(count):
            is_equal = candidate in found and found[candidate] == wanted.get(candidate)
            row.compared += 1
            row.equal += is_equal
            if not is_equal:
                self.inexact.add((request, candidate))


def requests(count: int, *, seed: int) -> list[Request]:
    """`count` requests, with seeds over the whole range."""
    rng, texts = random.Random(seed), captions()
    return [
        Request(
            rng.choice(texts),
            rng.choice((rng.randrange(2**32), rng.randrange(2**64))),
            _OPTIONS[number % len(_OPTIONS)],
            rng.randint(1, CANDIDATES),
        )
        for number in range(count)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="model folder (default: a tiny one with random weights)")
    parser.add_argument("--candidates", type=int, default=1000)
    parser.add_argument("--without-ray", action="store_true")
    parser.add_argument("--out", type=Path, help="folder for the JSON document")
    arguments = parser.parse_args()
    end_on_sigterm()
    sent, started_s = requests(-(-arguments.candidates // CANDIDATES), seed=11), time.perf_counter()
    document = {"benchmark": "serve_seeds", **facts(torch.device("cpu"))}
    with tempfile.TemporaryDirectory(prefix="serve-seeds-") as folder:
        model = arguments.model or Path(folder, "tiny-random")
        if arguments.model is None:
            write_random_model(model, tiny=True)
        counts, workers, model_facts = count_equal(model, sent, with_ray=not arguments.without_ray)
    total = len(sent) * CANDIDATES
    document |= {
        "config": {"model": model_facts, "requests": len(sent), "candidates": CANDIDATES},
        "exact": total - len(counts.inexact),
        "of": total,
        "ways": {way: vars(count) for way, count in counts.ways.items()},
        "images_by_worker": workers,
        "seconds": time.perf_counter() - started_s,
    }
    if arguments.out is not None:
        write_json(arguments.out / f"{slug(hardware_name(document))}.json", document)
    for way, count in counts.ways.items():
        print(f"{way:9} {count.equal} of {count.compared}")
    print(f"{document['exact']} of {total} candidates are the same in every way")
    print_document(document)
    return 0 if not counts.inexact else 1


def count_equal(model: Path, sent: Sequence[Request], *, with_ray: bool) -> tuple[Counts, list[float], Json]:
    """Counts of all ways, the images of each of two workers ([] without Ray), and the facts of the model."""
    counts = Counts()
    with serving("direct", {"model": str(model)}) as server:
        model_facts = asyncio.run(served_model(server.address))
        wanted = compare_one_worker(server, sent, counts)
    compare_pipeline(Pipeline.from_pretrained(model), sent, wanted, counts)
    if not with_ray:
        return counts, [], model_facts
    with serving("ray", {"model": str(model), "num_workers": 2}) as server:
        return counts, compare_two_workers(server, sent, wanted, counts), model_facts


def compare_one_worker(server: Server, sent: Sequence[Request], counts: Counts) -> list[CandidateImages]:
    """Compares `alone` and `streamed` with `concurrent`, whose images are returned."""
    wanted = asyncio.run(_all(server, sent, _plain, concurrency=8, is_whole=True))
    alone = asyncio.run(_all(server, sent, _plain, concurrency=1, is_whole=False))
    streamed = asyncio.run(_all(server, sent, _streamed, concurrency=4, is_whole=True))
    for number, request in enumerate(sent):
        counts.compare("alone", number, alone[number], wanted[number], request.num_alone)
        counts.compare("streamed", number, streamed[number], wanted[number], CANDIDATES)
    return wanted


def compare_pipeline(
    pipeline: Pipeline, sent: Sequence[Request], wanted: Sequence[CandidateImages], counts: Counts
) -> None:
    for number, request in enumerate(sent):
        pixels = {candidate: pixel_bytes(data) for candidate, data in wanted[number].items()}
        counts.compare("pipeline", number, pixels, _by_pipeline(pipeline, request), CANDIDATES)


def compare_two_workers(
    server: Server, sent: Sequence[Request], wanted: Sequence[CandidateImages], counts: Counts
) -> list[float]:
    """Compares two workers; returns the images of each. Raises RuntimeError if one of them has none."""
    found = asyncio.run(_all(server, sent, _plain, concurrency=8, is_whole=True))
    workers = asyncio.run(_images_by_worker(server, at_least=len(sent) * CANDIDATES))
    for number in range(len(sent)):
        counts.compare("workers", number, found[number], wanted[number], CANDIDATES)
    if sum(count > 0 for count in workers) < 2:
        raise RuntimeError(f"one worker generated all images: {workers}")
    return workers


Ask = Callable[[aiohttp.ClientSession, str, Request, int], Awaitable[CandidateImages]]


async def _all(
    server: Server, sent: Sequence[Request], ask: Ask, *, concurrency: int, is_whole: bool
) -> list[CandidateImages]:
    limit = asyncio.Semaphore(concurrency)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600)) as session:

        async def one(request: Request) -> CandidateImages:
            async with limit:
                return await ask(session, server.address, request, CANDIDATES if is_whole else request.num_alone)

        return await asyncio.gather(*(one(request) for request in sent))


async def _plain(session: aiohttp.ClientSession, address: str, request: Request, count: int) -> CandidateImages:
    body = request.body(count) | {"all_candidates": True}
    async with session.post(address + GENERATIONS, json=body) as reply:
        reply.raise_for_status()
        answer = await reply.json()
    return _images([*answer["data"], *answer["candidates"]])


async def _streamed(session: aiohttp.ClientSession, address: str, request: Request, count: int) -> CandidateImages:
    body = request.body(count) | {"all_candidates": True, "stream": True, "partial_images": 2, "progress": True}
    events = []
    async with session.post(address + GENERATIONS, json=body) as reply:
        reply.raise_for_status()
        async for line in reply.content:
            if line.startswith(b"data: "):
                events.append(json.loads(line.removeprefix(b"data: ")))
    final = ("image_generation.completed", "image_generation.candidate")
    return _images([event for event in events if event["type"] in final])


def _images(entries: Sequence[Json]) -> CandidateImages:
    return {one["candidate"]: base64.b64decode(one["b64_json"]) for one in entries}


def _by_pipeline(pipeline: Pipeline, request: Request) -> CandidateImages:
    """The pipeline's images in the form of `pixel_bytes`."""
    values = dict(request.options)
    sampling_params = SamplingParams(
        temperature=values.get("temperature", 1.0),
        top_k=int(values["top_k"]) if "top_k" in values else None,
        top_p=values.get("top_p"),
        guidance_scale=values.get("guidance", 1.0),
    )
    generation = pipeline([request.caption], candidates=CANDIDATES, seed=request.seed, sampling_params=sampling_params)[
        0
    ]
    return {one.candidate: np.asarray(one.image).tobytes() for one in generation.candidates}


def pixel_bytes(data: bytes) -> bytes:
    """A PNG's RGB values."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB")).tobytes()


async def _images_by_worker(server: Server, *, at_least: int) -> list[float]:
    """The images counted by each worker, once the processes have reported all of them."""
    for _ in range(50):
        samples = await read_metrics(server.address)
        generated = [one.value for one in samples if one.name == "kodalle_images_generated_total"]
        if sum(generated) >= at_least:
            return generated
        await asyncio.sleep(0.2)
    raise RuntimeError(f"the workers counted {generated} images, {at_least} were returned")


if __name__ == "__main__":
    sys.exit(main())
