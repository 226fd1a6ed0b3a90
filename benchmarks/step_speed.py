"""What a decode step of the published size costs on this CPU: the compiled step, torch's operators, a plain cached loop.

    python benchmarks/step_speed.py                                   one and sixteen sequences, every kind of weights
    python benchmarks/step_speed.py --weights int8 --tag -avx2        under ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2
    python benchmarks/step_speed.py --profile                         where the time of torch's operators goes, too

Steps at the middle of an image (128 of 256 tokens known), random weights. The ways of one row take turns, a few steps each, so
that other load on the machine meets all. `best` is the fastest step, `cpu` the mean processor time, of all threads. `roofline` is the
floor over the best, or with `--processor-time`, for a machine that others use, over `cpu` of one thread. The floor: each weight as
it is stored, each key and value read once, at the read rate measured in the same run by the same clock; or the products at the
highest rate seen, where that is more. Prints a table and, as the last line, one JSON document, also stored in
<out>/results/step_speed/<hardware><tag>.json. Rows that are left out stay as they are stored.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine_facts import REPOSITORY, hardware_name, kept_when_stopped, print_document, slug, store_document
from sampling.baselines import cached_step, random_cache
from sampling.plan import published_sizes, tiny_sizes
from text_table import table

from engine.decoding.cpu.compiled_step import library
from engine.decoding.cpu.packed_weights import Weights, is_compiled
from engine.decoding.sampler import Sampler, evaluating
from engine.decoding.slot_decoder import SlotDecoder
from engine.device import cpu_capabilities, fit_to_machine
from engine.facts import facts
from engine.measure import Workload, matrix_peak, read_bandwidth, step_bytes, step_flops
from engine.models.transformer import KoDalle
from engine.sampling_params import SamplingParams, SequenceRequest
from kernels.decode_step import GROUP, PackedLinear, WeightKind

_CPU = torch.device("cpu")
KINDS: dict[str, Weights] = {"float32": "packed", "int8": "int8", "int4": "int4"}
# Bytes of a weight; the attention's output layer, 3 % of the weights, is float32 whatever the others are, and not counted.
_WEIGHT_BYTES = {"float32": 4.0, "int8": 1.0, "int4": 0.5 + 4 / GROUP}
_TURN = 4  # steps of one way at a time
_OPERATORS = 14  # shown by --profile

Step = Callable[[], object]


def main() -> int:
    arguments = _arguments()
    fit_to_machine()
    if arguments.processor_time:
        torch.set_num_threads(1)
    sizes = (tiny_sizes() if arguments.quick else published_sizes())[0]
    document: dict[str, Any] = {
        "benchmark": "step_speed", **facts(_CPU), "isa": cpu_capabilities().isa, "threads": torch.get_num_threads(),
        "clock": "processor time" if arguments.processor_time else "best",
        "sizes": sizes.model_dump(mode="json"), "rows": [], "profiles": {}, **_stored(arguments),
    }  # fmt: skip
    arguments.steps = min(arguments.steps, sizes.image_seq_len // 2 - 2)  # before sequences end
    model = random_model(sizes)
    with kept_when_stopped(document):
        for weights in arguments.weights:
            measured = _rows(model, weights, arguments)
            names = {(row["weights"], row["sequences"]) for row in measured}
            document["rows"] = [row for row in document["rows"] if (row["weights"], row["sequences"]) not in names]
            document["rows"] += measured
            if arguments.profile and weights != "int4":
                for count in arguments.sequences:
                    document["profiles"][f"{weights}, {count}"] = profile(model, weights, count)
    store_document(document, arguments.out, quick=arguments.quick, tag=arguments.tag)
    print(_table(document["rows"]), end="\n\n")
    print_document(document)
    return 1 if "stopped" in document else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 16])
    parser.add_argument(
        "--without", nargs="+", choices=["operators", "cached loop"], default=[], help="ways that are left out"
    )
    parser.add_argument("--steps", type=int, default=24, help="of each way")
    parser.add_argument(
        "--processor-time", action="store_true", help="one thread, and processor time instead of the clock's"
    )
    parser.add_argument("--profile", action="store_true", help="where the time of torch's operators goes")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to try the script")
    parser.add_argument("--tag", default="", help="added to the file's name")
    parser.add_argument("--out", type=Path, help="folder for results/ (default: benchmarks/)")
    return parser.parse_args()


def _stored(arguments: argparse.Namespace) -> dict[str, Any]:
    """Rows and profiles of an earlier call, so that a long measurement can be made in pieces."""
    folder = arguments.out or (REPOSITORY / "runs" / "benchmarks" if arguments.quick else REPOSITORY / "benchmarks")
    name = slug(hardware_name(facts(_CPU))) + arguments.tag + ("-quick" if arguments.quick else "")
    path = folder / "results" / "step_speed" / f"{name}.json"
    if not path.is_file():
        return {}
    document = json.loads(path.read_text(encoding="utf-8"))
    return {name: document[name] for name in ("rows", "profiles")}


def random_model(sizes: Any) -> KoDalle:
    """Weights N(0, 0.02), repeated every million: made in a second, where torch's own initialisation takes ten."""
    with torch.device("meta"):
        model = KoDalle(sizes)
    model = model.to_empty(device="cpu").eval()
    noise = 0.02 * torch.randn(1 << 20, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for part in parameter.view(-1).split(len(noise)):
                part.copy_(noise[: len(part)])
            if name.endswith("norm.weight") or name.endswith("scale"):
                parameter.fill_(1.0 if name.endswith("norm.weight") else 0.1)
    return model


def _rows(model: KoDalle, weights: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each number of sequences."""
    rates = machine_rates(weights, arguments)
    samplers: dict[str, Sampler] = {}
    if is_compiled(model, KINDS[weights]):
        samplers["compiled"] = Sampler(model, weights=KINDS[weights])
    if weights != "int4" and "operators" not in arguments.without:
        samplers["operators"] = Sampler(model, weights=KINDS[weights], compiled=False)
    rows = []
    with evaluating(model):
        for count in arguments.sequences:
            steps = {name: sampler_step(sampler, count) for name, sampler in samplers.items()}
            if weights == "float32" and "cached loop" not in arguments.without:
                steps["cached loop"] = loop_step(model, count)
            ways = take_turns(steps, arguments.steps)
            rows.append({"weights": weights, "sequences": count, "ways": ways})
            print(weights, count, {name: way["best_ms"] for name, way in ways.items()}, flush=True)
    # other load can only lower a rate
    rates = [max(pair) for pair in zip(rates, machine_rates(weights, arguments), strict=True)]
    for row in rows:
        _add_floor(row, model, *rates, clock="cpu_ms" if arguments.processor_time else "best_ms")
    return rows


def sampler_step(sampler: Sampler, count: int) -> Step:
    """A step of `count` candidates of one caption that have half of their tokens."""
    config = sampler.model.config
    prefix = sampler.prefill(torch.ones(1, config.text_seq_len, dtype=torch.int64))
    decoder = SlotDecoder(sampler.step_model(), count)
    known = torch.full((config.image_seq_len,), -1, dtype=torch.int64)
    known[: config.image_seq_len // 2 - _TURN] = 0
    for candidate in range(count):
        decoder.add(prefix, SequenceRequest(0, SamplingParams(seed=1), candidate=candidate), init_tokens=known)
    decoder.read_init_tokens()
    return decoder.step


def loop_step(model: KoDalle, count: int) -> Step:
    config = model.config
    cache = random_cache(model, count, config.prefix_len + config.image_seq_len // 2)
    tokens = torch.zeros(count, dtype=torch.int64)
    return lambda: cached_step(model, tokens, config.image_seq_len // 2, cache)


def take_turns(steps: dict[str, Step], count: int) -> dict[str, dict[str, float]]:
    """Times of `count` steps of each way, after some that warm it."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    processor: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(-1, -(-count // _TURN)):
        for name, step in steps.items():
            for _ in range(_TURN if turn >= 0 else 2):
                started, used = time.perf_counter(), time.process_time()
                step()
                if turn >= 0:
                    seconds[name].append(time.perf_counter() - started)
                    processor[name].append(time.process_time() - used)
    return {
        name: {
            "best_ms": round(1e3 * min(seconds[name]), 2),
            "median_ms": round(1e3 * statistics.median(seconds[name]), 2),
            "cpu_ms": round(1e3 * statistics.mean(processor[name]), 2),  # a step may be shorter than the clock's tick
        }
        for name in steps
    }


def machine_rates(weights: str, arguments: argparse.Namespace, *, num_floats: int = 1 << 26) -> list[float]:
    """Bytes/s read, and operations/s of products of these weights: PyTorch's, or the compiled layer's where it is faster.

    Args:
        num_floats: that are read over and over, where processor time is counted; so many may fit into a cache.
    """
    dtype = torch.float32 if weights == "float32" else torch.int8
    if not arguments.processor_time:
        return [
            read_bandwidth(_CPU, seconds=0.5),
            max(matrix_peak(_CPU, dtype), _layer_rate(weights, time.perf_counter)),
        ]
    vector = torch.ones(1 << 13, dtype=torch.float32)
    matrix = torch.ones((1 << 7 if arguments.quick else -(-num_floats >> 13)), len(vector), dtype=torch.float32)
    block = matrix.view(-1)
    reads = [_seconds(work, time.process_time) for work in (block.sum, lambda: matrix @ vector)]
    return [4 * block.numel() / min(reads), _layer_rate(weights, time.process_time)]


def _layer_rate(weights: str, clock: Callable[[], float]) -> float:
    found = library()
    if found is None:
        return 0.0
    kind: WeightKind = "float32" if weights == "float32" else "int8"
    size, rows = 1024, 64
    layer = PackedLinear(found, torch.ones(size, size, dtype=torch.float32), None, kind)
    x = torch.ones(rows, size, dtype=torch.float32)
    return 2 * rows * size * size / _seconds(lambda: layer(x), clock)


def _seconds(work: Step, clock: Callable[[], float]) -> float:
    """Mean seconds of a run over half a second or so, the best of three."""
    work()
    best = float("inf")
    for _ in range(3):
        started, runs = clock(), 0
        while clock() - started < 0.2:
            work()
            runs += 1
        best = min(best, (clock() - started) / runs)
    return best


def _add_floor(row: dict[str, Any], model: KoDalle, bandwidth: float, peak: float, *, clock: str) -> None:
    sizes, own = model.config, model.config.image_seq_len / 2
    load = Workload(row["sequences"], 1, weight_bytes=_WEIGHT_BYTES[row["weights"]], kv_bytes=4)
    read_s, multiply_s = step_bytes(sizes, load, own) / bandwidth, step_flops(sizes, load, own) / peak
    row |= {
        "read_gb_per_s": round(bandwidth / 1e9, 1),
        "products_gop_per_s": round(peak / 1e9, 1),
        "read_floor_ms": round(1e3 * read_s, 2),
        "products_floor_ms": round(1e3 * multiply_s, 2),
    }
    for way in row["ways"].values():
        way["share_of_roofline"] = round(1e3 * max(read_s, multiply_s) / way[clock], 3)


def profile(model: KoDalle, weights: str, count: int) -> dict[str, Any]:
    """Milliseconds a step by operator of torch, the largest first, and calls a step."""
    sampler, num_steps = Sampler(model, weights=KINDS[weights], compiled=False), 8
    with evaluating(model):
        step = sampler_step(sampler, count)
        step()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            for _ in range(num_steps):
                step()
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    return {
        "calls": round(sum(event.count for event in events) / num_steps),
        "operators_ms": {
            event.key: round(event.self_cpu_time_total / 1e3 / num_steps, 2) for event in events[:_OPERATORS]
        },
        "others_ms": round(sum(event.self_cpu_time_total for event in events[_OPERATORS:]) / 1e3 / num_steps, 2),
    }


def _table(rows: list[dict[str, Any]]) -> str:
    cells = []
    for row in rows:
        for name, way in row["ways"].items():
            times = [f"{way[key]:.1f}" for key in ("best_ms", "median_ms", "cpu_ms")]
            floors = f"{row['read_floor_ms']:.1f} / {row['products_floor_ms']:.1f}"
            share = f"{100 * way['share_of_roofline']:.0f}%"
            cells.append([row["weights"], str(row["sequences"]), name, *times, floors, share])
    head = ["weights", "sequences", "way", "best ms", "median ms", "cpu ms", "floor ms: read / products", "roofline"]
    return table("a decode step", head, cells)


if __name__ == "__main__":
    raise SystemExit(main())
