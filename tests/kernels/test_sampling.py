"""The sampling kernels against their definition: interpreted on the CPU, compiled on a GPU.

Without a GPU, TRITON_INTERPRET=1 must be set before anything imports triton. The interpreter computes a
sequence in Python (some 20 ms, with filters 100 ms), so cases are few and small.
"""

import math

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import reference, sampling
from kernels.sampling import head_sample, sample

HAS_CUDA = torch.cuda.is_available()
CUDA = [pytest.mark.gpu, pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device")]
NEAR_TIE = 1e-5  # below this margin of the two best scores, the last bit of exp and log may decide


def _rows(B: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Seeds, candidates and positions, their extremes among them."""
    generator = torch.Generator().manual_seed(B)
    seeds = torch.randint(-(2**63), 2**63 - 1, (B,), generator=generator)
    candidates = torch.randint(0, 2**32, (B,), generator=generator)
    positions = torch.randint(0, 256, (B,), generator=generator)
    seeds[0], candidates[-1] = -1, 2**32 - 1
    return seeds.to(device), candidates.to(device), positions.to(device)


def _settings(
    device: str, temperature: list[float], top_k: list[int], top_p: list[float]
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.tensor(temperature, device=device),
        torch.tensor(top_k, device=device),
        torch.tensor(top_p, device=device),
    )


def _off(B: int, device: str, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    return _settings(device, [temperature] * B, [0] * B, [1.0] * B)


def _mixed(B: int, V: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Different sampling parameters for each of up to five sequences."""
    temperature, top_k = [1.0, 0.7, 0.0, 1.6, 1.0], [0, max(V // 3, 1), 2, V, 1 + V // 2]
    return _settings(device, temperature[:B], top_k[:B], [0.9, 1.0, 0.3, 0.6, 0.97][:B])


def _check_tokens(
    tokens: Tensor,
    logits: Tensor,
    rows: tuple[Tensor, ...],
    settings: tuple[Tensor, ...],
    near_tie: float = NEAR_TIE,
) -> None:
    """Equal to the reference's, except where its two best scores almost tie."""
    expected = reference.sample(logits, *rows, *settings)
    assert tokens.dtype == torch.int64
    for row in (tokens != expected).nonzero()[:, 0].tolist():
        one = slice(row, row + 1)
        scores = reference.filter_logits(logits[one], *(value[one] for value in settings))
        if settings[0][row] > 0:
            seeds, candidates, positions = (value[one] for value in rows)
            scores += reference.gumbel_noise(seeds, candidates, positions, logits.shape[1])
        best = scores[0].topk(2).values
        assert best[0] - best[1] < near_tie, (row, int(tokens[row]), int(expected[row]), best.tolist())


def _z_of_chi_square(counts: Tensor, probabilities: Tensor) -> float:
    """How many standard deviations the chi-square statistic lies above its mean (Wilson-Hilferty)."""
    expected = probabilities.double() * counts.sum()
    assert expected.min() >= 5, "too few samples for a chi-square test"
    statistic = float(((counts - expected) ** 2 / expected).sum())
    spread = 2 / (9 * (len(counts) - 1))
    return ((statistic / (len(counts) - 1)) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)


# ------------------------------------------------------------------------------------------------------- the bits


@triton.jit
def _philox_kernel(out, words):  # type: ignore[no-untyped-def]
    seed, c0, c1 = tl.load(words), tl.load(words + 1).to(tl.uint32), tl.load(words + 2).to(tl.uint32)
    c2, c3 = tl.load(words + 3).to(tl.uint32), tl.load(words + 4).to(tl.uint32)
    lane_0, lane_1, lane_2, lane_3 = tl.philox(seed, c0, c1, c2, c3)
    tl.store(out, lane_0.to(tl.int64))
    tl.store(out + 1, lane_1.to(tl.int64))
    tl.store(out + 2, lane_2.to(tl.int64))
    tl.store(out + 3, lane_3.to(tl.int64))


_noise_of = sampling._gumbel_noise


@triton.jit
def _noise_kernel(out, seed, candidate, position, CALLS: tl.constexpr):  # type: ignore[no-untyped-def]
    noise = _noise_of(tl.load(seed), tl.load(candidate), tl.load(position), tl.arange(0, CALLS))
    tl.store(out + tl.arange(0, 4 * CALLS), noise)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([0] * 5, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([-1] + [0xFFFFFFFF] * 4, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    ],
)
def test_philox_known_answers(device: str, words: list[int], expected: list[int]) -> None:
    out = torch.zeros(4, dtype=torch.int64, device=device)
    _philox_kernel[(1,)](out, torch.tensor(words, device=device))
    assert out.tolist() == expected


def test_noise_errs_at_most_twice_as_much_as_the_reference(device: str) -> None:
    V = 4096
    for row in zip(*_rows(3, device), strict=True):
        seed, candidate, position = (value[None] for value in row)
        ours = torch.empty(V, device=device)
        _noise_kernel[(1,)](ours, seed, candidate, position, CALLS=V // 4)
        calls = torch.arange(V // 4, device=device)
        bits = torch.stack(reference.philox_4x32_10(seed, calls, position, candidate, torch.zeros_like(seed)), dim=1)
        exact = -((-torch.log1p(-(bits.flatten().float() + 0.5).double() / 2**32)).log())
        theirs = reference.gumbel_noise(seed, candidate, position, V)[0]
        assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max()


def test_float_keys_keep_the_order_of_floats(device: str) -> None:
    """The whole range is bisected when the logits are extreme."""
    logits = torch.tensor([[3e38, -3e38, 1e-40, -1e-40, 0.0, -0.0, 5.0, -5.0, 1e30, -1e30]], device=device)
    for k in range(1, 10):
        settings = _settings(device, [1.0], [k], [1.0])
        _check_tokens(sample(logits, *_rows(1, device), *settings), logits, _rows(1, device), settings)


# --------------------------------------------------------------------------------------------- equal to reference


@pytest.mark.parametrize(
    ("B", "V", "dtype"),
    [
        (1, 1, torch.float32),
        (2, 2, torch.float16),
        (5, 13, torch.float32),
        (4, 13, torch.bfloat16),
        (5, 1000, torch.float32),
        (3, 1001, torch.float16),
        (5, 16384, torch.float32),
        (2, 16384, torch.bfloat16),
    ],
)
def test_tokens_are_the_references(device: str, B: int, V: int, dtype: torch.dtype) -> None:
    torch.manual_seed(V)
    logits, rows = (torch.randn(B, V) * 3).to(device, dtype), _rows(B, device)
    for settings in (_off(B, device), _mixed(B, V, device)):
        _check_tokens(sample(logits, *rows, *settings), logits, rows, settings)


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(1, 1.0), (7, 1.0), (299, 1.0), (300, 1.0), (0, 1e-6), (0, 0.5), (0, 0.9999), (40, 0.5)]
)
def test_each_filter_is_the_references(device: str, top_k: int, top_p: float) -> None:
    """Flat enough that most of what a filter keeps could be sampled: a threshold off by one token would show."""
    torch.manual_seed(0)
    logits, rows = torch.randn(4, 300).to(device) * 0.1, _rows(4, device)
    settings = _settings(device, [1.0] * 4, [top_k] * 4, [top_p] * 4)
    _check_tokens(sample(logits, *rows, *settings), logits, rows, settings)


def test_ties_with_the_last_one_kept_are_kept(device: str) -> None:
    """Both zeros are one number. With this many seeds each survivor is sampled, and nothing else."""
    B = 32
    rows = (torch.arange(B, device=device), *_rows(B, device)[1:])
    logits = torch.tensor([[0.5, 0.0, -0.0, 0.0, -0.5]], device=device).expand(B, -1)
    half = B // 2
    settings = _settings(device, [1.0] * B, [2] * half + [0] * half, [1.0] * half + [0.6] * half)
    tokens = sample(logits, *rows, *settings)
    for part in (tokens[:half], tokens[half:]):
        assert set(part.tolist()) == {0, 1, 2, 3}
    _check_tokens(tokens, logits, rows, settings)


def test_top_k_comes_before_top_p_on_what_is_left(device: str) -> None:
    logits = torch.tensor([[0.30, 0.25, 0.24, 0.11, 0.10]], device=device).log().expand(6, -1)
    settings = _settings(device, [1.0] * 6, [3] * 6, [0.35] * 6)
    assert sample(logits, *_rows(6, device), *settings).tolist() == [0] * 6  # .30 / .79 = .38 is enough


def test_temperature_0_takes_the_first_of_the_largest(device: str) -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0], [0.0] * 5, [-torch.inf, -1.0, -2.0, -1.0, -3.0]], device=device)
    settings = _settings(device, [0.0] * 3, [1, 0, 2], [0.1, 1.0, 0.5])
    assert sample(logits, *_rows(3, device), *settings).tolist() == [1, 0, 1]


def test_masked_tokens_are_never_sampled(device: str) -> None:
    logits = torch.full((6, 20), -torch.inf, device=device)
    logits[:, 3], logits[:, 17] = 0.0, 0.1
    settings = _settings(device, [1.0] * 6, [0, 0, 2, 10, 19, 0], [1.0, 0.9, 1.0, 1.0, 0.99, 1.0])
    tokens = sample(logits, *_rows(6, device), *settings)
    assert set(tokens.tolist()) <= {3, 17}
    _check_tokens(tokens, logits, _rows(6, device), settings)


def test_a_sequence_gets_the_same_token_in_any_batch(device: str) -> None:
    torch.manual_seed(0)
    B, V = 5, 700
    arguments = (torch.randn(B, V, device=device), *_rows(B, device), *_mixed(B, V, device))
    whole = sample(*arguments)
    order = torch.tensor([3, 0, 4, 4, 1], device=device)
    assert torch.equal(sample(*(argument[order] for argument in arguments)), whole[order])
    for row in range(B):
        assert sample(*(argument[row : row + 1] for argument in arguments)) == whole[row]


def test_any_strides_and_nothing_overwritten(device: str) -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 200, device=device)
    transposed, spread = logits.t().contiguous().t(), torch.randn(3, 400, device=device)
    spread[:, ::2] = logits
    rows, settings = _rows(3, device), _mixed(3, 200, device)
    expected = sample(logits, *rows, *settings)
    before = spread.clone()
    assert torch.equal(sample(transposed, *rows, *settings), expected)
    assert torch.equal(sample(spread[:, ::2], *rows, *settings), expected)
    assert torch.equal(spread, before)
    assert sample(logits[:0], *(value[:0] for value in rows + settings)).shape == (0,)


