"""An API server under the real listener on a free port, raw requests to it, and a scripted pool."""

import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import FastAPI
from tokenizers import Tokenizer, models, pre_tokenizers

from engine.data.caption_guide import CaptionGuide
from engine.pipeline.provenance import Arithmetic, ModelRecord, provenance
from serve.api.listener import listener
from serve.messages import (
    EmbeddingJob,
    Embeddings,
    Finished,
    GeneratedImage,
    GenerationEvent,
    GenerationJob,
    ModelInfo,
    Refused,
)

Script = Callable[[GenerationJob], AsyncIterator[GenerationEvent]]


@contextmanager
def serving(app: FastAPI) -> Iterator[int]:
    """Runs `app` in a thread of its own; yields its port on 127.0.0.1."""
    server = listener(app, host="127.0.0.1", port=0, drain_s=5)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(timeout=20)
            assert not thread.is_alive()


@dataclass
class Reply:
    """The reply on a raw connection; status 0: none."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error object, after a check of its fields."""
        error = self.json()["error"]
        assert error.keys() == {"message", "message_ko", "type", "param", "code"}
        assert all(isinstance(error[name], str) and error[name] for name in ("message", "message_ko", "type", "code"))
        return dict(error)


def request_bytes(
    method: str, path: str, *, body: bytes = b"", port: int = 80, headers: dict[str, str] | None = None
) -> bytes:
    """A complete HTTP/1.1 request; headers with an empty value are left out."""
    fields = {"host": f"127.0.0.1:{port}", "connection": "close"}
    if body or method == "POST":
        fields |= {"content-type": "application/json", "content-length": str(len(body))}
    fields |= {name.lower(): value for name, value in (headers or {}).items()}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items() if value)
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + body


def exchange(port: int, request: bytes, *, timeout_s: float = 20.0) -> Reply:
    """Sends bytes, reads until the server closes. A reset raises ConnectionResetError."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as connection:
        connection.sendall(request)
        return read_reply(connection)


def read_reply(connection: socket.socket) -> Reply:
    received = bytearray()
    while chunk := connection.recv(65536):
        received += chunk
    return parse_reply(bytes(received))


def parse_reply(received: bytes) -> Reply:
    if not received:
        return Reply(0, {}, b"")
    head, _, body = received.partition(b"\r\n\r\n")
    status_line, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if headers.get("transfer-encoding") == "chunked":
        body = _unchunked(body)
    return Reply(int(status_line.split()[1]), headers, body)


def _unchunked(body: bytes) -> bytes:
    whole = b""
    while body:
        size, _, body = body.partition(b"\r\n")
        count = int(size, 16)
        whole, body = whole + body[:count], body[count + 2 :]
    return whole


def ask(port: int, method: str, path: str, *, json_body: Any = None, **options: Any) -> Reply:
    """One request, one reply."""
    body = b"" if json_body is None else json.dumps(json_body).encode()
    return exchange(port, request_bytes(method, path, body=options.pop("body", body), port=port, **options))


def post_json(port: int, path: str, value: Any, **headers: str) -> Reply:
    named = {name.replace("_", "-"): text for name, text in headers.items()}
    return ask(port, "POST", path, json_body=value, headers=named)


def wait_until(holds: Callable[[], bool], *, within_s: float = 60.0) -> None:
    """Polls a condition; the bound only ends a test that fails."""
    ends_at = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < ends_at, f"not within {within_s:g} s"
        time.sleep(0.005)


# ------------------------------------------------------------------------------------------------------------ the pool


def _tokenizer_json() -> str:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return str(tokenizer.to_str())


INFO = ModelInfo(
    model_id="tiny",
    created=1_700_000_000,
    digest="0" * 64,
    image_size=32,
    grid_size=8,
    text_seq_len=12,
    num_parameters=1000,
    has_ranker=True,
    embedding_width=4,
    device="cpu",
    tokenizer_json=_tokenizer_json(),
    caption_guide=CaptionGuide(examples=("a red square", "a blue square")),
)


_MODEL = ModelRecord(
    model=INFO.model_id,
    model_digest=INFO.digest,
    arithmetic=Arithmetic(device="cpu", dtype="float32", int8=False, codec_backend="torch"),
)


def made(job: GenerationJob, candidate: int) -> dict[str, Any]:
    """Provenance of a candidate of a job without an init image."""
    return provenance(_MODEL, job.caption, job.sampling_params, candidate, rank_by=job.rank_by, init_image=None)


def finished(job: GenerationJob, *, data: bytes = b"an image") -> Finished:
    """A worker's result, without a worker."""
    images = tuple(
        GeneratedImage(
            number,
            job.seed,
            number + 1,
            0.5,
            None,
            None,
            made(job, number),
            data if number < job.num_images or job.wants_all else None,
        )
        for number in range(job.num_candidates)
    )
    return Finished(images, 5, 0, 64 * job.num_candidates, {"decode": 0.1, "total": 0.2})


async def at_once(job: GenerationJob) -> AsyncIterator[GenerationEvent]:
    yield finished(job)


@dataclass
class ScriptedPool:
    """A `WorkerPool` that plays `script` for each job and counts open jobs: for faults that no real worker shows."""

    script: Script = at_once
    info: ModelInfo = INFO
    wait_s: float = 0.0  # of take
    is_ready: bool = True
    jobs: list[GenerationJob] = field(default_factory=list)
    embedded: list[EmbeddingJob] = field(default_factory=list)
    taken: list[tuple[str, float, float]] = field(default_factory=list)
    num_open: int = 0

    async def model_info(self) -> ModelInfo:
        return replace(self.info)

    async def generate(self, job: GenerationJob) -> AsyncIterator[GenerationEvent]:
        self.jobs.append(job)
        self.num_open += 1
        try:
            async for event in self.script(job):
                yield event
        finally:
            self.num_open -= 1

    async def embed(self, job: EmbeddingJob) -> Embeddings | Refused:
        self.embedded.append(job)
        num_scores = len(job.items) - 1 if job.scores_first else 0
        return Embeddings((bytes(16),) * len(job.items), (0.5,) * num_scores, 3 * len(job.items), 0)

    async def metrics_text(self) -> str:
        return '# TYPE kodalle_slots gauge\nkodalle_slots{replica="worker-1"} 4.0\n'

    async def take(self, key_id: str, per_minute: float, cost: float) -> float:
        self.taken.append((key_id, per_minute, cost))
        return self.wait_s

    async def ready(self) -> bool:
        return self.is_ready
