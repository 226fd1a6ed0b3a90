"""Packed weights: the linear layers in the layout that a processor reads fastest, in the model's type or in 8 bits.

R rows, K inputs, N outputs of a linear layer, C model dim, F feed-forward inner dim.

A decode step multiplies few rows by every weight, so it is the read of the weights that costs, and how they lie in
memory decides how fast that is. Measured on two cores with AVX-512 (torch 2.13, oneDNN 3.12), all linear layers of the
published model (252 M weights), milliseconds a step:

    rows             1      4     16     32     64
    as they are     51     98    206    261
    packed          56     58     91    141
    int8            22     22     31     44     71

`packed`: oneDNN's blocked layout, same numbers. A row of it has the same bits for any number of rows from 2 on (1 to
140 tried, float32 and bfloat16, one and two threads), which plain layers have only in multiples.

`int8` is another function, close to the model: weights rounded to 8 bits, one scale an output (the largest is 127);
inputs rounded to 8 bits, one scale a row. Products and sums are integers, exact in any order, so it is
batch-invariant as well. Its effect on images is measured by benchmarks/weights_effect.py.

`int4` is coarser still: one scale for each 64 weights of an output, of 16 values; inputs as in int8. Only the compiled step has
it. benchmarks/weights_effect.py measures it as well.

A processor without VNNI adds two products of bytes in 16 bits, where they saturate. There the same integers are
multiplied as float32, whose sums are exact below 2^24: the same bits, with the memory and about the speed of `packed`.

Where the compiled step was built (engine/decoding/cpu/compiled_step.py), it computes both instead of the layers here, which
are left to models with options that it lacks. Its 8-bit integers are the same; it needs no VNNI to multiply them as such.

Both fold the LayerScale of a branch into its last linear layer, and the attention's 1 / sqrt(D) into its first, but
where queries are normalised: these are divided afterwards.
"""

import functools
import sys
from collections.abc import Callable
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.decoding.cpu.compiled_step import can_compile, compiled_step_model, lacking
from engine.decoding.step_model import PaddingRule, StepLayer, StepModel, plain_step_model
from engine.device import cpu_capabilities
from engine.errors import InputError
from engine.models.attention import normalised_heads
from engine.models.transformer import KoDalle
from engine.models.transformer_layer import AttentionBranch, FeedForwardBranch, Layer, Shift, quick_gelu
from kernels.decode_step import WeightKind

Weights = Literal["plain", "packed", "int8", "int4"]
# Fewer rows than this cost as much: the weights are read once either way (see the table).
_PADDING_RULE = PaddingRule(multiple=1, minimum=4, tile=None)
_ROWS_HINT = 16  # oneDNN picks the layout for this many; 1 to 16 made no difference in speed
_ZERO_POINT = 128  # inputs are unsigned bytes for the processor's 8-bit dot product: stored + 128
_EXACT_INPUTS = 1024  # 1024 * 127 * 127 < 2^24
_KINDS: dict[Weights, WeightKind] = {"packed": "float32", "int8": "int8", "int4": "int4"}
_TINY = torch.finfo(torch.float32).tiny


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this machine has oneDNN's packed linear layers for `dtype`."""
    return device.type == "cpu" and cpu_capabilities().packs(dtype)


