"""Fault injection: kills trainings and spoils what they write, and counts what is lost.

    python benchmarks/train_faults.py --out benchmarks/results/train_faults           about ten minutes
    python benchmarks/train_faults.py --kills 5 --faults 20 --stops 2 --launched 0

A call with 0 of a phase keeps what an earlier call at the same commit stored of it, so that the whole may be measured in pieces.

    kills      SIGKILL at random steps                                          bar: losses and weights equal bit for bit
    faults     at random write points: kill, disk full, I/O error, and writes that are cut short, have a bit flipped or are
               zeroed without a word; and the same three of a finished checkpoint at rest
                                              bar: always resumes, never from a broken checkpoint, never without a whole one
    stops      SIGTERM to a training, and to `kodalle train` above it           bar: a complete checkpoint within 25 s
    changes    another number of ranks or ZeRO stage on resumption              bar: works or is refused in one line

A tiny KoDALLE trains on the CPU through the real entry point, with a checkpoint at every step or every second one. Faults
are injected below Python, by a preloaded library (benchmarks/training/write_faults.c), into all that is written in the
run's folder: token shards, checkpoints, logs, exported models. Each next process resumes what the one before left.

The last line is one JSON document.
"""

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from machine_facts import child_environment, hardware_name, print_document, slug
from training.fault_bed import (
    SILENT,
    STEPS,
    Bed,
    Findings,
    Row,
    check_finished,
    check_resumption,
    check_stopped,
    checkpoint_folders,
    fault_of,
    file_digests,
    is_one_line,
    last_logged_step,
    make_bed,
    newest_whole,
)
from training.fault_process import Ended, import_training, start_with_faults, train

from engine.facts import facts
from engine.files import write_json

STOP_BAR_S = 25.0
WRITE_FAULTS = ("kill", "disk_full", "io_error", *SILENT)
REST_FAULTS = ("truncated_at_rest", "flipped_bit_at_rest", "zeroed_at_rest")
_LARGER = (
    "model.dim=512",
    "model.num_layers=6",
    "model.num_heads=8",
)  # 19 M parameters: steps and files that take time


def kills(bed: Bed, count: int) -> Row:
    """SIGKILL before or after the update of a random step."""
    found = Findings()
    shutil.rmtree(bed.run, ignore_errors=True)
    while found.by_kind.total() < count:
        newest = newest_whole(bed.run)
        ended = _train_until(bed, bed.rng.randint(1, STEPS), updated=bed.rng.random() < 0.5)
        check_resumption(found, ended, newest)
        if ended.code == -signal.SIGKILL:
            found.by_kind["kill"] += 1
        else:
            check_finished(found, bed, ended)
    check_finished(found, bed, train(bed.config, bed.run, "loop.checkpoint_every=2"))
    return found.row() | {"is_met": not found.broken}


def faults(bed: Bed, count: int) -> Row:
    """A fault at a random write point, or of the newest checkpoint at rest; the next process goes on from there."""
    found = Findings()
    shutil.rmtree(bed.run, ignore_errors=True)
    for number in range(count):
        kind = (WRITE_FAULTS + REST_FAULTS)[number % (len(WRITE_FAULTS) + len(REST_FAULTS))]
        if kind in REST_FAULTS:
            _spoil_at_rest(found, bed, kind)
        else:
            _spoil_writes(found, bed, kind)
    check_finished(found, bed, train(bed.config, bed.run))
    return found.row() | {"is_met": not found.broken}


def _train_until(bed: Bed, last: int, *, updated: bool = True) -> Ended:
    """A training that is killed in step number `last`, before or after the weights are updated, if it comes to it."""
    from engine.training.trainer import Trainer

    step = Trainer._step

    def killed(self: Trainer, batches: Any) -> Any:
        is_last = self.progress.step + 1 == last
        if is_last and not updated:
            os.kill(os.getpid(), signal.SIGKILL)
        scalars = step(self, batches)
        if is_last:
            os.kill(os.getpid(), signal.SIGKILL)
        return scalars

    def patch() -> None:  # in the child alone
        Trainer._step = killed  # type: ignore[method-assign]

    return train(bed.config, bed.run, "loop.checkpoint_every=2", before=patch)


def _spoil_writes(found: Findings, bed: Bed, kind: str) -> None:
    while True:
        newest = newest_whole(bed.run)
        ended = train(bed.config, bed.run, fault=bed.write_fault(kind))
        check_resumption(found, ended, newest)
        found.check("a whole checkpoint is left", newest is None or newest_whole(bed.run) is not None, ended)
        if ended.struck:
            break
        check_finished(found, bed, ended)  # it came to its end before that write point
    found.by_kind[kind] += 1
    if kind == "kill":
        found.check("the kill ended it", ended.code == -signal.SIGKILL, ended)
    elif ended.code:
        # a silent fault may be found by what reads the file next
        found.check("one line names the fault", is_one_line(ended, r"(disk|token_shards): \S+: .*"), ended)
    else:
        found.check("a silent fault may pass", kind not in ("disk_full", "io_error"), ended)
        check_finished(found, bed, ended)


