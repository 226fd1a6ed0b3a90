"""`kodalle doctor`: what is installed on this machine, what it computes with, and what already listens there."""

import importlib.util
import json
import os
import platform
import socket
from importlib import metadata
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:  # torch takes seconds to import, which `kodalle --help` need not wait for
    import torch

_NOT_INSTALLED = "not installed"
# Names in the report, and the distributions that may provide each.
_PACKAGES = {
    "kodalle": ("kodalle-engine",),
    "torch": ("torch",),
    "deepspeed": ("deepspeed",),
    "triton": ("triton",),
    "xformers": ("xformers",),
    "transformers": ("transformers",),
    "ray": ("ray",),
    "onnxruntime": ("onnxruntime-gpu", "onnxruntime"),
    "taming": ("taming-transformers-rom1504",),
}
_PORTS = {8000: "serving", 6379: "Ray's head node", 8265: "Ray's dashboard"}
_CONNECT_TIMEOUT_S = 0.5
_LARGE_PARAMETERS = 335_000_000  # the published model's


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="the same as one JSON object")] = False,
) -> None:
    """Prints versions, processor, dtypes, backends, GPUs and listeners; exit code 1 if something is installed wrongly."""
    report = diagnose()
    print(json.dumps(report, indent=2) if as_json else _as_table(report))
    if report["problems"]:
        raise typer.Exit(1)


def diagnose() -> dict[str, Any]:
    """The report: versions, processor, dtypes, backends, gpus, listeners, problems."""
    import torch

    from engine.codec.compiled_convolution import convolution_library
    from engine.decoding.cpu.compiled_step import library
    from engine.decoding.cuda.attention_choice import runnable
    from engine.device import compiled_set, cpu_capabilities, default_dtype, fit_to_machine

    cpu = cpu_capabilities()
    has_cuda = torch.cuda.is_available()
    devices = [torch.device("cpu")] + ([torch.device("cuda")] if has_cuda else [])
    packed = {"float32": cpu.packs_float32, "bfloat16": cpu.packs_bfloat16, "int8": cpu.packs_int8}
    return {
        "versions": {"python": platform.python_version(), **{name: _version(*of) for name, of in _PACKAGES.items()}},
        "processor": {
            "name": cpu.name,
            "instruction_set": cpu.isa,
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "threads": fit_to_machine(),
            "packs": [name for name, is_packed in packed.items() if is_packed],
            "multiplies": ["float32", *(["bfloat16"] if cpu.multiplies_bfloat16 else [])],
            "int8": _int8(in_bytes=cpu.packs_int8 or library() is not None, packs_float32=cpu.packs_float32),
            "decode_step": _compiled(compiled_set(), is_built=library() is not None),
            "codec": _compiled(compiled_set(), is_built=convolution_library() is not None),
        },
        "dtype_of_a_large_model": {
            device.type: str(default_dtype(device, _LARGE_PARAMETERS)).removeprefix("torch.") for device in devices
        },
        "backends": {
            device.type: {
                "attention": _attention_backends(device),
                "decode_attention": list(runnable(device)) if device.type == "cuda" else ["torch"],
                "codec": ["torch", *(["onnx"] if importlib.util.find_spec("onnxruntime") else [])],
            }
            for device in devices
        },
        "gpus": [_gpu(number) for number in range(torch.cuda.device_count() if has_cuda else 0)],
        "listeners": [
            {"port": port, "of": owner, "is_listening": _is_listening(port)} for port, owner in _PORTS.items()
        ],
        "problems": _problems(),
    }


def _version(*distributions: str) -> str | None:
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _int8(*, in_bytes: bool, packs_float32: bool) -> str:
    if in_bytes:
        return "in bytes: faster than float32"
    return "as float32 (no VNNI): the same numbers, no faster than float32" if packs_float32 else "not possible"


def _compiled(instructions: str | None, *, is_built: bool) -> str:
    if is_built:
        return "compiled"
    return "torch's operators: " + ("built without a C++ compiler" if instructions else "the processor has no AVX2")


def _attention_backends(device: "torch.device") -> list[str]:
    from engine.errors import InputError
    from engine.models.attention import BACKENDS, check_backend

    usable = []
    for name in BACKENDS:
        try:
            usable.append(check_backend(name, device))
        except InputError:
            continue
    return list(usable)


def _gpu(number: int) -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(number)
    return {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "capability": f"{properties.major}.{properties.minor}",
    }


def _is_listening(port: int) -> bool:
    with socket.socket() as connection:
        connection.settimeout(_CONNECT_TIMEOUT_S)
        return connection.connect_ex(("127.0.0.1", port)) == 0


def _problems() -> list[str]:
    """One line with its remedy for each thing that is installed wrongly."""
    from engine.errors import InputError
    from engine.models.environment import check_torchvision

    problems = []
    foreign = _version("kernels")
    if foreign is not None:
        problems.append(f"kernels {foreign}: a package that shadows this project's own: run `pip uninstall kernels`")
    try:
        check_torchvision()
    except InputError as error:
        problems.append(str(error))
    if importlib.util.find_spec("taming") is None:
        problems.append("taming: the VQGAN needs it: run `pip install --no-deps taming-transformers-rom1504`")
    return problems


def _as_table(report: dict[str, Any]) -> str:
    """The report as lines of a label and a value, by section."""
    processor = report["processor"]
    sections: dict[str, dict[str, str]] = {
        "Versions": {name: version or _NOT_INSTALLED for name, version in report["versions"].items()},
        "Processor": {
            "name": processor["name"],
            "instruction set": processor["instruction_set"],
            "cores, threads": f"{processor['cores']}, {processor['threads']}",
            "packs": ", ".join(processor["packs"]) or "nothing",
            "multiplies": ", ".join(processor["multiplies"]),
            "int8": processor["int8"],
            "decode step": processor["decode_step"],
            "codec's convolutions": processor["codec"],
        },
        "GPUs": {
            str(number): f"{gpu['name']}, {gpu['memory_gib']} GiB, compute capability {gpu['capability']}"
            for number, gpu in enumerate(report["gpus"])
        }
        or {"none": ""},
        "Dtype of a large model": report["dtype_of_a_large_model"],
        "Backends": {
            f"{device} {part.replace('_', ' ')}": ", ".join(names)
            for device, parts in report["backends"].items()
            for part, names in parts.items()
        },
        "Listeners": {
            f"{one['port']} {one['of']}": "in use" if one["is_listening"] else "free" for one in report["listeners"]
        },
        "Problems": {str(number): text for number, text in enumerate(report["problems"], start=1)} or {"none": ""},
    }
    lines = []
    for title, rows in sections.items():
        lines.append(title)
        lines += [f"  {label:<24}{value}".rstrip() for label, value in rows.items()]
    return "\n".join(lines)
