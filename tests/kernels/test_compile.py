"""Every kernel, compiled for Hopper (sm_90) at the published sizes on a machine without a GPU.

The interpreter proves that a kernel is right. It cannot prove that it compiles, fits, or keeps its numbers in registers.
Triton ships its own ptxas, so a driver that knows a target and no device is enough: the launchers run as they are,
their tensors lie on the CPU and say otherwise, and what would be launched is compiled instead. This file is run as a
program for that, because triton reads TRITON_INTERPRET once, when it is imported.

    python tests/kernels/test_compile.py FOLDER [rarer]      compiles into FOLDER and prints one JSON line a kernel
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.paths import REPOSITORY

CAPABILITY = 90
SHARED_MAX_BYTES = 227 * 1024  # a block's on Hopper
REGISTERS_MAX = 255  # a thread's
HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}

Compiled = dict[str, dict[str, Any]]


# -------------------------------------------------------------------------------------------- the compiling program


class _OnCuda(torch.Tensor):
    """A CPU tensor that a launcher takes for one on a GPU."""

    is_cuda = True


class _NoDevice:
    """What triton requires of a driver before a launch."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", CAPABILITY, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device


def _tensor(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=dtype).as_subclass(_OnCuda)


def _linear(layer: str, R: int, dtype: torch.dtype) -> None:
    from kernels.linear import linear
    from kernels.reference import Norm, Residual

    def new(*shape: int) -> Tensor:
        return _tensor(*shape, dtype=dtype)

    if layer == "qkv":
        linear(new(R, 1024), new(1536, 1024), norm=Norm(new(1024), new(1024), 1e-5))
    elif layer == "grow":
        linear(new(R, 1024), new(8192, 1024), new(8192), norm=Norm(new(1024), new(1024), 1e-5), gated=True)
    else:
        K = {"out": 512, "shrink": 4096}[layer]
        linear(new(R, K), new(1024, K), new(1024), residual=Residual(new(R, 1024), new(1024)))


def _decode_attention(B: int, dtype: torch.dtype) -> None:
    from kernels.decode_attention import decode_attention

    projected = _tensor(B, 3, 8, 64, dtype=dtype)
    prefix_keys, prefix_values = _tensor(2, 2, 8, 129, 64, dtype=dtype).transpose(2, 3)
    keys, values = _tensor(2, B, 8, 255, 64, dtype=dtype).transpose(2, 3)
    rows = _tensor(B, dtype=torch.int64)
    decode_attention(
        projected[:, 0], prefix_keys, prefix_values, rows, keys, values, rows,
        new_keys=projected[:, 1], new_values=projected[:, 2],
    )  # fmt: skip


def _sample(B: int, dtype: torch.dtype) -> None:
    from kernels.sampling import sample

    logits, rows, floats = (
        _tensor(B, 16384, dtype=dtype),
        _tensor(B, dtype=torch.int64),
        _tensor(B, dtype=torch.float32),
    )
    sample(logits, rows, rows, rows, floats, rows, floats)


def _head_sample(B: int, dtype: torch.dtype) -> None:
    from kernels.sampling import head_sample

    weights = _tensor(16384, 1024, dtype=dtype), _tensor(16384, dtype=dtype)
    rows = _tensor(B, dtype=torch.int64)
    head_sample(_tensor(B, 1024, dtype=dtype), *weights, rows, rows, rows, _tensor(B, dtype=torch.float32))


def _feed_tokens(R: int, dtype: torch.dtype) -> None:
    from kernels.feed_tokens import feed_tokens

    rows, init = _tensor(R, dtype=torch.int64), _tensor(R, 256, dtype=torch.int64)
    tables = _tensor(16384, 1024, dtype=dtype), _tensor(256, 1024, dtype=dtype)
    feed_tokens(rows, rows, init, _tensor(R, 257, dtype=torch.int64), rows, *tables)


def _guided_norm(R: int, dtype: torch.dtype) -> None:
    from kernels.guided_norm import guided_norm

    channels = _tensor(1024, dtype=dtype)
    guidance = _tensor(R, dtype=torch.float32)
    guided_norm(_tensor(R, 1024, dtype=dtype), _tensor(R, dtype=torch.int64), guidance, channels, channels, eps=1e-5)


def _group_norm(C: int, dtype: torch.dtype) -> None:
    from kernels.group_norm import group_norm

    channels = _tensor(C, dtype=dtype)
    group_norm(_tensor(4, 4096, C, dtype=dtype), channels, channels, groups=32, eps=1e-6, silu=True)


