"""Measurements of our own generation: seconds by phase, work, memory, and the floor that the machine's rates allow.

Everything goes through `engine.pipeline.pipeline.Pipeline` and `Sampler` as users call them.
"""

import functools
import io
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.decoding.sampler import Sampler
from engine.measure import (
    Machine,
    Workload,
    count_flops,
    decode_floor_s,
    matrix_peak,
    mean_step_bytes,
    prefill_floor_s,
    read_bandwidth,
    synchronize,
    time_runs,
)
from engine.models.image_codec import build_codec
from engine.pipeline.generation import Generation
from engine.pipeline.image_encoding import encode_image
from engine.pipeline.pipeline import Pipeline
from engine.sampling_params import SamplingParams, SequenceRequest
from sampling.plan import CAPTION, SamplingPlan, Variant

PHASES = ("prefill", "decode", "vqgan", "ranking", "encoding")
GUIDANCE_SCALE = 3.0  # any but 1 costs the same
JPEG_QUALITY = 85
FIRST_SEED = 1000

Row = dict[str, Any]


def machine_rates(plan: SamplingPlan, variant: Variant) -> dict[str, float]:
    """Bytes/s read and FLOP/s by type of number, measured here and now."""
    device = torch.device(plan.device)
    rates = {"read_bytes_per_s": read_bandwidth(device, num_bytes=plan.rate_bytes, seconds=plan.rate_seconds)}
    for dtype in sorted({variant.dtype, variant.matrix_dtype}):
        rates[f"{dtype}_flop_per_s"] = matrix_peak(device, getattr(torch, dtype), seconds=plan.rate_seconds)
    return rates


def load_pipeline(plan: SamplingPlan, variant: Variant) -> Pipeline:
    """One token a step: the gain of speculative decoding depends on the weights, and these are random."""
    return Pipeline.from_pretrained(
        Path(plan.model), device=plan.device, dtype=variant.torch_dtype, int8=variant.int8, speculative=False
    )


# ------------------------------------------------------------------------------------------------------ whole generations


