"""What the sampling kernels refuse, by name, and where they do not run."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import contract, sampling
from kernels.sampling import head_sample, sample
from tests.kernels.test_sampling import _off, _rows

# ------------------------------------------------------------------------------------------------------ contracts


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"logits": torch.zeros(2, 9, dtype=torch.float64)}, "logits"),
        ({"logits": torch.zeros(2, 65537)}, "logits"),
        ({"logits": torch.zeros(9)}, "logits"),
        ({"seeds": torch.zeros(3, dtype=torch.int64)}, "seeds"),
        ({"candidates": torch.zeros(2, dtype=torch.int32)}, "candidates"),
        ({"positions": torch.zeros(4, dtype=torch.int64)[::2]}, "positions"),
        ({"temperature": torch.ones(2, dtype=torch.float64)}, "temperature"),
        ({"top_k": torch.ones(2)}, "top_k"),
        ({"top_p": torch.ones(2, device="meta")}, "top_p"),
    ],
)
def test_contract_errors_name_the_tensor(changes: dict[str, Tensor], field: str) -> None:
    seeds, candidates, positions = _rows(2, "cpu")
    temperature, top_k, top_p = _off(2, "cpu")
    arguments = {
        "logits": torch.zeros(2, 9), "seeds": seeds, "candidates": candidates, "positions": positions,
        "temperature": temperature, "top_k": top_k, "top_p": top_p,
    }  # fmt: skip
    with pytest.raises(ValueError, match=f"^{field}: "):
        sample(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"hidden": torch.zeros(2, 4, dtype=torch.int64)}, "hidden"),
        ({"hidden": torch.zeros(4, 2).t()}, "hidden"),
        ({"weight": torch.zeros(7, 5)}, "weight"),
        ({"weight": torch.zeros(7, 4, dtype=torch.float16)}, "weight"),
        ({"bias": torch.zeros(8)}, "bias"),
        ({"temperature": torch.ones(1)}, "temperature"),
    ],
)
def test_head_contract_errors_name_the_tensor(changes: dict[str, Tensor], field: str) -> None:
    seeds, candidates, positions = _rows(2, "cpu")
    arguments = {
        "hidden": torch.zeros(2, 4), "weight": torch.zeros(7, 4), "bias": torch.zeros(7), "seeds": seeds,
        "candidates": candidates, "positions": positions, "temperature": torch.ones(2),
    }  # fmt: skip
    with pytest.raises(ValueError, match=f"^{field}: "):
        head_sample(**(arguments | changes))


def test_the_cpu_is_refused_where_kernels_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contract, "is_interpreted", lambda _: False)
    with pytest.raises(ValueError, match="where no kernel runs: call kernels"):
        sample(torch.zeros(1, 4), *_rows(1, "cpu"), *_off(1, "cpu"))


def test_without_triton_the_module_imports_and_its_functions_name_the_remedy(
    without_triton: Callable[[ModuleType], Any],
) -> None:
    module = without_triton(sampling)
    with pytest.raises(ImportError, match="pip install triton"):
        module.sample(torch.zeros(1, 4), *_rows(1, "cpu"), *_off(1, "cpu"))
