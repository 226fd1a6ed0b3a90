"""Capture of CUDA graphs in a process whose other threads use the GPU, and in which Python collects garbage."""

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def capturing(graph: torch.cuda.CUDAGraph, **options: Any) -> Iterator[None]:
    """`torch.cuda.graph` that other threads and the garbage collector cannot invalidate.

    Other threads run on the GPU meanwhile: with torch's default, "global", an allocation of theirs is an error and
    invalidates the capture. So does a graph that Python's collector destroys within it (pytorch/pytorch#161037), which
    is off for the time.

    Args:
        options: of `torch.cuda.graph`: pool, stream.
    """
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local", **options):
            yield
    finally:
        if was_enabled:
            gc.enable()
