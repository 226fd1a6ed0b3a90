"""The compiled convolutions: against torch's and Winograd's by torch, every option, the same bits however they are computed."""

import itertools
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.codec.compiled_convolution import convolution_library
from engine.device import cpu_capabilities
from kernels import convolution
from kernels.compiled import InstructionSet
from kernels.convolution import CompiledConv, load
from kernels.winograd import WinogradConv

pytestmark = pytest.mark.skipif(convolution_library() is None, reason="the compiled convolutions were not built here")

# Those that this processor has; the second one is what ONEDNN_MAX_CPU_ISA=AVX2 leaves of it.
LIBRARIES: list[InstructionSet] = ["avx2"]
if cpu_capabilities().isa in ("avx512_vnni", "avx512_bf16", "amx"):
    LIBRARIES.append("avx512")
# C, K, H, W: several blocks; two chains of products; edges that are no whole tiles; few channels out; one pixel
SIZES = [(80, 32, 20, 40), (512, 32, 8, 8), (16, 48, 7, 9), (32, 3, 21, 34), (16, 16, 1, 1), (48, 20, 5, 70)]


def _conv(weight: Tensor, bias: Tensor, *, doubled: bool, name: InstructionSet = LIBRARIES[-1]) -> CompiledConv:
    library = load(name)
    assert library is not None
    return CompiledConv(library, weight, bias, doubled=doubled)


def _case(C: int, K: int, H: int, W: int) -> dict[str, Tensor]:
    torch.manual_seed(C + K + H)
    return {
        "source": 1.5 * torch.randn(H, W, C) + 0.3,
        "weight": torch.randn(K, C, 3, 3) / (3 * C**0.5),
        "bias": torch.randn(K),
        "scale": 1 + 0.3 * torch.randn(C),
        "shift": torch.randn(C),
    }


def _expected(case: dict[str, Tensor], dtype: torch.dtype, *, doubled: bool, activated: bool) -> Tensor:
    source, weight, bias, scale, shift = (tensor.to(dtype) for tensor in case.values())
    images = (F.silu(source * scale + shift) if activated else source).permute(2, 0, 1)[None]
    if doubled:
        images = F.interpolate(images, scale_factor=2.0, mode="nearest")
    return F.conv2d(images, weight, bias, padding=1)[0].permute(1, 2, 0)


def _run(conv: CompiledConv, case: dict[str, Tensor], *, activated: bool, held: Tensor | None = None) -> Tensor:
    """`held`: what the convolution is added to."""
    H, W, _ = case["source"].shape
    shape = (conv.scale * H, conv.scale * W, conv.channels_out)
    target = torch.full(shape, torch.nan) if held is None else held.clone()
    activation = (case["scale"], case["shift"]) if activated else None
    conv(case["source"], target, 0, conv.num_blocks(H, W), activation=activation, add=held is not None)
    return target


