"""Steps before the first request: graphs captured, caches filled, and the scheduler told how long a step takes.

A worker that has never stepped with all slots taken knows nothing of how long that takes, and would promise the first
crowd too much. On a GPU a graph is captured for each power of two of rows, without and with the sampling filters: half a
second each, which no request should wait for.
"""

import time
from collections.abc import Callable

from torch import Tensor

from engine.decoding.decoders import Decoder
from engine.decoding.sampler import Sampler
from engine.sampling_params import SamplingParams, SequenceRequest

_STEPS = 3  # the first pays for what is made once; the others are counted
ObserveStep = Callable[[float, int], None]


def warm_up(sampler: Sampler, decoder: Decoder, *, null_text_tokens: Tensor, observe: ObserveStep) -> None:
    """Steps the empty decoder with 1, 2, 4 … and all rows; it is empty again afterwards.

    Args:
        null_text_tokens: (1, T), the empty caption.
        observe: called with (seconds, rows) of each step that counts.
    """
    prefix = sampler.prefill(null_text_tokens)
    room = decoder.num_free
    counts = sorted({1 << power for power in range(room.bit_length()) if 1 << power < room} | {room})
    is_cuda = sampler.model.head.weight.device.type == "cuda"
    kinds = [SamplingParams(), SamplingParams(top_k=2)] if is_cuda else [SamplingParams()]
    for params in kinds:
        for count in counts:
            slots = [decoder.add(prefix, SequenceRequest(0, params, candidate=row)) for row in range(count)]
            for number in range(_STEPS):
                begun = time.perf_counter()
                decoder.step()
                decoder.tokens(slots[0]).cpu()  # waits for a GPU
                if number:
                    observe(time.perf_counter() - begun, count)
            for slot in slots:
                decoder.remove(slot)
