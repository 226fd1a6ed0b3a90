"""Checks that every kernel launcher makes: devices, gradients, and whether the kernel can run on this machine."""

from collections.abc import Mapping

import torch
from torch import Tensor

try:
    import triton
except ImportError:
    triton = None


def words(tensor: Tensor) -> str:
    """A tensor as an error message names it."""
    return f"{tuple(tensor.shape)} {tensor.dtype} of strides {tensor.stride()}"


def check_beside(like_name: str, like: Tensor, tensors: Mapping[str, Tensor | None]) -> None:
    """Raises ValueError unless all tensors (None: not given) are on the device of `like`."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != like.device:
            raise ValueError(f"{name}: is on {tensor.device}; must be on {like.device}, beside {like_name}")


def check_no_gradient(tensors: Mapping[str, Tensor | None]) -> None:
    """Raises ValueError where a tensor (None: not given) would be differentiated."""
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise ValueError(
                f"{name}: needs a gradient, which this kernel does not have: call it in torch.inference_mode()"
            )


def check_runs(function: str, name: str, tensor: Tensor, kernel: object | None, *, reference: str) -> None:
    """Raises unless `kernel` can run where `tensor` is.

    Args:
        function: the launcher's full name.
        name: of `tensor`, in messages.
        kernel: the Triton function; None where its module found no Triton.
        reference: the function to call instead.

    Raises:
        ImportError: no Triton.
        ValueError: not on CUDA, and Triton is not interpreting.
    """
    if kernel is None:
        raise ImportError(f"{function} needs triton: pip install triton, or call {reference}")
    if not tensor.is_cuda and not is_interpreted(kernel):
        remedy = f"call {reference} (or set TRITON_INTERPRET=1 before triton is imported)"
        raise ValueError(f"{name}: is on {tensor.device}, where no kernel runs: {remedy}")


def is_interpreted(kernel: object) -> bool:
    """Whether Triton's interpreter runs this kernel, instead of a compiled one."""
    return triton is None or not isinstance(kernel, triton.JITFunction)
