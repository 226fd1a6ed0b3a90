"""Captions to ranked pictures: the one way of drawing, for the command line, the benchmarks and the server.

    pipeline = Pipeline.from_pretrained("runs/demo/kodalle/model")
    drawing = pipeline(["상의에서 색상은 레드이다."], candidates=16, seed=7)[0]
    drawing.top(1)[0].image.save("best.png")

Candidate i of seed s is the same picture whatever else is drawn: alone, among sixteen, beside other captions.
A picture may be given to complete or to repaint (engine/pipeline/init_image.py), and a caption's beginning to write on
(engine/pipeline/caption_continuation.py).

G captions, n candidates each, B = G * n rows, T text positions, N image tokens, S pixels.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from numpy.typing import NDArray
from torch import Tensor

from engine.codec.codec import Codec, CodecBackend, open_codec
from engine.config import GenerationConfig
from engine.data.tokenizer import CaptionTokenizer
from engine.decoding.sampler import Sampler
from engine.device import default_dtype
from engine.errors import InputError
from engine.files import is_hub_name
from engine.models.folder import (
    Attributes,
    Part,
    PartName,
    has_part,
    load_folder_tokenizer,
    load_part,
    read_attributes,
    read_generation,
    write_model_folder,
)
from engine.models.koclip import KoClip
from engine.models.transformer import KoDalle
from engine.models.vqgan import Vqgan
from engine.pipeline.caption_continuation import Continuation, continue_caption
from engine.pipeline.generation import Generation, Start, ranked
from engine.pipeline.image_files import to_uint8
from engine.pipeline.init_image import InitImage
from engine.pipeline.likelihood import log_likelihoods
from engine.sampling_params import SamplingParams, SequenceRequest, check_captions

_RANKED_AT_ONCE = 16  # bounds memory; scores may differ by 1e-7 with the company
OnProgress = Callable[[int, int], None]
RankBy = Literal["koclip", "fit"]


class Pipeline:
    """A transformer, its codec, its ranker (or None) and their tokenizer, on one device."""

    def __init__(
        self,
        transformer: KoDalle,
        vqgan: Vqgan,
        koclip: KoClip | None,
        tokenizer: CaptionTokenizer,
        card: str = "",
        codec: Codec | None = None,
        *,
        generation: GenerationConfig | None = None,
        attributes: Attributes | None = None,
        int8: bool = False,
        speculative: bool = True,
    ) -> None:
        self.transformer, self.vqgan, self.koclip = transformer.eval(), vqgan.eval(), koclip
        self._codec = codec or Codec.of(vqgan, koclip, int8=int8)
        if koclip is not None:
            koclip.eval()
        self.tokenizer = tokenizer
        self._card = card
        self._generation = generation or GenerationConfig()
        self.attributes: Attributes = attributes or {}
        self.default_sampling_params = self._generation.sampling_params()
        null = tokenizer.empty(transformer.config.text_seq_len)[0]
        self.sampler = Sampler(
            transformer,
            null_text_tokens=null.to(self.device),
            weights="int8" if int8 else None,
            speculative=speculative,
        )

    @classmethod
    def from_pretrained(
        cls,
        folder_or_hub_id: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        int8: bool = False,
        speculative: bool = True,
        revision: str | None = None,
        local_files_only: bool = False,
        codec_backend: CodecBackend = "torch",
    ) -> "Pipeline":
        """Loads a model folder, or fetches one from the Hugging Face hub by `owner/name`.

        Args:
            dtype: the transformer's; None: what suits the machine (engine.device). On a GPU the codec's and
                the ranker's too; on a CPU those are float32.
            int8: 8-bit arithmetic for drawing and decoding on a CPU: about half the time, slightly other pictures.
            speculative: let one or two candidates on a CPU take several tokens a step; the same tokens, sooner with a
                model that was trained (engine/decoding/speculative/jacobi.py).
            codec_backend: what decodes images and embeds: torch, or onnx, the files that `kodalle export` wrote into the
                folder (engine.codec.codec).

        Raises:
            InputError: no such folder or hub name, a part that is missing, weights that do not fit, each by name.
        """
        folder = local_folder(folder_or_hub_id, revision=revision, local_files_only=local_files_only)
        transformer: KoDalle = load_part(folder, "transformer")
        vqgan: Vqgan = load_part(folder, "vqgan")
        koclip: KoClip | None = load_part(folder, "koclip") if has_part(folder, "koclip") else None
        _check_fit(transformer, vqgan, folder)
        card = folder / "model_card.md"
        device = torch.device(device)
        dtype = dtype or default_dtype(device, sum(parameter.numel() for parameter in transformer.parameters()))
        transformer.to(device=device, dtype=dtype)
        pictures_dtype = torch.float32 if device.type == "cpu" else dtype
        for module in (vqgan, koclip):
            if module is not None:
                module.to(device=device, dtype=pictures_dtype)
        codec = open_codec(folder, vqgan, koclip, backend=codec_backend, device=device, int8=int8)
        return cls(
            transformer,
            vqgan,
            koclip,
            load_folder_tokenizer(folder),
            card.read_text(encoding="utf-8") if card.is_file() else "",
            codec,
            generation=read_generation(folder),
            attributes=read_attributes(folder),
            int8=int8,
            speculative=speculative,
        )

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Writes a model folder that `from_pretrained` reads; `dtype` halves it with torch.float16."""
        parts: dict[PartName, Part] = {
            "vqgan": Part(self.vqgan.config, self.vqgan.state_dict()),
            "transformer": Part(self.transformer.config, self.transformer.state_dict()),
        }
        if self.koclip is not None:
            parts["koclip"] = Part(self.koclip.config, self.koclip.state_dict())
        write_model_folder(
            Path(folder), parts, card=self._card,
            tokenizer=self.tokenizer, generation=self._generation, attributes=self.attributes, dtype=dtype,
        )  # fmt: skip

    @property
    def device(self) -> torch.device:
        return self.transformer.head.weight.device

    def __call__(
        self,
        captions: Sequence[str],
        sampling_params: SamplingParams | None = None,
        *,
        candidates: int | None = None,
        seed: int | None = None,
        init_image: InitImage | None = None,
        rank_by: RankBy = "koclip",
        strict: bool = False,
        on_progress: OnProgress | None = None,
    ) -> list[Generation]:
        """Generates candidates of each caption and ranks them.

        Args:
            sampling_params: None: the model's own, `default_sampling_params`.
            candidates, seed: the same as in `sampling_params`, over which they have precedence.
            init_image: an image whose first rows, or all but what a mask marks, every candidate keeps.
            rank_by: KoCLIP's score of the finished picture; or, for a repainted hole, how well it fits what was kept
                after it.
            strict: refuse a caption that is longer than the model's text instead of cutting its end.
            on_progress: called with (image tokens drawn of each row, N).

        Raises:
            InputError: no caption, an empty one, too long with `strict`, or options out of range; a given picture that
                leaves nothing to draw or nothing to keep, or nothing after the hole to rank by.
        """
        captions = check_captions(captions)
        params = (sampling_params or self.default_sampling_params).updated(candidates=candidates, seed=seed)
        if rank_by not in get_args(RankBy):
            raise InputError("rank_by", rank_by, f"write one of {', '.join(get_args(RankBy))}")
        encoded = self.tokenizer.encode(captions, self.transformer.config.text_seq_len, strict=strict)
        G, n = len(captions), params.candidates
        timings_s: dict[str, float] = {}
        with _timed(timings_s, "prefill"):
            start = None if init_image is None else self.encode_init_image(init_image)
            if rank_by == "fit":
                check_kept_after(start)
            prefix = self.sampler.prefill(encoded.tokens)
        rows = [SequenceRequest(caption, params, candidate=number) for caption in range(G) for number in range(n)]
        with _timed(timings_s, "decode"):
            total = self.transformer.config.image_seq_len
            on_step = None if on_progress is None else lambda position, _: on_progress(position + 1, total)
            kept = None if start is None else start.tokens.expand(len(rows), -1)
            image_tokens = self.sampler.decode(prefix, rows, given=kept, on_step=on_step)  # (B, N)
        with _timed(timings_s, "vqgan"):
            images = self.decode_images(image_tokens, start=start)  # (B, 3, S, S)
        with _timed(timings_s, "ranking"):
            scores = self.rank_scores(captions, images.unflatten(0, (G, n)))  # (G, n) or None
            fits = self.fits(encoded.tokens, image_tokens, start) if rank_by == "fit" and start is not None else None
        pixels = to_uint8(images).unflatten(0, (G, n))  # (G, n, S, S, 3)
        tokens = image_tokens.cpu().unflatten(0, (G, n))  # (G, n, N)
        return [
            Generation(
                caption=caption,
                tokens_cut=encoded.cut[g],
                candidates=ranked(
                    params.seed,
                    tokens[g],
                    pixels[g],
                    None if scores is None else scores[g],
                    None if fits is None else fits[g],
                ),
                timings_s=timings_s,
                init_tokens=None if start is None else tuple(start.tokens.tolist()),
            )
            for g, caption in enumerate(captions)
        ]

    def continue_caption(
        self, beginning: str, sampling_params: SamplingParams | None = None, *, count: int = 4, seed: int | None = None
    ) -> list[Continuation]:
        """Samples the rest of a caption, `count` times: see engine/pipeline/caption_continuation.py."""
        return continue_caption(self.transformer, self.tokenizer, beginning, sampling_params, count=count, seed=seed)

    def encode_init_image(self, given: InitImage) -> Start:
        """Raises InputError: a mask or rows that leave nothing to draw, or nothing kept."""
        image_size, grid_size = self.vqgan.config.image_size, self.vqgan.config.grid_size
        return self.start_from(
            given.pixels(image_size),
            regenerated_pixels=given.regenerated_pixels(image_size, grid_size),
            regenerated_tokens=given.regenerated_tokens(image_size, grid_size),
            paste=given.paste,
        )

    @torch.inference_mode()
    def start_from(
        self,
        pixels: NDArray[np.uint8],
        *,
        regenerated_pixels: NDArray[np.bool_],
        regenerated_tokens: NDArray[np.bool_],
        paste: bool,
    ) -> Start:
        """A given picture's tokens and pixels from what `InitImage` works out of it.

        Args:
            pixels: (S, S, 3).
            regenerated_pixels: (S, S), True where the picture may change.
            regenerated_tokens: (N,), True where a token is drawn.
        """
        image = torch.from_numpy(pixels).to(self.device).permute(2, 0, 1).float() / 255
        tokens = self.vqgan.encode(image[None])[0].masked_fill(torch.from_numpy(regenerated_tokens).to(self.device), -1)
        regenerated = torch.from_numpy(regenerated_pixels).to(self.device)
        return Start(tokens, image, ~regenerated if paste else torch.zeros_like(regenerated))

    @torch.inference_mode()
    def decode_images(self, image_tokens: Tensor, *, start: Start | None = None) -> Tensor:
        """(B, N) -> (B, 3, S, S) in [0, 1]; with a start, what it keeps of the original pasted in."""
        images = self._codec.decoder.decode(image_tokens)
        return images if start is None else torch.where(start.pasted, start.pixels, images)

    def fits(self, text_tokens: Tensor, image_tokens: Tensor, start: Start) -> Tensor:
        """How well each repainted hole fits what is kept after it: (G, T), (B, N) -> (G, n) nats."""
        fits = log_likelihoods(self.transformer, text_tokens, image_tokens, start.tokens < 0)
        return fits.unflatten(0, (len(text_tokens), -1))

    @torch.inference_mode()
    def rank_scores(self, captions: Sequence[str], images: Tensor) -> Tensor | None:
        """KoCLIP's score of each caption's own pictures.

        Args:
            images: (G, n, 3, S, S) in [0, 1].

        Returns:
            (G, n) on the CPU; None when the model has no ranker.
        """
        embedder = self._codec.embedder
        if self.koclip is None or embedder is None:
            return None
        tokens = self.tokenizer.encode(captions, self.koclip.config.text_seq_len).tokens.to(self.device)
        texts = embedder.embed_texts(tokens)  # (G, E)
        pictures = torch.cat([embedder.embed_images(part) for part in images.flatten(0, 1).split(_RANKED_AT_ONCE)])
        pictures = pictures.unflatten(0, images.shape[:2])  # (G, n, E)
        rows = [self.koclip.scores(own, text[None])[0] for own, text in zip(pictures, texts, strict=True)]
        return torch.stack(rows).float().cpu()


