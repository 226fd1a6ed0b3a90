"""The serving benchmark's document as tables, and its results against their targets."""

from collections.abc import Callable, Sequence
from typing import Any

from machine_facts import hardware_name
from text_table import seconds_text, table

from serving.goodput import rates_of

Row = dict[str, Any]
_NAMES = {
    "engine": "engine alone",
    "pipeline": "Pipeline, no encoding",
    "direct": "ours, one process",
    "ray": "ours, Ray Serve",
    "stock": "stock @serve.batch",
}
_NO_VALUE = "-"


def bars(document: Row) -> list[Row]:
    """Each result that has a target: what, server, value, bar, whether it is met."""
    rows = []
    for kind, share in document.get("saturation", {}).get("shares", {}).items():
        rows.append(_bar("throughput over the engine's", kind, share["median"], 0.9, is_met=share["median"] >= 0.9))
    for kind, row in document.get("concurrency_one", {}).get("servers", {}).items():
        added_ms = row["added_ms"]["median"]
        rows.append(_bar("ms added to one request, median", kind, added_ms, 5.0, is_met=added_ms <= 5.0))
    ratio = document.get("goodput", {}).get("ratio")
    if ratio is not None:
        rows.append(_bar("goodput over stock's", "", ratio, 3.0, is_met=ratio >= 3.0))
    for row in document.get("overload", []):
        deadline = f"deadline {row['deadline_s']:.3g} s"
        if row["refused_s"] is not None:
            p99_s = row["refused_s"]["p99"]
            rows.append(_bar(f"s until refused, p99, {deadline}", row["server"], p99_s, 0.1, is_met=p99_s <= 0.1))
        lost = row["admitted_not_answered"]
        rows.append(_bar(f"admitted and not answered, {deadline}", row["server"], lost, 0, is_met=lost == 0))
    return rows


def _bar(what: str, server: str, value: float, bar: float, *, is_met: bool) -> Row:
    return {"what": what, "server": server, "value": value, "bar": bar, "is_met": is_met}


def tables(document: Row) -> str:
    """Tables of all measured parts."""
    parts = [_head(document), _calibration(document["calibration"])]
    makers: dict[str, Callable[[Any], str]] = {
        "saturation": _saturation,
        "concurrency_one": _concurrency_one,
        "goodput": _goodput,
        "sizes": _sizes,
        "fairness": _fairness,
        "overload": _overload,
    }
    parts += [make(document[name]) for name, make in makers.items() if name in document]
    rows = [
        [row["what"], _NAMES.get(row["server"], ""), f"{row['value']:.3g}", f"{row['bar']:g}", _yes(row["is_met"])]
        for row in document["bars"]
    ]
    parts.append(table("Against the bars", ["figure", "server", "value", "bar", "met"], rows))
    return "\n\n".join(parts)


def _head(document: Row) -> str:
    idle = ", ".join(f"{_NAMES[kind]} {share:.2f}" for kind, share in document["idle_cores"].items())
    model = document["config"]["model"]
    load = f"{document['hardware']['load_before']}, after it {document['hardware']['load_after']}"
    return "\n".join(
        [
            f"{hardware_name(document)}, commit {document['commit']}, {document['date']}",
            f"model: {model['id']}, {model['num_parameters'] / 1e6:.1f} M parameters, {model['image_size']} pixels",
            f"load average before the run {load}",
            f"cores in use by idle servers: {idle}",
        ]
    )


def _calibration(row: Row) -> str:
    equal = row["equal_images"]
    rows = [
        [
            _NAMES[kind],
            seconds_text(one["unloaded_s"]["p50"]),
            seconds_text(one["unloaded_s"]["p95"]),
            f"{one['requests_per_s']:.2f}",
            f"{equal['equal'][kind]} of {equal['compared']}",
        ]
        for kind, one in row["servers"].items()
    ]
    header = ["server", "unloaded p50", "p95", "saturated requests/s", "images equal to the first server's"]
    return table("Calibration, requests of 1, 4 and 16 candidates", header, rows)


def _saturation(row: Row) -> str:
    rows = []
    for way, rate in row["requests_per_s"].items():
        share = row["shares"].get(way)
        share_text = _NO_VALUE if share is None else f"{share['median']:.1%} ({share['least']:.1%}-{share['most']:.1%})"
        per_s = f"{rate['median']:.2f} ({rate['least']:.2f}-{rate['most']:.2f})"
        cpu_s = row["cpu_s_per_request"][way]["median"]
        rows.append([_NAMES[way], per_s, f"{row['images_per_s'][way]:.1f}", f"{cpu_s:.2f}", share_text])
    header = ["saturated", "requests/s (range)", "images/s", "CPU s per request", "share of the engine's own, by round"]
    return table("Throughput with a constant backlog", header, rows)


