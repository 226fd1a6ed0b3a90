"""The GPU decoder: the tokens of the CPU's, the same bits in any batch, graphed == eager.

Without a GPU its kernels run in Triton's interpreter, 10 to 50 ms a program, so models and images here are tiny: a
step takes 0.3 s. On a GPU the same tests run compiled, as graphs.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.config.transformer import TransformerConfig
from engine.decoding.cuda.attention_choice import runnable
from engine.decoding.cuda.graph_decoder import GraphDecoder
from engine.decoding.kv_cache import Prefix
from engine.decoding.sampler import Sampler, evaluating
from engine.decoding.slot_decoder import SlotDecoder
from engine.errors import InputError
from engine.models.transformer import KoDalle
from engine.sampling_params import SamplingParams, SequenceRequest
from tests.engine.decoding.cases import NULL, TEXT, random_model

HAS_CUDA = torch.cuda.is_available()
CUDA = [pytest.mark.gpu, pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device")]
CONFIG = TransformerConfig(
    dim=16,
    num_layers=1,
    num_heads=1,
    head_dim=16,
    ff_mult=1,
    text_vocab_size=30,
    text_seq_len=8,
    text_position_rows=12,
    image_vocab_size=64,
    image_grid_size=2,
)
N = CONFIG.image_seq_len
GUIDED = SamplingParams(guidance_scale=3.0)
# Filtered sequences take the slowest kernel to interpret: some 50 ms each.
MIXED = [
    SamplingParams(),
    GUIDED,
    SamplingParams(temperature=0),
    SamplingParams(temperature=0.7),
    SamplingParams(guidance_scale=0.5, top_k=10, top_p=0.8),
]
_NUM_REQUESTS = 8
_SLOTS = 5


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("cpu", marks=pytest.mark.skipif(HAS_CUDA, reason="kernels are compiled here, not interpreted")),
        pytest.param("cuda", marks=CUDA),
    ],
)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(device: str) -> KoDalle:
    return random_model(CONFIG).to(device)


@pytest.fixture(scope="module")
def sampler(model: KoDalle, device: str) -> Sampler:
    return Sampler(model, null_text_tokens=NULL.to(device))


@pytest.fixture(scope="module")
def prefix(sampler: Sampler) -> Prefix:
    return sampler.prefill(TEXT)


@contextmanager
def _decoder(sampler: Sampler, num_slots: int, **settings: int | str) -> Iterator[GraphDecoder]:
    null_prefix = sampler.null_prefix()
    with evaluating(sampler.model):
        yield GraphDecoder(sampler.model, num_slots, null_prefix=null_prefix, **settings)  # type: ignore[arg-type]


def _request(number: int) -> SequenceRequest:
    return SequenceRequest(number % 3, MIXED[number % 5].updated(seed=number // 5), candidate=number % 5)


def _init_tokens(number: int) -> Tensor | None:
    """Every third sequence has some of its tokens given, anywhere."""
    if number % 3:
        return None
    generator = np.random.default_rng(number)
    tokens = generator.integers(CONFIG.image_vocab_size, size=N)
    return torch.from_numpy(np.where(generator.random(N) < 0.3, tokens, -1))


def _hidden(decoder: GraphDecoder, slot: int) -> Tensor:
    return decoder._program.hidden[slot].clone()


@pytest.mark.slow
def test_sequences_that_come_and_go_get_the_tokens_of_the_slot_decoder(sampler: Sampler, prefix: Prefix) -> None:
    generator = np.random.default_rng(8)  # arrivals that need every bucket, 1, 2, 4 and 5
    waiting, generated, abandoned = list(range(_NUM_REQUESTS)), {}, 0
    slots: dict[int, int] = {}
    with _decoder(sampler, _SLOTS) as decoder:
        while waiting or slots:
            while waiting and decoder.num_free >= 2 and generator.random() < 0.5:
                number = waiting.pop(0)
                slots[decoder.add(prefix, _request(number), init_tokens=_init_tokens(number))] = number
            if slots and generator.random() < 0.04:  # a user hangs up
                slot = int(generator.choice(list(slots)))
                assert len(decoder.remove(slot)) < N
                del slots[slot]
                abandoned += 1
            for slot in decoder.step():
                generated[slots.pop(slot)] = decoder.remove(slot)
        assert decoder.num_free == _SLOTS
        assert decoder.num_sequences == 0
    assert abandoned
    assert len(generated) + abandoned == _NUM_REQUESTS
    for number, tokens in generated.items():
        init = _init_tokens(number)
        with evaluating(sampler.model):
            other = SlotDecoder(sampler.model, 2, null_prefix=sampler.null_prefix())
            slot = other.add(prefix, _request(number), init_tokens=init)
            while not other.step():
                pass
            assert torch.equal(tokens, other.remove(slot)), number
        if init is not None:
            assert torch.equal(tokens.cpu()[init >= 0], init[init >= 0])


def test_a_sequence_has_the_same_bits_alone_and_in_any_batch(sampler: Sampler, prefix: Prefix) -> None:
    """Another slot and bucket, beside guided and filtered sequences, with and without init tokens, one of them removed."""
    watched, steps = [1, 3], 2
    alone: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for number in watched:
        with _decoder(sampler, 2) as decoder:
            slot = decoder.add(prefix, _request(number), init_tokens=_init_tokens(number))
            alone[number] = []
            for _ in range(steps):
                decoder.step()
                alone[number].append((_hidden(decoder, slot), decoder.tokens(slot).clone()))
    with _decoder(sampler, 7) as decoder:
        first, second = (decoder.add(prefix, _request(number), init_tokens=_init_tokens(number)) for number in (4, 9))
        decoder.step()
        decoder.remove(first)
        slots = {number: decoder.add(prefix, _request(number), init_tokens=_init_tokens(number)) for number in watched}
        assert slots[1] == 0
        assert slots[3] > second
        for step in range(steps):
            decoder.step()
            for number, slot in slots.items():
                hidden, tokens = alone[number][step]
                assert torch.equal(_hidden(decoder, slot), hidden), (number, step)
                assert torch.equal(decoder.tokens(slot), tokens), (number, step)


def test_hidden_vectors_are_those_of_the_slot_decoder(device: str) -> None:
    """All init tokens, so that both decoders read the same; unconditional ones too. Two layers of two heads."""
    model = random_model(CONFIG.model_copy(update={"num_layers": 2, "num_heads": 2, "head_dim": 8})).to(device)
    sampler = Sampler(model, null_text_tokens=NULL.to(device))
    prefix = sampler.prefill(TEXT)
    init = torch.arange(N) * 7 % CONFIG.image_vocab_size
    with _decoder(sampler, 3) as decoder:
        other = SlotDecoder(sampler.model, 3, null_prefix=sampler.null_prefix())
        for number in (0, 1):
            assert decoder.add(prefix, _request(number), init_tokens=init) == other.add(
                prefix, _request(number), init_tokens=init
            )
        for _ in range(N - 1):
            assert decoder.step() == other.step() == []
            torch.testing.assert_close(decoder._program.hidden, other._steps.hidden[:3], rtol=1e-5, atol=1e-5)
        assert decoder.step() == other.step() == [0, 1]
        assert torch.equal(decoder.remove(1).cpu(), init)


def test_another_sequences_filter_does_not_decide_how_logits_are_rounded(device: str) -> None:
    """16-bit logits of a coarse head, where rounding makes ties, with a filtered sequence and without one."""
    model = random_model(CONFIG).to(device, torch.bfloat16)
    with torch.no_grad():
        model.head.weight.mul_(4)
    sampler = Sampler(model, null_text_tokens=NULL.to(device))
    prefix, generated = sampler.prefill(TEXT), []
    likeliest, filtering = SamplingParams(temperature=0), SamplingParams(top_k=2)
    with _decoder(sampler, 12) as decoder:
        for _ in range(11):
            decoder.add(prefix, SequenceRequest(0, likeliest.updated(seed=1)))
        decoder.add(prefix, SequenceRequest(0, filtering.updated(seed=1)))
        decoder._program.hidden.copy_(torch.randn(12, CONFIG.dim))
        for filters in (False, True):
            decoder._make_batch()  # back to the first position
            decoder._program.sample(12, filters=filters)
            generated.append(decoder.table.tokens[:11, 0].clone())
        rounded = model.head.image_logits(model.head.norm(decoder._program.hidden[:11])).argmax(1)
    assert torch.equal(generated[0], generated[1])
    assert not torch.equal(generated[0], rounded)


def test_finished_sequences_keep_their_tokens_while_others_go_on(sampler: Sampler, prefix: Prefix) -> None:
    with _decoder(sampler, 2) as decoder:
        assert decoder.step() == []
        early = decoder.add(prefix, _request(0))
        for count in range(2):
            assert len(decoder.tokens(early)) == count
            decoder.step()
        late = decoder.add(prefix, _request(3))
        for _ in range(2, N - 1):
            assert decoder.step() == []
        assert decoder.step() == [early]
        finished = decoder.tokens(early).clone()
        assert decoder.step() == []
        assert decoder.step() == [late]
        assert decoder.step() == []
        assert torch.equal(decoder.remove(early), finished)
        assert len(decoder.remove(late)) == N


def test_a_reused_slot_keeps_nothing(sampler: Sampler, prefix: Prefix) -> None:
    """Slots that held init tokens and an unconditional sequence, then neither."""
    tokens = []
    for before in (False, True):
        with _decoder(sampler, 2) as decoder:
            if before:
                slot = decoder.add(prefix, _request(1), init_tokens=torch.zeros(N, dtype=torch.int64))
                decoder.step()
                decoder.remove(slot)
            slots = [decoder.add(prefix, _request(number)) for number in (0, 3)]
            for _ in range(2):
                decoder.step()
            tokens.append(torch.stack([decoder.remove(slot) for slot in slots]))
    assert torch.equal(tokens[0], tokens[1])


def test_one_token_images(device: str) -> None:
    model = random_model(CONFIG.model_copy(update={"image_grid_size": 1})).to(device)
    sampler = Sampler(model, null_text_tokens=NULL.to(device))
    prefix = sampler.prefill(TEXT)
    with _decoder(sampler, 2) as decoder:
        slot = decoder.add(prefix, _request(1))
        assert decoder.step() == [slot]
        assert torch.equal(decoder.remove(slot), sampler.decode(prefix, [_request(1)])[0])


def test_what_does_not_fit_is_refused_and_changes_nothing(sampler: Sampler, prefix: Prefix) -> None:
    with _decoder(sampler, 2) as decoder:
        with pytest.raises(InputError, match="prefix_index"):
            decoder.add(prefix, SequenceRequest(3, SamplingParams(seed=1)))
        first = decoder.add(prefix, SequenceRequest(0, SamplingParams(seed=1)))
        with pytest.raises(InputError, match="slots"):
            decoder.add(prefix, SequenceRequest(0, GUIDED.updated(seed=1)))
        assert (decoder.num_sequences, decoder.num_free) == (1, 1)
        with pytest.raises(InputError, match="warm_up"):
            decoder.warm_up()
        decoder.add(prefix, SequenceRequest(0, SamplingParams(seed=2)))
        with pytest.raises(InputError, match="slots"):
            decoder.add(prefix, SequenceRequest(0, SamplingParams(seed=3)))
        decoder.remove(first)
        decoder.clear()
        assert decoder.num_free == 2
        decoder.add(prefix, SequenceRequest(2, SamplingParams(seed=1)))
    with evaluating(sampler.model):
        with pytest.raises(InputError, match="guidance_scale"):
            GraphDecoder(sampler.model, 2).add(prefix, SequenceRequest(0, GUIDED.updated(seed=1)))
        with pytest.raises(InputError, match="slots"):
            GraphDecoder(sampler.model, 0)
        with pytest.raises(InputError, match="attention"):
            GraphDecoder(sampler.model, 1, attention="flash")


@pytest.mark.parametrize("attention", ["sdpa", "auto"])
def test_other_attentions_give_the_same_tokens(sampler: Sampler, prefix: Prefix, attention: str) -> None:
    with _decoder(sampler, 2, attention=attention) as decoder:
        assert decoder.attention in runnable(sampler.model.head.weight.device)
        slot = decoder.add(prefix, _request(1))
        while not decoder.step():
            pass
        assert torch.equal(decoder.remove(slot), sampler.decode(prefix, [_request(1)])[0])


def test_graphs_need_cuda() -> None:
    with pytest.raises(InputError, match="graphs"):
        GraphDecoder(random_model(CONFIG), 1, graphs=True)


def test_buckets_are_powers_of_two_and_all_slots(sampler: Sampler) -> None:
    for num_slots, buckets in ((1, [1]), (2, [1, 2]), (8, [1, 2, 4, 8]), (10, [1, 2, 4, 8, 10])):
        with _decoder(sampler, num_slots) as decoder:
            assert decoder.buckets() == buckets


def test_warming_up_changes_no_tokens(sampler: Sampler, prefix: Prefix) -> None:
    with _decoder(sampler, 1) as decoder:
        assert list(decoder.warm_up()) == [1]
        slot = decoder.add(prefix, _request(0))
        while not decoder.step():
            pass
        assert torch.equal(decoder.remove(slot), sampler.decode(prefix, [_request(0)])[0])