@pytest.mark.parametrize(("activated", "added"), itertools.product([False, True], repeat=2))
@pytest.mark.parametrize("doubled", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_is_the_convolution(size: tuple[int, int, int, int], doubled: bool, activated: bool, added: bool) -> None:
    case = _case(*size)
    exact = _expected(case, torch.float64, doubled=doubled, activated=activated)
    plain = (_expected(case, torch.float32, doubled=doubled, activated=activated) - exact).square().mean().sqrt()
    held = torch.randn(exact.shape) if added else None
    conv = _conv(case["weight"], case["bias"], doubled=doubled)
    found = _run(conv, case, activated=activated, held=held)
    error = (found - exact - (0 if held is None else held.double())).square().mean().sqrt()
    assert error <= (25 if doubled else 10) * plain + 2e-8  # a wrong tap is a million times


@pytest.mark.parametrize("doubled", [False, True])
@pytest.mark.parametrize("channels", [64, 128, 512])
def test_is_as_exact_as_winograd_by_torch(channels: int, doubled: bool) -> None:
    case = _case(channels, 32, 16, 16)
    exact = _expected(case, torch.float64, doubled=doubled, activated=True)
    theirs, scale = torch.empty(exact.shape, dtype=torch.float32), 2 if doubled else 1
    padded = F.pad(F.silu(case["source"] * case["scale"] + case["shift"]), (0, 0, 1, 1, 1, 1))
    winograd = WinogradConv(case["weight"], case["bias"], doubled=doubled)
    winograd(padded, theirs, add=False, scratch=lambda name, *shape: torch.empty(shape))
    found = _run(_conv(case["weight"], case["bias"], doubled=doubled), case, activated=True)
    assert found.shape == (16 * scale, 16 * scale, 32)
    assert (found - exact).square().mean() <= 1.5**2 * (theirs - exact).square().mean()


@pytest.mark.parametrize("doubled", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_bits_are_free_of_blocks_threads_and_instruction_set(size: tuple[int, int, int, int], doubled: bool) -> None:
    case = _case(*size)
    H, W, _ = case["source"].shape
    results = []
    for name in LIBRARIES:
        conv = _conv(case["weight"], case["bias"], doubled=doubled, name=name)
        blocks = conv.num_blocks(H, W)
        for num_threads in (1, 2, 3):
            target = torch.full((conv.scale * H, conv.scale * W, conv.channels_out), torch.nan)
            moments = torch.full((blocks, 4, conv.padded_channels), torch.nan)
            counts = torch.full((blocks,), torch.nan)

            def part(
                number: int, conv: CompiledConv = conv, of: int = num_threads, blocks: int = blocks,
                target: Tensor = target, moments: Tensor = moments, counts: Tensor = counts,
            ) -> None:  # fmt: skip
                ends = (blocks * number // of, blocks * (number + 1) // of)
                activation = (case["scale"], case["shift"])
                conv(case["source"], target, *ends, activation=activation, moments=moments, counts=counts)

            threads = [threading.Thread(target=part, args=(number,)) for number in range(num_threads)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            results.append((target, moments[:, :, : conv.channels_out], counts))
    assert not any(tensor.isnan().any() for tensor in results[0])
    for others in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], others, strict=True))


@pytest.mark.parametrize("doubled", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_moments_are_those_of_the_target(size: tuple[int, int, int, int], doubled: bool) -> None:
    case = _case(*size)
    case["bias"] += 30  # far from zero, as squares would notice
    H, W, _ = case["source"].shape
    conv = _conv(case["weight"], case["bias"], doubled=doubled)
    blocks = conv.num_blocks(H, W)
    target = torch.randn(conv.scale * H, conv.scale * W, conv.channels_out)
    moments, counts = torch.empty(blocks, 4, conv.padded_channels), torch.empty(blocks)
    conv(case["source"], target, 0, blocks, add=True, moments=moments, counts=counts)
    flat, parts = target.double().flatten(0, 1), moments[:, :, : conv.channels_out].double()
    assert counts.sum() == len(flat)
    shares = (counts / counts.sum())[:, None].double()
    mean = (shares * parts[:, 0]).sum(0)
    variance = (shares * (parts[:, 1] + (parts[:, 0] - mean).square())).sum(0)
    torch.testing.assert_close(mean, flat.mean(0), atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(variance, flat.var(0, correction=0), atol=1e-5, rtol=1e-4)
    assert torch.equal(parts[:, 2].amin(0), flat.amin(0))
    assert torch.equal(parts[:, 3].amax(0), flat.amax(0))


def test_only_its_blocks_are_written() -> None:
    case = _case(32, 32, 40, 64)
    conv = _conv(case["weight"], case["bias"], doubled=False)
    assert conv.num_blocks(40, 64) > 2
    target = torch.full((40, 64, 32), torch.nan)
    conv(case["source"], target, 1, 2)
    whole = _run(conv, case, activated=False)
    written = ~target.isnan()
    assert 0 < written.float().mean() < 1
    assert torch.equal(target[written], whole[written])


def test_refused_inputs() -> None:
    case = _case(32, 16, 8, 8)
    conv, target = _conv(case["weight"], case["bias"], doubled=False), torch.empty(8, 8, 16)
    source, blocks = case["source"], conv.num_blocks(8, 8)
    for bad in (source.transpose(0, 1), source.double(), source[:, :, :16]):
        with pytest.raises(ValueError, match=r"source must be \(8, 8, 32\) float32, contiguous, got"):
            conv(bad, target, 0, blocks)
    for bad in (torch.empty(16, 8, 8).permute(1, 2, 0), target[:4]):
        with pytest.raises(ValueError, match="target must be"):
            conv(source, bad, 0, blocks)
    with pytest.raises(ValueError, match="scale must be"):
        conv(source, target, 0, blocks, activation=(case["scale"][::2], case["shift"]))
    with pytest.raises(ValueError, match="moments must be"):
        conv(source, target, 0, blocks, moments=torch.empty(blocks, 4, 8), counts=torch.empty(blocks))
    with pytest.raises(ValueError, match=f"blocks 0 to {blocks + 1} of {blocks}"):
        conv(source, target, 0, blocks + 1)
    with pytest.raises(ValueError, match="multiple of 16, got 12"):
        _conv(torch.randn(16, 12, 3, 3), case["bias"], doubled=False)


def test_a_library_that_is_missing_or_of_other_sources_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(convolution, "_INTERFACE", -1)
    load.cache_clear()
    assert load("avx2") is None
    monkeypatch.undo()
    load.cache_clear()
    assert load("avx2") is not None
