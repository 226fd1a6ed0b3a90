"""The effect of 8-bit arithmetic on images: python benchmarks/int8_effect.py MODEL PAIRS [--captions 40] [--out FOLDER]

Generates from held-out captions of a prepared folder twice, in float32 and in 8 bits, same seeds, and compares

    tokens      how many are the same; and how many would be if both had the same tokens so far
    scores      KoCLIP's of each candidate (its own arithmetic is float32 in both)
    images      the same tokens, decoded by the VQGAN in float32 and in 8 bits: PSNR, grey levels

The last line is one JSON document.
"""

import argparse
import math
import statistics
from pathlib import Path
from typing import Any

import torch
from machine_facts import print_document
from torch import Tensor

from engine.data.pairs import load_pairs
from engine.decoding.sampler import Sampler, evaluating
from engine.decoding.sampling_tensors import SamplingTensors
from engine.decoding.slot_decoder import SlotDecoder
from engine.facts import facts
from engine.files import write_json
from engine.pipeline.generation import Generation
from engine.pipeline.pipeline import Pipeline
from engine.progress import ProgressBar
from engine.sampling_params import SamplingParams, SequenceRequest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("pairs", type=Path, help="prepared folder; captions of its validation split are used")
    parser.add_argument("--captions", type=int, default=40)
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--out", type=Path, default=None, help="folder for int8_effect.json")
    arguments = parser.parse_args()
    exact = Pipeline.from_pretrained(arguments.model, dtype=torch.float32)
    rough = Pipeline.from_pretrained(arguments.model, dtype=torch.float32, int8=True)
    captions = sorted({caption for pair in load_pairs(arguments.pairs).validation for caption in pair.captions})[
        : arguments.captions
    ]
    options = SamplingParams(temperature=arguments.temperature)
    rows: list[dict[str, Any]] = []
    with ProgressBar("int8 effect", total=len(captions)) as bar:
        for number, caption in enumerate(captions):
            both = [
                pipeline([caption], candidates=arguments.candidates, seed=arguments.seed, sampling_params=options)[0]
                for pipeline in (exact, rough)
            ]
            rows.append(compare(exact, rough, caption, both[0], both[1], arguments.seed, options))
            bar.update(number + 1)
    document = {
        "benchmark": "int8_effect",
        **facts(torch.device("cpu")),
        "model": arguments.model.name,
        "captions": len(captions),
        "candidates": arguments.candidates,
        "seed": arguments.seed,
        "temperature": arguments.temperature,
        **summary(rows),
    }
    for name in ("same_tokens", "same_next_token", "score_float32", "score_int8", "score_change", "psnr_db"):
        print(f"{name:16} {'equal' if document[name] is None else format(document[name], '.4f')}")
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        write_json(arguments.out / "int8_effect.json", document)
    print_document(document)


def compare(
    exact: Pipeline,
    rough: Pipeline,
    caption: str,
    generation: Generation,
    rough_generation: Generation,
    seed: int,
    options: Any,
) -> dict[str, Any]:
    """One caption's candidates, by candidate number."""
    candidates, others = (sorted(one.candidates, key=lambda c: c.candidate) for one in (generation, rough_generation))
    tokens = torch.tensor([one.image_tokens for one in candidates])  # (n, N)
    other_tokens = torch.tensor([one.image_tokens for one in others])
    pixels = exact.decode_images(tokens) * 255
    errors = (rough.decode_images(tokens) * 255 - pixels).abs()
    requests = [SequenceRequest(0, options.updated(seed=seed), candidate=number) for number in range(len(tokens))]
    text = exact.tokenizer.encode([caption], exact.transformer.config.text_seq_len).tokens
    next_tokens = [
        next_tokens_after(Sampler(exact.transformer, weights=weights), text, requests, tokens)
        for weights in ("packed", "int8")
    ]
    return {
        "same_tokens": float((tokens == other_tokens).float().mean()),
        "same_images": float((tokens == other_tokens).all(1).float().mean()),
        "same_next_token": float((next_tokens[0] == next_tokens[1]).float().mean()),
        "scores": [one.score for one in candidates],
        "scores_int8": [one.score for one in others],
        "squared_error": float(errors.square().mean()),
        "mean_grey_levels": float(errors.mean()),
        "largest_grey_levels": float(errors.max()),
    }


def next_tokens_after(sampler: Sampler, text: Tensor, requests: list[SequenceRequest], tokens: Tensor) -> Tensor:
    """What would be sampled at each position if everything before it were `tokens`: (n, N) -> (n, N)."""
    prefix = sampler.prefill(text)
    parameters = SamplingTensors(requests, torch.device("cpu"))
    columns = []
    with evaluating(sampler.model):
        decoder = SlotDecoder(sampler.step_model(), len(requests))
        for request, row in zip(requests, tokens, strict=True):
            decoder.add(prefix, request, init_tokens=row)
        for position in range(tokens.shape[1]):
            columns.append(parameters.sample(decoder.next_logits(), torch.full((len(requests),), position)))
            decoder.step()
    return torch.stack(columns, dim=1)


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over captions; the score's change with its standard error, by candidate."""
    means: dict[str, Any] = {
        name: statistics.mean(row[name] for row in rows)
        for name in ("same_tokens", "same_images", "same_next_token", "mean_grey_levels")
    }
    scores = [score for row in rows for score in row["scores"]]
    scores_int8 = [score for row in rows for score in row["scores_int8"]]
    squared_error = statistics.mean(row["squared_error"] for row in rows)
    changes = [after - before for before, after in zip(scores, scores_int8, strict=True)]
    means |= {
        "score_float32": statistics.mean(scores),
        "score_int8": statistics.mean(scores_int8),
        "score_change": statistics.mean(changes),
        "score_change_standard_error": statistics.stdev(changes) / math.sqrt(len(changes)),
        "best_score_float32": statistics.mean(max(row["scores"]) for row in rows),
        "best_score_int8": statistics.mean(max(row["scores_int8"]) for row in rows),
        # None: equal, where the processor has no 8-bit convolutions and the VQGAN runs in float32 both times
        "psnr_db": 10 * math.log10(255**2 / squared_error) if squared_error else None,
        "largest_grey_levels": max(row["largest_grey_levels"] for row in rows),
    }
    return means


if __name__ == "__main__":
    main()
