"""What is asked of a server under test, and when: requests of three sizes, and arrivals that wait for nobody.

Arrivals are a Poisson process fixed before the run: a slow server does not slow its clients down, so its queue is seen.
Every run with the same seed has the same pattern, only faster or slower, and the same requests in the same order, so
that two servers, or two rates, differ in nothing else.
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
class Asked:
    """One request: `num_candidates` pictures drawn and ranked, the best one returned."""

    number: int
    caption: str
    seed: int
    num_candidates: int
    key: str = ""  # an API key; empty: none is sent

    def body(self) -> dict[str, Any]:
        """The JSON of POST /v1/images/generations."""
        return {"prompt": self.caption, "seed": self.seed, "candidates": self.num_candidates}

    def job(self, name: str) -> GenerationJob:
        """The same for a worker that is asked directly; `name` tells one run's jobs from another's."""
        return GenerationJob(
            request_id=f"{name}-{self.number}",
            key_id=self.key or "local",
            caption=self.caption,
            sampling_params=SamplingParams(seed=self.seed, candidates=self.num_candidates, top=1),
            deadline_s=600.0,
        )


def captions() -> list[str]:
    """All captions of the demo's garments, in the K-Fashion grammar: about 1,300."""
    told = {
        caption(Label("", "", None, None, (), (Garment(garment, 0, attributes),)))
        for drawn, colour in itertools.product(CATEGORIES, COLOURS)
        for third in drawn.third
        for garment, attributes in all_choices(drawn, colour, third)
    }
    return sorted(told)


def mixed(count: int, *, seed: int, sizes: Sequence[int] = SIZES) -> list[Asked]:
    """`count` requests with captions and seeds by chance.

    Each run of len(sizes) requests has every size once, in an order by chance: short runs hold equal work.
    """
    chance, told = random.Random(seed), captions()
    asked: list[Asked] = []
    while len(asked) < count:
        for size in chance.sample(list(sizes), len(sizes)):
            asked.append(Asked(len(asked), chance.choice(told), chance.randrange(2**32), size))
    return asked[:count]


def with_keys(asked: Sequence[Asked], keys: Sequence[str]) -> list[Asked]:
    """The same requests, their senders in turn; no keys: as they were."""
    if not keys:
        return list(asked)
    return [replace(one, key=keys[number % len(keys)]) for number, one in enumerate(asked)]


def poisson_times(rate: float, duration_s: float, *, seed: int) -> list[float]:
    """Seconds from the start at which requests are sent: independent gaps, exponential with mean 1 / rate."""
    chance, times, now_s = random.Random(seed), [], 0.0
    while (now_s := now_s + chance.expovariate(1.0) / rate) < duration_s:
        times.append(now_s)
    return times
