"""What fits the machine: how many threads to compute with, and which number type to draw in.

Both are chosen once, when a program starts, and said by nobody again.
"""

import math
import os
from pathlib import Path

import torch

from engine.errors import InputError

_CGROUPS = Path("/sys/fs/cgroup")
# A model below this is not limited by the read of its weights, and its drawings had better be the same everywhere.
_LARGE_PARAMETERS = 50_000_000


def pick_device(device: str) -> torch.device:
    """The device named, or CUDA where there is one.

    Raises:
        InputError: no such device here.
    """
    if not device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise InputError("--device", device, "is not a device: write cpu, cuda or cuda:1") from error
    if chosen.type not in ("cpu", "cuda"):
        raise InputError("--device", device, "is no device for drawing: write cpu, cuda or cuda:1")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise InputError("--device", device, f"{torch.cuda.device_count()} CUDA devices are visible: use cpu")
    return chosen


def default_dtype(device: torch.device, num_parameters: int) -> torch.dtype:
    """The transformer's type when nobody names one.

    On a GPU 16 bit: bfloat16 where it multiplies it (Ampere and newer), else float16. On a CPU bfloat16 for large
    models where the processor multiplies it (AVX512_BF16, AMX), which halves the bytes of a step; without those
    instructions it would be slower than float32.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    capabilities = torch.cpu.get_capabilities()
    multiplies_bfloat16 = bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return torch.bfloat16 if multiplies_bfloat16 and num_parameters >= _LARGE_PARAMETERS else torch.float32


def fit_threads(cgroups: Path = _CGROUPS) -> int:
    """Takes no more threads than the container may use, and returns how many that are.

    PyTorch counts the processors that it sees. In a container limited to 2 of 64 it would start 64 threads, and each
    operation would wait for 62 that are not run. A smaller number that was set before (OMP_NUM_THREADS) stays.
    """
    allowed = min(_visible_cpus(), _quota_cpus(cgroups))
    if allowed < torch.get_num_threads():
        torch.set_num_threads(allowed)
    return torch.get_num_threads()


def _visible_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _quota_cpus(cgroups: Path) -> int:
    """Processors' worth of time that the container may use, rounded up; many where nothing is limited."""
    version_2, version_1 = cgroups / "cpu.max", cgroups / "cpu"
    try:
        if version_2.is_file():
            quota, period = version_2.read_text().split()
        else:
            quota, period = (
                (version_1 / name).read_text().strip() for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            )
        return max(1, math.ceil(int(quota) / int(period))) if quota not in ("max", "-1") else 2**20
    except (OSError, ValueError):  # no cgroups (macOS), or none that limit
        return 2**20
