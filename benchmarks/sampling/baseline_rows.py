"""Seconds that others need for the same tokens on the same machine, in the same run.

A whole uncached generation takes minutes on a CPU. There a step is timed at some lengths between the first (129 positions)
and the last (384), and the steps between are interpolated; a row says so in `method`.

P prefix positions, N image tokens, B sequences.
"""

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from engine.measure import sum_over_lengths, time_runs, uncached_flops
from engine.models.transformer import KoDalle
from sampling import dalle_pytorch_adapter
from sampling.baselines import (
    cached_logits,
    cached_step,
    empty_cache,
    plain_sample,
    random_cache,
    sample_cached,
    sample_next_uncached,
    sample_uncached,
    uncached_logits,
)
from sampling.plan import SamplingPlan, Variant

_CACHED_LENGTHS = 5  # a cached step grows slowly and evenly with its length
_CACHED_STEPS = 5  # at each of them
_LENGTH_BUDGET_S = 3.0

Row = dict[str, Any]
Work = Callable[[], Any]


@torch.inference_mode()
def uncached_row(model: KoDalle, text_tokens: Tensor, plan: SamplingPlan, variant: Variant, images: int) -> Row:
    """The ancestors' loop for the candidates of one caption; text_tokens (1, T)."""
    config, device = model.config, text_tokens.device
    row: Row = {"what": "uncached", "variant": variant.name, "images": images, "flop": images * uncached_flops(config)}
    num_lengths = plan.lengths_one if images == 1 else plan.lengths_many

    def sample(num_tokens: int) -> Tensor:
        return sample_uncached(model, text_tokens, seed=0, candidates=range(images), num_tokens=num_tokens)

    if num_lengths == 0:
        sample(2)
        return row | _whole(lambda: sample(config.image_seq_len), plan, device, share=10)
    seeds, candidates = torch.zeros(images, dtype=torch.int64, device=device), torch.arange(images, device=device)

    def step_after(sampled: int) -> Work:
        tokens = torch.randint(config.image_vocab_size, (images, sampled), device=device)
        captions = text_tokens.expand(images, -1)
        return lambda: sample_next_uncached(model, uncached_logits(model, captions, tokens), seeds, candidates, sampled)

    counts = spread_evenly(0, config.image_seq_len - 1, num_lengths)
    return row | at_lengths(step_after, counts, config.prefix_len, device, repeat=2 if images == 1 else 1)


@torch.inference_mode()
def cached_row(model: KoDalle, text_tokens: Tensor, plan: SamplingPlan, variant: Variant, images: int) -> Row:
    """A plain loop with a concatenated cache for the candidates of one caption; text_tokens (1, T)."""
    config, device = model.config, text_tokens.device
    row: Row = {"what": "cached", "variant": variant.name, "images": images}
    prefix = model.embed_prefix(text_tokens.expand(images, -1))  # (B, P, C)
    read = lambda: plain_sample(cached_logits(model, prefix, empty_cache(model, images)))
    read()
    if images == 1 or plan.lengths_many == 0:
        return row | _whole(lambda: sample_cached(model, text_tokens, num_sequences=images), plan, device, share=3)
    tokens = torch.zeros(images, dtype=torch.int64, device=device)

    def step_after(fed: int) -> Work:
        cache = random_cache(model, images, config.prefix_len + fed)  # grows by the few steps that are timed
        return lambda: cached_step(model, tokens, fed, cache)

    counts = spread_evenly(0, config.image_seq_len - 2, _CACHED_LENGTHS)  # the first token is the prefill's
    steps = at_lengths(step_after, counts, config.prefix_len, device, repeat=_CACHED_STEPS)
    prefill_s = statistics.median(time_runs(read, device, repeat=2, budget_s=_LENGTH_BUDGET_S))
    return row | steps | {"prefill_s": prefill_s, "tokens_s": prefill_s + steps["tokens_s"]}


@torch.inference_mode()
def dalle_pytorch_row(text_tokens: Tensor, model: KoDalle, plan: SamplingPlan, variant: Variant, images: int) -> Row:
    """lucidrains' own package with a model of the same sizes, where it is installed; text_tokens (1, T)."""
    config, device = model.config, text_tokens.device
    row: Row = {"what": "dalle-pytorch", "variant": variant.name, "images": images}
    missing = dalle_pytorch_adapter.missing()
    if missing:
        return row | {"method": missing}
    theirs = dalle_pytorch_adapter.build(config).to(device, variant.torch_dtype)
    captions = text_tokens.expand(images, -1)
    num_lengths = plan.lengths_one if images == 1 else plan.lengths_many
    if num_lengths == 0:
        return row | _whole(lambda: theirs.generate_images(captions), plan, device, share=10)

    def step_after(sampled: int) -> Work:
        tokens = torch.randint(config.image_vocab_size, (images, sampled), device=device)
        return lambda: theirs(captions, tokens)[:, -1]

    counts = spread_evenly(0, config.image_seq_len - 1, num_lengths)
    return row | at_lengths(step_after, counts, config.prefix_len, device, repeat=1)


def spread_evenly(first: int, last: int, count: int) -> list[int]:
    """`count` whole numbers from `first` to `last`, both included."""
    return [first + round((last - first) * part / (count - 1)) for part in range(count)]


def _whole(generate: Work, plan: SamplingPlan, device: torch.device, *, share: int) -> Row:
    """Times whole generations: a `share`-th of the repeats that our own rows have, at least one."""
    seconds = time_runs(generate, device, repeat=max(1, plan.repeat // share), budget_s=plan.row_budget_s)
    return {
        "method": "measured whole",
        "repeats": len(seconds),
        "tokens_s": statistics.median(seconds),
        "spread_s": [min(seconds), max(seconds)],
    }


def at_lengths(
    step_after: Callable[[int], Work], counts: list[int], prefix_len: int, device: torch.device, *, repeat: int
) -> Row:
    """Times a step after each count of own tokens, the median of `repeat`; the first of all once more, to warm up."""
    step_after(counts[0])()
    seconds = [
        statistics.median(time_runs(step_after(count), device, repeat=repeat, budget_s=_LENGTH_BUDGET_S))
        for count in counts
    ]
    lengths = [prefix_len + count for count in counts]
    return {
        "method": f"measured at {len(counts)} lengths, integrated",
        "repeats": repeat,
        "lengths": lengths,
        "seconds_at_lengths": seconds,
        "tokens_s": sum_over_lengths(lengths, seconds),
    }
