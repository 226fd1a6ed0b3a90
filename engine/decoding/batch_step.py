"""A step of a batch, by whichever decoder: metadata, the layers over the KV cache, guidance and the head, sampling.

B sequences, U of them guided, R cache sequences computed, w window, C model dim, N image tokens, V image vocabulary.

    tokens (B, w) ─► embed ─► [ mix ─► project ─► turn ─► KV cache ─► finish ] x layers ─► hidden (R, w, C)
    hidden ─► head norm ─► guidance ─► head ─► logits (B, w, V) ─► next tokens (B, w)
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.decoding.kv_cache import KVCache, PrefixRef
from engine.decoding.sampling_tensors import SamplingTensors
from engine.decoding.slot_table import SlotTable
from engine.decoding.step_model import CompiledRows, StepCache, StepLayer, StepModel
from engine.models.whole_sequence import turned


@dataclass(frozen=True)
class BatchMetadata:
    """What a step needs to know of its sequences, as tensors. Only `positions` changes from step to step, in place.

    A sequence has a slot in the slot table and a row in the KV cache, which need not be the same.
    """

    slot_list: list[int]
    slots: Tensor  # (B,)
    rows: Tensor  # (B,)
    guided: Tensor  # (U,) indices of the guided sequences, below B
    unconditional_rows: Tensor  # (U,)
    guidance: Tensor  # (U, 1, 1) scales, in the model's dtype
    positions: Tensor  # (B,) of the tokens that are sampled next
    prefix_refs: dict[int, PrefixRef]  # by row
    num_rows: int  # R
    has_init_tokens: bool
    sampling: SamplingTensors  # of B * w sequences
    compiled: CompiledRows | None  # what computes it, where the step is compiled


def batch_metadata(
    model: StepModel, table: SlotTable, rows_of: Mapping[int, Sequence[int]], *, window: int = 1
) -> BatchMetadata:
    """The metadata of some sequences of a table.

    Args:
        rows_of: by slot: the sequence's row in the KV cache and, with guidance, that of its unconditional sequence.
        window: w, positions of each sequence that are sampled together.
    """

    def column(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=model.device)

    slots = sorted(rows_of)
    states = [table.sequences[slot] for slot in slots]
    guided = [index for index, state in enumerate(states) if state.unconditional_slot is not None]
    scales = [states[index].request.sampling_params.guidance_scale for index in guided]
    own_slots = [own for slot in slots for own in table.slots_of(slot)]
    all_rows = [row for slot in slots for row in rows_of[slot]]
    rows, unconditional_rows = (
        column([rows_of[slot][0] for slot in slots]), column([rows_of[slots[index]][1] for index in guided])
    )  # fmt: skip
    indices, guidance = column(guided), torch.tensor(scales, dtype=model.dtype, device=model.device)[:, None, None]
    return BatchMetadata(
        slot_list=slots,
        slots=column(slots),
        rows=rows,
        guided=indices,
        unconditional_rows=unconditional_rows,
        guidance=guidance,
        positions=column([state.position for state in states]),
        prefix_refs={row: table.prefix_refs[own] for row, own in zip(all_rows, own_slots, strict=True)},
        num_rows=max(all_rows) + 1,
        has_init_tokens=any(state.has_init_tokens for state in states),
        sampling=SamplingTensors([state.request for state in states for _ in range(window)], model.device),
        compiled=None
        if model.compiled is None
        else model.compiled.make_batch(rows, guided=indices, unconditional_rows=unconditional_rows, guidance=guidance),
    )


def run_layers(
    model: StepModel,
    cache: StepCache,
    batch: BatchMetadata,
    tokens: Tensor,
    lengths: Tensor,
    *,
    longest: int,
    num_rows: int,
) -> Tensor:
    """Feeds tokens through the layers, over the KV cache, which keeps their keys and values.

    Args:
        tokens: (B, w), fed to the unconditional sequences as well.
        lengths: (B,) own positions in the cache before them, where the first of them goes.
        longest: the largest length.
        num_rows: R, at least the batch's. Rows of no sequence compute values that are never read.

    Returns:
        (R, w, C), the last layer's output; the next call of the same batch may overwrite it.
    """
    if batch.compiled is not None:
        return batch.compiled.feed(cache, tokens, lengths, longest=longest, num_rows=num_rows)
    assert isinstance(cache, KVCache)
    N, R, w, rule = model.config.image_seq_len, num_rows, tokens.shape[1], model.padding_rule
    fed, held = tokens.new_zeros(R, w), lengths.new_zeros(R)
    fed[batch.rows], held[batch.rows] = tokens, lengths
    if batch.guided.numel():
        fed[batch.unconditional_rows], held[batch.unconditional_rows] = tokens[batch.guided], lengths[batch.guided]
    offsets = torch.arange(w, dtype=torch.int64, device=model.device)
    cells = (held[:, None] + offsets).clamp(max=N - 1)  # (R, w)
    start = rule.fill(model.embed(fed.flatten(), cells.flatten()))  # (at least R * w, C)
    x = model.to_streams(start)
    cache.begin_step(held, longest)
    turns = None if model.turns is None else model.turns[:, cells.flatten(), None]  # (2, R * w, 1, rotated channels)
    rows = torch.arange(R * w, dtype=torch.int64, device=model.device)
    rows = F.pad(rows, (0, len(start) - R * w))  # those that fill up are copies of the first
    for number, layer in enumerate(model.layers):
        x = model.mix(number, x, start)
        project, finish = _with_shifts(layer, number, cache)
        qkv = rule.tiled(project, x, rows)[: R * w]  # (R * w, 3, H, D)
        if turns is not None:
            qkv = turned(qkv, *turns[:, :, None])
        attended = cache.append_and_attend(number, qkv.unflatten(0, (R, w))).flatten(0, 1)
        x = rule.tiled(finish, x, rule.fill(attended), rows)
    return model.from_streams(x[: R * w]).unflatten(0, (R, w))


_Rows = Callable[..., Tensor]


def _with_shifts(layer: StepLayer, number: int, cache: KVCache) -> tuple[_Rows, _Rows]:
    """A layer's halves as functions of tensors of rows, the last of which says which rows they are."""
    shifts = cache.shifts
    if shifts is None:
        return lambda x, rows: layer.project(x), lambda x, attended, rows: layer.finish(x, attended)
    return (
        lambda x, rows: layer.project(x, lambda normed: shifts.shift(number, 0, normed, rows)),
        lambda x, attended, rows: layer.finish(x, attended, lambda normed: shifts.shift(number, 1, normed, rows)),
    )


