"""The serving benchmarks: their arithmetic, their pass criteria, and each on a real server with a tiny model."""

import asyncio
import base64
import io
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

from engine.pipeline.pipeline import Pipeline
from tests.paths import REPOSITORY

BENCHMARKS = REPOSITORY / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def _scripts_importable() -> Iterator[None]:
    """Puts the scripts' folder on the path, as Python does when it runs a script."""
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


def test_the_baselines_images_are_ours(pipeline: Pipeline) -> None:
    """Different sizes and seeds in one static batch give what the pipeline gives each alone."""
    from serving.batch_baseline import generate_batch
    from serving.speed import image_digest
    from serving.traffic import mixed

    requests = mixed(6, seed=8)
    answers = generate_batch(pipeline, [one.body() for one in requests])
    for one, answer in zip(requests, answers, strict=True):
        generation = pipeline([one.caption], candidates=one.num_candidates, seed=one.seed)[0]
        best = generation.candidates[0]
        assert answer["data"][0]["candidate"] == best.candidate
        file = io.BytesIO()
        best.image.save(file, "PNG")
        plain = json.dumps({"data": [{"b64_json": base64.b64encode(file.getvalue()).decode()}]})
        assert image_digest(json.dumps(answer).encode()) == image_digest(plain.encode())


# ------------------------------------------------------------------------------------------------------ complete runs


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("benchmarks")


@pytest.fixture(scope="module")
def document(model: Path, out: Path) -> dict[str, Any]:
    """The document of a quick run without Ray."""
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
    found = json.loads(answer.stdout.splitlines()[-1])
    assert isinstance(found, dict)
    return found


@pytest.mark.soak
def test_the_printed_document_is_stored(document: dict[str, Any], out: Path) -> None:
    (stored,) = (out / "results" / "serve_load").glob("*-quick.json")
    assert json.loads(stored.read_text(encoding="utf-8")) == document
    (plot,) = (out / "plots").glob("serve_load-*-quick.png")
    assert Image.open(plot).size[0] > 500


