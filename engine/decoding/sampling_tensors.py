"""Seeds and sampling parameters of a batch, as tensors.

B sequences, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.decoding.cpu.compiled_step import library
from engine.sampling_params import SequenceRequest
from kernels import reference
from kernels.decode_step import LANES, sample


class SamplingTensors:
    """The columns that `kernels.reference.sample` takes, each (B,).

    On a CPU the noise comes from compiled code where there is some; the token is the reference's, which decides near ties.
    """

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
        self._has_filters = any(one.top_k or one.top_p is not None for one in params)

    def sample(self, logits: Tensor, positions: Tensor) -> Tensor:
        """Samples one token a sequence: logits (B, V) at positions (B,) -> (B,) int64."""
        found = library() if logits.device.type == "cpu" and logits.dtype == torch.float32 else None
        if found is None or logits.shape[1] % LANES:
            return self._reference(logits, positions, slice(None))
        scores, temperature = logits.contiguous(), self.temperature
        if self._has_filters:
            scores = reference.filter_logits(logits, temperature, self.top_k, self.top_p)
            temperature = (temperature > 0).float()  # the scores are divided already
        tokens, is_close = sample(found, scores, self.seeds, self.candidates, positions, temperature)
        if is_close.any():
            rows = is_close.nonzero()[:, 0]
            tokens[rows] = self._reference(logits[rows], positions[rows], rows)
        return tokens

    def _reference(self, logits: Tensor, positions: Tensor, rows: Tensor | slice) -> Tensor:
        seeds, candidates, temperature, top_k, top_p = (
            column[rows] for column in (self.seeds, self.candidates, self.temperature, self.top_k, self.top_p)
        )
        return reference.sample(logits, seeds, candidates, positions, temperature, top_k, top_p)
