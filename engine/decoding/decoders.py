"""Which decoder draws where, and keeping the one that is expensive to make.

    CPU     SlotDecoder      reads each prefix once for all its siblings and computes only rows that are there; made
                             anew for each drawing, which costs its buffers and nothing else
            JacobiDecoder    one or two slots: several tokens a pass
            AdaptiveDecoder  more, of rows that come and go: either of the two, by how many slots are taken
    CUDA    GraphDecoder   replays captured steps; kept for the next drawing, which need not capture them again, and
                             grown to the next power of two when a drawing has more rows

Both draw a row from the same numbers: logits differ by rounding, in the order of sums.
"""

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from engine.decoding.cuda.graph_decoder import GraphDecoder
from engine.decoding.kv_cache import Prefix
from engine.decoding.slot_decoder import SlotDecoder
from engine.decoding.speculative.adaptive import AdaptiveDecoder
from engine.decoding.speculative.jacobi import JacobiDecoder
from engine.decoding.step_model import StepModel
from engine.models.transformer import KoDalle
from engine.sampling_params import SequenceRequest

# Windows of 8 for one or two rows: such a pass costs 1.25 (1.55) times a step and gives a row 2.5 tokens or more. With 16
# one row wins no more on photographs and has twice as much to lose; four rows hardly win (benchmarks/LOG.md).
_WINDOW = 8
_GUESSING_SLOTS = 2


class Decoder(Protocol):
    """Rows in flight; see engine/decoding/slot_decoder.py."""

    @property
    def num_joined(self) -> int: ...
    @property
    def num_free(self) -> int: ...
    def join(self, prefix: Prefix, request: SequenceRequest, *, given: Tensor | None = None) -> int: ...
    def leave(self, slot: int) -> Tensor: ...
    def num_tokens(self, slot: int) -> int: ...
    def tokens(self, slot: int) -> Tensor: ...
    def step(self) -> list[int]: ...


def can_graph(device: torch.device) -> bool:
    """Whether `GraphDecoder` draws on this device; where only Triton is missing, says so on stderr."""
    if device.type != "cuda":
        return False
    if importlib.util.find_spec("triton") is None:
        print("triton is not installed: drawing without CUDA graphs; pip install triton", file=sys.stderr)
        return False
    return True


class DecoderCache:
    """Lends a decoder to one drawing after the other, from one thread.

    Args:
        model: its weights must neither change nor move while the keeper lives.
        step_model: the model as `SlotDecoder` is to read it (packed), asked for when one is made; None: as it is.
        batch_invariant: False: as `SlotDecoder` has it; with `GraphDecoder` the fastest attention there is.
        speculative: let one or two rows on a CPU take several tokens a step, the same ones (engine/decoding/speculative/jacobi.py).
        graphed: whether to lend a `GraphDecoder`; None: where `can_graph` says so.
    """

    def __init__(
        self,
        model: KoDalle,
        *,
        step_model: Callable[[], StepModel] | None = None,
        batch_invariant: bool = True,
        speculative: bool = True,
        graphed: bool | None = None,
    ) -> None:
        self._model = model
        self._step_model = step_model
        self._batch_invariant = batch_invariant
        # Guesses are checked by equality, which is worth as much as the equality of arithmetic.
        on_cpu = model.head.weight.device.type == "cpu"
        self._speculates = speculative and batch_invariant and on_cpu and model.config.image_seq_len > 1
        self._is_graphed = can_graph(model.head.weight.device) if graphed is None else graphed
        self._kept: GraphDecoder | None = None
        self._null_prefix: Prefix | None = None  # remembered, so that a decoder once able to guide stays so
        self._is_lent = False

    @contextlib.contextmanager
    def lend(
        self, num_slots: int, *, null_prefix: Prefix | None, continuous_batching: bool = False
    ) -> Iterator[Decoder]:
        """A decoder with at least `num_slots` free slots. Afterwards, or when the drawing raises, all its rows leave.

        Args:
            null_prefix: the empty caption, read; needed for guidance.
            continuous_batching: False: all join at once and finish together.
        """
        if not self._is_graphed:
            model = self._model if self._step_model is None else self._step_model()
            if self._speculates and num_slots <= _GUESSING_SLOTS:
                yield JacobiDecoder(model, num_slots, window=_WINDOW, null_prefix=null_prefix)
            elif self._speculates and continuous_batching:
                yield AdaptiveDecoder(
                    model, num_slots, window=_WINDOW, guessing_slots=_GUESSING_SLOTS, null_prefix=null_prefix
                )
            else:
                yield SlotDecoder(model, num_slots, null_prefix=null_prefix, batch_invariant=self._batch_invariant)
            return
        self._null_prefix = null_prefix or self._null_prefix
        if self._is_lent:  # a drawing within a drawing
            yield self._graphed(num_slots)
            return
        kept = self._kept
        if kept is None or kept.num_slots < num_slots or (null_prefix is not None and not kept.can_guide):
            size = max(num_slots, 0 if kept is None else kept.num_slots)
            self._kept = kept = None  # its memory first
            kept = self._kept = self._graphed(1 << (size - 1).bit_length())
        self._is_lent = True
        try:
            yield kept
        finally:
            self._is_lent = False
            kept.clear()

    def _graphed(self, num_slots: int) -> GraphDecoder:
        attention = "triton" if self._batch_invariant else "auto"
        return GraphDecoder(self._model, num_slots, null_prefix=self._null_prefix, attention=attention)
