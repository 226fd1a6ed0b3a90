"""What each kernel is measured on: the published sizes, the same work in plain PyTorch, and the bytes it cannot avoid.

B sequences, H heads, D head dim, C model dim, F feed-forward inner dim, V image vocabulary, P prefix positions, N own
positions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import decode_attention, guided_norm, linear, reference, reference_slots, sampling
from kernels.reference import Norm, Residual

TOP_K, TOP_P = 256, 0.9
_EPS = 1e-5

Work = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """One kernel on fresh inputs. `plain` is what users of PyTorch write: the same result, except for sampling noise."""

    kernel: str
    ours: Work
    plain: Work
    num_bytes: int


@dataclass(frozen=True)
class PublishedSizes:
    """As `engine.config.transformer.TransformerConfig`, which needs pydantic; a machine that is borrowed for minutes may lack it."""

    dim: int = 1024
    num_heads: int = 8
    head_dim: int = 64
    ff_mult: int = 4
    image_vocab_size: int = 16384
    image_seq_len: int = 256
    prefix_len: int = 129


@dataclass(frozen=True)
class Sizes:
    """What a kernel's inputs depend on."""

    config: PublishedSizes
    rows: int
    dtype: torch.dtype
    device: torch.device

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype)


def gpu_cases(sizes: Sizes) -> dict[str, Callable[[], Case]]:
    """Each kernel by name; calling an entry makes new inputs."""
    config = sizes.config
    C, A, inner = config.dim, config.num_heads * config.head_dim, config.ff_mult * config.dim
    return {
        "sample": lambda: _sample(sizes, sampling.sample, top_k=0, top_p=1.0),
        f"sample top_k={TOP_K} top_p={TOP_P}": lambda: _sample(sizes, sampling.sample, top_k=TOP_K, top_p=TOP_P),
        "head_sample": lambda: _head_sample(sizes),
        "decode_attention": lambda: _decode_attention(sizes),
        "guided_norm": lambda: _guided_norm(sizes),
        "linear qkv (norm)": lambda: _linear(sizes, C, 3 * A, norm=True),
        "linear out (residual)": lambda: _linear(sizes, A, C, residual=True),
        "linear grow (norm, gated)": lambda: _linear(sizes, C, 2 * inner, norm=True, gated=True),
        "linear shrink (residual)": lambda: _linear(sizes, inner, C, residual=True),
    }


def cpu_cases(config: PublishedSizes, rows: int) -> dict[str, Callable[[], Case]]:
    """On a CPU there are no kernels: the reference's sampling against the usual one."""
    sizes = Sizes(config, rows, torch.float32, torch.device("cpu"))
    return {
        "sample": lambda: _sample(sizes, reference.sample, top_k=0, top_p=1.0),
        f"sample top_k={TOP_K}": lambda: _sample(sizes, reference.sample, top_k=TOP_K, top_p=1.0),
        f"sample top_k={TOP_K} top_p={TOP_P}": lambda: _sample(sizes, reference.sample, top_k=TOP_K, top_p=TOP_P),
    }


