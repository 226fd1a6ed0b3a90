"""Which decoder is borrowed, and which one is cached between generations. No step is taken here: no kernel runs."""

import pytest
import torch

from engine.decoding import decoders
from engine.decoding.cuda.graph_decoder import GraphDecoder
from engine.decoding.decoders import DecoderCache, can_graph
from engine.decoding.kv_cache import Prefix
from engine.decoding.sampler import Sampler, evaluating
from engine.decoding.slot_decoder import SlotDecoder
from engine.decoding.speculative.jacobi import JacobiDecoder
from engine.errors import InputError
from engine.models.transformer import KoDalle
from engine.sampling_params import SamplingParams, SequenceRequest
from tests.engine.decoding.cases import CONFIG, NULL, TEXT

HAS_CUDA = torch.cuda.is_available()
REQUEST = SequenceRequest(0, SamplingParams(seed=1))
GUIDED = SequenceRequest(0, SamplingParams(guidance_scale=3.0, seed=1))


@pytest.fixture(scope="module")
def model() -> KoDalle:
    torch.manual_seed(0)
    return KoDalle(CONFIG).to("cuda" if HAS_CUDA else "cpu")


@pytest.fixture(scope="module")
def sampler(model: KoDalle) -> Sampler:
    return Sampler(model, null_text_tokens=NULL)


@pytest.fixture(scope="module")
def prefix(sampler: Sampler) -> Prefix:
    return sampler.prefill(TEXT[:1])


def _fail_within(cache: DecoderCache, prefix: Prefix) -> None:
    with cache.borrow(4, null_prefix=None) as decoder:
        decoder.add(prefix, REQUEST)
        decoder.add(prefix, SequenceRequest(9, SamplingParams(seed=1)))


def test_a_graph_decoder_is_reused_grown_and_left_empty(sampler: Sampler, prefix: Prefix) -> None:
    """Graphed even without CUDA: the decoder is the same, its steps run launch by launch."""
    cache = DecoderCache(sampler.model, graphed=True)
    with evaluating(sampler.model):
        with cache.borrow(3, null_prefix=None) as first:
            first.add(prefix, REQUEST)
            with cache.borrow(1, null_prefix=None) as nested:
                assert nested is not first
        assert first.num_sequences == 0
        assert first.num_free == 4
        with pytest.raises(InputError, match="prefix_index"):
            _fail_within(cache, prefix)
        assert first.num_sequences == 0
        with cache.borrow(4, null_prefix=None) as again:
            assert again is first
        with cache.borrow(2, null_prefix=sampler.null_prefix()) as guiding:
            assert guiding is not first
            guiding.add(prefix, GUIDED)
        with cache.borrow(5, null_prefix=None) as grown:
            assert grown.num_free == 8
            grown.add(prefix, GUIDED)


def test_graphs_are_for_cuda_with_triton(
    model: KoDalle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with evaluating(model), DecoderCache(model).borrow(1, null_prefix=None) as decoder:
        assert isinstance(decoder, GraphDecoder if HAS_CUDA else JacobiDecoder)
        assert decoder.num_free == 1
    assert not can_graph(torch.device("cpu"))
    assert can_graph(torch.device("cuda"))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(decoders.importlib.util, "find_spec", lambda _: None)
    assert not can_graph(torch.device("cuda"))
    assert "pip install triton" in capsys.readouterr().err


def test_without_graphs_each_generation_gets_a_decoder_of_the_packed_model(sampler: Sampler) -> None:
    cache = DecoderCache(sampler.model, step_model=sampler.step_model, graphed=False)
    with (
        evaluating(sampler.model),
        cache.borrow(3, null_prefix=None) as one,
        cache.borrow(3, null_prefix=None) as other,
    ):
        assert one is not other
        for decoder in (one, other):
            assert isinstance(decoder, SlotDecoder)
            assert decoder.model is sampler.step_model()
            assert decoder.num_free == 3
