"""The sampler: cached == uncached, alone == in company, and what its options promise."""

from typing import Any

import pytest
import torch
from torch import Tensor

from engine.config import TransformerConfig
from engine.decoding.kv_cache import Caption, KVCache, Prefix
from engine.decoding.sampler import Sampler, evaluating
from engine.decoding.slot_decoder import SlotDecoder
from engine.errors import InputError
from engine.models.transformer import KoDalle
from engine.sampling_params import SamplingParams, SequenceRequest
from kernels import reference

CONFIG = TransformerConfig(
    dim=32,
    num_layers=3,
    num_heads=2,
    head_dim=16,
    text_vocab_size=30,
    text_seq_len=8,
    text_position_rows=12,
    image_vocab_size=64,
    image_grid_size=4,
)
N = CONFIG.image_seq_len
NULL = torch.tensor([0, 2, 1, 1, 1, 1, 1, 1])
TEXT = torch.tensor([[0, 5, 6, 7, 2, 1, 1, 1], [0, 9, 2, 1, 1, 1, 1, 1], [0, 29, 28, 27, 26, 25, 24, 2]])
MIXED = [
    SamplingParams(),
    SamplingParams(temperature=0.7, top_k=10),
    SamplingParams(guidance_scale=3.0),
    SamplingParams(temperature=0),
    SamplingParams(top_p=0.8, guidance_scale=0.5),
    SamplingParams(top_k=20, top_p=0.9),
]


def _model(config: TransformerConfig = CONFIG) -> KoDalle:
    torch.manual_seed(0)
    model = KoDalle(config)
    with torch.no_grad():  # a fresh model's tokens depend on hardly anything but their neighbour and the noise
        for name, parameter in model.named_parameters():
            if name.endswith("scale"):
                parameter.fill_(1.0)
            elif name.endswith(("qkv.weight", "attention.out.weight", "head.weight")):
                parameter *= 3
    return model