def guided_logits(model: StepModel, batch: BatchMetadata, hidden: Tensor) -> Tensor:
    """What comes next after each position, guidance applied, before temperature: hidden (R, w, C) -> (B, w, V)."""
    if batch.compiled is not None:
        return batch.compiled.predict(hidden)
    w, rule = hidden.shape[1], model.padding_rule
    normed = model.head_norm(hidden[batch.rows].flatten(0, 1)).unflatten(0, (-1, w))  # (B, w, C)
    if batch.guided.numel():
        # The head is linear and the weights sum to 1: guiding its input guides its output, at one head row a token.
        null = model.head_norm(hidden[batch.unconditional_rows].flatten(0, 1)).unflatten(0, (-1, w))  # (U, w, C)
        mixed = null + batch.guidance * (normed[batch.guided] - null)
        normed = normed.index_copy(0, batch.guided, mixed)
    head_input = normed.flatten(0, 1)  # (B * w, C)
    logits = rule.tiled(model.image_logits, rule.fill(head_input))[: len(head_input)]
    return logits.unflatten(0, (-1, w))


def next_tokens(table: SlotTable, batch: BatchMetadata, logits: Tensor, positions: Tensor) -> Tensor:
    """Samples tokens, or takes init tokens where there are some: logits (B, w, V) of positions (B, w) -> (B, w)."""
    sampled = batch.sampling.sample(logits.flatten(0, 1), positions.flatten()).view_as(positions)
    if batch.has_init_tokens:
        init = table.init_tokens[batch.slots].gather(1, positions)
        sampled = torch.where(init >= 0, init, sampled)
    return sampled
