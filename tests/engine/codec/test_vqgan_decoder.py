"""The fast decoder: the VQGAN's images, batch invariance, refused inputs."""

import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.codec import compiled_convolution, vqgan_decoder, vqgan_row_tiles
from engine.codec.compiled_convolution import convolution_library
from engine.codec.vqgan_cpu import ThreadPool
from engine.codec.vqgan_cuda import decode_channels_last
from engine.codec.vqgan_decoder import FastDecoder
from engine.codec.vqgan_row_tiles import convolve, float_conv
from engine.config.codec import VqganConfig
from engine.errors import InputError
from engine.models.vqgan import Vqgan
from kernels import convolution

HAS_CUDA = torch.cuda.is_available()

_COMMON: dict[str, Any] = {"base_channels": 32, "latent_channels": 16, "embed_dim": 12, "codebook_size": 40}
CONFIGS = {
    "attention": {"image_size": 32, "channel_multipliers": (1, 1, 2), "attention_resolutions": (8,)},
    "narrow": {"image_size": 48, "channel_multipliers": (1, 2, 2, 4), "norm_groups": 4, "attention_resolutions": ()},
    "base 16": {
        "base_channels": 16,
        "image_size": 48,
        "channel_multipliers": (1, 2, 4, 8),
        "norm_groups": 4,
        "attention_resolutions": (),
    },
    "odd maps": {"image_size": 20, "channel_multipliers": (1, 2, 1), "attention_resolutions": (5, 20)},
}


def _vqgan(name: str) -> Vqgan:
    """Random weights with every bias and gain of its own, and images that are not flat."""
    torch.manual_seed(0)
    vqgan = Vqgan(VqganConfig(**(_COMMON | CONFIGS[name]))).eval()
    with torch.no_grad():
        for parameter in vqgan.decoder.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
        vqgan.quantize.embedding.weight.normal_()
    return vqgan


@pytest.fixture(scope="module")
def vqgan() -> Vqgan:
    return _vqgan("attention")


needs_library = pytest.mark.skipif(
    convolution_library() is None, reason="the compiled convolutions were not built here"
)
WAYS = pytest.mark.parametrize(
    "way",
    [pytest.param("compiled", marks=needs_library), "row tiles", "modules"],
    ids=lambda way: way.replace(" ", "-"),
)

FLOAT32_WAYS = [
    pytest.param("float32", "compiled", marks=needs_library), ("float32", "row tiles"), ("float32", "modules")
]  # fmt: skip


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Maps of 32 x 32 pixels in eight row tiles, as published ones in many."""
    monkeypatch.setattr(vqgan_row_tiles, "_WINOGRAD_TILES", 8)
    monkeypatch.setattr(vqgan_row_tiles, "_TILE_PIXELS", 128)


def _tokens(vqgan: Vqgan, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(vqgan.config.codebook_size, (count, vqgan.config.image_seq_len), generator=generator)


# ------------------------------------------------------------------------------------------------------- the same


@WAYS
@pytest.mark.parametrize(
    ("name", "count"), [("attention", 1), ("attention", 5), ("narrow", 3), ("base 16", 3), ("odd maps", 2)]
)
def test_equals_the_vqgan(name: str, count: int, way: vqgan_decoder.Way) -> None:
    vqgan = _vqgan(name)
    tokens = _tokens(vqgan, count)
    expected = vqgan.decode(tokens)
    found = FastDecoder(vqgan, way=way).decode(tokens)
    assert (found.shape, found.dtype) == (expected.shape, torch.float32)
    assert expected.std() > 0.05  # no flat grey that any decoder would get right
    assert (found - expected).abs().max() <= 1e-5
    assert torch.equal(vqgan.decode(tokens), expected)  # the VQGAN has not changed


@WAYS
@pytest.mark.parametrize(("name", "grid"), [("attention", (8, 12)), ("attention", (9, 10)), ("odd maps", (6, 5))])
def test_larger_grids_equal_the_modules(name: str, grid: tuple[int, int], way: vqgan_decoder.Way) -> None:
    """Whole tiles of Winograd's, and grids that need another decoder of row tiles."""
    vqgan = _vqgan(name)
    tokens = torch.randint(40, (2, grid[0] * grid[1]), generator=torch.Generator().manual_seed(0))
    decoder = FastDecoder(vqgan, way=way)
    found, cell = decoder.decode(tokens, grid=grid), vqgan.config.image_size // vqgan.config.grid_size
    assert found.shape == (2, 3, grid[0] * cell, grid[1] * cell)
    with torch.no_grad():
        latents = vqgan.latent_table()[tokens].view(2, *grid, -1).permute(0, 3, 1, 2)
        expected = vqgan.to_images(vqgan.decoder(latents))
    assert (found - expected).abs().max() <= 1e-5
    assert torch.equal(decoder.decode(tokens[:1], grid=grid), found[:1])
    own = _tokens(vqgan, 2)
    assert torch.equal(decoder.decode(own), FastDecoder(vqgan, way=way).decode(own))
    assert decoder.decode(tokens[:0], grid=grid).shape == (0, *found.shape[1:])
    with pytest.raises(ValueError, match="image tokens must be"):
        decoder.decode(own, grid=grid)


