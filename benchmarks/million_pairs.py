"""The plan for a million pairs: disk, memory and hours on one and on eight GPUs, from stored and published rates.

    python benchmarks/million_pairs.py benchmarks/results/prepare_scale/<hardware>.json --out benchmarks/results/million_pairs.json

Measures nothing but what it counts: FLOPs of the published sizes (configs/kodalle), without computing them. Preparing and
encoding on a CPU are the stored rates of `prepare_scale` times the number of pairs. For GPUs nothing was measured; hours there
are FLOPs over the peak of a card times the share of it that others have published (`published_training.json`), which says how
long a training takes that is as good as theirs. Prints a table and, as the last line, one JSON document.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from machine_facts import print_document
from sampling.plan import published_sizes
from text_table import table

from engine.files import write_json
from engine.measure import count_flops
from engine.models.transformer import KoDalle
from engine.models.vqgan import Vqgan

PAIRS = 1_000_000
EPOCHS = 5  # configs/kodalle/kodalle.yaml
_BACKWARD = 3  # forward and backward pass, in forward passes
_PEAKS = {"V100": 125e12, "A100": 312e12, "H100": 989e12}  # dense, FLOP/s, as published_training.json has them
_FOLDER = Path(__file__).resolve().parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measured", type=Path, help="a document of prepare_scale")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file")
    arguments = parser.parse_args()
    measured = json.loads(arguments.measured.read_text(encoding="utf-8"))
    published = json.loads((_FOLDER / "published_training.json").read_text(encoding="utf-8"))
    document = {
        "benchmark": "million_pairs",
        "measured": {name: measured[name] for name in ("commit", "date", "hardware")},
        "pairs": PAIRS,
        "epochs": EPOCHS,
        **plan(measured["parts"], published),
    }
    write_json(arguments.out, document)
    print(_table(document), end="\n\n")
    print_document(document)
    return 0


def plan(parts: dict[str, Any], published: list[dict[str, Any]]) -> dict[str, Any]:
    """What a million pairs take, by the measured `parts` and the published shares of peak."""
    flops = published_flops()
    photo, encode = parts["photo"], parts["encode"]
    small, large = (sorted((p for n, p in parts.items() if n.startswith(kind)), key=lambda p: p["pairs"])
                    for kind in ("prepare-", "read-"))  # fmt: skip
    growth = (small[-1]["peak_rss_mib"] - small[0]["peak_rss_mib"]) / (small[-1]["pairs"] - small[0]["pairs"])
    load_mib = large[-1]["load_mib"] / large[-1]["pairs"]
    return {
        "flops_an_image": flops,
        "disk_gb": {
            "png": round(photo["png"]["bytes_a_pair"] * PAIRS / 1e9, 1),
            "jpg": round(photo["jpg"]["bytes_a_pair"] * PAIRS / 1e9, 1),
            "token_shards": round(encode["shard_bytes_a_pair"] * PAIRS / 1e9, 2),
        },
        "core_hours": {
            "prepare_png": _hours(PAIRS / photo["png"]["pairs_per_cpu_s"]),
            "prepare_jpg": _hours(PAIRS / photo["jpg"]["pairs_per_cpu_s"]),
            "encode_on_cpu": _hours(PAIRS / encode["pairs_per_cpu_s"]),
            "hash": _hours(PAIRS / large[-1]["hashed_images_per_s"]),
        },
        "memory_gib": {
            "prepare": round((small[-1]["peak_rss_mib"] + growth * (PAIRS - small[-1]["pairs"])) / 1024, 2),
            "pairs_of_a_process": round(load_mib * PAIRS / 1024, 2),
        },
        "gpu_hours_by_published_shares": [
            {
                "as": f"{found['system']} on {found['hardware']}",
                "share_of_peak": found["share_of_peak"],
                "transformer": _hours(PAIRS * EPOCHS * flops["transformer_training"] / _rate(found)),
            }
            for found in published
        ],
    }


def published_flops() -> dict[str, int]:
    """FLOPs of one image at the published sizes, counted on shapes alone."""
    transformer, vqgan, _ = published_sizes()
    with torch.device("meta"), torch.no_grad():
        images = torch.zeros(1, 3, vqgan.image_size, vqgan.image_size)
        text, tokens = (
            torch.zeros(1, n, dtype=torch.int64) for n in (transformer.text_seq_len, transformer.image_seq_len)
        )
        model, codec = KoDalle(transformer), Vqgan(vqgan)
        _, forward = count_flops(lambda: model(text, tokens))
        _, encoding = count_flops(lambda: codec.quant_conv(codec.encoder(images)))
    return {"transformer_training": _BACKWARD * forward, "vqgan_encoding": encoding}


def _rate(found: dict[str, Any]) -> float:
    card = next(name for name in _PEAKS if name in found["hardware"])
    return _PEAKS[card] * float(found["share_of_peak"])


def _hours(seconds: float) -> float:
    return float(f"{seconds / 3600:.3g}")


def _table(document: dict[str, Any]) -> str:
    rows = [[f"{group}: {name}", f"{value:g}", ""] for group in ("disk_gb", "core_hours", "memory_gib")
            for name, value in document[group].items()]  # fmt: skip
    for found in document["gpu_hours_by_published_shares"]:
        how = f"at {found['share_of_peak']:.0%} of peak, as {found['as']}"
        rows.append(["hours of one GPU: transformer", f"{found['transformer']:g}", how])
        rows.append(
            ["hours of eight GPUs: transformer", f"{found['transformer'] / 8:.3g}", "an eighth: the share is of eight"]
        )
    return table(f"{document['pairs']:,} pairs, {document['epochs']} epochs", ["what", "value", "how"], rows)


if __name__ == "__main__":
    sys.exit(main())