def can_quantise(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `int8` runs on this machine: what stays in the model's `dtype` must be packed."""
    return can_pack(dtype, device) and cpu_capabilities().packs_float32


def choose_weights(model: KoDalle, wanted: Weights | None = None) -> Weights:
    """`wanted`, or by default what is fastest without changing the function.

    A model on a CPU whose dtype cannot be packed there is used as it is; one line on stderr says so, once a process.

    Raises:
        InputError: `wanted` is not possible on this machine.
    """
    weight = model.head.weight
    packable = can_pack(weight.dtype, weight.device)
    if wanted is None:
        if not packable and weight.device.type == "cpu":
            _report_plain(weight.dtype)
        return "packed" if packable else "plain"
    isa = f" ({cpu_capabilities().isa})" if weight.device.type == "cpu" else ""
    where = f"{wanted} on {weight.device}{isa}, {weight.dtype}, torch {torch.__version__}"
    if wanted == "packed" and not packable:
        raise InputError("weights", where, "not packed here: use plain, or float32 on an x86 processor")
    if wanted == "int4" and (missing := _why_not_int4(model)) is not None:
        raise InputError("weights", where, f"4-bit weights {missing}: use int8")
    if wanted == "int8" and not can_quantise(weight.dtype, weight.device):
        raise InputError("weights", where, "8-bit weights need an x86 processor and a dtype that it packs: use float32")
    return wanted


def _why_not_int4(model: KoDalle) -> str | None:
    """Why this model cannot be decoded with 4-bit weights here; None: it can. Only the compiled step has them."""
    if can_compile(model, "int4"):
        return None
    lacks = lacking(model.config, "int4")
    if lacks is not None:
        return f"are not made for models with {lacks}"
    return (
        "need a float32 or bfloat16 model and the compiled step, which was built on x86 processors with a C++ compiler"
    )


@functools.cache
def _report_plain(dtype: torch.dtype) -> None:
    isa, name = cpu_capabilities().isa, str(dtype).removeprefix("torch.")
    print(f"weights: {name} cannot be packed on this processor ({isa}): decoding uses them unpacked", file=sys.stderr)


def is_compiled(model: KoDalle, weights: Weights) -> bool:
    """Whether `make_step_model` takes the compiled step."""
    return weights != "plain" and can_compile(model, _KINDS[weights])


@torch.no_grad()
def make_step_model(model: KoDalle, weights: Weights, *, compiled: bool = True) -> StepModel:
    """The model as decoding reads it. All but "plain" add a copy of the linear layers (int8: a quarter of one).

    Args:
        compiled: False: by torch's operators even where the compiled step computes it.
    """
    if compiled and weights != "plain" and can_compile(model, _KINDS[weights]):
        return compiled_step_model(model, _KINDS[weights])
    layers = cast(list[Layer], list(model.layers))
    head_weight, head_bias = model.head.image_rows()
    if weights == "plain":
        return plain_step_model(model)
    if weights == "int4":
        raise InputError("weights", weights, "4-bit weights need the compiled step: see `kodalle doctor`")
    if weights == "packed":
        packed: list[StepLayer] = [_PackedLayer(layer) for layer in layers]
        return StepModel(model, packed, _PackedLinear(head_weight, head_bias), _PADDING_RULE)
    quantised: list[StepLayer] = [_Int8Layer(layer) for layer in layers]
    return StepModel(model, quantised, _Int8Linear(head_weight, head_bias), _PADDING_RULE)


class _Norm:
    """A LayerNorm, its result times `scale`."""

    def __init__(self, norm: nn.LayerNorm, scale: Tensor | None = None) -> None:
        self._shape, self._eps = norm.normalized_shape, norm.eps
        self._weight, self._bias = (part if scale is None else part * scale for part in (norm.weight, norm.bias))

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self._shape, self._weight, self._bias, self._eps)


class _PackedLinear:
    """(R, K) -> (R, N), fused with the operation that follows it."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._bias = bias
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), _ROWS_HINT)

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")
        return out

    def gelu(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "gelu", [], "none")
        return out

    def combined(self, x: Tensor, other: Tensor, operation: Literal["add", "mul"]) -> Tensor:
        """The layer's result added to, or multiplied by, `other` (R, N)."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, self._packed, self._bias, operation)
        return out


class _Attention:
    """The linear layers around a layer's attention: the output's in the model's type whatever the weights, since it is small."""

    def __init__(self, branch: AttentionBranch) -> None:
        self._heads, self._qk_norm = (3, branch.num_heads, branch.head_dim), branch.qk_norm
        self.norm = _Norm(branch.norm)
        self._norm_out = None if branch.norm_out is None else _Norm(branch.norm_out, branch.scale)
        self._out = _PackedLinear(*_scaled(branch.out, branch.scale if self._norm_out is None else None))
        query_scale = 1 if branch.qk_norm else branch.head_dim**-0.5
        scales = (query_scale, 1, 1)

        def scaled(part: Tensor) -> Tensor:
            return torch.cat([rows * scale for rows, scale in zip(part.chunk(3), scales, strict=True)])

        bias = branch.qkv.bias
        self.qkv = scaled(branch.qkv.weight), None if bias is None else scaled(bias)  # weight and bias

    def add(self, onto: Tensor, attended: Tensor) -> Tensor:
        """onto (R, C) plus what the branch makes of the attention's result (R, H, D)."""
        if self._norm_out is None:
            return self._out.combined(attended.flatten(1), onto, "add")
        return onto + self._norm_out(self._out(attended.flatten(1)))

    def split(self, qkv: Tensor) -> Tensor:
        """The first layer's result (R, 3 H D) -> queries / sqrt(D), keys, values (R, 3, H, D)."""
        qkv = qkv.unflatten(1, self._heads)
        if not self._qk_norm:
            return qkv
        q, k, v = qkv.unbind(1)
        q, k = normalised_heads(q, k)
        return torch.stack([q * self._heads[2] ** -0.5, k, v], dim=1)


