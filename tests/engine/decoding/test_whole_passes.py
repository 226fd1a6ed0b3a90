"""Models that read a sequence from its start: the tokens of a whole forward pass, alone as in a batch, and one line that says so."""

import functools
from typing import Any

import pytest
import torch

from engine.decoding.decoders import DecoderCache
from engine.decoding.sampler import Sampler, evaluating
from engine.decoding.whole_passes import WholePassDecoder, report_whole_passes
from engine.models.transformer import KoDalle
from engine.sampling_params import SamplingParams, SequenceRequest
from tests.engine.decoding.cases import CONFIG, NULL, TEXT, random_model
from tests.engine.decoding.test_sampler import uncached_tokens

SWITCHES: dict[str, dict[str, Any]] = {
    "token_shift": {"token_shift": True},
    "rotary": {"rotary": True},
    "patterns": {"attention_patterns": ("axial_row", "axial_col", "conv")},
    "all": {
        "token_shift": True, "rotary": True, "attention_patterns": ("full", "conv_symmetric"), "reversible": True,
        "sandwich_norm": True, "stable": True, "unique_padding": True,
    },
}  # fmt: skip
MIXED = [SamplingParams(), SamplingParams(guidance_scale=3.0), SamplingParams(temperature=0.7, top_k=10)]
REQUESTS = [SequenceRequest(i % 3, MIXED[i % 3].updated(seed=i), candidate=i) for i in range(4)]
each_switch = pytest.mark.parametrize("switch", SWITCHES)


@functools.cache
def model_with(switch: str) -> KoDalle:
    return random_model(CONFIG.model_copy(update=SWITCHES[switch])).eval()


@each_switch
def test_tokens_are_those_of_a_whole_pass(switch: str) -> None:
    sampler = Sampler(model_with(switch), null_text_tokens=NULL)
    together = sampler.generate(TEXT, REQUESTS)
    for request, tokens in zip(REQUESTS, together, strict=True):
        assert torch.equal(tokens, uncached_tokens(model_with(switch), request)), request


@each_switch
def test_the_switch_matters_to_the_tokens(switch: str) -> None:
    """Negative control: what the same weights make without it."""
    with_switch = model_with(switch)
    without = random_model(CONFIG).eval()
    known = {name: value for name, value in with_switch.state_dict().items() if name in without.state_dict()}
    known = {name: value for name, value in known.items() if value.shape == without.state_dict()[name].shape}
    without.load_state_dict(without.state_dict() | known)
    plain = Sampler(without, null_text_tokens=NULL).generate(TEXT, REQUESTS)
    assert not torch.equal(plain, Sampler(with_switch, null_text_tokens=NULL).generate(TEXT, REQUESTS))


def test_sequences_that_come_and_go_get_the_tokens_that_they_get_alone() -> None:
    model = model_with("all")
    sampler = Sampler(model, null_text_tokens=NULL)
    alone = torch.cat([sampler.generate(TEXT, [request]) for request in REQUESTS])
    prefix, null = sampler.prefill(TEXT), sampler.null_prefix()
    with evaluating(model):
        decoder = WholePassDecoder(model, 6, null_prefix=null)
        slots = [decoder.add(prefix, request) for request in REQUESTS[:2]]
        decoder.step()
        slots += [decoder.add(prefix, request) for request in REQUESTS[2:]]
        while any(decoder.num_tokens(slot) < CONFIG.image_seq_len for slot in slots):
            decoder.step()
        together = torch.stack([decoder.remove(slot) for slot in slots])
    assert torch.equal(together, alone)
    assert decoder.num_free == 6


def test_init_tokens_are_kept() -> None:
    init = torch.arange(5)[None] % 7
    tokens = Sampler(model_with("all")).generate(TEXT[:1], [SequenceRequest(0)], init_tokens=init)
    assert torch.equal(tokens[:, :5], init)


def test_one_line_says_that_decoding_is_slow(capsys: pytest.CaptureFixture[str]) -> None:
    report_whole_passes.cache_clear()
    DecoderCache(random_model(CONFIG))
    assert capsys.readouterr().err == ""
    for _ in range(2):
        DecoderCache(model_with("all"))
    expected = "decoding: whole passes without a cache, in the model's dtype, since it has token_shift, rotary, attention_patterns\n"
    assert capsys.readouterr().err == expected
