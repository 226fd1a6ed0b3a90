"""Images and captions as tokens on disk, written once before KoDALLE trains.

Encoding images through the VQGAN at every step would cost 23 % more arithmetic and all the JPEG decoding; the tokens of
an image are 512 bytes. Layout of a shard folder, one sub-folder a split, shard p of each:

    image_tokens-<p>.npy   (n, views, S) uint16   view 0 as it is, view 1 (with flip) mirrored, then the augmented ones
    text_tokens-<p>.npy    (m, T) int32           all captions of all pairs
    text_offsets-<p>.npy   (n + 1,) int64         captions of pair i: text_tokens[offsets[i]:offsets[i + 1]]
    ../shards.json                                digests of the VQGAN, the tokenizer, captions and images; what was cut; pairs
                                                  of each shard, largest tokens; size and SHA-256 of every file

n pairs of a shard, S image tokens, T text positions. Held-out images have view 0 alone. Older folders have one shard a split,
without a number; they are read as before.

A split is one sequence of pairs, whatever it is cut into: pair i of the shards one behind the other is pair i of the split, so
that batches do not depend on the number of shards, nor on that of processes. A process maps the shards that its pairs are in
when it first wants one of them, and reads no more of them than that.

Augmented views are for small sets: an image shifted by half a token's width has other tokens, and a transformer soon
memorises a few thousand images that are always the same.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from engine.config.run import CropKind
from engine.data.digests import pairs_digests
from engine.data.pairs import Pairs
from engine.data.tokenizer import CaptionTokenizer
from engine.errors import InputError
from engine.files import FileDigest, file_digest, read_json

SHARD_FORMAT = 2  # of the tokens; how they are cut into files is not part of it
ARRAYS = ("image_tokens", "text_tokens", "text_offsets")
INDEX_FILE = "shards.json"


@dataclass(frozen=True)
class AugmentedViews:
    """Versions of a training image that are encoded.

    Args:
        flip: the mirrored image, too.
        count: augmented views, each cropped or shifted at random and, with `flip`, mirrored or not.
        shift: largest shift in pixels.
        crop: of images of any shape; the first view is then cropped without chance. None: they are stretched.
    """

    flip: bool = False
    count: int = 0
    shift: int = 0
    crop: CropKind | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """What shards state of it; options that came later only where they are used, so that older shards stay good."""
        return {name: value for name, value in asdict(self).items() if name != "crop" or value is not None}


@dataclass(frozen=True)
class TokenShard:
    """Consecutive pairs of a split, memory-mapped."""

    image_tokens: np.ndarray  # (n, views, S) uint16
    text_tokens: np.ndarray  # (m, T) int32
    text_offsets: np.ndarray  # (n + 1,) int64

    def __len__(self) -> int:
        return len(self.image_tokens)

    def pick(self, index: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """One visit of pair `index`: a random caption (T,) and a random view (S,)."""
        first, last = self.text_offsets[index], self.text_offsets[index + 1]
        caption = first if last - first == 1 else generator.integers(first, last)
        views = self.image_tokens.shape[1]
        view = 0 if views == 1 else generator.integers(views)
        return self.text_tokens[caption], self.image_tokens[index, view]


class TokenShards:
    """All pairs of a split, in one or more shards, each of which is opened when one of its pairs is first wanted.

    Args:
        names: of the files of each shard, without `image_tokens` and the like: `train/{}-00000.npy`.
        lengths: pairs of each shard.
    """

    def __init__(self, folder: Path, names: Sequence[str], lengths: Sequence[int]) -> None:
        self._folder = folder
        self._names = list(names)
        self._starts = list(accumulate(lengths, initial=0))
        self._opened: dict[int, TokenShard] = {}

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def opened(self) -> list[int]:
        """Numbers of the shards that this process has opened."""
        return sorted(self._opened)

    def pick(self, index: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """As `TokenShard.pick`. Raises InputError where a shard is damaged."""
        assert 0 <= index < len(self), (index, len(self))
        number = bisect_right(self._starts, index) - 1
        return self.shard(number).pick(index - self._starts[number], generator)

    def shard(self, number: int) -> TokenShard:
        """One of the shards. Raises InputError where it is damaged."""
        if number not in self._opened:
            name, length = self._names[number], self._starts[number + 1] - self._starts[number]
            arrays = {array: _open_array(self._folder / name.format(array)) for array in ARRAYS}
            shard = TokenShard(**arrays)
            if (len(shard), len(shard.text_offsets)) != (length, length + 1):
                path = self._folder / name.format("image_tokens")
                raise InputError("token_shards", path, f"has {len(shard)} pairs, not {length}: remove the shard folder")
            self._opened[number] = shard
        return self._opened[number]

    def __iter__(self) -> Iterator[TokenShard]:
        """The shards one after the other."""
        return (self.shard(number) for number in range(len(self._names)))


def shards_fault(folder: Path, expected: dict[str, Any]) -> str | None:
    """Why the shards in `folder` cannot be used, as the end of a sentence about them; None if they can.

    Args:
        expected: what they must be made from, as `shard_identity` gives it.
    """
    if not (folder / INDEX_FILE).is_file():
        return "are not there"
    try:
        index = _read_index(folder)
    except InputError as error:
        return f"are damaged: {INDEX_FILE} {error.remedy}"
    identity = index.get("identity", {})
    for name, value in expected.items():
        if identity.get(name) != value:
            return f"were made from another {name}" if name in identity else f"do not state their {name}"
    return _damage(folder, index)


def check_shards(folder: Path) -> None:
    """Compares every file with its digest: for a host that reads a copy of its own.

    Raises:
        InputError: other bytes than were written.
    """
    fault = _damage(folder, _read_index(folder))
    if fault is not None:
        raise InputError("token_shards", folder, f"{fault}: copy the folder again, or remove it")


def captions_cut(folder: Path) -> dict[str, int]:
    """Keys of the pairs whose captions did not fit, and how many text tokens were left out."""
    return dict(_read_index(folder)["captions_cut"])


def shard_identity(
    pairs: Pairs, tokenizer: CaptionTokenizer, *, vqgan_digest: str, text_seq_len: int, views: AugmentedViews
) -> dict[str, Any]:
    """Everything that the tokens depend on; compared before they are reused."""
    return {
        "format": SHARD_FORMAT,
        **{name.replace("-", "_").replace(" ", "_"): digest for name, digest in pairs_digests(pairs).items()},
        "vqgan": vqgan_digest,
        "tokenizer": tokenizer.digest,
        "text_seq_len": text_seq_len,
        "views": views.identity,
    }


def open_shards(folder: Path, split: str, *, image_vocab_size: int, text_vocab_size: int | None = None) -> TokenShards:
    """Opens one split and checks that every token fits the model's tables; without a text vocabulary image tokens alone.

    An out-of-range id would end in a device assert, hours later and without a name.

    Raises:
        InputError: files that are missing or have another size than was written, or a token that does not fit.
    """
    index = _read_index(folder)
    lengths = index.get("shards", {}).get(split)
    names = [f"{split}/{{}}.npy"] if lengths is None else [shard_name(split, number) for number in range(len(lengths))]
    for name in names:
        for array in ARRAYS:
            _check_size(folder, name.format(array), index["files"])
    if lengths is None:  # of an older version: one shard, whose largest tokens are not stated
        lengths = [len(_open_array(folder / names[0].format("image_tokens")))]
    shards = TokenShards(folder, names, lengths)
    largest = index["largest"][split] if "largest" in index else _largest(shards)
    for array, size in (("image_tokens", image_vocab_size), ("text_tokens", text_vocab_size)):
        if size is not None and largest[array] >= size:
            raise InputError(f"token_shards {array}", largest[array], f"exceeds the model's vocabulary of {size}")
    return shards


def shard_name(split: str, number: int) -> str:
    """Name of a shard's files under the folder, with `{}` for the array's."""
    return f"{split}/{{}}-{number:05d}.npy"


def _damage(folder: Path, index: dict[str, Any]) -> str | None:
    files = index.get("files", {})
    found = {path.relative_to(folder).as_posix() for path in folder.glob("*/*.npy")}
    for name in sorted(found | files.keys()):
        if name not in found or name not in files or file_digest(folder / name) != FileDigest(**files[name]):
            return f"are damaged: {name} has other bytes than were written"
    return None


def _check_size(folder: Path, name: str, files: dict[str, dict[str, Any]]) -> None:
    path = folder / name
    if not path.is_file():
        raise InputError("token_shards", path, "no such file: remove the shard folder, it will be written again")
    if name in files and path.stat().st_size != files[name]["size_bytes"]:
        raise InputError("token_shards", path, "is damaged (not as long as it was): remove the shard folder")


def _open_array(path: Path) -> np.ndarray:
    try:
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise InputError("token_shards", path, f"is damaged ({error}): remove the shard folder") from error
    return array


def _largest(shards: TokenShards) -> dict[str, int]:
    return {
        array: max((int(getattr(shard, array).max()) for shard in shards if getattr(shard, array).size), default=-1)
        for array in ("image_tokens", "text_tokens")
    }


def _read_index(folder: Path) -> dict[str, Any]:
    return dict(
        read_json(
            folder / INDEX_FILE, field="token_shards", remedy="remove the folder, or run again: it is encoded anew"
        )
    )
