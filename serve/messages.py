"""Messages between API server and worker: a job, and its events up to `Finished` or `Refused`.

    API server (HTTP, limits, keys)  ── GenerationJob ──►  worker (slots, images, ranking)
                                     ◄── Queued, Progress, Partial …, Finished | Refused ──

Frozen dataclasses of plain values, passed within one process or pickled between Ray Serve replicas. Everything that
determines the images (seed, sampling parameters, init image) is fixed before a job is sent, so a job whose worker died can
be sent again and gives the same bytes.

No torch, no ray. S pixels of the model's square images, g x g grid of tokens, N = g * g.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from PIL import Image

from engine.data.caption_guide import CaptionGuide
from engine.pipeline.image_encoding import ImageFormat
from engine.pipeline.init_image import InitImage
from engine.pipeline.rendition import Rendition
from engine.sampling_params import RankBy, SamplingParams

# Reasons of `Refused`; serve/api/errors.py has a status and texts in two languages for each.
RefusalReason = Literal["queue_full", "deadline", "draining", "invalid", "failed"]


@dataclass(frozen=True)
class ModelInfo:
    """Description of a model, for API servers and the page, which do not load it."""

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
    default_sampling_params: SamplingParams = field(
        default_factory=SamplingParams
    )  # for parameters that a request omits
    caption_guide: CaptionGuide = field(default_factory=CaptionGuide, hash=False)  # how to write captions for it
    embedding_width: int = 0  # of the ranker; 0: it has none, or one without a single vector a caption or picture
    has_ranker_tokenizer: bool = False  # the ranker has its own, not the transformer's
    ground: str | None = None  # `#rrggbb` around the objects in its images; None: they have no plain ground


@dataclass(frozen=True)
class GenerationJob:
    """A validated request: `num_candidates` images of a caption are generated, the best `num_images` returned."""

    request_id: str
    key_id: str  # for fair queueing
    caption: str
    sampling_params: SamplingParams
    deadline_s: float  # seconds left, because clocks of two machines are not comparable
    rank_by: RankBy = "koclip"
    init_image: InitImage | None = None  # at the model's size: `InitImage.resized`
    image_format: ImageFormat = "png"
    compression: int = 100  # 0-100: quality of webp and jpeg; 100 is lossless webp
    rendition: Rendition = field(
        default_factory=Rendition
    )  # of the images that are returned; previews are as they were generated
    num_partials: int = 0  # previews of each of the first `num_images` candidates
    wants_progress: bool = False  # Queued and Progress events
    wants_all: bool = False  # also return the images of the candidates that are not among the best

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
    """Queue position: sent at once when a job must wait, and whenever the position changes."""

    position: int  # 1: next
    wait_s: float | None  # estimate; None before the first measurement


@dataclass(frozen=True)
class Progress:
    """Number of tokens sampled; sent at most about ten times a second."""

    tokens_generated: int  # of all candidates together
    tokens_total: int


@dataclass(frozen=True)
class Partial:
    """A preview of a candidate: its rows of tokens so far, decoded, above a plain area."""

    candidate: int
    partial_index: int  # 0-based, of this candidate
    rows_generated: int
    rows_total: int
    data: bytes  # encoded in the job's format


@dataclass(frozen=True)
class GeneratedImage:
    """A finished image in the job's format, with its generation parameters as metadata."""

    candidate: int
    seed: int
    rank: int  # 1 is best
    score: float | None  # KoCLIP's; None without a ranker
    contrast: float | None  # nats; None unless ranked by it
    log_likelihood: float | None  # nats; None unless ranked by it
    provenance: Mapping[str, Any] = field(hash=False)  # engine/pipeline/provenance.py
    data: bytes | None  # None: not requested
    score_percentile: float | None = None  # of `score` among real pairs, 0 to 100; see engine/pipeline/generation.py


@dataclass(frozen=True)
class Finished:
    """All candidates, best first; the first `num_images` have image data, with `wants_all` the others too."""

    images: tuple[GeneratedImage, ...]
    text_tokens: int  # of the caption, [CLS] and [SEP] included
    tokens_cut: int  # of the caption, beyond the model's text length
    image_tokens: int  # sampled, all candidates together
    timings_s: dict[str, float] = field(default_factory=dict)  # queue, prefill, decode, vqgan, ranking, encoding, total


@dataclass(frozen=True)
class Refused:
    """The job ends without images."""

    reason: RefusalReason
    message: str = ""  # for `invalid`: field, value and remedy; for `failed`: one line, no caption in it
    param: str | None = None  # the field, for `invalid`
    retry_after_s: float | None = None  # for `queue_full` and `draining`


@dataclass(frozen=True)
class EmbeddingJob:
    """Captions and pictures for KoCLIP.

    items: texts, and RGB images of S pixels a side.
    scores_first: also compare the first with all others.
    """

    request_id: str
    items: tuple[str | Image.Image, ...] = field(hash=False)
    scores_first: bool = False


@dataclass(frozen=True)
class Embeddings:
    """An `EmbeddingJob`'s result."""

    vectors: tuple[bytes, ...]  # little-endian float32, one an item
    scores: tuple[float, ...]  # of all items but the first; empty unless requested
    text_tokens: int  # of all captions, [CLS] and [SEP] included
    tokens_cut: int  # of all captions, beyond the ranker's text length


GenerationEvent = Queued | Progress | Partial | Finished | Refused
