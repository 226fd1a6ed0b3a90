"""Fixed-noise Jacobi decoding: the tokens of one at a time, in fewer passes."""

import functools

import pytest
import torch
from torch import Tensor

from engine.config import TransformerConfig
from engine.decoding.cpu.packed_weights import can_pack, make_step_model
from engine.decoding.kv_cache import Caption, KVCache, Prefix
from engine.decoding.sampler import Sampler, evaluating
from engine.decoding.slot_decoder import SlotDecoder
from engine.decoding.speculative.jacobi import JacobiDecoder
from engine.decoding.speculative.window_cache import WindowCache
from engine.decoding.step_model import StepModel, plain_step_model
from engine.models.transformer import KoDalle
from engine.sampling_params import SamplingParams, SequenceRequest

CPU = torch.device("cpu")
# 49 tokens and 81: the cache has no room to spare behind the last position, and more than one split.
SIZES = (7, 9)
NULL = torch.tensor([0, 2, 1, 1, 1, 1, 1, 1])
TEXT = torch.tensor([[0, 5, 6, 7, 2, 1, 1, 1], [0, 9, 2, 1, 1, 1, 1, 1], [0, 29, 28, 27, 26, 25, 24, 2]])
MIXED = [
    SamplingParams(),
    SamplingParams(temperature=0.7, top_k=10),
    SamplingParams(guidance_scale=3.0),
    SamplingParams(temperature=0),
    SamplingParams(top_p=0.8, guidance_scale=0.5),
]
NUMBERS = list(range(10))
MODES = ["plain", pytest.param("packed", marks=pytest.mark.skipif(not can_pack(torch.float32, CPU), reason="x86 only"))]


def _model(grid_size: int) -> KoDalle:
    torch.manual_seed(0)
    model = KoDalle(
        TransformerConfig(
            dim=64, num_layers=2, num_heads=2, head_dim=32, text_vocab_size=30, text_seq_len=8, text_position_rows=12,
            image_vocab_size=64, image_grid_size=grid_size, ff_mult=2,
        )
    )  # fmt: skip
    with torch.no_grad():  # a fresh model's tokens depend on hardly anything but their neighbour and the noise
        for name, parameter in model.named_parameters():
            if name.endswith("scale"):
                parameter.fill_(1.0)
            elif name.endswith(("qkv.weight", "attention.out.weight", "head.weight")):
                parameter *= 3
    return model.eval()


