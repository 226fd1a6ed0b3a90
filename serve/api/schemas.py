"""Request schemas with OpenAI's fields and this server's additions, and their conversion to a `GenerationJob`.

OpenAI's servers and compatible ones ignore unknown fields; here an unknown field is an error that names it, because a
misspelt `temprature` that is ignored costs an afternoon. Features of OpenAI's API that this server or its model lacks (GIF, SVG,
`background: transparent` for a model that never saw a cut-out) are errors too. Fields without effect here say so.

A random seed is chosen here if the request has none: from then on the job gives the same images wherever it runs. Random
seeds are below 2**32, because JavaScript loses digits of numbers above 2**53.

No torch, no ray.
"""

import secrets
from typing import IO, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from engine.data.prompt_words import PromptWords, described
from engine.errors import InputError
from engine.pipeline.image_encoding import ImageFormat
from engine.sampling_params import FIELDS, INIT_IMAGE_FIELDS, FieldSpec, RankBy, SamplingParams
from engine.text import TextFault, clean_text
from serve.api.data_urls import PictureReference, picture_bytes
from serve.api.errors import Failure, input_failure, invalid_value
from serve.api.renditions import read_rendition
from serve.messages import GenerationJob, ModelInfo
from serve.settings import Limits, ServeSettings

Quality = Literal["low", "medium", "high", "xhigh", "max"]

# Candidates that are generated and ranked if `quality` is given and `candidates` is not.
QUALITIES: dict[Quality, int] = {"low": 4, "medium": 8, "high": 16, "xhigh": 32, "max": 64}
_DALLE_QUALITIES: dict[str, Quality] = {"standard": "medium", "hd": "high"}

_DECOMPOSED = 3  # characters that a syllable of decomposed Hangul has at most

_NO_EFFECT = "accepted for compatibility with OpenAI's clients, without effect"
_MODEL_DEFAULT = "; default: the model's default_sampling_params"
_NOT_HERE = "part of OpenAI's API that this model does not support: leave it out"


