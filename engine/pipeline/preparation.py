"""The first phase of a generation: a request checked, tokenised, its init image encoded.

G captions, T text positions, N image tokens.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import get_args

from engine.config.codec import CodecBackend
from engine.data.caption_guide import CaptionGuide
from engine.data.prompt_words import PromptReader
from engine.data.tokenizer import CaptionTokenizer
from engine.errors import InputError
from engine.models.image_codec import ImageCodec
from engine.models.transformer import KoDalle
from engine.pipeline.generation import PreparedRequest
from engine.pipeline.image_size import ImageSize
from engine.pipeline.init_image import InitImage, check_kept_after
from engine.pipeline.init_image_encoding import prepare_init_image
from engine.pipeline.interruption import BeforePart
from engine.pipeline.larger_images import larger_grid
from engine.sampling_params import RankBy, SamplingParams, check_captions
from engine.text import shown


class RequestPreparer:
    """What a model makes of captions before it reads them.

    Args:
        transformer, vqgan: which encode the init image, on one device.
        tokenizer: what the transformer reads captions with.
        guide: says which words the model knows.
        codec_backend: what decodes the images, which limits their size.
    """

    def __init__(
        self,
        transformer: KoDalle,
        vqgan: ImageCodec,
        tokenizer: CaptionTokenizer,
        guide: CaptionGuide,
        codec_backend: CodecBackend,
    ) -> None:
        self._transformer, self._vqgan, self._tokenizer, self._guide = transformer, vqgan, tokenizer, guide
        self._codec_backend = codec_backend

    @cached_property
    def _prompt_reader(self) -> PromptReader:
        return PromptReader(self._tokenizer.to_json(), self._guide)

    def __call__(
        self,
        captions: Sequence[str],
        params: SamplingParams,
        *,
        init_image: InitImage | None,
        size: ImageSize | None,
        rank_by: RankBy,
        strict: bool,
        candidate_numbers: Sequence[int] | None,
        before_part: BeforePart,
    ) -> list[PreparedRequest]:
        """A request a caption: see `Pipeline.prepare`, also for what it raises."""
        captions = check_captions(captions)
        if params.is_guided and self._tokenizer.names_classes:
            remedy = "needs an empty caption, which this model has none of: leave it out"
            raise InputError("guidance_scale", params.guidance_scale, remedy)
        if rank_by not in get_args(RankBy):
            raise InputError("rank_by", rank_by, f"write one of {', '.join(get_args(RankBy))}")
        config = self._vqgan.config
        size, grid = larger_grid(
            size, init_image, config.image_size, config.grid_size, codec_backend=self._codec_backend
        )
        words = [self._prompt_reader.read(caption) for caption in captions]
        for caption, read in zip(captions, words, strict=True):
            if strict and not read.all_known:
                raise InputError("caption", shown(caption), f"{read.fault}, or leave out --strict")
        encoded = self._tokenizer.encode(captions, self._transformer.config.text_seq_len, strict=strict)
        numbers = tuple(range(params.candidates)) if candidate_numbers is None else tuple(candidate_numbers)
        if rank_by == "log_likelihood" and (init_image is None or init_image.chosen_by_model):
            check_kept_after(None)
        prepared = prepare_init_image(
            init_image, list(encoded.tokens), transformer=self._transformer, vqgan=self._vqgan, tokenizer=self._tokenizer,
            rank_by=rank_by, device=self._transformer.head.weight.device, before_pass=before_part,
        )  # fmt: skip
        return [
            PreparedRequest(
                caption=caption,
                words=read,
                text_tokens=tokens[None],
                tokens_read=int((tokens != self._tokenizer.pad_id).sum()),
                tokens_cut=cut,
                sampling_params=params,
                candidates=numbers,
                rank_by=rank_by,
                init_image=own,
                size=size,
                grid=grid,
            )
            for caption, read, tokens, cut, own in zip(
                captions, words, encoded.tokens, encoded.cut, prepared, strict=True
            )
        ]
