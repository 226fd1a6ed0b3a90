"""Every op in plain PyTorch: the definition of right for the kernels, and the CPU path.

B sequences, T positions, H heads, D head dim, V vocabulary, S survivors of a filter.
In decoding: G captions, P prefix positions, N own positions. In a linear layer: R rows, K inputs, N outputs.

Sampling. token = argmax(filtered logits / temperature + Gumbel noise), ties to the lowest id. The noise is a pure
function of (seed, candidate, image position, token id) by counter-based Philox, never of the place in the batch, so a
candidate is the same image whatever runs beside it. Every operation is either elementwise, a comparison, or an integer
sum: nothing whose order could change the result.

Cost, 16 sequences x 16,384 tokens, one core (AVX-512, shared machine): about 6 ms, nearly all of it the 65,536 Philox
calls.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011)
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_MASK32 = 0xFFFFFFFF
_ROUNDS = 10
_SAMPLING_STREAM = 0  # counter word 3; any other use of the same seeds takes another tag
_PHILOX_BLOCK = 65536  # calls at a time; smaller blocks pay more for dispatch than they save in cache


# ------------------------------------------------------------------------------------------------ transformer ops


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, scores and softmax in float32 or better.

    Args:
        q: (B, Tq, H, D).
        k, v: (B, Tk, H, D); Tk >= Tq when causal.
        causal: the queries are the last Tq of the Tk positions and see none after their own.

    Returns:
        (B, Tq, H, D) in q's dtype.
    """
    Tq, Tk, D = q.shape[1], k.shape[1], q.shape[3]
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("bqhd,bkhd->bhqk", q.to(wide), k.to(wide)) / math.sqrt(D)
    if causal:
        hidden = torch.ones(Tq, Tk, dtype=torch.bool, device=q.device).triu(1 + Tk - Tq)
        scores = scores.masked_fill(hidden, -torch.finfo(wide).max)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v.to(wide)).to(q.dtype)


def decode_attention(
    q: Tensor,
    prefix_keys: Tensor,
    prefix_values: Tensor,
    prefix_of_sequence: Tensor,
    keys: Tensor,
    values: Tensor,
    num_filled: Tensor,
    *,
    new_keys: Tensor | None = None,
    new_values: Tensor | None = None,
) -> Tensor:
    """One query a sequence over its caption's prefix and then its own filled positions, one softmax over both.

    Args:
        q: (B, H, D).
        prefix_keys, prefix_values: (G, P, H, D).
        prefix_of_sequence: (B,) int, each sequence's index into the prefixes.
        keys, values: (B, N, H, D); positions from num_filled on may hold anything, NaN included.
        num_filled: (B,) int in [0, N].
        new_keys, new_values: (B, H, D), both or neither: first written to position num_filled of `keys` and `values`
            (in place) and then attended to as well. A sequence whose N positions are all filled drops them; N >= 1.

    Returns:
        (B, H, D) in q's dtype; scores and softmax in float32 or better.
    """
    P, N, D = prefix_keys.shape[1], keys.shape[1], q.shape[2]
    if new_keys is not None and new_values is not None:
        sequences = torch.arange(q.shape[0], dtype=torch.int64, device=q.device)
        places = num_filled.long().clamp(max=N - 1)
        has_room = (num_filled < N)[:, None, None]
        for cache, new in ((keys, new_keys), (values, new_values)):
            cache[sequences, places] = torch.where(has_room, new, cache[sequences, places])
        num_filled = (num_filled + 1).clamp(max=N)
    wide = torch.promote_types(q.dtype, torch.float32)
    caption = prefix_of_sequence.long()
    all_keys = torch.cat([prefix_keys[caption], keys], dim=1).to(wide)  # (B, P + N, H, D)
    all_values = torch.cat([prefix_values[caption], values], dim=1).to(wide)
    unread = torch.arange(P + N, dtype=torch.int64, device=q.device) >= P + num_filled[:, None]  # (B, P + N)
    scores = torch.einsum("bhd,bthd->bht", q.to(wide), all_keys) / math.sqrt(D)
    weights = scores.masked_fill(unread[:, None], -math.inf).softmax(-1)
    return torch.einsum("bht,bthd->bhd", weights, all_values.masked_fill(unread[:, :, None, None], 0)).to(q.dtype)