class ImageRequest(BaseModel):
    """Fields shared by generations and edits."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())

    prompt: str = Field(
        description="the caption; tokens beyond the model's text length are cut and reported as tokens_cut"
    )
    model: str | None = Field(None, description="an id of /v1/models; default: the served model")
    n: int | None = Field(None, description="images returned: the best of the candidates; default 1")
    size: str | None = Field(
        None,
        description="auto, the model's own size, or a larger square up to the server's limit: enlarged by Lanczos, which adds no "
        "detail; the answer's enlarged_from then names the model's",
    )
    quality: Literal["low", "medium", "high", "xhigh", "max", "auto", "standard", "hd"] | None = Field(
        None,
        description="number of candidates generated and ranked if `candidates` is not given: low 4, medium 8, high 16, "
        "xhigh 32, max 64, at most the server's limit; standard is medium, hd is high; auto is the server's default",
    )
    output_format: ImageFormat | None = Field(None, description="default png")
    output_compression: int | None = Field(
        None, description="quality of webp and jpeg; 100, the default, is lossless webp; not allowed for png"
    )
    background: Literal["transparent", "opaque", "auto"] | None = Field(
        None,
        description="transparent cuts the object out: for models of cut-outs alone, as png or webp; auto is opaque",
    )
    stream: bool | None = Field(None, description="respond with server-sent events")
    partial_images: int | None = Field(
        None,
        description="previews of each of the first n candidates, decoded from the rows generated so far; requires stream",
    )
    response_format: Literal["b64_json", "url"] | None = Field(None, description="b64_json; url is rejected")
    user: str | None = Field(None, description=f"{_NO_EFFECT}; never logged")
    safety_identifier: str | None = Field(None, description=f"{_NO_EFFECT}; never logged")
    complexity: Any = Field(None, description=_NOT_HERE)
    frame_count: Any = Field(None, description=_NOT_HERE)
    frame_duration_ms: Any = Field(None, description=_NOT_HERE)
    svg: Any = Field(None, description=_NOT_HERE)
    # ------------------------------------------------------------------------------------------ additions of this server
    seed: int | None = Field(None, description=f"{FIELDS['seed'].description}; default: chosen at random, and returned")
    candidates: int | None = Field(None, description=f"{FIELDS['candidates'].description}, at least n")
    num_candidates: int | None = Field(None, description="alias of candidates")
    temperature: float | None = Field(None, description=f"{FIELDS['temperature'].description}{_MODEL_DEFAULT}")
    top_k: int | None = Field(None, description=f"{FIELDS['top_k'].description}{_MODEL_DEFAULT}")
    top_p: float | None = Field(None, description=f"{FIELDS['top_p'].description}{_MODEL_DEFAULT}")
    guidance: float | None = Field(None, description=f"{FIELDS['guidance_scale'].description}{_MODEL_DEFAULT}")
    guidance_scale: float | None = Field(None, description="alias of guidance")
    rank_by: RankBy | None = Field(
        None,
        description="koclip: similarity of image and caption; log_likelihood: that of the kept part after an inpainted hole",
    )
    all_candidates: bool | None = Field(None, description="also return the candidates beyond the best n")
    progress: bool | None = Field(None, description="with stream: events on the queue and on the tokens generated")
    strict: bool | None = Field(
        None,
        description="refuse a prompt with words that the model does not know; default: as the server is set, else they are "
        "reported as words_unknown",
    )


class GenerationRequest(ImageRequest):
    """Body of POST /v1/images/generations."""

    moderation: Literal["low", "auto"] | None = Field(None, description=_NO_EFFECT)
    style: Literal["vivid", "natural"] | None = Field(None, description=_NO_EFFECT)


class EditRequest(ImageRequest):
    """Text fields of POST /v1/images/edits."""

    image_param: ClassVar[str] = "image"  # the field that holds the init image

    input_fidelity: Literal["high", "low"] | None = Field(None, description=_NO_EFFECT)
    markup: Any = Field(None, description=_NOT_HERE)
    keep_rows: int | None = Field(None, description="without a mask: rows of tokens kept from the top; default 7 of 16")
    paste: bool | None = Field(
        None,
        description="true, the default with a mask or keep_rows: kept pixels have the original's values; false, the default with "
        "strength or changed_from: the whole image is decoded from tokens",
    )
    strength: float | None = Field(
        None, description=f"{INIT_IMAGE_FIELDS['strength'].description}; without a mask and keep_rows"
    )
    changed_from: str | None = Field(
        None,
        description="the caption that the image was made from: the tokens whose likelihood falls from it to `prompt` are sampled "
        "anew, `strength` of them, or by default those whose likelihood falls noticeably; without a mask and keep_rows",
    )


class EditJsonRequest(EditRequest):
    """JSON body of POST /v1/images/edits: the pictures are inside it."""

    images: list[PictureReference] = Field(min_length=1, description="the init image; only one is supported")
    mask: PictureReference | None = Field(None, description="as the form's mask")

    image_param: ClassVar[str] = "images"

    def files(self) -> dict[str, IO[bytes]]:
        """The pictures by the names of the form's parts. Call it in a thread.

        Raises:
            Failure: several images, a reference to a file or to another server, no valid base64.
        """
        references = {"images": self.images[0]} | ({} if self.mask is None else {"mask": self.mask})
        for param, reference in references.items():
            if reference.file_id is not None:
                detail = "Leave out `file_id`: this server stores no files."
                raise Failure("unsupported_parameter", detail, "`file_id` 항목을 빼 주세요.", param=param)
        if len(self.images) > 1:
            detail = "`images` has several: only one image is supported."
            raise Failure("invalid_image", detail, "`images`: 이미지는 한 장만 보낼 수 있습니다.", param="images")
        names = {"images": "image", "mask": "mask"}
        return {names[param]: picture_bytes(one.image_url, param) for param, one in references.items()}


class TokenizeRequest(BaseModel):
    """Body of POST /v1/tokenize."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    prompt: Annotated[str, Field(description="the text whose tokens are counted; may be empty")]


_UNSUPPORTED = ("complexity", "frame_count", "frame_duration_ms", "svg", "markup")
# Request fields whose names differ from the engine's.
_ALIASES = {"n": "top", "num_candidates": "candidates", "guidance": "guidance_scale"}


def bounds(limits: Limits) -> dict[str, tuple[float, float]]:
    """The least and greatest value of each numeric field, as validated and as documented.

    Sampling parameters have the engine's bounds (`engine.sampling_params.FIELDS`), unless the server's are stricter.
    """
    found: dict[str, tuple[float, float]] = {name: (spec.least, spec.greatest) for name, spec in FIELDS.items()}
    stricter = {"candidates": limits.max_candidates, "top": limits.max_images}
    found |= {name: (found[name][0], min(found[name][1], most)) for name, most in stricter.items()}
    found |= {alias: found[name] for alias, name in _ALIASES.items()}
    del found["top"]  # `n` in this API
    found |= {name: (spec.least, spec.greatest) for name, spec in INIT_IMAGE_FIELDS.items()}
    return found | {
        "output_compression": (0, 100),
        "partial_images": (0, limits.max_partials),
        "keep_rows": (1, 2**31 - 1),
    }


