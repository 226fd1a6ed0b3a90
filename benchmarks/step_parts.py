"""Where the compiled step's time goes: each part of it beside its floor, one thread.

    python benchmarks/step_parts.py                     the published size: 1 and 16 sequences, every kind of weights
    python benchmarks/step_parts.py --models clothing   whole generations of a shipped model, with and without speculation
    …                               --tag=-avx2         under ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2

Published size: random weights, half of the image known, means of the fastest quarter of the steps; `1 guided`: a sequence
and its unconditional one; `1 x 8`: a window of eight tokens of one sequence. Shipped models: milliseconds of one image's tokens,
caption read included, means of the fastest quarter of the runs.
The compiled code counts the time of its parts itself; `Python` is the rest of the step. A part's floor is its bytes at the
rate at which a buffer of the weights' size is read again and again, or its operations at the highest rate of products, where that is
more, by rates of the same run: products of its weights' kind, and float32 ones for everything else, whose operations are counted as
they are written in kernels/cpu. Prints tables and, as the last line, one JSON document, also stored
in <out>/results/step_parts/<hardware><tag>.json. Cases that are left out stay as they are stored.
"""

import argparse
import functools
import json
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from machine_facts import REPOSITORY, hardware_name, kept_when_stopped, print_document, slug, store_document
from sampling.plan import published_sizes, tiny_sizes
from step_speed import KINDS, Step, machine_rates, random_model
from text_table import table

from engine.config.transformer import TransformerConfig
from engine.decoding.cpu.compiled_step import library
from engine.decoding.decoder import Decoder
from engine.decoding.decoders import WINDOW
from engine.decoding.sampler import Sampler, evaluating
from engine.decoding.slot_decoder import SlotDecoder
from engine.decoding.speculative.jacobi import JacobiDecoder
from engine.device import cpu_capabilities, fit_to_machine
from engine.facts import facts
from engine.measure import step_weights
from engine.pipeline.pipeline import Pipeline
from engine.sampling_params import SamplingParams, SequenceRequest
from kernels.decode_step import GROUP, PARTS, timed

_CPU = torch.device("cpu")
_WEIGHT_BYTES = {"float32": 4.0, "int8": 1.0, "int4": 0.5 + 4 / GROUP}
# Operations of an element, as kernels/cpu writes them: layers.h, products.h, sampling.h.
_NORM, _QUANTISATION, _GEGLU, _SOFTMAX, _SAMPLING = 8, 5, 36, 18, 130


class Work(NamedTuple):
    """What steps compute."""

    rows: float  # through the layers
    sequences: float  # whose own positions are read, unconditional ones included
    captions: float  # whose positions are read
    sampled: float  # rows that get logits and a token
    steps: float = 1


