"""How the same image is generated elsewhere, with our weights: the ancestors' loop, and a plain loop with a cache.

Both sample from the same distribution as `engine.pipeline`. Our layers stand in for theirs (the maths is the same), with
PyTorch's fused attention and no mask tensor, so what is timed here is kinder than the originals.

B sequences, T positions, H heads, D head dim, P prefix positions, N image tokens, V image vocabulary, J joint vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.models.transformer import KoDalle
from engine.models.transformer_layer import Layer
from kernels import reference

PUBLISHED_FILTER_THRES = 0.5  # KoDALLE's default; of 48,512 it keeps 24,256, more than there are image tokens


# --------------------------------------------------------------------------------------- no cache: KoDALLE as published


def uncached_logits(model: KoDalle, text_tokens: Tensor, image_tokens: Tensor) -> Tensor:
    """What comes next, by reading everything again: every layer and the joint head on each position.

    As KR-HappyFace/KoDALLE `dalle/models.py` and lucidrains/DALLE-pytorch `forward` do it for each token.

    Args:
        text_tokens: (B, text_seq_len).
        image_tokens: (B, n) sampled so far, n may be 0.

    Returns:
        (B, J) logits of the last position, text rows masked with the lowest finite number.
    """
    image = F.embedding(image_tokens, model.image_embedding.tokens) + model.input_positions()[: image_tokens.shape[1]]
    x = start = torch.cat([model.embed_prefix(text_tokens), image], dim=1)  # (B, P + n, C)
    for layer in model.layers:
        x = layer(x, start)
    logits = F.linear(model.head.norm(x), model.head.weight, model.head.bias)  # (B, P + n, J)
    position = torch.arange(logits.shape[1], device=x.device)[:, None]
    is_text_row = torch.arange(logits.shape[2], device=x.device) < model.head.num_text_rows
    forbidden = is_text_row == (position >= model.config.text_seq_len)  # (P + n, J)
    return logits.masked_fill(forbidden, -torch.finfo(logits.dtype).max)[:, -1]


def sample_next_uncached(model: KoDalle, logits: Tensor, seeds: Tensor, candidates: Tensor, position: int) -> Tensor:
    """The published filter over the joint vocabulary, temperature 1, and a sample: (B, J) -> (B,) image tokens.

    The noise is ours in the place of `torch.multinomial`, so that tokens can be compared one by one.
    """
    k = reference.ancestor_top_k(PUBLISHED_FILTER_THRES, model.config.joint_vocab_size)
    values, ids = logits.topk(k)
    kept = torch.full_like(logits, -torch.inf).scatter_(1, ids, values)[:, model.head.num_text_rows :]  # (B, V)
    noise = reference.gumbel_noise(seeds, candidates, torch.full_like(seeds, position), kept.shape[1])
    return (kept.float() + noise).argmax(1)


@torch.inference_mode()
def sample_uncached(
    model: KoDalle, text_tokens: Tensor, *, seed: int, candidates: Sequence[int], num_tokens: int
) -> Tensor:
    """The first tokens of the candidates of one caption: text_tokens (1, text_seq_len) -> (B, num_tokens)."""
    B = len(candidates)
    text_tokens = text_tokens.expand(B, -1)
    seeds = torch.full((B,), seed, device=text_tokens.device)
    numbers = torch.tensor(candidates, device=text_tokens.device)
    tokens = torch.empty(B, 0, dtype=torch.int64, device=text_tokens.device)
    for position in range(num_tokens):
        logits = uncached_logits(model, text_tokens, tokens)
        sampled = sample_next_uncached(model, logits, seeds, numbers, position)
        tokens = torch.cat([tokens, sampled[:, None]], dim=1)
    return tokens


# -------------------------------------------------------------------------- a plain cache: as transformers' users write it


@dataclass
class GrowingCache:
    """Keys and values of each layer, (B, H, T, D), concatenated anew for every token."""

    keys: list[Tensor]
    values: list[Tensor]

    @property
    def length(self) -> int:
        return self.keys[0].shape[2]


def empty_cache(model: KoDalle, num_sequences: int) -> GrowingCache:
    """Nothing read yet."""
    return random_cache(model, num_sequences, 0)


def random_cache(model: KoDalle, num_sequences: int, length: int) -> GrowingCache:
    """A cache of `length` positions of noise, to time a step at that length."""
    config, weight = model.config, model.head.weight
    shape = (num_sequences, config.num_heads, length, config.head_dim)
    made = [torch.randn(shape, dtype=weight.dtype, device=weight.device) for _ in range(2 * config.num_layers)]
    return GrowingCache(made[: config.num_layers], made[config.num_layers :])


def cached_logits(model: KoDalle, x: Tensor, cache: GrowingCache) -> Tensor:
    """Reads x (B, T, C) behind what the cache holds, which grows by T; (B, V) logits of the last position."""
    is_prefix = cache.length == 0

    def attend(number: int, layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache.keys[number] = torch.cat([cache.keys[number], k.transpose(1, 2)], dim=2)
        cache.values[number] = torch.cat([cache.values[number], v.transpose(1, 2)], dim=2)
        read = (q.transpose(1, 2), cache.keys[number], cache.values[number])
        return F.scaled_dot_product_attention(*read, is_causal=is_prefix).transpose(1, 2)

    x = model.apply_layers(x, attend)
    joint = F.linear(model.head.norm(x[:, -1]), model.head.weight, model.head.bias)  # (B, J)
    return joint[:, model.head.num_text_rows :]


def cached_step(model: KoDalle, tokens: Tensor, position: int, cache: GrowingCache) -> Tensor:
    """Feeds the tokens (B,) of a grid cell and samples the next ones (B,)."""
    place = model.input_positions()[position]
    x = (F.embedding(tokens, model.image_embedding.tokens) + place)[:, None]  # (B, 1, C)
    return plain_sample(cached_logits(model, x, cache))


def plain_sample(logits: Tensor) -> Tensor:
    """(B, V) -> (B,), unfiltered as our default is."""
    return torch.multinomial(logits.float().softmax(-1), 1)[:, 0]


@torch.inference_mode()
def sample_cached(model: KoDalle, text_tokens: Tensor, *, num_sequences: int) -> Tensor:
    """Candidates of one caption, each with its own copy of it: text_tokens (1, text_seq_len) -> (B, N)."""
    cache = empty_cache(model, num_sequences)
    prefix = model.embed_prefix(text_tokens.expand(num_sequences, -1))  # (B, P, C)
    tokens = [plain_sample(cached_logits(model, prefix, cache))]
    for position in range(model.config.image_seq_len - 1):
        tokens.append(cached_step(model, tokens[-1], position, cache))
    return torch.stack(tokens, dim=1)
