"""A real Ray Serve on this machine, started as users start it: the pipeline's images, whatever process is killed."""

import base64
import concurrent.futures
import http.client
import io
import json
import os
import re
import select
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
import numpy as np
import openai
import psutil
import pytest
from PIL import Image
from ray.serve.generated.serve_pb2 import ASGIRequest
from ray.serve.generated.serve_pb2_grpc import ASGIServiceStub

from engine.pipeline.pipeline import Pipeline
from tests.paths import REPOSITORY

pytestmark = [pytest.mark.slow, pytest.mark.exclusive]

CAPTION = "빨강 바탕에 파랑 네모"
SLOW = {"n": 1, "candidates": 48}  # more sequences than slots: a second or so on two cores
SEEDS = list(range(5))  # of requests that are sent at once


@pytest.fixture(scope="module")
def server(kodalle_run: Path) -> Iterator[Any]:
    """Two workers, two API servers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(REPOSITORY / "benchmarks")
        from serving.process import serving

        patch.setenv("OMP_NUM_THREADS", "1")
        # Room and time for all requests in one worker, on the busiest machine: refusals are tested elsewhere.
        room = {"max_queued_sequences": 1024, "deadline_s": 600.0}
        arguments = {
            "model": str(kodalle_run / "model"),
            "num_workers": 2,
            "num_api_servers": 2,
            "num_slots": 16,
        } | room
        with serving("ray", arguments) as running:
            yield running


@pytest.fixture(scope="module")
def pipeline(kodalle_run: Path) -> Pipeline:
    return Pipeline.from_pretrained(kodalle_run / "model")


@pytest.fixture
def client(server: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0)


def post(
    server: Any, fields: dict[str, Any], headers: dict[str, str] | None = None, *, path: str = "/v1/images/generations"
) -> tuple[int, dict[str, Any]]:
    address = urlsplit(server.address)
    connection = http.client.HTTPConnection(str(address.hostname), int(address.port or 0), timeout=90)
    body = json.dumps(({"prompt": CAPTION} if path.endswith("generations") else {}) | fields)
    connection.request("POST", path, body, {"content-type": "application/json"} | (headers or {}))
    reply = connection.getresponse()
    answer: dict[str, Any] = json.loads(reply.read())
    connection.close()
    return reply.status, answer


def metric(server: Any, name: str) -> float:
    """Its sum over all replicas, as scraped now."""
    address = urlsplit(server.address)
    connection = http.client.HTTPConnection(str(address.hostname), int(address.port or 0), timeout=20)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if re.match(rf"{name}[{{ ]", line))


def replicas(server: Any, deployment: str) -> list[psutil.Process]:
    """The processes of a deployment, as Ray titles them."""
    return [one for one in server.processes() if f"ServeReplica:kodalle:{deployment}" in "".join(one.cmdline())]


def wait_until(is_true: Callable[[], bool]) -> None:
    """Polls a condition; the bound only ends a test that fails."""
    ends_at = time.monotonic() + 120
    while not is_true():
        assert time.monotonic() < ends_at
        time.sleep(0.05)


def pixels(b64: str | None) -> np.ndarray[Any, Any]:
    assert b64 is not None
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64))).convert("RGB"))


# ---------------------------------------------------------------------------------------------------------- generation


def test_openais_client_gets_the_pipelines_images(client: openai.OpenAI, pipeline: Pipeline) -> None:
    answer = client.images.generate(prompt=CAPTION, n=2, extra_body={"seed": 7, "candidates": 4})
    generation = pipeline([CAPTION], candidates=4, seed=7)[0]
    assert answer.data is not None
    assert [image.candidate for image in answer.data] == [best.candidate for best in generation.top(2)]  # type: ignore[attr-defined]
    for image, best in zip(answer.data, generation.top(2), strict=True):
        assert np.array_equal(pixels(image.b64_json), np.asarray(best.image))


def test_a_stream_ends_with_the_same_bytes_after_previews(server: Any, client: openai.OpenAI) -> None:
    plain = client.images.generate(prompt=CAPTION, extra_body={"seed": 7, "candidates": 4})
    events = list(
        client.images.generate(prompt=CAPTION, stream=True, partial_images=2, extra_body={"seed": 7, "candidates": 4})
    )
    assert {event.type for event in events[:-1]} <= {"image_generation.partial_image"}  # any preview may be dropped
    assert events[-1].type == "image_generation.completed"
    assert plain.data is not None
    assert events[-1].b64_json == plain.data[0].b64_json


def test_an_image_prefix_is_kept(client: openai.OpenAI) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (200, 30, 30)).save(buffer, "PNG")
    edited = client.images.edit(
        image=("photo.png", buffer.getvalue(), "image/png"), prompt=CAPTION, extra_body={"seed": 3, "keep_rows": 4}
    )
    assert edited.data is not None
    assert np.abs(pixels(edited.data[0].b64_json)[:16].astype(int) - (200, 30, 30)).max() == 0, "kept pixels are kept"


def test_embeddings_and_scores_cross_rays_wire_bit_for_bit(
    server: Any, client: openai.OpenAI, pipeline: Pipeline
) -> None:
    captions = [CAPTION, "초록 네모"]
    wanted = pipeline.embed_captions(captions).vectors.numpy()
    answer = client.embeddings.create(model=client.models.list().data[0].id, input=captions)
    vectors = np.array([one.embedding for one in answer.data], np.float32)
    assert np.array_equal(vectors, wanted)
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (200, 30, 30)).save(buffer, "PNG")
    picture = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    status, ranked = post(server, {"query": CAPTION, "documents": [*captions, {"image": picture}]}, path="/v1/rerank")
    assert status == 200
    scores = {one["index"]: one["relevance_score"] for one in ranked["results"]}
    assert scores[0] == pytest.approx(1, abs=1e-5)
    assert scores[1] == pytest.approx(float(wanted[0] @ wanted[1]), abs=1e-5)
    image = client.embeddings.create(model=answer.model, input=picture).data[0].embedding
    assert scores[2] == pytest.approx(float(wanted[0] @ np.array(image)), abs=1e-5)
    status, refused = post(server, {"query": CAPTION, "documents": []}, path="/v1/rerank")
    assert (status, refused["error"]["param"]) == (400, "documents")


def test_every_replica_reports_and_an_api_server_returns_all_metrics(server: Any) -> None:
    wait_until(lambda: metric(server, "kodalle_slots") == 32)


# -------------------------------------------------------------------------------------------------------------- faults


def generate_while(
    server: Any, seeds: list[int], fault: Callable[[], None], **fields: Any
) -> dict[int, tuple[int, Any]]:
    """Concurrent requests, and a fault while the workers are busy with them -> status and answer by seed."""
    with concurrent.futures.ThreadPoolExecutor(len(seeds)) as pool:
        sent = {seed: pool.submit(post, server, SLOW | fields | {"seed": seed}) for seed in seeds}
        time.sleep(0.7)
        fault()
        return {seed: future.result(timeout=100) for seed, future in sent.items()}


def images_of(answers: dict[int, tuple[int, Any]]) -> dict[int, list[str]]:
    assert {status for status, _ in answers.values()} == {200}, answers
    return {seed: [image["b64_json"] for image in answer["data"]] for seed, (_, answer) in answers.items()}


@pytest.fixture(scope="module")
def undisturbed(server: Any) -> dict[int, list[str]]:
    return images_of(generate_while(server, SEEDS, lambda: None))


def test_a_killed_worker_loses_no_request_and_changes_no_byte(server: Any, undisturbed: dict[int, list[str]]) -> None:
    before = metric(server, "kodalle_reruns_total")
    victim = replicas(server, "Worker")[0]
    answers = generate_while(server, SEEDS, victim.kill)
    assert images_of(answers) == undisturbed
    assert not victim.is_running()
    wait_until(lambda: metric(server, "kodalle_reruns_total") > before)
    wait_until(lambda: len(replicas(server, "Worker")) == 2)


def test_a_killed_api_server_loses_no_request_and_changes_no_byte(
    server: Any, undisturbed: dict[int, list[str]]
) -> None:
    answers = generate_while(server, SEEDS, replicas(server, "ApiServer")[0].kill)
    assert images_of(answers) == undisturbed
    wait_until(lambda: len(replicas(server, "ApiServer")) == 2)


def test_each_request_is_logged_in_one_line_without_its_caption(server: Any) -> None:
    """Ray Serve hides a replica's `sys.stderr`."""
    secret = "비밀 원피스"
    assert post(server, {"prompt": secret, "seed": 1, "candidates": 1}, {"x-request-id": "test-log-line"})[0] == 200
    wait_until(lambda: "test-log-line" in server.errors())
    (line,) = [line for line in server.errors().splitlines() if "test-log-line" in line]
    assert '"route": "/v1/images/generations", "status": 200' in line
    assert secret not in server.errors()


