"""The GPU's decoder: the program of the CPU's, the same bits in any company, graphed == eager.

Without a GPU its kernels run in Triton's interpreter, 10 to 50 ms a program, so models and drawings here are tiny: a
step takes 0.3 s. On a GPU the same tests run compiled, as graphs.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.config import TransformerConfig
from engine.decoding.cuda.attention_choice import runnable
from engine.decoding.cuda.graph_decoder import GraphDecoder
from engine.decoding.kv_cache import Prefix
from engine.decoding.sampler import Sampler, evaluating
from engine.decoding.slot_decoder import SlotDecoder
from engine.errors import InputError
from engine.models.transformer import KoDalle
from engine.sampling_params import SamplingParams, SequenceRequest

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
NULL = torch.tensor([0, 2, 1, 1, 1, 1, 1, 1])
TEXT = torch.tensor([[0, 5, 6, 7, 2, 1, 1, 1], [0, 9, 2, 1, 1, 1, 1, 1], [0, 29, 28, 27, 26, 25, 24, 2]])
GUIDED = SamplingParams(guidance_scale=3.0)
# Filters are drawn by the slowest kernel to interpret: some 50 ms a row.
MIXED = [
    SamplingParams(),
    GUIDED,
    SamplingParams(temperature=0),
    SamplingParams(temperature=0.7),
    SamplingParams(guidance_scale=0.5, top_k=10, top_p=0.8),
]
_ROWS = 8
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


@pytest.fixture(scope="module")
def model(device: str) -> KoDalle:
    return _model().to(device)


@pytest.fixture(scope="module")
def sampler(model: KoDalle, device: str) -> Sampler:
    return Sampler(model, null_text_tokens=NULL.to(device))


@pytest.fixture(scope="module")
def prefix(sampler: Sampler) -> Prefix:
    return sampler.prefill(TEXT)


@contextmanager
def _decoder(sampler: Sampler, num_slots: int, **options: int | str) -> Iterator[GraphDecoder]:
    null_prefix = sampler.null_prefix()
    with evaluating(sampler.model):
        yield GraphDecoder(sampler.model, num_slots, null_prefix=null_prefix, **options)  # type: ignore[arg-type]


def _row(number: int) -> SequenceRequest:
    return SequenceRequest(number % 3, MIXED[number % 5].updated(seed=number // 5), candidate=number % 5)


def _given(number: int) -> Tensor | None:
    """Every third row has some of its tokens given, anywhere."""
    if number % 3:
        return None
    generator = np.random.default_rng(number)
    tokens = generator.integers(CONFIG.image_vocab_size, size=N)
    return torch.from_numpy(np.where(generator.random(N) < 0.3, tokens, -1))


def _hidden(decoder: GraphDecoder, slot: int) -> Tensor:
    return decoder._program.hidden[slot].clone()


def test_rows_that_come_and_go_draw_what_the_other_decoder_draws(sampler: Sampler, prefix: Prefix) -> None:
    generator = np.random.default_rng(8)  # arrivals that need every bucket, 1, 2, 4 and 5
    waiting, drawn, abandoned = list(range(_ROWS)), {}, 0
    slots: dict[int, int] = {}
    with _decoder(sampler, _SLOTS) as decoder:
        while waiting or slots:
            while waiting and decoder.num_free >= 2 and generator.random() < 0.5:
                number = waiting.pop(0)
                slots[decoder.join(prefix, _row(number), given=_given(number))] = number
            if slots and generator.random() < 0.04:  # somebody hangs up
                slot = int(generator.choice(list(slots)))
                assert len(decoder.leave(slot)) < N
                del slots[slot]
                abandoned += 1
            for slot in decoder.step():
                drawn[slots.pop(slot)] = decoder.leave(slot)
        assert decoder.num_free == _SLOTS
        assert decoder.num_joined == 0
    assert abandoned
    assert len(drawn) + abandoned == _ROWS
    for number, tokens in drawn.items():
        given = _given(number)
        with evaluating(sampler.model):
            other = SlotDecoder(sampler.model, 2, null_prefix=sampler.null_prefix())
            slot = other.join(prefix, _row(number), given=given)
            while not other.step():
                pass
            assert torch.equal(tokens, other.leave(slot)), number
        if given is not None:
            assert torch.equal(tokens.cpu()[given >= 0], given[given >= 0])


def test_a_row_has_the_same_bits_alone_and_in_any_company(sampler: Sampler, prefix: Prefix) -> None:
    """Another slot, another bucket, guided, filtering and given neighbours, some of whom leave."""
    watched, steps = [1, 3], 2
    alone = {}
    for number in watched:
        with _decoder(sampler, 2) as decoder:
            slot = decoder.join(prefix, _row(number), given=_given(number))
            alone[number] = []
            for _ in range(steps):
                decoder.step()
                alone[number].append((_hidden(decoder, slot), decoder.tokens(slot).clone()))
    with _decoder(sampler, 7) as decoder:
        first, second = (decoder.join(prefix, _row(number), given=_given(number)) for number in (4, 9))
        decoder.step()
        decoder.leave(first)
        slots = {number: decoder.join(prefix, _row(number), given=_given(number)) for number in watched}
        assert slots[1] == 0
        assert slots[3] > second
        for step in range(steps):
            decoder.step()
            for number, slot in slots.items():
                hidden, tokens = alone[number][step]
                assert torch.equal(_hidden(decoder, slot), hidden), (number, step)
                assert torch.equal(decoder.tokens(slot), tokens), (number, step)


def test_hidden_vectors_are_those_of_the_other_decoder(device: str) -> None:
    """Tokens given, so that both decoders read the same; a guided row's partner too. Two layers of two heads."""
    model = _model(CONFIG.model_copy(update={"num_layers": 2, "num_heads": 2, "head_dim": 8})).to(device)
    sampler = Sampler(model, null_text_tokens=NULL.to(device))
    prefix = sampler.prefill(TEXT)
    given = torch.arange(N) * 7 % CONFIG.image_vocab_size
    with _decoder(sampler, 3) as decoder:
        other = SlotDecoder(sampler.model, 3, null_prefix=sampler.null_prefix())
        for number in (0, 1):
            assert decoder.join(prefix, _row(number), given=given) == other.join(prefix, _row(number), given=given)
        for _ in range(N - 1):
            assert decoder.step() == other.step() == []
            torch.testing.assert_close(decoder._program.hidden, other._hidden[:3], rtol=1e-5, atol=1e-5)
        assert decoder.step() == other.step() == [0, 1]
        assert torch.equal(decoder.leave(1).cpu(), given)


