"""Baseline: the same model behind stock `@serve.batch`, written as in Ray Serve's documentation.

    python -m serving.batch_baseline '{"model": "runs/demo/kodalle/model", "max_batch_size": 8}'

One deployment with one replica. Requests that arrive within `batch_wait_timeout_s` form one static batch: later requests
wait for its end, and a request for one image waits for one for sixteen. The images are the same to the byte: the same
pipeline, one prefill, one decoding, ranking and PNG encoding. Three things are better than in the documentation's
examples, to compare with the idea and not with a careless use of it: generation runs in a thread, so the replica's event
loop keeps accepting requests; requests of different sizes and seeds share a batch; `max_ongoing_requests` is far above the
batch size (its default of 5 would cap the batch).

Source: Ray Serve's guide "Dynamic Request Batching" (docs.ray.io).
"""

import asyncio
import base64
import json
import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from starlette.requests import Request

from engine.device import fit_to_machine, pick_device
from engine.pipeline.image_encoding import encode_image
from engine.pipeline.pipeline import Pipeline
from engine.sampling_params import SamplingParams

_MAX_ONGOING = 1024
Json = dict[str, Any]


def generate_batch(pipeline: Pipeline, requests: Sequence[Json]) -> list[Json]:
    """Bodies of POST /v1/images/generations -> responses, generated as one static batch."""
    started_s = time.perf_counter()
    prepared = [
        pipeline.prepare([one["prompt"]], SamplingParams(seed=one["seed"], candidates=int(one["candidates"])))[0]
        for one in requests
    ]
    answers = []
    for request, tokens in zip(prepared, pipeline.decode(prepared), strict=True):
        best = pipeline.finish(request, tokens).candidates[0]
        data = encode_image(best.image, "png", metadata={"caption": request.caption, "seed": best.seed})
        image = {
            "b64_json": base64.b64encode(data).decode("ascii"),
            "seed": best.seed,
            "candidate": best.candidate,
            "clip_score": best.score,
        }
        answers.append({"created": int(time.time()), "data": [image]})
    total_s = time.perf_counter() - started_s
    return [answer | {"timings_s": {"total": total_s}} for answer in answers]


class BatchedWorker:
    """The deployment class; importing this module does not import Ray."""

    def __init__(self, model: str, max_batch_size: int, batch_wait_timeout_s: float) -> None:
        from ray import serve as ray_serve

        fit_to_machine()
        self._pipeline = Pipeline.from_pretrained(model, device=pick_device(""))

        @ray_serve.batch(max_batch_size=max_batch_size, batch_wait_timeout_s=batch_wait_timeout_s)
        async def batched(requests: list[Json]) -> list[Json]:
            return await asyncio.to_thread(generate_batch, self._pipeline, requests)

        self._batched: Any = batched  # called with one body, returns one response

    async def __call__(self, request: Request) -> Json:
        body = await request.json()
        if request.url.path == "/tune":
            self._batched.set_max_batch_size(body["max_batch_size"])
            self._batched.set_batch_wait_timeout_s(body["batch_wait_timeout_s"])
            return {}
        answer: Json = await self._batched(body)
        return answer


def serve(model: str, *, max_batch_size: int = 8, batch_wait_timeout_s: float = 0.01) -> None:
    """Serves on a free port of this machine until SIGTERM."""
    with tempfile.TemporaryDirectory(prefix="stock-", ignore_cleanup_errors=True) as folder:
        # A private token: Ray would leave one in the user's home.
        Path(folder, "token").write_text(secrets.token_hex(32), encoding="ascii")
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(Path(folder, "token"))}
        os.environ.pop("RAY_ADDRESS", None)  # another cluster's
        _serve_from(folder, (model, max_batch_size, batch_wait_timeout_s))


def _serve_from(folder: str, arguments: tuple[str, int, float]) -> None:
    import ray
    from ray import serve as ray_serve

    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=128 * 2**20,
        _node_ip_address="127.0.0.1",
        _temp_dir=folder,
    )
    port = _free_port()
    ray_serve.start(http_options={"host": "127.0.0.1", "port": port})
    deployment = ray_serve.deployment(
        max_ongoing_requests=_MAX_ONGOING,
        # All cores: Ray sets a process's threads to its cores.
        ray_actor_options={"num_cpus": os.cpu_count() or 1, "num_gpus": int(torch.cuda.is_available())},
    )(BatchedWorker)
    ray_serve.run(deployment.bind(*arguments), route_prefix="/")
    stop_signal = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):  # after Ray, which takes SIGTERM for itself
        signal.signal(number, lambda *_: stop_signal.set())
    print(json.dumps({"ready": True, "url": f"http://127.0.0.1:{port}"}), flush=True)
    stop_signal.wait()
    ray_serve.shutdown()
    ray.shutdown()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    serve(**json.loads(sys.argv[1]))
