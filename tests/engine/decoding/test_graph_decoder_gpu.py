"""Captured steps on a GPU: equal to the same program launch by launch, and nothing waits for the device."""

import pytest
import torch
from torch import Tensor

from engine.decoding.cuda.graph_decoder import GraphDecoder
from engine.decoding.kv_cache import Prefix
from engine.decoding.sampler import Sampler, evaluating
from engine.decoding.slot_decoder import SlotDecoder
from engine.sampling_params import SequenceRequest
from tests.engine.decoding.cases import NULL, TEXT, random_model
from tests.engine.decoding.test_graph_decoder import CONFIG, HAS_CUDA, MIXED, _decoder

# The published widths, so that products are split and tiled as they are there; two layers.
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
    return Sampler(random_model(WIDE).to(device, dtype), null_text_tokens=NULL.to(device))


def _wide_requests(count: int) -> list[SequenceRequest]:
    return [SequenceRequest(i % 3, MIXED[i % 5].updated(seed=i // 4), candidate=i % 4) for i in range(count)]


def _generate_all(decoder: GraphDecoder, prefix: Prefix, requests: list[SequenceRequest]) -> Tensor:
    slots = [decoder.add(prefix, request) for request in requests]
    for _ in range(WIDE.image_seq_len):
        decoder.step()
    return torch.stack([decoder.remove(slot) for slot in slots])


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_a_gpu_graphed_equals_eager(dtype: torch.dtype) -> None:
    sampler, requests = _wide_sampler(dtype), _wide_requests(12)
    prefix = sampler.prefill(TEXT)
    generated = []
    for graphs in (True, False, True):
        with _decoder(sampler, 20, graphs=graphs) as decoder:
            tokens = _generate_all(decoder, prefix, requests)
            assert torch.equal(_generate_all(decoder, prefix, requests), tokens)  # captured by then
            generated.append((tokens, decoder._program.hidden.clone()))
    for tokens, hidden in generated[1:]:
        assert torch.equal(tokens, generated[0][0])
        assert torch.equal(hidden, generated[0][1])


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_a_gpu_a_sequence_is_the_same_in_every_bucket(dtype: torch.dtype) -> None:
    sampler, requests = _wide_sampler(dtype), _wide_requests(180)  # 252 slots
    prefix = sampler.prefill(TEXT)
    with _decoder(sampler, 256) as decoder:
        whole = _generate_all(decoder, prefix, requests)
        for count in (1, 2, 3, 6, 11, 23, 45, 91):
            assert torch.equal(_generate_all(decoder, prefix, requests[-count:]), whole[-count:]), count
        for number in range(0, 180, 30):
            assert torch.equal(_generate_all(decoder, prefix, [requests[number]])[0], whole[number]), number


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device")
def test_on_a_gpu_nothing_waits_for_the_device() -> None:
    """Sequences added, stepped and removed, init tokens from the host included; torch raises where it would synchronise."""
    sampler, requests = _wide_sampler(torch.bfloat16), _wide_requests(8)
    prefix = sampler.prefill(TEXT)
    init = torch.full((WIDE.image_seq_len,), -1)
    init[:5] = 3
    with _decoder(sampler, 16) as decoder:
        decoder.warm_up()
        expected = _generate_all(decoder, prefix, requests)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            extra = decoder.add(prefix, requests[0], init_tokens=init)
            for _ in range(3):
                decoder.step()
            decoder.remove(extra)
            tokens = _generate_all(decoder, prefix, requests)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(tokens, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_a_gpu_error_is_at_most_twice_that_of_pytorch(dtype: torch.dtype) -> None:
    """The same init tokens through float32 on the CPU, through PyTorch in 16 bit, and through the graphs."""
    init = torch.arange(WIDE.image_seq_len) * 199 % WIDE.image_vocab_size
    requests, hidden = _wide_requests(3), {}
    for name, sampler in {
        "exact": _wide_sampler(torch.float32, "cpu"),
        "plain": _wide_sampler(dtype),
        "ours": _wide_sampler(dtype),
    }.items():
        prefix, null_prefix = sampler.prefill(TEXT), sampler.null_prefix()
        with evaluating(sampler.model):
            kind = GraphDecoder if name == "ours" else SlotDecoder
            decoder = kind(sampler.model, 4, null_prefix=null_prefix)
            for request in requests:
                decoder.add(prefix, request, init_tokens=init)
            for _ in range(WIDE.image_seq_len - 1):
                decoder.step()
            last = decoder._program.hidden if isinstance(decoder, GraphDecoder) else decoder._steps.hidden[:4]
            hidden[name] = last.float().cpu()
    error = (hidden["ours"] - hidden["exact"]).abs().max()
    assert error <= 2 * (hidden["plain"] - hidden["exact"]).abs().max()
