"""What the processor offers, in every instruction class; threads that the container may use; the default dtype."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine import device as device_module
from engine.decoding.cpu.compiled_step import library
from engine.device import CpuCapabilities, cpu_capabilities, default_dtype, fit_to_machine, instruction_set
from tests.paths import REPOSITORY


@pytest.fixture
def threads() -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield 2
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "100000 100000"}, 1),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.max": "max 100000"}, 2),
        ({"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 2),
        ({"cpu.max": "rubbish"}, 2),
        ({}, 2),
    ],
)
def test_a_container_s_share_of_the_processors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int, files: dict[str, str], expected: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)), raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert fit_to_machine(tmp_path) == expected
    assert torch.get_num_threads() == expected


def test_threads_are_never_added(tmp_path: Path, threads: int) -> None:
    torch.set_num_threads(1)
    (tmp_path / "cpu.max").write_text("800000 100000")
    assert fit_to_machine(tmp_path) == 1


def _faults_of_repeated_blocks(environment: dict[str, str]) -> int:
    """Page faults of a process that asks for 20 blocks of 40 MB, one after another, after `fit_to_machine`.

    It has requested as many before: aligned blocks leave gaps, which the next ones fill.
    """
    code = """
import resource, torch
from engine.device import fit_to_machine
fit_to_machine()
before = 0
for block in range(40):
    if block == 20:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(10_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library: its malloc has no such setting")
def test_freed_memory_is_kept() -> None:
    kept = _faults_of_repeated_blocks({})
    assert kept < 1_000
    assert _faults_of_repeated_blocks({"MALLOC_MMAP_THRESHOLD_": "1000000"}) > 10 * (kept + 1_000), "a user's stays"


# -------------------------------------------------------------------------------------------------------- instructions

AVX2 = {"avx2"}
AVX512 = AVX2 | {"avx512_f", "avx512_bw", "avx512_vl", "avx512_dq"}
VNNI = AVX512 | {"avx512_vnni"}
BFLOAT16 = VNNI | {"avx512_bf16"}
AMX = BFLOAT16 | {"amx_tile", "amx_int8", "amx_bf16"}


@pytest.mark.parametrize(
    ("flags", "aten", "limit", "expected"),
    [
        (AMX, "AVX512", None, "amx"),
        (BFLOAT16, "AVX512", None, "avx512_bf16"),
        (VNNI, "AVX512", None, "avx512_vnni"),
        (AVX512, "AVX512", None, "avx512"),
        (AVX512 - {"avx512_dq"}, "AVX2", None, "avx2"),
        (AVX2 | {"avx_vnni"}, "AVX2", None, "avx2_vnni"),
        (AVX2, "AVX2", None, "avx2"),
        (set[str](), "DEFAULT", None, "baseline"),
        (AMX, "AVX512", "AVX512_CORE_BF16", "avx512_bf16"),
        (AMX, "AVX512", "avx512_core_vnni", "avx512_vnni"),
        (AMX, "AVX512", "AVX512_CORE", "avx512"),
        (AMX, "AVX512", "AVX2", "avx2"),
        (AMX, "AVX512", "SSE41", "baseline"),
        (AMX, "AVX512", "ALL", "amx"),
        (AMX, "AVX2", None, "avx2"),
        (AMX, "DEFAULT", None, "baseline"),
        (AVX2, "AVX2", "AVX512_CORE", "avx2"),
    ],
)
def test_the_class_is_the_best_that_processor_pytorch_and_onednn_all_use(
    flags: set[str], aten: str, limit: str | None, expected: str
) -> None:
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        environment = {} if limit is None else {name: limit}
        assert instruction_set(flags, aten=aten, environment=environment) == expected


def _capabilities(**offered: bool) -> CpuCapabilities:
    nothing = dict.fromkeys(("multiplies_bfloat16", "packs_float32", "packs_bfloat16", "packs_int8"), False)
    return CpuCapabilities("a processor", "avx2", **(nothing | offered))


@pytest.mark.parametrize(
    ("offered", "num_parameters", "expected"),
    [
        ({"multiplies_bfloat16": True, "packs_bfloat16": True}, 335_000_000, torch.bfloat16),
        ({"multiplies_bfloat16": True, "packs_bfloat16": True}, 5_000_000, torch.float32),
        ({"multiplies_bfloat16": True}, 335_000_000, torch.float32),
        ({"packs_bfloat16": True, "packs_int8": True}, 335_000_000, torch.float32),
        ({}, 335_000_000, torch.float32),
    ],
)
def test_bfloat16_only_where_it_is_fast(
    monkeypatch: pytest.MonkeyPatch, offered: dict[str, bool], num_parameters: int, expected: torch.dtype
) -> None:
    monkeypatch.setattr(device_module, "cpu_capabilities", lambda: _capabilities(**offered))
    assert default_dtype(torch.device("cpu"), num_parameters) == expected


def test_what_packs_by_dtype() -> None:
    cpu = _capabilities(packs_float32=True, packs_int8=True)
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
    assert [cpu.packs(dtype) for dtype in dtypes] == [True, False, False, False]


@pytest.mark.skipif(not cpu_capabilities().packs_float32, reason="oneDNN's packed layers are on x86 alone")
def test_pytorch_still_has_the_private_operators_that_packing_calls() -> None:
    """Without them decoding would fall back to unpacked weights and blame the processor."""
    for space, name in (
        ("mkldnn", "_reorder_linear_weight"), ("mkldnn", "_linear_pointwise"), ("onednn", "qlinear_prepack"),
        ("onednn", "qlinear_pointwise"), ("onednn", "qconv_prepack"), ("onednn", "qconv_pointwise"),
    ):  # fmt: skip
        assert hasattr(getattr(torch.ops, space), name), f"torch.ops.{space}.{name} is gone: PyTorch changed"


# What PyTorch and oneDNN are limited to, to compute as a processor of that class does.
SIMULATED = {
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "avx512_vnni": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"},
    "avx512_bf16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
}
HELD_BY = {  # which processors have the instructions of a class
    "avx2": {"avx2", "avx2_vnni", "avx512", "avx512_vnni", "avx512_bf16", "amx"},
    "avx512": {"avx512", "avx512_vnni", "avx512_bf16", "amx"},
    "avx512_vnni": {"avx512_vnni", "avx512_bf16", "amx"},
    "avx512_bf16": {"avx512_bf16", "amx"},
}


COMPILED_TOKENS: dict[str, list[list[int]]] = {}  # of the first class that was tested, by weights


@pytest.mark.slow
@pytest.mark.parametrize("isa", SIMULATED)
def test_every_class_decodes_in_every_dtype_that_it_offers(isa: str) -> None:
    """In a process that is limited to the class: what it offers, bits free of the batch, and 8-bit products exact."""
    ours = cpu_capabilities().isa
    if ours not in HELD_BY[isa]:
        pytest.skip(f"this processor ({ours}) has no {isa}: nothing can simulate what it lacks")
    report = subprocess.run(
        [sys.executable, str(REPOSITORY / "tests" / "instruction_set_report.py")],
        env=os.environ | SIMULATED[isa] | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert report.returncode == 0, report.stderr
    found = json.loads(report.stdout.splitlines()[-1])
    cpu, has_avx512 = found["cpu"], isa != "avx2"
    assert cpu["isa"] == isa
    assert (cpu["packs_float32"], cpu["packs_bfloat16"]) == (True, has_avx512)
    assert cpu["packs_int8"] == (isa in ("avx512_vnni", "avx512_bf16"))
    assert found["default_dtype_of_a_large_model"] == ("bfloat16" if isa == "avx512_bf16" else "float32")
    assert found["int8_equals_integers"] == {"as chosen": True, "as float32": True}
    assert found["weights"] == {
        "float32": "packed", "float32 plain": "plain", "float32 int8": "int8",
        "bfloat16": "packed" if has_avx512 else "plain",
    }  # fmt: skip
    alone = found["equal_alone_and_in_a_batch"]
    # PyTorch itself checks whether the processor multiplies bfloat16, so a limit alone may leave it no product at all.
    if found["multiplies_plain_bfloat16"] or ours == isa:
        assert alone.pop("bfloat16") is True
    assert alone == {"float32": True, "float32 plain": True, "float32 int8": True}
    compiled = found["compiled_tokens"]
    assert set(compiled) == (set() if library() is None else {"float32", "float32 int8"})
    # The same bits on every instruction set; captions are read by torch, whose last bits differ, and tokens so far do not.
    for name, tokens in compiled.items():
        assert COMPILED_TOKENS.setdefault(name, tokens) == tokens, name
    line = "weights: bfloat16 cannot be packed on this processor (avx2): decoding uses them unpacked"
    assert report.stderr.count("cannot be packed") == (0 if has_avx512 else 1), report.stderr
    assert (line in report.stderr) == (not has_avx512)
