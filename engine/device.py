"""Where the program computes: the device, the processor's instruction set, the dtype and the threads that follow.

Only this module finds out what a processor offers. Two sources are combined: what the processor reports, cut to
the limits that a user sets with oneDNN's and PyTorch's own switches (ONEDNN_MAX_CPU_ISA, ATEN_CPU_CAPABILITY), and a
small trial of each packed layer, because PyTorch's packing is a private interface whose requirements differ by version.

    class           packs float32   packs bfloat16   packs int8   multiplies bfloat16
    avx2            yes             no               no           no
    avx512          yes             yes, slowly      no           no
    avx512_vnni     yes             yes, slowly      yes          no
    avx512_bf16     yes             yes              yes          yes
    amx             yes             yes              yes          yes
"""

import ctypes
import functools
import math
import os
import platform
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from engine.errors import InputError
from kernels.compiled import InstructionSet as CompiledSet

InstructionSet = Literal["baseline", "avx2", "avx2_vnni", "avx512", "avx512_vnni", "avx512_bf16", "amx"]

_CGROUPS = Path("/sys/fs/cgroup")
# mallopt(3): blocks above the first are mapped and unmapped each time, free memory above the second goes back to the kernel.
_M_MMAP_THRESHOLD, _LARGEST_KEPT_BYTES = -3, 2**30
_M_TRIM_THRESHOLD, _MOST_KEPT_BYTES = -1, 2**31 - 1
# Below this the read of the weights does not limit a step, and equal images on every processor are worth more.
_LARGE_PARAMETERS = 50_000_000
_AVX512 = frozenset({"avx512_f", "avx512_bw", "avx512_vl", "avx512_dq"})
# Best first. Each class: the flags that it needs, as PyTorch names them, and the lowest ONEDNN_MAX_CPU_ISA that has it.
_CLASSES: tuple[tuple[InstructionSet, frozenset[str], str], ...] = (
    ("amx", _AVX512 | {"amx_tile", "amx_int8", "amx_bf16"}, "AVX512_CORE_AMX"),
    ("avx512_bf16", _AVX512 | {"avx512_vnni", "avx512_bf16"}, "AVX512_CORE_BF16"),
    ("avx512_vnni", _AVX512 | {"avx512_vnni"}, "AVX512_CORE_VNNI"),
    ("avx512", _AVX512, "AVX512_CORE"),
    ("avx2_vnni", frozenset({"avx2", "avx_vnni"}), "AVX2_VNNI"),
    ("avx2", frozenset({"avx2"}), "AVX2"),
)
# The libraries of kernels/cpu that each class runs.
_COMPILED: dict[str, CompiledSet] = {
    "avx2": "avx2", "avx2_vnni": "avx2", "avx512": "avx2", "avx512_vnni": "avx512", "avx512_bf16": "avx512",
    "amx": "avx512",
}  # fmt: skip
# oneDNN's limits in ascending order (v3.12, "CPU Dispatcher Control").
_ONEDNN_LIMITS = (
    "SSE41",
    "AVX",
    "AVX2",
    "AVX2_VNNI",
    "AVX2_VNNI_2",
    "AVX512_CORE",
    "AVX512_CORE_VNNI",
    "AVX512_CORE_BF16",
    "AVX512_CORE_FP16",
    "AVX10_1_512",
    "AVX512_CORE_AMX",
    "AVX10_1_512_AMX",
    "AVX512_CORE_AMX_FP16",
    "AVX10_1_512_AMX_FP16",
    "AVX10_2",
)


@dataclass(frozen=True)
class CpuCapabilities:
    """What the processor offers to this program, within the limits that the environment sets."""

    name: str
    """The model name as the operating system reports it."""
    isa: InstructionSet | str
    """The instruction class; outside x86 the architecture's name ("aarch64")."""
    multiplies_bfloat16: bool
    """Products of bfloat16 in hardware (AVX512_BF16, AMX): faster than float32, not slower."""
    packs_float32: bool
    packs_bfloat16: bool
    packs_int8: bool
    """8-bit layers that add up products in 32 bits (VNNI, AMX). Without it two products are added in 16, and saturate."""

    def packs(self, dtype: torch.dtype) -> bool:
        """Whether a linear layer of floating-point type `dtype` can be packed."""
        return {torch.float32: self.packs_float32, torch.bfloat16: self.packs_bfloat16}.get(dtype, False)


@functools.cache
def cpu_capabilities() -> CpuCapabilities:
    """This processor's, read once a process (some 10 ms)."""
    reported = torch.cpu.get_capabilities()
    flags = {name for name, value in reported.items() if value is True}
    architecture = str(reported.get("architecture", "unknown"))
    if architecture != "x86_64":  # the padding rule of packed layers was measured on x86 alone
        return CpuCapabilities(_processor_name(), architecture, False, False, False, False)
    isa = instruction_set(flags, aten=torch.backends.cpu.get_cpu_capability(), environment=os.environ)
    return CpuCapabilities(
        name=_processor_name(),
        isa=isa,
        multiplies_bfloat16=isa in ("avx512_bf16", "amx"),
        packs_float32=_packs(torch.float32),
        # PyTorch checks the processor, oneDNN its own limit: below AVX-512 bfloat16 is taken only where both can be right.
        packs_bfloat16=isa not in ("baseline", "avx2") and _packs(torch.bfloat16),
        packs_int8=isa in ("avx2_vnni", "avx512_vnni", "avx512_bf16", "amx") and _packs_int8(),
    )


