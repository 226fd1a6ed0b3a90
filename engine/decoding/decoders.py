"""Which decoder runs where, and a cache of the one that is expensive to make.

    CPU     SlotDecoder      reads each prefix once for all its siblings and computes only rows that are taken; made
                             anew for each generation, which costs its buffers and nothing else
            JacobiDecoder    one or two slots: several tokens a pass
            AdaptiveDecoder  more slots, continuous batching: either of the two, by how many slots are taken
            all three have every option of the transformer
    CUDA    GraphDecoder     replays captured steps; cached, so that the next generation need not capture them again,
                             and grown to the next power of two when a generation has more sequences
            SlotDecoder      models with token shift, rotary positions or attention patterns, as one line on stderr says

All give a sequence the same tokens from the same arithmetic; on CUDA logits differ from a CPU's by rounding, in the
order of sums.
"""

import contextlib
import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch

from engine.config.transformer import TransformerConfig
from engine.decoding.decoder import Decoder
from engine.decoding.kv_cache import Prefix
from engine.decoding.slot_decoder import SlotDecoder
from engine.decoding.speculative.adaptive import AdaptiveDecoder
from engine.decoding.speculative.jacobi import JacobiDecoder
from engine.decoding.step_model import StepModel
from engine.models.transformer import KoDalle

if TYPE_CHECKING:
    from engine.decoding.cuda.graph_decoder import GraphDecoder

# Windows of 8 for one or two sequences: such a pass costs 1.25 (1.55) times a step and gives a sequence 2.5 tokens or
# more. With 16 one sequence gains no more on photographs and has twice as much to lose; four sequences hardly gain
# (benchmarks/LOG.md).
WINDOW = 8
_SPECULATIVE_SLOTS = 2


def can_graph(device: torch.device) -> bool:
    """Whether `GraphDecoder` runs on this device; where only Triton is missing, stderr says so."""
    if device.type != "cuda":
        return False
    if importlib.util.find_spec("triton") is None:
        print("triton is not installed: decoding without CUDA graphs; pip install triton", file=sys.stderr)
        return False
    return True


@functools.cache
def _report_ungraphed(config: TransformerConfig) -> None:
    """One line, once a model: why a GPU decodes it step by step."""
    found = ", ".join(name for name in ("token_shift", "rotary") if getattr(config, name)) or "attention_patterns"
    print(f"decoding: over the KV cache, launch by launch without CUDA graphs, since it has {found}", file=sys.stderr)


class DecoderCache:
    """Decoders for one generation after the other, from one thread.

    Args:
        model: its weights must neither change nor move while the cache lives.
        step_model: makes the model as `SlotDecoder` reads it (packed), when one is needed; None: as it is.
        batch_invariant: see `SlotDecoder`; False: `GraphDecoder` takes the fastest attention there is.
        speculative: let one or two sequences on a CPU take several tokens a step, the same ones
            (engine/decoding/speculative/jacobi.py).
        graphed: whether to use `GraphDecoder`; None: where `can_graph` says so.
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
        if self._is_graphed and model.config.depends_on_positions:
            _report_ungraphed(model.config)
            self._is_graphed = False
        self._cached: GraphDecoder | None = None
        self._null_prefix: Prefix | None = None  # remembered, so that a decoder once able to guide stays so
        self._is_borrowed = False

    @contextlib.contextmanager
    def borrow(
        self, num_slots: int, *, null_prefix: Prefix | None, continuous_batching: bool = False
    ) -> Iterator[Decoder]:
        """A decoder with at least `num_slots` free slots. Its sequences are removed afterwards, after an error as well.

        Args:
            null_prefix: the empty caption, prefilled; needed for guidance.
            continuous_batching: False: all sequences are added at once and finish together.
        """
        if not self._is_graphed:
            model = self._model if self._step_model is None else self._step_model()
            if self._speculates and num_slots <= _SPECULATIVE_SLOTS:
                yield JacobiDecoder(model, num_slots, window=WINDOW, null_prefix=null_prefix)
            elif self._speculates and continuous_batching:
                yield AdaptiveDecoder(
                    model, num_slots, window=WINDOW, speculative_slots=_SPECULATIVE_SLOTS, null_prefix=null_prefix
                )
            else:
                yield SlotDecoder(model, num_slots, null_prefix=null_prefix, batch_invariant=self._batch_invariant)
            return
        self._null_prefix = null_prefix or self._null_prefix
        if self._is_borrowed:  # a generation within a generation
            yield self._make_graphed(num_slots)
            return
        cached = self._cached
        if cached is None or cached.num_slots < num_slots or (null_prefix is not None and not cached.table.can_guide):
            size = max(num_slots, 0 if cached is None else cached.num_slots)
            self._cached = cached = None  # its memory first
            cached = self._cached = self._make_graphed(1 << (size - 1).bit_length())
        self._is_borrowed = True
        try:
            yield cached
        finally:
            self._is_borrowed = False
            cached.clear()

    def _make_graphed(self, num_slots: int) -> "GraphDecoder":
        from engine.decoding.cuda.graph_decoder import (
            GraphDecoder,  # its kernels import Triton, which a CPU does not need
        )

        attention = "triton" if self._batch_invariant else "auto"
        return GraphDecoder(self._model, num_slots, null_prefix=self._null_prefix, attention=attention)