def check_kept_after(start: Start | None) -> None:
    regenerated = torch.zeros(1, dtype=torch.bool) if start is None else start.tokens < 0
    if not bool((regenerated.cumsum(0) > 0)[~regenerated].any()):
        raise InputError("rank_by", "fit", "needs a mask with something kept right of it or below: rank by koclip")


def _check_fit(transformer: KoDalle, vqgan: Vqgan, folder: Path) -> None:
    ours, theirs = transformer.config, vqgan.config
    if (ours.image_vocab_size, ours.image_grid_size) != (theirs.codebook_size, theirs.grid_size):
        raise InputError(
            "model folder",
            folder,
            f"transformer draws {ours.image_grid_size}x{ours.image_grid_size} of {ours.image_vocab_size} tokens, the "
            f"VQGAN reads {theirs.grid_size}x{theirs.grid_size} of {theirs.codebook_size}: they are of two models",
        )


def local_folder(folder_or_hub_id: str | Path, *, revision: str | None = None, local_files_only: bool = False) -> Path:
    """A model folder as it was named, or the hub's copy of `owner/name` on this disk.

    Raises:
        InputError: the hub has no such model or cannot be reached.
    """
    folder = Path(folder_or_hub_id)
    name = str(folder_or_hub_id)
    if folder.exists() or not is_hub_name(name):
        return folder  # a folder that is missing gets its own error message
    try:
        fetched = snapshot_download(
            name,
            revision=revision,
            local_files_only=local_files_only,
            allow_patterns=["*.json", "*.safetensors", "*.txt", "*.md", "*.onnx"],  # never pickles or code
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError("model", name, f"no such folder, and the hub gave nothing ({reason})") from error
    return Path(fetched)


class _timed:
    """Adds a block's seconds to `timings_s`; blocks end in a copy to the host or are waited for."""

    def __init__(self, timings_s: dict[str, float], name: str) -> None:
        self._timings_s, self._name = timings_s, name

    def __enter__(self) -> None:
        self._begun = time.perf_counter()

    def __exit__(self, *_: Any) -> None:
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self._timings_s[self._name] = time.perf_counter() - self._begun