def _spoil_at_rest(found: Findings, bed: Bed, kind: str) -> None:
    """Spoils a file of the newest checkpoint between two processes."""
    while len(checkpoint_folders(bed.run)) < 2:  # a first checkpoint may be the only one
        ended = train(bed.config, bed.run, fault=bed.write_fault("kill"))
        if not ended.struck:
            check_finished(found, bed, ended)
    newest = checkpoint_folders(bed.run)[0]
    others = [path for path in checkpoint_folders(bed.run)[1:] if fault_of(path) is None]
    file = bed.rng.choice(sorted(path for path in newest.rglob("*") if path.is_file() and path.stat().st_size))
    whole = file.read_bytes()
    file.write_bytes(_spoiled(whole, kind, bed.rng))
    found.by_kind[kind] += 1
    if not others:
        ended = train(bed.config, bed.run)
        found.check("with none left it is refused", is_one_line(ended, r"checkpoint: .*no other can be used.*"), ended)
        found.refused += 1
        file.write_bytes(whole)
        return
    ended = train(bed.config, bed.run, fault=bed.write_fault("kill"))
    if newest.name not in ended.printed and ended.struck and "resuming" not in ended.printed:
        found.check("killed before it resumed", ended.code == -signal.SIGKILL, ended)
        return
    passed_over = re.search(rf"note: checkpoint \S*{newest.name} is passed over: it ", ended.printed)
    found.check("the broken one is named", passed_over is not None, ended)
    found.passed_over += 1
    check_resumption(found, ended, others[0])


def _spoiled(whole: bytes, kind: str, rng: random.Random) -> bytes:
    place = rng.randrange(len(whole))
    if kind.startswith("truncated"):
        return whole[:place]
    if kind.startswith("zeroed"):
        return whole[:place] + bytes(len(whole) - place) if any(whole[place:]) else bytes(len(whole))
    spoiled = bytearray(whole)
    spoiled[place] ^= 1 << rng.randrange(8)
    return bytes(spoiled)


def stops(bed: Bed, count: int) -> Row:
    """SIGTERM to a training at a random moment."""
    found = Findings()
    seconds: list[float] = []
    while len(seconds) < count:
        shutil.rmtree(bed.run, ignore_errors=True)
        after_s = bed.rng.uniform(0, 1)
        sent_s: list[float] = []

        def stop(pid: int, after_s: float = after_s, sent_s: list[float] = sent_s) -> None:
            while not (bed.run / "log.jsonl").exists() and psutil.pid_exists(pid):
                time.sleep(0.005)
            time.sleep(after_s)
            sent_s.append(time.monotonic())
            os.kill(pid, signal.SIGTERM)

        ended = train(bed.config, bed.run, "loop.steps=2000", "loop.checkpoint_every=2000", meanwhile=stop)
        seconds.append(time.monotonic() - sent_s[0])
        found.by_kind["stop"] += 1
        check_stopped(found, ended, bed.run)
    row = found.row() | {"seconds": _spread(seconds)}
    return row | {"is_met": not found.broken and max(seconds) < STOP_BAR_S}


def launched(bed: Bed, count: int) -> Row:
    """SIGTERM and SIGINT to `kodalle train`: DeepSpeed's launcher and its training are below it."""
    found = Findings()
    seconds = []
    for number in range(count):
        shutil.rmtree(bed.run, ignore_errors=True)
        sent = (signal.SIGTERM, signal.SIGINT)[number % 2]
        command = [sys.executable, "-m", "engine.cli", "train", str(bed.config), f"run={bed.run}"]
        command += ["loop.steps=20000", "loop.checkpoint_every=20000", "data.num_workers=2", *_LARGER]
        environment = {name: value for name, value in child_environment().items() if name != "LD_PRELOAD"}
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        while last_logged_step(bed.run) == 0 and process.poll() is None:
            time.sleep(0.05)
        time.sleep(bed.rng.uniform(0, 3))
        below = psutil.Process(process.pid).children(recursive=True)
        sent_s = time.monotonic()
        process.send_signal(sent)
        printed, _ = process.communicate(timeout=300)
        seconds.append(time.monotonic() - sent_s)
        ended = Ended(process.returncode, printed, struck=True, write_points=0, seconds=seconds[-1])
        found.by_kind[sent.name] += 1
        found.check("nothing is left running", not [one for one in below if one.is_running()], ended)
        check_stopped(found, ended, bed.run, 128 + sent)
    row = found.row() | {"seconds": _spread(seconds)}
    return row | {"is_met": not found.broken and max(seconds) < STOP_BAR_S}


