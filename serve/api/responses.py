"""JSON responses and server-sent events in OpenAI's format, made from a worker's events.

A response has OpenAI's fields and additions: seed, candidate, rank and score of each image, timings, how much of the
caption was cut, and which of its words the model does not know. OpenAI's client keeps unknown fields as attributes.

Images are spliced into the JSON as bytes, behind their other fields: scanning base64 for characters to escape takes three
times as long as encoding it (9 ms and 3 ms for ten images of 130 kB).
"""

import base64
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from engine.data.prompt_words import PromptWords
from engine.pipeline.rendition import Rendition
from serve.api.schemas import quality_of
from serve.messages import Finished, GeneratedImage, GenerationJob, Partial, Progress, Queued

Operation = Literal["image_generation", "image_edit"]


@dataclass(frozen=True)
class ResponseContext:
    """Fields that all responses and events of a request share.

    image_size: pixels a side, as the model makes them.
    """

    operation: Operation
    request_id: str
    model_id: str
    image_size: int
    init_image_tokens: int  # tokens of an edit's init image
    words: PromptWords  # of the prompt

    def rendered(self, rendition: Rendition) -> dict[str, Any]:
        """`size` and `background` of images, and the model's own size where they were enlarged."""
        side = rendition.size or self.image_size
        return {
            "background": "transparent" if rendition.is_transparent else "opaque",
            "size": _size(side),
            "enlarged_from": None if side == self.image_size else _size(self.image_size),
        }


def response_body(job: GenerationJob, finished: Finished, context: ResponseContext) -> bytes:
    """The JSON of a response that is not streamed. Call it in a thread for megabytes of images."""
    best, rest = finished.images[: job.num_images], finished.images[job.num_images :]
    fields = {
        "created": int(time.time()),
        "output_format": job.image_format,
        "quality": quality_of(job.num_candidates),
        **context.rendered(job.rendition),
        "usage": usage(finished, context),
        "model": context.model_id,
        "request_id": context.request_id,
        "tokens_cut": finished.tokens_cut,
        **unknown_fields(context.words),
        "timings_s": finished.timings_s,
    }
    lists = {"data": best} | ({"candidates": rest} if job.wants_all else {})
    answer = _json(fields)[:-1]
    for name, images in lists.items():
        entries = b", ".join(_with_image_data(_image_fields(image), image.data) for image in images)
        answer += b', "%b": [%b]' % (name.encode(), entries)
    return answer + b"}"


def usage(finished: Finished, context: ResponseContext) -> dict[str, Any]:
    """Token counts of a request: input of the caption and the init image, output of all candidates."""
    read = finished.text_tokens + context.init_image_tokens
    return {
        "input_tokens": read,
        "output_tokens": finished.image_tokens,
        "total_tokens": read + finished.image_tokens,
        "input_tokens_details": {"text_tokens": finished.text_tokens, "image_tokens": context.init_image_tokens},
        "output_tokens_details": {"text_tokens": 0, "image_tokens": finished.image_tokens},
    }


def unknown_fields(words: PromptWords) -> dict[str, Any]:
    """What of the prompt the model does not know: the images are made as if it were not there."""
    return {
        "tokens_unknown": words.tokens_unknown,
        "words_unknown": words.words_unknown,
        "words_total": words.num_words,
        "words_known": words.num_known,
    }


def queued_event(queued: Queued, context: ResponseContext) -> bytes:
    return sse(f"{context.operation}.queued", {"position": queued.position, "wait_s": queued.wait_s})


def progress_event(progress: Progress, context: ResponseContext) -> bytes:
    fields = {"tokens_generated": progress.tokens_generated, "tokens_total": progress.tokens_total}
    return sse(f"{context.operation}.progress", fields)


def partial_event(partial: Partial, job: GenerationJob, context: ResponseContext) -> bytes:
    event = f"{context.operation}.partial_image"
    fields = {
        "type": event,
        "partial_image_index": partial.partial_index,
        "image_index": partial.candidate,
        "candidate": partial.candidate,
        "seed": job.seed,
        "rows_generated": partial.rows_generated,
        "rows_total": partial.rows_total,
    }
    return _line(event, _with_image_data(fields | _common(job, context, Rendition()), partial.data))


def finished_events(finished: Finished, job: GenerationJob, context: ResponseContext) -> Iterator[bytes]:
    """One event per image: first, if requested, the candidates that are not among the best, then the best."""
    for image in finished.images[job.num_images :]:
        if image.data is not None and job.wants_all:
            yield _final_event(f"{context.operation}.candidate", image, job, context, {})
    shared = {
        "usage": usage(finished, context),
        "tokens_cut": finished.tokens_cut,
        **unknown_fields(context.words),
        "timings_s": finished.timings_s,
        "model": context.model_id,
        "request_id": context.request_id,
    }
    for image in finished.images[: job.num_images]:
        yield _final_event(f"{context.operation}.completed", image, job, context, shared)


def sse(event: str, fields: dict[str, Any]) -> bytes:
    """A server-sent event with its name repeated as `type`: browsers read the name, OpenAI's client the `type`."""
    return _line(event, _json({"type": event} | fields))


def _final_event(
    event: str, image: GeneratedImage, job: GenerationJob, context: ResponseContext, more: dict[str, Any]
) -> bytes:
    fields = (
        {"type": event, "image_index": image.rank - 1}
        | _image_fields(image)
        | _common(job, context, job.rendition)
        | more
    )
    return _line(event, _with_image_data(fields, image.data))


def _line(event: str, data: bytes) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (event.encode(), data)


def _common(job: GenerationJob, context: ResponseContext, rendition: Rendition) -> dict[str, Any]:
    return {
        "created_at": int(time.time()),
        "quality": quality_of(job.num_candidates),
        **context.rendered(rendition),
        "output_format": job.image_format,
    }


def _size(side: int) -> str:
    return f"{side}x{side}"


def _image_fields(image: GeneratedImage) -> dict[str, Any]:
    return {
        "seed": image.seed,
        "candidate": image.candidate,
        "rank": image.rank,
        "clip_score": image.score,
        "contrast": image.contrast,
        "clip_score_percentile": None if image.score_percentile is None else round(image.score_percentile, 1),
        "log_likelihood": image.log_likelihood,
        "provenance": dict(image.provenance),
    }


def _with_image_data(fields: dict[str, Any], data: bytes | None) -> bytes:
    """A JSON object of `fields`, which must not be empty, and the image as `b64_json`."""
    encoded = b"null" if data is None else b'"%b"' % base64.b64encode(data)
    return b'%b, "b64_json": %b}' % (_json(fields)[:-1], encoded)


def _json(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, ensure_ascii=False, allow_nan=False).encode()
