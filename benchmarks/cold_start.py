"""Where the time of a first picture goes: `kodalle generate` in a fresh process, part by part.

    python benchmarks/cold_start.py                                 models/clothing, 1 and 16 candidates, one thread and all
    python benchmarks/cold_start.py --candidates 1 --threads 1 --repeat 5
    python benchmarks/cold_start.py --name busy                     stored under a name of its own

Each run is a process that does what the command does, in its order, and says when each part ended:

    interpreter   Python until its first line
    commands      the command line: Typer, the options of all commands
    arguments     what checks them: pydantic, Pillow, numpy; the checks themselves
    torch         `import torch`
    engine        the rest of the imports
    loading       a model folder to networks, of which: digests (SHA256SUMS), tokenizers, codec (copies, packed weights)
    prefill, decode, vqgan, ranking, encoding      as result.json has them
    exit          from the last line to the end of the process

Beside them, in turns: `import torch` alone, and the imports that transformers' RoBERTa costs. Processor seconds (user and system, all
threads) stand beside wall seconds: on a busy machine only they compare. Files are in the page cache after the first run, which is
left out. The last line is one JSON document, also stored in <out>/results/cold_start/<hardware><name>.json.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from machine_facts import REPOSITORY, child_environment, print_document, store_document
from text_table import table

from engine.facts import facts

_ALONE = {
    "torch": "import torch",
    "torch and transformers' RoBERTa": "import torch; from transformers import RobertaModel",
}
_UNNEEDED = ("transformers", "sympy", "torch._dynamo", "triton", "onnx", "huggingface_hub", "rich")
_PROCESS = """
import json, sys, time
from pathlib import Path
model, caption, candidates, out, start = *sys.argv[1:5], float(sys.argv[5])
parts, last = {}, start

def ended(name):
    global last
    now = time.monotonic()
    parts[name], last = now - last, now

ended("interpreter")
import engine.cli
ended("commands")
import engine.commands.generate
ended("arguments")
import gc
gc.disable()
import torch
ended("torch")
import engine.device, engine.pipeline.pipeline as pipeline, engine.models.folder as folder
gc.enable()
ended("engine")
within = dict.fromkeys(("digests", "tokenizers", "codec"), 0.0)

def timed(owner, function, name):
    called = getattr(owner, function)
    def wrapper(*args, **kwargs):
        before = time.monotonic()
        try:
            return called(*args, **kwargs)
        finally:
            within[name] += time.monotonic() - before
    setattr(owner, function, wrapper)

timed(folder, "check_sums", "digests")
timed(folder, "load_tokenizer", "tokenizers")
timed(pipeline, "open_codec", "codec")
sys.argv = ["kodalle", "generate", model, caption, "--seed", "7", "--candidates", candidates, "--out", out]
try:
    engine.cli.main()
except SystemExit as error:
    assert not error.code, error.code
ended("command")
parts |= json.loads((Path(out) / "result.json").read_text(encoding="utf-8"))["timings_s"]
print(json.dumps({"parts": parts, "of_loading": within, "modules": len(sys.modules), "names": sorted(sys.modules), "end": time.monotonic()}))
"""


def main() -> int:
    arguments = _arguments()
    model = REPOSITORY / "models" / "clothing"
    caption = json.loads((model / "captions.json").read_text(encoding="utf-8"))["examples"][0]
    document: dict[str, Any] = {"benchmark": "cold_start", **facts(torch.device("cpu"))}
    document["config"] = {"model": "models/clothing", "caption": caption, "repeat": arguments.repeat}
    document["rows"], document["alone"] = [], []
    threads = arguments.threads or sorted({1, document["hardware"]["cores"]})
    for count in threads:
        os.environ["OMP_NUM_THREADS"] = str(count)
        for candidates in arguments.candidates:
            runs = [_run(model, caption, candidates) for _ in range(arguments.repeat + 1)][1:]
            document["rows"].append({"threads": count, "candidates": candidates, **_median(runs)})
    os.environ["OMP_NUM_THREADS"] = "1"
    for name, code in _ALONE.items():
        timings = [_process([sys.executable, "-c", code]) for _ in range(arguments.repeat)]
        document["alone"].append({"imports": name, **_spread(timings)})
    _print(document)
    tag = f"-{arguments.name}" if arguments.name else ""
    store_document(document, arguments.out, quick=False, tag=tag)
    print_document(document)
    return 0


def _run(model: Path, caption: str, candidates: int) -> dict[str, Any]:
    """One process: its parts, and all of it."""
    with tempfile.TemporaryDirectory() as out:
        start = time.monotonic()
        arguments = [str(model), caption, str(candidates), out, str(start)]
        found = _process([sys.executable, "-c", _PROCESS, *arguments])
    reported = json.loads(found.pop("stdout").splitlines()[-1])
    parts: dict[str, float] = reported["parts"]
    named = sum(parts[name] for name in ("loading", "prefill", "decode", "vqgan", "ranking", "encoding"))
    parts["rest"] = parts.pop("command") - named
    parts["exit"] = start + found["wall_s"] - reported["end"]
    unneeded = [name for name in _UNNEEDED if name in reported["names"]]
    return {
        **found, "parts_s": parts, "of_loading_s": reported["of_loading"], "modules": reported["modules"], "unneeded": unneeded
    }  # fmt: skip


def _process(command: list[str]) -> dict[str, Any]:
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=child_environment(), cwd=REPOSITORY)
    wall_s, after = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall_s": wall_s, "cpu_s": cpu_s, "stdout": done.stdout}


def _median(runs: list[dict[str, Any]]) -> dict[str, Any]:
    row = _spread(runs)
    for key in ("parts_s", "of_loading_s"):
        row[key] = {name: round(statistics.median(run[key][name] for run in runs), 3) for name in runs[0][key]}
    return row | {"modules": runs[0]["modules"], "unneeded": runs[0]["unneeded"]}


def _spread(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Median, best and worst of wall and processor seconds."""
    row: dict[str, Any] = {}
    for key in ("wall_s", "cpu_s"):
        values = [run[key] for run in runs]
        row |= {
            key: round(statistics.median(values), 2),
            f"{key}_range": [round(min(values), 2), round(max(values), 2)],
        }
    return row


def _print(document: dict[str, Any]) -> None:
    rows = document["rows"]
    lines = [["", *(f"{row['candidates']} candidates, {row['threads']} threads" for row in rows)]]
    lines += [[name, *(f"{row['parts_s'][name]:.2f}" for row in rows)] for name in rows[0]["parts_s"]]
    lines += [[name, *(f"{row[name]:.2f}" for row in rows)] for name in ("wall_s", "cpu_s")]
    print(table("seconds", lines[0], lines[1:]))
    for row in document["alone"]:
        print(f"{row['imports']}: {row['wall_s']:.2f} s, {row['cpu_s']:.2f} s of the processor")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--candidates", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--threads", type=int, nargs="+", default=None, help="default: 1, and one a core")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--name", default="", help="end of the stored file's name")
    parser.add_argument("--out", type=Path, default=None)
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
