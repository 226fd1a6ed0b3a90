"""Decoding in fixed slots: rows join at any step, each at its own position, and leave when they are done.

R rows computed, C model dim, N image tokens, V image vocabulary, P prefix positions.

    decoder = SlotDecoder(model, num_slots=64)
    slot = decoder.join(prefix, SequenceRequest(0, SamplingParams(seed=7)))   # between any two steps
    while decoder.num_joined:
        for slot in decoder.step():                                   # one token for every joined row
            image_tokens = decoder.leave(slot)                        # finished: (N,)

    step:  hidden of every row ─► head ─► token ─► embedding ─► layers over the cache ─► hidden of every row

A guided row takes two slots: its partner reads the empty caption and is fed the same tokens. Which slot a row has, and
who else is there, changes nothing in its tokens. Noise is keyed by (seed, candidate, position, token id), see
kernels/reference.py; what remains is arithmetic that must not change with the number of rows. So as many rows are
computed as the step model's arithmetic needs (its `padding_rule`: packed weights at least 4, plain ones multiples of 4, at
least 16). `batch_invariant=False` drops that: tokens may then differ with the company.
On CUDA library matrix products promise no such thing: see engine/decoding/cuda/graph_decoder.py for those.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.decoding.kv_cache import Caption, KVCache, Prefix
from engine.decoding.sampling_tensors import SamplingTensors
from engine.decoding.step_model import NO_PADDING, PaddingRule, StepModel, plain_step_model
from engine.errors import InputError
from engine.models.transformer import KoDalle
from engine.sampling_params import SequenceRequest


@dataclass
class Row:
    """A drawn row. `partner` is the slot that reads the empty caption for it."""

    request: SequenceRequest
    partner: int | None
    position: int  # of the token that is drawn next
    is_given: bool  # some tokens are given instead of drawn


class SlotDecoder:
    """Rows in flight. Call it in eval mode and under `torch.inference_mode`, from one thread.

    Args:
        model: its weights must not change while rows are in flight. For packed weights, a step model
            (engine.decoding.cpu.packed_weights.make_step_model).
        num_slots: how many rows fit, partners of guided rows included.
        null_prefix: the empty caption, read; needed for guidance.
        batch_invariant: see the module's docstring.
    """

    def __init__(
        self,
        model: KoDalle | StepModel,
        num_slots: int,
        *,
        null_prefix: Prefix | None = None,
        batch_invariant: bool = True,
    ) -> None:
        self.model = plain_step_model(model) if isinstance(model, KoDalle) else model
        config, self._dtype, self._device = self.model.config, self.model.dtype, self.model.device
        self.num_slots = num_slots
        self._null_prefix = null_prefix
        self._rule = self.model.padding_rule if batch_invariant else NO_PADDING
        room = self._rule.padded(num_slots)
        prefix_shape = (config.num_layers, config.prefix_len, config.num_heads, config.head_dim)
        self._cache = KVCache(room, config.image_seq_len - 1, prefix_shape, dtype=self._dtype, device=self._device)
        self._hidden = torch.zeros(room, config.dim, dtype=self._dtype, device=self._device)
        self._tokens = torch.zeros(room, config.image_seq_len, dtype=torch.int64, device=self._device)
        self._given = torch.full_like(self._tokens, -1)
        self._rows: dict[int, Row] = {}
        self._captions: dict[int, Caption] = {}  # of drawn rows and partners
        self._plan: Plan | None = None  # None: somebody joined or left

    @property
    def num_joined(self) -> int:
        """Rows that have not left, finished ones included."""
        return len(self._rows)

    @property
    def num_free(self) -> int:
        """Free slots; a guided row needs two."""
        return self.num_slots - len(self._captions)

    def join(self, prefix: Prefix, request: SequenceRequest, *, given: Tensor | None = None) -> int:
        """Seats a row; it draws from the next step on.

        Args:
            prefix: read captions, of which `request.prefix_index` is the row's.
            given: (N,) image tokens that are not drawn, -1 where to draw.

        Returns:
            The row's slot.

        Raises:
            InputError: no such caption; guidance without `null_prefix`; no slot free.
        """
        if not 0 <= request.prefix_index < prefix.num_captions:
            raise InputError("prefix_index", request.prefix_index, f"there are {prefix.num_captions} captions, from 0")
        is_guided = request.sampling_params.is_guided
        if is_guided and self._null_prefix is None:
            raise InputError(
                "guidance_scale", request.sampling_params.guidance_scale, "needs the empty caption's tokens"
            )
        if self.num_free < 1 + is_guided:
            raise InputError("slots", self.num_slots, f"{self.num_free} are free and {1 + is_guided} wanted: wait")
        free = (slot for slot in range(self.num_slots) if slot not in self._captions)
        slot = next(free)
        self._captions[slot] = Caption(prefix, request.prefix_index)
        self._hidden[slot] = prefix.hidden[request.prefix_index]
        partner = None
        if is_guided:
            assert self._null_prefix is not None
            partner = next(free)
            self._captions[partner] = Caption(self._null_prefix, 0)
            self._hidden[partner] = self._null_prefix.hidden[0]
        self._given[slot] = -1 if given is None else given
        self._rows[slot] = Row(request, partner, position=0, is_given=given is not None)
        self._plan = None
        return slot

    def leave(self, slot: int) -> Tensor:
        """Frees a row's slot, finished or not.

        Returns:
            (n,) the tokens that it has so far, all N when it is finished.
        """
        row = self._rows.pop(slot)
        del self._captions[slot]
        if row.partner is not None:
            del self._captions[row.partner]
        self._plan = None
        return self._tokens[slot, : row.position].clone()

    def num_tokens(self, slot: int) -> int:
        """Tokens that a joined row has so far; a view of them costs more than to count them."""
        return self._rows[slot].position

    def tokens(self, slot: int) -> Tensor:
        """(n,) tokens that a joined row has so far; a view, overwritten when the slot is given to another row."""
        return self._tokens[slot, : self._rows[slot].position]

    def step(self) -> list[int]:
        """Gives every joined row that is not finished its next token.

        Returns:
            The slots of rows that finished in this step.
        """
        N, plan = self.model.config.image_seq_len, self._look_around()
        if plan is None:
            return []
        drawn = self._draw(plan)
        self._tokens[plan.draws, plan.positions] = drawn
        finished = []
        for slot in plan.slots:
            row = self._rows[slot]
            row.position += 1
            if row.position == N:
                finished.append(slot)
        if finished:
            self._plan = None
        if len(finished) < len(plan.slots):
            self._forward(plan, drawn)
        plan.advance()
        return finished

    def next_logits(self) -> Tensor:
        """(B, V): what the next tokens of the unfinished rows are drawn from, lowest slot first; before temperature."""
        plan = self._look_around()
        if plan is None:
            return self._hidden.new_empty(0, self.model.config.image_vocab_size)
        return self.logits(plan)[: len(plan.slots)]

    def _look_around(self) -> "Plan | None":
        """The plan of the unfinished rows, made anew when somebody joined or left; None when there are none."""
        if self._plan is None:
            unfinished = {
                slot: row for slot, row in self._rows.items() if row.position < self.model.config.image_seq_len
            }
            if not unfinished:
                return None
            self._plan = Plan(unfinished, self._captions, self._rule, self._device, self._dtype)
            self._cache.seat({slot: self._captions[slot] for slot in self._plan.seated})
        return self._plan

    def _draw(self, plan: "Plan") -> Tensor:
        """(B,) tokens of the drawn rows."""
        logits = self.logits(plan)[: len(plan.slots)]
        drawn = plan.parameters.sample(logits, plan.positions)
        if plan.has_given:
            given = self._given[plan.draws, plan.positions]
            drawn = torch.where(given >= 0, given, drawn)
        return drawn

    def logits(self, plan: "Plan") -> Tensor:
        """(at least B, V): what the drawn rows predict next, guidance applied."""
        hidden = self.model.head_norm(self._hidden[plan.head_rows])  # (B + padding, C)
        if plan.guided.numel():
            # The head is linear and the weights sum to 1: guiding its input guides its output, at one head row a draw.
            null = self.model.head_norm(self._hidden[plan.partners])
            hidden = hidden.index_copy(0, plan.guided, null + plan.guidance * (hidden[plan.guided] - null))
        return self._rule.tiled(self.model.image_logits, hidden)

    def _forward(self, plan: "Plan", drawn: Tensor) -> None:
        """Feeds the drawn tokens (B,) to the model. Rows that nobody has, or that are finished, compute rubbish."""
        R = plan.num_rows
        fed = drawn.new_zeros(R).index_copy_(0, plan.draws, drawn)
        if plan.guided.numel():
            fed[plan.partners] = drawn[plan.guided]
        # A finished row's position is N - 1, one more than the cache and the next input have: it is fed rubbish.
        lengths = plan.lengths.clamp(max=self.model.config.image_seq_len - 2)
        x = self.model.embed(fed, lengths)  # (R, C)
        self._cache.begin_step(lengths, min(plan.longest, self.model.config.image_seq_len - 2))
        for number, layer in enumerate(self.model.layers):
            qkv = self._rule.tiled(layer.project, x)  # (R, 3, H, D)
            attended = self._cache.append_and_attend(number, qkv)  # (R, H, D)
            x = self._rule.tiled(layer.finish, x, attended)
        self._hidden[:R] = x


class Plan:
    """Everything about the rows in flight that only changes when one joins or leaves, as tensors."""

    def __init__(
        self,
        rows: dict[int, Row],
        captions: dict[int, Caption],
        rule: PaddingRule,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        def column(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        self.slots = sorted(rows)
        self.has_given = any(row.is_given for row in rows.values())
        guided = [(place, slot) for place, slot in enumerate(self.slots) if rows[slot].partner is not None]
        partners = [rows[slot].partner or 0 for _, slot in guided]
        self.seated = [*self.slots, *partners]
        self.num_rows = rule.padded(max(self.seated) + 1)
        self.draws = column(self.slots)  # (B,) slots of the drawn rows
        self.guided = column([place for place, _ in guided])  # (U,) into the drawn rows
        self.partners = column(partners)  # (U,) slots
        scales = [rows[slot].request.sampling_params.guidance_scale for _, slot in guided]
        self.guidance = torch.tensor(scales, dtype=dtype, device=device)[:, None]  # (U, 1)
        head_rows = self.slots + self.slots[:1] * (rule.padded(len(self.slots)) - len(self.slots))
        self.head_rows = column(head_rows)  # (B + padding,) slots
        self.positions = column([rows[slot].position for slot in self.slots])  # (B,)
        lengths = [0] * self.num_rows  # own positions in the cache; rows that nobody has stay at 0 or run on, unread
        for slot in self.slots:
            lengths[slot] = rows[slot].position
        for partner, (_, slot) in zip(partners, guided, strict=True):
            lengths[partner] = rows[slot].position
        self.lengths = column(lengths)  # (R,)
        self.longest = max(lengths)
        self.parameters = SamplingTensors([rows[slot].request for slot in self.slots], device)

    def advance(self) -> None:
        """One position on, for every row."""
        self.positions += 1
        self.lengths += 1
        self.longest += 1
