"""Continuous batching: sequences that come and go at any step get the tokens that they get alone."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.config.transformer import TransformerConfig
from engine.decoding.cpu.packed_weights import Weights
from engine.decoding.sampler import Sampler, evaluating
from engine.decoding.slot_decoder import SlotDecoder
from engine.errors import InputError
from engine.models.transformer import KoDalle
from engine.sampling_params import SamplingParams, SequenceRequest
from tests.engine.decoding.cases import NULL, TEXT, random_model

CONFIG = TransformerConfig(
    dim=64,
    num_layers=2,
    num_heads=2,
    head_dim=32,
    text_vocab_size=30,
    text_seq_len=8,
    text_position_rows=12,
    image_vocab_size=64,
    image_grid_size=9,  # 81 tokens: more than one split of the cache
)
N = CONFIG.image_seq_len
MIXED = [
    SamplingParams(),
    SamplingParams(guidance_scale=3.0),
    SamplingParams(temperature=0.7, top_k=10),
    SamplingParams(top_p=0.8, guidance_scale=0.5),
]

_NUM_REQUESTS = 14


@pytest.fixture(scope="module")
def model() -> KoDalle:
    return random_model(CONFIG)


def _request(number: int) -> SequenceRequest:
    return SequenceRequest(number % 3, MIXED[number % 4].updated(seed=number // 5), candidate=number % 5)


def _init_tokens(number: int) -> Tensor | None:
    """Every third sequence has some of its tokens given, anywhere."""
    if number % 3:
        return None
    generator = np.random.default_rng(number)
    tokens = generator.integers(CONFIG.image_vocab_size, size=N)
    return torch.from_numpy(np.where(generator.random(N) < 0.3, tokens, -1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "weights"),
    [(torch.float32, None), (torch.bfloat16, None), (torch.float32, "plain"), (torch.float32, "int8")],
)
def test_sequences_that_come_and_go_get_the_tokens_that_they_get_alone(
    model: KoDalle, dtype: torch.dtype, weights: Weights | None
) -> None:
    model = copy.deepcopy(model).to(dtype)
    sampler = Sampler(model, null_text_tokens=NULL, weights=weights)
    prefix = sampler.prefill(TEXT)
    generator = np.random.default_rng(7)
    waiting, generated, abandoned = list(range(_NUM_REQUESTS)), dict[int, Tensor](), 0
    with evaluating(model):
        decoder = SlotDecoder(sampler.step_model(), 10, null_prefix=sampler.null_prefix())
        slots: dict[int, int] = {}
        while waiting or slots:
            while waiting and decoder.num_free >= 2 and generator.random() < 0.3:
                number = waiting.pop(0)
                slots[decoder.add(prefix, _request(number), init_tokens=_init_tokens(number))] = number
            if slots and generator.random() < 0.02:  # a user hangs up
                slot = int(generator.choice(list(slots)))
                assert len(decoder.remove(slot)) <= N
                del slots[slot]
                abandoned += 1
            for slot in decoder.step():
                generated[slots.pop(slot)] = decoder.remove(slot)
        assert decoder.num_free == 10
    assert abandoned
    assert len(generated) + abandoned == _NUM_REQUESTS
    for number, tokens in generated.items():
        init = _init_tokens(number)
        alone = sampler.decode(prefix, [_request(number)], init_tokens=None if init is None else init[None])[0]
        assert torch.equal(tokens, alone), number
        if init is not None:
            assert torch.equal(tokens[init >= 0], init[init >= 0])


def test_tokens_so_far_can_be_read(model: KoDalle) -> None:
    sampler = Sampler(model)
    prefix = sampler.prefill(TEXT)
    with evaluating(model):
        decoder = SlotDecoder(sampler.step_model(), 2)
        slot = decoder.add(prefix, SequenceRequest(0, SamplingParams(seed=1)))
        for count in range(5):
            assert len(decoder.tokens(slot)) == count
            decoder.step()
        so_far = decoder.remove(slot)
    assert torch.equal(so_far, sampler.generate(TEXT, [SequenceRequest(0, SamplingParams(seed=1))])[0, :5])


def test_what_does_not_fit_is_refused(model: KoDalle) -> None:
    sampler = Sampler(model, null_text_tokens=NULL)
    prefix = sampler.prefill(TEXT)
    guided = SequenceRequest(0, SamplingParams(guidance_scale=2.0, seed=1))
    with evaluating(model):
        decoder = SlotDecoder(model, 1, null_prefix=sampler.null_prefix())
        with pytest.raises(InputError, match="slots"):
            decoder.add(prefix, guided)
        assert decoder.step() == []
        decoder.add(prefix, SequenceRequest(0, SamplingParams(seed=1)))
        with pytest.raises(InputError, match="slots"):
            decoder.add(prefix, SequenceRequest(0, SamplingParams(seed=2)))
        with pytest.raises(InputError, match="guidance_scale"):
            SlotDecoder(model, 2).add(prefix, guided)
        with pytest.raises(InputError, match="prefix_index"):
            SlotDecoder(model, 2).add(prefix, SequenceRequest(3, SamplingParams(seed=1)))
