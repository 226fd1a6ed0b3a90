"""The engine alone, as a baseline for servers: a worker in a process of its own, without HTTP.

The process reads a run per line of JSON from its standard input and answers each with one line, so that it stays loaded
while servers take turns with it:

    {"way": "worker", "concurrency": 24, "requests": [...]}     jobs in order, so many at a time
    {"way": "pipeline", "requests": [...]}                      one after the other through engine.pipeline.Pipeline
"""

import asyncio
import contextlib
import copy
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import psutil
from machine_facts import child_environment

from serving.traffic import LoadRequest

Way = Literal["worker", "pipeline"]


@dataclass(frozen=True)
class JobResult:
    """The result of one job."""

    number: int  # of the request
    took_s: float
    timings_s: dict[str, float]
    is_finished: bool


@dataclass(frozen=True)
class EngineRun:
    """The results of a run."""

    results: list[JobResult]
    seconds: float


class Engine:
    """A handle of the engine's process."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def cpu_s(self) -> float:
        """CPU seconds that the process has used."""
        times = psutil.Process(self._process.pid).cpu_times()
        return float(times.user + times.system)

    def run(self, requests: Sequence[LoadRequest], *, way: Way = "worker", concurrency: int = 1) -> EngineRun:
        """Runs the requests; raises RuntimeError if the process has ended, with its error on stderr."""
        message = {"way": way, "concurrency": concurrency, "requests": [asdict(one) for one in requests]}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the engine's process ended with code {self._process.wait()}")
        answer = json.loads(line)
        return EngineRun([JobResult(**one) for one in answer["results"]], answer["seconds"])


@contextlib.contextmanager
def engine(arguments: Mapping[str, Any]) -> Iterator[Engine]:
    """The engine alone while the block runs.

    Args:
        arguments: fields of serve.settings.ServeSettings.
    """
    command = [sys.executable, "-m", "serving.engine", json.dumps(dict(arguments))]
    # A session of its own, like the servers: Linux divides a busy processor by session.
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=child_environment(),
        start_new_session=True,
    )
    try:
        yield Engine(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()  # the process ends
        try:
            process.wait(60)
        finally:
            process.kill()


# ------------------------------------------------------------------------------------------------ inside the process


def main() -> None:
    from serve.settings import read_settings
    from serve.worker.worker import Worker

    worker = Worker(read_settings(json.loads(sys.argv[1]), source="the command line"))
    pipeline = _own_pipeline(worker.pipeline)
    try:
        for number, line in enumerate(sys.stdin):
            message = json.loads(line)
            requests = [LoadRequest(**one) for one in message["requests"]]
            if message["way"] == "worker":
                run = asyncio.run(_run_jobs(worker, requests, message["concurrency"], name=f"run{number}"))
            else:
                run = _run_pipeline(pipeline, requests)
            print(json.dumps(asdict(run)), flush=True)
    finally:
        worker.close()


async def _run_jobs(worker: Any, requests: Sequence[LoadRequest], concurrency: int, *, name: str) -> EngineRun:
    from serve.messages import Finished

    pending, results = iter(requests), list[JobResult]()

    async def run_in_turn() -> None:
        for one in pending:
            started_s = time.perf_counter()
            async for event in worker.generate(one.job(name)):
                last = event
            took_s = time.perf_counter() - started_s
            timings_s = last.timings_s if isinstance(last, Finished) else {}
            results.append(JobResult(one.number, took_s, timings_s, isinstance(last, Finished)))

    started_s = time.perf_counter()
    await asyncio.gather(*(run_in_turn() for _ in range(concurrency)))
    return EngineRun(results, time.perf_counter() - started_s)


def _own_pipeline(theirs: Any) -> Any:
    """The worker's pipeline with a sampler of its own, because the worker has borrowed its sampler's decoder for good."""
    from engine.decoding.sampler import Sampler

    pipeline = copy.copy(theirs)
    null = pipeline.tokenizer.empty(pipeline.transformer.config.text_seq_len)[0].to(pipeline.device)
    # the name "plain" would mean no graphs
    weights = None if pipeline.device.type == "cuda" else pipeline.sampler.weights
    pipeline.sampler = Sampler(pipeline.transformer, null_text_tokens=null, weights=weights)
    return pipeline


def _run_pipeline(pipeline: Any, requests: Sequence[LoadRequest]) -> EngineRun:
    """Runs the requests through the pipeline, without image encoding, which is its caller's.

    On a GPU each number of candidates is generated once before the measurement, which captures its graphs.
    """
    if pipeline.device.type == "cuda":
        for number in sorted({one.num_candidates for one in requests}, reverse=True):
            pipeline(["."], candidates=number)
    results, started_s = [], time.perf_counter()
    for one in requests:
        one_started_s = time.perf_counter()
        generation = pipeline([one.caption], candidates=one.num_candidates, seed=one.seed)[0]
        results.append(JobResult(one.number, time.perf_counter() - one_started_s, dict(generation.timings_s), True))
    return EngineRun(results, time.perf_counter() - started_s)


if __name__ == "__main__":
    main()