def _cases() -> dict[str, Callable[[], None]]:
    """A step of 16 sequences in bfloat16, and the variants that compile to other code."""
    fp16, bf16, fp32 = torch.float16, torch.bfloat16, torch.float32
    return {
        **{f"{layer} 16 bf16": partial(_linear, layer, 16, bf16) for layer in ("qkv", "out", "grow", "shrink")},
        "out 64 bf16": lambda: _linear("out", 64, bf16),
        "grow 64 bf16": lambda: _linear("grow", 64, bf16),
        "shrink 128 fp16": lambda: _linear("shrink", 128, fp16),
        "grow 16 fp32": lambda: _linear("grow", 16, fp32),
        "attention 16 bf16": lambda: _decode_attention(16, bf16),
        "sample 16 bf16": lambda: _sample(16, bf16),
        "head 16 bf16": lambda: _head_sample(16, bf16),
        "grow 256 bf16": lambda: _linear("grow", 256, bf16),
        "feed 16 bf16": lambda: _feed_tokens(16, bf16),
        "guided norm 16 bf16": lambda: _guided_norm(16, bf16),
        "group norm 128 fp16": lambda: _group_norm(128, fp16),
    }


def _rarer_cases() -> dict[str, Callable[[], None]]:
    """Sizes and dtypes beside those of `_cases`: in float16 a Hopper GPU decodes on request only."""
    fp16, bf16, fp32 = torch.float16, torch.bfloat16, torch.float32
    return {
        "attention 16 fp16": lambda: _decode_attention(16, fp16),
        "sample 16 fp16": lambda: _sample(16, fp16),
        "head 64 bf16": lambda: _head_sample(64, bf16),
        "shrink 256 bf16": lambda: _linear("shrink", 256, bf16),
        "group norm 512 fp32": lambda: _group_norm(512, fp32),
    }


def compile_all(folder: Path, cases: dict[str, Callable[[], None]]) -> None:
    """Compiles the cases; writes PTX and TTGIR, prints a JSON line a kernel."""
    import triton
    from triton.backends import nvidia
    from triton.runtime.jit import JITFunction

    triton.runtime.driver.set_active(_NoDevice())
    launch, compiled = JITFunction.run, []

    def compile_only(self: Any, *args: Any, warmup: bool, **options: Any) -> Any:
        compiled.append((self.__name__, launch(self, *args, warmup=True, **options)))
        return compiled[-1][1]

    JITFunction.run = compile_only
    cuobjdump = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    for case, call in cases.items():
        compiled.clear()
        call()
        for name, kernel in compiled:
            file = folder / f"{case}{name}".replace(" ", "-")
            file.with_suffix(".cubin").write_bytes(kernel.asm["cubin"])
            command = [str(cuobjdump), "--dump-resource-usage", str(file.with_suffix(".cubin"))]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            line = {"case": case, "kernel": name, "shared_bytes": kernel.metadata.shared}
            for key, word in {"registers": "REG", "stack_bytes": "STACK", "local_bytes": "LOCAL"}.items():
                line[key] = int(re.findall(rf"\b{word}:(\d+)", usage)[-1])
            print(json.dumps(line | {"ptx": kernel.asm["ptx"], "ttgir": kernel.asm["ttgir"]}), flush=True)


# ------------------------------------------------------------------------------------------------------- the tests


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    return _compiled(tmp_path_factory.mktemp("compiled"))


