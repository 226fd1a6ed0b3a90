"""Broken requests to a running server: none may cost more than a refusal.

    python benchmarks/serve_fuzz.py --server direct --out benchmarks/results/serve_fuzz
    python benchmarks/serve_fuzz.py --server ray

10,000 valid requests mutated as bytes and sent over raw sockets (tests/byte_mutants.py), and 3,000 requests generated
from the server's own OpenAPI document (tests/schema_cases.py). Counted as faults: a status of 500 and above, a reset
connection, no answer, a refusal without the error object, what the document does not promise. Among the statuses, 0 is a
request whose client ended it before it was whole: it needs no answer. The server must go on drawing afterwards. The last
line is one JSON document.
"""

import argparse
import asyncio
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from machine_facts import REPOSITORY, hardware_name, print_document, slug
from sampling.plan import write_random_model
from serving.client import closed_loop, served_model
from serving.process import Server, end_on_sigterm, serving
from serving.traffic import mixed

from engine.facts import facts
from engine.files import write_json

# Small drawings, and a client that never ends its body is given up soon: what is tested is the way there.
_ARGUMENTS: dict[str, Any] = {
    "page": False,
    "default_candidates": 1,
    "limits": {"max_candidates": 4, "max_images": 4, "body_timeout_s": 1.0},
}
_FAULTS_KEPT = 20
Row = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--server", choices=("direct", "ray"), default="direct")
    parser.add_argument("--mutants", type=int, default=10_000)
    parser.add_argument("--cases", type=int, default=3_000, help="at least so many generated ones")
    parser.add_argument("--model", type=Path, help="model folder (default: a tiny one of random weights)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="folder for the JSON document")
    arguments = parser.parse_args()
    end_on_sigterm()
    sys.path.insert(0, str(REPOSITORY))  # for tests/, which is no installed package
    document: Row = {"benchmark": "serve_fuzz", **facts(torch.device("cpu"))}
    document["config"] = {"server": arguments.server, "seed": arguments.seed}
    with tempfile.TemporaryDirectory(prefix="serve-fuzz-") as folder:
        model = arguments.model or Path(folder, "tiny-random")
        if arguments.model is None:
            write_random_model(model, tiny=True)
        with serving(arguments.server, {"model": str(model), **_ARGUMENTS}) as server:
            document["config"]["model"] = asyncio.run(served_model(server.address))
            document["mutants"] = send_mutants(server, count=arguments.mutants, seed=arguments.seed)
            document["cases"] = send_cases(server, at_least=arguments.cases, seed=arguments.seed)
            document["draws_afterwards"] = draws(server)
    document["hardware"]["load_after"] = round(os.getloadavg()[0], 2)
    document["is_met"] = is_met(document)
    if arguments.out is not None:
        write_json(arguments.out / f"{arguments.server}-{slug(hardware_name(document))}.json", document)
    for name in ("mutants", "cases"):
        row = document[name]
        print(f"{name}: {row['sent']} sent in {row['seconds']:.0f} s, {row['num_faults']} faults, {row['statuses']}")
    print(f"draws afterwards: {document['draws_afterwards']}")
    print_document(document)
    return 0 if document["is_met"] else 1


def is_met(document: Row) -> bool:
    rows = [document["mutants"], document["cases"]]
    return document["draws_afterwards"] and all(row["num_faults"] == 0 for row in rows)


def send_mutants(server: Server, *, count: int, seed: int) -> Row:
    from tests.byte_mutants import attack
    from tests.serve.api.test_mutants import templates

    begun = time.perf_counter()
    result = attack(int(server.address.rpartition(":")[2]), templates(), count=count, seed=seed)
    kept = [{"fault": fault, "request": request.decode("latin-1")} for fault, request in result.faults[:_FAULTS_KEPT]]
    return {
        "sent": result.sent,
        "num_faults": len(result.faults),
        "faults": kept,
        "statuses": {str(status): number for status, number in sorted(result.statuses.items())},
        "seconds": time.perf_counter() - begun,
    }


def send_cases(server: Server, *, at_least: int, seed: int) -> Row:
    """Goes on with other seeds until there were enough; a fault ends it, and is told as schemathesis words it."""
    from tests.schema_cases import send_cases as send

    begun, sent, statuses, faults = time.perf_counter(), 0, dict[str, int](), list[Row]()
    per_operation = max(2, min(200, at_least // 12))
    while sent < at_least and not faults:
        try:
            outcome = send(server.address, per_operation=per_operation, seed=seed)
        except (AssertionError, BaseExceptionGroup) as error:
            faults.append(
                {"fault": str(error), "request": "\n".join(str(one) for one in getattr(error, "exceptions", ()))}
            )
            break
        seed += 1
        sent += outcome.sent
        for status, number in outcome.statuses.items():
            statuses[str(status)] = statuses.get(str(status), 0) + number
    return {
        "sent": sent,
        "num_faults": len(faults),
        "faults": faults,
        "statuses": dict(sorted(statuses.items())),
        "seconds": time.perf_counter() - begun,
    }


def draws(server: Server) -> bool:
    """Whether three requests are answered with pictures."""
    run = asyncio.run(closed_loop(server.address, mixed(3, seed=5, sizes=(1,)), concurrency=1, timeout_s=60.0))
    return all(one.status == 200 for one in run.answers)


if __name__ == "__main__":
    sys.exit(main())