def group_norm(x: Tensor, weight: Tensor, bias: Tensor, *, groups: int, eps: float, silu: bool) -> Tensor:
    """GroupNorm of channels-last images, SiLU after it with `silu`; float32 or better inside.

    Args:
        x: (B, P, C), P pixels; neighbouring channels make a group.
        weight, bias: (C,).

    Returns:
        (B, P, C) in x's dtype.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    y = F.group_norm(x.to(wide).transpose(1, 2), groups, weight.to(wide), bias.to(wide), eps).transpose(1, 2)
    return (F.silu(y) if silu else y).to(x.dtype).contiguous()


def geglu(x: Tensor) -> Tensor:
    """value * gelu(gate), exact (erf) GELU; x (..., 2F) holds value first, then gate; returns (..., F)."""
    value, gate = x.chunk(2, dim=-1)
    if x.device.type == "cpu" and not torch.is_grad_enabled():
        # PyTorch's own GELU ends each thread's share with scalar code, which differs in the last bit: with 3, 5 or 7
        # threads a row's bits depended on the number of rows. oneDNN's, for contiguous tensors, do not.
        gate = gate.contiguous()
    return value * F.gelu(gate)


class Norm(NamedTuple):
    """A LayerNorm before a linear layer."""

    weight: Tensor  # (K,)
    bias: Tensor  # (K,)
    eps: float  # added to the variance


class Residual(NamedTuple):
    """What a linear layer's result is added to."""

    x: Tensor  # (R, N), the residual stream
    scale: Tensor  # (N,), the branch's LayerScale


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Norm | None = None,
    gated: bool = False,
    residual: Residual | None = None,
) -> Tensor:
    """A linear layer as it is used in a transformer: LayerNorm before it, GEGLU or the residual sum after it.

    Args:
        x: (R, K).
        weight, bias: (N, K) and (N,), as nn.Linear has them.
        norm: x's rows are normalised first.
        gated: the layer's outputs are [value: N/2 | gate: N/2]; the result is value * gelu(gate), (R, N/2).
        residual: the result is residual.x + residual.scale * output.

    Returns:
        (R, N) or, gated, (R, N/2).
    """
    if norm is not None:
        x = F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
    out = F.linear(x, weight, bias)  # (R, N)
    if gated:
        out = geglu(out)  # (R, N/2)
    return out if residual is None else residual.x + residual.scale * out


# ---------------------------------------------------------------------------------------------------- random bits


def philox_4x32_10(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, ...]:
    """Ten rounds of Philox, the same bits as Triton's `tl.philox(seed, c0, c1, c2, c3, n_rounds=10)`.

    Args:
        seed: int64, the 64-bit key (seeds of 2^63 and more as their two's complement).
        c0, c1, c2, c3: int64 holding unsigned 32-bit counter words; all five broadcast together.

    Returns:
        Four int64 tensors of the broadcast shape with values in [0, 2^32).
    """
    shape = torch.broadcast_tensors(seed, c0, c1, c2, c3)[0].shape  # torch.broadcast_shapes imports SymPy
    w0, w1, w2, w3 = (word.expand(shape).clone() for word in (c0, c1, c2, c3))
    k0, k1 = seed & _MASK32, (seed >> 32) & _MASK32
    p0, p1 = torch.empty_like(w0), torch.empty_like(w0)
    for _ in range(_ROUNDS):
        # int64 products wrap modulo 2^64, which leaves every bit of a 32 x 32 product in place. Words 1 and 3 keep
        # stray bits above bit 31 until they are masked: four operations fewer a round.
        torch.mul(w0, _MULTIPLIERS[0], out=p0)
        torch.mul(w2, _MULTIPLIERS[1], out=p1)
        torch.bitwise_right_shift(p1, 32, out=w0).bitwise_xor_(w1).bitwise_xor_(k0).bitwise_and_(_MASK32)
        torch.bitwise_right_shift(p0, 32, out=w2).bitwise_xor_(w3).bitwise_xor_(k1).bitwise_and_(_MASK32)
        w1, p1, w3, p0 = p1, w1, p0, w3
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK32, (k1 + _KEY_STEPS[1]) & _MASK32
    return w0, w1.bitwise_and_(_MASK32), w2, w3.bitwise_and_(_MASK32)


