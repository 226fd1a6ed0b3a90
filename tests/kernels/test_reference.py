import math

import pytest
import torch
from torch import Tensor

from kernels.reference import (
    ancestor_top_k,
    filter_logits,
    geglu,
    gumbel_noise,
    gumbel_noise_at,
    philox_4x32_10,
    sample,
)

OFF = torch.inf


def _philox_in_python(key: int, counter: list[int]) -> list[int]:
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(10):
        p0, p1 = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [
            (p1 >> 32) ^ counter[1] ^ k0,
            p1 & 0xFFFFFFFF,
            (p0 >> 32) ^ counter[3] ^ k1,
            p0 & 0xFFFFFFFF,
        ]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return counter


def _words(*values: int) -> list[Tensor]:
    return [torch.tensor(value) for value in values]


def _settings(B: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    return torch.full((B,), temperature), torch.full((B,), top_k), torch.full((B,), top_p)


def _z_of_chi_square(counts: Tensor, probabilities: Tensor) -> float:
    """How many standard deviations the chi-square statistic lies above its mean (Wilson-Hilferty)."""
    expected = probabilities.double() * counts.sum()
    assert expected.min() >= 5, "too few samples for a chi-square test"
    statistic = float(((counts - expected) ** 2 / expected).sum())
    spread = 2 / (9 * (len(counts) - 1))
    return ((statistic / (len(counts) - 1)) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)


def _rows(B: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.arange(B) // 50, torch.arange(B) % 50, torch.full((B,), 3)


# ------------------------------------------------------------------------------------------------------- the bits


def test_philox_known_answers() -> None:
    zeros = [int(word) for word in philox_4x32_10(*_words(0, 0, 0, 0, 0))]
    assert zeros == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = [int(word) for word in philox_4x32_10(*_words(-1, *[0xFFFFFFFF] * 4))]
    assert ones == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


def test_philox_equals_plain_integers() -> None:
    torch.manual_seed(0)
    seeds = torch.randint(-(2**63), 2**63 - 1, (20,))
    counters = torch.randint(0, 2**32, (4, 20))
    ours = torch.stack(philox_4x32_10(seeds, *counters))
    for i in range(20):
        assert ours[:, i].tolist() == _philox_in_python(int(seeds[i]) % 2**64, counters[:, i].tolist())


def test_noise_follows_the_contract() -> None:
    """Counter (token >> 2, position, candidate, 0), lane token & 3, seeds beyond 2^63 as two's complement."""
    noise = gumbel_noise(torch.tensor([5, -1]), torch.tensor([2, 0]), torch.tensor([255, 9]), 10)
    for row, (seed, candidate, position) in enumerate([(5, 2, 255), (2**64 - 1, 0, 9)]):
        for token in range(10):
            bits = _philox_in_python(seed, [token >> 2, position, candidate, 0])[token & 3]
            expected = -math.log(-math.log1p(-(bits + 0.5) / 2**32))
            assert noise[row, token].item() == pytest.approx(expected, rel=2e-6, abs=2e-6)


def test_noise_of_a_sequence_depends_on_no_other() -> None:
    seeds, candidates, positions = torch.arange(40), torch.arange(40) * 3, torch.arange(40) * 7
    for V in (3, 512, 1001, 16384):
        whole = gumbel_noise(seeds, candidates, positions, V)
        for row in (0, 17, 39):
            alone = gumbel_noise(seeds[row, None], candidates[row, None], positions[row, None], V)
            assert torch.equal(alone[0], whole[row])
        rows, tokens = torch.randint(0, 40, (333,)), torch.randint(0, V, (333,))
        single = gumbel_noise_at(seeds[rows], candidates[rows], positions[rows], tokens)
        assert torch.equal(single, whole[rows, tokens])


def test_noise_is_standard_gumbel_and_reaches_both_ends() -> None:
    noise = gumbel_noise(*_rows(200), 4096).double()
    assert noise.mean().item() == pytest.approx(0.57722, abs=0.01)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.02)
    assert noise.isfinite().all()
    assert noise.max() < 22.9
    assert noise.min() > -2.82
    for changed in range(3):  # seed, candidate and position each change every number
        seeds, candidates, positions = (value + int(number == changed) for number, value in enumerate(_rows(1)))
        assert (gumbel_noise(seeds, candidates, positions, 512) == gumbel_noise(*_rows(1), 512)).sum() == 0


# ---------------------------------------------------------------------------------------------------- the filters


def test_top_k_comes_before_top_p_on_what_is_left() -> None:
    logits = torch.tensor([[0.30, 0.25, 0.24, 0.11, 0.10]]).log()
    kept = filter_logits(logits, *_settings(1, top_k=3, top_p=0.35)) > -OFF
    assert kept.tolist() == [[True, False, False, False, False]]  # .30 / .79 = .38 is enough
    kept = filter_logits(logits, *_settings(1, top_p=0.35)) > -OFF
    assert kept.tolist() == [[True, True, False, False, False]]


def test_ties_with_the_last_one_kept_are_kept() -> None:
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]])
    assert (filter_logits(logits, *_settings(1, top_k=2)) > -OFF).tolist() == [[True, True, True, True, False]]
    assert (filter_logits(logits, *_settings(1, top_p=0.6)) > -OFF).tolist() == [[True, True, True, True, False]]


