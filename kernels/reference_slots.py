"""What a decoding step does between head and layers, in plain PyTorch: the definition of right for those kernels.

S slots, R rows that are computed (the first R slots), N image tokens, V image vocabulary, C model dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def guided_norm(x: Tensor, partner: Tensor, guidance: Tensor, weight: Tensor, bias: Tensor, *, eps: float) -> Tensor:
    """LayerNorm of the first R rows; a row whose guidance is not 1 moves away from its partner's.

    Args:
        x: (S, C).
        partner: (R,) int, read where guidance is not 1.
        guidance: (R,) g of null + g * (own - null).
        weight, bias: (C,).

    Returns:
        (R, C) in x's dtype; norms and mix in float32 or better.
    """
    R, wide = partner.shape[0], torch.promote_types(x.dtype, torch.float32)
    normed = F.layer_norm(x[:R].to(wide), x.shape[1:], weight.to(wide), bias.to(wide), eps)
    is_guided = (guidance != 1)[:, None]
    null = normed[partner.clamp(max=R - 1)]
    return torch.where(is_guided, null + guidance.to(wide)[:, None] * (normed - null), normed).to(x.dtype)


def feed_tokens(
    drawn: Tensor,
    source: Tensor,
    given: Tensor,
    tokens: Tensor,
    positions: Tensor,
    embedding: Tensor,
    position_table: Tensor,
) -> tuple[Tensor, Tensor]:
    """Records each row's token and makes the layers' next input of it; overwrites `tokens` and `positions`.

    Args:
        drawn: (R,) token ids.
        source: (R,) the row whose token a row is fed, kept below R.
        given: (S, N) tokens that are not drawn, -1 where to draw.
        tokens: (S, N + 1); column N takes what rows that are finished compute.
        positions: (R,) in [0, N], counted on by one up to N.
        embedding: (V, C). position_table: (N, C).

    Returns:
        (R, C) embedding + position; (R,) positions kept at N - 2 or less, since the last token is never an input.
    """
    R, N = drawn.shape[0], given.shape[1]
    rows, giver = torch.arange(R, device=drawn.device), source.clamp(max=R - 1)
    fed = given[giver, positions.clamp(max=N - 1)]
    fed = torch.where(fed >= 0, fed, drawn[giver]).clamp(0, embedding.shape[0] - 1)
    num_read = positions.clamp(max=max(N - 2, 0))
    tokens[rows, positions] = fed
    positions.copy_((positions + 1).clamp(max=N))
    return embedding[fed] + position_table[num_read], num_read