def sorted_sample(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """The usual sampling: top-k by `topk`, top-p by a full sort, softmax, multinomial: (B, V) -> (B,)."""
    logits = logits.float()
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, ids = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        ordered = ordered.masked_fill(probabilities.cumsum(-1) - probabilities >= top_p, -torch.inf)
        logits = torch.full_like(logits, -torch.inf).scatter(1, ids, ordered)
    return torch.multinomial(logits.softmax(-1), 1)[:, 0]


def _columns_of(sizes: Sizes, top_k: int, top_p: float) -> dict[str, Tensor]:
    """Seeds and sampling parameters of each sequence."""
    B, device = sizes.rows, sizes.device
    return {
        "seeds": torch.arange(B, device=device),
        "candidates": torch.arange(B, device=device),
        "positions": torch.full((B,), 128, device=device),
        "temperature": torch.ones(B, device=device),
        "top_k": torch.full((B,), top_k, device=device),
        "top_p": torch.full((B,), top_p, device=device),
    }


def _sample(sizes: Sizes, sample: Callable[..., Tensor], *, top_k: int, top_p: float) -> Case:
    logits = sizes.normal(sizes.rows, sizes.config.image_vocab_size)
    columns = _columns_of(sizes, top_k, top_p)
    return Case(
        "sample", lambda: sample(logits, **columns), lambda: sorted_sample(logits, top_k, top_p), _bytes(logits)
    )


def _head_sample(sizes: Sizes) -> Case:
    config = sizes.config
    hidden, weight = sizes.normal(sizes.rows, config.dim), sizes.normal(config.image_vocab_size, config.dim)
    bias = sizes.normal(config.image_vocab_size)
    columns = {name: value for name, value in _columns_of(sizes, 0, 1.0).items() if not name.startswith("top")}
    return Case(
        "head_sample",
        lambda: sampling.head_sample(hidden, weight, bias, **columns),
        lambda: sorted_sample(F.linear(hidden, weight, bias), 0, 1.0),
        _bytes(hidden, weight, bias),
    )


def _decode_attention(sizes: Sizes) -> Case:
    """Half-way through the candidates of one caption. PyTorch has no shared prefix: each sequence holds a copy."""
    config, B = sizes.config, sizes.rows
    P, N, H, D = config.prefix_len, config.image_seq_len - 1, config.num_heads, config.head_dim
    q = sizes.normal(B, H, D)
    prefix_keys, prefix_values = (sizes.normal(1, H, P, D).transpose(1, 2) for _ in range(2))  # (1, P, H, D)
    keys, values = (sizes.normal(B, H, N, D).transpose(1, 2) for _ in range(2))  # (B, N, H, D)
    prefix_of_sequence = torch.zeros(B, dtype=torch.int64, device=sizes.device)
    filled = torch.full((B,), N // 2, device=sizes.device)
    whole_keys, whole_values = (
        torch.cat([prefix.expand(B, -1, -1, -1), own], dim=1).transpose(1, 2).contiguous()  # (B, H, P + N, D)
        for prefix, own in ((prefix_keys, keys), (prefix_values, values))
    )
    seen = (torch.arange(P + N, device=sizes.device) < P + filled[:, None])[:, None, None]  # (B, 1, 1, P + N)
    read = 2 * (P + B * (N // 2)) * H * D * q.element_size()
    return Case(
        "decode_attention",
        lambda: decode_attention.decode_attention(
            q, prefix_keys, prefix_values, prefix_of_sequence, keys, values, filled
        ),
        lambda: F.scaled_dot_product_attention(q[:, :, None], whole_keys, whole_values, attn_mask=seen)[:, :, 0],
        read + 2 * _bytes(q),
    )


def _guided_norm(sizes: Sizes) -> Case:
    """Half of the sequences are guided by the other half."""
    B, C = sizes.rows, sizes.config.dim
    x, weight, bias = sizes.normal(B, C), sizes.normal(C), sizes.normal(C)
    unconditional = torch.arange(B, device=sizes.device).roll(B // 2)
    guidance = torch.where(unconditional > B // 2, 3.0, 1.0)
    arguments = (x, unconditional, guidance, weight, bias)
    return Case(
        "guided_norm",
        lambda: guided_norm.guided_norm(*arguments, eps=_EPS),
        lambda: reference_slots.guided_norm(*arguments, eps=_EPS),
        _bytes(*arguments) + _bytes(x),
    )


def _linear(
    sizes: Sizes, inputs: int, outputs: int, *, norm: bool = False, gated: bool = False, residual: bool = False
) -> Case:
    x, weight, bias = sizes.normal(sizes.rows, inputs), sizes.normal(outputs, inputs), sizes.normal(outputs)
    before = Norm(sizes.normal(inputs), sizes.normal(inputs), _EPS) if norm else None
    after = Residual(sizes.normal(sizes.rows, outputs), sizes.normal(outputs)) if residual else None
    written = sizes.rows * (outputs // 2 if gated else outputs) * x.element_size()
    return Case(
        "linear",
        lambda: linear.linear(x, weight, bias, norm=before, gated=gated, residual=after),
        lambda: reference.linear(x, weight, bias, norm=before, gated=gated, residual=after),
        _bytes(x, weight, bias) + written * (2 if residual else 1),
    )


def _bytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
