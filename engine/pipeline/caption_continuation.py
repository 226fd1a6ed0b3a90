"""Captions that write themselves: the rest of a caption, drawn with the model's text head.

    lines = continue_caption(model, tokenizer, "상의에서 색상은", count=4, seed=7)
    lines[0].text      # "상의에서 색상은 레드이다. …"

The model learned captions beside pictures (its text loss), so it can go on with one: [CLS] and the words so far, then
a token at a time until [SEP] or [PAD], or until the model's text is full (DALLE-pytorch: `generate_texts`).

What may be drawn: the tokenizer's own entries and nothing else. Table rows beyond it stand for no token; the head's
reserved rows, one a text position, are never a target; [CLS] and [MASK] never stand inside a caption, and [UNK] would
be a word that nobody can read. The ancestors leave these in and clean up what is decoded.

Noise is that of pictures, keyed by (seed, candidate, position, token id), at positions from 2^31 on, where no picture
has any: a caption and a picture of one seed do not share it. Rows are worked 16 at a time, always, the last ones filled
up with copies: matrix products of other sizes differ in the last bit, and a candidate must be the same in any company.

L layers, R rows worked at once, T text positions (1 + T with <bos>), H heads, D head dim, C model dim, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.data.tokenizer import CaptionTokenizer
from engine.decoding.sampler import evaluating
from engine.decoding.sampling_tensors import SamplingTensors
from engine.errors import InputError
from engine.models.attention import attention
from engine.models.transformer import KoDalle, Layer
from engine.sampling_params import FIELDS, SamplingParams, SequenceRequest

_ROWS_AT_ONCE = 16
_FIRST_POSITION = 2**31


@dataclass(frozen=True)
class Continuation:
    """A caption, written on."""

    text: str  # the beginning as it was given, and what was added
    candidate: int
    seed: int
    text_tokens: tuple[int, ...]  # [CLS] and words, without [SEP]
    is_complete: bool  # False: the model's text was full before the caption ended


def continue_caption(
    model: KoDalle,
    tokenizer: CaptionTokenizer,
    beginning: str,
    sampling_params: SamplingParams | None = None,
    *,
    count: int = 4,
    seed: int | None = None,
) -> list[Continuation]:
    """Samples `count` continuations; candidate i of a seed is the same whatever `count` is.

    Args:
        beginning: words to go on from; may be empty, for a whole caption. A cut word is finished if the tokenizer
            knows its pieces.
        sampling_params: as for images, over the text vocabulary.
        seed: the same as in `sampling_params`, over which it has precedence.

    Raises:
        InputError: the beginning fills the model's text; guidance, which is for pictures; count or seed out of range.
    """
    params = (sampling_params or SamplingParams()).updated(seed=seed)
    if params.is_guided:
        raise InputError("guidance_scale", params.guidance_scale, "guides images, not captions: leave it out")
    count = FIELDS["candidates"].check(count, name="count")
    if not isinstance(beginning, str):
        raise InputError("caption", repr(beginning), "must be a string")
    first, room = tokenizer.encode_beginning(beginning), model.config.text_seq_len
    if len(first) >= room:
        raise InputError("caption", beginning, f"is {len(first)} tokens and the model's text {room}: shorten it")
    rows = [SequenceRequest(0, params, candidate=number) for number in range(count)]
    drawn = continue_tokens(model, first, rows, allowed=allowed_tokens(tokenizer), end_ids=tokenizer.end_ids)
    before = tokenizer.decode(first)
    lines = []
    for row, tokens in zip(rows, drawn, strict=True):
        words = [token for token in tokens if token not in tokenizer.end_ids]
        whole = tokenizer.decode([*first, *words])
        # The tokenizer's reading of the beginning lacks words that it does not know: the given one stays.
        text = whole
        if whole.startswith(before):
            text = beginning.rstrip() + ("" if before else " ") + whole[len(before) :]
        lines.append(Continuation(text.strip(), row.candidate, params.seed, (*first, *words), len(words) < len(tokens)))
    return lines


def allowed_tokens(tokenizer: CaptionTokenizer) -> Tensor:
    """(V,) bool over the tokenizer's entries: words, pieces, and what ends a caption."""
    allowed = torch.ones(tokenizer.vocab_size, dtype=torch.bool, device="cpu")
    allowed[sorted(tokenizer.special_ids - tokenizer.end_ids)] = False
    return allowed


