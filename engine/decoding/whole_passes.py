"""Decoding by whole passes, for models that read a sequence from its start: no KV cache, one sequence at a time.

A step costs as much as all steps before it together with their caption. It is for models with token shift, rotary positions or
attention patterns (`TransformerConfig.reads_whole_sequence`), which are imported; `DecoderCache` says so when one is loaded.

Each sequence is computed by itself, so that its tokens depend on no other.
"""

import functools
import sys

import torch
from torch import Tensor

from engine.config.transformer import TransformerConfig
from engine.decoding.batch_step import BatchMetadata
from engine.decoding.kv_cache import Prefix
from engine.decoding.slot_decoder import SingleTokenSteps, SlotDecoder
from engine.decoding.slot_table import SlotTable
from engine.decoding.step_model import plain_step_model
from engine.models.transformer import KoDalle


class WholePassDecoder(SlotDecoder):
    """See `SlotDecoder`.

    Args:
        model: its weights must not change while sequences are in flight.
        num_slots: how many sequences fit, unconditional ones included.
        null_prefix: the empty caption, prefilled; needed for guidance.
    """

    def __init__(self, model: KoDalle, num_slots: int, *, null_prefix: Prefix | None = None) -> None:
        self.model = plain_step_model(model).without_padding()
        self.table = SlotTable(num_slots, model.config.image_seq_len, null_prefix=null_prefix, device=self.model.device)
        self._steps = _WholePassSteps(model, self.table)


class _WholePassSteps(SingleTokenSteps):
    """Steps whose sequences are read anew from <bos> on."""

    def __init__(self, model: KoDalle, table: SlotTable) -> None:
        self._whole = model
        super().__init__(plain_step_model(model).without_padding(), table)

    def _feed(self, batch: BatchMetadata, tokens: Tensor, lengths: Tensor, longest: int) -> None:
        """The outputs after the last token of each unfinished sequence, to `hidden`."""
        for slot in batch.slot_list:
            so_far = self._table.tokens_of(slot)
            if len(so_far) < self._table.num_image_tokens:
                for own in self._table.slots_of(slot):
                    ref = self._table.prefix_refs[own]
                    assert ref.prefix.text_tokens is not None
                    self.hidden[own] = last_output(self._whole, ref.prefix.text_tokens[ref.index], so_far)


def read_captions(model: KoDalle, text_tokens: Tensor) -> Prefix:
    """Captions (G, text_seq_len) for whole passes: their tokens, and what predicts the first image token."""
    weight = model.head.weight
    text_tokens = text_tokens.to(weight.device)
    none = torch.empty(0, dtype=torch.int64, device=weight.device)
    hidden = torch.empty(len(text_tokens), model.config.dim, dtype=weight.dtype, device=weight.device)
    for number, tokens in enumerate(text_tokens):
        hidden[number] = last_output(model, tokens, none)
    no_cache = hidden.new_empty(0, len(text_tokens), 0, model.config.num_heads, model.config.head_dim)
    return Prefix(no_cache, no_cache, hidden, text_tokens)


def last_output(model: KoDalle, text_tokens: Tensor, image_tokens: Tensor) -> Tensor:
    """What predicts the next token: (T,) and the image tokens so far (n,) -> (C,)."""
    return model.outputs(text_tokens[None], image_tokens[None])[0, -1]


@functools.cache
def report_whole_passes(config: TransformerConfig) -> None:
    """One line on stderr, once a model: why decoding is slow."""
    reasons = {
        "token_shift": config.token_shift,
        "rotary": config.rotary,
        "attention_patterns": any(pattern != "full" for pattern in config.attention_patterns),
    }
    found = ", ".join(name for name, is_on in reasons.items() if is_on)
    print(f"decoding: whole passes without a cache, in the model's dtype, since it has {found}", file=sys.stderr)