def test_a_neighbours_filter_does_not_decide_how_a_rows_logits_are_rounded(device: str) -> None:
    """16-bit logits of a coarse head, where rounding makes ties, beside a row that filters and beside none."""
    model = _model().to(device, torch.bfloat16)
    with torch.no_grad():
        model.head.weight *= 4
    sampler = Sampler(model, null_text_tokens=NULL.to(device))
    prefix, drawn = sampler.prefill(TEXT), []
    likeliest, filtering = SamplingParams(temperature=0), SamplingParams(top_k=2)
    with _decoder(sampler, 12) as decoder:
        for _ in range(11):
            decoder.join(prefix, SequenceRequest(0, likeliest.updated(seed=1)))
        decoder.join(prefix, SequenceRequest(0, filtering.updated(seed=1)))
        decoder._program.hidden.copy_(torch.randn(12, CONFIG.dim))
        for filters in (False, True):
            decoder._look_around()  # back to the first position
            decoder._program.draw(12, filters=filters)
            drawn.append(decoder._program.tokens[:11, 0].clone())
        rounded = model.head.image_logits(model.head.norm(decoder._program.hidden[:11])).argmax(1)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], rounded)


def test_finished_rows_keep_their_tokens_while_others_go_on(sampler: Sampler, prefix: Prefix) -> None:
    with _decoder(sampler, 2) as decoder:
        assert decoder.step() == []
        early = decoder.join(prefix, _row(0))
        for count in range(2):
            assert len(decoder.tokens(early)) == count
            decoder.step()
        late = decoder.join(prefix, _row(3))
        for _ in range(2, N - 1):
            assert decoder.step() == []
        assert decoder.step() == [early]
        finished = decoder.tokens(early).clone()
        assert decoder.step() == []
        assert decoder.step() == [late]
        assert decoder.step() == []
        assert torch.equal(decoder.leave(early), finished)
        assert len(decoder.leave(late)) == N


