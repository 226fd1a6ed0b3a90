"""The sampler: image tokens from text tokens, one prefill a caption and one small step an image token.

G captions, B sequences, N image tokens, C model dim.

    sampler = Sampler(model, null_text_tokens=ids_of_empty_caption)
    requests = [SequenceRequest(0, SamplingParams(seed=7), candidate=i) for i in range(16)]
    image_tokens = sampler.generate(text_tokens, requests)  # (16, 256)

A sequence's tokens are a function of its caption, seed, candidate, sampling parameters and init tokens alone: see
engine/decoding/slot_decoder.py. Captions are prefilled one at a time, for the same reason. Nothing depends on torch's
global state: default dtype, autocast, inference mode.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from engine.decoding.cpu.packed_weights import Weights, choose_weights, is_compiled, make_step_model
from engine.decoding.decoder import Decoder
from engine.decoding.decoders import DecoderCache
from engine.decoding.kv_cache import Prefix, empty_prefix
from engine.decoding.step_model import StepModel
from engine.errors import InputError
from engine.models.attention import attention
from engine.models.transformer import KoDalle
from engine.models.transformer_layer import Layer
from engine.sampling_params import SequenceRequest

OnStep = Callable[[int, Tensor], None]


class Sampler:
    """Generates with one model; keeps what is constant: packed weights and the empty caption's prefix.

    Args:
        model: its weights must not change while the sampler lives. Train or eval mode is left as it was found.
        null_text_tokens: (text_seq_len,) ids of the empty caption ([CLS] [SEP] [PAD] ...); needed for guidance.
        batch_invariant: see engine/decoding/slot_decoder.py.
        speculative: see engine/decoding/decoders.py; the tokens are the same, the time depends on the model.
        weights: how decoding reads them (engine/decoding/cpu/packed_weights.py). "packed", "int8" and "int4" are copies for a
            CPU, made by the first generation; "plain" calls the model's modules, step by step on a GPU too, which is
            what a model in training needs (ZeRO-3 gathers weights by module). None: the fastest here that is the same
            function.
        compiled: False: by torch's operators even where the compiled step is (engine/decoding/cpu/compiled_step.py).
    """

    def __init__(
        self,
        model: KoDalle,
        *,
        null_text_tokens: Tensor | None = None,
        batch_invariant: bool = True,
        speculative: bool = True,
        weights: Weights | None = None,
        compiled: bool = True,
    ) -> None:
        self.model = model
        self.batch_invariant = batch_invariant
        self.weights = choose_weights(model, weights)
        self._compiled = compiled
        # Not a method: the cache would hold the sampler, and only Python's collector would free a GPU's graphs then.
        self.step_model: Callable[[], StepModel] = functools.cache(
            functools.partial(make_step_model, model, self.weights, compiled=compiled)
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

    @property
    def is_compiled(self) -> bool:
        """Whether steps are computed by the compiled step."""
        return self._compiled and is_compiled(self.model, self.weights)

    def generate(
        self,
        text_tokens: Tensor,
        requests: list[SequenceRequest],
        *,
        init_tokens: Tensor | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """`prefill` and `decode` in one: text_tokens (G, text_seq_len) -> (B, N) int64."""
        return self.decode(self.prefill(text_tokens), requests, init_tokens=init_tokens, on_step=on_step)

    def prefill(self, text_tokens: Tensor) -> Prefix:
        """Runs captions through the model and keeps their keys and values.

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
                prefix.hidden[g] = _read_caption(self.model, tokens, prefix.keys[:, g], prefix.values[:, g])
        return prefix

    def decode(
        self,
        prefix: Prefix,
        requests: list[SequenceRequest],
        *,
        init_tokens: Tensor | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Generates the image tokens of prefilled captions.

        Args:
            prefix: prefilled captions; `request.prefix_index` counts them.
            init_tokens: (B, n) image tokens that are kept instead of sampled, n <= N, -1 where to sample: an image
                prefix to continue, or a whole image with a hole to inpaint.
            on_step: called after each position with (position, tokens (B,)), init tokens included. To cancel, raise:
                the exception passes through, and every sequence is removed.

        Returns:
            (B, N) int64, on the model's device.

        Raises:
            InputError: a request of no caption; guidance without null tokens; init tokens that do not fit.
        """
        if not requests:
            raise InputError("requests", "[]", "give at least one sequence to generate")
        init_tokens = self._check_init_tokens(init_tokens, len(requests))
        num_guided = sum(request.sampling_params.is_guided for request in requests)
        with evaluating(self.model):
            null_prefix = self.null_prefix() if num_guided else None
            with self._decoders.borrow(len(requests) + num_guided, null_prefix=null_prefix) as decoder:
                slots = [
                    decoder.add(prefix, request, init_tokens=None if init_tokens is None else init_tokens[index])
                    for index, request in enumerate(requests)
                ]
                decoder.read_init_tokens()
                done = 0  # positions that every sequence has
                while done < self.model.config.image_seq_len:
                    decoder.step()
                    before, done = done, min(decoder.num_tokens(slot) for slot in slots)
                    if on_step is not None:
                        tokens_so_far = [decoder.tokens(slot) for slot in slots]
                        for position in range(before, done):
                            on_step(position, torch.stack([tokens[position] for tokens in tokens_so_far]))
                tokens = torch.stack([decoder.remove(slot) for slot in slots])
        return tokens.clone()  # out of inference mode: an ordinary tensor, fit for any later use

    @contextlib.contextmanager
    def borrow_decoder(self, num_slots: int) -> Iterator[Decoder]:
        """A decoder for continuous batching, guided sequences included, for as long as the block lasts.

        Its thread is in inference mode inside.
        """
        with evaluating(self.model):
            null_prefix = None if self._null_text_tokens is None else self.null_prefix()
            with self._decoders.borrow(num_slots, null_prefix=null_prefix, continuous_batching=True) as decoder:
                yield decoder

    def null_prefix(self) -> Prefix:
        """The empty caption, prefilled once.

        Raises:
            InputError: the sampler was made without `null_text_tokens`.
        """
        if self._null_prefix is None:
            if self._null_text_tokens is None:
                raise InputError(
                    "guidance_scale", "not 1", "needs an empty caption, which this model has none of: leave it out"
                )
            self._null_prefix = self.prefill(self._null_text_tokens[None])
        return self._null_prefix

    def _check_init_tokens(self, init_tokens: Tensor | None, num_sequences: int) -> Tensor | None:
        """(B, n) -> (B, N), -1 where to sample; None where there are none."""
        config, device = self.model.config, self.model.head.weight.device
        if init_tokens is None or init_tokens.numel() == 0:
            return None
        if init_tokens.dim() != 2 or len(init_tokens) != num_sequences or init_tokens.shape[1] > config.image_seq_len:
            expected = f"({num_sequences}, at most {config.image_seq_len})"
            raise InputError("init_tokens", tuple(init_tokens.shape), f"must be {expected} image tokens")
        lowest, highest = int(init_tokens.min()), int(init_tokens.max())
        if lowest < -1 or highest >= config.image_vocab_size:
            bad = highest if highest >= config.image_vocab_size else lowest
            remedy = f"tokens must be in [0, {config.image_vocab_size}), or -1 where to sample"
            raise InputError("init_tokens", bad, remedy)
        whole = torch.full((num_sequences, config.image_seq_len), -1, dtype=torch.int64, device=device)
        whole[:, : init_tokens.shape[1]] = init_tokens.to(device, torch.int64)
        return whole


def _read_caption(model: KoDalle, tokens: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """tokens (text_seq_len,) -> the last position's output (C,); keys and values (L, P, H, D) are written."""

    def attend(number: int, layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys[number], values[number] = k[0], v[0]
        return attention(q, k, v, causal=True, backend=layer.attention.backend)

    return model.apply_layers(model.embed_prefix(tokens[None]), attend)[0, -1]


@contextlib.contextmanager
def evaluating(model: KoDalle) -> Iterator[None]:
    """No dropout, no autograd and no autocast inside; the model's mode is restored."""
    was_training = model.training
    model.eval()
    try:
        # Autocast would cast some of the products, and a model in its own dtype is what was trained and loaded.
        with torch.inference_mode(), torch.autocast(model.head.weight.device.type, enabled=False):
            yield
    finally:
        model.train(was_training)
