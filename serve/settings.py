"""Settings of a server: model, slots, queue, deadlines, keys, and limits on requests.

Strict like the training configs (engine/config/): an unknown key or a wrong type is one line naming the field. The same
fields are arguments of the Ray Serve application (`args:` in configs/serve.yaml).

No torch, no ray.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, model_validator

from engine.config.section import FolderOrName, Section, as_input_error
from engine.pipeline.ai_marks import checked_mark
from engine.sampling_params import FIELDS

MIB = 2**20

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://([a-z0-9._~-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?")
_ROOT_PATH = re.compile(r"(/[A-Za-z0-9._~-]+)*")
_OWN_FOLDERS = ("v1", "page")
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}


def checked_origin(origin: str) -> str:
    """The origin; raises ValueError unless it is written as browsers send it, because the two are compared as text."""
    found = _ORIGIN.fullmatch(origin)
    if found is None:
        raise ValueError(
            f"`{origin}` is not an origin as browsers send it: write scheme, host and port alone, in lower case, such as "
            "https://studio.example or http://localhost:3000, without a path; `*` and `null` name no app"
        )
    scheme = origin.partition(":")[0]
    if found[2] and found[2] == _DEFAULT_PORTS.get(scheme):
        raise ValueError(f"`{origin}`: browsers leave out {found[2]}, the default port of {scheme}: leave it out")
    return origin


def _checked_root_path(path: str) -> str:
    first = path.split("/")[1] if _ROOT_PATH.fullmatch(path) and path else ""
    if not _ROOT_PATH.fullmatch(path) or first in _OWN_FOLDERS:
        raise ValueError(
            f"`{path}` must be a path such as /kodalle: a slash first, none last, not one of this server's own"
        )
    return path


class Limits(Section):
    """Limits on a request, checked before anything is generated. No client header changes any of them."""

    max_json_bytes: int = Field(1 * MIB, gt=0)
    max_edit_bytes: int = Field(10 * MIB, gt=0, description="the whole multipart body")
    max_pixels: int = Field(16_000_000, gt=0, description="of an uploaded image, read from its header")
    max_prompt_characters: int = Field(1000, gt=0)
    max_images: int = Field(10, gt=0, le=FIELDS["top"].greatest, description="n")
    max_candidates: int = Field(64, gt=0, le=FIELDS["candidates"].greatest, description="generated for one request")
    max_partials: int = Field(16, ge=0, description="previews of a candidate; OpenAI's API allows 0 to 3")
    max_size: int = Field(1024, gt=0, le=4096, description="pixels a side of an enlarged image; ten of these a request")
    max_embeddings: int = Field(256, gt=0, description="captions and pictures of an embedding or rerank request")
    max_embedded_pixels: int = Field(64_000_000, gt=0, description="of all pictures of such a request together")
    body_timeout_s: float = Field(30.0, gt=0, description="for a whole body to arrive")


class ServeSettings(Section):
    """One server: a model, its slots, its queue, its keys."""

    # `models/clothing` without `./` would be a valid repository name on the hub
    model: FolderOrName = Field("./models/clothing", description="model folder, or owner/name on the hub")
    model_id: str = Field(
        "", description="its name in the API; empty: the folder's, or its parent's if that is `model`"
    )
    device: str = Field("", description="cpu, cuda, cuda:1; empty: cuda where there is one")
    int8: bool = Field(False, description="8-bit arithmetic on a CPU: faster, slightly different images")
    weights: Literal["int8", "int4"] | None = Field(
        None, description="the transformer's on a CPU: int8, or int4, coarser; null: as `int8` says"
    )
    num_slots: int = Field(0, ge=0, description="sequences in flight in a worker; 0: 32 on a CPU, 256 on a GPU")
    max_queued_sequences: int = Field(
        256,
        ge=0,
        description="sequences waiting in a worker beyond its slots; more is 429, unless the key has less than its share",
    )
    deadline_s: float = Field(
        120.0, gt=0, description="from arrival to the last byte; a request that cannot meet it is 429"
    )
    drain_s: float = Field(60.0, gt=0, description="how long a stopping worker may finish accepted requests")
    default_candidates: int = Field(16, gt=0, description="generated and ranked when a request gives no number")
    keys_file: FolderOrName = Field(
        "", description="API keys (serve/api/keys.py); empty: no keys, and only loopback clients are served"
    )
    allowed_origins: tuple[Annotated[str, AfterValidator(checked_origin)], ...] = Field(
        (), description="web origins whose pages may call the API, e.g. https://studio.example; empty: none but its own"
    )
    root_path: Annotated[str, AfterValidator(_checked_root_path)] = Field(
        "",
        description="path under which a proxy publishes this server, e.g. /kodalle, whether it strips it or not",
    )
    strict: bool = Field(
        False, description="refuse prompts with words that the model does not know, unless a request says not"
    )
    visible_mark: Annotated[str, AfterValidator(checked_mark)] = Field(
        "",
        description="text in the corner of every image that is sent, e.g. AI; empty: none, the metadata alone say it",
    )
    c2pa_key: FolderOrName = Field(
        "", description="PEM of the key that signs Content Credentials into every image; empty: none"
    )
    c2pa_certificates: FolderOrName = Field("", description="PEM of that key's certificate and of those that issued it")
    log_prompts: bool = Field(False, description="log captions")
    page: bool = Field(True, description="serve the designers' page")
    limits: Limits = Limits()

    @model_validator(mode="after")
    def _key_with_certificates(self) -> "ServeSettings":
        if bool(self.c2pa_key) != bool(self.c2pa_certificates):
            raise ValueError("c2pa_key and c2pa_certificates belong together: give both, or none")
        return self


def read_settings(values: dict[str, Any], *, source: str) -> ServeSettings:
    """Validated settings; raises InputError naming an unknown field or a bad value, and `source`, where it was read."""
    try:
        return ServeSettings.model_validate(values)
    except ValidationError as error:
        raise as_input_error(error, source) from error
