"""Digests of what a training reads: equal for the same captions and images, wherever their folder lies.

Pairs pass through one after the other: of a million nothing but the digest stays in memory.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from engine.data.pairs import Pair, Pairs
from engine.files import file_digest
from engine.progress import ProgressBar

_MANY = 20_000  # images; from there on reading them takes long enough for a progress bar
_AT_A_TIME = 4096


def pairs_digests(pairs: Pairs, *, balance: str | None = None) -> dict[str, str]:
    """Digests by what they are of: captions and images of both splits.

    Args:
        balance: attribute by which pairs are sampled more often; its values count as captions do.
    """
    digests = {}
    for name, split in (("training", pairs.train), ("held-out", pairs.validation)):
        digests[f"{name} captions"] = _digest(
            (pair.key, pair.captions, pair.attributes.get(balance) if balance else None) for pair in split
        )
        digests[f"{name} images"] = _digest(image_digests(split))
    return digests


def image_digests(pairs: Sequence[Pair]) -> Iterator[tuple[str, str]]:
    """Key and SHA-256 of the image file of each pair."""
    done = 0
    with (
        ThreadPoolExecutor(8) as pool,  # hashing and reading leave Python's lock
        ProgressBar("reading images", total=len(pairs), enabled=len(pairs) > _MANY) as bar,
    ):
        for start in range(0, len(pairs), _AT_A_TIME):
            some = pairs[start : start + _AT_A_TIME]
            for pair, digest in zip(some, pool.map(file_digest, [pair.image_path for pair in some]), strict=True):
                yield pair.key, digest.sha256
            done += len(some)
            bar.update(done)


def _digest(values: Iterable[object]) -> str:
    digest = hashlib.sha256()
    for value in values:
        digest.update(repr(value).encode() + b"\n")
    return digest.hexdigest()
