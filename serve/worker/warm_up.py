"""Warm-up steps before the first request: capture graphs, fill caches, and measure step times for the scheduler.

A worker that has never stepped with all slots taken has no estimate of how long that takes, and would admit too many of
the first requests. On a GPU a graph is captured for each power of two of sequences, with and without sampling filters:
half a second each, which no request should wait for.
"""

import time
from collections.abc import Callable

from torch import Tensor

from engine.decoding.decoder import Decoder
from engine.decoding.sampler import Sampler
from engine.sampling_params import SamplingParams, SequenceRequest

_STEPS = 3  # the first includes one-time work; the others are measured
ObserveStep = Callable[[float, int], None]


def warm_up(sampler: Sampler, decoder: Decoder, *, text_tokens: Tensor, observe: ObserveStep) -> None:
    """Steps the empty decoder with 1, 2, 4 … and as many sequences as fit; it is empty again afterwards.

    Args:
        text_tokens: (1, T), any caption.
        observe: called with (seconds, slots) of each measured step.
    """
    prefix = sampler.prefill(text_tokens)
    num_free = decoder.num_free
    counts = sorted({1 << power for power in range(num_free.bit_length()) if 1 << power < num_free} | {num_free})
    is_cuda = sampler.model.head.weight.device.type == "cuda"
    variants = [SamplingParams(), SamplingParams(top_k=2)] if is_cuda else [SamplingParams()]
    for params in variants:
        for count in counts:
            slots = [decoder.add(prefix, SequenceRequest(0, params, candidate=number)) for number in range(count)]
            for step in range(_STEPS):
                started_s = time.perf_counter()
                decoder.step()
                decoder.tokens(slots[0]).cpu()  # waits for a GPU
                if step:
                    observe(time.perf_counter() - started_s, count)
            for slot in slots:
                decoder.remove(slot)
