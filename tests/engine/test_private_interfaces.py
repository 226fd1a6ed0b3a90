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


@pytest.mark.parametrize("found_inf", [0.0, 1.0])
def test_fused_optimizers_withhold_the_update_where_found_inf_is_1(found_inf: float) -> None:
    """engine/training/update_guard.py sets the tensor, as torch's GradScaler does."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], fused=True)
    assert optimizer._step_supports_amp_scaling
    assert not getattr(torch.optim.AdamW([weight]), "_step_supports_amp_scaling", False)
    optimizer.found_inf = torch.tensor(found_inf)  # type: ignore[attr-defined]
    weight.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(weight.detach(), torch.ones(3)) == bool(found_inf)


# ------------------------------------------------------------------------------------------------- DeepSpeed and Typer


@pytest.mark.slow
def test_deepspeed_optimizers_keep_the_gradient_norm() -> None:
    """engine/training computes it where an optimizer has no such attribute."""
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    for optimizer in (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3):
        assert "self._global_grad_norm = " in inspect.getsource(optimizer), optimizer
    source = inspect.getsource(DeepSpeedEngine)
    assert "self.basic_optimizer = " in source
    assert "self.skipped_steps += 1" in source


def test_deepspeed_says_when_the_loss_scale_cannot_fall() -> None:
    """engine/training recognises the exception by its words."""
    scaler = pytest.importorskip("deepspeed.runtime.fp16.loss_scaler")
    assert "loss scale already at minimum" in inspect.getsource(scaler)


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
