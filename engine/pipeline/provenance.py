"""Provenance: how an image was made, stated once.

PNG metadata, result.json and the API's answers carry exactly this, and `kodalle generate --from image.png` makes the image
again from it. Nothing of the request around the image is in it (no time, rank or id): candidate i of a seed has the same
metadata however many candidates were generated, on any replica, and after any retry. What was done to the generated image
afterwards (cut out, enlarged, marked) is, because the file shows it.

Without torch, so that an API server can describe it.
"""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from engine import __version__
from engine.config.generation import GenerationConfig
from engine.config.section import Section
from engine.config_files import parse_section
from engine.pipeline.ai_marks import DigitalSource
from engine.sampling_params import RankBy, SamplingParams

SOFTWARE = "KoDALLE engine"


class Arithmetic(Section):
    """What decides the last bits of an image, beside the weights."""

    device: str = Field(description="cpu with its instruction set, or the GPU's name")
    dtype: str = Field(description="the transformer's")
    int8: bool = Field(description="8-bit arithmetic on a CPU")
    codec_backend: str = Field(description="torch or onnx")


class ModelRecord(Section):
    """A loaded model, as provenance names it."""

    model: str = Field(description="id in the API; on the command line the folder or hub id as it was given")
    model_digest: str | None = Field(
        description="SHA-256 over config.json and the weight files; null: not from a folder"
    )
    arithmetic: Arithmetic


class InitImageRecord(Section):
    """`InitImage.record`: digests of an init image at the model's size."""

    image_sha256: str = Field(description="of the pixels (S, S, 3) as bytes")
    keep_rows: int | None = Field(description="rows of tokens kept, from the top; null with a mask")
    mask_sha256: str | None = Field(description="of the mask (S, S) as bytes, 1 where pixels may change; null without")
    paste: bool = Field(description="kept pixels have the original's values")


class RenditionRecord(Section):
    """What was done to a generated image when it was written: engine/pipeline/rendition.py."""

    size: int = Field(gt=0, description="pixels a side")
    enlarged_from: int | None = Field(description="the model's own size, where `size` is larger: by Lanczos")
    background: Literal["transparent", "opaque"]
    visible_mark: str = Field(description="text in the corner")


class Provenance(ModelRecord):
    """How one image was made."""

    caption: str
    seed: int
    candidate: int = Field(description="number of the image among its seed's")
    sampling_params: GenerationConfig
    rank_by: RankBy = Field(description="what its rank among the candidates follows")
    init_image: InitImageRecord | None
    rendition: RenditionRecord | None = Field(None, description="null: the image is as it was generated")
    software: str = SOFTWARE
    version: str = Field(description="of the engine")

    @property
    def request_params(self) -> SamplingParams:
        """The request for this one image."""
        return self.sampling_params.sampling_params().updated(seed=self.seed, candidates=1)


def provenance(
    model: ModelRecord,
    caption: str,
    sampling_params: SamplingParams,
    candidate: int,
    *,
    rank_by: RankBy,
    init_image: dict[str, Any] | None,
    rendition: RenditionRecord | None = None,
) -> dict[str, Any]:
    """How candidate `candidate` of a request was made, fit for JSON.

    Args:
        init_image: `InitImage.record`.
    """
    made = Provenance(
        caption=caption,
        seed=sampling_params.seed,
        candidate=candidate,
        sampling_params=GenerationConfig(**sampling_params.generation_values()),
        rank_by=rank_by,
        init_image=None if init_image is None else InitImageRecord(**init_image),
        rendition=rendition,
        version=__version__,
        **dict(model),
    )
    return made.model_dump(mode="json")


def digital_source(made: Mapping[str, Any]) -> DigitalSource:
    """IPTC's Digital Source Type of an image with this provenance: an init image may be a photograph."""
    return "trainedAlgorithmicMedia" if made["init_image"] is None else "compositeWithTrainedAlgorithmicMedia"


def read_provenance(tree: Any, *, source: str) -> Provenance:
    """Provenance as `provenance` stated it.

    Raises:
        InputError: another form, or a value out of bounds; `source` says where it was read.
    """
    found: Provenance = parse_section(Provenance, tree, source=source)
    return found