def test_a_killed_coordinator_stops_no_request_and_comes_back(server: Any) -> None:
    replicas(server, "Coordinator")[0].kill()
    # The scrape itself: the API server that answers may have just replaced another and answered no other request yet.
    assert metric(server, "kodalle_requests_in_flight") > 0, "an API server returns at least its own metrics"
    assert post(server, {"seed": 1, "candidates": 1})[0] == 200
    wait_until(lambda: metric(server, "kodalle_slots") == 32)


# -------------------------------------------------------------------------------------------------------- Ray's proxy


def test_the_proxy_rejects_a_large_head(server: Any) -> None:
    address = urlsplit(server.address)
    connection = http.client.HTTPConnection(str(address.hostname), int(address.port or 0), timeout=20)
    connection.request("GET", "/healthz", headers={"x-long": "x" * 20_000})
    reply = connection.getresponse()
    assert (reply.status, json.loads(reply.read())["error"]["code"]) == (400, "http_error")


def test_the_proxys_own_routes_reveal_nothing(server: Any) -> None:
    address = urlsplit(server.address)
    for path, status in (("/-/routes", 404), ("/-/healthz", 200)):
        connection = http.client.HTTPConnection(str(address.hostname), int(address.port or 0), timeout=20)
        connection.request("GET", path)
        reply = connection.getresponse()
        assert (reply.status, reply.headers["server"]) == (status, None)


