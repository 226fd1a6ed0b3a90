"""The serving benchmarks' own arithmetic, their judges shown failing, and each on a real server with a tiny model."""

import asyncio
import base64
import io
import itertools
import json
import math
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]
import pytest
from fastapi import FastAPI, Request
from PIL import Image

from engine.data.kfashion.captions import parse
from engine.pipeline.pipeline import Pipeline
from tests.live_server import serving as serving_app
from tests.paths import REPOSITORY

BENCHMARKS = REPOSITORY / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def _scripts_importable() -> Iterator[None]:
    """As when Python runs a script: its folder is where its neighbours are found."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield


@pytest.fixture(scope="module")
def model(kodalle_run: Path) -> Path:
    return kodalle_run / "model"


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Any]:
    """Ours in one process, with two keys."""
    from serving.process import serving

    limits = {"max_candidates": 16, "body_timeout_s": 1.0}
    with serving("direct", {"model": str(model), "num_slots": 8, "limits": limits}) as running:
        yield running


@pytest.fixture(scope="module")
def pipeline(model: Path) -> Pipeline:
    return Pipeline.from_pretrained(model)


# ------------------------------------------------------------------------------------------------------------- traffic


def test_arrivals_are_a_poisson_process() -> None:
    """Gaps of an exponential distribution: mean and deviation 1 / rate, 63 % of them below the mean, no memory."""
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


def test_requests_have_every_size_as_often_and_captions_of_the_grammar() -> None:
    from serving.traffic import SIZES, mixed, with_keys

    asked = mixed(30, seed=1)
    for first in range(0, 30, 3):
        assert sorted(one.num_candidates for one in asked[first : first + 3]) == sorted(SIZES)
    assert len({one.num_candidates for one in asked[::3]}) > 1, "the order is by chance"
    assert asked == mixed(30, seed=1)
    assert asked != mixed(30, seed=2)
    for one in asked:
        triples = parse(one.caption)
        assert len(triples) == one.caption.count("이다.") >= 4
    assert [one.key for one in with_keys(asked[:4], ["a", "b"])] == ["a", "b", "a", "b"]


# -------------------------------------------------------------------------------------------------------------- client


def _asked(count: int) -> list[Any]:
    from serving.traffic import mixed

    return mixed(count, seed=4, sizes=(1,))


class _HoldingServer:
    """Answers nobody until `count` requests are there at once; then all, and who comes later."""

    def __init__(self, count: int) -> None:
        self._count, self._are_there = count, asyncio.Event()
        self.num_open, self.most_open = 0, 0
        self.app = FastAPI()
        self.app.post("/v1/images/generations")(self._draw)

    async def _draw(self, _: Request) -> dict[str, Any]:
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        if self.num_open == self._count:
            self._are_there.set()
        await self._are_there.wait()
        self.num_open -= 1
        return {"data": [], "timings_s": {"total": 0.0}}


def test_an_open_loop_does_not_wait_for_a_slow_server() -> None:
    """Eight requests in 0.35 s to a server that answers none before the last: they queue, and the queue is seen."""
    from serving.client import closed_loop, open_loop

    times_s, server = [0.05 * number for number in range(8)], _HoldingServer(8)
    with serving_app(server.app) as port:
        run = asyncio.run(open_loop(f"http://127.0.0.1:{port}", _asked(8), times_s, timeout_s=60))
    assert [one.status for one in run.answers] == [200] * 8
    assert server.most_open == 8
    assert run.answers[0].latency_s >= 0.35  # from the first's time to the last's at least
    # The control: a client that waits for each answer never has two under way.
    server = _HoldingServer(1)
    with serving_app(server.app) as port:
        waiting = asyncio.run(closed_loop(f"http://127.0.0.1:{port}", _asked(8), concurrency=1))
    assert [one.status for one in waiting.answers] == [200] * 8
    assert server.most_open == 1


def test_latency_counts_from_the_intended_time() -> None:
    """A client that is held up itself does not shorten what it measures."""
    from serving.client import open_loop

    async def held_up(address: str) -> Any:
        asyncio.get_running_loop().call_later(0.05, time.sleep, 0.4)
        return await open_loop(address, _asked(2), [0.0, 0.1], timeout_s=20)

    with serving_app(_HoldingServer(1).app) as port:
        late = asyncio.run(held_up(f"http://127.0.0.1:{port}")).answers[1]
    assert late.sent_s - late.intended_s > 0.2
    assert late.latency_s - (late.ended_s - late.sent_s) > 0.2


def test_who_does_not_wait_longer_has_no_answer() -> None:
    from serving.client import open_loop, share_within, summary

    app, are_asked = FastAPI(), itertools.count()

    @app.post("/v1/images/generations")
    async def draw(_: Request) -> dict[str, Any]:
        if next(are_asked):
            await asyncio.sleep(2)  # twice the client's patience
        return {"data": [], "timings_s": {"total": 0.0}}

    with serving_app(app) as port:
        run = asyncio.run(open_loop(f"http://127.0.0.1:{port}", _asked(3), [0.0, 0.0, 0.0], timeout_s=1.0))
    assert sorted(one.status for one in run.answers) == [0, 0, 200]
    assert share_within(run.answers, 10.0) == pytest.approx(1 / 3)
    told = summary(run)
    assert (told["requests"], told["answered"]) == (3, 1)
    assert sum(told["not_answered"].values()) == 2
    assert told["latency_s"]["most"] == next(one.latency_s for one in run.answers if one.status == 200)


def test_percentiles_are_values_that_occurred() -> None:
    from serving.client import percentile, percentiles

    chance = random.Random(5)
    for count in (1, 2, 19, 20, 21, 100, 999):
        values = [chance.random() for _ in range(count)]
        for share in (0.05, 0.5, 0.95, 0.99, 1.0):
            expected = np.quantile(values, share, method="inverted_cdf")
            assert percentile(values, share) == expected
            assert sum(value <= expected for value in values) >= share * count - 1e-9
    assert percentile([1.0] * 19 + [9.0], 0.95) == 1.0
    assert percentile([1.0] * 18 + [9.0] * 2, 0.95) == 9.0
    assert percentiles([]) is None


# ------------------------------------------------------------------------------------------------------------- goodput


@pytest.mark.parametrize("limit", [0.7, 3.3, 11.0])
def test_the_search_finds_the_rate_that_a_server_bears(limit: float) -> None:
    from serving.goodput import RateSearch

    search = RateSearch(highest_guess=4.0)
    for _ in range(12):
        rate = search.next_rate()
        search.observe(rate, is_held=rate <= limit)
    assert search.found == pytest.approx(limit, rel=0.05)
    assert search.found <= limit


def test_a_server_that_bears_nothing_has_no_rate() -> None:
    from serving.goodput import RateSearch

    search = RateSearch(highest_guess=4.0)
    for _ in range(5):
        search.observe(search.next_rate(), is_held=False)
    assert search.found == 0
    assert search.next_rate() == pytest.approx(4.0 / 2**5)


def test_a_late_answer_is_not_good() -> None:
    from serving.client import Answer, share_within

    (asked,) = _asked(1)
    on_time = Answer(asked, intended_s=1.0, sent_s=1.0, ended_s=2.0, status=200)
    late, refused = replace(on_time, ended_s=4.0), replace(on_time, status=429)
    assert share_within([on_time] * 19 + [late], 2.0) == 0.95
    assert share_within([on_time, refused], 2.0) == 0.5


def test_stocks_pictures_are_ours(pipeline: Pipeline) -> None:
    """Different sizes and seeds in one static batch give what the pipeline gives each alone."""
    from serving.batch_baseline import draw_batch
    from serving.speed import picture_digest
    from serving.traffic import mixed

    asked = mixed(6, seed=8)
    answers = draw_batch(pipeline, [one.body() for one in asked])
    for one, answer in zip(asked, answers, strict=True):
        generation = pipeline([one.caption], candidates=one.num_candidates, seed=one.seed)[0]
        best = generation.candidates[0]
        assert answer["data"][0]["candidate"] == best.candidate
        file = io.BytesIO()
        best.image.save(file, "PNG")
        plain = json.dumps({"data": [{"b64_json": base64.b64encode(file.getvalue()).decode()}]})
        assert picture_digest(json.dumps(answer).encode()) == picture_digest(plain.encode())


# ------------------------------------------------------------------------------------------------ the whole, on a server


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("benchmarks")


@pytest.fixture(scope="module")
def document(model: Path, out: Path) -> dict[str, Any]:
    """What the last line of a quick run without Ray says."""
    answer = subprocess.run(
        [
            sys.executable, str(BENCHMARKS / "serve_load.py"), "--quick", "--model", str(model), "--servers", "direct",
            "--out", str(out),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    told = json.loads(answer.stdout.splitlines()[-1])
    assert isinstance(told, dict)
    return told


@pytest.mark.slow
def test_what_is_printed_is_stored(document: dict[str, Any], out: Path) -> None:
    (stored,) = (out / "results" / "serve_load").glob("*-quick.json")
    assert json.loads(stored.read_text(encoding="utf-8")) == document
    (plot,) = (out / "plots").glob("serve_load-*-quick.png")
    assert Image.open(plot).size[0] > 500


@pytest.mark.slow
def test_the_figures_add_up(document: dict[str, Any]) -> None:
    assert {"commit", "date", "hardware", "versions", "config", "calibration", "idle_cores"} <= document.keys()
    rates = document["saturation"]["requests_per_s"]
    share = document["saturation"]["shares"]["direct"]["median"]
    assert share == pytest.approx(rates["direct"]["all"][0] / rates["engine"]["all"][0])
    single = document["concurrency_one"]
    assert single["total_s"].keys() == {"engine", "pipeline", "direct"}
    assert 0 < single["servers"]["direct"]["added_ms"]["least"] <= single["servers"]["direct"]["added_ms"]["median"]
    hops = single["servers"]["direct"]["mean_ms"]
    assert hops["client_to_edge"] > 0
    assert hops["edge_to_worker"] > 0
    assert all(row["median"] > 0 for row in document["saturation"]["cpu_s_per_request"].values())
    goodput = document["goodput"]
    assert goodput["bound_s"] == pytest.approx(3 * document["calibration"]["servers"]["direct"]["unloaded_s"]["p95"])
    assert goodput["ratio"] is None
    for point in goodput["points"]:
        assert point["is_held"] == (point["share_within"] >= 0.95)
        assert point["good_per_s"] == pytest.approx(point["share_within"] * point["offered_per_s"])
    for row in document["overload"]:
        assert row["requests"] == row["answered"] + row["refused"] + row["not_drawn_though_taken_on"]
        assert row["refused_with_retry_after"] == row["refused"]
    modest = document["fairness"]["servers"]["direct"]
    assert modest["alone"]["answered"] == modest["beside_greedy"]["answered"] > 0
    assert {row["what"].split(",")[0] for row in document["bars"]} >= {"throughput over the engine's"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--servers", "theirs"], "theirs is none of direct, ray, stock"),
        (["--servers", "stock"], "needs one of ours"),
        (["--only", "speed"], "speed is none of saturation"),
        (["--model", "/nowhere"], "is no model folder"),
        (["--quick", "--probe-s", "0"], "must be above 0"),
    ],
)
def test_what_cannot_be_asked_for(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import serve_load

    monkeypatch.setattr(sys, "argv", ["serve_load.py", *arguments])
    with pytest.raises(SystemExit, match="2"):
        serve_load.main()
    assert said in capsys.readouterr().err


def test_a_benchmark_that_is_told_to_end_leaves_no_server(model: Path) -> None:
    """SIGTERM while it soaks: the server's process is gone with it."""
    command = [sys.executable, str(BENCHMARKS / "serve_soak.py"), "--model", str(model), "--requests", "1000000"]
    benchmark = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    try:
        servers: list[psutil.Process] = []
        ends_at = time.monotonic() + 120
        while not servers and time.monotonic() < ends_at:
            time.sleep(0.2)
            children = psutil.Process(benchmark.pid).children(recursive=True)
            servers = [child for child in children if "serve" in child.cmdline()]
        assert servers
        benchmark.terminate()
        assert benchmark.wait(90) == 143
        assert psutil.wait_procs(servers, timeout=10)[1] == []
    finally:
        benchmark.kill()


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    from serving.process import ServerDied, serving

    with pytest.raises(ServerDied, match="no such model folder"), serving("direct", {"model": str(tmp_path / "none")}):
        pass