@WAYS
@pytest.mark.parametrize("count", [1, 2, 3])
def test_decodes_in_inference_mode(vqgan: Vqgan, count: int, way: vqgan_decoder.Way) -> None:
    """Tensors of that mode may not be written by other threads, which are not in it."""
    tokens = _tokens(vqgan, count)
    with torch.inference_mode():
        found = FastDecoder(vqgan, way=way).decode(tokens.clone())
    assert torch.equal(found, FastDecoder(vqgan, way=way).decode(tokens))


def test_equals_the_vqgan_with_many_row_tiles(vqgan: Vqgan, small_tiles: None) -> None:
    tokens = _tokens(vqgan, 3)
    assert (FastDecoder(vqgan, way="row tiles").decode(tokens) - vqgan.decode(tokens)).abs().max() <= 1e-5


@pytest.mark.parametrize(("precision", "allowed"), [("bfloat16", 0.05), ("float16", 0.01)])
def test_sixteen_bits_are_near(vqgan: Vqgan, precision: vqgan_decoder.Precision, allowed: float) -> None:
    tokens = _tokens(vqgan, 2)
    error = (FastDecoder(vqgan, precision=precision).decode(tokens) - vqgan.decode(tokens)).abs()
    assert 1e-5 < error.max() <= allowed


def test_table_is_the_latents(vqgan: Vqgan) -> None:
    entries = vqgan.quantize.lookup(torch.arange(40))[:, :, None, None]
    torch.testing.assert_close(vqgan.latent_table(), vqgan.post_quant_conv(entries)[:, :, 0, 0])


