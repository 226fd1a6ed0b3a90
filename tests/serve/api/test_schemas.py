import re
import unicodedata
from dataclasses import replace
from typing import Any

import pytest
from PIL import Image

from engine.errors import InputError
from engine.pipeline.init_image import InitImage
from engine.pipeline.rendition import Rendition
from engine.sampling_params import FIELDS, SamplingParams
from serve.api import schemas
from serve.api.body import parse_object
from serve.api.errors import Failure
from serve.api.renditions import check_init_ground, size_bounds
from serve.api.schemas import (
    EditRequest,
    GenerationRequest,
    bounds,
    generation_job,
    parameter_limits,
    quality_of,
    spec_of,
)
from serve.api.validation import read_request, read_text_request
from serve.messages import GenerationJob
from serve.settings import Limits, ServeSettings, read_settings
from tests.live_server import INFO

SETTINGS = ServeSettings()


def job(*, is_edit: bool = False, settings: ServeSettings = SETTINGS, **fields: Any) -> GenerationJob:
    values = {"prompt": "빨강 니트"} | fields
    parsed = read_request(EditRequest, values) if is_edit else read_request(GenerationRequest, values)
    return generation_job(parsed, INFO, settings, request_id="r", key_id="k", deadline_s=9.0, has_init_image=is_edit)


def failure_of(**fields: Any) -> Failure:
    with pytest.raises(Failure) as raised:
        job(**fields)
    return raised.value


def test_a_request_with_only_a_prompt_gets_the_servers_defaults() -> None:
    parsed = job()
    assert 0 <= parsed.seed < 2**32
    assert parsed == GenerationJob("r", "k", "빨강 니트", SamplingParams(seed=parsed.seed, candidates=16, top=1), 9.0)
    assert job().seed != job().seed or job().seed != job().seed


def test_the_models_sampling_params_are_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    own = SamplingParams(temperature=0.7, top_p=0.9, guidance_scale=2)
    monkeypatch.setitem(globals(), "INFO", replace(INFO, default_sampling_params=own))
    assert job(seed=0).sampling_params == own.updated(top=1)
    cooler = job(seed=0, temperature=1, guidance=1).sampling_params
    assert cooler == SamplingParams(temperature=1, top_p=0.9, top=1)


def test_larger_squares_are_enlarged_up_to_the_servers_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    for size, side in (("auto", None), ("32x32", None), ("33x33", 33), ("1024x1024", 1024)):
        assert job(size=size).rendition == Rendition(side)
    assert job(size="1024x1024", n=10).num_images == 10
    assert job(size="32x32", candidates=64, all_candidates=True).wants_all, (
        "images as they are have no limit of their own"
    )
    assert "allows 40 images" in failure_of(size="512x512", candidates=41, all_candidates=True).message
    large = replace(INFO, image_size=2048)  # a model beyond the limit: its own size alone
    assert size_bounds(large, Limits()) == (2048, 2048)
    monkeypatch.setitem(globals(), "INFO", large)
    assert job(size="2048x2048").rendition == Rendition()
    assert failure_of(size="4096x4096").message.endswith("must be 2048x2048, the model's size, or auto.")


