"""The compiled step's parts: products with the same bits in any batch and on any instruction set, and sampled tokens."""

import ctypes
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.decoding.cpu.compiled_step import library
from engine.device import cpu_capabilities
from kernels import decode_step, reference
from kernels.compiled import InstructionSet
from kernels.decode_step import GROUP, PackedLinear, WeightKind, load, quantise_groups, quantise_weight

pytestmark = pytest.mark.skipif(library() is None, reason="the compiled step was not built here")

# Those that this processor has; the second one is what ONEDNN_MAX_CPU_ISA=AVX2 leaves of it.
LIBRARIES: list[InstructionSet] = ["avx2"]
if cpu_capabilities().isa in ("avx512_vnni", "avx512_bf16", "amx"):
    LIBRARIES.append("avx512")
KINDS: list[WeightKind] = ["float32", "int8", "int4"]
ROW_COUNTS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 16, 17, 31, 40]


def _library(name: InstructionSet) -> ctypes.CDLL:
    found = load(name)
    assert found is not None, name
    return found


def _case(outputs: int = 48, inputs: int = 320) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x = 3 * torch.randn(40, inputs)
    x[3] = 0  # a row without a scale
    return torch.randn(outputs, inputs), torch.randn(outputs), x


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_the_same_bits_in_any_batch_and_on_any_instruction_set(kind: WeightKind) -> None:
    weight, bias, x = _case()
    layers = [PackedLinear(_library(name), weight, bias, kind) for name in LIBRARIES]
    whole = layers[0](x)
    for layer in layers:
        for count in ROW_COUNTS:
            assert torch.equal(layer(x[:count]), whole[:count]), count
            assert torch.equal(layer(x[-count:]), whole[-count:]), count


@pytest.mark.parametrize("inputs", [16, 256, 1040])
def test_float32_products(inputs: int) -> None:
    weight, bias, x = _case(inputs=inputs)
    expected = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    error = (PackedLinear(_library(LIBRARIES[-1]), weight, bias, "float32")(x) - expected).abs().max()
    assert error <= 2 * (torch.nn.functional.linear(x, weight, bias) - expected).abs().max() + 1e-6


@pytest.mark.parametrize("name", LIBRARIES)
def test_8_bit_products_are_integers_and_one_rounding_an_operation(name: InstructionSet) -> None:
    for weight, bias, x in (_case(), (torch.ones(16, 4096), torch.randn(16), -torch.ones(5, 4096))):
        integers, scales = quantise_weight(weight)
        steps = x.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127
        rounded = (x / steps + 128.5).to(torch.uint8).double() - 128
        expected = (rounded @ integers.double().T).float() * scales * steps + bias
        assert torch.equal(PackedLinear(_library(name), weight, bias, "int8")(x), expected)


@pytest.mark.parametrize("name", LIBRARIES)
def test_4_bit_products_are_sums_of_scaled_groups(name: InstructionSet) -> None:
    for weight, bias, x in (_case(), (-torch.ones(16, 128), torch.randn(16), torch.ones(5, 128))):
        integers, scales = quantise_groups(weight)
        assert -8 <= int(integers.min()) <= int(integers.max()) <= 7
        steps = x.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127
        rounded = (x / steps + 128.5).to(torch.uint8).double() - 128
        weights = integers.double() * scales.double().repeat_interleave(GROUP, dim=1)
        expected = rounded @ weights.T * steps.double() + bias.double()
        found = PackedLinear(_library(name), weight, bias, "int4")(x)
        torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)


def test_4_bit_weights_are_near() -> None:
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    integers, scales = quantise_groups(weight)
    error = (integers * scales.repeat_interleave(GROUP, dim=1) - weight).square().mean().sqrt()
    assert error < 0.095  # by the plain rule, the largest weight to 7, 0.11


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize("num_tokens", [16, 64, 1040, 16384])
def test_tokens_are_the_reference_s_wherever_it_is_sure(name: InstructionSet, num_tokens: int) -> None:
    torch.manual_seed(0)
    B = 24
    seeds = torch.tensor([2**63 - 1, -(2**63), -1] * 8) - torch.arange(B)
    candidates, positions = torch.arange(B), torch.arange(B) * 37
    temperature = torch.tensor([1.0, 0.7, 0.01, 100.0] * 6)
    logits = 3 * torch.randn(B, num_tokens)
    logits[::5, ::2] = -torch.inf
    off, whole = torch.zeros(B, dtype=torch.int64), torch.ones(B)
    expected = reference.sample(logits, seeds, candidates, positions, temperature, off, whole)
    tokens, is_close = decode_step.sample(_library(name), logits, seeds, candidates, positions, temperature)
    assert torch.equal(tokens[~is_close], expected[~is_close])
    assert int(is_close.sum()) <= 1


def test_near_ties_are_marked() -> None:
    logits = torch.zeros(3, 64)
    logits[1, 7] = 1e-5
    logits[2, 7] = 1e-2
    nothing = torch.zeros(3, dtype=torch.int64)
    tokens, is_close = decode_step.sample(_library("avx2"), logits, nothing, nothing, nothing, torch.zeros(3))
    assert is_close.tolist() == [True, True, False]
    assert tokens.tolist() == [0, 7, 7]


def test_a_forked_child_has_threads_of_its_own() -> None:
    weight, bias, x = _case()
    layer = PackedLinear(_library("avx2"), weight, bias, "int8")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = layer(x)
        child = os.fork()
        if child == 0:
            os._exit(0 if torch.equal(layer(x), expected) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        torch.set_num_threads(before)


def test_a_library_that_is_missing_or_of_other_sources_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(decode_step, "_INTERFACE", -1)
    load.cache_clear()
    assert load("avx2") is None
    monkeypatch.undo()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    load.cache_clear()
    assert load("avx2") is None
    monkeypatch.undo()
    load.cache_clear()
    assert load("avx2") is not None
