"""What attention patterns save while decoding: python benchmarks/pattern_reads.py [--out DIR]

A layer with a pattern reads only the splits of the KV cache that hold cells which it may attend to (engine/decoding/pattern_places.py).
Per pattern and grid: the share of its own cells that a query may read, the share of the cache's places that are read for it, and the
time of a layer's attention over the cache beside that of full attention, medians over positions along the image, 16 sequences of
one caption of 129 positions, 8 heads of 64. Cells and places are what limits a processor with many sequences; the caption's
part is read by all. The last line is one JSON document.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any, get_args

import torch
from machine_facts import print_document

from engine.config.transformer import AttentionPattern
from engine.decoding.kv_cache import KVCache, Prefix, PrefixRef
from engine.facts import facts
from engine.files import write_json
from engine.models.whole_sequence import pattern_mask

_SEQUENCES, _PREFIX, _HEADS, _HEAD_DIM, _LAYERS = 16, 129, 8, 64, 2
_POINTS, _REPEATS = 24, 5
_CPU = torch.device("cpu")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=None, help="folder for the JSON document")
    parser.add_argument("--grids", type=int, nargs="+", default=[16, 32])
    arguments = parser.parse_args()
    rows = []
    for grid in arguments.grids:
        full_s = None
        for pattern in get_args(AttentionPattern):
            row = measure(pattern, grid)
            full_s = row["layer_ms"] if pattern == "full" else full_s
            row["time_over_full"] = round(row["layer_ms"] / full_s, 3)
            rows.append(row)
            print("  ".join(f"{key} {value}" for key, value in row.items()))
    document = {"benchmark": "pattern_reads", **facts(_CPU), "sequences": _SEQUENCES, "rows": rows}
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        write_json(arguments.out / "pattern_reads.json", document)
    print_document(document)
    return 0


@torch.inference_mode()
def measure(pattern: AttentionPattern, grid: int) -> dict[str, Any]:
    torch.manual_seed(0)
    cells = grid * grid
    shape = (_LAYERS, 1, _PREFIX, _HEADS, _HEAD_DIM)
    prefix = Prefix(torch.randn(shape), torch.randn(shape), torch.zeros(1, _HEADS * _HEAD_DIM))
    cache = KVCache(
        _SEQUENCES, cells - 1, (_LAYERS, _PREFIX, _HEADS, _HEAD_DIM), patterns=(pattern,) * _LAYERS, grid_size=grid,
        dtype=torch.float32, device=_CPU,
    )  # fmt: skip
    cache.set_prefixes({sequence: PrefixRef(prefix, 0) for sequence in range(_SEQUENCES)})
    qkv = torch.randn(_SEQUENCES, 1, 3, _HEADS, _HEAD_DIM)
    seconds, read = [], []
    for position in torch.linspace(0, cells - 2, _POINTS).long().tolist():
        cache.begin_step(torch.full((_SEQUENCES,), position), position)
        cache.append_and_attend(0, qkv)
        times = []
        for _ in range(_REPEATS):
            started = time.perf_counter()
            for layer in range(_LAYERS):
                cache.append_and_attend(layer, qkv)
            times.append((time.perf_counter() - started) / _LAYERS)
        seconds.append(statistics.median(times))
        assert cache._step is not None
        reads = cache._step.reads[pattern]
        read.append(len(reads.splits) * reads.mask.shape[-1])
    allowed = pattern_mask(pattern, 0, grid, _CPU).sum(1).double()
    return {
        "grid": grid,
        "pattern": pattern,
        "cells_allowed": round(float(allowed.mean()), 1),
        "places_read": round(statistics.fmean(read), 1),
        "layer_ms": round(1e3 * statistics.fmean(seconds), 3),
    }


if __name__ == "__main__":
    raise SystemExit(main())