def spec_of(name: str) -> FieldSpec | None:
    """The engine's sampling parameter of a request field, or None."""
    return (FIELDS | INIT_IMAGE_FIELDS).get(_ALIASES.get(name, name))


def parameter_limits(limits: Limits) -> dict[str, dict[str, Any]]:
    """Sampling parameters for `/v1/models`: type, bounds and description by field name."""
    every = bounds(limits)
    names = ("n", "candidates", "seed", "temperature", "top_k", "top_p", "guidance_scale")
    return {name: _parameter_limit(spec, every[name]) for name in names if (spec := spec_of(name)) is not None}


def _parameter_limit(spec: FieldSpec, span: tuple[float, float]) -> dict[str, Any]:
    return {
        "type": "integer" if spec.type is int else "number",
        "minimum": span[0],
        "maximum": span[1],
        "or_zero": spec.takes_zero,
        "description": spec.description,
    }


def generation_job(
    request: ImageRequest,
    info: ModelInfo,
    settings: ServeSettings,
    *,
    request_id: str,
    key_id: str,
    deadline_s: float,
    has_init_image: bool = False,
) -> GenerationJob:
    """The job of a request, without its init image, which is decoded when everything else is valid.

    Raises:
        Failure: a value out of its bounds, or one that cannot be combined with another.
    """
    _check_support(request, info)
    _check_bounds(request, settings.limits)
    num_images = request.n or 1
    num_candidates = _num_candidates(request, num_images, settings)
    image_format: ImageFormat = request.output_format or "png"
    num_returned = num_candidates if request.all_candidates else num_images
    rendition = read_rendition(
        request.size,
        request.background,
        info,
        settings.limits,
        image_format=image_format,
        num_returned=num_returned,
    )
    if isinstance(request, EditRequest):
        _check_choice(request, settings.limits)
    stream = bool(request.stream)
    for name in ("partial_images", "progress"):
        if getattr(request, name) and not stream:
            raise invalid_value(name, "requires `stream`: true", "`stream`이 true일 때만 쓸 수 있습니다")
    if request.rank_by == "log_likelihood" and not has_init_image:
        detail_ko = "`log_likelihood`는 마스크가 있는 이미지에만 쓸 수 있습니다"
        raise invalid_value("rank_by", "`log_likelihood` needs an image with a mask", detail_ko)
    if request.output_compression is not None and image_format == "png":
        raise invalid_value(
            "output_compression", "is for webp and jpeg: png is lossless", "webp와 jpeg에만 쓸 수 있습니다"
        )
    return GenerationJob(
        request_id=request_id,
        key_id=key_id,
        caption=_caption(request.prompt, settings.limits),
        sampling_params=_sampling_params(request, info.default_sampling_params, num_candidates, num_images),
        deadline_s=deadline_s,
        rank_by=request.rank_by or "koclip",
        image_format=image_format,
        compression=100 if request.output_compression is None else request.output_compression,
        rendition=rendition,
        num_partials=request.partial_images or 0,
        wants_progress=bool(request.progress),
        wants_all=bool(request.all_candidates),
    )


def _check_choice(request: EditRequest, limits: Limits) -> None:
    """Raises Failure: a choice of tokens by the model together with another, or from a caption that is none."""
    chosen = next((name for name in ("strength", "changed_from") if getattr(request, name) is not None), None)
    if chosen is None:
        return
    if request.changed_from is not None:
        _caption(request.changed_from, limits, field="changed_from")
    if request.keep_rows is not None:
        raise invalid_value(chosen, "cannot be combined with `keep_rows`", "`keep_rows`와 함께 쓸 수 없습니다")
    if request.rank_by == "log_likelihood":
        raise invalid_value("rank_by", "`log_likelihood` needs a mask", "`log_likelihood`는 마스크가 있어야 합니다")


def checked_prompt(prompt: str, limits: Limits, *, field: str = "prompt") -> str:
    """The prompt in its normal form (engine/text.py), "" where nothing is visible.

    Raises:
        Failure: too long, or characters that no text has; `field` is named.
    """
    most = limits.max_prompt_characters
    if len(prompt) > _DECOMPOSED * most:  # before anything is composed
        raise _long_prompt(len(prompt), most, field)
    try:
        prompt = clean_text(prompt, field=field)
    except TextFault as fault:
        raise invalid_value(field, fault.remedy, f"쓸 수 없는 문자가 있습니다({fault.remedy})") from None
    if len(prompt) > most:
        raise _long_prompt(len(prompt), most, field)
    return prompt


