"""Packed weights: the same function and batch-invariant; in 8 bits close to it, and batch-invariant as well."""

import copy
import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from engine.config.transformer import TransformerConfig
from engine.decoding.cpu import packed_weights
from engine.decoding.cpu.packed_weights import (
    Weights,
    _Int8Linear,
    _PackedLinear,
    can_pack,
    can_quantise,
    choose_weights,
    make_step_model,
)
from engine.decoding.sampler import Sampler, evaluating
from engine.decoding.slot_decoder import SlotDecoder
from engine.device import cpu_capabilities
from engine.errors import InputError
from engine.models.transformer import KoDalle
from engine.sampling_params import SamplingParams, SequenceRequest
from kernels import reference
from tests.engine.decoding.cases import NULL, TEXT

CPU = torch.device("cpu")
CONFIG = TransformerConfig(
    dim=128,
    num_layers=2,
    num_heads=2,
    head_dim=48,
    text_vocab_size=30,
    text_seq_len=8,
    text_position_rows=12,
    image_vocab_size=64,
    image_grid_size=3,
)
ROW_COUNTS = [*range(4, 24), 31, 32, 33, 48, 63, 64, 65, 90, 128, 129, 140]

pytestmark = pytest.mark.skipif(
    not can_quantise(torch.float32, CPU), reason="no packed linear layers here (oneDNN, x86)"
)
packs_bfloat16 = pytest.mark.skipif(
    not can_pack(torch.bfloat16, CPU), reason=f"this processor ({cpu_capabilities().isa}) cannot pack bfloat16"
)


@pytest.fixture(scope="module")
def model() -> KoDalle:
    torch.manual_seed(0)
    model = KoDalle(CONFIG)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("scale"):
                parameter.fill_(1.0)
    return model


@pytest.fixture(params=[1, 2, 3])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def _logits(model: KoDalle, weights: Weights, count: int = 5) -> Tensor:
    """(steps, count, V) of sequences that are fed the same tokens."""
    sampler = Sampler(model, weights=weights)
    prefix = sampler.prefill(TEXT)
    init = torch.arange(CONFIG.image_seq_len)
    seen = []
    with evaluating(model):
        decoder = SlotDecoder(sampler.step_model(), count)
        for candidate in range(count):
            decoder.add(
                prefix, SequenceRequest(candidate % 2, SamplingParams(seed=1), candidate=candidate), init_tokens=init
            )
        for _ in range(CONFIG.image_seq_len - 1):
            decoder.step()
            seen.append(decoder.next_logits().clone())
    return torch.stack(seen)


def test_packed_logits_equal_plain_logits(model: KoDalle) -> None:
    torch.testing.assert_close(_logits(model, "packed"), _logits(model, "plain"), rtol=0, atol=1e-5)


def test_int8_logits_are_close(model: KoDalle) -> None:
    plain, int8 = _logits(model, "plain"), _logits(model, "int8")
    error = (int8 - plain).pow(2).mean().sqrt() / plain.pow(2).mean().sqrt()
    assert 1e-4 < error < 0.03  # 8 bits leave half a percent a product; less than 1e-4 would not be 8 bits


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=packs_bfloat16)])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 64), (128, 320), (1024, 512), (96, 1000)])
def test_a_row_of_a_packed_layer_has_the_same_bits_in_any_batch(
    num_threads: int, dtype: torch.dtype, inputs: int, outputs: int
) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(outputs, inputs).to(dtype) / 8, torch.randn(outputs).to(dtype)
    x, other = torch.randn(140, inputs).to(dtype), torch.randn(140, outputs).to(dtype)
    packed, int8, floats = (
        _PackedLinear(weight, bias), _Int8Linear(weight, bias), _Int8Linear(weight, bias, in_bytes=False)
    )  # fmt: skip
    functions: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "plain": lambda x, _: packed(x),
        "gelu": lambda x, _: packed.gelu(x),
        "add": lambda x, other: packed.combined(x, other, "add"),
        "mul": lambda x, other: packed.combined(x, other, "mul"),
        "int8": lambda x, _: int8(x),
        "int8 as float32": lambda x, _: floats(x),
        "geglu": lambda x, _: reference.geglu(x),
    }
    with torch.inference_mode():
        for name, function in functions.items():
            whole = function(x, other)
            for count in ROW_COUNTS:
                assert torch.equal(function(x[:count], other[:count]), whole[:count]), (name, count)
                assert torch.equal(function(x[-count:], other[-count:]), whole[-count:]), (name, count)