def compiled_set() -> CompiledSet | None:
    """The instruction set of the compiled libraries for this processor, within the limits that the environment sets."""
    return _COMPILED.get(cpu_capabilities().isa)


def instruction_set(flags: Collection[str], *, aten: str, environment: Mapping[str, str]) -> InstructionSet:
    """The best class that the processor, PyTorch and oneDNN all use.

    Args:
        flags: of the processor, as `torch.cpu.get_capabilities` names them.
        aten: what PyTorch's own kernels use, `torch.backends.cpu.get_cpu_capability()`: DEFAULT, AVX2, AVX512 or
            AVX512_BF16 (ATEN_CPU_CAPABILITY lowers it).
        environment: where ONEDNN_MAX_CPU_ISA (or its old name, DNNL_MAX_CPU_ISA) stands.
    """
    limit = (environment.get("ONEDNN_MAX_CPU_ISA") or environment.get("DNNL_MAX_CPU_ISA") or "").upper()
    # oneDNN ignores a limit that it does not know, "ALL" and "DEFAULT" among them.
    highest = _ONEDNN_LIMITS.index(limit) if limit in _ONEDNN_LIMITS else len(_ONEDNN_LIMITS)
    for name, needed, lowest_limit in _CLASSES:
        aten_has_it = aten.startswith("AVX512") if needed >= _AVX512 else aten != "DEFAULT"
        if needed <= set(flags) and aten_has_it and _ONEDNN_LIMITS.index(lowest_limit) <= highest:
            return name
    return "baseline"


def default_dtype(device: torch.device, num_parameters: int) -> torch.dtype:
    """The transformer's dtype where the user names none.

    On a GPU 16 bit: bfloat16 where the GPU multiplies it (Ampere and newer), else float16. On a CPU bfloat16 for large
    models where the processor multiplies it, which halves the bytes of a step; without those instructions it would be
    slower than float32.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    cpu = cpu_capabilities()
    is_faster = cpu.multiplies_bfloat16 and cpu.packs_bfloat16
    return torch.bfloat16 if is_faster and num_parameters >= _LARGE_PARAMETERS else torch.float32


def pick_device(device: str) -> torch.device:
    """The named device; for an empty name CUDA if there is a GPU, else the CPU.

    Raises:
        InputError: no such device on this machine.
    """
    if not device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise InputError("--device", device, "is not a device: write cpu, cuda or cuda:1") from error
    if chosen.type not in ("cpu", "cuda"):
        raise InputError("--device", device, "is no device for generation: write cpu, cuda or cuda:1")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise InputError("--device", device, f"{torch.cuda.device_count()} CUDA devices are visible: use cpu")
    return chosen


def fit_to_machine(cgroups: Path = _CGROUPS) -> int:
    """Limits PyTorch to the threads that the container may use, keeps freed memory, and returns the number of threads.

    PyTorch counts the processors that it sees. In a container limited to 2 of 64 it would start 64 threads, and each
    operation would wait for 62 that do not run. A smaller number that was set before (OMP_NUM_THREADS) stays.
    """
    _keep_freed_memory()
    allowed = min(_visible_cpus(), _quota_cpus(cgroups))
    if allowed < torch.get_num_threads():
        torch.set_num_threads(allowed)
    return torch.get_num_threads()


def _keep_freed_memory() -> None:
    """Lets glibc keep large blocks that are freed, instead of returning each to the kernel.

    PyTorch asks for every result of an operation anew; each new page costs a fault and is zeroed. A step asks for the same sizes
    again and again. Whoever sets malloc's variables keeps what they say; other C libraries have no such setting.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _MOST_KEPT_BYTES)


# -------------------------------------------------------------------------------------------------------------- trials


def _packs(dtype: torch.dtype) -> bool:
    """Packs a small linear layer and multiplies by it. A failure means that there is none here, whatever the reason:
    a build without oneDNN, another architecture, an instruction that is missing."""
    if not torch.backends.mkldnn.is_available():
        return False
    rows = torch.ones(4, 64, dtype=dtype, device="cpu")
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(torch.ones(64, 64, dtype=dtype, device="cpu"), 16)
        out = torch.ops.mkldnn._linear_pointwise(rows, packed, None, "none", [], "")
    except (AttributeError, RuntimeError):
        return False
    return bool((out == 64).all())


def _packs_int8() -> bool:
    """Whether oneDNN's 8-bit linear layer adds up 64 of the largest products without saturating."""
    if not torch.backends.mkldnn.is_available():
        return False
    rows = torch.full((16, 64), 255, dtype=torch.uint8, device="cpu")
    weight = torch.full((64, 64), 127, dtype=torch.int8, device="cpu")
    scales = torch.ones(64, dtype=torch.float32, device="cpu")
    zero_points = torch.zeros(64, dtype=torch.int32, device="cpu")
    try:
        packed = torch.ops.onednn.qlinear_prepack(weight, [16, 64])
        out = torch.ops.onednn.qlinear_pointwise(
            rows, 1.0, 0, packed, scales, zero_points, None, 1.0, 0, torch.float32, "none", [], ""
        )
    except (AttributeError, RuntimeError):
        return False
    return bool((out == 64 * 255 * 127).all())


# ---------------------------------------------------------------------------------------------------- operating system


def _processor_name() -> str:
    file = Path("/proc/cpuinfo")
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    name = found[1] if found else platform.processor() or platform.machine()
    return " ".join(name.split())


def _visible_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _quota_cpus(cgroups: Path) -> int:
    """Processors' worth of time that the container may use, rounded up; a very large number where there is no limit."""
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