class _PackedLayer:
    def __init__(self, layer: Layer) -> None:
        branch: FeedForwardBranch = layer.feed_forward
        self._reversible = layer.reversible
        self._attention = _Attention(layer.attention)
        self._qkv = _PackedLinear(*self._attention.qkv)
        self._norm = _Norm(branch.norm)
        self._grow = _packed_grow(branch)
        self._norm_out = None if branch.norm_out is None else _Norm(branch.norm_out, branch.scale)
        self._shrink = _PackedLinear(*_scaled(branch.shrink, branch.scale if self._norm_out is None else None))

    def project(self, x: Tensor, shift: Shift | None = None) -> Tensor:
        normed = self._attention.norm(_streams(x, self._reversible)[1])
        return self._attention.split(self._qkv(normed if shift is None else shift(normed)))

    def finish(self, x: Tensor, attended: Tensor, shift: Shift | None = None) -> Tensor:
        first, second = _streams(x, self._reversible)
        first = self._attention.add(first, attended)
        onto = second if self._reversible else first
        normed = self._norm(first)
        grown = self._grow(normed if shift is None else shift(normed))  # (R, F)
        if self._norm_out is None:
            added = self._shrink.combined(grown, onto, "add")
        else:
            added = onto + self._norm_out(self._shrink(grown))
        return torch.cat([first, added], dim=1) if self._reversible else added


def _packed_grow(branch: FeedForwardBranch) -> Callable[[Tensor], Tensor]:
    """The first layer of a feed-forward branch with its activation: (R, C) -> (R, F)."""
    if branch.is_gated:
        (value, gate), (value_bias, gate_bias) = branch.grow.weight.chunk(2), branch.grow.bias.chunk(2)
        values, gates = _PackedLinear(value, value_bias), _PackedLinear(gate, gate_bias)
        return lambda normed: values.combined(normed, gates.gelu(normed), "mul")
    grow = _PackedLinear(branch.grow.weight, branch.grow.bias)
    if branch.config.activation == "gelu":
        return grow.gelu
    return lambda normed: quick_gelu(grow(normed))


class _Int8Linear:
    """x ~ scale_x * q_x a row, weight ~ scale_w * q_w an output: y = scale_x * scale_w * (q_x . q_w) + bias.

    Args:
        weight: (N, K) of any floating-point type.
        bias: (N,) or None.
        in_bytes: multiply bytes; else the same integers as float32. None: bytes where the processor adds them exactly.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, *, in_bytes: bool | None = None) -> None:
        self._bias = None if bias is None else bias.detach().float()
        weight = weight.detach().float()
        self._scales = weight.abs().amax(1).clamp_(min=_TINY).div_(127)  # (N,)
        quantised = (weight / self._scales[:, None]).round_()  # (N, K), -127..127
        in_bytes = cpu_capabilities().packs_int8 if in_bytes is None else in_bytes
        self._products = _ByteProducts(quantised, self._scales) if in_bytes else _FloatProducts(quantised, self._scales)

    def __call__(self, x: Tensor) -> Tensor:
        """(R, K) -> (R, N) in x's dtype."""
        return self.multiply(*_quantise_rows(x)).to(x.dtype)

    def multiply(self, quantised: Tensor, scale: Tensor) -> Tensor:
        """(R, K) uint8, (R, 1) -> (R, N) float32."""
        product = self._products(quantised)
        # No fused multiply-add: where PyTorch uses one depends on how its threads share the rows.
        return product.mul_(scale) if self._bias is None else product.mul_(scale).add_(self._bias)