def unknown_words(words: PromptWords) -> Failure:
    """The refusal of a prompt of which the model does not know every word."""
    named = described(words.unknown[:8])
    detail = f"has words that the model does not know: {named}" if named else "has no word"
    detail_ko = f"모델이 모르는 말이 있습니다: {named}" if named else "말이 없습니다"
    return invalid_value("prompt", detail, detail_ko)


def _long_prompt(length: int, most: int, field: str) -> Failure:
    return Failure(
        "invalid_value",
        f"`{field}` has {length} characters: the limit is {most}.",
        f"`{field}`: {most}자까지 쓸 수 있습니다(지금 {length}자).",
        param=field,
    )


def quality_of(num_candidates: int) -> Quality:
    """The lowest quality with at least so many candidates, for the response."""
    return next((name for name, count in QUALITIES.items() if num_candidates <= count), "max")


def _caption(prompt: str, limits: Limits, *, field: str = "prompt") -> str:
    prompt = checked_prompt(prompt, limits, field=field)
    if not prompt:
        raise invalid_value(field, "must not be empty", "설명을 입력해 주세요")
    return prompt


def _check_support(request: ImageRequest, info: ModelInfo) -> None:
    if request.model not in (None, info.model_id):
        raise model_not_found(info)
    for name in _UNSUPPORTED:
        if getattr(request, name, None) is not None:
            raise Failure("unsupported_parameter", f"Leave out `{name}`.", f"`{name}` 항목을 빼 주세요.", param=name)
    if request.response_format == "url":
        raise invalid_value("response_format", "images are sent as b64_json only", "b64_json만 지원합니다")


def model_not_found(info: ModelInfo) -> Failure:
    return Failure(
        "model_not_found",
        f"This server's model is `{info.model_id}`.",
        f"이 서버의 모델은 `{info.model_id}`입니다.",
        param="model",
    )


def _check_bounds(request: ImageRequest, limits: Limits) -> None:
    for name, (least, most) in bounds(limits).items():
        value, spec = getattr(request, name, None), spec_of(name)
        if value is None or least <= value <= most:
            continue
        if spec is None or not spec.takes_zero:
            raise invalid_value(name, f"must be {least:,} to {most:,}", f"{least:,}부터 {most:,}까지 쓸 수 있습니다")
        if value != 0:
            detail_ko = f"0이거나 {least:,}부터 {most:,}까지 쓸 수 있습니다"
            raise invalid_value(name, f"must be 0, or {least:,} to {most:,}", detail_ko)


def _num_candidates(request: ImageRequest, num_images: int, settings: ServeSettings) -> int:
    most = settings.limits.max_candidates
    if num_images > most:
        raise invalid_value(
            "n", f"must be at most {most}, the limit of images generated for a request", f"최대 {most}장입니다"
        )
    requested = _one_of(request, "candidates", "num_candidates")
    if requested is None:
        quality = _DALLE_QUALITIES.get(request.quality or "auto", request.quality)
        count = settings.default_candidates if quality in (None, "auto") else QUALITIES[quality]  # type: ignore[index]
        return min(max(count, num_images), most)
    if requested < num_images:
        raise invalid_value("candidates", f"must be at least n, {num_images}", f"n({num_images}) 이상이어야 합니다")
    return int(requested)


def _sampling_params(
    request: ImageRequest, defaults: SamplingParams, num_candidates: int, num_images: int
) -> SamplingParams:
    guidance = _one_of(request, "guidance", "guidance_scale")
    try:
        return defaults.updated(
            temperature=request.temperature,
            top_k=request.top_k,
            top_p=request.top_p,
            guidance_scale=guidance,
            seed=secrets.randbelow(2**32) if request.seed is None else request.seed,
            candidates=num_candidates,
            top=num_images,
        )
    except InputError as error:
        raise input_failure(error) from error


def _one_of(request: ImageRequest, name: str, alias: str) -> Any:
    value, other = getattr(request, name), getattr(request, alias)
    if value is not None and other is not None:
        raise invalid_value(
            alias, f"is an alias of `{name}`: give one of them", f"`{name}`와 같은 항목이므로 하나만 쓰세요"
        )
    return other if value is None else value
