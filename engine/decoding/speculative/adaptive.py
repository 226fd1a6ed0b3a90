"""Rows that come and go, and guess ahead while there are few of them: what a server steps on a CPU.

    one or two slots taken    JacobiDecoder: several tokens a pass, since such a pass costs little more than a step
    more                      SlotDecoder: one token a step for all of them

A row moves from one to the other and back at any token, with its keys and values, and gets the tokens that it would get
from either: both compute a position with the same bits (engine/decoding/speculative/window_cache.py). To move into the windows costs
a copy of its cache; to move back costs, besides, one step, since a window ends before its last token was read.
"""

from dataclasses import replace

import torch
from torch import Tensor

from engine.decoding.kv_cache import Prefix
from engine.decoding.slot_decoder import Plan, Row, SlotDecoder
from engine.decoding.speculative.jacobi import JacobiDecoder
from engine.decoding.step_model import StepModel
from engine.models.transformer import KoDalle


class AdaptiveDecoder(SlotDecoder):
    """`SlotDecoder` whose step gives a row several tokens while few slots are taken, the same ones.

    Args:
        model, num_slots, null_prefix: see `SlotDecoder`.
        window, guessing_slots: see `JacobiDecoder`; it draws while at most so many slots are taken.
    """

    def __init__(
        self,
        model: KoDalle | StepModel,
        num_slots: int,
        *,
        window: int,
        guessing_slots: int,
        null_prefix: Prefix | None = None,
    ) -> None:
        super().__init__(model, num_slots, null_prefix=null_prefix)
        self._guessing_slots = guessing_slots
        self._guesser = JacobiDecoder(self.model, guessing_slots, window=window, null_prefix=null_prefix)
        self._guessing: dict[int, int] = {}  # own slot of a row that the guesser draws: its slot there
        self.num_moves = {"in": 0, "back": 0}

    def step(self) -> list[int]:
        """Gives every joined row that is not finished at least one token.

        Returns:
            The slots of rows that finished in this step.
        """
        unfinished = {slot: row for slot, row in self._rows.items() if row.position < self.model.config.image_seq_len}
        if sum(_num_slots(row) for row in unfinished.values()) > self._guessing_slots:
            self._move_back()
            return super().step()
        for slot, row in unfinished.items():
            if slot not in self._guessing:
                self._move_in(slot, row)
        finished_there = self._guesser.step()
        finished = []
        for slot, there in list(self._guessing.items()):
            tokens = self._guesser.tokens(there)
            self._rows[slot].position = len(tokens)
            self._tokens[slot, : len(tokens)] = tokens
            if there in finished_there:
                self._guesser.leave(self._guessing.pop(slot))
                finished.append(slot)
        return finished

    def leave(self, slot: int) -> Tensor:
        """Frees a row's slot, finished or not.

        Returns:
            (n,) the tokens that it has so far, all N when it is finished.
        """
        if slot in self._guessing:
            self._guesser.leave(self._guessing.pop(slot))
        return super().leave(slot)

    def next_logits(self) -> Tensor:
        """(B, V): see `SlotDecoder`."""
        self._move_back()
        return super().next_logits()

    def _move_in(self, slot: int, row: Row) -> None:
        caption = self._captions[slot]
        given = self._given[slot] if row.is_given else None
        request = replace(row.request, prefix_index=caption.index)
        there = self._guesser.join(caption.prefix, request, given=given)
        self._guesser.go_on_from(there, self.tokens(slot), self._cache, _slots(slot, row))
        self._guessing[slot] = there
        self.num_moves["in"] += 1
        self._plan = None  # positions of these rows go on elsewhere

    def _move_back(self) -> None:
        """All rows that the guesser draws, with their last tokens read."""
        if not self._guessing:
            return
        rows = {slot: self._rows[slot] for slot in self._guessing}
        for slot, there in self._guessing.items():
            self._guesser.give_cache(there, self._cache, _slots(slot, rows[slot]))
            self._guesser.leave(there)
        self._guessing.clear()
        self._read_last(rows)
        self.num_moves["back"] += len(rows)
        self._plan = None

    def _read_last(self, rows: dict[int, Row]) -> None:
        """Feeds each row's last token, and no other row's anything."""
        # Rows that joined a moment ago hold what their captions predict, and a step overwrites all below its highest.
        hidden = self._hidden.clone()
        before = {slot: replace(row, position=row.position - 1) for slot, row in rows.items()}
        plan = Plan(before, self._captions, self._rule, self._device, self._dtype)
        self._cache.seat({slot: self._captions[slot] for slot in plan.seated})
        self._forward(plan, self._tokens[plan.draws, plan.positions])
        moved = torch.tensor(plan.seated, device=self._device)
        hidden[moved] = self._hidden[moved]
        self._hidden = hidden


def _num_slots(row: Row) -> int:
    return 1 if row.partner is None else 2


def _slots(slot: int, row: Row) -> list[int]:
    return [slot] if row.partner is None else [slot, row.partner]