def test_a_client_that_half_closes_gets_its_reply(server: Any) -> None:
    address = urlsplit(server.address)
    body = json.dumps({"prompt": CAPTION, "seed": 1, "candidates": 4})
    head = f"POST /v1/images/generations HTTP/1.1\r\nhost: {address.netloc}\r\ncontent-type: application/json\r\n"
    with socket.create_connection((str(address.hostname), int(address.port or 0)), timeout=90) as connection:
        connection.sendall(f"{head}content-length: {len(body.encode())}\r\n\r\n{body}".encode())
        connection.shutdown(socket.SHUT_WR)
        received = b""
        while part := connection.recv(65536):
            received += part
    assert received.startswith(b"HTTP/1.1 200 OK\r\n")
    assert "data" in json.loads(received.partition(b"\r\n\r\n")[2])


def test_a_client_cannot_set_rays_timeout(server: Any) -> None:
    status, _ = post(server, {"seed": 1, "candidates": 4}, {"x-request-timeout-seconds": "0.001"})
    assert status == 200


@pytest.mark.parametrize("headers", [{}, {"x-request-disconnect-disabled": "?1"}])
def test_a_disconnect_frees_its_slots_whatever_headers_the_client_sends(server: Any, headers: dict[str, str]) -> None:
    wait_until(lambda: metric(server, "kodalle_slots_in_use") == 0)
    before = metric(server, "kodalle_cancelled_total")
    body = json.dumps({"prompt": CAPTION, "seed": 1, "candidates": 64}).encode()
    lines = {"host": "localhost", "content-type": "application/json", "content-length": str(len(body))} | headers
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    address = urlsplit(server.address)

    def is_cancelled() -> bool:
        """Hangs up once slots are in use; a fast machine may have answered before, and then that counts for nothing."""
        with socket.create_connection((address.hostname, address.port)) as connection:
            connection.sendall(f"POST /v1/images/generations HTTP/1.1\r\n{head}\r\n".encode() + body)
            wait_until(
                lambda: metric(server, "kodalle_slots_in_use") > 0 or bool(select.select([connection], [], [], 0)[0])
            )
        wait_until(lambda: metric(server, "kodalle_slots_in_use") == 0)
        return metric(server, "kodalle_cancelled_total") > before

    wait_until(is_cancelled)