class _ByteProducts:
    """(R, K) uint8 around 128 -> scale_w * (q_x . q_w), (R, N) float32, by the processor's 8-bit dot product."""

    def __init__(self, quantised: Tensor, scales: Tensor) -> None:
        self._scales, self._zero_points = scales, torch.zeros(len(scales), dtype=torch.int32, device=scales.device)
        self._packed = torch.ops.onednn.qlinear_prepack(quantised.to(torch.int8), [_ROWS_HINT, quantised.shape[1]])

    def __call__(self, quantised: Tensor) -> Tensor:
        product: Tensor = torch.ops.onednn.qlinear_pointwise(
            quantised, 1.0, _ZERO_POINT, self._packed, self._scales, self._zero_points, None,
            1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        return product


class _FloatProducts:
    """The same bits by float32 products of the same integers, which are exact as long as no sum reaches 2^24."""

    def __init__(self, quantised: Tensor, scales: Tensor) -> None:
        self._scales = scales
        self._parts = [_PackedLinear(part, None) for part in quantised.split(_EXACT_INPUTS, dim=1)]

    def __call__(self, quantised: Tensor) -> Tensor:
        inputs = (quantised.float() - _ZERO_POINT).split(_EXACT_INPUTS, dim=1)
        sums = [part(some.contiguous()) for part, some in zip(self._parts, inputs, strict=True)]
        if len(sums) > 1:  # added up in float64 and rounded once, as bytes are added up in 32 bits and rounded
            sums = [torch.stack(sums).sum(0, dtype=torch.float64).float()]
        return sums[0].mul_(self._scales)


class _Int8Layer:
    def __init__(self, layer: Layer) -> None:
        branch: FeedForwardBranch = layer.feed_forward
        self._reversible = layer.reversible
        self._attention = _Attention(layer.attention)
        self._qkv = _Int8Linear(*self._attention.qkv)
        self._norm = _Norm(branch.norm)
        self._grow = _int8_grow(branch)
        self._norm_out = None if branch.norm_out is None else _Norm(branch.norm_out, branch.scale)
        self._shrink = _Int8Linear(*_scaled(branch.shrink, branch.scale if self._norm_out is None else None))

    def project(self, x: Tensor, shift: Shift | None = None) -> Tensor:
        normed = self._attention.norm(_streams(x, self._reversible)[1])
        return self._attention.split(self._qkv(normed if shift is None else shift(normed)))

    def finish(self, x: Tensor, attended: Tensor, shift: Shift | None = None) -> Tensor:
        first, second = _streams(x, self._reversible)
        first = self._attention.add(first, attended)
        normed = self._norm(first)
        grown = self._grow(normed if shift is None else shift(normed))  # (R, F)
        branch = self._shrink.multiply(*_quantise_rows(grown)).to(x.dtype)
        added = (second if self._reversible else first) + (branch if self._norm_out is None else self._norm_out(branch))
        return torch.cat([first, added], dim=1) if self._reversible else added


def _int8_grow(branch: FeedForwardBranch) -> Callable[[Tensor], Tensor]:
    """The first layer of a feed-forward branch with its activation: (R, C) -> (R, F) float32."""
    if branch.is_gated:
        (value, gate), (value_bias, gate_bias) = branch.grow.weight.chunk(2), branch.grow.bias.chunk(2)
        values, gates = _Int8Linear(value, value_bias), _Int8Linear(gate, gate_bias)

        def gated(normed: Tensor) -> Tensor:
            quantised = _quantise_rows(normed)
            return F.gelu(gates.multiply(*quantised)).mul_(values.multiply(*quantised))

        return gated
    grow = _Int8Linear(branch.grow.weight, branch.grow.bias)
    return lambda normed: branch.activate(grow.multiply(*_quantise_rows(normed)))


def _quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(R, K) -> unsigned bytes (R, K) around 128, and the size of one of their steps (R, 1)."""
    x = x.float()
    # torch.linalg.vector_norm and addcdiv would be one operation instead of two, and take 3 to 6 times as long.
    scale = x.abs().amax(1, keepdim=True).clamp_(min=_TINY).div_(127)
    # Conversion cuts the fraction off, so half more than the zero point rounds to the nearest.
    return (x / scale).add_(_ZERO_POINT + 0.5).to(torch.uint8), scale


def _streams(x: Tensor, reversible: bool) -> tuple[Tensor, Tensor]:
    """(R, 2 C) -> the two streams (R, C) each; the only one twice. Contiguous, as packed products take them."""
    if not reversible:
        return x, x
    first, second = x.chunk(2, dim=1)
    return first.contiguous(), second.contiguous()


def _scaled(linear: nn.Linear, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weight and bias of scale * linear(x)."""
    if scale is None:
        return linear.weight, linear.bias
    return linear.weight * scale[:, None], linear.bias * scale
