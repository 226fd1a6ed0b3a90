"""Counts candidates that have the same tokens alone as in a batch: python benchmarks/seed_equality.py [--candidates N]

A model of the published width (1024, 8 heads, GEGLU 4096; two layers, random weights that matter, 3 x 3 image tokens)
generates N candidates in random batches of random size, then each one alone. Sampling parameters differ from one to the
next: filters, temperature, guidance. Every kind of weights that this machine has is counted. The last line is one JSON document.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from machine_facts import print_document

from engine.config.transformer import TransformerConfig
from engine.decoding.cpu.compiled_step import library
from engine.decoding.cpu.packed_weights import Weights, can_quantise
from engine.decoding.sampler import Sampler
from engine.facts import facts
from engine.files import write_json
from engine.models.transformer import KoDalle
from engine.progress import ProgressBar
from engine.sampling_params import SamplingParams, SequenceRequest

_PARAMS = (
    SamplingParams(),
    SamplingParams(temperature=0.7, top_k=200),
    SamplingParams(guidance_scale=3.0),
    SamplingParams(top_p=0.9),
    SamplingParams(top_k=500, top_p=0.8, guidance_scale=0.5),
)
_LARGEST_BATCH = 128


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--candidates", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=None, help="folder for the JSON document")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kinds: list[tuple[torch.dtype, Weights | None]]  # None: the sampler's default
    if device.type == "cuda":
        kinds = [(torch.float16, None), (torch.bfloat16, None)]
    else:
        kinds = [(torch.float32, None)]
        kinds += [(torch.float32, "int8")] if can_quantise(torch.float32, device) else []
        kinds += [(torch.float32, "int4")] if library() is not None else []
    rows = []
    for dtype, weights in kinds:
        start = time.perf_counter()
        equal = count_equal(dtype, weights, arguments.candidates, device)
        seconds = time.perf_counter() - start
        print(
            f"{weights or 'default'} weights, {dtype}: {equal} of {arguments.candidates} candidates the same alone as in a batch"
        )
        rows.append(
            {
                "dtype": str(dtype),
                "weights": weights or "default",
                "equal": equal,
                "of": arguments.candidates,
                "s": seconds,
            }
        )
    document = {"benchmark": "seed_equality", **facts(device), "rows": rows}
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        write_json(arguments.out / "seed_equality.json", document)
    print_document(document)
    return 0 if all(row["equal"] == row["of"] for row in rows) else 1


def count_equal(dtype: torch.dtype, weights: Weights | None, count: int, device: torch.device) -> int:
    """How many of `count` candidates have the same tokens alone as in a random batch."""
    config = TransformerConfig(num_layers=2, image_grid_size=3, text_seq_len=16)
    torch.manual_seed(0)
    model = KoDalle(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("scale"):  # with a fresh LayerScale of 0.1 the layers would hardly matter
                parameter.fill_(1.0)
    model = model.to(device, dtype)
    text = torch.randint(5, config.text_vocab_size, (5, config.text_seq_len))
    sampler = Sampler(model, null_text_tokens=text[4], weights=weights)
    prefix = sampler.prefill(text[:4])
    requests = [
        SequenceRequest(i % 4, _PARAMS[i % len(_PARAMS)].updated(seed=i // 7), candidate=i % 7) for i in range(count)
    ]
    order = torch.randperm(count).tolist()
    together: dict[int, torch.Tensor] = {}
    while order:
        size = int(torch.randint(1, _LARGEST_BATCH + 1, ()))
        batch, order = order[:size], order[size:]
        together.update(zip(batch, sampler.decode(prefix, [requests[number] for number in batch]), strict=True))
    equal = 0
    with ProgressBar(f"{weights or 'default'} weights, alone", total=count) as bar:
        for number, request in enumerate(requests):
            equal += torch.equal(sampler.decode(prefix, [request])[0], together[number])
            bar.update(number + 1)
    return equal


if __name__ == "__main__":
    sys.exit(main())