def generation_row(pipeline: Pipeline, plan: SamplingPlan, variant: Variant, images: int) -> tuple[Row, Generation]:
    """`images` candidates of one caption, ranked and encoded as PNG; the phases are those of the median run.

    Returns:
        the row without its floor (see `add_floor`), and the first measured generation, of seed `FIRST_SEED`.
    """
    device = pipeline.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    first_s = sum(_generate(pipeline, images, FIRST_SEED)[0].values()) if _needs_warming(device, images) else None
    runs: list[dict[str, float]] = []
    kept: Generation | None = None
    started = time.perf_counter()
    while len(runs) < plan.repeat and (len(runs) < 2 or time.perf_counter() - started < plan.row_budget_s):
        phases, generation = _generate(pipeline, images, FIRST_SEED + len(runs))
        kept = kept or generation
        runs.append(phases)
    assert kept is not None
    runs.sort(key=lambda phases: phases["total"])
    middle = runs[(len(runs) - 1) // 2]
    totals = [phases["total"] for phases in runs]
    tokens_s = [phases["prefill"] + phases["decode"] for phases in runs]
    num_tokens = pipeline.transformer.config.image_seq_len
    row = {
        "what": "ours",
        "variant": variant.name,
        "images": images,
        "method": "measured whole",
        "repeats": len(runs),
        "first_s": first_s,
        "total_s": middle["total"],
        "spread_s": [totals[0], totals[-1]],
        "phases_s": {phase: middle[phase] for phase in PHASES},
        "jpeg_s": _jpeg_s(kept, plan),
        "tokens_s": statistics.median(tokens_s),
        "tokens_per_s": images * num_tokens / statistics.median(tokens_s),
        "images_per_s": images / middle["total"],
        "peak_memory_bytes": peak_memory_bytes(device),
    }
    return row, kept


def _needs_warming(device: torch.device, images: int) -> bool:
    """Graphs are captured for each number of rows; a CPU is warm after its first image, and 16 take a minute."""
    return device.type == "cuda" or images == 1


def _generate(pipeline: Pipeline, images: int, seed: int) -> tuple[dict[str, float], Generation]:
    """Seconds of each phase and `total`, by a clock around all of it."""
    synchronize(pipeline.device)
    start = time.perf_counter()
    generation = pipeline([CAPTION], candidates=images, seed=seed)[0]
    encoding = time.perf_counter()
    for candidate in generation.candidates:
        metadata = pipeline.provenance(generation.request, candidate.candidate)
        encode_image(candidate.image, "png", metadata=metadata, png_level=6)
    end = time.perf_counter()
    return {**generation.timings_s, "encoding": end - encoding, "total": end - start}, generation


def _jpeg_s(generation: Generation, plan: SamplingPlan) -> float:
    """The same images as JPEG."""

    def encode() -> None:
        for candidate in generation.candidates:
            candidate.image.save(io.BytesIO(), format="JPEG", quality=JPEG_QUALITY)

    return statistics.median(time_runs(encode, torch.device("cpu"), repeat=min(plan.repeat, 5)))


def peak_memory_bytes(device: torch.device) -> int:
    """GPU memory since the last reset; on CPU the process's high-water mark, loading included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# ---------------------------------------------------------------------------------------------------------- the floor


def add_floor(row: Row, pipeline: Pipeline, variant: Variant, rates: dict[str, float]) -> None:
    """Least seconds of each phase at the machine's measured rates, and the share of the time that they make up."""
    sizes, images = pipeline.transformer.config, row["images"]
    width = torch.empty((), dtype=variant.torch_dtype).element_size()
    decoding = Workload(images, 1, weight_bytes=variant.weight_bytes, kv_bytes=width)
    reading = Workload(images, 1, weight_bytes=width, kv_bytes=width)
    machine = Machine(rates["read_bytes_per_s"], rates[f"{variant.dtype}_flop_per_s"])
    decoder = Machine(rates["read_bytes_per_s"], rates[f"{variant.matrix_dtype}_flop_per_s"])
    vqgan_flops, ranking_flops = image_flops(pipeline, images)
    floor = {
        "prefill": prefill_floor_s(sizes, reading, machine),
        "decode": decode_floor_s(sizes, decoding, decoder),
        "vqgan": vqgan_flops / decoder.flop_per_s,
        "ranking": ranking_flops / machine.flop_per_s,
    }
    phases = row["phases_s"]
    row["bytes_per_step"] = mean_step_bytes(sizes, decoding)
    row["floor_s"] = floor
    row["share_of_roofline"] = {phase: seconds / phases[phase] for phase, seconds in floor.items()} | {
        "total": sum(floor.values()) / row["total_s"]
    }


@torch.inference_mode()
def image_flops(pipeline: Pipeline, images: int) -> tuple[int, int]:
    """FLOP of decoding `images` images and of ranking them, as the plain networks need."""
    with torch.device("meta"):  # shapes without memory or time; KoCLIP looks at values, and is small
        codec = build_codec(pipeline.vqgan.config).eval()
        latents = torch.zeros(1, codec.latent_table().shape[1], codec.config.grid_size, codec.config.grid_size)
        _, decoded = count_flops(lambda: codec.decoder(latents))
    koclip = pipeline.koclip
    if koclip is None:
        return images * decoded, 0
    size = koclip.config.image_size
    captions = pipeline.tokenizer.encode([CAPTION], koclip.config.text_seq_len).tokens.to(pipeline.device)
    image = torch.zeros(1, 3, size, size, device=pipeline.device)
    _, looked = count_flops(lambda: koclip.embed_images(image))
    _, read = count_flops(lambda: koclip.embed_texts(captions))
    return images * decoded, images * looked + read


# -------------------------------------------------------------------------------------------------- guidance, prefill


def make_sampler(pipeline: Pipeline, variant: Variant) -> Sampler:
    """The pipeline's sampler once more, for what a generation does not time separately."""
    null = pipeline.tokenizer.empty(pipeline.transformer.config.text_seq_len)[0]
    return Sampler(
        pipeline.transformer, null_text_tokens=null.to(pipeline.device), weights="int8" if variant.int8 else None
    )


def guidance_row(pipeline: Pipeline, sampler: Sampler, plan: SamplingPlan, variant: Variant) -> Row:
    """Decoding `candidates` rows without and with guidance, whole and in turn: a load of other processes meets both."""
    device = pipeline.device
    prefix = sampler.prefill(text_tokens(pipeline, 1))
    plain, guided = (
        [
            SequenceRequest(0, SamplingParams(guidance_scale=scale, seed=FIRST_SEED), candidate=number)
            for number in range(plan.candidates)
        ]
        for scale in (1.0, GUIDANCE_SCALE)
    )
    # packs weights, reads the empty caption; on a GPU captures the graphs of both, the larger decoder's first
    for rows in (guided, plain) if device.type == "cuda" else (guided[:1],):
        sampler.decode(prefix, rows)
    pairs: list[tuple[float, float]] = []
    started = time.perf_counter()
    while len(pairs) < max(1, plan.repeat // 3) and (not pairs or time.perf_counter() - started < plan.row_budget_s):
        without, with_guidance = (
            time_runs(functools.partial(sampler.decode, prefix, rows), device, repeat=1)[0] for rows in (plain, guided)
        )
        pairs.append((without, with_guidance))
    ratios = [guided_s / plain_s for plain_s, guided_s in pairs]
    return {
        "what": "guidance",
        "variant": variant.name,
        "images": plan.candidates,
        "method": "measured whole",
        "repeats": len(pairs),
        "unguided_decode_s": statistics.median(plain_s for plain_s, _ in pairs),
        "decode_s": statistics.median(guided_s for _, guided_s in pairs),
        "ratio": statistics.median(ratios),
        "ratio_spread": [min(ratios), max(ratios)],
    }


def prefill_row(pipeline: Pipeline, sampler: Sampler, plan: SamplingPlan, variant: Variant) -> Row:
    """Reading one caption for all its candidates against reading as many captions: FLOP as executed, and seconds."""
    counted, seconds = [], []
    for captions in (1, plan.candidates):
        tokens = text_tokens(pipeline, captions)
        read = functools.partial(sampler.prefill, tokens)
        counted.append(count_flops(read)[1])
        seconds.append(statistics.median(time_runs(read, pipeline.device, repeat=min(plan.repeat, 3), budget_s=5)))
    return {
        "what": "prefill",
        "variant": variant.name,
        "images": plan.candidates,
        "flop_one_caption": counted[0],
        "flop_many_captions": counted[1],
        "share_of_work": counted[0] / counted[1],
        "seconds_one_caption": seconds[0],
        "seconds_many_captions": seconds[1],
    }


def text_tokens(pipeline: Pipeline, captions: int) -> Tensor:
    """(G, T): the caption, and others of as many tokens."""
    config = pipeline.transformer.config
    tokens = pipeline.tokenizer.encode([CAPTION] * captions, config.text_seq_len).tokens
    tokens[1:, 1] = torch.arange(5, 4 + captions) % config.text_vocab_size
    return tokens.to(pipeline.device)