# By name: sequences, whether guided, window.
CASES = {"1": (1, False, 1), "1 guided": (1, True, 1), "1 x 8": (1, False, 8), "16": (16, False, 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--models", nargs="*", default=[], help="shipped models, instead of the published size")
    parser.add_argument("--steps", type=int, default=24, help="of each case; of a shipped model generations")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to try the script")
    parser.add_argument("--tag", default="", help="added to the file's name")
    parser.add_argument("--out", type=Path, help="folder for results/ (default: benchmarks/)")
    arguments = parser.parse_args()
    fit_to_machine()
    torch.set_num_threads(1)
    arguments.processor_time = True  # of machine_rates
    document: dict[str, Any] = {
        "benchmark": "step_parts", **facts(_CPU), "isa": cpu_capabilities().isa, "threads": 1, "rows": _stored(arguments)
    }  # fmt: skip
    with kept_when_stopped(document):
        for row in _shipped(arguments) if arguments.models else _published(arguments):
            name = (row["model"], row["weights"], row["case"])
            others = [one for one in document["rows"] if (one["model"], one["weights"], one["case"]) != name]
            document["rows"] = [*others, row]
            print(_table(row), end="\n\n", flush=True)
    store_document(document, arguments.out, quick=arguments.quick, tag=arguments.tag)
    print_document(document)
    return 1 if "stopped" in document else 0


def _stored(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of an earlier call, so that a long measurement can be made in pieces."""
    folder = arguments.out or (REPOSITORY / "runs" / "benchmarks" if arguments.quick else REPOSITORY / "benchmarks")
    name = slug(hardware_name(facts(_CPU))) + arguments.tag + ("-quick" if arguments.quick else "")
    path = folder / "results" / "step_parts" / f"{name}.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    return rows


def _published(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    sizes = (tiny_sizes() if arguments.quick else published_sizes())[0]
    model, own = random_model(sizes), sizes.image_seq_len // 2
    for weights in arguments.weights:
        rates = _rates(weights, sizes, arguments)
        null_text = torch.zeros(sizes.text_seq_len, dtype=torch.int64)
        sampler = Sampler(model, weights=KINDS[weights], null_text_tokens=null_text)
        for case in arguments.cases:
            sequences, guided, window = CASES[case]
            computed = sequences * (1 + guided)
            work = Work(computed * window, computed, 1 + guided, sequences * window)
            with evaluating(model):
                step = _half_done(sampler, sequences, guided=guided, window=window)
                parts = _parts(step, max(1, min(arguments.steps, own // window - 3)))
            yield _row(
                "tiny" if arguments.quick else "published", weights, case, parts, sizes, work, own + window / 2, rates
            )


def _shipped(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for name in arguments.models:
        pipeline = Pipeline.from_pretrained(REPOSITORY / "models" / name)
        sizes = pipeline.sampler.model.config
        rates = _rates("float32", sizes, arguments)
        for case in ("single steps", "speculative"):
            steps: list[int] = []
            with evaluating(pipeline.sampler.model):
                parts = _parts(functools.partial(_generate, pipeline, case, steps), arguments.steps)
            window = 1 if case == "single steps" else WINDOW
            computed = 1 + pipeline.default_sampling_params.is_guided
            passes = statistics.mean(steps[2:])
            work = Work(computed * window, computed, computed, window, passes)
            yield _row(name, "float32", case, parts, sizes, work, (sizes.image_seq_len + window) / 2, rates)


def _generate(pipeline: Pipeline, case: str, steps: list[int]) -> None:
    """Decodes the first example caption, always the same tokens, prefill included; adds the number of steps or passes."""
    sampler, params = pipeline.sampler, pipeline.default_sampling_params.updated(candidates=1, seed=100)
    [prepared] = pipeline.prepare([pipeline.caption_guide.examples[0]], params)
    [request] = prepared.sequences()
    prefix, null_prefix = sampler.prefill(prepared.text_tokens), sampler.null_prefix()
    decoder: Decoder = (
        SlotDecoder(sampler.step_model(), 2, null_prefix=null_prefix)
        if case == "single steps"
        else JacobiDecoder(sampler.step_model(), 2, window=WINDOW, null_prefix=null_prefix)
    )
    slot = decoder.add(prefix, request)
    steps.append(0)
    while decoder.num_tokens(slot) < sampler.model.config.image_seq_len:
        decoder.step()
        steps[-1] += 1


def _half_done(sampler: Sampler, sequences: int, *, guided: bool, window: int) -> Step:
    """A step, or a pass of a window, of sequences that have half of their tokens."""
    config = sampler.model.config
    prefix = sampler.prefill(torch.ones(1, config.text_seq_len, dtype=torch.int64))
    slots, null_prefix = sequences * (1 + guided), sampler.null_prefix()
    decoder: Decoder = (
        SlotDecoder(sampler.step_model(), slots, null_prefix=null_prefix)
        if window == 1
        else JacobiDecoder(sampler.step_model(), slots, window=window, null_prefix=null_prefix)
    )
    known = torch.full((config.image_seq_len,), -1, dtype=torch.int64)
    known[: config.image_seq_len // 2] = 0
    params = SamplingParams(seed=1, guidance_scale=3.0 if guided else 1.0)
    for candidate in range(sequences):
        slot = decoder.add(prefix, SequenceRequest(0, params, candidate=candidate), init_tokens=known)
    decoder.read_init_tokens()
    while decoder.num_tokens(slot) < config.image_seq_len // 2:
        decoder.step()
    return decoder.step


def _rates(weights: str, sizes: TransformerConfig, arguments: argparse.Namespace) -> dict[str, float]:
    """Bytes/s of reading as much as the weights over and over, operations/s of products of these weights and of float32."""
    num_floats = int(_WEIGHT_BYTES[weights] * step_weights(sizes) / 4)
    read, products = machine_rates(weights, arguments, num_floats=num_floats)
    plain = products if weights == "float32" else machine_rates("float32", arguments)[1]
    return {"read": read, "products": products, "float32": plain}


def _parts(work: Step, count: int) -> dict[str, float]:
    """Milliseconds of each part of a run of `work`, and of the code around them: means of the fastest quarter of the runs."""
    found = library()
    assert found is not None
    times = []
    for _ in range(2 + count):
        with timed(found) as nanoseconds:
            started = time.perf_counter()
            work()
            total_ms = 1e3 * (time.perf_counter() - started)
        parts_ms = (nanoseconds[0].double() / 1e6).tolist()
        times.append([*parts_ms, total_ms - sum(parts_ms)])
    fastest = sorted(times[2:], key=sum)[: -(-count // 4)]
    return dict(zip([*PARTS, "Python"], map(statistics.mean, zip(*fastest, strict=True)), strict=True))


def _row(
    model: str, weights: str, case: str, parts_ms: dict[str, float], sizes: TransformerConfig, work: Work, own: float,
    rates: dict[str, float],
) -> dict[str, Any]:  # fmt: skip
    """A case with bytes, operations and floor of each part."""
    needs = _needs(sizes, weights, work, own)
    parts: dict[str, dict[str, float]] = {}
    for name, ms in parts_ms.items():
        size, operations = (work.steps * need for need in needs.get(name, (0.0, 0.0)))
        rate = rates["products" if name in ("qkv", "grow", "shrink", "head") else "float32"]
        floor_s = max(size / rates["read"], operations / rate)
        parts[name] = {
            "ms": round(ms, 4), "mb": round(size / 1e6, 3), "million_operations": round(operations / 1e6, 2),
            "floor_ms": round(1e3 * floor_s, 6),
        }  # fmt: skip
    return {
        "model": model, "weights": weights, "case": case, "steps": work.steps, "load_before": round(os.getloadavg()[0], 2),
        "read_gb_per_s": round(rates["read"] / 1e9, 1), "products_gop_per_s": round(rates["products"] / 1e9, 1),
        "float32_gflop_per_s": round(rates["float32"] / 1e9, 1), "parts": parts,
        "ms": round(sum(parts_ms.values()), 3), "floor_ms": round(sum(part["floor_ms"] for part in parts.values()), 3),
    }  # fmt: skip


def _needs(sizes: TransformerConfig, weights: str, work: Work, own: float) -> dict[str, tuple[float, float]]:
    """Bytes and operations by part of a step whose sequences have `own` positions of their own."""
    L, C, A, F = sizes.num_layers, sizes.dim, sizes.num_heads * sizes.head_dim, sizes.ff_mult * sizes.dim
    V, P, R = sizes.image_vocab_size, sizes.prefix_len, work.rows

    def product(count: int, rows: float, weight_bytes: float) -> tuple[float, float]:
        return count * weight_bytes, 2 * count * rows

    read = _WEIGHT_BYTES[weights]
    gated = 2 if sizes.activation == "geglu" else 1
    positions = work.captions * P + work.sequences * own
    quantised = 0 if weights == "float32" else R * L * (2 * C + F) + work.sampled * C
    return {
        "norms": (0, _NORM * C * (2 * L * R + work.sampled)),
        "quantisation": (0, _QUANTISATION * quantised),
        "qkv": product(L * C * 3 * A, R, read),
        "attention": (8 * L * A * positions, R * L * (4 * A + _SOFTMAX * sizes.num_heads) * (P + own)),
        "out": product(L * A * C, R, 4),
        "grow": product(L * C * gated * F, R, read),
        "activation": (0, _GEGLU * R * L * F),
        "shrink": product(L * F * C, R, read),
        "head": product(C * V, work.sampled, read),
        "sampling": (0, _SAMPLING * work.sampled * V),
    }


def _table(row: dict[str, Any]) -> str:
    cells = []
    for name, part in row["parts"].items():
        share = f"{100 * part['floor_ms'] / part['ms']:.0f}%" if part["ms"] else "-"
        cells.append(
            [name, f"{part['ms']:.2f}", f"{100 * part['ms'] / row['ms']:.0f}%", f"{part['mb']:.1f}",
             f"{part['million_operations']:.0f}", f"{part['floor_ms']:.2f}", share]
        )  # fmt: skip
    cells.append(
        ["all", f"{row['ms']:.2f}", "", "", "", f"{row['floor_ms']:.2f}", f"{100 * row['floor_ms'] / row['ms']:.0f}%"]
    )
    title = f"{row['model']}, {row['weights']}, {row['case']}: {row['steps']:g} steps"
    return table(title, ["part", "ms", "share", "MB", "M operations", "floor ms", "floor/ms"], cells)


if __name__ == "__main__":
    raise SystemExit(main())