@pytest.mark.parametrize("V", [7, 3000])
@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.9999])
def test_top_p_keeps_the_fewest_that_reach_it(V: int, top_p: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, V) * 2
    kept = filter_logits(logits, *_settings(6, temperature=1.3, top_p=top_p)) > -OFF
    probabilities = (logits.double() / 1.3).softmax(1)
    for row in range(6):
        mass = probabilities[row][kept[row]]
        assert mass.sum() >= top_p - 1e-7
        assert mass.sum() - mass.min() < top_p + 1e-7
        assert (probabilities[row][~kept[row]] <= mass.min()).all()


def test_mixed_sequences_are_filtered_as_alone() -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 2000) * 3
    temperature = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0, 1.0])
    top_k = torch.tensor([0, 10, 10, 2000, 9999, 1])
    top_p = torch.tensor([1.0, 0.9, 0.5, 0.7, 0.99, 1.0])
    whole = filter_logits(logits, temperature, top_k, top_p)
    for row in range(6):
        one = slice(row, row + 1)
        assert torch.equal(filter_logits(logits[one], temperature[one], top_k[one], top_p[one]), whole[one])
    assert whole[0].isfinite().all()
    assert (whole[5] > -OFF).sum() == 1


def test_filters_leave_the_callers_logits_alone() -> None:
    logits = torch.randn(2, 50)
    before = logits.clone()
    sample(logits, *_rows(2), *_settings(2, top_k=5, top_p=0.5))
    sample(logits, *_rows(2), *_settings(2))
    assert torch.equal(logits, before)


def test_ancestors_threshold_counts_the_joint_vocabulary() -> None:
    joint = 32000 + 128 + 16384
    assert ancestor_top_k(0.5, joint) == 24256  # more than the 16,384 image tokens: filters nothing
    assert ancestor_top_k(0.9, joint) == 4851
    assert ancestor_top_k(1.0, joint) == 1


# ------------------------------------------------------------------------------------------------------ sampling


def test_a_token_is_the_argmax_of_filtered_logits_plus_noise() -> None:
    torch.manual_seed(0)
    logits, rows = torch.randn(30, 600), _rows(30)
    for settings in ((1.0, 0, 1.0), (0.7, 20, 1.0), (1.5, 0, 0.8), (1.0, 500, 0.99), (1.0, 9, 0.5)):
        tensors = _settings(30, *settings)
        expected = (filter_logits(logits, *tensors) + gumbel_noise(*rows, 600)).argmax(1)
        assert torch.equal(sample(logits, *rows, *tensors), expected)


def test_mixed_parameters_sample_as_alone() -> None:
    torch.manual_seed(0)
    logits, rows = torch.randn(8, 900), _rows(8)
    temperature = torch.tensor([0, 1, 1, 0.5, 2, 1, 0, 1])
    top_k, top_p = torch.tensor([0, 5, 0, 0, 899, 1, 3, 0]), torch.tensor([1, 1, 0.5, 1, 0.9, 1, 0.2, 1])
    whole = sample(logits, *rows, temperature, top_k, top_p)
    for row in range(8):
        arguments = (logits, *rows, temperature, top_k, top_p)
        assert sample(*(argument[row : row + 1] for argument in arguments)) == whole[row]


def test_temperature_0_takes_the_first_of_the_largest() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    assert sample(logits, *_rows(2), *_settings(2, temperature=0)).tolist() == [1, 0]
    mixed = torch.tensor([0.0, 1.0])
    assert sample(logits, *_rows(2), mixed, *_settings(2)[1:])[0] == 1


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_tokens_follow_the_softmax(temperature: float) -> None:
    torch.manual_seed(0)
    logits, B = torch.randn(40), 20_000
    tokens = sample(logits.expand(B, -1), *_rows(B), *_settings(B, temperature=temperature))
    counts = tokens.bincount(minlength=40)
    assert abs(_z_of_chi_square(counts, (logits / temperature).softmax(0))) < 4


def test_tokens_of_flat_logits_are_flat() -> None:
    tokens = sample(torch.zeros(8000, 512), *_rows(8000), *_settings(8000))
    assert abs(_z_of_chi_square(tokens.bincount(minlength=512), torch.full((512,), 1 / 512))) < 4


def test_the_chi_square_test_notices_a_planted_bias() -> None:
    torch.manual_seed(0)
    logits, B = torch.randn(40), 20_000
    biased = logits.clone()
    biased[logits.argmax()] += 0.2
    counts = sample(biased.expand(B, -1), *_rows(B), *_settings(B)).bincount(minlength=40)
    assert _z_of_chi_square(counts, logits.softmax(0)) > 6


@pytest.mark.parametrize(("top_k", "top_p"), [(5, 1.0), (0, 0.6), (10, 0.8)])
def test_filtered_tokens_follow_the_renormalised_rest(top_k: int, top_p: float) -> None:
    torch.manual_seed(0)
    logits, B = torch.randn(40), 20_000
    settings = _settings(B, top_k=top_k, top_p=top_p)
    left = filter_logits(logits[None], *(value[:1] for value in settings))[0]
    counts = sample(logits.expand(B, -1), *_rows(B), *settings).bincount(minlength=40)
    assert counts[left == -OFF].sum() == 0
    assert abs(_z_of_chi_square(counts[left > -OFF], left[left > -OFF].softmax(0))) < 4


def test_geglu_is_value_times_exact_gelu_of_gate() -> None:
    x = torch.randn(3, 8, dtype=torch.float64)
    value, gate = x[:, :4], x[:, 4:]
    torch.testing.assert_close(geglu(x), value * gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2))))
