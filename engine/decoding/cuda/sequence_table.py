"""What a captured step reads about each sequence: a small table on the device, written by the host in one copy.

S slots.

The host keeps a copy and is the only one to write anything in it but positions, which the device counts on by itself.
When sequences are added or removed, the whole table is copied before the next step: 20 KB for 256 slots, one
asynchronous copy, whether one sequence was added or all of them. It goes through pinned memory that is new each time:
PyTorch's host allocator reuses a block only when the copies that read it are done, so the host neither waits nor
overwrites.
"""

import numpy as np
import torch

from engine.sampling_params import SamplingParams, SequenceRequest

_INTEGERS = ("seeds", "candidates", "positions", "top_k", "unconditional", "source", "prefixes", "filters")
_FLOATS = ("temperature", "top_p", "guidance")


class SequenceTable:
    """Columns of every slot, each (S,), contiguous, at one address for the table's life.

    seeds, candidates, positions, top_k: int64, as `kernels.reference.sample` takes them. positions: of the token that
        is sampled next; N: the slot is idle, and what it computes is never read.
    unconditional: int64, the slot that reads the empty caption for this sequence; itself when there is none.
    source: int64, the slot whose token this one is fed: itself, or of an unconditional sequence the conditional one.
    prefixes: int64, entry of the prefix pool.
    filters: int64, 1 where top-k or top-p removes anything.
    temperature, top_p, guidance: float32.

    Args:
        num_slots: S.
        idle_position: N.
        vocab_size: V, the image vocabulary.
    """

    def __init__(self, num_slots: int, *, idle_position: int, vocab_size: int, device: torch.device) -> None:
        self._idle_position, self._vocab_size = idle_position, vocab_size
        # Columns start at multiples of 16 bytes: Triton compiles a kernel anew for each way in which they do not.
        width = -(-num_slots // 4) * 4
        # float32 columns lie two to a row of int64, so that one copy moves all
        num_rows = len(_INTEGERS) + -(-len(_FLOATS) // 2)
        self._host = np.zeros((num_rows, width), np.int64)
        host_floats = self._host[len(_INTEGERS) :].view(np.float32).reshape(-1, width)  # (twice the rows, width)
        self._columns = dict(zip(_INTEGERS, self._host, strict=False)) | dict(zip(_FLOATS, host_floats, strict=False))
        self._device = torch.zeros(num_rows, width, dtype=torch.int64, device=device)
        floats = self._device[len(_INTEGERS) :].view(torch.float32).view(-1, width)[:, :num_slots]
        integers = self._device[: len(_INTEGERS), :num_slots]
        self.seeds, self.candidates, self.positions, self.top_k = integers[:4].unbind()
        self.unconditional, self.source, self.prefixes, self.filters = integers[4:].unbind()
        self.temperature, self.top_p, self.guidance = floats[: len(_FLOATS)].unbind()
        for slot in range(num_slots):
            self.set_idle(slot)
        self.upload()

    def set_sequence(
        self, slot: int, request: SequenceRequest, *, prefix_entry: int, unconditional_slot: int | None
    ) -> None:
        """Writes a sequence's columns on the host; `upload` copies them to the device."""
        params = request.sampling_params
        self._set(
            slot,
            seeds=request.seed - 2**64 * (request.seed >= 2**63),  # int64 holds large seeds as their two's complement
            candidates=request.candidate,
            top_k=params.top_k or 0,
            unconditional=slot if unconditional_slot is None else unconditional_slot,
            source=slot,
            prefixes=prefix_entry,
            filters=int(self.filters_logits(params)),
            temperature=params.temperature,
            top_p=1.0 if params.top_p is None else params.top_p,
            guidance=params.guidance_scale,
        )

    def set_unconditional(self, slot: int, *, source: int, prefix_entry: int) -> None:
        """Writes the columns of the slot that reads the empty caption for the sequence in slot `source`."""
        self.set_idle(slot)
        self._set(slot, source=source, prefixes=prefix_entry)

    def set_idle(self, slot: int) -> None:
        """A free slot takes the likeliest token of undefined logits, which is never read."""
        self._set(
            slot, seeds=0, candidates=0, positions=self._idle_position, top_k=0, unconditional=slot, source=slot,
            prefixes=0, filters=0, temperature=0.0, top_p=1.0, guidance=1.0,
        )  # fmt: skip

    def set_position(self, slot: int, position: int) -> None:
        """Where a sequence is; the device's own count is overwritten by the next upload."""
        self._set(slot, positions=position)

    def upload(self) -> None:
        """Queues the copy to the device behind the steps that are under way."""
        host = torch.from_numpy(self._host)
        self._device.copy_(host.pin_memory() if self._device.is_cuda else host, non_blocking=True)

    def filters_logits(self, params: SamplingParams) -> bool:
        """Whether top-k or top-p removes anything."""
        by_k = params.top_k is not None and params.top_k < self._vocab_size
        by_p = params.top_p is not None and params.top_p < 1
        return params.temperature > 0 and (by_k or by_p)

    def _set(self, slot: int, **values: float) -> None:
        for name, value in values.items():
            self._columns[name][slot] = value
