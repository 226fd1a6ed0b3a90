"""Measures one variant in a process of its own, whose memory is its own; started by sample_speed.py.

python -m sampling.worker '{"model": ...}'     a `SamplingPlan` as JSON; the last line of output is the result
"""

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch

from engine.device import fit_to_machine
from engine.models.folder import load_part
from engine.models.transformer import KoDalle
from engine.pipeline.generation import Generation
from sampling.baseline_rows import cached_row, dalle_pytorch_row, uncached_row
from sampling.baselines import sample_uncached
from sampling.plan import VARIANTS, SamplingPlan, Variant
from sampling.rows import (
    FIRST_SEED,
    Row,
    add_floor,
    generation_row,
    guidance_row,
    load_pipeline,
    machine_rates,
    make_sampler,
    prefill_row,
    text_tokens,
)

_COMPARED_TOKENS = 4  # of an uncached generation, on a machine where a whole one takes minutes


def measure(plan: SamplingPlan) -> dict[str, Any]:
    """{"variant", "rates", "rows", "equal_tokens"}."""
    variant = VARIANTS[plan.variant]
    rates = machine_rates(plan, variant)
    pipeline = load_pipeline(plan, variant)
    sizes = sorted({1, plan.candidates})
    ours: list[Row] = []
    generation: Generation | None = None
    for images in sizes:
        _say(f"{variant.name}: generating {images}")
        row, generation = generation_row(pipeline, plan, variant, images)
        ours.append(row)
    # A load of other processes can only lower what is measured: the better of before and after.
    rates = {name: max(rate, rates[name]) for name, rate in machine_rates(plan, variant).items()}
    for row in ours:
        add_floor(row, pipeline, variant, rates)
    sampler = make_sampler(pipeline, variant)
    _say(f"{variant.name}: guidance, prefill")
    rows = [*ours, guidance_row(pipeline, sampler, plan, variant)]
    answer: dict[str, Any] = {"variant": variant.name, "rates": rates}
    if variant.has_baselines:  # int8 reads captions as float32 does
        rows.append(prefill_row(pipeline, sampler, plan, variant))
        caption = text_tokens(pipeline, 1)
        del pipeline, sampler
        gc.collect()
        model = load_part(Path(plan.model), "transformer").to(caption.device, variant.torch_dtype).eval()
        assert generation is not None
        answer["equal_tokens"] = equal_tokens(model, caption, plan, variant, generation)
        rows += _baselines(model, caption, plan, variant, sizes)
    return answer | {"rows": rows}


def _baselines(
    model: KoDalle, caption: torch.Tensor, plan: SamplingPlan, variant: Variant, sizes: list[int]
) -> list[Row]:
    rows = []
    for images in sizes:
        if "uncached" in plan.parts:
            _say(f"{variant.name}: the ancestors' algorithm, {images}")
            rows.append(uncached_row(model, caption, plan, variant, images))
        if "cached" in plan.parts:
            _say(f"{variant.name}: a plain cached loop, {images}")
            rows.append(cached_row(model, caption, plan, variant, images))
        if "dalle-pytorch" in plan.parts:
            rows.append(dalle_pytorch_row(caption, model, plan, variant, images))
    return rows


def equal_tokens(
    model: KoDalle, caption: torch.Tensor, plan: SamplingPlan, variant: Variant, generation: Generation
) -> dict[str, int]:
    """How many of our first tokens the ancestors' algorithm samples too, with the same noise at temperature 1.

    Raises:
        RuntimeError: not all of them in float32, where both are the same function to the last digits; 16-bit rounding
            may turn a near tie.
    """
    whole = plan.lengths_one == 0
    num_tokens = model.config.image_seq_len if whole else _COMPARED_TOKENS
    by_number = {candidate.candidate: candidate.image_tokens for candidate in generation.candidates}
    candidates = sorted(by_number) if whole else [0]
    theirs = sample_uncached(model, caption, seed=FIRST_SEED, candidates=candidates, num_tokens=num_tokens)
    ours = torch.tensor([by_number[candidate][:num_tokens] for candidate in candidates], device=theirs.device)
    equal = int((theirs == ours).sum())
    if variant.name == "float32" and equal != theirs.numel():
        raise RuntimeError(f"{equal} of {theirs.numel()} tokens are those of the ancestors' algorithm")
    return {"equal": equal, "compared": theirs.numel()}


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    fit_to_machine()
    print(json.dumps(measure(SamplingPlan.from_json(sys.argv[1]))), flush=True)


if __name__ == "__main__":
    main()
