"""Several tokens a pass, exactly those that one at a time would give: fixed-noise Jacobi decoding.

B rows, R rows computed, w window, C model dim, N image tokens, V image vocabulary.

A draw is argmax(logits / temperature + noise), and the noise belongs to the candidate and the position. So a token is a
function of the tokens before it, and a guess of it can be checked by equality, without a draft model:

    inputs of a pass     t6   [g7   g8   g9 ]      the last known token and w - 1 guesses
    what it draws        d7    d8   d9   d10
    g7 == d7, g8 == d8, g9 != d9   ->   d7, d8, d9 are final; d10 was drawn after a wrong token: it is the next guess

The first draw of a pass is always final, so no drawing takes more passes than tokens. Which tokens come out depends on
nothing but the equality of arithmetic: a position has the same bits in any window (engine/decoding/speculative/window_cache.py),
and a row in any company. A position that was never drawn is guessed to look like the cell above it.

What it wins depends on the model and on what rows cost. Two small trained models took 2.5 and 3.4 times fewer passes
with w = 8 at temperature 1; such a pass costs 1.25 times a step of one row at the published sizes (two cores). See
benchmarks/LOG.md.

(Jacobi for autoregressive models: Song et al., arXiv 2002.03629. With fixed noise: Wiggers and Hoogeboom, "Predictive
sampling with forecasting autoregressive models", arXiv 2002.09928.)
"""

import torch
from torch import Tensor

from engine.decoding.kv_cache import KVCache, Prefix
from engine.decoding.sampling_tensors import SamplingTensors
from engine.decoding.slot_decoder import Plan, Row, SlotDecoder
from engine.decoding.speculative.window_cache import WindowCache
from engine.decoding.step_model import StepModel
from engine.models.transformer import KoDalle
from engine.sampling_params import SequenceRequest


