"""Caption continuation: the rest of a caption, sampled with the model's text head.

    lines = continue_caption(model, tokenizer, "a red", count=4, seed=7)
    lines[0].text      # "a red shirt with …"

The model learned captions beside images (its text loss), so it can continue one: [CLS] and the words so far, then a
token at a time until [SEP] or [PAD], or until the model's text is full (DALLE-pytorch: `generate_texts`).

Only the tokenizer's own entries can be sampled. Table rows beyond it stand for no token; the head's reserved rows, one a
text position, are never a target; [CLS] and [MASK] never stand inside a caption, and [UNK] would be a word that no reader
can make out. The ancestors leave these in and clean up what is decoded.

Noise is that of images, keyed by (seed, candidate, position, token id), at positions from 2^31 on, which images do not
reach: a caption and an image of one seed do not share it. Sequences are always computed 16 at a time, the last batch
padded with copies: matrix products of other sizes differ in the last bit, and a candidate must not depend on the batch.

L layers, R sequences of a batch, T text positions (1 + T with <bos>), H heads, D head dim, C model dim, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.data.tokenizer import CaptionTokenizer
from engine.decoding.sampler import evaluating
from engine.decoding.sampling_tensors import SamplingTensors
from engine.errors import InputError
from engine.models.attention import attention
from engine.models.transformer import KoDalle
from engine.models.transformer_layer import Layer
from engine.sampling_params import FIELDS, SamplingParams, SequenceRequest
from engine.text import clean_text, shown

_BATCH = 16
_FIRST_POSITION = 2**31


@dataclass(frozen=True)
class Continuation:
    """A caption and what the model added to it."""

    text: str  # the beginning, in its normal form, and what was added
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
        beginning: first words; may be empty, for a whole caption. A cut word is finished if the tokenizer knows its
            pieces.
        sampling_params: as for images, over the text vocabulary.
        seed: the same as in `sampling_params`, over which it has precedence.

    Raises:
        InputError: the beginning fills the model's text; guidance, which is for images; count or seed out of range.
    """
    config = model.config
    if config.depends_on_positions or config.unique_padding or not config.bos:
        raise InputError(
            "caption", shown(beginning), "is not continued by a model of DALLE-pytorch's or minDALL-E's kind"
        )
    params = (sampling_params or SamplingParams()).updated(seed=seed)
    if params.is_guided:
        raise InputError("guidance_scale", params.guidance_scale, "guides images, not captions: leave it out")
    count = FIELDS["candidates"].check(count, name="count")
    if not isinstance(beginning, str):
        raise InputError("caption", repr(beginning), "must be a string")
    beginning = clean_text(beginning)
    first, room = tokenizer.encode_beginning(beginning), model.config.text_seq_len
    if len(first) >= room:
        raise InputError("caption", shown(beginning), f"is {len(first)} tokens and the model's text {room}: shorten it")
    sequences = [SequenceRequest(0, params, candidate=number) for number in range(count)]
    sampled = continue_tokens(model, first, sequences, allowed=allowed_tokens(tokenizer), end_ids=tokenizer.end_ids)
    before = tokenizer.decode(first)
    lines = []
    for sequence, tokens in zip(sequences, sampled, strict=True):
        words = [token for token in tokens if token not in tokenizer.end_ids]
        whole = tokenizer.decode([*first, *words])
        # Decoding the beginning loses words that the tokenizer does not know: it stays as it was written.
        text = whole
        if whole.startswith(before):
            text = beginning + ("" if before else " ") + whole[len(before) :]
        lines.append(
            Continuation(text.strip(), sequence.candidate, params.seed, (*first, *words), len(words) < len(tokens))
        )
    return lines


def allowed_tokens(tokenizer: CaptionTokenizer) -> Tensor:
    """(V,) bool over the tokenizer's entries: words, pieces, and what ends a caption; no bytes, which alone are no text."""
    allowed = torch.ones(tokenizer.vocab_size, dtype=torch.bool, device="cpu")
    allowed[sorted((tokenizer.special_ids - tokenizer.end_ids) | tokenizer.byte_ids)] = False
    return allowed


