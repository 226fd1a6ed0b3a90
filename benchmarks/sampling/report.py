"""Report of the sampling benchmark: ratios between rows, and tables."""

import json
from collections.abc import Sequence
from typing import Any

from machine_facts import REPOSITORY, hardware_name
from text_table import NOT_MEASURED, seconds_text, table

from sampling.rows import PHASES, Row

_PUBLISHED = REPOSITORY / "benchmarks" / "published.json"
_NAMES = {
    "ours": "this engine",
    "uncached": "the ancestors' algorithm (no cache, joint head)",
    "cached": "a plain cached loop",
    "dalle-pytorch": "dalle-pytorch",
}


def published_rows() -> list[Row]:
    """Figures of others, on other hardware, each with `seconds_per_image` where it says for how many images."""
    rows = json.loads(_PUBLISHED.read_text(encoding="utf-8"))
    for row in rows:
        known = row["seconds"] is not None and row["images"] is not None
        row["seconds_per_image"] = sum(row["seconds"]) / 2 / row["images"] if known else None
        row["kind"] = "published, other hardware"
    return list(rows)


def ratios(rows: Sequence[Row]) -> list[Row]:
    """How many times longer each baseline takes than our row of the same variant and number of images.

    `tokens` compares prefill and decode; `with_codec` adds our own VQGAN and encoding to both sides, without ranking.
    """
    ours = {(row["variant"], row["images"]): row for row in rows if row["what"] == "ours"}
    found = []
    for row in rows:
        if row["what"] not in ("uncached", "cached", "dalle-pytorch") or "tokens_s" not in row:
            continue
        mine = ours[row["variant"], row["images"]]
        rest_s = mine["phases_s"]["vqgan"] + mine["phases_s"]["encoding"]
        found.append(
            {
                "against": row["what"],
                "variant": row["variant"],
                "images": row["images"],
                "tokens": row["tokens_s"] / mine["tokens_s"],
                "with_codec": (row["tokens_s"] + rest_s) / (mine["tokens_s"] + rest_s),
                "method": row["method"],
            }
        )
    return found


def tables(document: dict[str, Any]) -> str:
    """The whole document as tables."""
    sections = [
        _machine(document),
        _ours(document["rows"]),
        _baselines(document["rows"], document["ratios"]),
        _notes(document),
        _published(document["published"]),
    ]
    return "\n\n".join(sections)


def _machine(document: dict[str, Any]) -> str:
    rows = []
    for variant, rates in document["rates"].items():
        peaks = [
            f"{name.removesuffix('_flop_per_s')} {rate / 1e9:,.0f} GFLOP/s"
            for name, rate in rates.items()
            if name.endswith("_flop_per_s")
        ]
        rows.append([variant, f"{rates['read_bytes_per_s'] / 1e9:,.1f} GB/s", ", ".join(peaks)])
    title = f"{hardware_name(document)}, {document['threads']} threads, commit {document['commit']}, {document['date']}"
    return table(title, ["measured in the run of", "read", "matrix products"], rows)


def _ours(rows: Sequence[Row]) -> str:
    cells = [
        [
            f"{row['variant']}, {row['images']} of one caption",
            f"{seconds_text(row['total_s'])} ({row['spread_s'][0]:.3g}-{row['spread_s'][1]:.3g})",
            *(seconds_text(row["phases_s"][phase]) for phase in PHASES),
            f"{row['tokens_per_s']:,.0f}",
            f"{row['images_per_s']:.3g}",
            f"{row['bytes_per_step'] / 1e6:,.0f}",
            f"{row['share_of_roofline']['decode']:.0%}",
            f"{row['share_of_roofline']['total']:.0%}",
            f"{row['peak_memory_bytes'] / 2**30:.1f}",
        ]
        for row in rows
        if row["what"] == "ours"
    ]
    header = [
        "this engine",
        "total (range)",
        *PHASES,
        "tokens/s",
        "images/s",
        "MB/step",
        "roofline, decode",
        "all",
        "GiB",
    ]
    return table("Generation, ranked and encoded as PNG", header, cells)


def _baselines(rows: Sequence[Row], compared: Sequence[Row]) -> str:
    by_key = {(row["against"], row["variant"], row["images"]): row for row in compared}
    cells = []
    for row in sorted(rows, key=lambda row: (row["variant"], row["images"])):
        if row["what"] not in _NAMES:
            continue
        ratio = by_key.get((row["what"], row["variant"], row["images"]))
        cells.append(
            [
                f"{row['variant']}, {row['images']}: {_NAMES[row['what']]}",
                seconds_text(row.get("tokens_s")),
                f"{ratio['tokens']:.1f}x" if ratio else "",
                f"{ratio['with_codec']:.1f}x" if ratio else "",
                row["method"],
            ]
        )
    header = ["image tokens alone", "seconds", "ours is faster", "with VQGAN", "how"]
    return table("Beside it, in the same run", header, cells)


def _notes(document: dict[str, Any]) -> str:
    lines = []
    for row in document["rows"]:
        if row["what"] == "guidance":
            lines.append(
                f"{row['variant']}: guidance on {row['images']} sequences costs {row['ratio']:.2f}x the decode"
            )
        elif row["what"] == "prefill":
            lines.append(
                f"{row['variant']}: prefill of {row['images']} candidates of one caption is {row['share_of_work']:.4f} of "
                f"the FLOP of {row['images']} captions ({row['flop_one_caption'] / 1e9:,.1f} GFLOP)"
            )
    for variant, counts in document["equal_tokens"].items():
        lines.append(
            f"{variant}: {counts['equal']} of {counts['compared']} tokens are those of the ancestors' algorithm"
        )
    if document["gpu"] == NOT_MEASURED:
        lines.append("GPU: not measured (there is no CUDA device here)")
    lines += [f"{name}: failed with exit code {code}" for name, code in document["failed"].items()]
    return "\n".join(lines)


def _published(rows: Sequence[Row]) -> str:
    cells = [
        [
            row["system"],
            row["hardware"],
            str(row["images"] or "-"),
            "-" if row["seconds"] is None else "-".join(f"{value:g}" for value in dict.fromkeys(row["seconds"])),
            "-" if row["seconds_per_image"] is None else f"{row['seconds_per_image']:.2f}",
            row["covers"],
        ]
        for row in rows
    ]
    header = ["system", "hardware", "images", "seconds", "s/image", "what it covers"]
    return table("Published by others, on other hardware: not measured here", header, cells)
