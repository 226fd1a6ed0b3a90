"""Fixed-noise Jacobi decoding: the tokens of single steps, in fewer passes."""

import functools

import pytest
import torch
from torch import Tensor

from engine.config.transformer import TransformerConfig
from engine.decoding.cpu.packed_weights import can_pack, make_step_model
from engine.decoding.decoder import Decoder
from engine.decoding.kv_cache import Prefix
from engine.decoding.sampler import Sampler, evaluating
from engine.decoding.slot_decoder import SlotDecoder
from engine.decoding.speculative.jacobi import JacobiDecoder
from engine.decoding.step_model import StepModel, plain_step_model
from engine.models.transformer import KoDalle
from engine.sampling_params import SamplingParams, SequenceRequest
from tests.engine.decoding.cases import NULL, TEXT, random_model

CPU = torch.device("cpu")
# 49 tokens and 81: the cache has no room to spare behind the last position, and more than one split.
SIZES = (7, 9)
MIXED = [
    SamplingParams(),
    SamplingParams(temperature=0.7, top_k=10),
    SamplingParams(guidance_scale=3.0),
    SamplingParams(temperature=0),
    SamplingParams(top_p=0.8, guidance_scale=0.5),
]
NUMBERS = list(range(10))
MODES = ["plain", pytest.param("packed", marks=pytest.mark.skipif(not can_pack(torch.float32, CPU), reason="x86 only"))]


def small_model(grid_size: int) -> KoDalle:
    return random_model(
        TransformerConfig(
            dim=64, num_layers=2, num_heads=2, head_dim=32, text_vocab_size=30, text_seq_len=8, text_position_rows=12,
            image_vocab_size=64, image_grid_size=grid_size, ff_mult=2,
        )
    ).eval()  # fmt: skip


def request(number: int) -> SequenceRequest:
    return SequenceRequest(number % 3, MIXED[number % len(MIXED)].updated(seed=number // 5), candidate=number % 5)


def init_tokens(number: int, N: int) -> Tensor | None:
    """Every third sequence has about half of its tokens given, anywhere."""
    if number % 3:
        return None
    generator = torch.Generator().manual_seed(number)
    is_sampled = torch.rand(N, generator=generator) < 0.5
    return torch.where(is_sampled, -1, torch.randint(0, 64, (N,), generator=generator))


def _generate_all(decoder: Decoder, prefix: Prefix, num_tokens: int) -> tuple[dict[int, Tensor], int]:
    """Sequences are added as soon as slots are free; returns their tokens and the number of steps."""
    waiting, running, generated, steps = list(NUMBERS), dict[int, int](), dict[int, Tensor](), 0
    while waiting or running:
        while waiting and decoder.num_free >= 1 + request(waiting[0]).sampling_params.is_guided:
            number = waiting.pop(0)
            running[decoder.add(prefix, request(number), init_tokens=init_tokens(number, num_tokens))] = number
        steps += 1
        for slot in decoder.step():
            generated[running.pop(slot)] = decoder.remove(slot)
    return generated, steps


@functools.cache
def by_single_steps(grid_size: int, mode: str) -> tuple[StepModel, Prefix, Prefix, dict[int, Tensor], int]:
    """The step model, the captions, the empty caption, and what `SlotDecoder` makes of `NUMBERS` in how many steps."""
    model = small_model(grid_size)
    prefix, null = Sampler(model).prefill(TEXT), Sampler(model).prefill(NULL[None])
    step_model = plain_step_model(model) if mode == "plain" else make_step_model(model, "packed")
    with torch.inference_mode():
        decoder = SlotDecoder(step_model, 5, null_prefix=null)
        return step_model, prefix, null, *_generate_all(decoder, prefix, grid_size**2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("grid_size", SIZES)
@pytest.mark.parametrize("window", [2, 16])
def test_tokens_are_those_of_single_steps(window: int, grid_size: int, mode: str) -> None:
    step_model, prefix, null, expected, steps = by_single_steps(grid_size, mode)
    with torch.inference_mode():
        decoder = JacobiDecoder(step_model, 5, window=window, null_prefix=null)
        generated, passes = _generate_all(decoder, prefix, grid_size**2)
    for number in NUMBERS:
        assert torch.equal(generated[number], expected[number]), number
    assert passes < steps


def test_init_tokens_are_right_guesses_so_that_a_whole_image_takes_few_passes() -> None:
    model = small_model(9)
    init = torch.randint(0, 64, (81,), generator=torch.Generator().manual_seed(0))
    with evaluating(model):
        decoder = JacobiDecoder(model, 1, window=16)
        slot = decoder.add(Sampler(model).prefill(TEXT), SequenceRequest(0, SamplingParams(seed=7)), init_tokens=init)
        counts = [1]
        while not decoder.step():
            counts.append(decoder.num_tokens(slot))
        assert torch.equal(decoder.remove(slot), init)
    assert counts == [1, 17, 33, 49, 65]  # the first token costs no pass, each pass 16 more


def test_a_model_that_hardly_depends_on_the_image_takes_few_passes() -> None:
    """Fresh weights: the noise decides, and it is the same noise in every pass."""
    torch.manual_seed(0)
    model = KoDalle(small_model(9).config)
    with evaluating(model):
        decoder = JacobiDecoder(model, 1, window=16)
        decoder.add(Sampler(model).prefill(TEXT), SequenceRequest(0, SamplingParams(seed=7)))
        passes = 1
        while not decoder.step():
            passes += 1
    assert passes < 20
