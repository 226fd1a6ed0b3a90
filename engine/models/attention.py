"""Attention over whole sequences (training, prefill), by one of three backends.

B sequences, T positions, H heads, D head dim.

One layout everywhere: (B, T, H, D). PyTorch's SDPA takes (B, H, T, D); the transpose is a view and stays in here.
All backends compute the same function. A requested backend that cannot run is an InputError, never a silent change to
another one. Attention over the KV cache is in engine/decoding/kv_cache.py.
"""

import functools
import importlib
import importlib.util
from types import ModuleType
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.errors import InputError
from kernels import reference

AttentionBackend = Literal["sdpa", "xformers", "reference"]
BACKENDS: tuple[str, ...] = get_args(AttentionBackend)

# Of normalised queries and keys, over 1 / sqrt(D). Their scores cannot exceed sqrt(D), so a softmax over hundreds of
# positions is too flat without it. nanochat multiplies both by 1.2; modded-nanogpt has 0.12 at D = 128, which is 1.36.
QK_GAIN = 1.44
QK_EPS = 1e-6  # written out: PyTorch's default follows the dtype, 0.008 in bfloat16


def check_backend(backend: str, device: torch.device) -> AttentionBackend:
    """Checks that `backend` can run on `device`, once and before any work.

    Returns:
        `backend`, as its type.

    Raises:
        InputError: unknown name; xformers without CUDA or not installed.
    """
    if backend == "sdpa" or backend == "reference":
        return backend  # type: ignore[return-value]
    if backend != "xformers":
        raise InputError("attention backend", backend, f"choose one of {', '.join(BACKENDS)}")
    if device.type != "cuda":
        raise InputError("attention backend", backend, f"runs on CUDA only and the model is on {device}: choose sdpa")
    if importlib.util.find_spec("xformers") is None:
        raise InputError("attention backend", backend, "is not installed: pip install xformers, or choose sdpa")
    return "xformers"


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, backend: AttentionBackend = "sdpa") -> Tensor:
    """softmax(q k^T / sqrt(D)) v.

    Args:
        q: (B, Tq, H, D).
        k, v: (B, Tk, H, D).
        causal: the queries are the last Tq of the Tk positions and see none after their own.
        backend: see `check_backend`.

    Returns:
        (B, Tq, H, D) in q's dtype.

    Raises:
        InputError: the backend cannot run where q is.
    """
    if backend == "sdpa":
        return _sdpa(q, k, v, causal)
    check_backend(backend, q.device)
    if backend == "xformers":
        return _xformers(q, k, v, causal)
    return reference.attention(q, k, v, causal=causal)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, backend: AttentionBackend) -> Tensor:
    """The same over what a mask allows: q, k, v (B, T, H, D), mask (Tq, Tk) bool -> (B, Tq, H, D).

    Raises:
        InputError: the backend cannot run where q is.
    """
    if backend == "xformers":
        check_backend(backend, q.device)
        out: Tensor = _xformers_ops().memory_efficient_attention(q, k, v, attn_bias=_xformers_bias(q, mask))
        return out
    if backend == "reference":
        wide = torch.promote_types(q.dtype, torch.float32)
        scores = torch.einsum("bqhd,bkhd->bhqk", q.to(wide), k.to(wide)) * q.shape[-1] ** -0.5
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        return torch.einsum("bhqk,bkhd->bqhd", weights, v.to(wide)).to(q.dtype)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def _xformers_bias(q: Tensor, mask: Tensor) -> Tensor:
    """(B, H, Tq, Tk) of 0 and -inf, a view of rows whose length is a multiple of 8, as its kernels read them."""
    (B, _, H, _), (Tq, Tk) = q.shape, mask.shape
    rows = torch.zeros(Tq, -(-Tk // 8) * 8, dtype=q.dtype, device=q.device)
    rows[:, :Tk].masked_fill_(~mask, -torch.inf)
    return rows[:, :Tk].expand(B, H, Tq, Tk)


def normalised_heads(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys (..., D) with a root mean square of 1 a head, without weights; queries times `QK_GAIN`.

    Henry et al., "Query-key normalization for transformers", arXiv 2010.04245, as in nanochat and modded-nanogpt.
    """
    size = q.shape[-1:]
    return F.rms_norm(q, size, eps=QK_EPS) * QK_GAIN, F.rms_norm(k, size, eps=QK_EPS)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    Tq, Tk = q.shape[1], k.shape[1]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D)
    if causal and Tq != Tk:  # is_causal aligns the first query with the first key; ours are the last ones
        # Imported on use: it loads torch's compiler, 2 to 3 s at the start of every process.
        from torch.nn.attention.bias import causal_lower_right

        return F.scaled_dot_product_attention(q, k, v, attn_mask=causal_lower_right(Tq, Tk)).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)


def _xformers(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    ops = _xformers_ops()
    bias = None
    if causal:
        aligned = q.shape[1] == k.shape[1]
        bias = (
            ops.fmha.attn_bias.LowerTriangularMask()
            if aligned
            else (ops.fmha.attn_bias.LowerTriangularFromBottomRightMask())
        )
    out: Tensor = ops.memory_efficient_attention(q, k, v, attn_bias=bias)
    return out


@functools.cache
def _xformers_ops() -> ModuleType:
    # Imported on first use: importing it costs seconds and probes the GPU, and the CPU stack never needs it.
    return importlib.import_module("xformers.ops")
