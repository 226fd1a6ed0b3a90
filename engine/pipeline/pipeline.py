"""Captions to ranked images: one pipeline for the command line, the benchmarks and the server.

    pipeline = Pipeline.from_pretrained("runs/demo/kodalle/model")
    generation = pipeline(["a red shirt"], SamplingParams(candidates=16, seed=7))[0]
    generation.top(1)[0].image.save("best.png")

Three phases, which the server runs on threads of its own:

    prepare   captions, parameters and init image checked, tokenised, encoded    -> PreparedRequest, one a caption
    decode    prefixes read, image tokens sampled                                -> (n, N) a request
    finish    tokens decoded to images, kept pixels pasted, scored and ranked    -> Generation

Candidate i of seed s is the same image whatever else is generated: alone, among sixteen, beside other captions.
An init image may be continued or inpainted (engine/pipeline/init_image.py), the beginning of a caption continued
(engine/pipeline/caption_continuation.py), and images generated that are larger than the model's own size
(engine/decoding/sliding_window.py).

G captions, n candidates each, B = G * n sequences, T text positions, N image tokens, S pixels. Where S x S and N are written, larger
images have height x width and their own number of tokens.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from engine.codec.codec import Codec, open_codec
from engine.config.codec import CodecBackend
from engine.config.generation import GenerationConfig
from engine.data.caption_guide import CaptionGuide, read_guide
from engine.data.prompt_words import PromptReader
from engine.data.tokenizer import CaptionTokenizer, check_padding
from engine.decoding.cpu.packed_weights import Weights
from engine.decoding.sampler import Sampler
from engine.decoding.sliding_window import TokenGrid
from engine.device import cpu_capabilities
from engine.errors import InputError
from engine.models.folder import (
    Part,
    load_folder_tokenizer,
    load_own_ranker_tokenizer,
    own_real_scores,
    write_model_folder,
)
from engine.models.folder_config import PartName, model_digest, read_generation, read_ground
from engine.models.image_codec import ImageCodec
from engine.models.ranker import Ranker
from engine.models.real_scores import RealScores
from engine.models.transformer import KoDalle
from engine.pipeline.caption_continuation import Continuation, continue_caption
from engine.pipeline.generation import (
    Generation,
    PreparedInitImage,
    PreparedRequest,
    ranked,
)
from engine.pipeline.image_files import to_uint8
from engine.pipeline.image_size import ImageSize
from engine.pipeline.init_image import InitImage, check_kept_after
from engine.pipeline.init_image_encoding import prepare_init_image
from engine.pipeline.interruption import BeforePart, uninterrupted
from engine.pipeline.larger_images import OnPosition, decode_sequences, larger_grid
from engine.pipeline.likelihood import log_likelihoods
from engine.pipeline.loading import load_models
from engine.pipeline.local_folder import local_folder
from engine.pipeline.provenance import Arithmetic, ModelRecord, provenance
from engine.pipeline.ranking import CandidateScorer, CaptionEmbeddings, Scores
from engine.pipeline.rendition import Rendition
from engine.pipeline.torch_state import exact, inference, survive_fork, timed
from engine.sampling_params import RankBy, SamplingParams, check_captions
from engine.text import shown

_AT_ONCE = 16  # images decoded together: bounds memory


class Pipeline:
    """A transformer, its codec, its ranker (or None) and their tokenizer, on one device."""

    def __init__(
        self,
        transformer: KoDalle,
        vqgan: ImageCodec,
        koclip: Ranker | None,
        tokenizer: CaptionTokenizer,
        card: str = "",
        codec: Codec | None = None,
        *,
        generation: GenerationConfig | None = None,
        caption_guide: CaptionGuide | None = None,
        real_scores: RealScores | None = None,
        ground: str | None = None,
        ranker_tokenizer: CaptionTokenizer | None = None,
        int8: bool = False,
        weights: Weights | None = None,
        speculative: bool = True,
        codec_backend: CodecBackend = "torch",
        model_id: str = "",
        folder: Path | None = None,
    ) -> None:
        self.transformer, self.vqgan, self.koclip = transformer.eval(), vqgan.eval(), koclip
        self._codec = codec or Codec.of(vqgan, koclip, int8=int8)
        if koclip is not None:
            koclip.eval()
        self.tokenizer, self._ranker_tokenizer = tokenizer, ranker_tokenizer
        self._card = card
        self._generation = generation or GenerationConfig()
        self.caption_guide = caption_guide or CaptionGuide()
        self.real_scores = real_scores  # what the ranker's scores are compared with
        self.ground = ground  # `#rrggbb` around the objects in its images, if it learned from cut-outs
        embedder = self._codec.embedder
        self._scorer = None
        if koclip is not None and embedder is not None:
            self._scorer = CandidateScorer(koclip, embedder, self.ranker_tokenizer, self.caption_guide)
        self.default_sampling_params = self._generation.sampling_params()
        self.model_id, self._folder = model_id, folder
        self._int8, self._codec_backend, self._speculative = int8, codec_backend, speculative
        self._weights = weights
        null = None if tokenizer.names_classes else tokenizer.empty(transformer.config.text_seq_len)
        self.sampler = Sampler(
            transformer,
            null_text_tokens=None if null is None else null[0].to(self.device),
            weights=weights or ("int8" if int8 else None),
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
        weights: Weights | None = None,
        speculative: bool = True,
        revision: str | None = None,
        local_files_only: bool = False,
        codec_backend: CodecBackend = "torch",
    ) -> "Pipeline":
        """Loads a model folder, or fetches one from the Hugging Face hub by `owner/name`.

        Args:
            dtype: the transformer's; None: what suits the machine (engine.device). On a GPU the codec's and
                the ranker's too; on a CPU those are float32.
            int8: 8-bit arithmetic on a CPU: about half the time, images that differ slightly. The VQGAN decoder stays in float32 where it is
                compiled, as nothing is faster; else it is in 8 bits where the processor has VNNI.
            weights: the transformer's, as decoding on a CPU reads them: int8, or int4, smaller and coarser. None: as `int8` says.
            speculative: let one or two candidates on a CPU take several tokens a step; the same tokens, sooner with a
                model that was trained (engine/decoding/speculative/jacobi.py).
            codec_backend: what decodes images and embeds: torch, or onnx, the files that `kodalle export` wrote into the
                folder (engine.codec.codec).

        Raises:
            InputError: no such folder or hub name, a part that is missing, weights that do not fit, each by name.
        """
        device = torch.device(device)
        survive_fork(device)
        folder = local_folder(folder_or_hub_id, revision=revision, local_files_only=local_files_only)
        transformer, vqgan, koclip = load_models(folder, device=device, dtype=dtype)
        tokenizer = load_folder_tokenizer(folder)
        check_padding(tokenizer, transformer.config, field="model folder", value=folder)
        card = folder / "model_card.md"
        codec = open_codec(folder, vqgan, koclip, backend=codec_backend, device=device, int8=int8)
        return cls(
            transformer,
            vqgan,
            koclip,
            tokenizer,
            card.read_text(encoding="utf-8") if card.is_file() else "",
            codec,
            generation=read_generation(folder),
            caption_guide=read_guide(folder),
            real_scores=own_real_scores(folder),
            ground=read_ground(folder),
            ranker_tokenizer=load_own_ranker_tokenizer(folder),
            int8=int8,
            weights=weights,
            speculative=speculative,
            codec_backend=codec_backend,
            model_id=str(folder_or_hub_id),
            folder=folder,
        )

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Writes a model folder that `from_pretrained` reads; torch.float16 as `dtype` halves its size."""
        parts: dict[PartName, Part] = {
            "vqgan": Part(self.vqgan.config, self.vqgan.state_dict()),
            "transformer": Part(self.transformer.config, self.transformer.state_dict()),
        }
        if self.koclip is not None:
            parts["koclip"] = Part(self.koclip.config, self.koclip.state_dict())
        write_model_folder(
            Path(folder), parts, card=self._card,
            tokenizer=self.tokenizer, ranker_tokenizer=self._ranker_tokenizer, generation=self._generation,
            caption_guide=self.caption_guide, real_scores=self.real_scores, ground=self.ground, dtype=dtype,
        )  # fmt: skip

    def __reduce__(self) -> tuple[Any, ...]:
        # Packed weights, graphs and sessions are rebuilt from what is pickled.
        arguments = {
            "transformer": self.transformer,
            "vqgan": self.vqgan,
            "koclip": self.koclip,
            "tokenizer": self.tokenizer,
            "card": self._card,
            "generation": self._generation,
            "caption_guide": self.caption_guide,
            "real_scores": self.real_scores,
            "ground": self.ground,
            "ranker_tokenizer": self._ranker_tokenizer,
            "int8": self._int8,
            "weights": self._weights,
            "speculative": self._speculative,
            "codec_backend": self._codec_backend,
            "model_id": self.model_id,
            "folder": self._folder,
        }
        return _unpickled, (arguments,)

    @property
    def ranker_tokenizer(self) -> CaptionTokenizer:
        """What the ranker reads captions with; the transformer's where it has none of its own."""
        return self._ranker_tokenizer or self.tokenizer

    @cached_property
    def prompt_reader(self) -> PromptReader:
        """Which words of a prompt the model knows."""
        return PromptReader(self.tokenizer.to_json(), self.caption_guide)

    @property
    def device(self) -> torch.device:
        return self.transformer.head.weight.device

    @property
    def arithmetic(self) -> Arithmetic:
        """Device, dtype and backend as provenance states them."""
        device = self.device
        return Arithmetic(
            device=f"cpu {cpu_capabilities().isa}" if device.type == "cpu" else torch.cuda.get_device_name(device),
            dtype=str(self.transformer.head.weight.dtype).removeprefix("torch."),
            int8=self._int8,
            codec_backend=self._codec_backend,
            weights=self._weights,
            compiled=self.sampler.is_compiled,
        )

    @cached_property
    def model_record(self) -> ModelRecord:
        """Model and arithmetic as provenance states them; reads the weight files once for their digest."""
        digest = None if self._folder is None else model_digest(self._folder)
        return ModelRecord(model=self.model_id, model_digest=digest, arithmetic=self.arithmetic)

    def __call__(
        self,
        captions: Sequence[str],
        sampling_params: SamplingParams | None = None,
        *,
        candidates: int | None = None,
        seed: int | None = None,
        init_image: InitImage | None = None,
        size: ImageSize | None = None,
        rank_by: RankBy = "koclip",
        strict: bool = False,
        on_position: OnPosition | None = None,
    ) -> list[Generation]:
        """Generates candidates of each caption and ranks them: the three phases in one.

        Args:
            candidates, seed: the same as in `sampling_params`, over which they have precedence.
            on_position: called after each position with (image tokens that every sequence has, N).
            Others: see `prepare`.

        Raises:
            InputError: as `prepare`.
        """
        timings_s: dict[str, float] = {}
        params = (sampling_params or self.default_sampling_params).updated(candidates=candidates, seed=seed)
        with timed(timings_s, "prefill", self.device):
            requests = self.prepare(captions, params, init_image=init_image, size=size, rank_by=rank_by, strict=strict)
        image_tokens = self.decode(requests, timings_s=timings_s, on_position=on_position)
        return [
            self.finish(request, tokens, timings_s=timings_s)
            for request, tokens in zip(requests, image_tokens, strict=True)
        ]

    def prepare(
        self,
        captions: Sequence[str],
        sampling_params: SamplingParams | None = None,
        *,
        init_image: InitImage | None = None,
        size: ImageSize | None = None,
        rank_by: RankBy = "koclip",
        strict: bool = False,
        candidate_numbers: Sequence[int] | None = None,
        before_part: BeforePart = uninterrupted,
    ) -> list[PreparedRequest]:
        """The first phase: checks, tokenises, encodes the init image.

        Args:
            sampling_params: None: the model's own, `default_sampling_params`.
            init_image: an image whose first rows, all but what a mask marks, or what the model finds likely, every candidate keeps.
            size: larger than the model's own, of whole tokens, without an init image; None: the model's own.
            rank_by: KoCLIP's score of the finished image; or, with a mask, the log-likelihood of what is kept after it.
            strict: refuse a caption that is longer than the model's text instead of cutting its end, and one with words that
                the model does not know instead of making images as if they were not there.
            candidate_numbers: which candidates of the seed; None: the first `sampling_params.candidates`.
            before_part: called before each pass of the model through an init image of which it chooses the tokens.

        Returns:
            A request a caption.

        Raises:
            InputError: no caption, an empty one, too long or with unknown words with `strict`, or parameters out of bounds; an
                init image that leaves nothing to generate or nothing to keep, or nothing after the hole to rank by; a size that the
                model does not generate.
        """
        captions = check_captions(captions)
        params = sampling_params or self.default_sampling_params
        if params.is_guided and self.tokenizer.names_classes:
            remedy = "needs an empty caption, which this model has none of: leave it out"
            raise InputError("guidance_scale", params.guidance_scale, remedy)
        if rank_by not in get_args(RankBy):
            raise InputError("rank_by", rank_by, f"write one of {', '.join(get_args(RankBy))}")
        size, grid = larger_grid(
            size,
            init_image,
            self.vqgan.config.image_size,
            self.vqgan.config.grid_size,
            codec_backend=self._codec_backend,
        )
        words = [self.prompt_reader.read(caption) for caption in captions]
        for caption, read in zip(captions, words, strict=True):
            if strict and not read.all_known:
                raise InputError("caption", shown(caption), f"{read.fault}, or leave out --strict")
        encoded = self.tokenizer.encode(captions, self.transformer.config.text_seq_len, strict=strict)
        numbers = tuple(range(params.candidates)) if candidate_numbers is None else tuple(candidate_numbers)
        if rank_by == "log_likelihood" and (init_image is None or init_image.chosen_by_model):
            check_kept_after(None)
        prepared = prepare_init_image(
            init_image, list(encoded.tokens), transformer=self.transformer, vqgan=self.vqgan, tokenizer=self.tokenizer,
            rank_by=rank_by, device=self.device, before_pass=before_part,
        )  # fmt: skip
        return [
            PreparedRequest(
                caption=caption,
                words=read,
                text_tokens=tokens[None],
                tokens_read=int((tokens != self.tokenizer.pad_id).sum()),
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

    def decode(
        self,
        requests: Sequence[PreparedRequest],
        *,
        timings_s: dict[str, float] | None = None,
        on_position: OnPosition | None = None,
    ) -> list[Tensor]:
        """The second phase: samples the image tokens of all candidates of all requests, in step.

        Args:
            requests: of one size.
            timings_s: seconds of `prefill` and `decode` are added to it.

        Returns:
            (n, N) int64 a request, on the model's device.
        """
        timings_s = {} if timings_s is None else timings_s
        with exact(self.device), timed(timings_s, "prefill", self.device):
            prefix = self.sampler.prefill(torch.cat([request.text_tokens for request in requests]))
        sequences = [sequence for g, request in enumerate(requests) for sequence in request.sequences(g)]
        with exact(self.device), timed(timings_s, "decode", self.device):
            tokens = decode_sequences(self.sampler, prefix, sequences, requests, on_position=on_position)  # (B, N)
        return list(tokens.split([len(request.candidates) for request in requests]))

    def finish(
        self,
        request: PreparedRequest,
        image_tokens: Tensor,
        *,
        timings_s: dict[str, float] | None = None,
        before_part: BeforePart = uninterrupted,
    ) -> Generation:
        """The third phase: images from tokens, kept pixels pasted in, scored and ranked.

        Args:
            image_tokens: (n, N), in the order of `request.candidates`, on any device.
            timings_s: seconds of `vqgan` and `ranking` are added to it.
            before_part: called before each 16 images or captions, and before each candidate whose likelihood is read.
        """
        timings_s = {} if timings_s is None else timings_s
        with timed(timings_s, "vqgan", self.device):
            parts = []
            for part in image_tokens.split(_AT_ONCE):
                before_part()
                parts.append(self.decode_images(part.to(self.device), init_image=request.init_image, grid=request.grid))
            images = torch.cat(parts)  # (n, 3, S, S)
            pixels = to_uint8(images)  # (n, S, S, 3), waits for the device
        with exact(self.device), timed(timings_s, "ranking", self.device):
            scores = self.candidate_scores(request.caption, images, before_part=before_part)
            likelihoods = None
            if request.rank_by == "log_likelihood" and request.init_tokens is not None:
                sampled = request.init_tokens < 0
                likelihoods = log_likelihoods(
                    self.transformer, request.text_tokens, image_tokens, sampled, before_part=before_part
                )  # (n,)
        candidates = ranked(request, image_tokens.cpu(), pixels, scores, likelihoods, self.real_scores)
        return Generation(request, candidates, timings_s)

    def provenance(
        self,
        request: PreparedRequest,
        candidate: int,
        *,
        model: ModelRecord | None = None,
        rendition: Rendition | None = None,
    ) -> dict[str, Any]:
        """How a candidate's image was made: see engine/pipeline/provenance.py.

        Args:
            model: None: `model_record`.
            rendition: of the file; None: the image as it was generated.
        """
        return provenance(
            model or self.model_record,
            request.caption,
            request.sampling_params,
            candidate,
            rank_by=request.rank_by,
            init_image=None if request.init_image is None else request.init_image.record,
            rendition=None if rendition is None else rendition.record(self.vqgan.config.image_size),
            size=request.size,
            refinement=request.refinement,
        )

    def continue_caption(
        self, beginning: str, sampling_params: SamplingParams | None = None, *, count: int = 4, seed: int | None = None
    ) -> list[Continuation]:
        """Samples the rest of a caption, `count` times: see engine/pipeline/caption_continuation.py."""
        with exact(self.device):
            return continue_caption(
                self.transformer, self.tokenizer, beginning, sampling_params, count=count, seed=seed
            )

    def decode_images(
        self, image_tokens: Tensor, *, init_image: PreparedInitImage | None = None, grid: TokenGrid | None = None
    ) -> Tensor:
        """(B, N) -> (B, 3, S, S) in [0, 1]; with an init image, what it keeps of the original pasted in."""
        with inference(self.device):
            images = self._codec.decoder.decode(image_tokens, grid=grid)
            return images if init_image is None else torch.where(init_image.pasted, init_image.pixels, images)

    def embed_captions(self, captions: Sequence[str]) -> CaptionEmbeddings:
        """Captions in the ranker's space, each as if it were alone. For a pipeline with a ranker."""
        assert self._scorer is not None
        with exact(self.device), inference(self.device):
            return self._scorer.embed_captions(captions)

    def embed_images(self, images: Tensor) -> Tensor:
        """(B, 3, any, any) in [0, 1] -> (B, E) float32 on the CPU, in the ranker's space. For a pipeline with a ranker."""
        assert self._scorer is not None
        with exact(self.device), inference(self.device):
            return self._scorer.embed_images(images.to(self.device)).float().cpu()

    def candidate_scores(
        self, caption: str, images: Tensor, *, before_part: BeforePart = uninterrupted
    ) -> Scores | None:
        """What candidates of a caption, (n, 3, H, W) in [0, 1], are ranked by; None when the model has no ranker."""
        if self._scorer is None:
            return None
        with inference(self.device):
            return self._scorer(caption, images, before_part=before_part)

    def rank_scores(self, captions: Sequence[str], images: Tensor) -> Tensor | None:
        """KoCLIP's score of each caption's own images.

        Args:
            images: (G, n, 3, S, S) in [0, 1]. Of oblong ones the score is the mean of the squares that cover them.

        Returns:
            (G, n) on the CPU; None when the model has no ranker.
        """
        if self._scorer is None:
            return None
        with inference(self.device):
            return self._scorer.scores(captions, images)


def _unpickled(arguments: dict[str, Any]) -> Pipeline:
    """Raises InputError: an ONNX codec whose model folder is gone."""
    device, codec = arguments["transformer"].head.weight.device, None
    survive_fork(device)
    if arguments["codec_backend"] == "onnx" and arguments["folder"] is not None:
        parts = arguments["vqgan"], arguments["koclip"]
        codec = open_codec(arguments["folder"], *parts, backend="onnx", device=device)
    return Pipeline(**arguments, codec=codec)
