"""Answers and events in OpenAI's shape: what a worker's events become on the wire.

An answer holds OpenAI's fields and ours beside them: of each picture its seed, candidate, rank and score, of the
request its timings and how much of the caption was cut. OpenAI's client keeps unknown fields as attributes.

Pictures are put into the JSON as bytes, behind their other fields: looking through base64 for what must be escaped
takes three times as long as making it (9 ms and 3 ms for ten pictures of 130 kB).
"""

import base64
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from serve.api.schemas import quality_of
from serve.messages import Finished, GeneratedImage, GenerationJob, Partial, Progress, Queued

Route = Literal["image_generation", "image_edit"]


@dataclass(frozen=True)
class AnswerStyle:
    """What all answers and events of a request have in common."""

    route: Route
    request_id: str
    model_id: str
    image_size: int
    image_tokens_given: int  # tokens of the picture that an edit starts from

    @property
    def size(self) -> str:
        return f"{self.image_size}x{self.image_size}"


def answer_body(job: GenerationJob, finished: Finished, style: AnswerStyle) -> bytes:
    """The JSON of a plain answer. Call it in a thread where there are megabytes of pictures."""
    best, rest = finished.images[: job.num_images], finished.images[job.num_images :]
    told = {
        "created": int(time.time()),
        "background": "opaque",
        "output_format": job.image_format,
        "quality": quality_of(job.num_candidates),
        "size": style.size,
        "usage": usage(finished, style),
        "model": style.model_id,
        "request_id": style.request_id,
        "tokens_cut": finished.tokens_cut,
        "timings_s": finished.timings_s,
    }
    lists = {"data": best} | ({"candidates": rest} if job.wants_all else {})
    answer = _json(told)[:-1]
    for name, images in lists.items():
        pictures = b", ".join(_with_picture(_about(image), image.data) for image in images)
        answer += b', "%b": [%b]' % (name.encode(), pictures)
    return answer + b"}"


def usage(finished: Finished, style: AnswerStyle) -> dict[str, Any]:
    """Tokens of the whole request: of the caption and the given picture, and of all candidates drawn."""
    read = finished.text_tokens + style.image_tokens_given
    return {
        "input_tokens": read,
        "output_tokens": finished.image_tokens,
        "total_tokens": read + finished.image_tokens,
        "input_tokens_details": {"text_tokens": finished.text_tokens, "image_tokens": style.image_tokens_given},
        "output_tokens_details": {"text_tokens": 0, "image_tokens": finished.image_tokens},
    }


def queued_event(queued: Queued, style: AnswerStyle) -> bytes:
    return sse(f"{style.route}.queued", {"position": queued.position, "wait_s": queued.wait_s})


def progress_event(progress: Progress, style: AnswerStyle) -> bytes:
    told = {"tokens_generated": progress.tokens_generated, "tokens_total": progress.tokens_total}
    return sse(f"{style.route}.progress", told)


def partial_event(partial: Partial, job: GenerationJob, style: AnswerStyle) -> bytes:
    event = f"{style.route}.partial_image"
    fields = {
        "type": event,
        "partial_image_index": partial.partial_index,
        "image_index": partial.candidate,
        "candidate": partial.candidate,
        "seed": job.seed,
        "rows_generated": partial.rows_generated,
        "rows_total": partial.rows_total,
    }
    return _line(event, _with_picture(fields | _common(job, style), partial.data))


def finished_events(finished: Finished, job: GenerationJob, style: AnswerStyle) -> Iterator[bytes]:
    """One event a picture: first the candidates that are not among the best, where asked for, then the best."""
    for image in finished.images[job.num_images :]:
        if image.data is not None and job.wants_all:
            yield _final_event(f"{style.route}.candidate", image, job, style, {})
    shared = {
        "usage": usage(finished, style),
        "tokens_cut": finished.tokens_cut,
        "timings_s": finished.timings_s,
        "model": style.model_id,
        "request_id": style.request_id,
    }
    for image in finished.images[: job.num_images]:
        yield _final_event(f"{style.route}.completed", image, job, style, shared)


def sse(event: str, fields: dict[str, Any]) -> bytes:
    """A server-sent event whose name is also its `type`: OpenAI's client reads the one, browsers the other."""
    return _line(event, _json({"type": event} | fields))


def _final_event(
    event: str, image: GeneratedImage, job: GenerationJob, style: AnswerStyle, more: dict[str, Any]
) -> bytes:
    fields = {"type": event, "image_index": image.rank - 1} | _about(image) | _common(job, style) | more
    return _line(event, _with_picture(fields, image.data))


def _line(event: str, data: bytes) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (event.encode(), data)


def _common(job: GenerationJob, style: AnswerStyle) -> dict[str, Any]:
    return {
        "created_at": int(time.time()),
        "size": style.size,
        "quality": quality_of(job.num_candidates),
        "background": "opaque",
        "output_format": job.image_format,
    }


def _about(image: GeneratedImage) -> dict[str, Any]:
    return {
        "seed": image.seed,
        "candidate": image.candidate,
        "rank": image.rank,
        "clip_score": image.score,
        "log_likelihood": image.log_likelihood,
        "provenance": dict(image.provenance),
    }


def _with_picture(fields: dict[str, Any], data: bytes | None) -> bytes:
    """A JSON object of `fields`, which are not empty, and the picture as `b64_json`."""
    picture = b"null" if data is None else b'"%b"' % base64.b64encode(data)
    return b'%b, "b64_json": %b}' % (_json(fields)[:-1], picture)


def _json(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, ensure_ascii=False, allow_nan=False).encode()