def changes(bed: Bed, _: int) -> Row:
    """Two ranks, or another ZeRO stage, where the run had one and stage 0."""
    found = Findings()
    shutil.rmtree(bed.run, ignore_errors=True)
    started = _train_until(bed, STEPS // 2 + 1)
    found.check(
        "there is something to resume", started.code == -signal.SIGKILL and newest_whole(bed.run) is not None, started
    )
    before = file_digests(bed.run)

    for stage in (1, 2, 3):
        ended = train(bed.config, bed.run, f"deepspeed.zero_optimization.stage={stage}")
        found.by_kind[f"zero_{stage}"] += 1
        found.check("refused", is_one_line(ended, r"deepspeed.zero_optimization: .*was started with.*"), ended)
    ended = _two_ranks(bed)
    found.by_kind["ranks_2"] += 1
    found.check("refused", is_one_line(ended, r"number of processes: 2: .*start as many.*"), ended)
    found.check("nothing is touched", file_digests(bed.run) == before, ended)
    ended = train(bed.config, bed.run, "loop.checkpoint_every=2")
    check_finished(found, bed, ended)
    return found.row() | {"is_met": not found.broken}


PHASES: dict[str, Callable[[Bed, int], Row]] = {
    "kills": kills,
    "faults": faults,
    "stops": stops,
    "launched": launched,
    "changes": changes,
}


def _two_ranks(bed: Bed) -> Ended:
    """Rank 0's end; the other one is ended with it, as a launcher does."""
    from engine.training.process_group import free_port

    port = str(free_port())

    def become(rank: int) -> Callable[[], None]:
        def change() -> None:
            os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}

        return change

    other = os.fork()
    if other == 0:
        try:
            train(bed.config, bed.folder / "rank-1", f"run={bed.run}", before=become(1), meanwhile=_end_with_parent)
        finally:
            os._exit(0)  # whatever happens: past this point the bed would be cleared away under the other rank
    try:
        return train(bed.config, bed.run, before=become(0))
    finally:
        os.kill(other, signal.SIGTERM)
        os.waitpid(other, 0)


def _end_with_parent(pid: int) -> None:
    """In rank 1's parent: a signal to it ends rank 1."""

    def end(_number: int, _frame: object) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself and been waited for
            os.kill(pid, signal.SIGKILL)
        os._exit(0)

    signal.signal(signal.SIGTERM, end)


def _spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {"least": ordered[0], "median": ordered[len(ordered) // 2], "most": ordered[-1]}


def _join(document: Row, file: Path) -> None:
    """Adds the phases that an earlier call measured at the same commit and were left out now, with its seconds."""
    if not file.is_file():
        return
    before = json.loads(file.read_text(encoding="utf-8"))
    left_out = {name: row for name, row in before["phases"].items() if name not in document["phases"]}
    if left_out and before["commit"] == document["commit"]:
        document["phases"] = {
            name: (left_out | document["phases"])[name] for name in PHASES if name in left_out | document["phases"]
        }
        document["seconds"] = round(document["seconds"] + before["seconds"], 1)
        document["arguments"] = {
            name: before["arguments"][name] if name in left_out else value
            for name, value in document["arguments"].items()
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--stops", type=int, default=10, help="SIGTERM to a training")
    parser.add_argument("--launched", type=int, default=4, help="SIGTERM and SIGINT to `kodalle train`")
    parser.add_argument("--changes", type=int, default=1, help="0: none")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="folder for the document")
    parser.add_argument("--build", type=Path, help=argparse.SUPPRESS)  # the compiled library's; given to itself
    arguments = parser.parse_args()
    if arguments.build is None:
        start_with_faults(Path(tempfile.mkdtemp(prefix="kodalle-faults-")))
    # A shell's background jobs ignore SIGINT, and their children with them: `launched` sends it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    started_s = time.monotonic()
    import_training()
    document: Row = {"benchmark": "train_faults", **facts(torch.device("cpu")), "arguments": {}, "phases": {}}
    document["arguments"] = {name: value for name, value in vars(arguments).items() if name not in ("out", "build")}
    try:
        bed = make_bed(arguments.build, arguments.seed)
        document["steps"], document["write_points"] = STEPS, bed.write_points
        for name, phase in PHASES.items():
            if count := getattr(arguments, name):
                row = phase(bed, count)
                document["phases"][name] = row
                print(f"{name}: {json.dumps(row, ensure_ascii=False)}", file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(arguments.build, ignore_errors=True)
    document["seconds"] = round(time.monotonic() - started_s, 1)
    if arguments.out is not None:
        file = arguments.out / f"{slug(hardware_name(document))}.json"
        _join(document, file)
    document["is_met"] = all(row["is_met"] for row in document["phases"].values())
    if arguments.out is not None:
        write_json(file, document)
    print_document(document)
    return 0 if document["is_met"] else 1


if __name__ == "__main__":
    sys.exit(main())
