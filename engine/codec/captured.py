"""A function of one tensor, captured as a CUDA graph: its launches become one.

Input and output are static buffers: copied in, replayed, copied out.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from engine.cuda_graphs import capturing

_WARM_UPS = 3  # before the capture: cuDNN and cuBLAS choose, Triton compiles


class Captured:
    """A captured function; calling it replays the graph.

    Args:
        function: of one tensor; launches the same kernels each time, without synchronisation or a value read on the host.
        example: an input on the GPU, of the shape and type that all will have; copied.
        stream: where it is captured and runs; None: the caller's current stream.
    """

    def __init__(
        self, function: Callable[[Tensor], Tensor], example: Tensor, *, stream: torch.cuda.Stream | None = None
    ) -> None:
        # An ordinary tensor, whatever mode the caller is in: one made in inference mode could not be written to later.
        with torch.inference_mode(False), torch.no_grad():
            self._input = torch.empty_like(example)
            self._input.copy_(example)
        stream = stream or torch.cuda.Stream(example.device)
        stream.wait_stream(torch.cuda.current_stream(example.device))
        self._graph = torch.cuda.CUDAGraph()
        with torch.inference_mode():  # as decoding captures; modes do not mix well (pytorch/pytorch#166792)
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UPS):
                    function(self._input)
            stream.synchronize()
            with capturing(self._graph, stream=stream):
                self._output = function(self._input)

    def __call__(self, batch: Tensor) -> Tensor:
        """A copy of the function's output, in order on the caller's stream."""
        with torch.no_grad():
            self._input.copy_(batch)
            self._graph.replay()
            return self._output.clone()