# ------------------------------------------------------------------------------------------------------ statistics


def test_tokens_follow_the_softmax_and_a_planted_bias_is_noticed(device: str) -> None:
    logits, B = torch.tensor([0.0, 1.0, -0.5], device=device), 160 if device == "cpu" else 20_000
    rows = (torch.arange(B, device=device) // 50, torch.arange(B, device=device) % 50, torch.full((B,), 3).to(device))
    counts = sample(logits.expand(B, -1), *rows, *_off(B, device)).bincount(minlength=3).cpu()
    probabilities = logits.cpu().softmax(0)
    assert abs(_z_of_chi_square(counts, probabilities)) < 3
    biased = logits.clone()
    biased[1] += 1.5
    counts = sample(biased.expand(B, -1), *rows, *_off(B, device)).bincount(minlength=3).cpu()
    assert _z_of_chi_square(counts, probabilities) > 4


# ------------------------------------------------------------------------------------------------- head and sampling


def _head(B: int, C: int, V: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(V)
    hidden, weight = torch.randn(B, C), torch.randn(V, C) * 2 / C**0.5
    return hidden.to(device, dtype), weight.to(device, dtype), torch.randn(V).to(device, dtype)


@pytest.mark.parametrize(
    ("B", "C", "V", "dtype"),
    [
        (1, 1, 1, torch.float32),
        (3, 40, 13, torch.float32),
        (5, 64, 300, torch.float16),
        (17, 33, 257, torch.bfloat16),
        (33, 100, 128, torch.float32),
    ],
)
def test_head_samples_as_the_product_and_the_reference_do(
    device: str, B: int, C: int, V: int, dtype: torch.dtype
) -> None:
    hidden, weight, bias = _head(B, C, V, device, dtype)
    rows, settings = _rows(B, device), _off(B, device)
    settings[0].copy_(torch.tensor([0.0, 1.0, 0.8])[torch.arange(B) % 3])
    logits = (hidden.double() @ weight.double().t() + bias.double()).float()
    _check_tokens(head_sample(hidden, weight, bias, *rows, settings[0]), logits, rows, settings)


def test_head_takes_the_first_of_the_largest_across_tiles(device: str) -> None:
    hidden, weight = torch.ones(2, 8, device=device), torch.zeros(600, 8, device=device)
    bias = torch.zeros(600, device=device)
    bias[[200, 201, 450]] = 1
    assert head_sample(hidden, weight, bias, *_rows(2, device), torch.zeros(2, device=device)).tolist() == [200, 200]


def test_head_samples_the_same_token_in_any_batch(device: str) -> None:
    """17 sequences take wider tiles than one does."""
    hidden, weight, bias = _head(17, 96, 300, device, torch.float32)
    arguments = (hidden, *_rows(17, device), torch.full((17,), 1.3, device=device))
    whole = head_sample(hidden, weight, bias, *arguments[1:])
    for rows in (slice(0, 1), slice(16, 17), slice(3, 11)):
        hidden, *rest = (argument[rows] for argument in arguments)
        assert torch.equal(head_sample(hidden, weight, bias, *rest), whole[rows])


def test_head_reads_rows_of_larger_tables(device: str) -> None:
    hidden, weight, bias = _head(2, 32, 200, device, torch.float32)
    rest = (*_rows(2, device), torch.ones(2, device=device))
    expected = head_sample(hidden[:, :20], weight[50:, :20], bias[50:], *rest)
    copies = hidden[:, :20].clone(), weight[50:, :20].clone(), bias[50:].clone()
    assert torch.equal(head_sample(*copies, *rest), expected)


# --------------------------------------------------------------------------------------------------- GPU only


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device")
@pytest.mark.parametrize("V", [16384, 65536])
def test_on_a_gpu_large_batches_equal_small_ones_and_the_reference(V: int) -> None:
    torch.manual_seed(0)
    B = 256
    choice = torch.arange(B) % 5
    settings = tuple(value.cpu()[choice].cuda() for value in _mixed(5, V, "cpu"))
    logits, rows = torch.randn(B, V, device="cuda") * 3, _rows(B, "cuda")
    whole = sample(logits, *rows, *settings)
    _check_tokens(whole, logits, rows, settings)
    for rows_alone in (slice(0, 1), slice(77, 79), slice(255, 256), slice(64, 128)):
        arguments = (argument[rows_alone] for argument in (logits, *rows, *settings))
        assert torch.equal(sample(*arguments), whole[rows_alone])


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_a_gpu_the_head_samples_the_same_in_every_batch_size(dtype: torch.dtype) -> None:
    hidden, weight, bias = _head(256, 1024, 16384, "cuda", dtype)
    rows, temperature = _rows(256, "cuda"), torch.ones(256, device="cuda")
    whole = head_sample(hidden, weight, bias, *rows, temperature)
    for B in (1, 2, 8, 16, 17, 32, 33, 64, 128):
        seeds, candidates, positions = (row[:B] for row in rows)
        part = head_sample(hidden[:B], weight, bias, seeds, candidates, positions, temperature[:B])
        assert torch.equal(part, whole[:B]), B
    logits = (hidden.double() @ weight.double().t() + bias.double()).float()
    # A tensor core's float32 sums of 1,024 products are some 1e-5 off.
    _check_tokens(whole, logits, rows, _off(256, "cuda"), near_tie=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device")
def test_on_a_gpu_nothing_waits_for_the_device_and_a_graph_replays() -> None:
    logits, rows = torch.randn(8, 16384, device="cuda"), _rows(8, "cuda")
    settings = tuple(value[torch.arange(8, device="cuda") % 5] for value in _mixed(5, 16384, "cuda"))
    hidden, weight, bias = _head(8, 64, 1000, "cuda", torch.bfloat16)

    def run() -> tuple[Tensor, Tensor]:
        return sample(logits, *rows, *settings), head_sample(hidden, weight, bias, *rows, settings[0])

    eager = run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    assert all(torch.equal(one, other) for one, other in zip(captured, eager, strict=True))
