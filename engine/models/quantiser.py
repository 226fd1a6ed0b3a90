"""Vector quantiser: the nearest codebook entry of each encoder output, and resets of unused entries.

It computes what taming's `VectorQuantizer2` computes (same state-dict name, same initialisation, same loss with the
published "legacy" placement of beta), without einops and without a (B*N, K) one-hot: distances are one
matrix product, because |z|^2 is the same for every entry and does not change which is nearest.

Resets are for small data: a codebook initialised with U(+-1/K) covers a small part of the latent space, and on a few
thousand images most entries are never the nearest. Entries can be initialised with encoder outputs (`init_from`), and
entries that were not used for some time can be reset to recent encoder outputs (`reset_unused`, after Lancucki et al.
2020, arXiv:2005.08520).

Shapes: B images, N positions of the latent grid (H*W), E width of an entry, K entries.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from engine.models.image_tokens import check_tokens

# Rows of latents per distance product: at K = 16384 one piece is 0.5 GiB of float32.
_ROWS_PER_PRODUCT = 8192


class Quantised(NamedTuple):
    """Output of the quantiser."""

    latents: Tensor  # (B, E, H, W): codebook entries; gradients pass straight through to the encoder
    loss: Tensor  # scalar, float32
    image_tokens: Tensor  # (B, N) int64, row by row over the grid


class CodebookStats(NamedTuple):
    """Usage of the codebook by a batch."""

    usage: Tensor  # share of the K entries that occur, 0..1
    perplexity: Tensor  # exp(entropy) of the entries' frequencies, 1..K: effective number of entries


class VectorQuantizer(nn.Module):
    """Codebook with straight-through gradients (van den Oord et al. 2017, arXiv:1711.00937; taming's VectorQuantizer2).

    State dict: `embedding.weight` (K, E) only, as in taming. The state of resets is in `usage_state()`.

    Args:
        codebook_size: K.
        embed_dim: E.
        beta: weight of one of the two loss terms.
        legacy: True puts beta on the codebook term (a slip in taming as published: commitment weight 1); False puts
            it on the commitment term, as the VQ-VAE paper does.
        track_usage: in training, count uses and keep the last batch of encoder outputs, for `reset_unused`.
    """

    usage_counts: Tensor

    def __init__(
        self, codebook_size: int, embed_dim: int, *, beta: float = 0.25, legacy: bool = True, track_usage: bool = False
    ) -> None:
        super().__init__()
        self.codebook_size = codebook_size
        self.embed_dim = embed_dim
        self.beta = beta
        self.legacy = legacy
        self.track_usage = track_usage
        self.embedding = nn.Embedding(codebook_size, embed_dim, dtype=torch.float32)
        nn.init.uniform_(self.embedding.weight, -1.0 / codebook_size, 1.0 / codebook_size)
        # Not persistent: taming's checkpoints have no such tensor, and a served model does not need it.
        self.register_buffer("usage_counts", torch.zeros(codebook_size, dtype=torch.int64), persistent=False)
        self._recent: Tensor | None = None  # (B*N, E) encoder outputs of the last training batch

    def forward(self, latents: Tensor) -> Quantised:
        """Replaces every latent vector by its nearest entry.

        Args:
            latents: (B, E, H, W), either memory format.
        """
        B = latents.shape[0]
        z = latents.permute(0, 2, 3, 1)  # (B, H, W, E)
        vectors = z.reshape(-1, self.embed_dim)  # (B*N, E)
        tokens = self.nearest(vectors)  # (B*N,)
        chosen = F.embedding(tokens, self.embedding.weight).view(z.shape)  # (B, H, W, E)
        if self.training and self.track_usage:
            self._track(vectors, tokens)

        # float32 whatever the model's type: bfloat16 loses mean squares of small differences.
        commitment = F.mse_loss(z.float(), chosen.detach().float())
        codebook = F.mse_loss(chosen.float(), z.detach().float())
        loss = commitment + self.beta * codebook if self.legacy else self.beta * commitment + codebook

        passed_through = z + (chosen - z).detach()
        return Quantised(passed_through.permute(0, 3, 1, 2), loss, tokens.view(B, -1))

    def nearest(self, vectors: Tensor) -> Tensor:
        """Index of the nearest entry (Euclidean, lowest index on ties): (M, E) -> (M,) int64. Computed in float32."""
        return nearest_rows(vectors, self.embedding.weight)

    def lookup(self, image_tokens: Tensor) -> Tensor:
        """Entries of the given tokens: (...) integers -> (..., E).

        Raises:
            ValueError: not integers, or a token outside 0..K-1.
        """
        return F.embedding(check_tokens(image_tokens, self.codebook_size), self.embedding.weight)

    # ------------------------------------------------------------------------------------------------------ resets

    @torch.no_grad()
    def init_from(self, vectors: Tensor, generator: torch.Generator, *, kmeans_rounds: int = 0) -> None:
        """Initialises all entries with encoder outputs sampled by `generator`, and clears usage.

        Samples without replacement while there are at least K vectors. With fewer, repeats get a little noise (1 % of
        the vectors' standard deviation), so that no two entries are equal. Rank 0's entries go to all ranks.

        Args:
            vectors: (M, E) encoder outputs, or (B, E, H, W).
            generator: CPU generator.
            kmeans_rounds: rounds of Lloyd's algorithm on the vectors; entries without a vector are sampled anew.
        """
        rows = self._rows(vectors)
        self.embedding.weight.copy_(_sample_rows(rows, self.codebook_size, generator))
        for _ in range(kmeans_rounds):
            self._lloyd_round(rows.float(), generator)
        self._share_from_rank_0()
        self.usage_counts.zero_()

    @torch.no_grad()
    def reset_unused(self, generator: torch.Generator) -> Tensor:
        """Resets entries that were not used since the last call to recent encoder outputs, and clears usage.

        The same counts, recent vectors and generator state give the same codebook, so a run that restores
        `usage_state()` and the generator continues identically. On several ranks the counts are summed and rank 0's
        entries go to all; every rank must call. Under DeepSpeed with float32 master weights the caller must also write
        `embedding.weight` back into them (`engine.training.weights.update_master`).

        Returns:
            (R,) int64 indices of the reset entries, ascending.

        Raises:
            RuntimeError: nothing was tracked yet (`track_usage` off, or no training batch so far).
        """
        if self._recent is None:
            raise RuntimeError("reset_unused needs track_usage=True and at least one training batch before it")
        if _several_ranks():
            dist.all_reduce(self.usage_counts)
        unused = (self.usage_counts == 0).nonzero().flatten()  # (R,)
        if unused.numel():
            self.embedding.weight[unused] = _sample_rows(self._recent, unused.numel(), generator).to(
                self.embedding.weight
            )
            self._share_from_rank_0()
        self.usage_counts.zero_()
        return unused

    def usage_state(self) -> dict[str, Tensor]:
        """State of `reset_unused` besides the weights, as CPU tensors for a training checkpoint."""
        recent = (
            torch.empty(0, self.embed_dim, dtype=torch.float32, device="cpu") if self._recent is None else self._recent
        )
        return {"usage_counts": self.usage_counts.cpu().clone(), "recent_vectors": recent.cpu().clone()}

    def load_usage_state(self, state: dict[str, Tensor]) -> None:
        """Restores what `usage_state` returned.

        Raises:
            ValueError: counts of another codebook size, or vectors of another width.
        """
        counts, recent = state["usage_counts"], state["recent_vectors"]
        if counts.shape != self.usage_counts.shape or recent.shape[1:] != (self.embed_dim,):
            raise ValueError(
                f"usage state is for {counts.numel()} entries of width {recent.shape[-1]}, "
                f"the codebook has {self.codebook_size} of width {self.embed_dim}"
            )
        self.usage_counts.copy_(counts)
        self._recent = recent.to(self.embedding.weight.device).clone() if recent.numel() else None

    def _lloyd_round(self, rows: Tensor, generator: torch.Generator) -> None:
        nearest = self.nearest(rows)  # (M,)
        counts = torch.bincount(nearest, minlength=self.codebook_size)  # (K,)
        sums = torch.zeros_like(self.embedding.weight, dtype=torch.float32).index_add_(0, nearest, rows)
        entries = sums / counts.clamp(min=1)[:, None]
        empty = (counts == 0).nonzero().flatten()
        if empty.numel():
            entries[empty] = _sample_rows(rows, empty.numel(), generator)
        self.embedding.weight.copy_(entries)

    def _track(self, vectors: Tensor, tokens: Tensor) -> None:
        self.usage_counts.scatter_add_(0, tokens, torch.ones_like(tokens))
        self._recent = vectors.detach()

    def _rows(self, vectors: Tensor) -> Tensor:
        if vectors.dim() == 4:
            vectors = vectors.permute(0, 2, 3, 1).reshape(-1, vectors.shape[1])  # (B, E, H, W) -> (B*N, E)
        if vectors.dim() != 2 or vectors.shape[1] != self.embed_dim or not len(vectors):
            raise ValueError(f"expected (M, {self.embed_dim}) vectors with M > 0, got {tuple(vectors.shape)}")
        return vectors.detach()

    def _share_from_rank_0(self) -> None:
        if _several_ranks():
            dist.broadcast(self.embedding.weight.data, src=0)


@torch.no_grad()
def nearest_rows(vectors: Tensor, table: Tensor) -> Tensor:
    """Index of the nearest row (Euclidean, lowest index on ties): (M, E), (K, E) -> (M,) int64. Computed in float32."""
    table = table.detach().float()
    with torch.autocast(vectors.device.type, enabled=False):
        squared_norms = table.square().sum(dim=1)  # (K,)
        pieces = [
            torch.addmm(squared_norms, piece.float(), table.T, alpha=-2.0).argmin(dim=1)  # (m, K) -> (m,)
            for piece in vectors.detach().split(_ROWS_PER_PRODUCT)
        ]
    return torch.cat(pieces)


def codebook_stats(image_tokens: Tensor, codebook_size: int) -> CodebookStats:
    """Usage and perplexity of a batch of tokens, 0-d float32 on the device, so that the host waits for nothing."""
    tokens = image_tokens.flatten()
    counts = torch.zeros(codebook_size, dtype=torch.int64, device=tokens.device)
    counts.scatter_add_(0, tokens, torch.ones_like(tokens))
    shares = counts.float() / tokens.numel()
    return CodebookStats((counts > 0).float().mean(), torch.special.entr(shares).sum().exp())


def _sample_rows(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` rows sampled by a CPU generator; beyond the first pass over `rows`, with noise of 1 % of their spread."""
    order = torch.randperm(len(rows), generator=generator, dtype=torch.int64, device="cpu")[:count]
    sampled = rows[order.to(rows.device)].float()
    if count > len(rows):
        again = torch.randint(len(rows), (count - len(rows),), generator=generator, dtype=torch.int64, device="cpu")
        noise = torch.randn(count - len(rows), rows.shape[1], generator=generator, dtype=torch.float32, device="cpu")
        spread = rows.float().std(dim=0, unbiased=False)
        repeats = rows[again.to(rows.device)].float() + 0.01 * spread * noise.to(rows.device)
        sampled = torch.cat([sampled, repeats])
    return sampled


def _several_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
