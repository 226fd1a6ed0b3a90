"""Synthetic traffic: requests of three sizes, and Poisson arrival times.

Arrival times are fixed before the run: a slow server does not slow its clients down, so its queue becomes visible. Every
run with the same seed has the same pattern, only faster or slower, and the same requests in the same order, so that two
servers, or two rates, differ in nothing else.
"""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from engine.data.kfashion.captions import caption
from engine.data.kfashion.labels import Garment, Label
from engine.data.synthetic.drawing import COLOURS
from engine.data.synthetic.garments import CATEGORIES, all_choices
from engine.sampling_params import SamplingParams
from serve.messages import GenerationJob

SIZES = (1, 4, 16)  # candidates


@dataclass(frozen=True)
class LoadRequest:
    """One request: `num_candidates` images generated and ranked, the best one returned."""

    number: int
    caption: str
    seed: int
    num_candidates: int
    key: str = ""  # an API key; empty: none is sent

    def body(self) -> dict[str, Any]:
        """The JSON of POST /v1/images/generations."""
        return {"prompt": self.caption, "seed": self.seed, "candidates": self.num_candidates}

    def job(self, name: str) -> GenerationJob:
        """The same as a job for a worker; `name` distinguishes the jobs of several runs."""
        return GenerationJob(
            request_id=f"{name}-{self.number}",
            key_id=self.key or "local",
            caption=self.caption,
            sampling_params=SamplingParams(seed=self.seed, candidates=self.num_candidates, top=1),
            deadline_s=600.0,
        )


def captions() -> list[str]:
    """All captions of the demo's garments, in the K-Fashion grammar: about 1,300."""
    texts = {
        caption(Label("", "", None, None, (), (Garment(garment, 0, attributes),)))
        for drawn, colour in itertools.product(CATEGORIES, COLOURS)
        for third in drawn.third
        for garment, attributes in all_choices(drawn, colour, third)
    }
    return sorted(texts)


def mixed(count: int, *, seed: int, sizes: Sequence[int] = SIZES) -> list[LoadRequest]:
    """`count` requests with random captions and seeds.

    Each group of len(sizes) requests has every size once, in random order: short runs have equal work.
    """
    rng, texts = random.Random(seed), captions()
    requests: list[LoadRequest] = []
    while len(requests) < count:
        for size in rng.sample(list(sizes), len(sizes)):
            requests.append(LoadRequest(len(requests), rng.choice(texts), rng.randrange(2**32), size))
    return requests[:count]


def with_keys(requests: Sequence[LoadRequest], keys: Sequence[str]) -> list[LoadRequest]:
    """The requests with the keys in turn; without keys unchanged."""
    if not keys:
        return list(requests)
    return [replace(one, key=keys[number % len(keys)]) for number, one in enumerate(requests)]


def poisson_times(rate: float, duration_s: float, *, seed: int) -> list[float]:
    """Arrival times in seconds from the start: independent exponential gaps with mean 1 / rate."""
    rng, times, now_s = random.Random(seed), [], 0.0
    while (now_s := now_s + rng.expovariate(1.0) / rate) < duration_s:
        times.append(now_s)
    return times
