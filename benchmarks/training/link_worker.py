"""One rank of the measurement in benchmarks/train_hosts.py: averages gradients exactly and by PowerSGD, at each rate of the link.

    python link_worker.py FOLDER RANK MASTER_ADDRESS PORT REPEATS RATE…

Before each rate it waits for the file FOLDER/<rate>, which the benchmark writes once the link has it. It answers with FOLDER/<rate>.done;
rank 0 writes its seconds to FOLDER/seconds.json.
"""

import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn

from engine.config.run import PowerSgdConfig
from engine.config.transformer import TransformerConfig
from engine.models.transformer import KoDalle
from engine.training.power_sgd import PowerSgd
from engine.training.process_group import World, join_world

# That of configs/clothing: 4.3 million parameters, which is 17 MB of float32 gradients.
MODEL = TransformerConfig(
    dim=256, num_layers=6, num_heads=8, head_dim=32, ff_mult=2, text_vocab_size=256, text_seq_len=32, text_position_rows=33,
    image_vocab_size=1024, image_grid_size=12,
)  # fmt: skip
RANK = 4


def main() -> None:
    folder, rank, address, port, repeats, *rates = sys.argv[1:]
    os.environ |= {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": address, "MASTER_PORT": port}
    world = join_world(torch_threads=1)
    torch.manual_seed(0)
    parameters = list(KoDalle(MODEL).parameters())
    methods = {
        "exact": PowerSgd(parameters, PowerSgdConfig(rank=RANK, start_step=10**9), world, seed=1),
        "power_sgd": PowerSgd(parameters, PowerSgdConfig(rank=RANK, start_step=0), world, seed=1),
    }
    found: dict[str, object] = {
        "parameters": sum(p.numel() for p in parameters),
        "sent_numbers": methods["power_sgd"].sent_numbers(),
    }
    for rate in rates:
        while not (Path(folder) / rate).exists():
            time.sleep(0.01)
        found[rate] = {name: _seconds(method, parameters, world, int(repeats)) for name, method in methods.items()}
        (Path(folder) / f"{rate}.done").touch()
    if rank == "0":
        (Path(folder) / "seconds.json").write_text(json.dumps(found))
    world.barrier()


def _seconds(method: PowerSgd, parameters: list[nn.Parameter], world: World, repeats: int) -> float:
    """Median of an average of all gradients, after one to warm up."""
    taken = []
    for _ in range(repeats + 1):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        world.barrier()
        started = time.perf_counter()
        method.average()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:])


if __name__ == "__main__":
    main()
