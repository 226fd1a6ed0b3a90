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
from typing import Any

import torch
from torch import Tensor

from engine.codec.codec import Codec, open_codec
from engine.config.codec import CodecBackend
from engine.config.generation import GenerationConfig
from engine.data.caption_guide import CaptionGuide
from engine.data.tokenizer import CaptionTokenizer
from engine.decoding.cpu.packed_weights import Weights
from engine.decoding.sampler import Sampler
from engine.decoding.sliding_window import TokenGrid
from engine.device import cpu_capabilities
from engine.models.folder_config import model_digest
from engine.models.image_codec import ImageCodec
from engine.models.ranker import Ranker
from engine.models.real_scores import RealScores
from engine.models.transformer import KoDalle
from engine.pipeline.caption_continuation import Continuation, continue_caption
from engine.pipeline.generation import Generation, PreparedInitImage, PreparedRequest, ranked
from engine.pipeline.image_files import to_uint8
from engine.pipeline.image_size import ImageSize
from engine.pipeline.init_image import InitImage
from engine.pipeline.interruption import BeforePart, uninterrupted
from engine.pipeline.larger_images import OnPosition, decode_sequences
from engine.pipeline.likelihood import log_likelihoods
from engine.pipeline.loading import FolderContents, load_contents, save_contents
from engine.pipeline.local_folder import local_folder
from engine.pipeline.preparation import RequestPreparer
from engine.pipeline.provenance import Arithmetic, ModelRecord
from engine.pipeline.ranking import CandidateScorer, CaptionEmbeddings, Scores
from engine.pipeline.rendition import Rendition
from engine.pipeline.torch_state import exact, inference, survive_fork, timed
from engine.sampling_params import RankBy, SamplingParams

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
        self.transformer, self.vqgan = transformer.eval(), vqgan.eval()
        self.koclip = None if koclip is None else koclip.eval()
        self._codec = codec or Codec.of(vqgan, koclip)
        self.tokenizer = tokenizer
        self.ranker_tokenizer = ranker_tokenizer or tokenizer  # what the ranker reads captions with
        generation = generation or GenerationConfig()
        self.default_sampling_params = generation.sampling_params()
        self.caption_guide = caption_guide or CaptionGuide()
        self.real_scores = real_scores  # what the ranker's scores are compared with
        self.ground = ground  # `#rrggbb` around the objects in its images, if it learned from cut-outs
        self._contents = FolderContents(
            transformer=transformer, vqgan=vqgan, koclip=koclip, tokenizer=tokenizer, ranker_tokenizer=ranker_tokenizer,
            card=card, generation=generation, caption_guide=self.caption_guide, real_scores=real_scores, ground=ground,
        )  # fmt: skip
        embedder = self._codec.embedder
        self._scorer = None
        if koclip is not None and embedder is not None:
            self._scorer = CandidateScorer(koclip, embedder, self.ranker_tokenizer, self.caption_guide)
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
        self._prepare = RequestPreparer(transformer, vqgan, tokenizer, self.caption_guide, codec_backend)

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
            int8: 8-bit arithmetic of the transformer on a CPU: half the time and less, images that differ slightly.
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
        contents = load_contents(folder, device=device, dtype=dtype)
        codec = open_codec(folder, contents["vqgan"], contents["koclip"], backend=codec_backend, device=device)
        return cls(
            **contents,
            codec=codec,
            int8=int8,
            weights=weights,
            speculative=speculative,
            codec_backend=codec_backend,
            model_id=str(folder_or_hub_id),
            folder=folder,
        )

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Writes a model folder that `from_pretrained` reads; torch.float16 as `dtype` halves its size."""
        save_contents(Path(folder), self._contents, dtype=dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        # Packed weights, graphs and sessions are rebuilt from what is pickled.
        options = {
            "int8": self._int8, "weights": self._weights, "speculative": self._speculative,
            "codec_backend": self._codec_backend, "model_id": self.model_id, "folder": self._folder,
        }  # fmt: skip
        return _unpickled, ({**self._contents, **options},)

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
        """The first phase, a request a caption: checks, tokenises, encodes the init image.

        Args:
            sampling_params: None: the model's own, `default_sampling_params`.
            init_image: an image whose first rows, all but what a mask marks, or what the model finds likely, every candidate keeps.
            size: larger than the model's own, of whole tokens, without an init image; None: the model's own.
            rank_by: KoCLIP's score of the finished image; or, with a mask, the log-likelihood of what is kept after it.
            strict: refuse a caption that is longer than the model's text instead of cutting its end, and one with words that
                the model does not know instead of making images as if they were not there.
            candidate_numbers: which candidates of the seed; None: the first `sampling_params.candidates`.
            before_part: called before each pass of the model through an init image of which it chooses the tokens.

        Raises:
            InputError: no caption, an empty one, too long or with unknown words with `strict`, or parameters out of bounds; an
                init image that leaves nothing to generate or nothing to keep, or nothing after the hole to rank by; a size that the
                model does not generate.
        """
        return self._prepare(
            captions, sampling_params or self.default_sampling_params, init_image=init_image, size=size,
            rank_by=rank_by, strict=strict, candidate_numbers=candidate_numbers, before_part=before_part,
        )  # fmt: skip

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
        record = None if rendition is None else rendition.record(self.vqgan.config.image_size)
        return request.provenance(model or self.model_record, candidate, rendition=record)

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
        with inference(self.device):
            return self._scorer.embed_captions(captions)

    def embed_images(self, images: Tensor) -> Tensor:
        """(B, 3, any, any) in [0, 1] -> (B, E) float32 on the CPU, in the ranker's space. For a pipeline with a ranker."""
        assert self._scorer is not None
        with inference(self.device):
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
        """KoCLIP's score of each caption's own images, (G, n, 3, H, W) in [0, 1]: (G, n) on the CPU, None without a ranker.

        Of oblong ones it is the mean of the squares that cover them.
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