def continue_tokens(
    model: KoDalle,
    beginning: Sequence[int],
    sequences: Sequence[SequenceRequest],
    *,
    allowed: Tensor,
    end_ids: frozenset[int],
) -> list[list[int]]:
    """Samples the tokens that follow `beginning`.

    Args:
        beginning: ids from [CLS] on, fewer than text_seq_len.
        sequences: parameters and candidates; `prefix_index` is not read.
        allowed: (V,) bool, V <= text_vocab_size; other rows of the head are never sampled.
        end_ids: a sequence is done with the first of these.

    Returns:
        Of each sequence its sampled tokens, the one that ended it included; none of these where the text was full before.
    """
    with evaluating(model):
        cache = _TextCache(model)
        hidden = cache.read_beginning(beginning)  # (C,)
        parts = [sequences[start : start + _BATCH] for start in range(0, len(sequences), _BATCH)]
        return [tokens for part in parts for tokens in _continue_part(model, cache, hidden, part, allowed, end_ids)]


def _continue_part(
    model: KoDalle,
    cache: "_TextCache",
    hidden: Tensor,
    sequences: Sequence[SequenceRequest],
    allowed: Tensor,
    end_ids: frozenset[int],
) -> list[list[int]]:
    """At most 16 sequences, in step: all have the same beginning, so all are at one position."""
    padded = [*sequences, *[sequences[-1]] * (_BATCH - len(sequences))]
    device, V = hidden.device, len(allowed)
    forbidden = ~allowed.to(device)
    weight, bias = model.head.weight[:V], model.head.bias[:V]
    hidden = hidden.expand(_BATCH, -1)  # (R, C)
    parameters = SamplingTensors(padded, device)
    sampled: list[list[int]] = [[] for _ in sequences]
    for position in range(cache.beginning_length, model.config.text_seq_len + 1):
        logits = F.linear(model.head.norm(hidden), weight, bias).masked_fill(forbidden, -torch.inf)  # (R, V)
        tokens = parameters.sample(
            logits, torch.full((_BATCH,), _FIRST_POSITION + position, dtype=torch.int64, device=device)
        )
        ended = True
        for ids, token in zip(sampled, tokens[: len(sequences)].tolist(), strict=True):
            if not ids or ids[-1] not in end_ids:
                ids.append(token)
                ended = ended and token in end_ids
        if ended or position == model.config.text_seq_len:
            break
        hidden = cache.step(tokens, position)
    return sampled


class _TextCache:
    """Keys and values of 16 sequences that share their beginning: position 0 is <bos>, position i the i-th text token."""

    def __init__(self, model: KoDalle) -> None:
        config, weight = model.config, model.head.weight
        self._model = model
        shape = (config.num_layers, _BATCH, config.prefix_len, config.num_heads, config.head_dim)
        self._keys = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self._values = torch.zeros_like(self._keys)
        self.beginning_length = 0

    def read_beginning(self, tokens: Sequence[int]) -> Tensor:
        """Reads <bos> and `tokens` once, for all sequences: (C,), the output that predicts the next token."""
        device = self._keys.device
        # Not `embed_prefix`: the beginning is shorter than the text, whose last position alone predicts an image token.
        x = self._model.text_embedding(torch.tensor([list(tokens)], dtype=torch.int64, device=device))
        P = self.beginning_length = x.shape[1]  # x (1, P, C)

        def attend(number: int, layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self._keys[number, :, :P], self._values[number, :, :P] = k, v
            return attention(q, k, v, backend=layer.attention.backend)

        return self._model.apply_layers(x, attend)[0, -1]

    def step(self, tokens: Tensor, position: int) -> Tensor:
        """Reads one token a sequence, (R,), at `position`: (R, C). Later positions, of an earlier batch, are not attended."""
        x = self._model.text_embedding.at(tokens, position)[:, None]  # (R, 1, C)

        def attend(number: int, layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self._keys[number, :, position], self._values[number, :, position] = k[:, 0], v[:, 0]
            seen = slice(0, position + 1)
            return self._attention(layer, q, self._keys[number, :, seen], self._values[number, :, seen])

        return self._model.apply_layers(x, attend)[:, 0]

    @staticmethod
    def _attention(layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Each sequence's query (R, 1, H, D) over its own keys and values (R, T, H, D).

        On a CPU one sequence at a time. PyTorch's kernel shares them among threads, whose buffers lie differently in memory,
        and MKL's products follow that: with AVX2 and two threads the last eight of 16 equal sequences had other last bits.
        """
        at_once = 1 if q.device.type == "cpu" else len(q)
        parts = zip(q.split(at_once), k.split(at_once), v.split(at_once), strict=True)
        return torch.cat([attention(*part, causal=False, backend=layer.attention.backend) for part in parts])
