"""The order of training images: a pure function of (seed, position).

Position p counts images since the start of the run, over all ranks. Epoch e = p // N is a permutation generated from
(seed, e) alone; everything random about one visit (mirror image, which caption) from (seed, p) alone. So a
run resumes by knowing its step, gives the same global batches for any number of ranks, and needs no generator state
in its checkpoints.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np


class BatchOrder:
    """Indices of each step's batch.

    Args:
        num_items: N, images in the training split.
        batch_size: images a step and rank.
        seed: of the run.
        rank, world_size: this process, and their number.
        weights: None for permutations; else relative frequencies, and an epoch is N samples with replacement.
    """

    def __init__(
        self,
        num_items: int,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        weights: Sequence[float] | None = None,
    ) -> None:
        assert num_items > 0, num_items
        assert weights is None or len(weights) == num_items, (len(weights), num_items)
        self.num_items = num_items
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self._probabilities = None if weights is None else np.asarray(weights, dtype=np.float64) / np.sum(weights)
        self._epoch = lru_cache(maxsize=2)(self._sample_epoch)

    def positions(self, step: int) -> range:
        """Positions of this rank's images in step `step` (0-based)."""
        start = (step * self.world_size + self.rank) * self.batch_size
        return range(start, start + self.batch_size)

    def positions_of_all_ranks(self, step: int) -> range:
        """Positions of all ranks' images in a step, rank by rank."""
        images = self.world_size * self.batch_size
        return range(step * images, (step + 1) * images)

    def index(self, position: int) -> int:
        """The image at `position`."""
        epoch, place = divmod(position, self.num_items)
        return int(self._epoch(epoch)[place])

    def generator(self, position: int) -> np.random.Generator:
        """Randomness of one visit: equal for equal (seed, position), whatever ran before."""
        # uint64 by name: numpy makes floats of a list with a number of 2**63 and more, and neighbours become equal
        return np.random.Generator(np.random.Philox(key=np.array([self.seed, position], dtype=np.uint64)))

    def _sample_epoch(self, epoch: int) -> np.ndarray:
        generator = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        if self._probabilities is None:
            return generator.permutation(self.num_items)
        return generator.choice(self.num_items, size=self.num_items, p=self._probabilities)