# ----------------------------------------------------------------------------------------------------- seeds, soak, fuzz


def test_every_way_gives_the_same_pictures(server: Any, pipeline: Pipeline) -> None:
    from serve_seeds import EACH, Counts, compare_one_worker, compare_pipeline, requests

    asked, counts = requests(2, seed=2), Counts()
    wanted = compare_one_worker(server, asked, counts)
    compare_pipeline(pipeline, asked, wanted, counts)
    assert counts.inexact == set()
    assert counts.ways["alone"].compared == sum(request.num_alone for request in asked)
    assert counts.ways["streamed"].equal == counts.ways["pipeline"].equal == 2 * EACH


def test_one_other_bit_in_one_way_is_counted() -> None:
    from serve_seeds import Counts

    wanted = {candidate: bytes([candidate]) for candidate in range(10)}
    counts = Counts()
    counts.compare("streamed", 0, wanted, wanted, 10)
    counts.compare("alone", 1, wanted | {7: b"other"}, wanted, 10)
    counts.compare("workers", 2, {number: wanted[number] for number in range(9)}, wanted, 10)
    assert counts.inexact == {(1, 7), (2, 9)}
    assert vars(counts.ways["alone"]) == {"compared": 10, "equal": 9}


def test_a_short_soak_leaves_nothing_behind(server: Any) -> None:
    from serve_soak import soak

    told = asyncio.run(soak(server, 40, rest_s=1.0))
    assert told["unexpected"] == {}
    assert told["ends"] == {"plain": 32, "streamed": 2, "refused": 2, "hung up at once": 2, "hung up": 2}
    assert set(told["gauges_after"].values()) == {0}
    assert told["files_rise"] <= 0


