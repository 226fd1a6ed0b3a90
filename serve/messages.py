"""What passes between the edge and a worker: one job in, events out until `Finished` or `Refused`.

    edge (HTTP, limits, keys)  ── GenerationJob ──►  worker (slots, pictures, ranking)
                               ◄── Queued, Progress, Partial …, Finished | Refused ──

Plain frozen values, so that they travel as they are: in one process, or pickled between Ray Serve replicas. Everything
that decides the images (parameters, seed, init image) is fixed before a job is sent, so that a job whose worker died
is sent again and gives the same bytes.

No torch, no ray. S pixels of the model's square pictures, g x g grid of tokens, N = g * g.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from engine.pipeline.image_encoding import ImageFormat
from engine.pipeline.init_image import InitImage
from engine.sampling_params import RankBy, SamplingParams

# Why a worker did not draw: the edge has a status and texts in two languages for each (serve/api/errors.py).
RefusalReason = Literal["queue_full", "deadline", "draining", "invalid", "failed"]


@dataclass(frozen=True)
class ModelInfo:
    """What the edge and the page must know of a model without loading it."""

    model_id: str  # the folder's name, or owner/name
    created: int  # Unix seconds: when its weights were written
    digest: str  # SHA-256 over config.json and the weight files' contents, hex
    image_size: int  # S
    grid_size: int  # g
    text_seq_len: int  # tokens of a caption, [CLS] and [SEP] included
    num_parameters: int
    has_ranker: bool
    device: str  # "cpu", or the GPU's name
    tokenizer_json: str  # for `tokenizers.Tokenizer.from_str`: counts tokens without torch
    default_sampling_params: SamplingParams = field(default_factory=SamplingParams)  # where a request says nothing
    # What its captions told of, garment to attribute to values, commonest first; {}: not known.
    attributes: Mapping[str, Mapping[str, Sequence[str]]] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class GenerationJob:
    """One request, checked: `num_candidates` images of a caption are generated, the best `num_images` returned."""

    request_id: str
    key_id: str  # whose fair share of the slots it uses
    caption: str
    sampling_params: SamplingParams
    deadline_s: float  # seconds that are left; clocks of two machines are not compared
    rank_by: RankBy = "koclip"
    init_image: InitImage | None = None  # at the model's size: `InitImage.resized`
    image_format: ImageFormat = "png"
    compression: int = 100  # 0-100: quality of webp and jpeg; 100 is lossless webp
    num_partials: int = 0  # previews of each of the first `num_images` candidates
    wants_progress: bool = False  # Queued and Progress events
    wants_all: bool = False  # the pictures of the candidates that are not among the best, too

    @property
    def seed(self) -> int:
        return self.sampling_params.seed

    @property
    def num_candidates(self) -> int:
        return self.sampling_params.candidates

    @property
    def num_images(self) -> int:
        return self.sampling_params.num_returned


@dataclass(frozen=True)
class Queued:
    """Sent at once when a job must wait, and whenever its place changes."""

    position: int  # 1: next
    wait_s: float | None  # estimate; None before the first measurement


@dataclass(frozen=True)
class Progress:
    """How far the drawing is; at most about ten a second."""

    tokens_generated: int  # of all its rows together
    tokens_total: int


@dataclass(frozen=True)
class Partial:
    """A candidate as far as it is drawn: its rows of tokens decoded, plain below."""

    candidate: int
    partial_index: int  # 0-based, of this candidate
    rows_generated: int
    rows_total: int
    data: bytes  # encoded as the job asks


@dataclass(frozen=True)
class GeneratedImage:
    """A finished picture, encoded as the job asks, its making in its metadata."""

    candidate: int
    seed: int
    rank: int  # 1 is best
    score: float | None  # KoCLIP's; None without a ranker
    log_likelihood: float | None  # nats; None unless ranked by it
    provenance: Mapping[str, Any] = field(hash=False)  # engine/pipeline/provenance.py
    data: bytes | None  # None: not requested


@dataclass(frozen=True)
class Finished:
    """All candidates, best first; the first `num_images` have their pictures, the rest where `wants_all`."""

    images: tuple[GeneratedImage, ...]
    text_tokens: int  # read of the caption, [CLS] and [SEP] included
    tokens_cut: int  # that did not fit the model and were left out
    image_tokens: int  # drawn, all candidates together
    timings_s: dict[str, float] = field(default_factory=dict)  # queue, prefill, decode, vqgan, ranking, encoding, total


@dataclass(frozen=True)
class Refused:
    """The job ends without pictures."""

    reason: RefusalReason
    message: str = ""  # for `invalid`: field, value and remedy; for `failed`: one line, no caption in it
    param: str | None = None  # the field, for `invalid`
    retry_after_s: float | None = None  # for `queue_full` and `draining`


GenerationEvent = Queued | Progress | Partial | Finished | Refused
