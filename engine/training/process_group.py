"""The process group of a training: who this process is, and what the ranks agree on."""

import logging
import os
import socket
from dataclasses import dataclass
from datetime import timedelta

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp

# How long ranks wait for one another. The default of 10 to 30 minutes ends a run while rank 0 encodes a large data set.
_TIMEOUT = timedelta(hours=2)


@dataclass(frozen=True)
class World:
    """Rank and device of this process, and collectives over all ranks.

    host_group: carries what the hosts agree on; no device waits for it. None: the default group does, which is right
        on CPU.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    host_group: ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.size > 1:
            torch.distributed.barrier()

    def any(self, flag: bool) -> bool:
        """True on every rank if it is true on one."""
        if self.size == 1:
            return flag
        tensor = torch.tensor([flag], dtype=torch.int32, device="cpu")
        torch.distributed.all_reduce(tensor, ReduceOp.MAX, group=self.host_group)
        return bool(tensor.item())

    def sum_(self, values: Tensor) -> Tensor:
        """Sum over ranks, in place, on the device."""
        if self.size > 1:
            torch.distributed.all_reduce(values)
        return values

    def means(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Means over ranks of 0-d tensors, on the device; every rank must give the same names."""
        if self.size == 1 or not values:
            return values
        stacked = self.sum_(torch.stack([value.detach().double() for value in values.values()]))
        return dict(zip(values, (stacked / self.size).unbind(), strict=True))

    def mean(self, value: float) -> float:
        """Mean over ranks."""
        if self.size == 1:
            return value
        return float(self.sum_(torch.tensor([value], dtype=torch.float64, device=self.device)).item()) / self.size


def join_world(*, torch_threads: int | None) -> World:
    """Joins the process group that `deepspeed`, `torchrun` or plain `python` (one process) started.

    On CPU the gloo backend is used and DeepSpeed's shared-memory all-reduce is left out: it is compiled at first use
    (40 s, and needs a compiler), and gains nothing for the few ranks that one CPU holds.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    accelerator = get_accelerator()
    on_cpu = accelerator.device_name() == "cpu"
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", str(free_port()))
    rank, size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if on_cpu:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
        torch.set_num_threads(torch_threads or max(1, (os.cpu_count() or 1) // local_size))
    else:
        accelerator.set_device(local_rank)
    deepspeed.init_distributed(
        dist_backend="gloo" if on_cpu else accelerator.communication_backend_name(),
        timeout=_TIMEOUT,
        verbose=False,
    )
    host_group = None if on_cpu or size == 1 else torch.distributed.new_group(backend="gloo", timeout=_TIMEOUT)
    device = torch.device("cpu") if on_cpu else torch.device(accelerator.device_name(local_rank))
    return World(rank, size, local_rank, device, host_group)


def free_port() -> int:
    """A TCP port of the loopback interface that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