def test_a_leak_is_seen_through_the_noise() -> None:
    from serve_soak import is_met, relative_rise

    chance = random.Random(6)
    positions = list(range(2000, 20_001, 300))
    noise = [chance.gauss(0, 4) for _ in positions]
    steady = [400 + one for one in noise]
    leaking = [value + 100 * position / 20_000 for value, position in zip(steady, positions, strict=True)]
    assert abs(relative_rise(positions, steady, over=20_000)) < 0.02
    assert relative_rise(positions, leaking, over=20_000) == pytest.approx(100 / statistics.mean(leaking), abs=0.02)
    good = {"rss_rise": 0.01, "own_rise": 0.01, "files_rise": 0, "gauges_after": {"a": 0.0}, "unexpected": {}}
    assert is_met(good)
    for name, bad in (("rss_rise", 0.06), ("own_rise", 0.06), ("files_rise", 1), ("gauges_after", {"a": 1.0})):
        assert not is_met(good | {name: bad})
    assert not is_met(good | {"unexpected": {"unexpected 500 of plain": 1}})


def test_broken_requests_are_only_refused(server: Any) -> None:
    from serve_fuzz import draws, is_met, send_mutants

    mutants = send_mutants(server, count=60, seed=3)
    assert mutants["sent"] == sum(mutants["statuses"].values()) == 60
    assert mutants["faults"] == []
    assert draws(server)
    document = {"mutants": mutants, "cases": {"num_faults": 0}, "draws_afterwards": True}
    assert is_met(document)
    assert not is_met(document | {"cases": {"num_faults": 1}})
    assert not is_met(document | {"draws_afterwards": False})
