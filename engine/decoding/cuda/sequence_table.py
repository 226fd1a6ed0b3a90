"""What a captured step reads about each row: one small table on the device, written by the host in one copy.

S slots.

The host keeps the table too and is the only one who decides anything in it; the device counts positions on by itself.
When rows join or leave, the whole table goes over before the next step: 20 KB for 256 slots, one asynchronous copy,
whether one row joined or all of them. It travels through pinned memory that is new each time: PyTorch's host allocator
gives a block out again only when the copies that read it are done, so the host neither waits nor overwrites.
"""

import numpy as np
import torch

from engine.sampling_params import SequenceRequest

_INTEGERS = ("seeds", "candidates", "positions", "top_k", "partner", "source", "captions", "filters")
_FLOATS = ("temperature", "top_p", "guidance")


class SequenceTable:
    """Columns of every slot, each (S,), contiguous, at one address for the table's life.

    seeds, candidates, positions, top_k: int64, as `kernels.reference.sample` takes them. positions: of the token drawn
        next; N: the slot is parked, and what it computes goes nowhere.
    partner: int64, the slot that reads the empty caption for this row; itself when there is none.
    source: int64, the slot whose token this row is fed: itself, or of a partner the drawn row.
    captions: int64, place in the prefix pool.
    filters: int64, 1 where top-k or top-p removes anything.
    temperature, top_p, guidance: float32.

    Args:
        num_slots: S.
        parked: N, the position of slots that nobody has.
    """

    def __init__(self, num_slots: int, *, parked: int, device: torch.device) -> None:
        self._parked = parked
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
        self.partner, self.source, self.captions, self.filters = integers[4:].unbind()
        self.temperature, self.top_p, self.guidance = floats[: len(_FLOATS)].unbind()
        for slot in range(num_slots):
            self.park(slot)
        self.upload()

    def seat(self, slot: int, request: SequenceRequest, *, caption: int, partner: int | None, filters: bool) -> None:
        """A drawn row, on the host; `upload` tells the device."""
        options = request.sampling_params
        self._set(
            slot,
            seeds=request.seed - 2**64 * (request.seed >= 2**63),  # int64 holds large seeds as their two's complement
            candidates=request.candidate,
            top_k=options.top_k or 0,
            partner=slot if partner is None else partner,
            source=slot,
            captions=caption,
            filters=int(filters),
            temperature=options.temperature,
            top_p=1.0 if options.top_p is None else options.top_p,
            guidance=options.guidance_scale,
        )

    def seat_partner(self, slot: int, *, drawn: int, caption: int) -> None:
        """The row that reads the empty caption for the row in slot `drawn`."""
        self.park(slot)
        self._set(slot, source=drawn, captions=caption)

    def park(self, slot: int) -> None:
        """Nobody's: draws the likeliest token of rubbish, unread."""
        self._set(
            slot, seeds=0, candidates=0, positions=self._parked, top_k=0, partner=slot, source=slot, captions=0,
            filters=0, temperature=0.0, top_p=1.0, guidance=1.0,
        )  # fmt: skip

    def place(self, slot: int, position: int) -> None:
        """Where a row is; the device's own count is overwritten by the next upload."""
        self._set(slot, positions=position)

    def upload(self) -> None:
        """Queues the copy to the device behind the steps that are under way."""
        host = torch.from_numpy(self._host)
        self._device.copy_(host.pin_memory() if self._device.is_cuda else host, non_blocking=True)

    def _set(self, slot: int, **values: float) -> None:
        for name, value in values.items():
            self._columns[name][slot] = value
