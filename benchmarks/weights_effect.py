"""The effect of coarser weights on images: python benchmarks/weights_effect.py MODEL PAIRS [--weights int4] [--captions 40]

Generates from held-out captions of a prepared folder twice, by the compiled step in float32 and in another way, same seeds:

    int8        8-bit weights and inputs
    int4        4-bit weights, 8-bit inputs
    operators   float32 by torch's operators: the same function, sums in another order

and compares

    tokens      how many are the same; and how many would be if both had the same tokens so far
    scores      KoCLIP's of each candidate (VQGAN and KoCLIP are float32 in both)

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
    parser.add_argument(
        "--weights", choices=["int8", "int4", "operators"], default="int8", help="what is compared with float32"
    )
    parser.add_argument("--captions", type=int, default=40)
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--out", type=Path, default=None, help="folder for <weights>.json")
    arguments = parser.parse_args()
    exact = Pipeline.from_pretrained(arguments.model, dtype=torch.float32)
    rough = rough_pipeline(arguments.model, arguments.weights)
    captions = sorted({caption for pair in load_pairs(arguments.pairs).validation for caption in pair.captions})[
        : arguments.captions
    ]
    options = SamplingParams(temperature=arguments.temperature)
    rows: list[dict[str, Any]] = []
    with ProgressBar("weights effect", total=len(captions)) as bar:
        for number, caption in enumerate(captions):
            both = [
                pipeline([caption], candidates=arguments.candidates, seed=arguments.seed, sampling_params=options)[0]
                for pipeline in (exact, rough)
            ]
            rows.append(compare(exact, rough, caption, both[0], both[1], arguments.seed, options))
            bar.update(number + 1)
    document = {
        "benchmark": "weights_effect",
        "weights": arguments.weights,
        **facts(torch.device("cpu")),
        "model": arguments.model.name,
        "captions": len(captions),
        "candidates": arguments.candidates,
        "seed": arguments.seed,
        "temperature": arguments.temperature,
        **summary(rows),
    }
    for name in (
        "same_tokens",
        "same_next_token",
        "same_images",
        "score_float32",
        "score_other",
        "score_change",
    ):
        print(f"{name:16} {document[name]:.4f}")
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        write_json(arguments.out / f"{arguments.weights}.json", document)
    print_document(document)


def rough_pipeline(model: Path, weights: str) -> Pipeline:
    """What is compared with float32."""
    if weights != "operators":
        return Pipeline.from_pretrained(model, dtype=torch.float32, int8=True, weights=weights)  # type: ignore[arg-type]
    pipeline = Pipeline.from_pretrained(model, dtype=torch.float32)
    pipeline.sampler = Sampler(pipeline.transformer, compiled=False)
    return pipeline


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
    requests = [SequenceRequest(0, options.updated(seed=seed), candidate=number) for number in range(len(tokens))]
    text = exact.tokenizer.encode([caption], exact.transformer.config.text_seq_len).tokens
    next_tokens = [next_tokens_after(one.sampler, text, requests, tokens) for one in (exact, rough)]
    return {
        "same_tokens": float((tokens == other_tokens).float().mean()),
        "same_images": float((tokens == other_tokens).all(1).float().mean()),
        "same_next_token": float((next_tokens[0] == next_tokens[1]).float().mean()),
        "scores": [one.score for one in candidates],
        "other_scores": [one.score for one in others],
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
        name: statistics.mean(row[name] for row in rows) for name in ("same_tokens", "same_images", "same_next_token")
    }
    scores = [score for row in rows for score in row["scores"]]
    others = [score for row in rows for score in row["other_scores"]]
    changes = [after - before for before, after in zip(scores, others, strict=True)]
    means |= {
        "score_float32": statistics.mean(scores),
        "score_other": statistics.mean(others),
        "score_change": statistics.mean(changes),
        "score_change_standard_error": statistics.stdev(changes) / math.sqrt(len(changes)),
        "best_score_float32": statistics.mean(max(row["scores"]) for row in rows),
        "best_score_other": statistics.mean(max(row["other_scores"]) for row in rows),
    }
    return means


if __name__ == "__main__":
    main()
