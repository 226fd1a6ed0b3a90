"""Networks built only for their shapes or to take weights: without the random numbers that nothing will see.

Random values cost seconds for hundreds of millions of weights. On the meta device they cost more than that: PyTorch then
computes them by its reference implementations, and imports its compiler and SymPy for them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Of tensors, of torch.nn.init and of transformers.initialization, which wraps these under the same names.
_IN_PLACE = frozenset({Tensor.normal_, Tensor.uniform_})
_INITIALISERS = frozenset({"torch.nn.init", "transformers.initialization"})
_RANDOM = frozenset(
    ["normal_", "uniform_", "trunc_normal_", "xavier_uniform_", "xavier_normal_"]
    + ["kaiming_uniform_", "kaiming_normal_", "orthogonal_", "sparse_"]
)
_MADE = frozenset({torch.randn, torch.rand})


class Uninitialised(TorchFunctionMode):
    """Inside, random tensors are empty ones, and tensors that are filled with random values keep what they hold.

    With `torch.device(...)`, give that one first: `with torch.device("meta"), Uninitialised():`.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _IN_PLACE or (func.__name__ in _RANDOM and func.__module__ in _INITIALISERS):
            return args[0] if args else (kwargs or {})["tensor"]
        if func in _MADE:
            func = torch.empty
        return func(*args, **(kwargs or {}))