def test_a_slot_forgets_who_had_it(sampler: Sampler, prefix: Prefix) -> None:
    """One slot: all tokens given, then a guided one's partner, then neither."""
    tokens = []
    for before in (False, True):
        with _decoder(sampler, 2) as decoder:
            if before:
                slot = decoder.join(prefix, _row(1), given=torch.zeros(N, dtype=torch.int64))
                decoder.step()
                decoder.leave(slot)
            slots = [decoder.join(prefix, _row(number)) for number in (0, 3)]
            for _ in range(2):
                decoder.step()
            tokens.append(torch.stack([decoder.leave(slot) for slot in slots]))
    assert torch.equal(tokens[0], tokens[1])


def test_one_token_pictures(device: str) -> None:
    model = _model(CONFIG.model_copy(update={"image_grid_size": 1})).to(device)
    sampler = Sampler(model, null_text_tokens=NULL.to(device))
    prefix = sampler.prefill(TEXT)
    with _decoder(sampler, 2) as decoder:
        slot = decoder.join(prefix, _row(1))
        assert decoder.step() == [slot]
        assert torch.equal(decoder.leave(slot), sampler.decode(prefix, [_row(1)])[0])


def test_what_does_not_fit_is_refused_and_changes_nothing(sampler: Sampler, prefix: Prefix) -> None:
    with _decoder(sampler, 2, num_captions=1) as decoder:
        with pytest.raises(InputError, match="prefix_index"):
            decoder.join(prefix, SequenceRequest(3, SamplingParams(seed=1)))
        first = decoder.join(prefix, SequenceRequest(0, SamplingParams(seed=1)))
        with pytest.raises(InputError, match="slots"):
            decoder.join(prefix, SequenceRequest(0, GUIDED.updated(seed=1)))
        with pytest.raises(InputError, match="captions"):
            decoder.join(prefix, SequenceRequest(1, SamplingParams(seed=1)))
        assert (decoder.num_joined, decoder.num_free) == (1, 1)
        with pytest.raises(InputError, match="warm_up"):
            decoder.warm_up()
        decoder.join(prefix, SequenceRequest(0, SamplingParams(seed=2)))  # shares the place
        with pytest.raises(InputError, match="slots"):
            decoder.join(prefix, SequenceRequest(0, SamplingParams(seed=3)))
        decoder.leave(first)
        decoder.clear()
        assert decoder.num_free == 2
        decoder.join(prefix, SequenceRequest(2, SamplingParams(seed=1)))
    with evaluating(sampler.model):
        with pytest.raises(InputError, match="guidance_scale"):
            GraphDecoder(sampler.model, 2).join(prefix, SequenceRequest(0, GUIDED.updated(seed=1)))
        with pytest.raises(InputError, match="slots"):
            GraphDecoder(sampler.model, 0)
        with pytest.raises(InputError, match="attention"):
            GraphDecoder(sampler.model, 1, attention="flash")


@pytest.mark.parametrize("attention", ["sdpa", "auto"])
def test_other_attentions_draw_the_same(sampler: Sampler, prefix: Prefix, attention: str) -> None:
    with _decoder(sampler, 2, attention=attention) as decoder:
        assert decoder.attention in runnable(sampler.model.head.weight.device)
        slot = decoder.join(prefix, _row(1))
        while not decoder.step():
            pass
        assert torch.equal(decoder.leave(slot), sampler.decode(prefix, [_row(1)])[0])


def test_graphs_need_cuda() -> None:
    with pytest.raises(InputError, match="graphs"):
        GraphDecoder(_model(), 1, graphs=True)


def test_buckets_are_powers_of_two_and_all_slots(sampler: Sampler) -> None:
    for num_slots, buckets in ((1, [1]), (2, [1, 2]), (8, [1, 2, 4, 8]), (10, [1, 2, 4, 8, 10])):
        with _decoder(sampler, num_slots) as decoder:
            assert decoder.buckets() == buckets


def test_warming_up_leaves_drawings_alone(sampler: Sampler, prefix: Prefix) -> None:
    with _decoder(sampler, 1) as decoder:
        assert list(decoder.warm_up()) == [1]
        slot = decoder.join(prefix, _row(0))
        while not decoder.step():
            pass
        assert torch.equal(decoder.leave(slot), sampler.decode(prefix, [_row(0)])[0])


# ----------------------------------------------------------------------------------------------------------- on a GPU