def _row(number: int) -> SequenceRequest:
    return SequenceRequest(number % 3, MIXED[number % len(MIXED)].updated(seed=number // 5), candidate=number % 5)


def _given(number: int, N: int) -> Tensor | None:
    """Every third row has about half of its tokens given, anywhere."""
    if number % 3:
        return None
    generator = torch.Generator().manual_seed(number)
    drawn = torch.rand(N, generator=generator) < 0.5
    return torch.where(drawn, -1, torch.randint(0, 64, (N,), generator=generator))


def _draw_together(decoder: SlotDecoder, prefix: Prefix, numbers: list[int]) -> tuple[dict[int, Tensor], int]:
    """Rows join as soon as slots are free; returns their tokens and the number of steps."""
    N = decoder.model.config.image_seq_len
    waiting, seated, drawn, steps = list(numbers), {}, {}, 0
    while waiting or seated:
        while waiting and decoder.num_free >= 1 + _row(waiting[0]).sampling_params.is_guided:
            number = waiting.pop(0)
            seated[decoder.join(prefix, _row(number), given=_given(number, N))] = number
        steps += 1
        for slot in decoder.step():
            drawn[seated.pop(slot)] = decoder.leave(slot)
    return drawn, steps


@functools.cache
def _drawn_one_by_one(grid_size: int, mode: str) -> tuple[StepModel, Prefix, Prefix, dict[int, Tensor], int]:
    """The step model, captions, empty caption, and `SlotDecoder`'s tokens and steps."""
    model = _model(grid_size)
    prefix, null = Sampler(model).prefill(TEXT), Sampler(model).prefill(NULL[None])
    step_model = plain_step_model(model) if mode == "plain" else make_step_model(model, "packed")
    with torch.inference_mode():
        return step_model, prefix, null, *_draw_together(SlotDecoder(step_model, 5, null_prefix=null), prefix, NUMBERS)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("grid_size", SIZES)
@pytest.mark.parametrize("window", [2, 16])
def test_tokens_are_those_of_one_at_a_time(window: int, grid_size: int, mode: str) -> None:
    step_model, prefix, null, expected, steps = _drawn_one_by_one(grid_size, mode)
    with torch.inference_mode():
        decoder = JacobiDecoder(step_model, 5, window=window, null_prefix=null)
        drawn, passes = _draw_together(decoder, prefix, NUMBERS)
    for number in NUMBERS:
        assert torch.equal(drawn[number], expected[number]), number
    assert passes < steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [3, 16])
def test_a_windows_positions_have_the_bits_of_single_ones(window: int, dtype: torch.dtype) -> None:
    """The same queries, keys and values through both caches, rows at different lengths, wrong guesses overwritten."""
    L, R, P, H, D, N = 2, 3, 9, 2, 16, 72
    torch.manual_seed(0)
    prefix = Prefix(*torch.randn(2, L, 3, P, H, D, dtype=dtype), torch.zeros(3, H * D, dtype=dtype))
    captions = {0: Caption(prefix, 0), 1: Caption(prefix, 2), 2: Caption(prefix, 0)}
    single = KVCache(R, N, (L, P, H, D), dtype=dtype, device=CPU)
    windows = WindowCache(R, N, (L, P, H, D), window=window, dtype=dtype, device=CPU)
    single.seat(captions)
    windows.seat(captions)
    qkv = torch.randn(R, N + window, 3, H, D, dtype=dtype)
    expected = torch.empty(R, N, H, D, dtype=dtype)
    for position in range(N):
        single.begin_step(torch.full((R,), position), position)
        expected[:, position] = single.append_and_attend(1, qkv[:, position])
    lengths = torch.zeros(R, dtype=torch.int64)
    accepted = torch.tensor([1, max(window // 2, 1), window])  # the second row works half of its positions twice
    while (lengths < N).any():
        at = lengths[:, None] + torch.arange(window)  # (R, w)
        windows.begin_step(lengths, int(lengths.max()))
        wrong = torch.randn_like(qkv[:, :window])  # what is not accepted is rubbish, to be overwritten by the next pass
        is_right = (torch.arange(window) < accepted[:, None])[:, :, None, None, None]
        fed = torch.where(
            is_right, qkv.gather(1, at.clamp(max=N)[:, :, None, None, None].expand(-1, -1, 3, H, D)), wrong
        )
        attended = windows.append_and_attend(1, fed)
        for row in range(R):
            for offset in range(int(accepted[row])):
                if at[row, offset] < N:
                    assert torch.equal(attended[row, offset], expected[row, at[row, offset]]), (row, at[row, offset])
        lengths = torch.where(lengths < N, lengths + accepted, lengths).clamp(max=N)


def test_given_tokens_are_guessed_right_so_that_a_whole_picture_takes_few_passes() -> None:
    model = _model(9)
    given = torch.randint(0, 64, (81,), generator=torch.Generator().manual_seed(0))
    with evaluating(model):
        decoder = JacobiDecoder(model, 1, window=16)
        slot = decoder.join(Sampler(model).prefill(TEXT), SequenceRequest(0, SamplingParams(seed=7)), given=given)
        counts = [1]
        while not decoder.step():
            counts.append(len(decoder.tokens(slot)))
        assert torch.equal(decoder.leave(slot), given)
    assert counts == [1, 17, 33, 49, 65]  # the first token costs no pass, each pass 16 more


def test_a_model_that_hardly_reads_the_picture_takes_few_passes() -> None:
    """Fresh weights: the noise decides, and it is the same noise in every pass."""
    torch.manual_seed(0)
    model = KoDalle(_model(9).config)
    with evaluating(model):
        decoder = JacobiDecoder(model, 1, window=16)
        decoder.join(Sampler(model).prefill(TEXT), SequenceRequest(0, SamplingParams(seed=7)))
        passes = 1
        while not decoder.step():
            passes += 1
    assert passes < 20