@pytest.mark.parametrize("in_bytes", [None, False])
def test_int8_linear_is_the_rounded_product(in_bytes: bool | None) -> None:
    """Against integers in float64; bit for bit in tests/engine/test_device.py, by instruction set."""
    torch.manual_seed(0)
    weight, bias, x = torch.randn(48, 256), torch.randn(48), 3 * torch.randn(7, 256)
    x[3] = 0  # a row without a scale
    scales, steps = weight.abs().amax(1) / 127, x.abs().amax(1, keepdim=True) / 127
    rounded_x = (x / steps.clamp(min=1e-30)).round().double()
    product = rounded_x @ (weight / scales[:, None]).round().double().T
    expected = (product * steps.double() * scales.double() + bias.double()).float()
    with torch.inference_mode():
        found = _Int8Linear(weight, bias, in_bytes=in_bytes)(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weights", ["packed", "int8"])
def test_candidates_are_the_same_alone_and_in_batches(model: KoDalle, weights: Weights) -> None:
    """Few of them; benchmarks/seed_equality.py counts a thousand."""
    sampler = Sampler(model, null_text_tokens=NULL, weights=weights)
    prefix = sampler.prefill(TEXT)
    kinds = [SamplingParams(), SamplingParams(top_p=0.9), SamplingParams(guidance_scale=2.0)]
    requests = [SequenceRequest(i % 2, kinds[i % 3].updated(seed=i // 8), candidate=i % 8) for i in range(60)]
    order = torch.randperm(60, generator=torch.Generator().manual_seed(3)).tolist()
    for batch in (order[:1], order[1:4], order[4:21], order[21:]):
        for number, tokens in zip(batch, sampler.decode(prefix, [requests[number] for number in batch]), strict=True):
            assert torch.equal(sampler.decode(prefix, [requests[number]])[0], tokens), number


def test_the_choice_is_packed_here_and_impossible_ones_are_named(model: KoDalle) -> None:
    assert choose_weights(model) == "packed"
    assert choose_weights(model, "plain") == "plain"
    half = KoDalle(CONFIG).half()
    assert choose_weights(half) == "plain"
    for weights in ("packed", "int8"):
        with pytest.raises(InputError, match=rf"{weights} on cpu \(\w+\), torch\.float16.* float32"):
            choose_weights(half, weights)
    away = KoDalle(CONFIG).to("meta")
    assert not can_pack(torch.float32, torch.device("meta"))
    with pytest.raises(InputError, match="int8 on meta"):
        choose_weights(away, "int8")


def test_a_dtype_that_cannot_be_packed_is_used_as_it_is_and_that_is_reported_once(
    model: KoDalle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lesser = dataclasses.replace(cpu_capabilities(), isa="avx2", packs_bfloat16=False)
    monkeypatch.setattr(packed_weights, "cpu_capabilities", lambda: lesser)
    packed_weights._report_plain.cache_clear()
    brief = copy.deepcopy(model).to(torch.bfloat16)
    assert [Sampler(brief).weights for _ in range(2)] == ["plain", "plain"]
    assert Sampler(model).weights == "packed"
    assert capsys.readouterr().err == (
        "weights: bfloat16 cannot be packed on this processor (avx2): decoding uses them unpacked\n"
    )
    with pytest.raises(InputError, match=r"int8 on cpu \(avx2\), torch\.bfloat16.*: use float32"):
        Sampler(brief, weights="int8")


def test_packing_leaves_the_model_as_it_was(model: KoDalle) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    make_step_model(model, "int8")
    make_step_model(model, "packed")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(parameter.requires_grad for parameter in model.parameters())