@pytest.mark.parametrize(
    ("channels", "size", "doubled"), [((8, 16), 5, True), ((8, 16), 5, False), ((64, 3), 6, False)]
)
@pytest.mark.parametrize("add", [False, True])
def test_convolutions_that_are_not_winograds(channels: tuple[int, int], size: int, doubled: bool, add: bool) -> None:
    torch.manual_seed(size)
    module = torch.nn.Conv2d(*channels, 3, padding=1)
    x = torch.randn(size, size, channels[0])
    conv = float_conv(module, (size, size), None, doubled=doubled)
    target = torch.ones(conv.scale * size, conv.scale * size, channels[1])
    with torch.no_grad():
        moments = convolve(conv, x, target, ThreadPool(threading.local()), add=add)
        images = x.permute(2, 0, 1)[None]
        images = F.interpolate(images, scale_factor=2.0) if doubled else images
        expected = module(images)[0].permute(1, 2, 0) + add
    torch.testing.assert_close(target, expected, atol=1e-5, rtol=1e-5)
    assert moments is not None
    flat = target.double().flatten(0, 1)
    torch.testing.assert_close(moments.mean, flat.mean(0), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(moments.variance, flat.var(0, correction=0), atol=1e-6, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(HAS_CUDA, reason="kernels are compiled here, not interpreted")
@torch.no_grad()
def test_the_gpu_network_is_tamings(vqgan: Vqgan) -> None:
    latents = torch.randn(2, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(
        decode_channels_last(vqgan.decoder, latents), vqgan.decoder(latents), atol=1e-4, rtol=1e-4
    )


# ------------------------------------------------------------------------------------------------ batch invariance


@pytest.mark.parametrize(
    ("precision", "way"),
    [*FLOAT32_WAYS, ("bfloat16", None)],
)
def test_batch_invariance(vqgan: Vqgan, precision: vqgan_decoder.Precision, way: vqgan_decoder.Way | None) -> None:
    decoder = FastDecoder(vqgan, precision=precision, way=way)
    tokens = _tokens(vqgan, 5)
    together = decoder.decode(tokens)
    for rows in ([0], [4], [3, 0], [4, 1, 2, 0]):
        assert torch.equal(decoder.decode(tokens[rows]), together[rows])


@WAYS
def test_the_number_of_threads_changes_nothing(vqgan: Vqgan, way: vqgan_decoder.Way, small_tiles: None) -> None:
    decoder, tokens = FastDecoder(vqgan, way=way), _tokens(vqgan, 2)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(decoder.decode(tokens))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@WAYS
def test_two_decoders_in_two_threads(vqgan: Vqgan, way: vqgan_decoder.Way) -> None:
    decoder, tokens = FastDecoder(vqgan, way=way), _tokens(vqgan, 3)
    expected, before = decoder.decode(tokens), torch.get_num_threads()
    found: list[Tensor] = []
    workers = [threading.Thread(target=lambda: found.append(decoder.decode(tokens))) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [torch.equal(one, expected) for one in found] == [True] * 3
    assert torch.get_num_threads() == before


# --------------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize(("channels", "uses_row_tiles"), [(32, False), (64, True)])
def test_without_the_library_narrow_decoders_use_no_row_tiles_and_one_line_says_that_it_lacks(
    channels: int, uses_row_tiles: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compiled_convolution, "compiled_set", lambda: "avx2")
    monkeypatch.setattr(convolution, "load", lambda instructions: None)
    convolution_library.cache_clear()
    try:
        vqgan = Vqgan(VqganConfig(**(_COMMON | CONFIGS["attention"] | {"base_channels": channels})))
        decoders = [FastDecoder(vqgan) for _ in range(2)]
    finally:
        convolution_library.cache_clear()
    assert [decoder._cpu is not None for decoder in decoders] == [uses_row_tiles] * 2
    assert capsys.readouterr().err.splitlines() == [
        "codec: the compiled convolutions were not built with this installation (no C++ compiler?): slower, by torch's operators"
    ]


@needs_library
@pytest.mark.parametrize(("latent_channels", "compiled"), [(16, True), (12, False)])
def test_decoders_of_whole_lanes_are_compiled(latent_channels: int, compiled: bool) -> None:
    config = VqganConfig(**(_COMMON | CONFIGS["attention"] | {"latent_channels": latent_channels}))
    assert (FastDecoder(Vqgan(config))._cpu is not None) == compiled


@WAYS
def test_refuses_what_the_vqgan_refuses(vqgan: Vqgan, way: vqgan_decoder.Way) -> None:
    decoder, tokens = FastDecoder(vqgan, way=way), _tokens(vqgan, 2)
    outside = tokens.clone()
    outside[1, 3] = 40
    for bad in (tokens[:, :5], tokens[0], tokens.float(), tokens > 3, outside, tokens - 41):
        with pytest.raises(ValueError, match="image tokens") as theirs:
            vqgan.decode(bad)
        with pytest.raises(ValueError, match="image tokens") as ours:
            decoder.decode(bad)
        assert str(ours.value) == str(theirs.value)
    assert decoder.decode(tokens[:0]).shape == (0, 3, 32, 32)
    assert torch.equal(decoder.decode(tokens.int()), decoder.decode(tokens))


def test_other_faults(vqgan: Vqgan) -> None:
    with pytest.raises(InputError, match="precision: int8: write one of float32, bfloat16, float16"):
        FastDecoder(vqgan, precision="int8")  # type: ignore[arg-type]
    if not HAS_CUDA:
        with pytest.raises(ValueError, match="decode_async: this decoder is on the CPU"):
            FastDecoder(vqgan).decode_async(_tokens(vqgan, 1))


# ----------------------------------------------------------------------------------------------------------- GPU


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device")
@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_on_a_gpu_graphed_equals_eager_and_is_batch_invariant(precision: vqgan_decoder.Precision) -> None:
    from engine.codec.vqgan_cuda import CudaDecoder

    vqgan = _vqgan("attention").cuda()
    decoder, tokens = FastDecoder(vqgan, precision=precision), _tokens(vqgan, 6).cuda()
    dtype = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[precision]
    eager = CudaDecoder(vqgan, vqgan.latent_table(), dtype=dtype, graphed=False)
    expected, done = eager.enqueue(tokens)
    done.synchronize()
    images = decoder.decode(tokens)
    assert torch.equal(images, expected)
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        plain = vqgan.decode(tokens)
    assert (images - plain).abs().max() <= (1e-4 if precision == "float32" else 0.05)
    for rows in ([0], [5], [3, 0, 1, 2, 5]):
        assert torch.equal(decoder.decode(tokens[rows]), images[rows])


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device")
def test_on_a_gpu_decoding_runs_beside_the_callers_stream() -> None:
    vqgan = _vqgan("attention").cuda()
    decoder, tokens = FastDecoder(vqgan), _tokens(vqgan, 4).cuda()
    expected = decoder.decode(tokens)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(10**8)  # the caller's stream is busy for long after
        copied = tokens.clone()
        images, done = decoder.decode_async(copied)
        done.synchronize()
        assert torch.equal(images, expected)
