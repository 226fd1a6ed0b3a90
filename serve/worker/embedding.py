"""KoCLIP embeddings of captions and pictures, between the postprocessing of images.

The postprocessing thread owns the ranker. Embeddings go through it in parts of `_AT_ONCE`, each behind the images that wait
to be decoded and ranked, so a long list delays a generation by one part at most.

E width of KoCLIP's space.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from PIL import Image

from engine.pipeline.pipeline import Pipeline
from serve.messages import EmbeddingJob, Embeddings, ModelInfo, Refused
from serve.worker.postprocessing import Postprocessor, WorkerStopped

_AT_ONCE = 16
_MOST_WAITING = 1024  # captions and pictures of all requests
_RETRY_AFTER_S = 1.0
Result = TypeVar("Result")


class Embedder:
    """Embeds jobs on the postprocessing thread; called from the event loop."""

    def __init__(self, pipeline: Pipeline, info: ModelInfo, postprocessor: Postprocessor) -> None:
        self._pipeline, self._info, self._postprocessor = pipeline, info, postprocessor
        self.num_waiting = 0

    async def embed(self, job: EmbeddingJob) -> Embeddings | Refused:
        """Embeddings in the order of the job; cancelling the task leaves its other parts out."""
        if not self._info.embedding_width:
            return Refused("invalid", "this model embeds nothing", param="model")
        if self.num_waiting + len(job.items) > _MOST_WAITING and self.num_waiting:
            return Refused("queue_full", retry_after_s=_RETRY_AFTER_S)
        self.num_waiting += len(job.items)
        try:
            return await self._embed(job)
        except WorkerStopped:
            return Refused("failed", "the worker stopped")
        finally:
            self.num_waiting -= len(job.items)

    async def _embed(self, job: EmbeddingJob) -> Embeddings:
        vectors: dict[int, torch.Tensor] = {}  # by the item's number
        text_tokens = tokens_cut = 0
        captions = {number: item for number, item in enumerate(job.items) if isinstance(item, str)}
        for texts in _parts(captions):
            read = await self._run(partial(self._pipeline.embed_captions, list(texts.values())))
            vectors |= zip(texts, read.vectors, strict=True)
            text_tokens, tokens_cut = text_tokens + read.text_tokens, tokens_cut + read.tokens_cut
        pictures = {number: item for number, item in enumerate(job.items) if isinstance(item, Image.Image)}
        for images in _parts(pictures):
            vectors |= zip(images, await self._run(partial(self._of_images, list(images.values()))), strict=True)
        ordered = torch.stack([vectors[number] for number in range(len(job.items))])  # (n, E)
        scores: list[float] = []
        if job.scores_first:  # beside each of the others, as the ranker scores images for a caption
            assert self._pipeline.koclip is not None
            scores = self._pipeline.koclip.scores(ordered[1:], ordered[:1])[0].tolist()
        rows = ordered.numpy().astype("<f4")
        return Embeddings(tuple(row.tobytes() for row in rows), tuple(scores), text_tokens, tokens_cut)

    def _of_images(self, images: list[Image.Image]) -> torch.Tensor:
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))  # (n, S, S, 3) uint8
        return self._pipeline.embed_images(pixels.permute(0, 3, 1, 2).float() / 255)

    async def _run(self, run: Callable[[], Result]) -> Result:
        future: Future[Result] = self._postprocessor.call(run)
        return await asyncio.wrap_future(future)


def _parts(items: dict[int, Result]) -> list[dict[int, Result]]:
    numbers = list(items)
    starts = range(0, len(numbers), _AT_ONCE)
    return [{number: items[number] for number in numbers[start : start + _AT_ONCE]} for start in starts]
