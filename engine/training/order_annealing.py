"""Order annealing: in which order each sequence of a batch predicts its image tokens (RAR, arXiv 2411.00776).

B sequences, N image tokens.

    share of random orders   1 ───────┐
                                       ╲
                             0          └──────────
                             steps    start  end

A model that learns to predict any cell from any others sees the same few images in ever new ways; the last part of the
training makes it a model of the one order in which it generates. A sequence's order is a function of (seed, its visit,
step): the batch brings a permutation and a number between 0 and 1, and the step decides how many of these count.
"""

import torch

from engine.config.stages import OrderAnnealingConfig
from engine.training.batches import Batch


def batch_orders(batch: Batch, annealing: OrderAnnealingConfig, *, step: int, total_steps: int) -> torch.Tensor | None:
    """The orders of a batch in optimiser step `step` (from 0), (B, N) int64; None: all row by row."""
    is_random = batch["order_draws"] < annealing.random_share(step / total_steps)  # (B,)
    if not bool(is_random.any()):
        return None
    orders = batch["random_orders"]
    raster = torch.arange(orders.shape[1], dtype=torch.int64, device=orders.device)
    return torch.where(is_random[:, None], orders, raster)
