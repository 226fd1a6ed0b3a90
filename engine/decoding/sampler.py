"""Image tokens from text tokens: one prefill a caption, then one small step an image token.

G captions, B rows, N image tokens, C model dim.

    sampler = Sampler(model, null_text_tokens=ids_of_empty_caption)
    rows = [SequenceRequest(0, SamplingParams(seed=7), candidate=i) for i in range(16)]
    image_tokens = sampler.draw(text_tokens, rows)  # (16, 256)

A row's tokens are a function of its caption, seed, candidate, options and given tokens alone: see
engine/decoding/slot_decoder.py, which holds the rows in flight. Captions are prefilled one at a time, for the same reason.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import cast

import torch
from torch import Tensor

from engine.decoding.cpu.packed_weights import Weights, choose_weights, make_step_model
from engine.decoding.decoders import Decoder, DecoderCache
from engine.decoding.kv_cache import Prefix, empty_prefix
from engine.decoding.step_model import StepModel
from engine.errors import InputError
from engine.models.attention import attention
from engine.models.transformer import KoDalle, Layer
from engine.sampling_params import SequenceRequest

OnStep = Callable[[int, Tensor], None]


class Sampler:
    """Draws with one model; holds between calls what is constant: packed weights and the empty caption's prefix.

    Args:
        model: its weights must not change while the sampler lives. Train or eval mode is left as it was found.
        null_text_tokens: (text_seq_len,) ids of the empty caption ([CLS] [SEP] [PAD] ...); needed for guidance.
        batch_invariant: see engine/decoding/slot_decoder.py.
        speculative: see engine/decoding/decoders.py; the tokens are the same, the time depends on the model.
        weights: how decoding reads them (engine/decoding/cpu/packed_weights.py). "packed" and "int8" are copies for a CPU, made by
            the first drawing; "plain" calls the model's modules, step by step on a GPU too, which is what a model in
            training needs (ZeRO-3 gathers weights by module). None: the fastest here that is the same function.
    """

    def __init__(
        self,
        model: KoDalle,
        *,
        null_text_tokens: Tensor | None = None,
        batch_invariant: bool = True,
        speculative: bool = True,
        weights: Weights | None = None,
    ) -> None:
        self.model = model
        self.batch_invariant = batch_invariant
        self.weights = choose_weights(model, weights)
        # Not a method: the keeper would hold the sampler, and only Python's collector would free a GPU's graphs then.
        self.step_model: Callable[[], StepModel] = functools.cache(
            functools.partial(make_step_model, model, self.weights)
        )
        """The model as decoding reads it, packed once."""
        self._decoders = DecoderCache(
            model,
            step_model=self.step_model,
            batch_invariant=batch_invariant,
            speculative=speculative,
            graphed=False if weights == "plain" else None,
        )
        self._null_text_tokens = null_text_tokens
        self._null_prefix: Prefix | None = None

    def draw(
        self,
        text_tokens: Tensor,
        rows: list[SequenceRequest],
        *,
        given: Tensor | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """`prefill` and `decode` in one: text_tokens (G, text_seq_len) -> (B, N) int64."""
        return self.decode(self.prefill(text_tokens), rows, given=given, on_step=on_step)

    def prefill(self, text_tokens: Tensor) -> Prefix:
        """Reads captions.

        Args:
            text_tokens: (G, text_seq_len) ids from [CLS] on, padded with [PAD].
        """
        config, G = self.model.config, text_tokens.shape[0]
        if text_tokens.shape[1:] != (config.text_seq_len,):
            raise InputError("text_tokens", tuple(text_tokens.shape), f"must be (captions, {config.text_seq_len})")
        weight = self.model.head.weight
        prefix = empty_prefix(
            config.num_layers, G, config.prefix_len, config.num_heads, config.head_dim, config.dim,
            dtype=weight.dtype, device=weight.device,
        )  # fmt: skip
        with evaluating(self.model):
            # One caption at a time: its bits cannot depend on the others, and 1 + text_seq_len positions fill a core.
            for g, tokens in enumerate(text_tokens.to(weight.device)):
                x = self.model.text_embedding(tokens[None])  # (1, P, C)
                for number, layer in enumerate(cast(list[Layer], list(self.model.layers))):
                    q, k, v = layer.attention.project(x)
                    prefix.keys[number, g], prefix.values[number, g] = k[0], v[0]
                    attended = attention(q, k, v, causal=True, backend=layer.attention.backend)
                    x = layer.feed_forward(layer.attention.add(x, attended))
                prefix.hidden[g] = x[0, -1]
        return prefix

    def decode(
        self,
        prefix: Prefix,
        rows: list[SequenceRequest],
        *,
        given: Tensor | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Draws the rows, in step.

        Args:
            prefix: read captions; rows point into it.
            given: (B, n) image tokens that are kept instead of drawn, n <= N, -1 where to draw: first rows of a
                picture to complete, or a whole one with a hole to repaint.
            on_step: called after each position with (position, tokens (B,)), given ones included. To cancel, raise:
                the exception passes through and nothing is left behind.

        Returns:
            (B, N) int64, on the model's device.

        Raises:
            InputError: a row of no caption; guidance without null tokens; given tokens that do not fit.
        """
        if not rows:
            raise InputError("rows", "[]", "give at least one row to draw")
        given = self._check_given(given, len(rows))
        num_guided = sum(row.sampling_params.is_guided for row in rows)
        with evaluating(self.model):
            null_prefix = self.null_prefix() if num_guided else None
            with self._decoders.lend(len(rows) + num_guided, null_prefix=null_prefix) as decoder:
                slots = [
                    decoder.join(prefix, row, given=None if given is None else given[index])
                    for index, row in enumerate(rows)
                ]
                drawn = 0  # positions that every row has
                while drawn < self.model.config.image_seq_len:
                    decoder.step()
                    before, drawn = drawn, min(decoder.num_tokens(slot) for slot in slots)
                    if on_step is not None:
                        tokens_so_far = [decoder.tokens(slot) for slot in slots]
                        for position in range(before, drawn):
                            on_step(position, torch.stack([tokens[position] for tokens in tokens_so_far]))
                tokens = torch.stack([decoder.leave(slot) for slot in slots])
        return tokens.clone()  # out of inference mode: an ordinary tensor, fit for any later use

    @contextlib.contextmanager
    def borrow_decoder(self, num_slots: int) -> Iterator[Decoder]:
        """A decoder for rows that come and go, guided ones too, for as long as the block lasts: what a server steps.

        Its thread is in inference mode inside.
        """
        with evaluating(self.model):
            null_prefix = None if self._null_text_tokens is None else self.null_prefix()
            with self._decoders.lend(num_slots, null_prefix=null_prefix, continuous_batching=True) as decoder:
                yield decoder

    def null_prefix(self) -> Prefix:
        """The empty caption, read once.

        Raises:
            InputError: the sampler was made without `null_text_tokens`.
        """
        if self._null_prefix is None:
            if self._null_text_tokens is None:
                raise InputError("guidance_scale", "not 1", "needs null_text_tokens, the ids of the empty caption")
            self._null_prefix = self.prefill(self._null_text_tokens[None])
        return self._null_prefix

    def _check_given(self, given: Tensor | None, num_rows: int) -> Tensor | None:
        """(B, n) -> (B, N), -1 where to draw; None when nothing is given."""
        config, device = self.model.config, self.model.head.weight.device
        if given is None or given.numel() == 0:
            return None
        if given.dim() != 2 or given.shape[0] != num_rows or given.shape[1] > config.image_seq_len:
            expected = f"({num_rows}, at most {config.image_seq_len})"
            raise InputError("given", tuple(given.shape), f"must be {expected} image tokens")
        if int(given.min()) < -1 or int(given.max()) >= config.image_vocab_size:
            bad = int(given.max()) if int(given.max()) >= config.image_vocab_size else int(given.min())
            raise InputError("given", bad, f"tokens must be in [0, {config.image_vocab_size}), or -1 where to draw")
        whole = torch.full((num_rows, config.image_seq_len), -1, dtype=torch.int64, device=device)
        whole[:, : given.shape[1]] = given.to(device, torch.int64)
        return whole


@contextlib.contextmanager
def evaluating(model: KoDalle) -> Iterator[None]:
    """No dropout and no autograd inside; the model's mode is put back."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)
