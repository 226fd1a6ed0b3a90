"""Capturing CUDA graphs in a process where other threads use the GPU and Python collects garbage."""

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def capturing(graph: torch.cuda.CUDAGraph, **options: Any) -> Iterator[None]:
    """`torch.cuda.graph`, undisturbed by what else happens.

    Other threads step, decode and encode meanwhile: with torch's default, "global", an allocation of theirs is an error
    and spoils the capture. Python's collector rests: a graph that it destroys inside a capture spoils it, too
    (pytorch/pytorch#161037).

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
