"""Which decoder is lent, and what of it stays between drawings. No step is taken here: no kernel runs."""

import pytest
import torch

from engine.config import TransformerConfig
from engine.decoding import decoders
from engine.decoding.cuda.graph_decoder import GraphDecoder
from engine.decoding.decoders import DecoderCache, can_graph
from engine.decoding.kv_cache import Prefix
from engine.decoding.sampler import Sampler, evaluating
from engine.decoding.slot_decoder import SlotDecoder
from engine.errors import InputError
from engine.models.transformer import KoDalle
from engine.sampling_params import SamplingParams, SequenceRequest

HAS_CUDA = torch.cuda.is_available()
CONFIG = TransformerConfig(
    dim=16,
    num_layers=1,
    num_heads=1,
    head_dim=16,
    ff_mult=1,
    text_vocab_size=30,
    text_seq_len=4,
    text_position_rows=8,
    image_vocab_size=64,
    image_grid_size=2,
)
ROW = SequenceRequest(0, SamplingParams(seed=1))
GUIDED_ROW = SequenceRequest(0, SamplingParams(guidance_scale=3.0, seed=1))


@pytest.fixture(scope="module")
def model() -> KoDalle:
    torch.manual_seed(0)
    return KoDalle(CONFIG).to("cuda" if HAS_CUDA else "cpu")


@pytest.fixture(scope="module")
def sampler(model: KoDalle) -> Sampler:
    return Sampler(model, null_text_tokens=torch.tensor([0, 2, 1, 1]))


@pytest.fixture(scope="module")
def prefix(sampler: Sampler) -> Prefix:
    return sampler.prefill(torch.tensor([[0, 5, 6, 2]]))


def _fail_within(keeper: DecoderCache, prefix: Prefix) -> None:
    with keeper.lend(4, null_prefix=None) as decoder:
        decoder.join(prefix, ROW)
        decoder.join(prefix, SequenceRequest(9, SamplingParams(seed=1)))


def test_a_kept_decoder_is_lent_again_grows_and_is_left_empty(sampler: Sampler, prefix: Prefix) -> None:
    """Graphed even without CUDA: the decoder is the same, its steps run launch by launch."""
    keeper = DecoderCache(sampler.model, graphed=True)
    with evaluating(sampler.model):
        with keeper.lend(3, null_prefix=None) as first:
            first.join(prefix, ROW)
            with keeper.lend(1, null_prefix=None) as nested:
                assert nested is not first
        assert first.num_joined == 0
        assert first.num_free == 4
        with pytest.raises(InputError, match="prefix_index"):
            _fail_within(keeper, prefix)
        assert first.num_joined == 0
        with keeper.lend(4, null_prefix=None) as again:
            assert again is first
        with keeper.lend(2, null_prefix=sampler.null_prefix()) as guiding:
            assert guiding is not first
            guiding.join(prefix, GUIDED_ROW)
        with keeper.lend(5, null_prefix=None) as grown:
            assert grown.num_free == 8
            grown.join(prefix, GUIDED_ROW)


def test_graphs_are_for_cuda_with_triton(
    model: KoDalle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with evaluating(model), DecoderCache(model).lend(1, null_prefix=None) as decoder:
        assert isinstance(decoder, GraphDecoder if HAS_CUDA else SlotDecoder)
        assert decoder.num_free == 1
    assert not can_graph(torch.device("cpu"))
    assert can_graph(torch.device("cuda"))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(decoders.importlib.util, "find_spec", lambda _: None)
    assert not can_graph(torch.device("cuda"))
    assert "pip install triton" in capsys.readouterr().err


def test_without_graphs_each_drawing_gets_a_decoder_of_the_packed_model(sampler: Sampler) -> None:
    keeper = DecoderCache(sampler.model, step_model=sampler.step_model, graphed=False)
    with evaluating(sampler.model), keeper.lend(3, null_prefix=None) as one, keeper.lend(3, null_prefix=None) as other:
        assert one is not other
        for decoder in (one, other):
            assert isinstance(decoder, SlotDecoder)
            assert decoder.model is sampler.step_model()
            assert decoder.num_free == 3