def _mixed_rows(count: int) -> list[SequenceRequest]:
    return [SequenceRequest(i % 3, MIXED[i % len(MIXED)].updated(seed=i // 4), candidate=i % 4) for i in range(count)]


def _uncached_logits(model: KoDalle, text: Tensor, tokens: Tensor, scale: float) -> Tensor:
    """Logits (n, V) that a whole forward pass over `tokens` (n,) gives, the last of which is not read."""
    model.eval()
    conditional = model.logits(text[None], tokens[None])[1][0]
    unconditional = model.logits(NULL[None], tokens[None])[1][0]
    return conditional if scale == 1 else unconditional + scale * (conditional - unconditional)


@torch.no_grad()
def _uncached_draw(model: KoDalle, row: SequenceRequest) -> Tensor:
    tokens = torch.zeros(N, dtype=torch.int64)
    option = row.sampling_params
    for position in range(N):
        logits = _uncached_logits(model, TEXT[row.prefix_index], tokens[: position + 1], option.guidance_scale)
        tokens[position] = reference.sample(
            logits[-1:],
            torch.tensor([row.seed]),
            torch.tensor([row.candidate]),
            torch.tensor([position]),
            torch.tensor([option.temperature]),
            torch.tensor([option.top_k or 0]),
            torch.tensor([option.top_p or 1.0]),
        )[0]
    return tokens


def test_cached_tokens_equal_uncached_tokens() -> None:
    model, rows = _model(), _mixed_rows(6)
    drawn = Sampler(model, null_text_tokens=NULL).draw(TEXT, rows)
    assert drawn.shape == (6, N)
    assert drawn.dtype == torch.int64
    for row, tokens in zip(rows, drawn, strict=True):
        assert torch.equal(tokens, _uncached_draw(model, row)), row


def test_cached_logits_equal_uncached_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = _model(), _mixed_rows(6)
    seen: list[Tensor] = []
    logits_of = SlotDecoder.logits

    def record(decoder: SlotDecoder, plan: Any) -> Tensor:
        logits = logits_of(decoder, plan)
        seen.append(logits[: len(rows)].clone())
        return logits

    monkeypatch.setattr(SlotDecoder, "logits", record)
    drawn = Sampler(model, null_text_tokens=NULL).draw(TEXT, rows)
    with torch.no_grad():
        for index, row in enumerate(rows):
            text, scale = TEXT[row.prefix_index], row.sampling_params.guidance_scale
            expected = _uncached_logits(model, text, drawn[index], scale)
            cached = torch.stack([logits[index] for logits in seen])
            amplified = abs(scale) + abs(1 - scale)  # guidance takes multiples of both rows' rounding
            torch.testing.assert_close(cached, expected, rtol=0, atol=1e-5 * amplified)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_alone_equals_the_row_in_company(dtype: torch.dtype) -> None:
    """Bit by bit, over sizes that fill less than a tile, several tiles, and groups of one or many siblings."""
    config = CONFIG.model_copy(update={"dim": 192, "head_dim": 64, "num_layers": 1, "image_grid_size": 3})
    sampler = Sampler(_model(config).to(dtype), null_text_tokens=NULL)
    rows = _mixed_rows(70)
    whole = sampler.draw(TEXT, rows)
    for company in ([0], [5, 3], list(range(7)), [69, *range(20, 1, -1)]):
        some = sampler.draw(TEXT, [rows[index] for index in company])
        assert torch.equal(some, whole[company]), company


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_hidden_states_bit_by_bit_at_the_published_width(dtype: torch.dtype) -> None:
    """Tokens hide small differences; logits do not."""
    config = CONFIG.model_copy(update={"dim": 1024, "num_heads": 8, "head_dim": 64, "num_layers": 1})
    model = _model(config).to(dtype)
    prefix = Sampler(model).prefill(TEXT)
    logits = {}
    for count in (1, 3, 16, 21, 64, 90):
        rows = [SequenceRequest(0, SamplingParams(seed=1), candidate=i) for i in range(count)]
        given = torch.tensor([7, 8, 9] + [-1] * (N - 3))
        with evaluating(model):
            decoder = SlotDecoder(model, count)
            for row in rows:
                decoder.join(prefix, row, given=given)
            for _ in range(3):
                decoder.step()
            logits[count] = decoder.next_logits()[0]
    assert all(torch.equal(value, logits[90]) for value in logits.values())


def test_prefix_is_the_same_alone_and_with_others() -> None:
    sampler = Sampler(_model())
    whole, alone = sampler.prefill(TEXT), sampler.prefill(TEXT[1:2])
    assert torch.equal(whole.keys[:, 1], alone.keys[:, 0])
    assert torch.equal(whole.values[:, 1], alone.values[:, 0])
    assert torch.equal(whole.hidden[1], alone.hidden[0])


def test_seeds_and_candidates() -> None:
    sampler = Sampler(_model())
    rows = [
        SequenceRequest(0, SamplingParams(seed=5), candidate=0),
        SequenceRequest(0, SamplingParams(seed=5), candidate=0),
        SequenceRequest(0, SamplingParams(seed=5), candidate=1),
        SequenceRequest(0, SamplingParams(seed=6), candidate=0),
        SequenceRequest(1, SamplingParams(seed=5), candidate=0),
    ]
    drawn = sampler.draw(TEXT, rows)
    assert torch.equal(drawn[0], drawn[1])
    for other in (2, 3, 4):
        assert not torch.equal(drawn[0], drawn[other])
    largest = SequenceRequest(0, SamplingParams(seed=2**64 - 1), candidate=2**32 - 1)
    assert torch.equal(sampler.draw(TEXT, [largest]), sampler.draw(TEXT, [largest]))


def test_first_tokens_follow_the_models_softmax() -> None:
    """4,000 candidates of a one-token picture: also the smallest grid, with no cache slot at all."""
    config = CONFIG.model_copy(update={"image_grid_size": 1, "image_vocab_size": 30})
    model = _model(config)
    sampler = Sampler(model)
    drawn = sampler.draw(
        TEXT[:1], [SequenceRequest(0, SamplingParams(seed=1), candidate=candidate) for candidate in range(4000)]
    )[:, 0]
    probabilities = model.eval().logits(TEXT[:1], torch.zeros(1, 1, dtype=torch.int64))[1][0, 0].softmax(0).detach()
    expected = probabilities.double() * 4000
    likely = expected >= 5
    counts = drawn.bincount(minlength=30)
    statistic = float(((counts - expected) ** 2 / expected)[likely].sum())
    freedom = int(likely.sum())
    assert abs(statistic - freedom) < 5 * (2 * freedom) ** 0.5
    biased = probabilities[likely].roll(1).double() * 4000  # the same statistic against wrong probabilities
    assert float(((counts[likely] - biased) ** 2 / biased).sum()) - freedom > 50 * (2 * freedom) ** 0.5


def test_guidance_1_is_none_and_0_is_the_null_caption() -> None:
    sampler = Sampler(_model(), null_text_tokens=NULL)
    plain = sampler.draw(TEXT, [SequenceRequest(0, SamplingParams(seed=3))])
    one = sampler.draw(TEXT, [SequenceRequest(0, SamplingParams(guidance_scale=1.0, seed=3))])
    assert torch.equal(plain, one)
    zero = sampler.draw(TEXT, [SequenceRequest(0, SamplingParams(guidance_scale=0.0, seed=3))])
    assert torch.equal(zero, sampler.draw(NULL[None], [SequenceRequest(0, SamplingParams(seed=3))]))
    three = sampler.draw(TEXT, [SequenceRequest(0, SamplingParams(guidance_scale=3.0, seed=3))])
    assert not torch.equal(plain, three)


def test_given_first_tokens_are_kept_and_continued() -> None:
    sampler = Sampler(_model(), null_text_tokens=NULL)
    rows = _mixed_rows(6)
    drawn = sampler.draw(TEXT, rows)
    for count in (0, 1, 7, N):
        assert torch.equal(sampler.draw(TEXT, rows, given=drawn[:, :count]), drawn)
    other = (drawn[:, :7] + 1) % CONFIG.image_vocab_size
    continued = sampler.draw(TEXT, rows, given=other)
    assert torch.equal(continued[:, :7], other)
    assert not torch.equal(continued[:, 7:], drawn[:, 7:])


def test_on_step_reports_and_cancels() -> None:
    sampler = Sampler(_model())
    seen: list[tuple[int, Tensor]] = []
    drawn = sampler.draw(
        TEXT,
        [SequenceRequest(0, SamplingParams(seed=1)), SequenceRequest(2, SamplingParams(seed=1))],
        on_step=lambda p, t: seen.append((p, t.clone())),
    )
    assert [position for position, _ in seen] == list(range(N))
    assert torch.equal(torch.stack([tokens for _, tokens in seen], dim=1), drawn)

    def stop(position: int, tokens: Tensor) -> None:
        if position == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sampler.draw(TEXT, [SequenceRequest(0, SamplingParams(seed=1))], on_step=stop)
    assert torch.equal(sampler.draw(TEXT, [SequenceRequest(0, SamplingParams(seed=1))])[0], drawn[0])


def test_models_mode_is_put_back_and_dropout_is_off() -> None:
    model = _model(CONFIG.model_copy(update={"attention_dropout": 0.5, "ff_dropout": 0.5})).train()
    drawn = Sampler(model).draw(TEXT, [SequenceRequest(0, SamplingParams(seed=1))])
    assert model.training
    assert torch.equal(drawn, Sampler(_model()).draw(TEXT, [SequenceRequest(0, SamplingParams(seed=1))]))
    assert not drawn.is_inference()


def test_without_padding_the_tokens_are_drawn_too() -> None:
    rows = _mixed_rows(5)
    drawn = Sampler(_model(), null_text_tokens=NULL, batch_invariant=False).draw(TEXT, rows)
    assert torch.equal(drawn, Sampler(_model(), null_text_tokens=NULL).draw(TEXT, rows))


def _cache(prefix: Prefix, captions: list[int], num_positions: int) -> KVCache:
    L, _, P, H, D = prefix.keys.shape
    cache = KVCache(len(captions), num_positions, (L, P, H, D), dtype=torch.float32, device=torch.device("cpu"))
    cache.seat({row: Caption(prefix, caption) for row, caption in enumerate(captions)})
    return cache


def test_cache_holds_a_caption_once_and_keeps_the_layout() -> None:
    prefix = Sampler(_model()).prefill(TEXT)
    assert prefix.keys.shape == (3, 3, 9, 2, 16)  # (L, G, P, H, D)
    cache = _cache(prefix, [0] * 10 + [2], 5)
    assert sum(len(group.rows) for group in cache._siblings) == 2
    qkv = torch.randn(11, 3, 2, 16)
    lengths = [4, 0, 3, 2, 1, 4, 4, 4, 4, 4, 1]
    cache.begin_step(torch.tensor(lengths), max(lengths))
    cache.append_and_attend(1, qkv)
    for row, length in enumerate(lengths):
        keys, values = cache.own(row)
        assert torch.equal(keys[1, length], qkv[row, 1])
        assert torch.equal(values[1, length], qkv[row, 2])
        assert keys[1].count_nonzero() == 32


@pytest.mark.parametrize("lengths", [[4] * 8, [1, 100, 64, 65, 63, 128, 3, 2]])
def test_cached_attention_equals_plain_attention_in_any_row_order(lengths: list[int]) -> None:
    prefix = Sampler(_model()).prefill(TEXT)
    captions = [2, 0, 2, 1, 0, 2, 2, 2]
    cache = _cache(prefix, captions, 130)
    torch.manual_seed(0)
    qkv = torch.randn(128, 8, 3, 2, 16)
    for position in range(max(lengths)):
        cache.begin_step(torch.full((8,), position), position)
        cache.append_and_attend(2, qkv[position])
    q = torch.randn(8, 2, 16)
    last = torch.tensor(lengths) - 1  # what each row appends again, with a new query
    cache.begin_step(last, max(lengths) - 1)
    attended = cache.append_and_attend(2, torch.cat([q[:, None] * 16**-0.5, qkv[last, torch.arange(8), 1:]], dim=1))
    own_k, own_v = qkv.transpose(0, 1)[:, :, 1:].unbind(2)  # (rows, positions, H, D)
    for row, (caption, length) in enumerate(zip(captions, lengths, strict=True)):
        k = torch.cat([prefix.keys[2, caption], own_k[row, :length]])[None]
        v = torch.cat([prefix.values[2, caption], own_v[row, :length]])[None]
        expected = reference.attention(q[row, None, None], k, v, causal=True)[0, 0]
        torch.testing.assert_close(attended[row], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", -1.0), ("temperature", float("nan")), ("top_k", 0), ("top_p", 0.0), ("top_p", 1.5)]
    + [("guidance_scale", -0.5), ("guidance_scale", float("inf"))],
)
def test_bad_options_are_named(field: str, value: float) -> None:
    with pytest.raises(InputError, match=field):
        SamplingParams(**{field: value})  # type: ignore[arg-type]


def test_bad_requests_are_named() -> None:
    sampler = Sampler(_model())
    with pytest.raises(InputError, match="seed"):
        SequenceRequest(0, SamplingParams(seed=-1))
    with pytest.raises(InputError, match="candidate"):
        SequenceRequest(0, SamplingParams(seed=1), candidate=2**32)
    with pytest.raises(InputError, match="null_text_tokens"):
        sampler.draw(TEXT, [SequenceRequest(0, SamplingParams(guidance_scale=2.0, seed=1))])
    with pytest.raises(InputError, match="text_tokens"):
        sampler.prefill(TEXT[:, :5])
    with pytest.raises(InputError, match="prefix_index"):
        sampler.draw(TEXT, [SequenceRequest(3, SamplingParams(seed=1))])
    with pytest.raises(InputError, match="at least one row"):
        sampler.draw(TEXT, [])
    for given in (torch.zeros(2, 3, dtype=torch.int64), torch.tensor([[64]]), torch.tensor([[-2]])):
        with pytest.raises(InputError, match="given"):
            sampler.draw(TEXT, [SequenceRequest(0, SamplingParams(seed=1))], given=given)


def test_rows_that_come_and_go_draw_what_draw_draws() -> None:
    sampler, rows = Sampler(_model(), null_text_tokens=NULL), _mixed_rows(6)
    expected = sampler.draw(TEXT, rows)
    with sampler.borrow_decoder(4) as decoder:  # two of the six rows are guided and want two slots: they take turns
        prefix, waiting = sampler.prefill(TEXT), list(enumerate(rows))
        joined: dict[int, int] = {}
        drawn: dict[int, Tensor] = {}
        while waiting or joined:
            while waiting and decoder.num_free >= 1 + waiting[0][1].sampling_params.is_guided:
                number, row = waiting.pop(0)
                joined[decoder.join(prefix, row)] = number
            for slot in decoder.step():
                drawn[joined.pop(slot)] = decoder.leave(slot)
        tokens = torch.stack([drawn[number] for number in range(len(rows))])
    assert torch.equal(tokens, expected)
