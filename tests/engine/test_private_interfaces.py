"""Private interfaces of other packages that the engine relies on. A failure names the interface that has changed."""

import inspect
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import typer

# ------------------------------------------------------------------------------------------------------------- torch


def test_torch_mkldnn_packs_a_weight_and_multiplies_by_it() -> None:
    """engine/decoding/cpu: packed weights."""
    x, weight, bias = torch.randn(3, 8), torch.randn(5, 8), torch.randn(5)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, 16)
    expected = torch.nn.functional.linear(x, weight, bias)
    out = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    torch.testing.assert_close(out, expected)
    gelu = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "gelu", [], "none")
    torch.testing.assert_close(gelu, torch.nn.functional.gelu(expected))
    other = torch.randn(3, 5)
    product = torch.ops.mkldnn._linear_pointwise.binary(x, other, packed, bias, "mul")
    torch.testing.assert_close(product, expected * other)


def test_torch_int_mm_multiplies_8_bit_matrices() -> None:
    """engine/measure.py: the peak of 8-bit arithmetic."""
    a, b = torch.ones(32, 32, dtype=torch.int8), torch.full((32, 32), 2, dtype=torch.int8)
    assert torch._int_mm(a, b).tolist() == [[64] * 32] * 32


@pytest.mark.parametrize("suffix", ["", "_backward"])
def test_torch_has_its_cpu_attention_operators(suffix: str) -> None:
    """engine/measure.py counts their operations by name."""
    assert hasattr(torch.ops.aten, f"_scaled_dot_product_flash_attention_for_cpu{suffix}")


def test_torch_dispatch_modes_see_every_operator() -> None:
    """engine/measure.py counts operations with one."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(func.overloadpacket)
            return func(*args, **(kwargs or {}))

    with Recorder():
        torch.ones(2, 2) @ torch.ones(2, 2)
    assert torch.ops.aten.mm in seen


def test_torch_unflattens_tensors() -> None:
    """engine/training: views into DeepSpeed's flat fp16 weights."""
    from torch._utils import _unflatten_dense_tensors

    flat = torch.arange(6.0)
    one, other = _unflatten_dense_tensors(flat, [torch.empty(2), torch.empty(2, 2)])
    assert (one.tolist(), other.tolist()) == ([0.0, 1.0], [[2.0, 3.0], [4.0, 5.0]])
    assert one.data_ptr() == flat.data_ptr()


# ------------------------------------------------------------------------------------------------- DeepSpeed and Typer


def test_deepspeed_engine_returns_the_gradient_norm_that_is_set() -> None:
    """engine/training sets it where DeepSpeed's optimizer measures none."""
    engine = pytest.importorskip("deepspeed.runtime.engine")
    source = inspect.getsource(engine.DeepSpeedEngine.get_global_grad_norm)
    assert "self._global_grad_norm" in source


def test_deepspeed_has_its_fp16_optimizers_and_exceptions() -> None:
    """engine/training distinguishes them."""
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.config import DeepSpeedConfigError
    from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
    from deepspeed.runtime.zero.utils import ZeRORuntimeException

    assert issubclass(DeepSpeedConfigError, Exception)
    assert issubclass(ZeRORuntimeException, Exception)
    for name in ("fp32_groups_flat", "fp16_groups"):
        assert f"self.{name} = " in inspect.getsource(FP16_Optimizer), name
    for name in ("fp32_groups", "fp16_groups"):
        assert f"self.{name} = " in inspect.getsource(FP16_UnfusedOptimizer), name


def test_deepspeed_lists_its_operations_by_whether_they_can_be_built() -> None:
    """engine/training switches the shared-memory communication off there."""
    deepspeed = pytest.importorskip("deepspeed")
    assert isinstance(deepspeed.ops.__compatible_ops__, dict)


@pytest.mark.parametrize(
    "key", ["train_micro_batch_size_per_gpu", "gradient_clipping", "zero_optimization", "fp16", "bf16", "optimizer"]
)
def test_deepspeed_quotes_its_config_keys_in_its_files_of_constants_and_configs(key: str) -> None:
    """engine/training/deepspeed_section.py reads the known keys from them."""
    spec = find_spec("deepspeed")
    if spec is None or spec.origin is None:
        pytest.skip("DeepSpeed is not installed")
    files = [path for path in Path(spec.origin).parent.rglob("*.py") if path.stem.endswith(("constants", "config"))]
    assert any(f'"{key}"' in path.read_text(encoding="utf-8") for path in files)


def test_typers_usage_errors_have_a_common_base_class() -> None:
    """engine/commands/error_lines.py catches it."""
    base = typer.BadParameter.__mro__[1]
    assert base.__name__ == "UsageError"
    error = base("wrong")
    assert error.format_message() == "wrong"
    assert error.ctx is None
