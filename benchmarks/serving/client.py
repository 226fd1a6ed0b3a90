"""Clients of a server under test, and what they saw.

Open loop: a request is sent when its time has come, whatever became of those before, and its latency counts from that
intended time. A client that waits for an answer before it sends the next would ask less of a slow server, and leave the
waiting out of the figures ("coordinated omission").
Closed loop: a fixed number in flight; it finds the throughput of a server that always has work.

Nothing is repeated: a refusal is a result.
"""

import asyncio
import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from serving.traffic import Asked

GENERATIONS = "/v1/images/generations"
# What a server tells of its model: enough to know it again, without where it lies.
MODEL_FACTS = ("id", "digest", "num_parameters", "image_size", "grid_size", "device")
_CONNECT_S = 10.0


@dataclass(frozen=True)
class Answer:
    """One request's end as its client saw it; times in seconds since the run began."""

    asked: Asked
    intended_s: float
    sent_s: float
    ended_s: float
    status: int  # 0: no HTTP answer
    code: str = ""  # the error's code, or the name of the exception
    retry_after_s: float | None = None
    timings_s: dict[str, float] = field(default_factory=dict)  # the worker's own
    body: bytes = b""

    @property
    def latency_s(self) -> float:
        """Infinite where no picture came."""
        return self.ended_s - self.intended_s if self.status == 200 else math.inf

    @property
    def took_s(self) -> float:
        """Whatever came."""
        return self.ended_s - self.intended_s


@dataclass(frozen=True)
class Run:
    """All answers of a run, in the order of their intended times."""

    answers: list[Answer]
    seconds: float  # until the last answer
    client_cpu_s: float


async def open_loop(address: str, asked: Sequence[Asked], times_s: Sequence[float], *, timeout_s: float) -> Run:
    """Sends each request at its time.

    Args:
        address: http://host:port.
        timeout_s: from a request's intended time; after it the client hangs up and has no answer.
    """
    assert len(asked) >= len(times_s), "a request for each arrival"
    async with _session() as session:
        begun, cpu_s = time.perf_counter(), time.process_time()
        sending = []
        for one, intended_s in zip(asked, times_s, strict=False):
            await asyncio.sleep(begun + intended_s - time.perf_counter())
            send = _send(session, address, one, begun=begun, intended_s=intended_s, timeout_s=timeout_s)
            sending.append(asyncio.create_task(send))
        answers = await asyncio.gather(*sending)
        return Run(answers, time.perf_counter() - begun, time.process_time() - cpu_s)


async def closed_loop(
    address: str, asked: Sequence[Asked], *, concurrency: int, timeout_s: float = 600.0, until_s: float = math.inf
) -> Run:
    """Sends the requests in turn, `concurrency` at a time; latencies count from the sending.

    Args:
        until_s: no request begins later than this.
    """
    coming, answers = iter(asked), list[Answer]()
    async with _session() as session:
        begun, cpu_s = time.perf_counter(), time.process_time()

        async def sender() -> None:
            for one in coming:
                now_s = time.perf_counter() - begun
                if now_s >= until_s:
                    return
                answers.append(await _send(session, address, one, begun=begun, intended_s=now_s, timeout_s=timeout_s))

        await asyncio.gather(*(sender() for _ in range(concurrency)))
        seconds, client_cpu_s = time.perf_counter() - begun, time.process_time() - cpu_s
    return Run(sorted(answers, key=lambda one: one.intended_s), seconds, client_cpu_s)


def _session() -> aiohttp.ClientSession:
    # One connection a request in flight, as many clients have; no proxies from the environment, no cookies.
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), cookie_jar=aiohttp.DummyCookieJar())


async def _send(
    session: aiohttp.ClientSession, address: str, one: Asked, *, begun: float, intended_s: float, timeout_s: float
) -> Answer:
    sent_s = time.perf_counter() - begun
    left_s = max(0.001, timeout_s - (sent_s - intended_s))
    headers = {"authorization": f"Bearer {one.key}"} if one.key else {}
    try:
        async with session.post(
            address + GENERATIONS,
            json=one.body(),
            headers=headers,
            timeout=aiohttp.ClientTimeout(total=left_s, connect=_CONNECT_S),
        ) as reply:
            body = await reply.read()
            ended_s = time.perf_counter() - begun
            status, retry_after = reply.status, reply.headers.get("retry-after")
    except (aiohttp.ClientError, TimeoutError) as error:
        return Answer(one, intended_s, sent_s, time.perf_counter() - begun, 0, type(error).__name__)
    told = _told(body)
    return Answer(
        one,
        intended_s,
        sent_s,
        ended_s,
        status,
        "" if status == 200 else str((told.get("error") or {}).get("code", "no error object")),
        None if retry_after is None else float(retry_after),
        told.get("timings_s", {}),
        body,
    )


def _told(body: bytes) -> dict[str, Any]:
    try:
        told = json.loads(body)
    except ValueError:  # a proxy's plain text
        return {}
    return told if isinstance(told, dict) else {}


async def served_model(address: str, *, key: str = "") -> dict[str, Any]:
    """What a server of ours says of its model: enough to know it again, without where it lies."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    async with _session() as session, session.get(f"{address}/v1/models", headers=headers) as reply:
        reply.raise_for_status()
        told = (await reply.json())["data"][0]
    return {name: told[name] for name in MODEL_FACTS}


async def read_metrics(address: str, *, key: str = "") -> list[Sample]:
    """All samples of a server's /metrics, of each of its processes."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    async with _session() as session, session.get(f"{address}/metrics", headers=headers) as reply:
        reply.raise_for_status()
        text = await reply.text()
    return [sample for family in text_string_to_metric_families(text) for sample in family.samples]


# ----------------------------------------------------------------------------------------------------------- figures


def percentile(values: Sequence[float], share: float) -> float:
    """The least value that at least `share` of all values do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(1, math.ceil(share * len(ordered) - 1e-9)) - 1]


def share_within(answers: Sequence[Answer], bound_s: float) -> float:
    """The part of all requests, refused and lost ones too, that got their picture within the bound."""
    return sum(one.latency_s <= bound_s for one in answers) / len(answers)


def summary(run: Run) -> dict[str, Any]:
    """Counts, and percentiles of the latencies of those that got a picture (None where none did)."""
    answers = run.answers
    latencies_s = [one.latency_s for one in answers if one.status == 200]
    return {
        "requests": len(answers),
        "answered": len(latencies_s),
        "pictures": sum(one.asked.num_candidates for one in answers if one.status == 200),
        "not_answered": dict(Counter(f"{one.status} {one.code}" for one in answers if one.status != 200)),
        "seconds": run.seconds,
        "latency_s": percentiles(latencies_s),
        "client_cpu_share": run.client_cpu_s / run.seconds,
        "client_late_s": percentile([one.sent_s - one.intended_s for one in answers], 0.99) if answers else None,
    }


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """p50, p95, p99, most; None without values."""
    if not values:
        return None
    return {
        "p50": percentile(values, 0.5),
        "p95": percentile(values, 0.95),
        "p99": percentile(values, 0.99),
        "most": max(values),
    }
