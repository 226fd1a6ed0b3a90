"""Rows' seeds and options as the arithmetic of a draw takes them.

B rows, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.sampling_params import SequenceRequest
from kernels import reference


class SamplingTensors:
    """The rows' seeds and options as tensors, made once."""

    def __init__(self, rows: Sequence[SequenceRequest], device: torch.device) -> None:
        def column(values: list[int] | list[float], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        options = [row.sampling_params for row in rows]
        # int64 holds seeds of 2^63 and more as their two's complement
        self.seeds = column([row.seed - 2**64 * (row.seed >= 2**63) for row in rows], torch.int64)
        self.candidates = column([row.candidate for row in rows], torch.int64)
        self.temperature = column([option.temperature for option in options], torch.float32)
        self.top_k = column([option.top_k or 0 for option in options], torch.int64)
        self.top_p = column([1.0 if option.top_p is None else option.top_p for option in options], torch.float32)

    def sample(self, logits: Tensor, positions: Tensor) -> Tensor:
        """(B, V), (B,) -> (B,)."""
        return reference.sample(
            logits, self.seeds, self.candidates, positions, self.temperature, self.top_k, self.top_p
        )
