"""Sequences that move between windows and single steps: the tokens of single steps, whatever else comes and goes."""

import random

import pytest
import torch
from torch import Tensor

from engine.config.transformer import TransformerConfig
from engine.decoding.decoder import Decoder
from engine.decoding.decoders import DecoderCache
from engine.decoding.kv_cache import Prefix
from engine.decoding.sampler import Sampler
from engine.decoding.slot_decoder import SingleTokenSteps, SlotDecoder
from engine.decoding.speculative.adaptive import AdaptiveDecoder
from engine.decoding.speculative.jacobi import JacobiDecoder
from engine.models.transformer import KoDalle
from tests.engine.decoding.cases import NULL, TEXT
from tests.engine.decoding.test_jacobi import MODES, NUMBERS, SIZES, by_single_steps, init_tokens, request, small_model


class _Load:
    """Adds sequences at random steps and removes some unfinished."""

    def __init__(self, decoder: Decoder, prefix: Prefix, *, seed: int, num_tokens: int) -> None:
        self._decoder, self._prefix, self._num_tokens = decoder, prefix, num_tokens
        self._random = random.Random(seed)
        self._running: dict[int, int] = {}  # slot -> number of the request
        self.generated: dict[int, Tensor] = {}
        self.abandoned: dict[int, Tensor] = {}
        self.num_steps = 0

    def run(self, numbers: list[int], *, arrival: float = 0.15, abandonment: float = 0.02) -> None:
        waiting = list(numbers)
        while waiting or self._running:
            if waiting and (not self._running or self._random.random() < arrival):
                self._add(waiting)
            if self._running and self._random.random() < abandonment:
                slot = self._random.choice(list(self._running))
                number = self._running.pop(slot)
                self.abandoned[number] = self._decoder.remove(slot)
                waiting.append(number)  # from its start, later
                continue
            self.num_steps += 1
            for slot in self._decoder.step():
                self.generated[self._running.pop(slot)] = self._decoder.remove(slot)

    def _add(self, waiting: list[int]) -> None:
        one = request(waiting[0])
        if self._decoder.num_free < 1 + one.sampling_params.is_guided:
            return
        number = waiting.pop(0)
        init = init_tokens(number, self._num_tokens)
        self._running[self._decoder.add(self._prefix, one, init_tokens=init)] = number


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("grid_size", SIZES)
@pytest.mark.parametrize("seed", range(2))
def test_sequences_that_come_and_go_get_the_tokens_of_single_steps(seed: int, grid_size: int, mode: str) -> None:
    step_model, prefix, null, expected, _ = by_single_steps(grid_size, mode)
    with torch.inference_mode():
        decoder = AdaptiveDecoder(step_model, 6, window=8, speculative_slots=2, null_prefix=null)
        load = _Load(decoder, prefix, seed=seed, num_tokens=grid_size**2)
        load.run(NUMBERS)
    for number in NUMBERS:
        assert torch.equal(load.generated[number], expected[number]), number
    for number, tokens in load.abandoned.items():
        assert torch.equal(tokens, expected[number][: len(tokens)]), number
    assert decoder.num_moves["in"] >= 4
    assert decoder.num_moves["back"] >= 2
    assert decoder.num_sequences == 0
    assert decoder.num_free == 6


def test_without_the_last_token_fed_tokens_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the test above: moved back with what the window left."""
    step_model, prefix, null, expected, _ = by_single_steps(SIZES[0], "plain")
    monkeypatch.setattr(SingleTokenSteps, "feed_last_tokens", lambda *_: None)
    with torch.inference_mode():
        decoder = AdaptiveDecoder(step_model, 6, window=8, speculative_slots=2, null_prefix=null)
        load = _Load(decoder, prefix, seed=0, num_tokens=SIZES[0] ** 2)
        load.run(NUMBERS)
    assert any(not torch.equal(load.generated[number], expected[number]) for number in NUMBERS)


def test_a_sequence_alone_takes_as_few_passes_as_in_windows() -> None:
    step_model, prefix, null, expected, _ = by_single_steps(SIZES[1], "plain")

    def passes(decoder: Decoder) -> int:
        load = _Load(decoder, prefix, seed=0, num_tokens=SIZES[1] ** 2)
        load.run([0, 1], arrival=0, abandonment=0)
        assert torch.equal(load.generated[1], expected[1])
        return load.num_steps

    with torch.inference_mode():
        adaptive = passes(AdaptiveDecoder(step_model, 6, window=8, speculative_slots=2, null_prefix=null))
        windows = passes(JacobiDecoder(step_model, 2, window=8, null_prefix=null))
        single = passes(SlotDecoder(step_model, 6, null_prefix=null))
    assert adaptive == windows < single


def test_next_logits_are_those_of_single_steps() -> None:
    step_model, prefix, null, _, _ = by_single_steps(SIZES[0], "plain")
    with torch.inference_mode():
        adaptive = AdaptiveDecoder(step_model, 4, window=8, speculative_slots=2, null_prefix=null)
        single = SlotDecoder(step_model, 4, null_prefix=null)
        here, there = adaptive.add(prefix, request(0)), single.add(prefix, request(0))
        for _ in range(3):
            adaptive.step()
        while single.num_tokens(there) < adaptive.num_tokens(here):
            single.step()
        assert torch.equal(adaptive.next_logits(), single.next_logits())
        while adaptive.num_tokens(here) < 49:
            adaptive.step()
        while single.num_tokens(there) < 49:
            single.step()
        assert torch.equal(adaptive.remove(here), single.remove(there))


@pytest.mark.slow
def test_a_cache_of_several_splits_moves_whole() -> None:
    """169 tokens, and a sequence that moves late."""
    torch.manual_seed(0)
    config = TransformerConfig(
        dim=32, num_layers=2, num_heads=2, head_dim=16, text_vocab_size=30, text_seq_len=8, text_position_rows=12,
        image_vocab_size=64, image_grid_size=13, ff_mult=2,
    )  # fmt: skip
    model = KoDalle(config).eval()
    prefix, null = Sampler(model).prefill(TEXT), Sampler(model).prefill(NULL[None])
    with torch.inference_mode():
        expected = {}
        for number in (1, 2, 3, 4):
            single = SlotDecoder(model, 2, null_prefix=null)
            slot = single.add(prefix, request(number))
            while not single.step():
                pass
            expected[number] = single.remove(slot)
        decoder = AdaptiveDecoder(model, 6, window=8, speculative_slots=2, null_prefix=null)
        running = {decoder.add(prefix, request(1)): 1}
        while decoder.num_tokens(0) < 100:
            decoder.step()
        running |= {decoder.add(prefix, request(number)): number for number in (2, 3, 4)}
        generated = {}
        while running:
            for slot in decoder.step():
                generated[running.pop(slot)] = decoder.remove(slot)
    for number, tokens in expected.items():
        assert torch.equal(generated[number], tokens), number


def test_continuous_batching_gets_the_adaptive_decoder_and_one_batch_does_not() -> None:
    model = small_model(7)
    with DecoderCache(model).borrow(8, null_prefix=None, continuous_batching=True) as decoder:
        assert isinstance(decoder, AdaptiveDecoder)
    with DecoderCache(model).borrow(8, null_prefix=None) as decoder:
        assert isinstance(decoder, SlotDecoder)
    with DecoderCache(model, speculative=False).borrow(8, null_prefix=None, continuous_batching=True) as decoder:
        assert isinstance(decoder, SlotDecoder)
