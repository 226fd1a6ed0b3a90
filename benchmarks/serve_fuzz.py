"""Fuzzing: malformed requests to a running server must cause nothing worse than an error reply.

    python benchmarks/serve_fuzz.py --server direct --out benchmarks/results/serve_fuzz
    python benchmarks/serve_fuzz.py --server ray

Sends 10,000 valid requests mutated as bytes over raw sockets (tests/byte_mutants.py), and 3,000 requests generated from the
server's own OpenAPI document (tests/schema_cases.py). Counted as faults: a status of 500 and above, a reset connection, no
reply, an error without the error object, a reply that the document does not allow. Status 0 is an incomplete request, which
needs no reply. The server must still generate afterwards. The last line is one JSON document.
"""

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from machine_facts import REPOSITORY, print_document, store_served
from sampling.plan import write_random_model
from serving.client import closed_loop, served_model
from serving.process import Server, end_on_sigterm, serving
from serving.traffic import mixed

from engine.facts import facts

# Small jobs, and a short timeout for incomplete bodies: what is tested is request handling.
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
    parser.add_argument("--cases", type=int, default=3_000, help="least number of generated requests")
    parser.add_argument("--model", type=Path, help="model folder (default: a tiny one with random weights)")
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
            document["generates_afterwards"] = generates(server)
    document["is_met"] = is_met(document)
    store_served(document, arguments.out, prefix=f"{arguments.server}-")
    for name in ("mutants", "cases"):
        row = document[name]
        print(f"{name}: {row['sent']} sent in {row['seconds']:.0f} s, {row['num_faults']} faults, {row['statuses']}")
    print(f"generates afterwards: {document['draws_afterwards']}")
    print_document(document)
    return 0 if document["is_met"] else 1


def is_met(document: Row) -> bool:
    rows = [document["mutants"], document["cases"]]
    return document["generates_afterwards"] and all(row["num_faults"] == 0 for row in rows)


def send_mutants(server: Server, *, count: int, seed: int) -> Row:
    from tests.byte_mutants import attack
    from tests.serve.api.test_mutants import templates

    started_s = time.perf_counter()
    result = attack(int(server.address.rpartition(":")[2]), templates(), count=count, seed=seed)
    kept = [{"fault": fault, "request": request.decode("latin-1")} for fault, request in result.faults[:_FAULTS_KEPT]]
    return {
        "sent": result.sent,
        "num_faults": len(result.faults),
        "faults": kept,
        "statuses": {str(status): number for status, number in sorted(result.statuses.items())},
        "seconds": time.perf_counter() - started_s,
    }


def send_cases(server: Server, *, at_least: int, seed: int) -> Row:
    """Sends cases of increasing seeds until there are enough; stops at a fault, with schemathesis' own description."""
    from tests.schema_cases import send_cases as send

    started_s, sent, statuses, faults = time.perf_counter(), 0, dict[str, int](), list[Row]()
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
        "seconds": time.perf_counter() - started_s,
    }


def generates(server: Server) -> bool:
    """Whether three requests are answered with images."""
    run = asyncio.run(closed_loop(server.address, mixed(3, seed=5, sizes=(1,)), concurrency=1, timeout_s=60.0))
    return all(one.status == 200 for one in run.answers)


if __name__ == "__main__":
    sys.exit(main())
