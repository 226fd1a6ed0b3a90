"""Provenance of a stored figure: commit, machine, versions, date."""

import datetime
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from engine.device import cpu_capabilities

_REPOSITORY = Path(__file__).resolve().parent.parent
_PACKAGES = ("torch", "triton", "xformers", "onnxruntime-gpu", "transformers", "numpy", "pillow")


def facts(device: torch.device) -> dict[str, Any]:
    """commit, date, hardware, versions, threads."""
    return {
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "hardware": {
            "device": device.type,
            "gpu": _gpu(device),
            "cpu": cpu_capabilities().name,
            "cpu_isa": cpu_capabilities().isa,
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "memory_gib": round(_memory_bytes() / 2**30, 1),
            "load_before": round(os.getloadavg()[0], 2),
        },
        "versions": {"python": platform.python_version(), "cuda": torch.version.cuda}
        | {name: version for name in _PACKAGES if (version := _version(name))},
        "threads": torch.get_num_threads(),
    }


def _commit() -> str:
    """Short hash, `+` behind it where tracked files are changed; `unknown` outside a checkout.

    An installed package may lie in another project's repository, whose commit would be misleading.
    """
    if not (_REPOSITORY / ".git").exists():
        return "unknown"
    head = _git("rev-parse", "--short=10", "HEAD")
    if not head:
        return "unknown"
    return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")


def _git(*arguments: str) -> str:
    try:
        answer = subprocess.run(["git", *arguments], cwd=_REPOSITORY, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git on this machine
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""


def _gpu(device: torch.device) -> dict[str, Any] | None:
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "processors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
    }


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
