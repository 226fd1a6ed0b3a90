"""Tokens do not depend on torch's global state: default dtype, autocast, inference mode, the calling thread."""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from engine.decoding.cpu.packed_weights import Weights, can_pack
from engine.decoding.sampler import Sampler
from engine.models.transformer import KoDalle
from engine.sampling_params import SamplingParams, SequenceRequest
from kernels import reference
from tests.engine.decoding.cases import CONFIG, NULL, TEXT, random_model

CPU = torch.device("cpu")
MIXED = [
    SamplingParams(seed=1),
    SamplingParams(seed=2, guidance_scale=3.0),
    SamplingParams(seed=2, temperature=0.7, top_k=10, top_p=0.9),
    SamplingParams(temperature=0),
]
REQUESTS = [SequenceRequest(number % 3, MIXED[number % 4], candidate=number // 4) for number in range(8)]
WEIGHTS: list[Weights] = ["plain", "packed"] if can_pack(torch.float32, CPU) else ["plain"]


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


STATES: dict[str, Callable[[], contextlib.AbstractContextManager[object]]] = {
    "default float16": lambda: _default_dtype(torch.float16),
    "default bfloat16": lambda: _default_dtype(torch.bfloat16),
    "default float64": lambda: _default_dtype(torch.float64),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference mode": torch.inference_mode,
    "gradients": torch.enable_grad,
}


def _generate(weights: Weights) -> tuple[Tensor, Tensor]:
    """Tokens of a batch, in single steps, and of one guided sequence, in Jacobi windows; everything made anew."""
    sampler = Sampler(_model(), null_text_tokens=NULL, weights=weights)
    return sampler.generate(TEXT, REQUESTS), sampler.generate(TEXT, REQUESTS[1:2])


@functools.cache
def _model() -> KoDalle:
    return random_model().eval()


@functools.cache
def _expected(weights: Weights) -> tuple[Tensor, Tensor]:
    batch, alone = _generate(weights)
    assert len(set(map(tuple, batch.tolist()))) > 4
    return batch, alone


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("state", STATES)
def test_tokens_are_the_same_under_any_state(state: str, weights: Weights) -> None:
    expected = _expected(weights)
    with STATES[state]():
        batch, alone = _generate(weights)
    assert torch.equal(batch, expected[0])
    assert torch.equal(alone, expected[1])


@pytest.mark.parametrize("weights", WEIGHTS)
def test_tokens_are_the_same_from_several_threads(weights: Weights) -> None:
    """One sampler for all of them; each thread has torch's own defaults for gradients and autocast."""
    expected = _expected(weights)[0]
    sampler = Sampler(_model(), null_text_tokens=NULL, weights=weights)
    generated: dict[int, Tensor] = {}

    def run(number: int) -> None:
        generated[number] = sampler.generate(TEXT, REQUESTS)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(generated) == 3
    assert all(torch.equal(tokens, expected) for tokens in generated.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_noise_is_float32_whatever_the_default(dtype: torch.dtype) -> None:
    numbers = torch.arange(5)
    expected = reference.gumbel_noise(numbers, numbers, numbers, CONFIG.image_vocab_size)
    with _default_dtype(dtype):
        noise = reference.gumbel_noise(numbers, numbers, numbers, CONFIG.image_vocab_size)
    assert noise.dtype == torch.float32
    assert torch.equal(noise, expected)
