"""The compiled decode step: the same function as torch's operators, for every option that it has."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.config.transformer import TransformerConfig
from engine.decoding.cpu import compiled_step
from engine.decoding.cpu.compiled_step import lacking, library
from engine.decoding.cpu.packed_weights import Weights, can_quantise, make_step_model
from engine.decoding.sampler import Sampler, evaluating
from engine.decoding.slot_decoder import SlotDecoder
from engine.errors import InputError
from engine.models.transformer import KoDalle
from engine.sampling_params import SamplingParams, SequenceRequest
from tests.engine.decoding.cases import CONFIG, NULL, OPTIONS, TEXT, random_model

needs_library = pytest.mark.skipif(library() is None, reason="the compiled step was not built here")
COMPILED = {"none": dict[str, Any]()} | {
    name: options for name, options in OPTIONS.items() if lacking(CONFIG.model_copy(update=options), "float32") is None
}
KINDS = [SamplingParams(), SamplingParams(guidance_scale=2.0), SamplingParams(top_k=9, guidance_scale=0.5)]


@pytest.fixture(autouse=True)
def num_threads() -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield before
    torch.set_num_threads(before)


def _model(options: dict[str, Any]) -> KoDalle:
    return random_model(TransformerConfig(**(CONFIG.model_dump() | options)))


def _logits(model: KoDalle, weights: Weights, *, compiled: bool, count: int = 5, threads: int = 1) -> Tensor:
    """(steps, count, V) of sequences that are fed the same tokens, two of three guided."""
    sampler = Sampler(model, null_text_tokens=NULL, weights=weights, compiled=compiled)
    prefix, null = sampler.prefill(TEXT), sampler.null_prefix()
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(CONFIG.image_vocab_size, (count, CONFIG.image_seq_len), generator=generator)
    seen = []
    torch.set_num_threads(threads)  # torch's own bits, of the captions, depend on them
    with evaluating(model):
        step_model = sampler.step_model()
        assert (step_model.compiled is not None) == compiled
        decoder = SlotDecoder(step_model, 2 * count, null_prefix=null)
        for candidate, init_tokens in enumerate(tokens):
            request = SequenceRequest(candidate % 3, KINDS[candidate % 3], candidate=candidate)
            decoder.add(prefix, request, init_tokens=init_tokens)
        for _ in range(CONFIG.image_seq_len - 1):
            decoder.step()
            seen.append(decoder.next_logits().clone())
    return torch.stack(seen)


@needs_library
def test_options_that_are_compiled_and_those_that_are_not() -> None:
    assert set(COMPILED) == {
        "none", "qk_norm", "x0_scalars", "target_positions", "minDALL-E", "minDALL-E, approximated", "all"
    }  # fmt: skip
    for name in set(OPTIONS) - set(COMPILED):
        assert make_step_model(_model(OPTIONS[name]), "packed").compiled is None, name
    assert lacking(CONFIG, "int4") == "dim = 32, no multiple of 64"
    assert lacking(CONFIG.model_copy(update={"head_dim": 24}), "int8") == "head_dim = 24, no multiple of 16"


@needs_library
@pytest.mark.parametrize("name", COMPILED)
def test_float32_logits_are_those_of_the_model(name: str) -> None:
    model = _model(COMPILED[name])
    plain, compiled = _logits(model, "plain", compiled=False), _logits(model, "packed", compiled=True)
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-4 * float(plain.abs().max()))


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_8_bit_logits_are_those_of_torch_s_operators(dtype: torch.dtype) -> None:
    """Not to the bit: between products sums have another order, and an integer at the edge of two may be the other one."""
    if not can_quantise(dtype, torch.device("cpu")):
        pytest.skip(f"this processor packs no {dtype}")
    model = _model({"qk_norm": True}).to(dtype)
    exact = _logits(copy.deepcopy(model).float(), "plain", compiled=False)
    compiled = _logits(model, "int8", compiled=True)
    operators = _logits(copy.deepcopy(model).float(), "int8", compiled=False)

    def error(one: Tensor, other: Tensor) -> float:
        return float((one - other).square().mean().sqrt() / exact.square().mean().sqrt())

    assert 1e-4 < error(operators, exact) < 0.1
    # A bfloat16 model reads captions in bfloat16.
    assert error(compiled, operators) < (0.2 if dtype == torch.float32 else 3) * error(operators, exact)


WIDE = CONFIG.model_copy(update={"dim": 64, "num_heads": 4})  # int4 has groups of 64 inputs


@needs_library
def test_4_bit_logits_are_near_and_free_of_the_batch() -> None:
    model = random_model(WIDE)
    plain, int4 = (_logits(model, weights, compiled=weights == "int4") for weights in ("plain", "int4"))
    error = (int4 - plain).square().mean().sqrt() / plain.square().mean().sqrt()
    assert 0.02 < error < 0.3  # 4 bits leave 8 % a product
    sampler = Sampler(model, null_text_tokens=NULL, weights="int4")
    prefix = sampler.prefill(TEXT)
    requests = [SequenceRequest(n % 3, KINDS[n % 3].updated(seed=n), candidate=n % 4) for n in range(12)]
    for request, tokens in zip(requests, sampler.decode(prefix, requests), strict=True):
        assert torch.equal(sampler.decode(prefix, [request])[0], tokens)


@needs_library
def test_where_there_are_no_4_bit_weights_the_reason_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        InputError, match=r"weights: int4 on cpu .*not made for models with dim = 32, no multiple of 64"
    ):
        Sampler(_model({}), weights="int4")
    monkeypatch.setattr(compiled_step, "library", lambda: None)
    with pytest.raises(InputError, match=r"int4 on cpu .*need .*the compiled step.*: use int8"):
        Sampler(random_model(WIDE), weights="int4")


@needs_library
@pytest.mark.parametrize("weights", ["packed", "int8"])
def test_bits_are_free_of_the_number_of_threads(weights: Weights) -> None:
    model = _model(COMPILED["all"])
    alone = _logits(model, weights, compiled=True)
    for threads in (2, 3):
        several = _logits(model, weights, compiled=True, threads=threads)
        torch.set_num_threads(1)
        assert torch.equal(several, alone)


def test_without_the_library_torch_s_operators_decode_and_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compiled_step._report_missing.cache_clear()
    monkeypatch.setattr(compiled_step, "library", lambda: None)
    monkeypatch.setattr(compiled_step, "compiled_set", lambda: "avx2")
    model = _model({})
    assert [make_step_model(model, "packed").compiled for _ in range(2)] == [None, None]
    assert capsys.readouterr().err == (
        "decoding: the compiled step was not built with this installation (no C++ compiler?): "
        "slower, by torch's operators\n"
    )
