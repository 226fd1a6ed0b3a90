"""Sampling parameters: one table of bounds, and everything that derives from it."""

import math
from dataclasses import fields
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from engine.config.generation import GenerationConfig
from engine.config.section import parse_section
from engine.errors import InputError
from engine.sampling_params import FIELDS, GENERATION_FIELDS, SamplingParams, SequenceRequest, check_captions


def test_every_field_has_a_spec_and_a_default_within_its_bounds() -> None:
    assert list(FIELDS) == [one.name for one in fields(SamplingParams)]
    for name, spec in FIELDS.items():
        assert spec.name == name
        assert spec.description
        assert getattr(SamplingParams(), name) == spec.check(spec.default)


@pytest.mark.parametrize("name", FIELDS)
def test_bounds_are_taken_and_what_lies_beyond_them_is_refused(name: str) -> None:
    spec = FIELDS[name]
    others = {"candidates": FIELDS["candidates"].greatest} if name == "top" else {}
    for value in (spec.least, spec.greatest, *([0] if spec.takes_zero else [])):
        taken = getattr(SamplingParams(**others, **{name: value}), name)  # type: ignore[arg-type]
        assert taken == value
        assert type(taken) is spec.type
    beyond: list[Any] = [-1, spec.greatest * 2 + 1, True, np.True_, "1", b"1", [1], 1j, {}]
    if spec.type is int:
        beyond += [1.0, 1.5, np.float64(2)]
    else:
        beyond += [math.nan, math.inf, -math.inf, 10**400]
    if spec.default is not None:
        beyond.append(None)
    for value in beyond:
        with pytest.raises(InputError) as caught:
            SamplingParams(**{name: value})
        assert caught.value.field == name
        assert spec.range_text in caught.value.remedy


def test_temperatures_at_which_float32_overflows_are_refused() -> None:
    for temperature in (1e-40, 1e-300, 0.0099):
        with pytest.raises(InputError, match=r"temperature: .*must be a number, 0.01 to 100, or 0"):
            SamplingParams(temperature=temperature)
    assert math.copysign(1, SamplingParams(temperature=-0.0).temperature) == 1


@pytest.mark.parametrize("value", [np.int64(7), np.uint8(7), np.int32(7), 7])
def test_whatever_python_takes_for_an_integer_is_taken(value: Any) -> None:
    params = SamplingParams(seed=value, candidates=value, top=value, top_k=value, temperature=value)
    assert params == SamplingParams(7.0, 7, seed=7, candidates=7, top=7)
    assert [type(one) for one in (params.seed, params.top_k, params.temperature)] == [int, int, float]
    assert SequenceRequest(0, candidate=value).candidate == 7


@pytest.mark.parametrize("value", [np.float64(0.5), np.float32(0.5), Fraction(1, 2), 0.5])
def test_real_numbers_are_taken_for_floats(value: Any) -> None:
    params = SamplingParams(temperature=value, top_p=value, guidance_scale=value)
    assert params == SamplingParams(0.5, None, 0.5, 0.5)
    assert type(params.top_p) is float


def test_more_images_returned_than_generated() -> None:
    with pytest.raises(InputError, match="top: 3: is more than the 2 candidates: lower it"):
        SamplingParams(candidates=2, top=3)
    assert SamplingParams(candidates=5).num_returned == 5
    assert SamplingParams(candidates=5, top=2).num_returned == 2


def test_updated_leaves_what_is_none() -> None:
    params = SamplingParams(temperature=0.7, top_k=9)
    assert params.updated(temperature=None, top_k=None, seed=3) == SamplingParams(0.7, 9, seed=3)
    with pytest.raises(InputError, match="seed: -1"):
        params.updated(seed=-1)


@pytest.mark.parametrize("candidate", [-1, 2**32, 1.0, "0", True, None])
def test_a_candidates_number_is_32_bits(candidate: Any) -> None:
    assert SequenceRequest(0, SamplingParams(seed=2**64 - 1), candidate=2**32 - 1).seed == 2**64 - 1
    with pytest.raises(InputError, match="candidate: "):
        SequenceRequest(0, candidate=candidate)


@pytest.mark.parametrize("captions", ["빨강", b"red", None, 7, {"red": 1}, {"red"}, iter(["red"])])
def test_captions_that_are_no_list(captions: Any) -> None:
    with pytest.raises(InputError, match=r"captions: .*give a list of strings"):
        check_captions(captions)


@pytest.mark.parametrize("captions", [["빨강", None], [b"red"], [1], [["red"]]])
def test_captions_that_are_no_strings(captions: Any) -> None:
    with pytest.raises(InputError, match=r"captions: .*every caption must be a string"):
        check_captions(captions)


@pytest.mark.parametrize("captions", [[], [""], ["red", " \n"]])
def test_empty_captions(captions: Any) -> None:
    with pytest.raises(InputError, match=r"caption: .*not empty"):
        check_captions(captions)
    assert check_captions(("red", "빨강")) == ["red", "빨강"]


@pytest.mark.parametrize("name", GENERATION_FIELDS)
def test_a_model_folders_generation_config_has_the_same_bounds(name: str) -> None:
    spec = FIELDS[name]
    assert GenerationConfig.model_fields[name].default == spec.default
    assert GenerationConfig.model_fields[name].description == f"{spec.description}; {spec.range_text}"
    for value in (spec.least, spec.greatest):
        assert getattr(GenerationConfig(**{name: value}).sampling_params(), name) == value
    beyond: tuple[Any, ...] = (-1, spec.greatest * 2, spec.least / 2 if spec.least else -0.5, "1", True)
    for value in beyond:
        if spec.type is int and isinstance(value, float):
            continue
        with pytest.raises(InputError) as caught:
            parse_section(GenerationConfig, {name: value}, source="generation_config.json")
        assert caught.value.field == name


def test_a_generation_config_covers_the_fields_of_the_distribution() -> None:
    assert tuple(GenerationConfig.model_fields) == GENERATION_FIELDS
    assert GenerationConfig().sampling_params() == SamplingParams()
    assert SamplingParams(0.5, 7, 0.9, 3.0, seed=4).generation_values() == {
        "temperature": 0.5, "top_k": 7, "top_p": 0.9, "guidance_scale": 3.0,
    }  # fmt: skip
