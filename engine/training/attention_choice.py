"""The attention backend of a training whose config says `auto`: the fastest that runs, said once.

On a GPU each backend is timed, forward and backward, at the training's own sizes. On a CPU it is SDPA by rule: the same on every
start, so that resumed runs keep their bits.

B images a micro batch, T positions, H heads, D head dim.
"""

import statistics

import torch

from engine.config.stages import KodalleRun
from engine.errors import InputError
from engine.measure import time_runs
from engine.models.attention import AttentionBackend, attention, check_backend
from engine.training.engines import is_fp16, micro_batch
from engine.training.process_group import World

_CANDIDATES: tuple[AttentionBackend, ...] = ("sdpa", "xformers")
_REPEAT, _BUDGET_S = 10, 1.0
# What a backend raises that has no kernel for the card, the dtype or the sizes.
_CANNOT = (RuntimeError, NotImplementedError, ValueError, ImportError, InputError)


def choose_attention(run: KodalleRun, world: World) -> AttentionBackend:
    """The config's backend, or the fastest of rank 0 for `auto`, which is printed.

    Raises:
        InputError: a stated backend that cannot run here.
    """
    if run.attention != "auto":
        return check_backend(run.attention, world.device)
    backend, why = world.share(_fastest(run, world.device) if world.is_main else None) or ("sdpa", "")
    if world.is_main:
        print(f"attention: {backend} ({why})", flush=True)
    return backend


def _fastest(run: KodalleRun, device: torch.device) -> tuple[AttentionBackend, str]:
    if any(pattern != "full" for pattern in run.model.attention_patterns):
        return "sdpa", "the one that has attention_patterns"
    if device.type != "cuda":
        return "sdpa", "the fused one of a CPU"
    seconds = {backend: found for backend in _CANDIDATES if (found := _seconds(run, device, backend)) is not None}
    if not seconds:
        return "sdpa", "no other can run"
    best = min(seconds, key=lambda backend: seconds[backend])
    times = ", ".join(f"{backend} {1000 * found:.2f} ms a layer" for backend, found in seconds.items())
    return best, f"the fastest here: {times}"


def _seconds(run: KodalleRun, device: torch.device, backend: AttentionBackend) -> float | None:
    """Median of forward and backward of one layer's attention; None where it cannot run."""
    config = run.model
    dtype = torch.float32
    if is_fp16(run.deepspeed):
        dtype = torch.float16
    elif run.deepspeed.get("bf16", {}).get("enabled"):
        dtype = torch.bfloat16
    B, T = micro_batch(run.deepspeed)[0], config.prefix_len + config.image_seq_len - 1
    shape = (B, T, config.num_heads, config.head_dim)
    try:
        check_backend(backend, device)
        q, k, v = (torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for _ in range(3))

        def work() -> None:
            attention(q, k, v, causal=True, backend=backend).sum().backward()

        work()
        return statistics.median(time_runs(work, device, repeat=_REPEAT, budget_s=_BUDGET_S))
    except _CANNOT:
        return None