def continue_tokens(
    model: KoDalle,
    beginning: Sequence[int],
    rows: Sequence[SequenceRequest],
    *,
    allowed: Tensor,
    end_ids: frozenset[int],
) -> list[list[int]]:
    """Draws the tokens that follow `beginning`.

    Args:
        beginning: ids from [CLS] on, fewer than text_seq_len.
        rows: seeds, candidates and options; `prefix_index` is not read.
        allowed: (V,) bool, V <= text_vocab_size; other rows of the head are never drawn.
        end_ids: a row is done with the first of these.

    Returns:
        Of each row its drawn tokens, the one that ended it included; none of them where the text was full before.
    """
    with evaluating(model):
        cache = _TextCache(model)
        hidden = cache.read_beginning(beginning)  # (C,)
        parts = [rows[start : start + _ROWS_AT_ONCE] for start in range(0, len(rows), _ROWS_AT_ONCE)]
        return [tokens for part in parts for tokens in _continue_part(model, cache, hidden, part, allowed, end_ids)]


def _continue_part(
    model: KoDalle,
    cache: "_TextCache",
    hidden: Tensor,
    rows: Sequence[SequenceRequest],
    allowed: Tensor,
    end_ids: frozenset[int],
) -> list[list[int]]:
    """At most 16 rows, in step: all have the same beginning, so all are at one position."""
    filled = [*rows, *[rows[-1]] * (_ROWS_AT_ONCE - len(rows))]
    device, V = hidden.device, len(allowed)
    forbidden = ~allowed.to(device)
    weight, bias = model.head.weight[:V], model.head.bias[:V]
    hidden = hidden.expand(_ROWS_AT_ONCE, -1)  # (R, C)
    parameters = SamplingTensors(filled, device)
    drawn: list[list[int]] = [[] for _ in rows]
    for position in range(cache.beginning_length, model.config.text_seq_len + 1):
        logits = F.linear(model.head.norm(hidden), weight, bias).masked_fill(forbidden, -torch.inf)  # (R, V)
        tokens = parameters.sample(logits, torch.full((_ROWS_AT_ONCE,), _FIRST_POSITION + position, device=device))
        ended = True
        for row, token in zip(drawn, tokens[: len(rows)].tolist(), strict=True):
            if not row or row[-1] not in end_ids:
                row.append(token)
                ended = ended and token in end_ids
        if ended or position == model.config.text_seq_len:
            break
        hidden = cache.step(tokens, position)
    return drawn


class _TextCache:
    """Keys and values of 16 rows that share their beginning: position 0 is <bos>, position i the i-th text token."""

    def __init__(self, model: KoDalle) -> None:
        config, weight = model.config, model.head.weight
        self._model = model
        self._layers = cast(list[Layer], list(model.layers))
        shape = (config.num_layers, _ROWS_AT_ONCE, config.prefix_len, config.num_heads, config.head_dim)
        self._keys = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self._values = torch.zeros_like(self._keys)
        self.beginning_length = 0

    def read_beginning(self, tokens: Sequence[int]) -> Tensor:
        """Reads <bos> and `tokens` once, for all rows: (C,), the output that predicts the next token."""
        device = self._keys.device
        x = self._model.text_embedding(torch.tensor([list(tokens)], dtype=torch.int64, device=device))
        self.beginning_length = x.shape[1]  # x (1, P, C)
        for number, layer in enumerate(self._layers):
            q, k, v = layer.attention.project(x)
            self._keys[number, :, : x.shape[1]], self._values[number, :, : x.shape[1]] = k, v
            x = layer.feed_forward(layer.attention.add(x, attention(q, k, v, backend=layer.attention.backend)))
        return x[0, -1]

    def step(self, tokens: Tensor, position: int) -> Tensor:
        """Reads one token a row, (R,), at `position`: (R, C). What lies beyond it, of earlier rows, is not seen."""
        embedding = self._model.text_embedding
        x = (embedding.tokens[tokens] + embedding.positions[position])[:, None]  # (R, 1, C)
        for number, layer in enumerate(self._layers):
            q, k, v = layer.attention.project(x)
            self._keys[number, :, position], self._values[number, :, position] = k[:, 0], v[:, 0]
            seen = slice(0, position + 1)
            attended = self._attention(layer, q, self._keys[number, :, seen], self._values[number, :, seen])
            x = layer.feed_forward(layer.attention.add(x, attended))
        return x[:, 0]

    @staticmethod
    def _attention(layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Each row's query (R, 1, H, D) over its own keys and values (R, T, H, D).

        On a CPU one row at a time. PyTorch's kernel shares rows among threads, whose buffers lie differently in memory,
        and MKL's products follow that: with AVX2 and two threads the last eight of 16 equal rows had other last bits.
        """
        rows_at_once = 1 if q.device.type == "cpu" else len(q)
        rows = zip(q.split(rows_at_once), k.split(rows_at_once), v.split(rows_at_once), strict=True)
        return torch.cat([attention(*row, causal=False, backend=layer.attention.backend) for row in rows])