def test_a_transparent_background_needs_a_ground_and_a_format_with_transparency(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert "needs a model of cut-outs" in failure_of(background="transparent").message
    monkeypatch.setitem(globals(), "INFO", replace(INFO, ground="#eeeeec"))
    for form in ("png", "webp"):
        assert job(background="transparent", output_format=form).rendition == Rendition(None, True)
    assert "jpeg has no transparency" in failure_of(background="transparent", output_format="jpeg").message
    assert job(background="auto").rendition == job(background="opaque").rendition == Rendition()


@pytest.mark.parametrize("is_plain", [True, False])
def test_an_edit_is_cut_out_only_where_its_image_is_on_the_ground(is_plain: bool) -> None:
    info = replace(INFO, ground="#eeeeec")
    image = InitImage(Image.new("RGB", (32, 32), "#f0f0f0" if is_plain else "#336699"), keep_rows=3)
    check_init_ground(Rendition(), image, info)
    if is_plain:
        check_init_ground(Rendition(None, True), image, info)
        return
    with pytest.raises(Failure, match="border is of other colours") as raised:
        check_init_ground(Rendition(None, True), image, info)
    assert raised.value.param == "background"


def test_null_equals_an_omitted_field_except_for_the_prompt() -> None:
    nulls: dict[str, Any] = {name: None for name in GenerationRequest.model_fields if name != "prompt"}
    parsed, plain = job(**nulls), job()
    assert replace(parsed, sampling_params=parsed.sampling_params.updated(seed=0)) == replace(
        plain, sampling_params=plain.sampling_params.updated(seed=0)
    )


def test_every_field_reaches_the_job() -> None:
    parsed = job(
        is_edit=True,
        n=2,
        model="tiny",
        size="32x32",
        output_format="webp",
        output_compression=80,
        background="opaque",
        stream=True,
        partial_images=3,
        response_format="b64_json",
        seed=2**64 - 1,
        candidates=5,
        temperature=0.5,
        top_k=7,
        top_p=0.9,
        guidance=3,
        rank_by="log_likelihood",
        all_candidates=True,
        progress=True,
        user="u",
        safety_identifier="s",
        input_fidelity="high",
    )
    assert parsed == GenerationJob(
        request_id="r",
        key_id="k",
        caption="빨강 니트",
        sampling_params=SamplingParams(0.5, 7, 0.9, 3.0, seed=2**64 - 1, candidates=5, top=2),
        deadline_s=9.0,
        rank_by="log_likelihood",
        image_format="webp",
        compression=80,
        num_partials=3,
        wants_progress=True,
        wants_all=True,
    )


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"strength": 1.01}, "strength"),
        ({"strength": -0.01}, "strength"),
        ({"strength": 0.5, "keep_rows": 2}, "strength"),
        ({"changed_from": "초록", "keep_rows": 2}, "changed_from"),
        ({"changed_from": " \u200b"}, "changed_from"),
        ({"changed_from": "가" * 2000}, "changed_from"),
        ({"changed_from": "e" + "\u0301\u0316" * 4000}, "changed_from"),
        ({"strength": 0.5, "rank_by": "log_likelihood"}, "rank_by"),
    ],
)
def test_a_choice_by_the_model_goes_with_no_other(fields: dict[str, Any], param: str) -> None:
    failure = failure_of(is_edit=True, **fields)
    assert (failure.code, failure.param) == ("invalid_value", param)
    job(is_edit=True, strength=0, changed_from="초록")  # the negative control
    job(is_edit=True, strength=1)


def test_a_form_equals_json() -> None:
    values: dict[str, Any] = {
        "prompt": "2", "n": 2, "seed": 7, "candidates": 4, "temperature": 0.5, "top_k": 3, "guidance": 2.0,
        "stream": True, "progress": False, "all_candidates": True, "partial_images": 2, "quality": "low", "paste": False,
        "keep_rows": 3, "output_format": "jpeg", "output_compression": 90,
    }  # fmt: skip
    text = {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in values.items()}
    assert read_text_request(EditRequest, text) == read_request(EditRequest, values)


@pytest.mark.parametrize(
    ("name", "text"),
    [("n", "7.0"), ("n", "1e1"), ("n", " 7 "), ("n", "-0"), ("seed", "1.8e19"), ("seed", str(2**64 - 1)), ("n", "7.5"),
     ("n", "9" * 30), ("temperature", "1"), ("temperature", "1.0"), ("temperature", "1E-1"), ("stream", "true")],
)  # fmt: skip
def test_a_number_has_one_meaning_in_a_form_and_in_json(name: str, text: str) -> None:
    def read(in_form: bool) -> Any:
        try:
            if in_form:
                return getattr(read_text_request(EditRequest, {"prompt": "a", name: text}), name)
            body = f'{{"prompt": "a", "{name}": {text}}}'.encode()
            return getattr(read_request(EditRequest, parse_object(body)), name)
        except Failure as failure:
            return failure.as_object()

    assert read(in_form=True) == read(in_form=False)


@pytest.mark.parametrize("text", ["True", "TRUE", "true\n"])
def test_booleans_of_a_form_are_in_any_case(text: str) -> None:
    assert read_text_request(EditRequest, {"prompt": "a", "stream": text}).stream is True


