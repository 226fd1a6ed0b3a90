"""The operations of a decode step between layers and head, in plain PyTorch: the definition of right for their kernels.

S slots, R slots computed (the first R), N image tokens, V image vocabulary, C model dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def guided_norm(
    x: Tensor, unconditional: Tensor, guidance: Tensor, weight: Tensor, bias: Tensor, *, eps: float
) -> Tensor:
    """LayerNorm of the first R rows; where guidance is not 1, moved away from the unconditional sequence's.

    Args:
        x: (S, C).
        unconditional: (R,) int, read where guidance is not 1.
        guidance: (R,) g of null + g * (own - null).
        weight, bias: (C,).

    Returns:
        (R, C) in x's dtype; norms and mix in float32 or better.
    """
    R, wide = unconditional.shape[0], torch.promote_types(x.dtype, torch.float32)
    normed = F.layer_norm(x[:R].to(wide), x.shape[1:], weight.to(wide), bias.to(wide), eps)
    is_guided = (guidance != 1)[:, None]
    null = normed[unconditional.clamp(max=R - 1)]
    return torch.where(is_guided, null + guidance.to(wide)[:, None] * (normed - null), normed).to(x.dtype)


def feed_tokens(
    sampled: Tensor,
    source: Tensor,
    init_tokens: Tensor,
    tokens: Tensor,
    positions: Tensor,
    embedding: Tensor,
    position_table: Tensor,
) -> tuple[Tensor, Tensor]:
    """Records each slot's token and embeds it as the layers' next input; overwrites `tokens` and `positions`.

    Args:
        sampled: (R,) token ids.
        source: (R,) the slot whose token a slot is fed, kept below R.
        init_tokens: (S, N) tokens that are given instead of sampled, -1 where to sample.
        tokens: (S, N + 1); column N takes what finished sequences compute.
        positions: (R,) in [0, N], counted on by one up to N.
        embedding: (V, C). position_table: (N, C).

    Returns:
        (R, C) embedding + position; (R,) positions kept at N - 2 or less, since the last token is never an input.
    """
    R, N = sampled.shape[0], init_tokens.shape[1]
    rows, source_row = torch.arange(R, dtype=torch.int64, device=sampled.device), source.clamp(max=R - 1)
    fed = init_tokens[source_row, positions.clamp(max=N - 1)]
    fed = torch.where(fed >= 0, fed, sampled[source_row]).clamp(0, embedding.shape[0] - 1)
    num_read = positions.clamp(max=max(N - 2, 0))
    tokens[rows, positions] = fed
    positions.copy_((positions + 1).clamp(max=N))
    return embedding[fed] + position_table[num_read], num_read