def gumbel_noise(seeds: Tensor, candidates: Tensor, positions: Tensor, num_tokens: int) -> Tensor:
    """Standard Gumbel noise for every token of a vocabulary.

    Args:
        seeds, candidates, positions: (B,) int64; request seed, candidate index, image position.
        num_tokens: V.

    Returns:
        (B, V) float32. Token t takes lane t & 3 of the Philox call with counter (t >> 2, position, candidate, 0).
    """
    B, num_calls = seeds.shape[0], -(-num_tokens // 4)
    calls = torch.arange(num_calls, dtype=torch.int64, device=seeds.device)
    bits = torch.empty(B, num_calls, 4, dtype=torch.float32, device=seeds.device)
    rows = max(1, _PHILOX_BLOCK // num_calls) if seeds.device.type == "cpu" else B
    for start in range(0, B, rows):
        block = slice(start, start + rows)
        row_words = (
            positions[block, None],
            candidates[block, None],
            torch.full_like(seeds[block, None], _SAMPLING_STREAM),
        )
        for lane, word in enumerate(philox_4x32_10(seeds[block, None], calls, *row_words)):
            bits[block, :, lane] = word  # rounds to float32
    return _to_gumbel(bits.flatten(1)[:, :num_tokens])


def gumbel_noise_at(seeds: Tensor, candidates: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
    """`gumbel_noise` of single tokens: (S,) int64 each -> (S,) float32, equal to the last bit."""
    words = philox_4x32_10(seeds, tokens >> 2, positions, candidates, torch.full_like(seeds, _SAMPLING_STREAM))
    return _to_gumbel(torch.stack(words).gather(0, (tokens & 3)[None])[0].float())


def _to_gumbel(bits: Tensor) -> Tensor:
    """32 random bits as float32 -> -log(-log1p(-v)), v = (bits + 1/2) / 2^32 kept below 1 (overwrites `bits`).

    -log(-log(u)) would cap the noise at 16.6, because a float32 uniform near 1 has a spacing of 2^-24: among 16,384
    equal logits the top two would tie in 5e-4 of the samples. This form reaches 22.9 and ties in 2e-6.
    """
    uniform = bits.add_(0.5).mul_(2.0**-32).clamp_(max=1 - 2.0**-24)
    return uniform.neg_().log1p_().neg_().log_().neg_()


# ------------------------------------------------------------------------------------------------------- sampling


def ancestor_top_k(threshold: float, joint_vocab_size: int) -> int:
    """KoDALLE's `filter_thres` as a top_k: its k counts the joint vocabulary (text, reserved and image rows).

    With 48,512 rows 0.5 gives 24,256, more than the 16,384 image tokens: the ancestors' default filters nothing.
    (KR-HappyFace/KoDALLE: utils.py, top_k.)
    """
    return max(int((1 - threshold) * joint_vocab_size), 1)


def filter_logits(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Temperature, then top-k, then (on the renormalised survivors) top-p.

    Ties: every token whose logit equals the last one kept is kept too, by either filter, so that the result does not
    depend on the order of equals. The likeliest token always survives.

    Args:
        logits: (B, V).
        temperature: (B,) float; 0 filters as 1 does (the argmax is taken anyway).
        top_k: (B,) int64; 0, or V and more: off.
        top_p: (B,) float in (0, 1]; 1: off. Keeps the fewest tokens whose probabilities reach it.

    Returns:
        (B, V) float32 logits / temperature, with -inf for what was removed.
    """
    V = logits.shape[1]
    temperature = temperature.float()
    scaled = logits.float() / torch.where(temperature > 0, temperature, 1.0)[:, None]
    active = (top_k > 0) & (top_k < V)
    for k in top_k[active].unique().tolist():  # a batch holds few different settings
        rows = ((top_k == k) & active).nonzero()[:, 0]
        kept = scaled[rows]
        kth = kept.topk(k, sorted=False).values.amin(1, keepdim=True)
        scaled[rows] = kept.masked_fill(kept < kth, -math.inf)
    rows = (top_p < 1).nonzero()[:, 0]
    if rows.numel():
        kept = scaled[rows]
        scaled[rows] = kept.masked_fill(kept < _top_p_threshold(kept, top_p[rows]), -math.inf)
    return scaled


def sample(
    logits: Tensor,
    seeds: Tensor,
    candidates: Tensor,
    positions: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
) -> Tensor:
    """Samples one token a sequence.

    Args:
        logits: (B, V).
        seeds, candidates, positions: (B,) int64, see `gumbel_noise`.
        temperature, top_k, top_p: (B,), see `filter_logits`; temperature 0 takes the argmax.

    Returns:
        (B,) int64 token ids.
    """
    B, V = logits.shape
    random = temperature > 0
    if not random.any():
        return logits.float().argmax(1)
    scores = filter_logits(logits, temperature, top_k, top_p)
    if (((top_k > 0) & (top_k < V)) | (top_p < 1)).any():
        row, token = (scores > -math.inf).nonzero().unbind(1)
        if 4 * token.numel() < B * V:  # a Philox call has the noise of four tokens, of which a survivor uses one
            noise = gumbel_noise_at(seeds[row], candidates[row], positions[row], token)
            scores[row, token] += noise.masked_fill_(~random[row], 0)
            return scores.argmax(1)
    scores += gumbel_noise(seeds, candidates, positions, V).masked_fill_(~random[:, None], 0)
    return scores.argmax(1)  # the first of equals


def _top_p_threshold(scaled: Tensor, top_p: Tensor) -> Tensor:
    """(B, 1): the smallest logit that top-p keeps.

    Mass is fixed point, exp(logit - max) * 2^40 rounded to an integer: sums of up to 2^23 tokens stay exact in int64,
    so neither a sort's order of equals nor a kernel's reduction tree can move the threshold.
    """
    V = scaled.shape[1]
    mass = (scaled - scaled.amax(1, keepdim=True)).exp().double().mul_(2.0**40).round_().long()  # (B, V)
    wanted = top_p.double()[:, None] * mass.sum(1, keepdim=True).double()
    for count in (min(1024, V), V):  # usually the largest 1024 hold the mass, which saves the full sort
        values, ids = scaled.topk(count)
        reached = mass.gather(1, ids).cumsum(1)  # (B, count)
        if (reached[:, -1:] >= wanted).all() or count == V:
            break
    kept = (reached < wanted).sum(1, keepdim=True).clamp(max=count - 1)  # index of the token that reaches it
    return values.gather(1, kept)