# The published widths, so that products are split and tiled as in earnest; two layers of it.
WIDE = CONFIG.model_copy(
    update={
        "dim": 1024,
        "num_layers": 2,
        "num_heads": 8,
        "head_dim": 64,
        "ff_mult": 4,
        "image_vocab_size": 16384,
        "image_grid_size": 9,
    }
)


def _wide_sampler(dtype: torch.dtype, device: str = "cuda") -> Sampler:
    return Sampler(_model(WIDE).to(device, dtype), null_text_tokens=NULL.to(device))


def _wide_rows(count: int) -> list[SequenceRequest]:
    return [SequenceRequest(i % 3, MIXED[i % 5].updated(seed=i // 4), candidate=i % 4) for i in range(count)]


def _draw_all(decoder: GraphDecoder, prefix: Prefix, rows: list[SequenceRequest]) -> Tensor:
    slots = [decoder.join(prefix, row) for row in rows]
    for _ in range(WIDE.image_seq_len):
        decoder.step()
    return torch.stack([decoder.leave(slot) for slot in slots])


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_a_gpu_graphed_equals_eager(dtype: torch.dtype) -> None:
    sampler, rows = _wide_sampler(dtype), _wide_rows(12)
    prefix = sampler.prefill(TEXT)
    drawn = []
    for graphs in (True, False, True):
        with _decoder(sampler, 20, graphs=graphs) as decoder:
            tokens = _draw_all(decoder, prefix, rows)
            assert torch.equal(_draw_all(decoder, prefix, rows), tokens)  # captured by then
            drawn.append((tokens, decoder._program.hidden.clone()))
    for tokens, hidden in drawn[1:]:
        assert torch.equal(tokens, drawn[0][0])
        assert torch.equal(hidden, drawn[0][1])


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_a_gpu_a_row_is_the_same_in_every_bucket(dtype: torch.dtype) -> None:
    sampler, rows = _wide_sampler(dtype), _wide_rows(180)  # 252 slots
    prefix = sampler.prefill(TEXT)
    with _decoder(sampler, 256) as decoder:
        whole = _draw_all(decoder, prefix, rows)
        for count in (1, 2, 3, 6, 11, 23, 45, 91):
            assert torch.equal(_draw_all(decoder, prefix, rows[-count:]), whole[-count:]), count
        for number in range(0, 180, 30):
            assert torch.equal(_draw_all(decoder, prefix, [rows[number]])[0], whole[number]), number


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device")
def test_on_a_gpu_nothing_waits_for_the_device() -> None:
    """Joins, steps and leaves, given tokens from the host included; torch raises where it would synchronise."""
    sampler, rows = _wide_sampler(torch.bfloat16), _wide_rows(8)
    prefix = sampler.prefill(TEXT)
    given = torch.full((WIDE.image_seq_len,), -1)
    given[:5] = 3
    with _decoder(sampler, 16) as decoder:
        decoder.warm_up()
        expected = _draw_all(decoder, prefix, rows)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            extra = decoder.join(prefix, rows[0], given=given)
            for _ in range(3):
                decoder.step()
            decoder.leave(extra)
            tokens = _draw_all(decoder, prefix, rows)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(tokens, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_a_gpu_error_is_at_most_twice_that_of_pytorch(dtype: torch.dtype) -> None:
    """The same given tokens through float32 on the CPU, through PyTorch in 16 bit, and through the graphs."""
    given = torch.arange(WIDE.image_seq_len) * 199 % WIDE.image_vocab_size
    rows, hidden = _wide_rows(3), {}
    for name, sampler in {
        "exact": _wide_sampler(torch.float32, "cpu"),
        "plain": _wide_sampler(dtype),
        "ours": _wide_sampler(dtype),
    }.items():
        prefix, null_prefix = sampler.prefill(TEXT), sampler.null_prefix()
        with evaluating(sampler.model):
            kind = GraphDecoder if name == "ours" else SlotDecoder
            decoder = kind(sampler.model, 4, null_prefix=null_prefix)
            for row in rows:
                decoder.join(prefix, row, given=given)
            for _ in range(WIDE.image_seq_len - 1):
                decoder.step()
            last = decoder._program.hidden if isinstance(decoder, GraphDecoder) else decoder._hidden[:4]
            hidden[name] = last.float().cpu()
    error = (hidden["ours"] - hidden["exact"]).abs().max()
    assert error <= 2 * (hidden["plain"] - hidden["exact"]).abs().max()
