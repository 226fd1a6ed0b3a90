"""Seeds and sampling parameters of a batch, as tensors.

B sequences, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.sampling_params import SequenceRequest
from kernels import reference


class SamplingTensors:
    """The columns that `kernels.reference.sample` takes, each (B,)."""

    def __init__(self, requests: Sequence[SequenceRequest], device: torch.device) -> None:
        def column(values: list[int] | list[float], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        params = [request.sampling_params for request in requests]
        # int64 holds seeds of 2^63 and more as their two's complement
        self.seeds = column([request.seed - 2**64 * (request.seed >= 2**63) for request in requests], torch.int64)
        self.candidates = column([request.candidate for request in requests], torch.int64)
        self.temperature = column([one.temperature for one in params], torch.float32)
        self.top_k = column([one.top_k or 0 for one in params], torch.int64)
        self.top_p = column([1.0 if one.top_p is None else one.top_p for one in params], torch.float32)

    def sample(self, logits: Tensor, positions: Tensor) -> Tensor:
        """Samples one token a sequence: logits (B, V) at positions (B,) -> (B,) int64."""
        return reference.sample(
            logits, self.seeds, self.candidates, positions, self.temperature, self.top_k, self.top_p
        )
