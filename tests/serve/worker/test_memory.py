"""Peak memory of hostile requests, measured on an API server in a process of its own."""

import io
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from serve.settings import Limits
from tests.live_server import Reply, ask, post_json, read_reply, request_bytes
from tests.paths import REPOSITORY
from tests.serve.api.test_forms import part, whole
from tests.serve.api.test_uploads import bomb

GENERATE, EDIT = "/v1/images/generations", "/v1/images/edits"
ROOT = REPOSITORY

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")

_SERVER = """
import sys
from serve.api.application import build_api
from serve.settings import Limits, ServeSettings
from tests.live_server import ScriptedPool, serving
from tests.paths import REPOSITORY
limits = Limits(max_json_bytes=int(sys.argv[1]), max_pixels=int(sys.argv[2]))
with serving(build_api(ScriptedPool(), ServeSettings(page=False, limits=limits))) as port:
    print(port, flush=True)
    sys.stdin.read()
"""


@contextmanager
def server(limits: Limits) -> Iterator[tuple[int, int]]:
    """An API server in its own process: its port and process id."""
    arguments = [str(limits.max_json_bytes), str(limits.max_pixels)]
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", _SERVER, *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        assert post_json(port, GENERATE, {"prompt": "a"}).status == 200  # modules that are loaded once are loaded now
        small = io.BytesIO()
        Image.new("RGB", (64, 64)).save(small, "PNG")
        form = whole(part("prompt", b"a"), part("image", small.getvalue(), filename="a"))
        assert _post_form(port, form).status == 200
        yield port, process.pid
    finally:
        process.communicate(timeout=20)


@pytest.fixture(scope="module")
def api_server() -> Iterator[tuple[int, int]]:
    with server(Limits()) as running:
        yield running


def _post_form(port: int, body: bytes) -> Reply:
    return ask(port, "POST", EDIT, body=body, headers={"content-type": "multipart/form-data; boundary=b0undary"})


def _peak_mb(pid: int) -> float:
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def _send_large(port: int, path: str, *, is_chunked: bool, mebibytes: int = 100) -> Reply:
    content_type = "application/json" if path == GENERATE else "multipart/form-data; boundary=b0undary"
    start = b'{"prompt": "' if path == GENERATE else part("image", b"", filename="a")[:-2]
    block = b"a" * 2**20
    headers = {"content-type": content_type}
    if is_chunked:
        headers |= {"transfer-encoding": "chunked", "content-length": ""}
    else:
        headers["content-length"] = str(len(start) + mebibytes * len(block))
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(request_bytes("POST", path, port=port, headers=headers))
        for piece in (start, *[block] * mebibytes):
            connection.sendall(b"%x\r\n%b\r\n" % (len(piece), piece) if is_chunked else piece)
        if is_chunked:
            connection.sendall(b"0\r\n\r\n")
        return read_reply(connection)


@pytest.mark.parametrize("path", [GENERATE, EDIT])
@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_body_of_100_mb_is_413_and_takes_no_memory(api_server: tuple[int, int], path: str, is_chunked: bool) -> None:
    port, pid = api_server
    before = _peak_mb(pid)
    reply = _send_large(port, path, is_chunked=is_chunked)
    assert (reply.status, reply.error["code"]) == (413, "request_too_large")
    assert _peak_mb(pid) - before < 10


def test_an_image_of_21_kb_with_177_million_pixels_is_400_and_takes_no_memory(
    api_server: tuple[int, int],
) -> None:
    port, pid = api_server
    before = _peak_mb(pid)
    for name in ("image", "mask"):
        parts = [part("prompt", b"a"), part(name, bomb(13_300), filename="a.png")]
        if name == "mask":
            parts.append(part("image", bomb(10), filename="b.png"))
        reply = _post_form(port, whole(*parts))
        assert (reply.status, reply.error["code"], reply.error["param"]) == (400, "image_too_large", name)
    assert _peak_mb(pid) - before < 50


@pytest.mark.slow
def test_without_the_limits_both_take_memory() -> None:
    with server(Limits(max_json_bytes=200 * 2**20, max_pixels=10**9)) as (port, pid):
        before = _peak_mb(pid)
        assert _send_large(port, GENERATE, is_chunked=False, mebibytes=30).error["code"] == "invalid_json"
        assert _peak_mb(pid) - before > 30
        _post_form(port, whole(part("prompt", b"a"), part("image", bomb(13_300), filename="a.png")))
        assert _peak_mb(pid) - before > 400
