"""Traffic, clients and the search for goodput of the serving benchmarks: their arithmetic."""

import asyncio
import math
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI, Request

from engine.data.kfashion.captions import parse
from tests.live_server import serving as serving_app
from tests.paths import REPOSITORY


@pytest.fixture(scope="module", autouse=True)
def _scripts_importable() -> Iterator[None]:
    """Puts the scripts' folder on the path, as Python does when it runs a script."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(REPOSITORY / "benchmarks")
        yield


# ------------------------------------------------------------------------------------------------------------- traffic


def test_arrivals_are_a_poisson_process() -> None:
    """Gaps of an exponential distribution: mean and deviation 1 / rate, 63 % of them below the mean, uncorrelated."""
    from serving.traffic import poisson_times

    times = poisson_times(5.0, 4000.0, seed=3)
    gaps = np.diff(np.array(times))
    assert len(times) == pytest.approx(20_000, rel=0.03)
    assert gaps.mean() == pytest.approx(0.2, rel=0.03)
    assert gaps.std() == pytest.approx(0.2, rel=0.03)
    assert (gaps < gaps.mean()).mean() == pytest.approx(1 - math.exp(-1), abs=0.01)
    assert np.corrcoef(gaps[1:], gaps[:-1])[0, 1] == pytest.approx(0, abs=0.03)
    counts = np.histogram(times, bins=2000, range=(0, 4000))[0]
    assert counts.var() / counts.mean() == pytest.approx(1, abs=0.1)  # evenly spaced arrivals would have 0


def test_another_rate_has_the_same_pattern() -> None:
    from serving.traffic import poisson_times

    slow, fast = (poisson_times(rate, 100 / rate, seed=7) for rate in (1.0, 4.0))
    assert slow == pytest.approx([4 * time_s for time_s in fast])
    assert poisson_times(1.0, 100, seed=8)[:5] != slow[:5]


def test_requests_have_all_sizes_equally_often_and_captions_of_the_grammar() -> None:
    from serving.traffic import SIZES, mixed, with_keys

    requests = mixed(30, seed=1)
    for first in range(0, 30, 3):
        assert sorted(one.num_candidates for one in requests[first : first + 3]) == sorted(SIZES)
    assert len({one.num_candidates for one in requests[::3]}) > 1, "the order is random"
    assert requests == mixed(30, seed=1)
    assert requests != mixed(30, seed=2)
    for one in requests:
        triples = parse(one.caption)
        assert len(triples) == one.caption.count("이다.") >= 4
    assert [one.key for one in with_keys(requests[:4], ["a", "b"])] == ["a", "b", "a", "b"]


# -------------------------------------------------------------------------------------------------------------- client


def _requests(count: int) -> list[Any]:
    from serving.traffic import mixed

    return mixed(count, seed=4, sizes=(1,))


class _Server:
    """An application that answers when `expected` requests are open at the same time, and counts the most open ones."""

    def __init__(self, expected: int) -> None:
        self.app, self.most_open = FastAPI(), 0
        self._open, self._expected, self._all_open = 0, expected, asyncio.Event()
        self.app.post("/v1/images/generations")(self._generate)

    async def _generate(self, request: Request) -> dict[str, Any]:
        self._open += 1
        self.most_open = max(self.most_open, self._open)
        if self._open == self._expected:
            self._all_open.set()
        await self._all_open.wait()
        self._open -= 1
        return {"data": [], "timings_s": {"total": 0.0}}


def test_an_open_loop_does_not_wait_for_responses_and_a_closed_loop_does() -> None:
    from serving.client import closed_loop, open_loop

    server = _Server(expected=8)
    with serving_app(server.app) as port:
        times_s = [0.02 * number for number in range(8)]
        run = asyncio.run(open_loop(f"http://127.0.0.1:{port}", _requests(8), times_s, timeout_s=20))
    assert [one.status for one in run.answers] == [200] * 8
    assert run.answers[0].latency_s >= 0.1, "it was open until the last request arrived"
    server = _Server(expected=1)
    with serving_app(server.app) as port:
        run = asyncio.run(closed_loop(f"http://127.0.0.1:{port}", _requests(8), concurrency=1))
    assert [one.status for one in run.answers] == [200] * 8
    assert server.most_open == 1


def test_latency_counts_from_the_intended_time() -> None:
    """A delay of the client itself counts as latency."""
    from serving.client import open_loop

    async def delayed(address: str) -> Any:
        asyncio.get_running_loop().call_later(0.05, time.sleep, 0.4)
        return await open_loop(address, _requests(2), [0.0, 0.1], timeout_s=20)

    with serving_app(_Server(expected=1).app) as port:
        late = asyncio.run(delayed(f"http://127.0.0.1:{port}")).answers[1]
    assert late.sent_s - late.intended_s > 0.2
    assert late.latency_s - (late.ended_s - late.sent_s) > 0.2


def test_a_request_without_a_response_times_out() -> None:
    from serving.client import open_loop, share_within, summary

    server = _Server(expected=4)  # three requests stay open
    with serving_app(server.app) as port:
        run = asyncio.run(open_loop(f"http://127.0.0.1:{port}", _requests(3), [0.0, 0.0, 0.0], timeout_s=0.5))
    assert [(one.status, one.code) for one in run.answers] == [(0, "TimeoutError")] * 3
    answered = replace(run.answers[0], status=200)
    run = replace(run, answers=[answered, *run.answers[1:]])
    assert share_within(run.answers, 1e9) == pytest.approx(1 / 3)
    counts = summary(run)
    assert (counts["requests"], counts["answered"]) == (3, 1)
    assert counts["not_answered"] == {"0 TimeoutError": 2}
    assert counts["latency_s"]["most"] == answered.latency_s


def test_percentiles_are_occurring_values() -> None:
    from serving.client import percentile, percentiles

    rng = random.Random(5)
    for count in (1, 2, 19, 20, 21, 100, 999):
        values = [rng.random() for _ in range(count)]
        for share in (0.05, 0.5, 0.95, 0.99, 1.0):
            expected = np.quantile(values, share, method="inverted_cdf")
            assert percentile(values, share) == expected
            assert sum(value <= expected for value in values) >= share * count - 1e-9
    assert percentile([1.0] * 19 + [9.0], 0.95) == 1.0
    assert percentile([1.0] * 18 + [9.0] * 2, 0.95) == 9.0
    assert percentiles([]) is None


# ------------------------------------------------------------------------------------------------------------- goodput


@pytest.mark.parametrize("limit", [0.7, 3.3, 11.0])
def test_the_search_finds_the_highest_rate_that_holds(limit: float) -> None:
    from serving.goodput import RateSearch

    search = RateSearch(highest_guess=4.0)
    for _ in range(12):
        rate = search.next_rate()
        search.observe(rate, is_held=rate <= limit)
    assert search.found == pytest.approx(limit, rel=0.05)
    assert search.found <= limit


def test_a_server_that_holds_no_rate_has_none() -> None:
    from serving.goodput import RateSearch

    search = RateSearch(highest_guess=4.0)
    for _ in range(5):
        search.observe(search.next_rate(), is_held=False)
    assert search.found == 0
    assert search.next_rate() == pytest.approx(4.0 / 2**5)


def test_late_and_refused_requests_do_not_count() -> None:
    from serving.client import Answer, share_within

    (request,) = _requests(1)
    on_time = Answer(request, intended_s=1.0, sent_s=1.0, ended_s=2.0, status=200)
    late, refused = replace(on_time, ended_s=4.0), replace(on_time, status=429)
    assert share_within([on_time] * 19 + [late], 2.0) == 0.95
    assert share_within([on_time, refused], 2.0) == 0.5