def _concurrency_one(row: Row) -> str:
    rows = []
    for way, total in row["total_s"].items():
        one = row["servers"].get(way)
        cells = [_NO_VALUE] * 5
        if one is not None:
            low, high = one["worker_against_alone_ms"]["quartiles"]
            cells = [
                f"{one['added_ms']['median']:.2f}",
                f"{one['added_ms']['p95']:.2f}",
                f"{one['mean_ms']['client_to_api_server']:.2f}",
                f"{one['mean_ms']['api_server_to_worker']:.2f}",
                f"{one['worker_against_alone_ms']['median']:+.1f} ({low:+.1f} to {high:+.1f})",
            ]
        rows.append([_NAMES[way], seconds_text(total["p50"]), seconds_text(total["p95"]), *cells])
    header = [
        "one at a time", "p50", "p95", "added ms, median", "p95", "client to API server, mean", "API server to worker, mean",
        "worker in server minus alone, ms (middle half)",
    ]  # fmt: skip
    return table("A single request", header, rows)


def _goodput(row: Row) -> str:
    kinds = list(row["found_rates"])
    title = f"Goodput: {row['good_share']:.0%} within {seconds_text(row['bound_s'])}"
    title += "" if row["ratio"] is None else f"; ours / stock {row['ratio']:.2f}"
    if row["stock_tuning"] is not None:
        chosen = row["stock_tuning"]["chosen"]
        title += f"; stock tuned to {chosen['max_batch_size']} requests, {chosen['batch_wait_timeout_s']} s"
    rows = [
        [
            _NAMES[kind],
            f"{point['rate']:.2f}",
            f"{point['share_within']:.1%}",
            *(_of_all(point["latency_of_all_s"][name]) for name in ("p50", "p95", "p99")),
            _yes(point["is_held"]),
        ]
        for kind in kinds
        for point in rates_of(row["points"], kind)
    ]
    found = ", ".join(f"{_NAMES[kind]} {row['found_rates'][kind]:.2f}" for kind in kinds)
    header = ["server", "offered/s", "within", "p50", "p95", "p99", "held"]
    return table(f"{title}\nhighest rate that held: {found}", header, rows)


def _sizes(row: Row) -> str:
    rows = [
        [size, str(one["requests"]), *(_latency(one["latency_s"], name) for name in ("p50", "p95", "p99", "most"))]
        for size, one in row["by_size"].items()
    ]
    title = f"Latency by size, {_NAMES[row['server']]} at {row['rate']:.2f} requests/s"
    return table(title, ["candidates", "requests", "p50", "p95", "p99", "most"], rows)


def _fairness(row: Row) -> str:
    rows = []
    for kind, one in row["servers"].items():
        for name in ("alone", "beside_greedy"):
            waits = one[name]
            cells = [_latency(waits["latency_s"], which) for which in ("p50", "most")]
            cells += [_latency(waits["queue_s"], which) for which in ("p50", "most")]
            rows.append([_NAMES[kind], name.replace("_", " "), str(waits["requests"]), *cells])
    header = ["server", "modest sender", "requests", "p50", "most", "of it in the queue, p50", "most"]
    return table(f"Fairness: requests of {row['modest_candidates']} candidates", header, rows)


def _overload(rows: Sequence[Row]) -> str:
    cells = [
        [
            _NAMES[row["server"]],
            seconds_text(row["deadline_s"]),
            f"{row['rate']:.1f}",
            f"{row['share_refused']:.0%}",
            f"{row['refused_with_retry_after']} of {row['refused']}",
            _latency(row["refused_s"], "p50"),
            _latency(row["refused_s"], "p99"),
            str(row["answered"]),
            _latency(row["latency_s"], "most"),
            str(row["admitted_not_answered"]),
        ]
        for row in rows
    ]
    header = [
        "server", "deadline", "offered/s", "refused", "with Retry-After", "refused p50", "p99", "answered", "slowest", "lost",
    ]  # fmt: skip
    return table("Overload", header, cells)


def _latency(values: Row | None, name: str) -> str:
    return _NO_VALUE if values is None else seconds_text(values[name])


def _of_all(seconds: float | None) -> str:
    return "never" if seconds is None else seconds_text(seconds)


def _yes(flag: bool) -> str:
    return "yes" if flag else "no"
