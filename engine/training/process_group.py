"""The process group of a training: who this process is, and what the ranks agree on."""

import logging
import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp

from engine.device import fit_to_machine
from engine.errors import InputError

# How long ranks wait for one another. The default of 10 to 30 minutes ends a run while rank 0 encodes a large data set.
_TIMEOUT = timedelta(hours=2)

T = TypeVar("T")


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

    def note(self, line: str) -> None:
        """Prints a line once for all ranks."""
        if self.is_main:
            print(line, flush=True)

    def barrier(self) -> None:
        if self.size > 1:
            torch.distributed.barrier()

    def any(self, flag: bool) -> bool:
        """True on every rank if it is true on one."""
        return bool(self.max(int(flag)))

    def max(self, number: int) -> int:
        """The largest of all ranks."""
        if self.size == 1:
            return number
        tensor = torch.tensor([number], dtype=torch.int32, device="cpu")
        torch.distributed.all_reduce(tensor, ReduceOp.MAX, group=self.host_group)
        return int(tensor.item())

    def share(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        if self.size == 1:
            return value
        values = [value]
        torch.distributed.broadcast_object_list(values, src=0, group=self.host_group)
        return values[0]

    def gather(self, value: T) -> list[T]:
        """On rank 0 the values of all ranks, in their order; elsewhere an empty list."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size if self.is_main else []
        torch.distributed.gather_object(value, values if self.is_main else None, dst=0, group=self.host_group)
        return values

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

    Args:
        torch_threads: of this process on a CPU; default: OMP_NUM_THREADS, or its share of the processors that the
            container may use.

    Raises:
        InputError: another program has the port at which the ranks meet.
    """
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.WARNING)
    logger.addFilter(_is_news)
    accelerator = get_accelerator()
    on_cpu = accelerator.device_name() == "cpu"
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, value)
    rank, size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if size == 1 or "MASTER_PORT" not in os.environ:  # no other to meet: DeepSpeed's 29500 may be another program's
        os.environ["MASTER_PORT"] = str(free_port())
    if on_cpu:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
        torch.set_num_threads(torch_threads or _threads(local_size))
    else:
        accelerator.set_device(local_rank)
    try:
        deepspeed.init_distributed(
            dist_backend="gloo" if on_cpu else accelerator.communication_backend_name(),
            timeout=_TIMEOUT,
            verbose=False,
        )
    except torch.distributed.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise InputError(
            "port", os.environ["MASTER_PORT"], "another program has it: `deepspeed --master_port` takes another one"
        ) from error
    host_group = None if on_cpu or size == 1 else torch.distributed.new_group(backend="gloo", timeout=_TIMEOUT)
    device = torch.device("cpu") if on_cpu else torch.device(accelerator.device_name(local_rank))
    return World(rank, size, local_rank, device, host_group)


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a warning of DeepSpeed says something: it asks its own scheduler for the rate before the first step."""
    return "learning rate from scheduler before it has started" not in record.getMessage()


def _threads(local_size: int) -> int:
    allowed = fit_to_machine()
    stated = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    return int(stated) if stated.isdigit() and int(stated) > 0 else max(1, allowed // local_size)


def free_port() -> int:
    """A TCP port of the loopback interface that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