class JacobiDecoder(SlotDecoder):
    """`SlotDecoder` with windows: a step gives every unfinished row 1 to `window` tokens, the same ones.

    Args:
        model, num_slots, null_prefix, batch_invariant: see `SlotDecoder`.
        window: w, 2 or more. Linear layers are computed for w times as many rows.
    """

    def __init__(
        self,
        model: KoDalle | StepModel,
        num_slots: int,
        *,
        window: int,
        null_prefix: Prefix | None = None,
        batch_invariant: bool = True,
    ) -> None:
        assert window >= 2, window
        super().__init__(model, num_slots, null_prefix=null_prefix, batch_invariant=batch_invariant)
        config = self.model.config
        assert config.image_seq_len >= 2, config.image_seq_len
        self.window = window
        self._windows = WindowCache(
            num_slots, config.image_seq_len - 1,
            (config.num_layers, config.prefix_len, config.num_heads, config.head_dim),
            window=window, dtype=self._dtype, device=self._device,
        )  # fmt: skip
        self._guesses = torch.zeros(num_slots, config.image_seq_len, dtype=torch.int64, device=self._device)
        self._guessed = torch.zeros(num_slots, dtype=torch.int64, device=self._device)  # how many of them were drawn
        self._offsets = torch.arange(window, device=self._device)

    def go_on_from(self, slot: int, tokens: Tensor, cache: KVCache, rows: list[int]) -> None:
        """Takes over a row that has joined and not been stepped, as far as another decoder drew it.

        Args:
            tokens: (n,) what it has so far.
            cache: where its keys and values of these lie.
            rows: its row there, and for a guided row its partner's.
        """
        n = len(tokens)
        if n == 0:
            return
        self._rows[slot].position = n
        self._tokens[slot, :n] = self._guesses[slot, :n] = tokens
        self._guessed[slot] = n
        for own, other in zip(self._slots_of(slot), rows, strict=True):
            self._windows.copy_row(own, cache, other)

    def give_cache(self, slot: int, cache: KVCache, rows: list[int]) -> None:
        """Copies a row's keys and values, which end before its last token, into `rows` of another cache."""
        for own, other in zip(self._slots_of(slot), rows, strict=True):
            cache.copy_row(other, self._windows, own)

    def _slots_of(self, slot: int) -> list[int]:
        partner = self._rows[slot].partner
        return [slot] if partner is None else [slot, partner]

    def step(self) -> list[int]:
        """Gives every joined row that is not finished at least one token.

        Returns:
            The slots of rows that finished in this step.
        """
        N = self.model.config.image_seq_len
        if self._plan is None and not self._begin():
            return []
        plan = self._plan
        assert plan is not None
        inputs = self._inputs(plan)  # (B, w)
        drawn = self._draw_window(plan, self._forward_window(plan, inputs))  # (B, w)
        at = plan.positions[:, None] + self._offsets  # (B, w)
        right = (inputs[:, 1:] == drawn[:, :-1]) & (at[:, 1:] < N)
        accepted = 1 + right.long().cumprod(1).sum(1)  # (B,)
        self._keep(self._guesses, plan.draws, at, drawn, at < N)
        self._keep(self._tokens, plan.draws, at, drawn, self._offsets < accepted[:, None])
        self._guessed[plan.draws] = at[:, -1].clamp(max=N - 1) + 1
        plan.positions += accepted
        finished = []
        for slot, count in zip(plan.slots, accepted.tolist(), strict=True):
            self._rows[slot].position += count
            if self._rows[slot].position == N:
                finished.append(slot)
        if finished:
            self._plan = None
        return finished

    def _begin(self) -> bool:
        """First tokens of rows that are new, and the plan of all; False when every row is finished."""
        unfinished = {slot: row for slot, row in self._rows.items() if row.position < self.model.config.image_seq_len}
        if not unfinished:
            return False
        new = {slot: row for slot, row in unfinished.items() if row.position == 0}
        if new:
            self._draw_first(new)
        self._plan = Plan(unfinished, self._captions, self._rule, self._device, self._dtype)
        self._windows.seat({slot: self._captions[slot] for slot in self._plan.seated})
        requests: list[SequenceRequest] = [unfinished[slot].request for slot in self._plan.slots]
        self._window_parameters = SamplingTensors([r for r in requests for _ in range(self.window)], self._device)
        return True

    def _draw_first(self, new: dict[int, Row]) -> None:
        """The captions already predict them: no pass."""
        plan = Plan(new, self._captions, self._rule, self._device, self._dtype)
        drawn = self._draw(plan)
        self._tokens[plan.draws, 0] = self._guesses[plan.draws, 0] = drawn
        self._guessed[plan.draws] = 1
        for row in new.values():
            row.position = 1

    def _inputs(self, plan: Plan) -> Tensor:
        """(B, w) tokens: the last final one, what the last pass drew after it, then copies of the cells above."""
        N, width = self.model.config.image_seq_len, self.model.config.image_grid_size
        cells = (plan.positions[:, None] - 1 + self._offsets).clamp(max=N - 1)  # (B, w)
        guessed = self._guessed[plan.draws, None]  # (B, 1)
        rows_up = (cells - guessed).div(width, rounding_mode="floor") + 1
        above = cells - rows_up * width
        source = torch.where(cells < guessed, cells, torch.where(above >= 0, above, guessed - 1))
        inputs = self._guesses[plan.draws].gather(1, source)
        if plan.has_given:
            given = self._given[plan.draws].gather(1, cells)
            inputs = torch.where(given >= 0, given, inputs)
        return inputs

    def _forward_window(self, plan: Plan, inputs: Tensor) -> Tensor:
        """(B, w) -> the last layer's output (slots, w, C); slots that nobody has compute rubbish."""
        N, w = self.model.config.image_seq_len, self.window
        R = max(plan.seated) + 1
        fed, lengths = inputs.new_zeros(R, w), inputs.new_zeros(R)
        fed[plan.draws], lengths[plan.draws] = inputs, plan.positions - 1
        if plan.guided.numel():
            fed[plan.partners], lengths[plan.partners] = inputs[plan.guided], plan.positions[plan.guided] - 1
        cells = (lengths[:, None] + self._offsets).clamp(max=N - 1)
        x = self._filled_up(self.model.embed(fed.flatten(), cells.flatten()))  # (at least R * w, C)
        self._windows.begin_step(lengths, int(lengths.max()))
        for number, layer in enumerate(self.model.layers):
            qkv = self._rule.tiled(layer.project, x)  # (at least R * w, 3, H, D)
            attended = self._windows.append_and_attend(number, qkv[: R * w].unflatten(0, (R, w))).flatten(0, 1)
            x = self._rule.tiled(layer.finish, x, self._filled_up(attended))
        return x[: R * w].unflatten(0, (R, w))

    def _draw_window(self, plan: Plan, hidden: Tensor) -> Tensor:
        """(slots, w, C) -> (B, w) tokens, given ones in their places."""
        N, w = self.model.config.image_seq_len, self.window
        normed = self.model.head_norm(hidden[plan.draws].flatten(0, 1)).unflatten(0, (-1, w))  # (B, w, C)
        if plan.guided.numel():
            null = self.model.head_norm(hidden[plan.partners].flatten(0, 1)).unflatten(0, (-1, w))
            mixed = null + plan.guidance[:, None] * (normed[plan.guided] - null)
            normed = normed.index_copy(0, plan.guided, mixed)
        rows = normed.flatten(0, 1)
        logits = self._rule.tiled(self.model.image_logits, self._filled_up(rows))[: len(rows)]  # (B * w, V)
        cells = (plan.positions[:, None] + self._offsets).clamp(max=N - 1)
        drawn = self._window_parameters.sample(logits, cells.flatten()).unflatten(0, (-1, w))
        if plan.has_given:
            given = self._given[plan.draws].gather(1, cells)
            drawn = torch.where(given >= 0, given, drawn)
        return drawn

    def _filled_up(self, rows: Tensor) -> Tensor:
        """(n, ...) -> as many rows as the model's arithmetic needs, the first one repeated."""
        missing = self._rule.padded(len(rows)) - len(rows)
        return torch.cat([rows, rows[:1].expand(missing, *rows.shape[1:])]) if missing else rows

    def _keep(self, table: Tensor, slots: Tensor, at: Tensor, values: Tensor, wanted: Tensor) -> None:
        """table[slots, at] = values, where wanted; all three (B, w)."""
        table[slots[:, None].expand_as(at)[wanted], at[wanted]] = values[wanted]
