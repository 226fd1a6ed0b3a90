"""Image tokens from text tokens: one prefill a caption, then one small step an image token.

B rows to draw, R rows computed (B, their unguided partners, padding), G captions, N image tokens, V image vocabulary,
C model dim.

    sampler = Sampler(model, null_text_tokens=ids_of_empty_caption)
    rows = [RowRequest(prefix_index=0, seed=7, candidate=i) for i in range(16)]
    image_tokens = sampler.draw(text_tokens, rows)  # (16, 256)

A row's tokens are a function of its caption, seed, candidate and options alone. Noise is keyed by (seed, candidate,
position, token id), see kernels/reference.py; what remains is arithmetic that must not change with the number of
rows. Measured with MKL 2024.2 and oneDNN 3.12 (AVX-512, 1 and 2 threads, K 64 to 4096): a row of a linear layer has
the same bits for every number of rows from 16 to 128 that is a multiple of 4 (bfloat16: from 4); below that, at odd
numbers (bfloat16) and above 128 (float32, two threads) it has others. So rows are padded to a multiple of 4, at least
16 (bfloat16: 4), and worked in tiles of at most 64; captions are prefilled one at a time. `row_invariant=False` drops
the padding: faster for few rows (one row at the published size, float32: by a quarter), and tokens may then differ
with the company.
On CUDA the same rule is applied but library matrix products do not promise it.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.errors import InputError
from engine.models.attention import attention
from engine.models.transformer import KoDalle, Layer
from engine.sampling.cache import KVCache, Prefix, empty_prefix
from kernels import reference

_ROW_MULTIPLE = 4
_ROW_MINIMUM = 16
_ROW_MINIMUM_BFLOAT16 = 4
_ROW_TILE = 64

OnStep = Callable[[int, Tensor], None]


@dataclass(frozen=True)
class SamplingOptions:
    """How one row is drawn. Filters act on the image vocabulary, in this order; see `reference.filter_logits`.

    temperature: 0 takes the likeliest token.
    top_k: keep the k likeliest; None: all. `reference.ancestor_top_k` translates KoDALLE's filter_thres.
    top_p: of those, keep the fewest that reach this probability; None: all.
    guidance_scale: logits_null + scale * (logits - logits_null); 1 costs nothing, others a second row.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise InputError("temperature", self.temperature, "must be 0 or more; 1 is the model's own distribution")
        if self.top_k is not None and self.top_k < 1:
            raise InputError("top_k", self.top_k, "must be 1 or more, or left out")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError("top_p", self.top_p, "must be above 0 and at most 1, or left out")
        if not 0 <= self.guidance_scale < float("inf"):
            raise InputError("guidance_scale", self.guidance_scale, "must be 0 or more; 1 is no guidance")


@dataclass(frozen=True)
class RowRequest:
    """One picture: candidate number `candidate` of seed `seed` for caption `prefix_index`."""

    prefix_index: int
    seed: int
    candidate: int = 0
    options: SamplingOptions = SamplingOptions()

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**64:
            raise InputError("seed", self.seed, "must be between 0 and 2**64 - 1")
        if not 0 <= self.candidate < 2**32:
            raise InputError("candidate", self.candidate, "must be between 0 and 2**32 - 1")


