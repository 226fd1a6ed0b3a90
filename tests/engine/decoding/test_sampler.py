"""The sampler: cached == uncached, alone == in a batch, and what its sampling parameters promise."""

import pytest
import torch
from torch import Tensor

from engine.decoding.sampler import Sampler, evaluating
from engine.decoding.slot_decoder import SlotDecoder
from engine.errors import InputError
from engine.models.transformer import KoDalle
from engine.sampling_params import SamplingParams, SequenceRequest
from kernels import reference
from tests.engine.decoding.cases import CONFIG, NULL, TEXT, random_model

N = CONFIG.image_seq_len
MIXED = [
    SamplingParams(),
    SamplingParams(temperature=0.7, top_k=10),
    SamplingParams(guidance_scale=3.0),
    SamplingParams(temperature=0),
    SamplingParams(top_p=0.8, guidance_scale=0.5),
    SamplingParams(top_k=20, top_p=0.9),
]


def _requests(count: int) -> list[SequenceRequest]:
    return [SequenceRequest(i % 3, MIXED[i % len(MIXED)].updated(seed=i // 4), candidate=i % 4) for i in range(count)]


def uncached_logits(model: KoDalle, text: Tensor, tokens: Tensor, scale: float) -> Tensor:
    """Logits (n, V) that a whole forward pass over `tokens` (n,) gives, the last of which is not read."""
    model.eval()
    conditional = model.logits(text[None], tokens[None])[1][0]
    unconditional = model.logits(NULL[None], tokens[None])[1][0]
    return conditional if scale == 1 else unconditional + scale * (conditional - unconditional)


@torch.no_grad()
def uncached_tokens(model: KoDalle, request: SequenceRequest) -> Tensor:
    tokens = torch.zeros(N, dtype=torch.int64)
    params = request.sampling_params
    for position in range(N):
        logits = uncached_logits(model, TEXT[request.prefix_index], tokens[: position + 1], params.guidance_scale)
        tokens[position] = reference.sample(
            logits[-1:],
            torch.tensor([request.seed]),
            torch.tensor([request.candidate]),
            torch.tensor([position]),
            torch.tensor([params.temperature]),
            torch.tensor([params.top_k or 0]),
            torch.tensor([params.top_p or 1.0]),
        )[0]
    return tokens


def test_cached_tokens_equaluncached_tokens() -> None:
    model, requests = random_model(), _requests(6)
    tokens = Sampler(model, null_text_tokens=NULL).generate(TEXT, requests)
    assert tokens.shape == (6, N)
    assert tokens.dtype == torch.int64
    for request, one in zip(requests, tokens, strict=True):
        assert torch.equal(one, uncached_tokens(model, request)), request


def test_cached_logits_equaluncached_logits() -> None:
    model, requests = random_model(), _requests(6)
    sampler = Sampler(model, null_text_tokens=NULL)
    prefix, seen = sampler.prefill(TEXT), []
    with evaluating(model):
        decoder = SlotDecoder(sampler.step_model(), 8, null_prefix=sampler.null_prefix())  # two are guided
        slots = [decoder.add(prefix, request) for request in requests]
        for _ in range(N):
            seen.append(decoder.next_logits().clone())
            decoder.step()
        generated = torch.stack([decoder.remove(slot) for slot in slots])
    with torch.no_grad():
        for index, request in enumerate(requests):
            text, scale = TEXT[request.prefix_index], request.sampling_params.guidance_scale
            expected = uncached_logits(model, text, generated[index], scale)
            cached = torch.stack([logits[index] for logits in seen])
            amplified = abs(scale) + abs(1 - scale)  # guidance takes multiples of both sequences' rounding
            torch.testing.assert_close(cached, expected, rtol=0, atol=1e-5 * amplified)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sequence_is_the_same_alone_and_in_a_batch(dtype: torch.dtype) -> None:
    """Bit by bit, over sizes that fill less than a tile, several tiles, and groups of one or many siblings."""
    config = CONFIG.model_copy(update={"dim": 192, "head_dim": 64, "num_layers": 1, "image_grid_size": 3})
    sampler = Sampler(random_model(config).to(dtype), null_text_tokens=NULL)
    requests = _requests(70)
    whole = sampler.generate(TEXT, requests)
    for chosen in ([0], [5, 3], list(range(7)), [69, *range(20, 1, -1)]):
        some = sampler.generate(TEXT, [requests[index] for index in chosen])
        assert torch.equal(some, whole[chosen]), chosen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_have_the_same_bits_in_any_batch_at_the_published_width(dtype: torch.dtype) -> None:
    """Tokens hide small differences; logits do not."""
    config = CONFIG.model_copy(update={"dim": 1024, "num_heads": 8, "head_dim": 64, "num_layers": 1})
    model = random_model(config).to(dtype)
    prefix = Sampler(model).prefill(TEXT)
    logits = {}
    for count in (1, 3, 16, 21, 64, 90):
        requests = [SequenceRequest(0, SamplingParams(seed=1), candidate=i) for i in range(count)]
        init = torch.tensor([7, 8, 9] + [-1] * (N - 3))
        with evaluating(model):
            decoder = SlotDecoder(model, count)
            for request in requests:
                decoder.add(prefix, request, init_tokens=init)
            for _ in range(3):
                decoder.step()
            logits[count] = decoder.next_logits()[0]
    assert all(torch.equal(value, logits[90]) for value in logits.values())


def test_prefix_is_the_same_alone_and_with_others() -> None:
    sampler = Sampler(random_model())
    whole, alone = sampler.prefill(TEXT), sampler.prefill(TEXT[1:2])
    assert torch.equal(whole.keys[:, 1], alone.keys[:, 0])
    assert torch.equal(whole.values[:, 1], alone.values[:, 0])
    assert torch.equal(whole.hidden[1], alone.hidden[0])


def test_seeds_and_candidates() -> None:
    sampler = Sampler(random_model())
    requests = [
        SequenceRequest(0, SamplingParams(seed=5), candidate=0),
        SequenceRequest(0, SamplingParams(seed=5), candidate=0),
        SequenceRequest(0, SamplingParams(seed=5), candidate=1),
        SequenceRequest(0, SamplingParams(seed=6), candidate=0),
        SequenceRequest(1, SamplingParams(seed=5), candidate=0),
    ]
    tokens = sampler.generate(TEXT, requests)
    assert torch.equal(tokens[0], tokens[1])
    for other in (2, 3, 4):
        assert not torch.equal(tokens[0], tokens[other])
    largest = SequenceRequest(0, SamplingParams(seed=2**64 - 1), candidate=2**32 - 1)
    assert torch.equal(sampler.generate(TEXT, [largest]), sampler.generate(TEXT, [largest]))


def test_first_tokens_follow_the_models_softmax() -> None:
    """4,000 candidates of a one-token image: also the smallest grid, with no cache slot at all."""
    config = CONFIG.model_copy(update={"image_grid_size": 1, "image_vocab_size": 30})
    model = random_model(config)
    sampler = Sampler(model)
    tokens = sampler.generate(
        TEXT[:1], [SequenceRequest(0, SamplingParams(seed=1), candidate=candidate) for candidate in range(4000)]
    )[:, 0]
    probabilities = model.eval().logits(TEXT[:1], torch.zeros(1, 1, dtype=torch.int64))[1][0, 0].softmax(0).detach()
    expected = probabilities.double() * 4000
    likely = expected >= 5
    counts = tokens.bincount(minlength=30)
    statistic = float(((counts - expected) ** 2 / expected)[likely].sum())
    freedom = int(likely.sum())
    assert abs(statistic - freedom) < 5 * (2 * freedom) ** 0.5
    biased = probabilities[likely].roll(1).double() * 4000  # the same statistic against wrong probabilities
    assert float(((counts[likely] - biased) ** 2 / biased).sum()) - freedom > 50 * (2 * freedom) ** 0.5


def test_guidance_1_is_none_and_0_is_the_null_caption() -> None:
    sampler = Sampler(random_model(), null_text_tokens=NULL)
    plain = sampler.generate(TEXT, [SequenceRequest(0, SamplingParams(seed=3))])
    one = sampler.generate(TEXT, [SequenceRequest(0, SamplingParams(guidance_scale=1.0, seed=3))])
    assert torch.equal(plain, one)
    zero = sampler.generate(TEXT, [SequenceRequest(0, SamplingParams(guidance_scale=0.0, seed=3))])
    assert torch.equal(zero, sampler.generate(NULL[None], [SequenceRequest(0, SamplingParams(seed=3))]))
    three = sampler.generate(TEXT, [SequenceRequest(0, SamplingParams(guidance_scale=3.0, seed=3))])
    assert not torch.equal(plain, three)


def test_init_tokens_are_kept_and_continued() -> None:
    sampler = Sampler(random_model(), null_text_tokens=NULL)
    requests = _requests(6)
    tokens = sampler.generate(TEXT, requests)
    for count in (0, 1, 7, N):
        assert torch.equal(sampler.generate(TEXT, requests, init_tokens=tokens[:, :count]), tokens)
    other = (tokens[:, :7] + 1) % CONFIG.image_vocab_size
    continued = sampler.generate(TEXT, requests, init_tokens=other)
    assert torch.equal(continued[:, :7], other)
    assert not torch.equal(continued[:, 7:], tokens[:, 7:])


def test_on_step_reports_and_cancels() -> None:
    sampler = Sampler(random_model())
    seen: list[tuple[int, Tensor]] = []
    tokens = sampler.generate(
        TEXT,
        [SequenceRequest(0, SamplingParams(seed=1)), SequenceRequest(2, SamplingParams(seed=1))],
        on_step=lambda p, t: seen.append((p, t.clone())),
    )
    assert [position for position, _ in seen] == list(range(N))
    assert torch.equal(torch.stack([tokens for _, tokens in seen], dim=1), tokens)

    def stop(position: int, tokens: Tensor) -> None:
        if position == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sampler.generate(TEXT, [SequenceRequest(0, SamplingParams(seed=1))], on_step=stop)
    assert torch.equal(sampler.generate(TEXT, [SequenceRequest(0, SamplingParams(seed=1))])[0], tokens[0])


def test_the_models_mode_is_restored_and_dropout_is_off() -> None:
    model = random_model(CONFIG.model_copy(update={"attention_dropout": 0.5, "ff_dropout": 0.5})).train()
    tokens = Sampler(model).generate(TEXT, [SequenceRequest(0, SamplingParams(seed=1))])
    assert model.training
    assert torch.equal(tokens, Sampler(random_model()).generate(TEXT, [SequenceRequest(0, SamplingParams(seed=1))]))
    assert not tokens.is_inference()


def test_without_padding_tokens_are_generated_too() -> None:
    requests = _requests(5)
    tokens = Sampler(random_model(), null_text_tokens=NULL, batch_invariant=False).generate(TEXT, requests)
    assert torch.equal(tokens, Sampler(random_model(), null_text_tokens=NULL).generate(TEXT, requests))


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", -1.0), ("temperature", float("nan")), ("top_k", 0), ("top_p", 0.0), ("top_p", 1.5)]
    + [("guidance_scale", -0.5), ("guidance_scale", float("inf"))],
)
def test_bad_parameters_are_named(field: str, value: float) -> None:
    with pytest.raises(InputError, match=field):
        SamplingParams(**{field: value})  # type: ignore[arg-type]


def test_bad_requests_are_named() -> None:
    sampler = Sampler(random_model())
    with pytest.raises(InputError, match="seed"):
        SequenceRequest(0, SamplingParams(seed=-1))
    with pytest.raises(InputError, match="candidate"):
        SequenceRequest(0, SamplingParams(seed=1), candidate=2**32)
    with pytest.raises(InputError, match="guidance_scale: not 1: needs an empty caption"):
        sampler.generate(TEXT, [SequenceRequest(0, SamplingParams(guidance_scale=2.0, seed=1))])
    with pytest.raises(InputError, match="text_tokens"):
        sampler.prefill(TEXT[:, :5])
    with pytest.raises(InputError, match="prefix_index"):
        sampler.generate(TEXT, [SequenceRequest(3, SamplingParams(seed=1))])
    with pytest.raises(InputError, match="at least one sequence"):
        sampler.generate(TEXT, [])
    for init in (torch.zeros(2, 3, dtype=torch.int64), torch.tensor([[64]]), torch.tensor([[-2]])):
        with pytest.raises(InputError, match="init_tokens"):
            sampler.generate(TEXT, [SequenceRequest(0, SamplingParams(seed=1))], init_tokens=init)


def test_sequences_that_come_and_go_get_the_tokens_of_generate() -> None:
    sampler, requests = Sampler(random_model(), null_text_tokens=NULL), _requests(6)
    expected = sampler.generate(TEXT, requests)
    with sampler.borrow_decoder(4) as decoder:  # two of the six are guided and need two slots
        prefix, waiting = sampler.prefill(TEXT), list(enumerate(requests))
        running: dict[int, int] = {}
        tokens: dict[int, Tensor] = {}
        while waiting or running:
            while waiting and decoder.num_free >= 1 + waiting[0][1].sampling_params.is_guided:
                number, request = waiting.pop(0)
                running[decoder.add(prefix, request)] = number
            for slot in decoder.step():
                tokens[running.pop(slot)] = decoder.remove(slot)
    assert torch.equal(torch.stack([tokens[number] for number in range(len(requests))]), expected)