@pytest.mark.parametrize(
    ("name", "text"),
    [("n", ""), ("n", "٢"), ("n", "2.5"), ("n", "+2"), ("n", "02"), ("n", "2."), ("n", "0x2"), ("n", "1_0"), ("n", "true"),
     ("n", "[2]"), ("n", '"2"'), ("n", "9" * 41), ("stream", "yes"), ("stream", "1"), ("stream", ""), ("stream", "tru"),
     ("temperature", "nan"), ("temperature", "NaN"), ("temperature", "inf"), ("temperature", "1e400"),
     ("temperature", "-Infinity"), ("temperature", "١"), ("temperature", "x"), ("temperature", ".5"),
     ("temperature", "0" * 50), ("temperature", "[" * 39), ("temperature", "null"), ("temperature", "true")],
)  # fmt: skip
def test_form_text_that_is_not_a_number_or_boolean_is_rejected_by_name(name: str, text: str) -> None:
    with pytest.raises(Failure) as raised:
        read_text_request(EditRequest, {"prompt": "a", name: text})
    assert (raised.value.code, raised.value.param) == ("invalid_type", name)


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"prompt": None}, "invalid_type", "prompt"),
        ({"prompt": 5}, "invalid_type", "prompt"),
        ({"prompt": " \n "}, "invalid_value", "prompt"),
        ({"prompt": "a" * 1001}, "invalid_value", "prompt"),
        ({"prompt": "\u200b\ufeff\u3164"}, "invalid_value", "prompt"),
        ({"prompt": "red\x1b[2J"}, "invalid_value", "prompt"),
        ({"prompt": "\ufffe"}, "invalid_value", "prompt"),
        ({"prompt": "e" + "\u0301\u0316" * 400}, "invalid_value", "prompt"),
        ({"n": 0}, "invalid_value", "n"),
        ({"n": 11}, "invalid_value", "n"),
        ({"n": True}, "invalid_type", "n"),
        ({"n": 2.5}, "invalid_type", "n"),
        ({"n": "2"}, "invalid_type", "n"),
        ({"stream": 1}, "invalid_type", "stream"),
        ({"temperatur": 1}, "unknown_parameter", "temperatur"),
        ({"negative_prompt": "x"}, "unknown_parameter", "negative_prompt"),
        ({"keep_rows": 2}, "unknown_parameter", "keep_rows"),
        ({"model": "dall-e-2"}, "model_not_found", "model"),
        ({"size": "1025x1025"}, "invalid_value", "size"),
        ({"size": "31x31"}, "invalid_value", "size"),
        ({"size": "1024x768"}, "invalid_value", "size"),
        ({"size": "0512x0512"}, "invalid_value", "size"),
        ({"size": "1024x1024", "candidates": 11, "all_candidates": True}, "invalid_value", "size"),
        ({"quality": "best"}, "invalid_value", "quality"),
        ({"output_format": "gif"}, "invalid_value", "output_format"),
        ({"output_format": "svg"}, "invalid_value", "output_format"),
        ({"output_compression": 50}, "invalid_value", "output_compression"),
        ({"output_compression": 101, "output_format": "webp"}, "invalid_value", "output_compression"),
        ({"background": "transparent"}, "invalid_value", "background"),
        ({"response_format": "url"}, "invalid_value", "response_format"),
        ({"partial_images": 1}, "invalid_value", "partial_images"),
        ({"partial_images": 17, "stream": True}, "invalid_value", "partial_images"),
        ({"progress": True}, "invalid_value", "progress"),
        ({"complexity": "low"}, "unsupported_parameter", "complexity"),
        ({"frame_count": 4}, "unsupported_parameter", "frame_count"),
        ({"frame_duration_ms": 4}, "unsupported_parameter", "frame_duration_ms"),
        ({"svg": {}}, "unsupported_parameter", "svg"),
        ({"seed": -1}, "invalid_value", "seed"),
        ({"seed": 2**64}, "invalid_value", "seed"),
        ({"candidates": 65}, "invalid_value", "candidates"),
        ({"candidates": 1, "n": 2}, "invalid_value", "candidates"),
        ({"candidates": 1, "num_candidates": 1}, "invalid_value", "num_candidates"),
        ({"temperature": -0.1}, "invalid_value", "temperature"),
        ({"temperature": 1e-9}, "invalid_value", "temperature"),
        ({"temperature": 10**30}, "invalid_value", "temperature"),
        ({"top_k": 0}, "invalid_value", "top_k"),
        ({"top_k": 10**30}, "invalid_value", "top_k"),
        ({"top_p": 0}, "invalid_value", "top_p"),
        ({"top_p": 1.1}, "invalid_value", "top_p"),
        ({"guidance": 1e30}, "invalid_value", "guidance"),
        ({"guidance": 2, "guidance_scale": 2}, "invalid_value", "guidance_scale"),
        ({"rank_by": "log_likelihood"}, "invalid_value", "rank_by"),
    ],
)  # fmt: skip
def test_invalid_fields_are_rejected_by_name(fields: dict[str, Any], code: str, param: str) -> None:
    failure = failure_of(**fields)
    assert (failure.code, failure.param) == (code, param)
    assert f"`{param}`" in failure.message or code == "model_not_found"
    assert f"`{param}`" in failure.message_ko or code == "model_not_found"


def test_a_missing_prompt_is_reported_as_missing() -> None:
    with pytest.raises(Failure) as raised:
        read_request(GenerationRequest, {})
    assert (raised.value.code, raised.value.param) == ("missing_required_parameter", "prompt")