def _compiled(folder: Path, *options: str) -> Compiled:
    """Case -> kernel -> its resources, PTX and TTGIR."""
    pytest.importorskip("triton.backends.nvidia", reason="this triton has no NVIDIA backend")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {
        "TRITON_CACHE_DIR": str(folder / "cache"),
        "PYTHONPATH": str(REPOSITORY),
        "CUDA_VISIBLE_DEVICES": "",
    }
    answer = subprocess.run(
        [sys.executable, __file__, str(folder), *options],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr[-3000:]
    found: Compiled = {}
    for line in map(json.loads, answer.stdout.splitlines()):
        found.setdefault(line["case"], {})[line["kernel"]] = line
        print({name: value for name, value in line.items() if name not in ("ptx", "ttgir")})
    return found


@pytest.mark.slow
def test_every_kernel_compiles_for_hopper_and_keeps_its_numbers_in_registers(compiled: Compiled) -> None:
    assert list(compiled) == list(_cases())
    assert {kernel for case in compiled.values() for kernel in case} == {
        "_linear_kernel", "_decode_attention_kernel", "_sample_kernel", "_head_kernel", "_best_tile_kernel",
        "_feed_tokens_kernel", "_guided_norm_kernel", "_moments_kernel", "_affine_kernel", "_apply_kernel",
    }  # fmt: skip
    _check_resources(compiled)


@pytest.mark.soak
def test_so_do_their_rarer_variants(tmp_path: Path) -> None:
    compiled = _compiled(tmp_path, "rarer")
    assert list(compiled) == list(_rarer_cases())
    _check_resources(compiled)


def _check_resources(compiled: Compiled) -> None:
    for kernel in (kernel for case in compiled.values() for kernel in case.values()):
        where = f"{kernel['case']}: {kernel['kernel']}"
        # 32 logits a thread and top-p's 64-bit mass of each do not all fit beside the noise; what spills stays in L1.
        allowed = 384 if kernel["kernel"] == "_sample_kernel" else 0
        assert kernel["stack_bytes"] <= allowed, f"{where} spills {kernel['stack_bytes']} bytes a thread"
        assert kernel["local_bytes"] == 0, where
        assert kernel["registers"] <= REGISTERS_MAX, where
        assert kernel["shared_bytes"] <= SHARED_MAX_BYTES, where


def _layout_of_sums(ttgir: str) -> set[str]:
    """Shapes and layouts of what is summed over, aliases spelled out: they are the order of the sums."""
    aliases = dict(re.findall(r"^(#\w+) = (.+)$", ttgir, flags=re.MULTILINE))
    sums = re.findall(r'"tt\.reduce".*?\}\) : \(tensor<(\w+), (#\w+)>\)', ttgir, flags=re.DOTALL)
    return {f"{shape} {aliases[layout]}" for shape, layout in sums}


@pytest.mark.slow
def test_the_tile_of_rows_changes_no_order_of_sums(compiled: Compiled) -> None:
    """A necessary condition for a row's bits to depend on that row alone; only a GPU can prove it."""
    for layer, instruction in {"out": "m16k16", "grow": "m64k16"}.items():
        few, many = (compiled[f"{layer} {rows} bf16"]["_linear_kernel"] for rows in (16, 64))
        assert _layout_of_sums(few["ttgir"]) == _layout_of_sums(many["ttgir"])
        assert len(_layout_of_sums(few["ttgir"])) == (layer == "grow")  # the mean's and the variance's are one
        for kernel in (few, many):  # an instruction may do more rows, and takes as many inputs at a time
            shapes = set(re.findall(r"mma\S*\.(m\d+n\d+k\d+)\.", kernel["ptx"]))
            assert {re.sub(r"n\d+", "", shape) for shape in shapes} == {instruction}


@pytest.mark.slow
def test_the_weights_come_in_wide_copies_ahead_of_their_use(compiled: Compiled) -> None:
    for layer in ("qkv", "out", "grow", "shrink"):
        ptx = compiled[f"{layer} 16 bf16"]["_linear_kernel"]["ptx"]
        widths = set(
            re.findall(r"cp\.async\.c[ag]\.shared\.global \[ \S+ \+ \S+ \], \[ \S+ \+ \S+ \], (0x\w+|\d+)", ptx)
        )
        assert {int(width, 0) for width in widths} == {16}, layer


@pytest.mark.slow
def test_attention_loads_splits_ahead_of_their_use(compiled: Compiled) -> None:
    kernel = compiled["attention 16 bf16"]["_decode_attention_kernel"]
    assert "cp.async" in kernel["ptx"]


@pytest.mark.slow
def test_float32_products_are_exact(compiled: Compiled) -> None:
    ptx = compiled["grow 16 fp32"]["_linear_kernel"]["ptx"]
    assert "mma" not in ptx
    assert "tf32" not in ptx


@pytest.mark.slow
def test_a_program_counts_itself_after_all_its_threads_have_stored(compiled: Compiled) -> None:
    ptx = compiled["shrink 16 bf16"]["_linear_kernel"]["ptx"]
    before, atomic, after = ptx.partition("atom.global.gpu.acq_rel.add")
    assert atomic
    assert "bar.sync" in before[before.rindex("st.global") :]
    assert "bar.sync" in after[: after.index("ld.global.cg")]
    assert "atom" not in after


if __name__ == "__main__":
    compile_all(Path(sys.argv[1]), _rarer_cases() if sys.argv[2:] == ["rarer"] else _cases())
