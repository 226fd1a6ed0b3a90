"""Training on two hosts: the same losses as on one, and the link below which compressed gradients pay.

    python benchmarks/train_hosts.py --out benchmarks/results/train_hosts        about three minutes; Linux, iproute2, root

Two network namespaces on one machine, with a link between them, stand for the hosts.

    hosts   a tiny KoDALLE by DeepSpeed's launcher with a hostfile on both, ZeRO 0 to 3, against one process with twice the batch
                                                                                           bar: losses equal to 1 in 10,000
    link    seconds to average the gradients of configs/clothing's transformer between both, exactly and by PowerSGD, at rates that
            `tc` limits the link to; PowerSGD pays below the rate at which both take the same time

The last line is one JSON document.
"""

import argparse
import itertools
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from machine_facts import REPOSITORY, child_environment, hardware_name, print_document, slug
from serving.hosts import Host, missing_requirement, two_hosts
from training.fault_bed import read_losses, write_config
from training.link_worker import RANK

from engine.facts import facts
from engine.files import write_json

Row = dict[str, Any]
RATES = ("5", "20", "100", "500", "2000")  # Mbit/s
_PORT = "29571"
# Without what depends on the grouping of images, and with an optimiser that is insensitive to rounding.
_EXACT = ("model.attention_dropout=0", "caption_dropout=0", "deepspeed.optimizer.params.eps=1e-3")


def train_on_hosts(hosts: Sequence[Host], config: Path, run: Path, *overrides: str) -> list[tuple[int, str]]:
    """`deepspeed --hostfile …` on each host; exit code and output of each."""
    hostfile = run.with_name(f"{run.name}.hosts")
    hostfile.write_text("".join(f"{host.address} slots=1\n" for host in hosts), encoding="utf-8")
    started = []
    for number, host in enumerate(hosts):
        command = [
            sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hostfile), "--no_ssh", "--node_rank", str(number),
            "--master_addr", hosts[0].address, "--master_port", _PORT, str(REPOSITORY / "engine" / "train.py"),
            "--config", str(config), f"run={run}", *overrides,
        ]  # fmt: skip
        log = run.with_name(f"{run.name}-{number}.log")
        started.append((host.start(command, log=log, env=_environment(host)), log))
    return [(process.wait(timeout=300), log.read_text(encoding="utf-8")) for process, log in started]


def same_losses(run: Path, other: Path) -> bool:
    """Whether two runs logged the same losses, to 1 in 10,000."""
    ours, theirs = ([line["loss"] for line in read_losses(folder) if "loss" in line] for folder in (run, other))
    close = [math.isclose(one, another, rel_tol=1e-4) for one, another in zip(ours, theirs, strict=True)]
    return bool(close) and all(close)


def hosts_phase(hosts: Sequence[Host], folder: Path, stages: Sequence[int]) -> Row:
    """Losses of both hosts together, by ZeRO stage, against those of one process."""
    config = write_config(folder)
    alone = [
        sys.executable,
        str(REPOSITORY / "engine" / "train.py"),
        "--config",
        str(config),
        f"run={folder / 'alone'}",
    ]
    batch = "deepspeed.train_micro_batch_size_per_gpu"
    subprocess.run([*alone, f"{batch}=2", *_EXACT], env=_environment(None), check=True, stdout=subprocess.DEVNULL)
    row: Row = {}
    for stage in stages:
        run = folder / f"zero-{stage}"
        ended = train_on_hosts(hosts, config, run, f"{batch}=1", f"deepspeed.zero_optimization.stage={stage}", *_EXACT)
        if any(code for code, _ in ended):
            sys.exit(f"a training on two hosts failed:\n{ended}")
        row[f"zero_{stage}"] = {"equal": same_losses(run, folder / "alone")}
    return row | {"is_met": all(one["equal"] for one in row.values())}


def link_phase(hosts: Sequence[Host], folder: Path, rates: Sequence[str], repeats: int) -> Row:
    """Seconds of both ways at each rate."""
    worker = Path(__file__).parent / "training" / "link_worker.py"
    started = []
    for number, host in enumerate(hosts):
        command = [sys.executable, str(worker), str(folder), str(number), hosts[0].address, _PORT, str(repeats), *rates]
        started.append(host.start(command, log=folder / f"link-{number}.log", env=_environment(host)))
    for rate in rates:
        for host in hosts:
            host.limit(float(rate))
        (folder / rate).touch()
        while started[0].poll() is None and not (folder / f"{rate}.done").exists():
            time.sleep(0.05)
    for process, number in zip(started, range(2), strict=True):
        if process.wait(timeout=600):
            sys.exit((folder / f"link-{number}.log").read_text(encoding="utf-8"))
    found = json.loads((folder / "seconds.json").read_text())
    seconds = {rate: found[rate] for rate in rates}
    return {
        "parameters": found["parameters"],
        "rank": RANK,
        "sent_share": round(found["sent_numbers"][0] / found["sent_numbers"][1], 4),
        "seconds_by_mbit_per_s": seconds,
        "pays_below_mbit_per_s": pays_below(seconds),
    }


def pays_below(seconds: dict[str, dict[str, float]]) -> float | None:
    """The rate at which exact averages and PowerSGD take equally long, between measured ones; None: it pays at none of them."""
    ratios = [(float(rate), one["exact"] / one["power_sgd"]) for rate, one in seconds.items()]
    ratios.sort()
    if ratios[0][1] <= 1:
        return None
    for (slow, gain), (fast, next_gain) in itertools.pairwise(ratios):
        if next_gain <= 1:
            share = math.log(gain) / (math.log(gain) - math.log(next_gain))
            return round(math.exp(math.log(slow) + share * (math.log(fast) - math.log(slow))))
    return ratios[-1][0]


def _environment(host: Host | None) -> dict[str, str]:
    ours = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"} | (
        {} if host is None else {"GLOO_SOCKET_IFNAME": host.link}
    )
    return child_environment() | ours


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", default="0,1,2,3", help="ZeRO stages; empty: leave the phase out")
    parser.add_argument("--rates", default=",".join(RATES), help="Mbit/s; empty: leave the phase out")
    parser.add_argument("--repeats", type=int, default=5, help="averages timed at each rate")
    parser.add_argument("--out", type=Path, help="folder for the document")
    arguments = parser.parse_args()
    if reason := missing_requirement():
        sys.exit(f"error: {reason}")
    started_s = time.monotonic()
    document: Row = {"benchmark": "train_hosts", **facts(torch.device("cpu")), "phases": {}}
    with tempfile.TemporaryDirectory(prefix="kodalle-hosts-") as place, two_hosts() as hosts:
        if arguments.stages:
            stages = [int(stage) for stage in arguments.stages.split(",")]
            document["phases"]["hosts"] = hosts_phase(hosts, Path(place), stages)
            print(f"hosts: {json.dumps(document['phases']['hosts'])}", file=sys.stderr, flush=True)
        if arguments.rates:
            rates = arguments.rates.split(",")
            document["phases"]["link"] = link_phase(hosts, Path(place), rates, arguments.repeats)
    document["is_met"] = all(row.get("is_met", True) for row in document["phases"].values())
    document["seconds"] = round(time.monotonic() - started_s, 1)
    if arguments.out is not None:
        write_json(arguments.out / f"{slug(hardware_name(document))}.json", document)
    print_document(document)
    return 0 if document["is_met"] else 1


if __name__ == "__main__":
    sys.exit(main())
