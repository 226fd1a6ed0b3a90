"""Digests of what a training reads: equal for the same captions and images, wherever their folder lies."""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from engine.data.pairs import Pair, Pairs
from engine.files import file_digest
from engine.progress import ProgressBar

_MANY = 20_000  # images; from there on reading them takes long enough for a progress bar


def pairs_digests(pairs: Pairs, *, balance: str | None = None) -> dict[str, str]:
    """Digests by what they are of: captions and images of both splits.

    Args:
        balance: attribute by which pairs are sampled more often; its values count as captions do.
    """
    images = image_digests(pairs.all)
    digests = {}
    for name, split in (("training", pairs.train), ("held-out", pairs.validation)):
        captions = [(pair.key, pair.captions, pair.attributes.get(balance) if balance else None) for pair in split]
        digests[f"{name} captions"] = _digest(captions)
        digests[f"{name} images"] = _digest([(pair.key, images[pair.key]) for pair in split])
    return digests


def image_digests(pairs: Sequence[Pair]) -> dict[str, str]:
    """SHA-256 of each pair's image file, by the pair's key."""
    digests = {}
    with (
        ThreadPoolExecutor(8) as pool,  # hashing and reading leave Python's lock
        ProgressBar("reading images", total=len(pairs), enabled=len(pairs) > _MANY) as bar,
    ):
        for pair, digest in zip(pairs, pool.map(file_digest, [pair.image_path for pair in pairs]), strict=True):
            digests[pair.key] = digest.sha256
            bar.update(len(digests))
    return digests


def _digest(values: Sequence[object]) -> str:
    digest = hashlib.sha256()
    for value in values:
        digest.update(repr(value).encode() + b"\n")
    return digest.hexdigest()
