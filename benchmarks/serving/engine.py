"""The engine alone, to compare a server with: a worker in a process without HTTP, jobs given directly.

The process is told what to draw by lines of JSON on its standard input, and answers each with one, so that it stays
loaded while servers take turns with it:

    {"way": "worker", "concurrency": 24, "asked": [...]}     jobs in turn, so many at a time
    {"way": "pipeline", "asked": [...]}                      one after the other through engine.pipeline.Pipeline
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

import psutil  # type: ignore[import-untyped]
from machine_facts import child_environment

from serving.traffic import Asked

Way = Literal["worker", "pipeline"]


@dataclass(frozen=True)
class Drawn:
    """One job's end."""

    number: int  # of the request
    took_s: float
    timings_s: dict[str, float]
    is_finished: bool


@dataclass(frozen=True)
class EngineRun:
    """All jobs of a run."""

    drawn: list[Drawn]
    seconds: float


class Engine:
    """The process, seen from outside."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def cpu_s(self) -> float:
        """What the process has used."""
        times = psutil.Process(self._process.pid).cpu_times()
        return float(times.user + times.system)

    def run(self, asked: Sequence[Asked], *, way: Way = "worker", concurrency: int = 1) -> EngineRun:
        """Raises RuntimeError: the process ended; its own words are on stderr."""
        told = {"way": way, "concurrency": concurrency, "asked": [asdict(one) for one in asked]}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(told) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the engine's process ended with code {self._process.wait()}")
        answer = json.loads(line)
        return EngineRun([Drawn(**one) for one in answer["drawn"]], answer["seconds"])


@contextlib.contextmanager
def engine(arguments: Mapping[str, Any]) -> Iterator[Engine]:
    """The engine alone while the block runs.

    Args:
        arguments: fields of serve.settings.ServeSettings.
    """
    command = [sys.executable, "-m", "serving.engine", json.dumps(dict(arguments))]
    # A session of its own, as the servers have: Linux shares a busy processor out by session.
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
        process.stdin.close()  # its last line: it ends
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
            told = json.loads(line)
            asked = [Asked(**one) for one in told["asked"]]
            if told["way"] == "worker":
                run = asyncio.run(_draw(worker, asked, told["concurrency"], name=f"run{number}"))
            else:
                run = _draw_by_pipeline(pipeline, asked)
            print(json.dumps(asdict(run)), flush=True)
    finally:
        worker.close()


async def _draw(worker: Any, asked: Sequence[Asked], concurrency: int, *, name: str) -> EngineRun:
    from serve.messages import Finished

    coming, drawn = iter(asked), list[Drawn]()

    async def draw_in_turn() -> None:
        for one in coming:
            begun = time.perf_counter()
            async for event in worker.draw(one.job(name)):
                last = event
            took_s = time.perf_counter() - begun
            timings_s = last.timings_s if isinstance(last, Finished) else {}
            drawn.append(Drawn(one.number, took_s, timings_s, isinstance(last, Finished)))

    begun = time.perf_counter()
    await asyncio.gather(*(draw_in_turn() for _ in range(concurrency)))
    return EngineRun(drawn, time.perf_counter() - begun)


def _own_pipeline(theirs: Any) -> Any:
    """The worker's pipeline with a sampler of its own: the decoder of the worker's is lent to the worker for good."""
    from engine.decoding.sampler import Sampler

    pipeline = copy.copy(theirs)
    null = pipeline.tokenizer.empty(pipeline.transformer.config.text_seq_len)[0].to(pipeline.device)
    # by name, "plain" would draw without graphs
    weights = None if pipeline.device.type == "cuda" else pipeline.sampler.weights
    pipeline.sampler = Sampler(pipeline.transformer, null_text_tokens=null, weights=weights)
    return pipeline


def _draw_by_pipeline(pipeline: Any, asked: Sequence[Asked]) -> EngineRun:
    """Without encoding, which the pipeline leaves to its caller.

    On a GPU each number of candidates is drawn once before the clock starts: its graphs are captured then.
    """
    if pipeline.device.type == "cuda":
        for number in sorted({one.num_candidates for one in asked}, reverse=True):
            pipeline(["."], candidates=number)
    drawn, begun = [], time.perf_counter()
    for one in asked:
        started = time.perf_counter()
        generation = pipeline([one.caption], candidates=one.num_candidates, seed=one.seed)[0]
        drawn.append(Drawn(one.number, time.perf_counter() - started, dict(generation.timings_s), True))
    return EngineRun(drawn, time.perf_counter() - begun)


if __name__ == "__main__":
    main()
