"""Each kernel against the same work in plain PyTorch, eager and compiled, and against the bytes that it must move.

    python benchmarks/kernel_speed.py
    python benchmarks/kernel_speed.py --rows 16 --dtype bfloat16 --out /tmp/kernels

On a GPU a kernel is timed as the sampler runs it: inside a CUDA graph, over as many copies of its inputs as the L2
cache cannot hold, since a step reads each layer's weights once. PyTorch gets the same. Without CUDA the reference's
sampling is timed against the usual one, and the kernels are listed as "not measured".
Prints a table and, as the last line, one JSON document, also stored in <out>/results/kernel_speed/<hardware>.json.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from kernel_cases import Case, PublishedSizes, Sizes, Work, cpu_cases, gpu_cases
from machine_facts import hardware_name, kept_when_stopped, print_document, slug
from text_table import NOT_MEASURED, table

from engine.device import fit_to_machine
from engine.facts import facts
from engine.files import write_json
from engine.measure import read_bandwidth, synchronize, time_runs

_FOLDER = Path(__file__).resolve().parent
_CPU_ROWS = 16
_COMPILED_ROWS = 16  # compiling takes seconds a shape
_L2_TIMES = 4
_MAX_COPIES = 64
_REPLAYS = 20

Row = dict[str, Any]


def main() -> int:
    arguments = _arguments()
    fit_to_machine()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    document: dict[str, Any] = {
        "benchmark": "kernel_speed",
        **facts(device),
        "config": {"rows": arguments.rows, "dtypes": arguments.dtype, "sizes": "published"},
        "read_bytes_per_s": read_bandwidth(device),
    }
    rows: list[Row] = []
    document["rows"] = rows
    with torch.inference_mode(), kept_when_stopped(document):
        for row in (_gpu_rows if device.type == "cuda" else _cpu_rows)(arguments, device, document["read_bytes_per_s"]):
            rows.append(row)
    write_json(arguments.out / "results" / "kernel_speed" / f"{slug(hardware_name(document))}.json", document)
    print(_table(document), end="\n\n")
    print_document(document)
    return 1 if "stopped" in document or any("error" in row for row in rows) else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measures the kernels; see the file's head.")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--dtype", nargs="+", choices=["float16", "bfloat16"], default=["bfloat16", "float16"])
    parser.add_argument("--out", type=Path, default=_FOLDER, help="folder for results/ (default: benchmarks/)")
    return parser.parse_args()


def _cpu_rows(arguments: argparse.Namespace, device: torch.device, read_bytes_per_s: float) -> Iterator[Row]:
    """The reference's sampling, and the kernels as not measured."""
    config = PublishedSizes()
    for name, make in cpu_cases(config, _CPU_ROWS).items():
        case = make()
        case.ours(), case.plain()
        ours, plain = [], []
        for _ in range(10):  # in turn: other load on the machine slows both
            ours += time_runs(case.ours, device, repeat=3)
            plain += time_runs(case.plain, device, repeat=3)
        row = {"kernel": f"reference: {name}", "rows": _CPU_ROWS, "dtype": "float32", "device": "cpu"}
        yield row | _figures(case, {"ours": ours, "eager": plain}, read_bytes_per_s)
    for name in gpu_cases(Sizes(config, 1, torch.bfloat16, device)):
        yield {"kernel": name, "device": "cuda", "method": NOT_MEASURED}


def _gpu_rows(arguments: argparse.Namespace, device: torch.device, read_bytes_per_s: float) -> Iterator[Row]:
    from triton.errors import TritonError

    for dtype in arguments.dtype:
        for num_rows in arguments.rows:
            sizes = Sizes(PublishedSizes(), num_rows, getattr(torch, dtype), device)
            for name, make in gpu_cases(sizes).items():
                row: Row = {"kernel": name, "rows": num_rows, "dtype": dtype, "device": "cuda"}
                print(f"{name}, {num_rows} rows, {dtype}", file=sys.stderr, flush=True)
                try:
                    compiled = num_rows == _COMPILED_ROWS and dtype == arguments.dtype[0]
                    row |= _gpu_figures(make, read_bytes_per_s, with_compiled=compiled)
                except (
                    RuntimeError,
                    ValueError,
                    ImportError,
                    TritonError,
                ) as error:  # the others are still worth having
                    row["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
                yield row
                if "captur" in row.get("error", ""):  # it may leave torch's allocator inside the capture
                    return


def _gpu_figures(make: Callable[[], Case], read_bytes_per_s: float, *, with_compiled: bool) -> Row:
    first = make()
    cached_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    copies = max(2, min(_MAX_COPIES, -(-_L2_TIMES * cached_bytes // first.num_bytes)))
    cases = [first, *(make() for _ in range(copies - 1))]
    seconds = {
        "ours": _graph_seconds([case.ours for case in cases]),
        "eager": _graph_seconds([case.plain for case in cases]),
    }
    if with_compiled:
        few = cases[:2]  # each is compiled again, for its own inputs
        torch._dynamo.reset()  # else shapes seen before make it compile for any shape
        seconds["compiled"] = _graph_seconds([torch.compile(case.plain, dynamic=False) for case in few])
    return _figures(first, seconds, read_bytes_per_s)


def _graph_seconds(works: list[Work]) -> list[float]:
    """Seconds of one of the works, once a replay of a graph of all of them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            for work in works:
                work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for work in works:
            work()
    device = torch.device("cuda")
    graph.replay()
    synchronize(device)
    seconds = []
    for _ in range(_REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        synchronize(device)
        seconds.append(start.elapsed_time(end) / 1000 / len(works))
    return seconds


def _figures(case: Case, seconds: dict[str, list[float]], read_bytes_per_s: float) -> Row:
    """Medians and spreads in microseconds, bytes, and the share of the time that the bytes alone would take."""
    row: Row = {"bytes": case.num_bytes, "floor_us": 1e6 * case.num_bytes / read_bytes_per_s}
    for name, values in seconds.items():
        row[f"{name}_us"] = 1e6 * statistics.median(values)
        row[f"{name}_spread_us"] = [1e6 * min(values), 1e6 * max(values)]
    row["gb_per_s"] = case.num_bytes / row["ours_us"] / 1e3
    row["share_of_bandwidth"] = row["floor_us"] / row["ours_us"]
    row["times_eager"] = row["eager_us"] / row["ours_us"]
    return row


def _table(document: dict[str, Any]) -> str:
    cells = []
    for row in document["rows"]:
        name = f"{row['kernel']}" + (f", {row['rows']} rows, {row['dtype']}" if "rows" in row else "")
        if "ours_us" not in row:
            cells.append([name, *[""] * 6, row.get("error", f"GPU: {NOT_MEASURED}")])
            continue
        spread = "-".join(_microseconds(value) for value in row["ours_spread_us"])
        cells.append(
            [
                name,
                _microseconds(row["ours_us"]),
                spread,
                _microseconds(row["eager_us"]),
                _microseconds(row["compiled_us"]) if "compiled_us" in row else "-",
                f"{row['times_eager']:.2f}x",
                f"{row['gb_per_s']:,.0f}",
                f"{row['share_of_bandwidth']:.0%}",
            ]
        )
    title = (
        f"{hardware_name(document)}, {document['read_bytes_per_s'] / 1e9:,.1f} GB/s read, commit {document['commit']}"
    )
    header = ["kernel", "us", "range", "eager us", "compiled us", "faster than eager", "GB/s", "of bandwidth"]
    return table(title, header, cells)


def _microseconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    sys.exit(main())
