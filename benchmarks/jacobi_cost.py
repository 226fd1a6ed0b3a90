"""What a pass over a window of tokens costs beside a step of one token, at the published sizes (random weights).

    python benchmarks/jacobi_cost.py [--out benchmarks/results/jacobi/cost.json]

The cost of a pass does not depend on the values of the weights. How many passes an image takes does, so that is counted
elsewhere, on trained models (benchmarks/jacobi_acceptance.py).

Timed are whole passes of `JacobiDecoder` and whole steps of `SlotDecoder`, attention and sampling included.

All tokens are init tokens, so that every guess is right and an image passes through all lengths in few passes; tokens
are sampled all the same. Decoders are timed in turns, since the machine's speed may change: the least time of each decoder and
length counts, and `pass_ms` is its mean over lengths. On a shared machine only the ratios mean something.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from machine_facts import print_document
from sampling.plan import published_sizes, tiny_sizes

from engine.decoding.cpu.packed_weights import Weights, make_step_model
from engine.decoding.kv_cache import Prefix
from engine.decoding.sampler import Sampler, evaluating
from engine.decoding.slot_decoder import SlotDecoder
from engine.decoding.speculative.jacobi import JacobiDecoder
from engine.decoding.step_model import StepModel
from engine.facts import facts
from engine.models.transformer import KoDalle
from engine.sampling_params import SamplingParams, SequenceRequest

STATIONS = 2  # lengths at which decoders are timed
SHAPES = ((1, 4), (1, 8), (1, 16), (2, 8), (4, 2), (4, 4), (16, 2))  # sequences, window


def pass_ms(model: StepModel, prefix: Prefix, repeat: int) -> dict[str, float]:
    """{"1": step of one sequence, "4": of four, "1x16": pass of one sequence with a window of 16, ...}."""
    N = model.config.image_seq_len
    init = torch.zeros(N, dtype=torch.int64)
    makers: dict[str, Callable[[], SlotDecoder | JacobiDecoder]] = {
        str(B): lambda B=B: SlotDecoder(model, B)  # type: ignore[misc]
        for B in sorted({B for B, _ in SHAPES})
    }
    makers |= {f"{B}x{w}": lambda B=B, w=w: JacobiDecoder(model, B, window=w) for B, w in SHAPES}  # type: ignore[misc]
    best: dict[str, list[float]] = {name: [float("inf")] * STATIONS for name in makers}
    decoders: dict[str, tuple[SlotDecoder | JacobiDecoder, int]] = {}
    for name, make in makers.items():
        decoder = make()
        slots = [
            decoder.add(prefix, SequenceRequest(0, SamplingParams(seed=7), candidate=i), init_tokens=init)
            for i in range(decoder.num_slots)
        ]
        decoder.step()
        decoders[name] = decoder, slots[0]
    for station in range(STATIONS):
        until = (2 * station + 1) * N // (2 * STATIONS)
        for decoder, slot in decoders.values():
            while decoder.num_tokens(slot) < until:
                decoder.step()
        for _ in range(repeat):
            for name, (decoder, slot) in decoders.items():
                if decoder.num_tokens(slot) < N - 20:  # the widest window still fits
                    start = time.perf_counter()
                    decoder.step()
                    best[name][station] = min(best[name][station], time.perf_counter() - start)
    means = {name: [seconds for seconds in times if seconds < float("inf")] for name, times in best.items()}
    return {name: round(1e3 * sum(times) / len(times), 2) for name, times in means.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the script")
    parser.add_argument("--repeat", type=int, default=6, help="timed passes of each decoder at each length")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    sizes = tiny_sizes()[0].model_copy(update={"image_grid_size": 8}) if arguments.tiny else published_sizes()[0]
    model = KoDalle(sizes)
    document = facts(torch.device("cpu")) | {"sizes": model.config.model_dump(), "pass_ms": {}}
    prefix = Sampler(model).prefill(torch.ones(1, model.config.text_seq_len, dtype=torch.int64))
    weights: Weights
    for weights in ("packed", "int8"):
        step_model = make_step_model(model, weights)
        with evaluating(model):
            document["pass_ms"][weights] = pass_ms(step_model, prefix, arguments.repeat)
            print(weights, "pass ms by sequences x window:", document["pass_ms"][weights], flush=True)
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(document, ensure_ascii=False) + "\n", encoding="utf-8")
    print_document(document)


if __name__ == "__main__":
    main()
