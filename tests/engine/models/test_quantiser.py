"""The quantiser equals taming's formulas written out, and resets of unused entries are deterministic and resumable."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from engine.models.quantiser import VectorQuantizer, codebook_stats
from tests.forked import run_forked


def _quantiser(codebook_size: int = 20, embed_dim: int = 6, **options: bool) -> VectorQuantizer:
    torch.manual_seed(0)
    quantiser = VectorQuantizer(codebook_size, embed_dim, **options)
    torch.nn.init.normal_(quantiser.embedding.weight)
    return quantiser


@pytest.mark.parametrize("legacy", [True, False])
def test_equals_taming_formulas(legacy: bool) -> None:
    quantiser = _quantiser(legacy=legacy)
    latents = torch.randn(3, 6, 4, 5, requires_grad=True)
    weight = quantiser.embedding.weight

    z = latents.permute(0, 2, 3, 1)  # (B, H, W, E)
    distances = (z[..., None, :] - weight).square().sum(-1)  # (B, H, W, K)
    tokens = distances.argmin(-1)
    chosen = weight[tokens]
    commitment, codebook = (chosen.detach() - z).square().mean(), (chosen - z.detach()).square().mean()
    expected = commitment + 0.25 * codebook if legacy else 0.25 * commitment + codebook

    result = quantiser(latents)
    torch.testing.assert_close(result.loss, expected)
    assert torch.equal(result.image_tokens, tokens.flatten(1))
    torch.testing.assert_close(result.latents, chosen.permute(0, 3, 1, 2))
    ours = torch.autograd.grad(result.loss, [latents, weight])
    for mine, theirs in zip(ours, torch.autograd.grad(expected, [latents, weight]), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_gradients_pass_straight_through() -> None:
    latents = torch.randn(2, 6, 3, 3, requires_grad=True)
    result = _quantiser()(latents)
    upstream = torch.randn_like(result.latents)
    torch.testing.assert_close(torch.autograd.grad(result.latents, latents, upstream)[0], upstream)


def test_memory_format_changes_nothing() -> None:
    quantiser, latents = _quantiser(), torch.randn(2, 6, 4, 4)
    plain, last = quantiser(latents), quantiser(latents.contiguous(memory_format=torch.channels_last))
    assert torch.equal(plain.image_tokens, last.image_tokens)
    assert torch.equal(plain.latents, last.latents)
    assert last.latents.is_contiguous(memory_format=torch.channels_last)


def test_pieces_equal_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    quantiser, vectors = _quantiser(), torch.randn(50, 6)
    whole = quantiser.nearest(vectors)
    monkeypatch.setattr("engine.models.quantiser._ROWS_PER_PRODUCT", 7)
    assert torch.equal(quantiser.nearest(vectors), whole)


def test_ties_take_the_lowest_index() -> None:
    quantiser = _quantiser()
    quantiser.embedding.weight.data[7] = quantiser.embedding.weight.data[3]
    assert quantiser.nearest(quantiser.embedding.weight.data[7:8]).tolist() == [3]


def test_initialisation_and_state_dict_are_taming_s() -> None:
    quantiser = VectorQuantizer(50, 4)
    assert list(quantiser.state_dict()) == ["embedding.weight"]
    assert quantiser.embedding.weight.abs().max() <= 1 / 50
    assert quantiser.embedding.weight.abs().max() > 0.9 / 50


def test_bfloat16_finds_the_same_entries_and_keeps_a_float32_loss() -> None:
    quantiser = _quantiser().bfloat16()
    result = quantiser(torch.randn(2, 6, 4, 4, dtype=torch.bfloat16))
    assert result.latents.dtype == torch.bfloat16
    assert result.loss.dtype == torch.float32


@pytest.mark.parametrize("bad", [[-1], [20], [0, 5, 2**40]])
def test_lookup_refuses_tokens_outside_the_codebook(bad: list[int]) -> None:
    with pytest.raises(ValueError, match=r"the codebook has 0\.\.19"):
        _quantiser().lookup(torch.tensor(bad))


def test_lookup_takes_any_integer_type_and_no_floats() -> None:
    quantiser = _quantiser()
    expected = quantiser.embedding.weight[torch.tensor([[3, 19]])]
    for dtype in (torch.uint8, torch.int16, torch.uint16, torch.int32, torch.int64):
        assert torch.equal(quantiser.lookup(torch.tensor([[3, 19]], dtype=dtype)), expected)
    with pytest.raises(ValueError, match="integers"):
        quantiser.lookup(torch.tensor([1.0]))


def test_stats() -> None:
    stats = codebook_stats(torch.tensor([[0, 1], [2, 3]]), 8)
    assert stats.usage.item() == 0.5
    torch.testing.assert_close(stats.perplexity, torch.tensor(4.0))
    torch.testing.assert_close(codebook_stats(torch.zeros(4, dtype=torch.int64), 8).perplexity, torch.tensor(1.0))


# ------------------------------------------------------------------------------------------------------------- resets


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_init_from_samples_distinct_encoder_outputs() -> None:
    quantiser, latents = _quantiser(), torch.randn(2, 6, 4, 4)
    quantiser.init_from(latents, _generator())
    rows = latents.permute(0, 2, 3, 1).reshape(-1, 6)
    matches = (quantiser.embedding.weight[:, None] == rows[None]).all(-1)  # (K, B*N)
    assert (matches.sum(1) == 1).all()
    assert matches.sum(0).max() == 1
    first = quantiser.embedding.weight.detach().clone()
    quantiser.init_from(latents, _generator())
    assert torch.equal(quantiser.embedding.weight, first)


def test_init_from_few_vectors_makes_no_equal_entries() -> None:
    quantiser = _quantiser()
    quantiser.init_from(torch.randn(7, 6), _generator())
    assert len(quantiser.embedding.weight.unique(dim=0)) == 20
    with pytest.raises(ValueError, match=r"expected \(M, 6\)"):
        quantiser.init_from(torch.randn(7, 5), _generator())


def test_reset_replaces_exactly_the_unused() -> None:
    quantiser = _quantiser(track_usage=True)
    before = quantiser.embedding.weight.detach().clone()
    latents = torch.randn(2, 6, 2, 2)
    used = quantiser(latents).image_tokens.unique()
    replaced = quantiser.reset_unused(_generator())
    assert sorted([*used.tolist(), *replaced.tolist()]) == list(range(20))
    assert torch.equal(quantiser.embedding.weight[used], before[used])
    assert not (quantiser.embedding.weight[replaced] == before[replaced]).all(1).any()
    assert quantiser.usage_counts.sum() == 0


def test_evaluation_counts_nothing_and_reset_needs_a_batch() -> None:
    quantiser = _quantiser(track_usage=True).eval()
    quantiser(torch.randn(1, 6, 2, 2))
    assert quantiser.usage_counts.sum() == 0
    with pytest.raises(RuntimeError, match="track_usage"):
        quantiser.reset_unused(_generator())


def test_resumed_equals_uninterrupted() -> None:
    batches = [torch.randn(1, 6, 2, 3, generator=_generator(seed)) for seed in range(4)]
    straight = _quantiser(track_usage=True)
    for batch in batches:
        straight(batch)
    expected = straight.reset_unused(_generator(9))

    first = _quantiser(track_usage=True)
    for batch in batches[:3]:
        first(batch)
    resumed = VectorQuantizer(20, 6, track_usage=True)
    resumed.load_state_dict(first.state_dict())
    resumed.load_usage_state(first.usage_state())
    resumed(batches[3])
    assert torch.equal(resumed.reset_unused(_generator(9)), expected)
    assert torch.equal(resumed.embedding.weight, straight.embedding.weight)

    with pytest.raises(ValueError, match="usage state is for 20 entries"):
        VectorQuantizer(21, 6).load_usage_state(first.usage_state())
    resumed.load_usage_state(VectorQuantizer(20, 6).usage_state())  # of a run that has seen no batch yet


def _reset_on_two_ranks(rank: int, store: str, answers: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    quantiser = _quantiser(track_usage=True)
    quantiser(torch.randn(1, 6, 2, 3, generator=_generator(rank)))
    replaced = quantiser.reset_unused(_generator(5))
    torch.save([replaced, quantiser.embedding.weight.detach()], f"{answers}.{rank}")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_keep_one_codebook(tmp_path: Path) -> None:
    answers = str(tmp_path / "answers")
    jobs = [(_reset_on_two_ranks, (rank, str(tmp_path / "store"), answers)) for rank in range(2)]
    printed = run_forked(jobs, tmp_path, preload=["torch"])
    assert [code for code, _ in printed] == [0, 0], printed
    (replaced, weight), (other_replaced, other_weight) = (torch.load(f"{answers}.{rank}") for rank in range(2))
    assert torch.equal(replaced, other_replaced)
    assert torch.equal(weight, other_weight)

    together = _quantiser()
    used = {
        token
        for rank in range(2)
        for token in together(torch.randn(1, 6, 2, 3, generator=_generator(rank))).image_tokens.flatten().tolist()
    }
    assert replaced.tolist() == [token for token in range(20) if token not in used]