# ------------------------------------------------------------------------------------------------------------ listeners


def listeners(processes: list[psutil.Process]) -> set[tuple[str, int]]:
    """Address and port of every listening TCP socket that the processes hold: /proc/net by inode."""
    inodes = set()
    for process in processes:
        for descriptor in Path(f"/proc/{process.pid}/fd").glob("*"):
            try:
                found = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(descriptor))
            except OSError:  # closed in between
                continue
            if found:
                inodes.add(found[1])
    listening = set()
    for family, table in ((socket.AF_INET, "tcp"), (socket.AF_INET6, "tcp6")):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                packed, port = fields[1].split(":")
                words = struct.unpack(f">{len(packed) // 8}I", bytes.fromhex(packed))
                address = socket.inet_ntop(family, struct.pack(f"={len(words)}I", *words))
                listening.add((address, int(port, 16)))
    return listening


def test_all_listeners_are_on_loopback_and_the_declared_port_is_the_proxys(server: Any) -> None:
    found = listeners(server.processes())
    assert {address for address, _ in found} <= {"127.0.0.1", "::ffff:127.0.0.1"}, sorted(found)
    port = urlsplit(server.address).port
    assert ("127.0.0.1", port) in found
    owners = [one for one in server.processes() if ("127.0.0.1", port) in listeners([one])]
    assert ["ProxyActor" in "".join(one.cmdline()) for one in owners] == [True]


def test_listeners_includes_those_on_all_interfaces() -> None:
    with socket.create_server(("", 0)) as everywhere:
        port = everywhere.getsockname()[1]
        assert ("0.0.0.0", port) in listeners([psutil.Process()])


def test_a_replica_rejects_calls_without_the_clusters_token(server: Any) -> None:
    (worker, *_) = replicas(server, "Worker")
    codes = []
    for address, port in listeners([worker]):
        with grpc.insecure_channel(f"{address.removeprefix('::ffff:')}:{port}") as channel:
            stub = ASGIServiceStub(channel)
            with pytest.raises(grpc.RpcError) as refused:
                stub.HandleRequest(ASGIRequest(pickled_request_metadata=b"not even read"), timeout=10)
        codes.append(refused.value.code())
    # the other port is the Ray worker's, which has no such service
    assert sorted(code.name for code in codes) == ["UNAUTHENTICATED", "UNIMPLEMENTED"]


# ------------------------------------------------------------------------------------------------------ last: shutdown


def test_sigterm_finishes_accepted_requests_refuses_new_ones_and_exits_with_0(
    server: Any, undisturbed: dict[int, list[str]]
) -> None:
    (root, *_) = server.processes()
    late: list[tuple[int, Any]] = []

    def stop() -> None:
        root.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        late.append(post(server, {"seed": 1, "candidates": 1}))

    answers = generate_while(server, SEEDS, stop)
    assert images_of(answers) == undisturbed
    assert late[0][0] == 503
    assert late[0][1]["error"]["code"] == "unavailable"
    server._process.wait(timeout=60)
    assert server._process.returncode == 0