@pytest.mark.soak
def test_the_results_are_consistent(document: dict[str, Any]) -> None:
    assert {"commit", "date", "hardware", "versions", "config", "calibration", "idle_cores"} <= document.keys()
    rates = document["saturation"]["requests_per_s"]
    share = document["saturation"]["shares"]["direct"]["median"]
    assert share == pytest.approx(rates["direct"]["all"][0] / rates["engine"]["all"][0])
    single = document["concurrency_one"]
    assert single["total_s"].keys() == {"engine", "pipeline", "direct"}
    assert 0 < single["servers"]["direct"]["added_ms"]["least"] <= single["servers"]["direct"]["added_ms"]["median"]
    hops = single["servers"]["direct"]["mean_ms"]
    assert hops["client_to_api_server"] > 0
    assert hops["api_server_to_worker"] > 0
    assert all(row["median"] > 0 for row in document["saturation"]["cpu_s_per_request"].values())
    goodput = document["goodput"]
    assert goodput["bound_s"] == pytest.approx(3 * document["calibration"]["servers"]["direct"]["unloaded_s"]["p95"])
    assert goodput["ratio"] is None
    for point in goodput["points"]:
        assert point["is_held"] == (point["share_within"] >= 0.95)
        assert point["good_per_s"] == pytest.approx(point["share_within"] * point["offered_per_s"])
    for row in document["overload"]:
        assert row["requests"] == row["answered"] + row["refused"] + row["admitted_not_answered"]
        assert row["refused_with_retry_after"] == row["refused"]
    modest = document["fairness"]["servers"]["direct"]
    assert modest["alone"]["answered"] == modest["beside_greedy"]["answered"] > 0
    assert {row["what"].split(",")[0] for row in document["bars"]} >= {"throughput over the engine's"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--servers", "theirs"], "theirs is not one of direct, ray, stock"),
        (["--servers", "stock"], "needs one of ours"),
        (["--only", "speed"], "speed is not one of saturation"),
        (["--model", "/nowhere"], "is not a model folder"),
        (["--quick", "--probe-s", "0"], "must be above 0"),
    ],
)
def test_invalid_arguments(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import serve_load

    monkeypatch.setattr(sys, "argv", ["serve_load.py", *arguments])
    with pytest.raises(SystemExit, match="2"):
        serve_load.main()
    assert message in capsys.readouterr().err


@pytest.mark.exclusive
def test_a_terminated_benchmark_stops_its_server(model: Path) -> None:
    """SIGTERM during a soak test stops the server's process, too."""
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


def test_a_server_that_cannot_start_reports_the_reason(tmp_path: Path) -> None:
    from serving.process import ServerDied, serving

    with pytest.raises(ServerDied, match="no such model folder"), serving("direct", {"model": str(tmp_path / "none")}):
        pass


# ----------------------------------------------------------------------------------------------------- seeds, soak, fuzz


@pytest.mark.exclusive
def test_every_way_gives_the_same_images(server: Any, pipeline: Pipeline) -> None:
    from serve_seeds import CANDIDATES, Counts, compare_one_worker, compare_pipeline, requests

    sent, counts = requests(2, seed=2), Counts()
    wanted = compare_one_worker(server, sent, counts)
    compare_pipeline(pipeline, sent, wanted, counts)
    assert counts.inexact == set()
    assert counts.ways["alone"].compared == sum(request.num_alone for request in sent)
    assert counts.ways["streamed"].equal == counts.ways["pipeline"].equal == 2 * CANDIDATES


def test_a_difference_in_one_way_is_counted() -> None:
    from serve_seeds import Counts

    wanted = {candidate: bytes([candidate]) for candidate in range(10)}
    counts = Counts()
    counts.compare("streamed", 0, wanted, wanted, 10)
    counts.compare("alone", 1, wanted | {7: b"other"}, wanted, 10)
    counts.compare("workers", 2, {number: wanted[number] for number in range(9)}, wanted, 10)
    assert counts.inexact == {(1, 7), (2, 9)}
    assert vars(counts.ways["alone"]) == {"compared": 10, "equal": 9}


@pytest.mark.exclusive
def test_a_short_soak_retains_nothing(server: Any) -> None:
    from serve_soak import soak

    document = asyncio.run(soak(server, 40, rest_s=1.0))
    assert document["unexpected"] == {}
    assert document["ends"] == {"plain": 32, "streamed": 2, "refused": 2, "disconnected at once": 2, "disconnected": 2}
    assert set(document["gauges_after"].values()) == {0}
    assert document["files_rise"] <= 0


def test_a_leak_is_detected_in_noise() -> None:
    from serve_soak import is_met, relative_rise

    rng = random.Random(6)
    positions = list(range(2000, 20_001, 300))
    noise = [rng.gauss(0, 4) for _ in positions]
    steady = [400 + one for one in noise]
    leaking = [value + 100 * position / 20_000 for value, position in zip(steady, positions, strict=True)]
    assert abs(relative_rise(positions, steady, over=20_000)) < 0.02
    assert relative_rise(positions, leaking, over=20_000) == pytest.approx(100 / statistics.mean(leaking), abs=0.02)
    good = {"rss_rise": 0.01, "own_rise": 0.01, "files_rise": 0, "gauges_after": {"a": 0.0}, "unexpected": {}}
    assert is_met(good)
    for name, bad in (("rss_rise", 0.06), ("own_rise", 0.06), ("files_rise", 1), ("gauges_after", {"a": 1.0})):
        assert not is_met(good | {name: bad})
    assert not is_met(good | {"unexpected": {"unexpected 500 of plain": 1}})


@pytest.mark.exclusive
def test_malformed_requests_are_only_rejected(server: Any) -> None:
    from serve_fuzz import generates, is_met, send_mutants

    mutants = send_mutants(server, count=60, seed=3)
    assert mutants["sent"] == sum(mutants["statuses"].values()) == 60
    assert mutants["faults"] == []
    assert generates(server)
    document = {"mutants": mutants, "cases": {"num_faults": 0}, "generates_afterwards": True}
    assert is_met(document)
    assert not is_met(document | {"cases": {"num_faults": 1}})
    assert not is_met(document | {"generates_afterwards": False})
