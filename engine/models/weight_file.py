"""Writing of safetensors files tensor by tensor, in the memory of the largest one.

The library's `save_file` copies all tensors into bytes before it writes the first. The format is a length, a JSON header and the
numbers (https://huggingface.co/docs/safetensors), so a header made from shapes can precede numbers that are not read yet.
"""

import json
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_TYPE_NAMES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of known shape and type that `read` makes when its turn comes."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> "LazyTensor":
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def to(self, dtype: torch.dtype) -> "LazyTensor":
        """In another floating-point type; integers stay as they are."""
        if not self.dtype.is_floating_point or self.dtype == dtype:
            return self
        return LazyTensor(self.shape, dtype, lambda: self.read().to(dtype))


def write_weight_file(path: Path, weights: Mapping[str, LazyTensor]) -> None:
    """Writes a safetensors file. Not atomic: pass a temporary path.

    Raises:
        ValueError: a tensor is not what its `LazyTensor` says.
    """
    names = sorted(weights, key=lambda name: (-weights[name].dtype.itemsize, name))  # as the library: aligned
    header: dict[str, Any] = {}
    end = 0
    for name in names:
        start, end = end, end + weights[name].numel * weights[name].dtype.itemsize
        header[name] = {
            "dtype": _TYPE_NAMES[weights[name].dtype], "shape": list(weights[name].shape), "data_offsets": [start, end]
        }  # fmt: skip
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            tensor = weights[name].read().detach().cpu().contiguous()
            if (tuple(tensor.shape), tensor.dtype) != (weights[name].shape, weights[name].dtype):
                raise ValueError(f"{name} is {tuple(tensor.shape)} {tensor.dtype}, expected {weights[name]}")
            if tensor.numel():
                file.write(tensor.flatten().view(torch.uint8).numpy().data)
            del tensor  # not beside the next one