class Sampler:
    """Draws with one model; holds nothing between calls but the null caption's prefix, a constant of the weights.

    Args:
        model: its weights must not change while the sampler lives. Train or eval mode is left as it was found.
        null_text_tokens: (text_seq_len,) ids of the empty caption ([CLS] [SEP] [PAD] ...); needed for guidance.
        row_invariant: see the module's docstring.
    """

    def __init__(self, model: KoDalle, *, null_text_tokens: Tensor | None = None, row_invariant: bool = True) -> None:
        self.model = model
        self.row_invariant = row_invariant
        self._null_text_tokens = null_text_tokens
        self._null_prefix: Prefix | None = None

    def draw(
        self,
        text_tokens: Tensor,
        rows: list[RowRequest],
        *,
        prime: Tensor | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """`prefill` and `decode` in one: text_tokens (G, text_seq_len) -> (B, N) int64."""
        return self.decode(self.prefill(text_tokens), rows, prime=prime, on_step=on_step)

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
        with _evaluating(self.model):
            # One caption at a time: its bits cannot depend on the others, and 1 + text_seq_len positions fill a core.
            for g, tokens in enumerate(text_tokens.to(weight.device)):
                x = self.model.text_embedding(tokens[None])  # (1, P, C)
                for number, layer in enumerate(_layers(self.model)):
                    q, k, v = layer.attention.project(x)
                    prefix.keys[number, g], prefix.values[number, g] = k[0], v[0]
                    attended = attention(q, k, v, causal=True, backend=layer.attention.backend)
                    x = layer.feed_forward(layer.attention.add(x, attended))
                prefix.hidden[g] = x[0, -1]
        return prefix

    def decode(
        self,
        prefix: Prefix,
        rows: list[RowRequest],
        *,
        prime: Tensor | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Draws the rows, in step.

        Args:
            prefix: read captions; rows point into it.
            prime: (B, n) first image tokens that are given instead of drawn, 0 <= n <= N.
            on_step: called after each position with (position, tokens (B,)), given ones included. To cancel, raise:
                the exception passes through and nothing is left behind.

        Returns:
            (B, N) int64, on the model's device.

        Raises:
            InputError: a row of no caption; guidance without null tokens; a prime that does not fit.
        """
        if not rows:
            raise InputError("rows", "[]", "give at least one row to draw")
        for row in rows:
            if not 0 <= row.prefix_index < prefix.num_captions:
                raise InputError("prefix_index", row.prefix_index, f"there are {prefix.num_captions} captions, from 0")
        prime = self._check_prime(prime, len(rows))
        with _evaluating(self.model):
            batch = _Batch(self.model, rows, self._with_null(prefix, rows), self.row_invariant)
            tokens = self._decode(batch, prime, on_step)
        return tokens.clone()  # out of inference mode: an ordinary tensor, fit for any later use

    def _decode(self, batch: "_Batch", prime: Tensor, on_step: OnStep | None) -> Tensor:
        config = self.model.config
        tokens = torch.empty(batch.num_draws, config.image_seq_len, dtype=torch.int64, device=prime.device)
        for position in range(config.image_seq_len):
            if position < prime.shape[1]:
                drawn = prime[:, position]
            else:
                drawn = batch.sample(position)
            tokens[:, position] = drawn
            if on_step is not None:
                on_step(position, drawn)
            if position + 1 < config.image_seq_len:
                batch.step(position, drawn)
        return tokens

    def _with_null(self, prefix: Prefix, rows: list[RowRequest]) -> Prefix:
        """The null caption behind the others, when a row wants guidance."""
        if all(row.options.guidance_scale == 1 for row in rows):
            return prefix
        if self._null_prefix is None:
            if self._null_text_tokens is None:
                raise InputError("guidance_scale", "not 1", "needs null_text_tokens, the ids of the empty caption")
            self._null_prefix = self.prefill(self._null_text_tokens[None])
        return prefix.join(self._null_prefix)

    def _check_prime(self, prime: Tensor | None, num_rows: int) -> Tensor:
        config, device = self.model.config, self.model.head.weight.device
        if prime is None:
            return torch.empty(num_rows, 0, dtype=torch.int64, device=device)
        if prime.dim() != 2 or prime.shape[0] != num_rows or prime.shape[1] > config.image_seq_len:
            expected = f"({num_rows}, at most {config.image_seq_len})"
            raise InputError("prime", tuple(prime.shape), f"must be {expected} image tokens")
        if prime.numel() and (int(prime.min()) < 0 or int(prime.max()) >= config.image_vocab_size):
            raise InputError("prime", int(prime.max()), f"tokens must be in [0, {config.image_vocab_size})")
        return prime.to(device, torch.int64)


class _Batch:
    """The rows of one decode in flight.

    row      0 .. B-1         B .. B+U-1                 .. R-1
    what     drawn            null partners of the       padding: copies of row 0,
                              guided rows                not in the cache
    """

    def __init__(self, model: KoDalle, rows: list[RowRequest], prefix: Prefix, row_invariant: bool) -> None:
        device, options = prefix.hidden.device, [row.options for row in rows]
        self.model = model
        self.num_draws = len(rows)
        guided = [index for index, option in enumerate(options) if option.guidance_scale != 1]
        captions = [row.prefix_index for row in rows] + [prefix.num_captions - 1] * len(guided)
        self.num_cached = len(captions)
        dtype = prefix.hidden.dtype
        self.num_head_rows = _padded(self.num_draws, dtype) if row_invariant else self.num_draws
        num_rows = _padded(self.num_cached, dtype) if row_invariant else self.num_cached
        sources = list(range(self.num_draws)) + guided + [0] * (num_rows - self.num_cached)
        captions += captions[:1] * (num_rows - self.num_cached)
        self.source = torch.tensor(sources, device=device)  # (R,) which drawn row's token a row reads
        self.guided = torch.tensor(guided, dtype=torch.int64, device=device)  # (U,)
        scales = [options[index].guidance_scale for index in guided]
        self.guidance = torch.tensor(scales, dtype=dtype, device=device)[:, None]  # (U, 1)
        self.draws = _DrawParameters(rows, device)
        self.cache = KVCache(prefix, captions[: self.num_cached], model.config.image_seq_len - 1)
        self.position_table = model.image_embedding.position_table()  # (N, C)
        self.x = prefix.hidden[torch.tensor(captions, device=device)][:, None]  # (R, 1, C)

    def sample(self, position: int) -> Tensor:
        """Token of `position` for each drawn row: (B,) int64."""
        return self.draws.sample(self.logits()[: self.num_draws], position)

    def logits(self) -> Tensor:
        """(at least B, V): what the drawn rows predict next, guidance applied."""
        hidden = self.model.head.norm(self.x[:, 0])  # (R, C)
        if self.guided.numel():
            # The head is linear and the weights sum to 1: guiding its input guides its output, at one head row a draw.
            null = hidden[self.num_draws : self.num_cached]
            hidden = hidden.index_copy(0, self.guided, null + self.guidance * (hidden[self.guided] - null))
        weight, bias = self.model.head.image_rows()
        return _tiled(lambda rows: F.linear(rows, weight, bias), hidden[: self.num_head_rows])

    def step(self, position: int, drawn: Tensor) -> None:
        """Feeds the tokens (B,) of `position` to the model."""
        n, padding = self.num_cached, self.x.shape[0] - self.num_cached
        x = (self.model.image_embedding.tokens[drawn[self.source]] + self.position_table[position])[:, None]
        for number, layer in enumerate(_layers(self.model)):
            q, k, v = _tiled_project(layer.attention.project, x)  # (R, 1, H, D) each
            self.cache.write(number, position, k[:n, 0], v[:n, 0])
            attended = self.cache.attend(number, q[:n, 0], position + 1)  # (B + U, H, D)
            attended = F.pad(attended, (0, 0, 0, 0, 0, padding))[:, None]  # (R, 1, H, D)
            x = _tiled(lambda x, a, layer=layer: layer.feed_forward(layer.attention.add(x, a)), x, attended)
        self.x = x


class _DrawParameters:
    """The rows' seeds and options as tensors, made once."""

    def __init__(self, rows: list[RowRequest], device: torch.device) -> None:
        def column(values: list[int] | list[float], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        options = [row.options for row in rows]
        # int64 holds seeds of 2^63 and more as their two's complement
        self.seeds = column([row.seed - 2**64 * (row.seed >= 2**63) for row in rows], torch.int64)
        self.candidates = column([row.candidate for row in rows], torch.int64)
        self.temperature = column([option.temperature for option in options], torch.float32)
        self.top_k = column([option.top_k or 0 for option in options], torch.int64)
        self.top_p = column([1.0 if option.top_p is None else option.top_p for option in options], torch.float32)

    def sample(self, logits: Tensor, position: int) -> Tensor:
        """(B, V) -> (B,)."""
        positions = torch.full_like(self.seeds, position)
        return reference.sample(
            logits, self.seeds, self.candidates, positions, self.temperature, self.top_k, self.top_p
        )


def _layers(model: KoDalle) -> list[Layer]:
    return cast(list[Layer], list(model.layers))


def _padded(num_rows: int, dtype: torch.dtype) -> int:
    """Rows to compute for `num_rows`, so that each of their tiles has a size whose results agree."""
    minimum = _ROW_MINIMUM_BFLOAT16 if dtype == torch.bfloat16 else _ROW_MINIMUM
    full, rest = divmod(num_rows, _ROW_TILE)
    rest = max(minimum, -(-rest // _ROW_MULTIPLE) * _ROW_MULTIPLE) if rest else 0
    return full * _ROW_TILE + rest


def _tiled(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """`function` over at most 64 rows at a time."""
    if tensors[0].shape[0] <= _ROW_TILE:
        return function(*tensors)
    tiles = zip(*(tensor.split(_ROW_TILE) for tensor in tensors), strict=True)
    return torch.cat([function(*tile) for tile in tiles])


def _tiled_project(project: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor) -> tuple[Tensor, ...]:
    if x.shape[0] <= _ROW_TILE:
        return project(x)
    parts = zip(*(project(tile) for tile in x.split(_ROW_TILE)), strict=True)
    return tuple(torch.cat(part) for part in parts)


@contextlib.contextmanager
def _evaluating(model: KoDalle) -> Iterator[None]:
    """No dropout and no autograd inside; the model's mode is put back."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)