def test_no_error_repeats_the_input() -> None:
    secret = "비밀스러운 설명"
    for fields in ({"n": secret}, {"quality": secret}, {"prompt": {"a": secret}}, {"svg": secret}, {"size": secret}):
        failure = failure_of(**fields)
        assert secret not in failure.body().decode()
    name = failure_of(**{"\x1b[31m" + "x" * 500: 1}).param
    assert name is not None
    assert name.isprintable()
    assert len(name) == 64


def test_the_length_of_a_prompt_is_that_of_its_composed_form() -> None:
    decomposed = "\u1100\u1161" * 1000  # NFD: two code points each
    assert job(prompt=decomposed).caption == "가" * 1000
    assert failure_of(prompt="가" * 1001).param == "prompt"


def test_the_length_of_a_prompt_is_bounded_before_it_is_composed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schemas, "clean_text", lambda *_, **__: pytest.fail("read the whole prompt"))
    assert failure_of(prompt="a" + "\u0301\u0316" * 32_000).param == "prompt"


@pytest.mark.parametrize(
    "prompt",
    ["\ufeff빨간 니트", "빨\u200b간 \u00ad니트", " 빨간\u3000\n니트", unicodedata.normalize("NFD", "빨간 니트")],
)
def test_prompts_that_look_alike_are_one(prompt: str) -> None:
    assert job(prompt=prompt).caption == "빨간 니트"


@pytest.mark.parametrize(
    ("fields", "count"),
    [({}, 16), ({"quality": "low"}, 4), ({"quality": "auto"}, 16), ({"quality": "standard"}, 8), ({"quality": "hd"}, 16),
     ({"quality": "max"}, 64), ({"quality": "low", "n": 6}, 6), ({"quality": "low", "candidates": 9}, 9),
     ({"num_candidates": 3}, 3)],
)  # fmt: skip
def test_quality_sets_the_number_of_candidates_if_none_is_given(fields: dict[str, Any], count: int) -> None:
    assert job(**fields).num_candidates == count


def test_the_servers_limit_bounds_the_candidates_of_quality() -> None:
    settings = ServeSettings(limits=Limits(max_candidates=5))
    assert job(settings=settings, quality="max").num_candidates == 5
    with pytest.raises(Failure):
        job(settings=settings, n=6)


def test_a_responses_quality_is_the_lowest_with_as_many_candidates() -> None:
    assert [quality_of(count) for count in (1, 4, 5, 8, 16, 17, 64, 500)] == [
        "low", "low", "medium", "medium", "high", "xhigh", "max", "max",
    ]  # fmt: skip


def test_without_the_bounds_a_huge_number_would_reach_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    assert failure_of(candidates=10**9).status == 400
    monkeypatch.setattr(schemas, "bounds", lambda _: {})
    assert job(candidates=10**9).num_candidates == 10**9


def test_every_number_of_a_request_has_bounds() -> None:
    numbers = {
        name
        for kind in (GenerationRequest, EditRequest)
        for name, field in kind.model_fields.items()
        if re.search(r"\b(int|float)\b", str(field.annotation))
    }
    assert numbers == set(schemas.bounds(Limits()))


def test_bounds_are_the_engines_or_stricter() -> None:
    for limits in (Limits(), Limits(max_candidates=10**9, max_images=10**9)):
        checked, shown = bounds(limits), parameter_limits(limits)
        for name in ("n", "candidates", "seed", "temperature", "top_k", "top_p", "guidance_scale"):
            spec = spec_of(name)
            assert spec is not None
            assert spec.least <= checked[name][0] <= checked[name][1] <= spec.greatest
            assert (shown[name]["minimum"], shown[name]["maximum"]) == checked[name]
            assert shown[name]["description"] == spec.description
    assert bounds(Limits())["temperature"] == (FIELDS["temperature"].least, FIELDS["temperature"].greatest)
    assert (
        bounds(Limits(max_candidates=5))["candidates"] == bounds(Limits(max_candidates=5))["num_candidates"] == (1, 5)
    )
    with pytest.raises(InputError, match=r"limits\.max_candidates: "):
        read_settings({"limits": {"max_candidates": 2**32 + 1}}, source="test")


def test_the_first_unknown_field_ends_the_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    def validate(*_: Any) -> Any:
        raise AssertionError("pydantic would describe every one of them")

    monkeypatch.setattr(GenerationRequest, "model_validate", validate)
    values = {"prompt": "a"} | {f"field{number}": 1 for number in range(115_000)}
    with pytest.raises(Failure) as raised:
        read_request(GenerationRequest, values)
    assert (raised.value.code, raised.value.param) == ("unknown_parameter", "field0")
