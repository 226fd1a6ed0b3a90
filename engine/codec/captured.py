"""A function of one tensor, captured as a CUDA graph: its launches become one.

The input has one shape and the answer one place: copied in, replayed, copied out.
"""

from collections.abc import Callable

import torch
from torch import Tensor

_WARM_UPS = 3  # before the capture: cuDNN and cuBLAS choose, Triton compiles


class Captured:
    """Runs `function` by replay.

    Args:
        function: of one tensor; launches the same kernels each time, waits for nothing, reads no value on the host.
        example: an input on the GPU, of the shape and type that all will have; copied.
        stream: where it is captured and runs; None: the caller's, whichever that is.
    """

    def __init__(
        self, function: Callable[[Tensor], Tensor], example: Tensor, *, stream: torch.cuda.Stream | None = None
    ) -> None:
        self._input = example.clone()
        stream = stream or torch.cuda.Stream(example.device)
        stream.wait_stream(torch.cuda.current_stream(example.device))
        self._graph = torch.cuda.CUDAGraph()
        with torch.no_grad():
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UPS):
                    function(self._input)
            stream.synchronize()
            with torch.cuda.graph(self._graph, stream=stream):
                self._output = function(self._input)

    def __call__(self, rows: Tensor) -> Tensor:
        """The function's answer, a copy, in order on the caller's stream."""
        self._input.copy_(rows)
        self._graph.replay()
        return self._output.clone()
