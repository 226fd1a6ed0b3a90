"""HTTP clients of a server under test, with open and closed loops.

Open loop: each request is sent at its intended time, whether or not earlier ones have been answered, and its latency counts
from that time. A client that waits for an answer before it sends the next request would send fewer to a slow server and
leave the waiting out of the results ("coordinated omission").
Closed loop: a fixed number of requests in flight; measures the throughput of a server that always has work.

Requests are not retried: a refusal is a result.
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

from serving.traffic import LoadRequest

GENERATIONS = "/v1/images/generations"
# Fields of /v1/models that identify a model without its path.
MODEL_FACTS = ("id", "digest", "num_parameters", "image_size", "grid_size", "device")
_CONNECT_S = 10.0


@dataclass(frozen=True)
class Answer:
    """The outcome of one request at its client; times in seconds since the start of the run."""

    request: LoadRequest
    intended_s: float
    sent_s: float
    ended_s: float
    status: int  # 0: no HTTP answer
    code: str = ""  # the error's code, or the name of the exception
    retry_after_s: float | None = None
    timings_s: dict[str, float] = field(default_factory=dict)  # from the response
    body: bytes = b""

    @property
    def latency_s(self) -> float:
        """From the intended time to the last byte; infinite without an image."""
        return self.ended_s - self.intended_s if self.status == 200 else math.inf

    @property
    def took_s(self) -> float:
        """From the intended time to the last byte, of any outcome."""
        return self.ended_s - self.intended_s


@dataclass(frozen=True)
class LoadRun:
    """All answers of a run, in the order of their intended times."""

    answers: list[Answer]
    seconds: float  # until the last answer
    client_cpu_s: float


async def open_loop(
    address: str, requests: Sequence[LoadRequest], times_s: Sequence[float], *, timeout_s: float
) -> LoadRun:
    """Sends each request at its time.

    Args:
        address: http://host:port.
        timeout_s: from a request's intended time; then the client disconnects.
    """
    assert len(requests) >= len(times_s), "a request for each arrival"
    async with _session() as session:
        started_s, cpu_s = time.perf_counter(), time.process_time()
        sending = []
        for one, intended_s in zip(requests, times_s, strict=False):
            await asyncio.sleep(started_s + intended_s - time.perf_counter())
            send = _send(session, address, one, started_s=started_s, intended_s=intended_s, timeout_s=timeout_s)
            sending.append(asyncio.create_task(send))
        answers = await asyncio.gather(*sending)
        return LoadRun(answers, time.perf_counter() - started_s, time.process_time() - cpu_s)


async def closed_loop(
    address: str,
    requests: Sequence[LoadRequest],
    *,
    concurrency: int,
    timeout_s: float = 600.0,
    until_s: float = math.inf,
) -> LoadRun:
    """Sends the requests in order, `concurrency` at a time; latencies count from when each is sent.

    Args:
        until_s: no request is sent later than this.
    """
    pending, answers = iter(requests), list[Answer]()
    async with _session() as session:
        started_s, cpu_s = time.perf_counter(), time.process_time()

        async def sender() -> None:
            for one in pending:
                now_s = time.perf_counter() - started_s
                if now_s >= until_s:
                    return
                answers.append(
                    await _send(session, address, one, started_s=started_s, intended_s=now_s, timeout_s=timeout_s)
                )

        await asyncio.gather(*(sender() for _ in range(concurrency)))
        seconds, client_cpu_s = time.perf_counter() - started_s, time.process_time() - cpu_s
    return LoadRun(sorted(answers, key=lambda one: one.intended_s), seconds, client_cpu_s)


def _session() -> aiohttp.ClientSession:
    # One connection per request in flight, as with many clients; no proxies from the environment, no cookies.
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), cookie_jar=aiohttp.DummyCookieJar())


async def _send(
    session: aiohttp.ClientSession,
    address: str,
    one: LoadRequest,
    *,
    started_s: float,
    intended_s: float,
    timeout_s: float,
) -> Answer:
    sent_s = time.perf_counter() - started_s
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
            ended_s = time.perf_counter() - started_s
            status, retry_after = reply.status, reply.headers.get("retry-after")
    except (aiohttp.ClientError, TimeoutError) as error:
        return Answer(one, intended_s, sent_s, time.perf_counter() - started_s, 0, type(error).__name__)
    body_fields = _parse(body)
    return Answer(
        one,
        intended_s,
        sent_s,
        ended_s,
        status,
        "" if status == 200 else str((body_fields.get("error") or {}).get("code", "no error object")),
        None if retry_after is None else float(retry_after),
        body_fields.get("timings_s", {}),
        body,
    )


def _parse(body: bytes) -> dict[str, Any]:
    try:
        body_fields = json.loads(body)
    except ValueError:  # a proxy's plain-text error
        return {}
    return body_fields if isinstance(body_fields, dict) else {}


async def served_model(address: str, *, key: str = "") -> dict[str, Any]:
    """`MODEL_FACTS` of the model that one of our servers serves."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    async with _session() as session, session.get(f"{address}/v1/models", headers=headers) as reply:
        reply.raise_for_status()
        body_fields = (await reply.json())["data"][0]
    return {name: body_fields[name] for name in MODEL_FACTS}


async def read_metrics(address: str, *, key: str = "") -> list[Sample]:
    """All samples of a server's /metrics, from each of its processes."""
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
    """The share of all requests, refused and lost ones included, that got their image within the bound."""
    return sum(one.latency_s <= bound_s for one in answers) / len(answers)


def summary(run: LoadRun) -> dict[str, Any]:
    """Counts, and percentiles of the latencies of requests that got an image (None if none did)."""
    answers = run.answers
    latencies_s = [one.latency_s for one in answers if one.status == 200]
    return {
        "requests": len(answers),
        "answered": len(latencies_s),
        "images": sum(one.request.num_candidates for one in answers if one.status == 200),
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
