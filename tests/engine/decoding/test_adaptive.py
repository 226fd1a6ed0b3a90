"""Rows that move between windows and single steps: the tokens of single steps, whoever comes and goes meanwhile."""

import random

import pytest
import torch
from torch import Tensor

from engine.config import TransformerConfig
from engine.decoding.decoders import DecoderCache
from engine.decoding.kv_cache import Prefix
from engine.decoding.sampler import Sampler
from engine.decoding.slot_decoder import SlotDecoder
from engine.decoding.speculative.adaptive import AdaptiveDecoder
from engine.decoding.speculative.jacobi import JacobiDecoder
from engine.models.transformer import KoDalle
from tests.engine.decoding.test_jacobi import MODES, NULL, NUMBERS, SIZES, TEXT, _drawn_one_by_one, _given, _model, _row


class _Crowd:
    """Joins rows when it likes and leaves some unfinished."""

    def __init__(self, decoder: SlotDecoder, prefix: Prefix, *, seed: int) -> None:
        self._decoder, self._prefix = decoder, prefix
        self._chance = random.Random(seed)
        self._seated: dict[int, int] = {}
        self.drawn: dict[int, Tensor] = {}
        self.given_up: dict[int, Tensor] = {}
        self.num_steps = 0

    def draw(self, numbers: list[int]) -> None:
        waiting = list(numbers)
        while waiting or self._seated:
            if waiting and (not self._seated or self._chance.random() < 0.15):
                self._join(waiting)
            if self._seated and self._chance.random() < 0.02:
                slot = self._chance.choice(list(self._seated))
                number = self._seated.pop(slot)
                self.given_up[number] = self._decoder.leave(slot)
                waiting.append(number)  # from its start, later
                continue
            self.num_steps += 1
            for slot in self._decoder.step():
                self.drawn[self._seated.pop(slot)] = self._decoder.leave(slot)

    def _join(self, waiting: list[int]) -> None:
        row = _row(waiting[0])
        if self._decoder.num_free < 1 + row.sampling_params.is_guided:
            return
        number = waiting.pop(0)
        given = _given(number, self._decoder.model.config.image_seq_len)
        self._seated[self._decoder.join(self._prefix, row, given=given)] = number


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("grid_size", SIZES)
@pytest.mark.parametrize("seed", range(2))
def test_rows_that_come_and_go_get_the_tokens_of_single_steps(seed: int, grid_size: int, mode: str) -> None:
    step_model, prefix, null, expected, _ = _drawn_one_by_one(grid_size, mode)
    with torch.inference_mode():
        decoder = AdaptiveDecoder(step_model, 6, window=8, guessing_slots=2, null_prefix=null)
        crowd = _Crowd(decoder, prefix, seed=seed)
        crowd.draw(NUMBERS)
        moves = decoder.num_moves
    for number in NUMBERS:
        assert torch.equal(crowd.drawn[number], expected[number]), number
    for number, tokens in crowd.given_up.items():
        assert torch.equal(tokens, expected[number][: len(tokens)]), number
    assert moves["in"] >= 4
    assert moves["back"] >= 2
    assert decoder.num_joined == 0
    assert decoder.num_free == 6


def test_without_the_last_token_read_a_row_would_go_on_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the test above: moved back with what the window left, tokens differ."""
    step_model, prefix, null, expected, _ = _drawn_one_by_one(SIZES[0], "plain")
    monkeypatch.setattr(AdaptiveDecoder, "_read_last", lambda *_: None)
    with torch.inference_mode():
        crowd = _Crowd(AdaptiveDecoder(step_model, 6, window=8, guessing_slots=2, null_prefix=null), prefix, seed=0)
        crowd.draw(NUMBERS)
    assert any(not torch.equal(crowd.drawn[number], expected[number]) for number in NUMBERS)


def test_a_row_alone_takes_as_few_passes_as_in_windows() -> None:
    step_model, prefix, null, expected, _ = _drawn_one_by_one(SIZES[1], "plain")

    def passes(decoder: SlotDecoder) -> int:
        crowd = _Crowd(decoder, prefix, seed=0)
        crowd._chance.random = lambda: 1.0  # type: ignore[method-assign]
        crowd.draw([0, 1])
        assert torch.equal(crowd.drawn[1], expected[1])
        return crowd.num_steps

    with torch.inference_mode():
        adaptive = passes(AdaptiveDecoder(step_model, 6, window=8, guessing_slots=2, null_prefix=null))
        windows = passes(JacobiDecoder(step_model, 2, window=8, null_prefix=null))
        single = passes(SlotDecoder(step_model, 6, null_prefix=null))
    assert adaptive == windows < single


def test_what_comes_next_is_what_single_steps_would_draw_from() -> None:
    step_model, prefix, null, _, _ = _drawn_one_by_one(SIZES[0], "plain")
    with torch.inference_mode():
        adaptive = AdaptiveDecoder(step_model, 4, window=8, guessing_slots=2, null_prefix=null)
        single = SlotDecoder(step_model, 4, null_prefix=null)
        here, there = adaptive.join(prefix, _row(0)), single.join(prefix, _row(0))
        for _ in range(3):
            adaptive.step()
        while len(single.tokens(there)) < len(adaptive.tokens(here)):
            single.step()
        assert torch.equal(adaptive.next_logits(), single.next_logits())
        while len(adaptive.tokens(here)) < 49:
            adaptive.step()
        while len(single.tokens(there)) < 49:
            single.step()
        assert torch.equal(adaptive.leave(here), single.leave(there))


def test_the_published_depth_of_cache_moves_whole() -> None:
    """More splits than one, and a row that moves late in its drawing."""
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
            slot = single.join(prefix, _row(number))
            while not single.step():
                pass
            expected[number] = single.leave(slot)
        decoder = AdaptiveDecoder(model, 6, window=8, guessing_slots=2, null_prefix=null)
        seated = {decoder.join(prefix, _row(1)): 1}
        while len(decoder.tokens(0)) < 100:
            decoder.step()
        seated |= {decoder.join(prefix, _row(number)): number for number in (2, 3, 4)}
        drawn = {}
        while seated:
            for slot in decoder.step():
                drawn[seated.pop(slot)] = decoder.leave(slot)
    for number, tokens in expected.items():
        assert torch.equal(drawn[number], tokens), number


def test_a_server_is_lent_the_adaptive_one_and_a_batch_is_not() -> None:
    keeper = DecoderCache(_model(7))
    with keeper.lend(8, null_prefix=None, continuous_batching=True) as decoder:
        assert isinstance(decoder, AdaptiveDecoder)
    with keeper.lend(8, null_prefix=None) as decoder:
        assert type(decoder) is SlotDecoder
    with DecoderCache(_model(7), speculative=False).lend(8, null_prefix=None, continuous_batching=True) as decoder:
        assert type(decoder) is SlotDecoder
