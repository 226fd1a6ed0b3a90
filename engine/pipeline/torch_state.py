"""Arithmetic that does not depend on torch's global state, and the seconds that it takes.

What a caller may have set: autocast, grad mode, the default dtype and device (every tensor names its own), and the process,
which may have been forked.
"""

import contextlib
import os
import sys
import time
from collections.abc import Iterator

import torch

from engine.errors import InputError

_IMPORTED_IN = os.getpid()


@contextlib.contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """No autocast inside; in a forked process, one thread."""
    survive_fork(device)
    with torch.autocast(device.type, enabled=False):
        yield


@contextlib.contextmanager
def inference(device: torch.device) -> Iterator[None]:
    """`exact`, without autograd."""
    with torch.inference_mode(), exact(device):
        yield


def survive_fork(device: torch.device) -> None:
    """Makes torch usable in a process that was forked from one in which it has computed.

    Its threads do not live on in the child, where the first parallel operation would wait for them for ever. A single
    thread computes the same bits.

    Raises:
        InputError: CUDA, which a fork ends.
    """
    if os.getpid() == _IMPORTED_IN:
        return
    if device.type == "cuda":
        remedy = "CUDA does not work in a forked process: start it with `spawn` and load the pipeline there"
        raise InputError("device", device, remedy)
    if torch.get_num_threads() > 1:
        torch.set_num_threads(1)
        print("note: one thread in this forked process; start it with `spawn` to compute with all", file=sys.stderr)


@contextlib.contextmanager
def timed(timings_s: dict[str, float], name: str, device: torch.device) -> Iterator[None]:
    """Adds a block's seconds to `timings_s`, what it issued on a GPU included."""
    started = time.perf_counter()
    yield
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # other streams belong to other phases of a server
    timings_s[name] = timings_s.get(name, 0.0) + time.perf_counter() - started
