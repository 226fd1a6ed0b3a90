"""Images and captions as tokens on disk, written once before KoDALLE trains.

Encoding images through the VQGAN at every step would cost 23 % more arithmetic and all the JPEG decoding; the tokens of
an image are 512 bytes. Layout of a shard folder, one sub-folder a split:

    image_tokens.npy   (N, views, S) uint16   view 0 as it is, view 1 (with flip) mirrored, then the augmented ones
    text_tokens.npy    (M, T) int32           all captions of all pairs
    text_offsets.npy   (N + 1,) int64         captions of pair i: text_tokens[offsets[i]:offsets[i + 1]]
    ../shards.json                            digests of the VQGAN, the tokenizer, captions and images; what was cut; size
                                              and SHA-256 of every file

N pairs, S image tokens, T text positions. Held-out images have view 0 alone.

Augmented views are for small sets: an image shifted by half a token's width has other tokens, and a transformer soon
memorises a few thousand images that are always the same.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.data.augment import augment
from engine.data.digests import pairs_digests
from engine.data.pairs import Pair, Pairs, load_image
from engine.data.tokenizer import CaptionTokenizer
from engine.errors import InputError
from engine.files import FileDigest, VerifiedFile, atomic_folder, file_digest, read_json, write_json

SHARD_FORMAT = 2


@dataclass(frozen=True)
class AugmentedViews:
    """Versions of a training image that are encoded.

    Args:
        flip: the mirrored image, too.
        count: augmented views, each shifted at random and, with `flip`, mirrored or not.
        shift: largest shift in pixels.
    """

    flip: bool = False
    count: int = 0
    shift: int = 0


@dataclass(frozen=True)
class TokenShard:
    """One split, memory-mapped."""

    image_tokens: np.ndarray  # (N, views, S) uint16
    text_tokens: np.ndarray  # (M, T) int32
    text_offsets: np.ndarray  # (N + 1,) int64

    def __len__(self) -> int:
        return len(self.image_tokens)

    def pick(self, index: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """One visit of pair `index`: a random caption (T,) and a random view (S,)."""
        first, last = self.text_offsets[index], self.text_offsets[index + 1]
        caption = first if last - first == 1 else generator.integers(first, last)
        views = self.image_tokens.shape[1]
        view = 0 if views == 1 else generator.integers(views)
        return self.text_tokens[caption], self.image_tokens[index, view]


def shards_fault(folder: Path, expected: dict[str, Any]) -> str | None:
    """Why the shards in `folder` cannot be used, as the end of a sentence about them; None if they can.

    Args:
        expected: what they must be made from, as `shard_identity` gives it.
    """
    if not (folder / "shards.json").is_file():
        return "are not there"
    try:
        index = _read_index(folder)
    except InputError as error:
        return f"are damaged: shards.json {error.remedy}"
    identity = index.get("identity", {})
    for name, value in expected.items():
        if identity.get(name) != value:
            return f"were made from another {name}" if name in identity else f"do not state their {name}"
    files = index.get("files", {})
    found = {str(path.relative_to(folder)) for path in folder.glob("*/*.npy")}
    for name in sorted(found | files.keys()):
        if name not in found or name not in files or file_digest(folder / name) != FileDigest(**files[name]):
            return f"are damaged: {name} has other bytes than were written"
    return None


def captions_cut(folder: Path) -> dict[str, int]:
    """Keys of the pairs whose captions did not fit, and how many text tokens were left out."""
    return dict(_read_index(folder)["captions_cut"])


def shard_identity(
    pairs: Pairs, tokenizer: CaptionTokenizer, *, vqgan_digest: str, text_seq_len: int, views: AugmentedViews
) -> dict[str, Any]:
    """Everything that the shards depend on; compared before they are reused."""
    return {
        "format": SHARD_FORMAT,
        **{name.replace("-", "_").replace(" ", "_"): digest for name, digest in pairs_digests(pairs).items()},
        "vqgan": vqgan_digest,
        "tokenizer": tokenizer.digest,
        "text_seq_len": text_seq_len,
        "views": asdict(views),
    }


def write_shards(
    folder: Path,
    pairs: Pairs,
    tokenizer: CaptionTokenizer,
    encode: Callable[[Tensor], Tensor],
    *,
    identity: dict[str, Any],
    image_size: int,
    text_seq_len: int,
    views: AugmentedViews = AugmentedViews(),
    strict: bool = False,
    batch_size: int = 32,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Encodes every pair; the folder appears only when complete.

    Args:
        encode: images (B, 3, H, W) float in [0, 1] to image tokens (B, S).
        strict: refuse captions longer than `text_seq_len` instead of cutting (the number cut goes to shards.json).
        on_progress: called with (pairs done, pairs in all).

    Raises:
        InputError: `folder` holds something else; a caption too long with `strict`; an image that cannot be read.
    """
    taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if taken and not (folder / "shards.json").is_file():
        raise InputError("token_shards", folder, "holds something else than token shards: choose another folder")
    splits: dict[str, Sequence[Pair]] = {"train": pairs.train, "validation": pairs.validation}
    total = sum(len(split) for split in splits.values())
    done = 0
    cut: dict[str, int] = {}
    files: dict[str, dict[str, Any]] = {}
    with atomic_folder(folder, replace=True) as temporary:
        for name, split in splits.items():
            (temporary / name).mkdir()
            text_tokens, offsets, split_cut = _encode_captions(split, tokenizer, text_seq_len, strict=strict)
            cut |= split_cut
            images = []
            for start in range(0, len(split), batch_size):
                batch = np.stack([load_image(pair, image_size) for pair in split[start : start + batch_size]])
                versions = _versions(batch, start, views if name == "train" else AugmentedViews())
                encoded = torch.stack([encode(_to_unit_floats(version)) for version in versions], dim=1)
                images.append(encoded.to(torch.int32).cpu().numpy().astype(np.uint16))
                done += len(batch)
                if on_progress is not None:
                    on_progress(done, total)
            if images:
                arrays = {"image_tokens": np.concatenate(images), "text_tokens": text_tokens, "text_offsets": offsets}
                for array_name, array in arrays.items():
                    with VerifiedFile(temporary / name / f"{array_name}.npy") as file:
                        np.save(file, array)
                    files[f"{name}/{array_name}.npy"] = asdict(file.digest)
        index = {"identity": identity, "pairs": total, "captions_cut": cut, "files": files}
        write_json(temporary / "shards.json", index)


def open_shard(folder: Path, split: str, *, image_vocab_size: int, text_vocab_size: int) -> TokenShard:
    """Memory-maps one split and checks that every token fits the model's tables.

    An out-of-range id would end in a device assert, hours later and without a name.
    """
    arrays = {}
    for name in ("image_tokens", "text_tokens", "text_offsets"):
        path = folder / split / f"{name}.npy"
        if not path.is_file():
            raise InputError("token_shards", path, "no such file: remove the shard folder, it will be written again")
        try:
            arrays[name] = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise InputError("token_shards", path, f"is damaged ({error}): remove the shard folder") from error
    shard = TokenShard(**arrays)
    for name, array, size in (
        ("image_tokens", shard.image_tokens, image_vocab_size),
        ("text_tokens", shard.text_tokens, text_vocab_size),
    ):
        if array.size and int(array.max()) >= size:
            raise InputError(f"token_shards {name}", int(array.max()), f"exceeds the model's vocabulary of {size}")
    return shard


def _read_index(folder: Path) -> dict[str, Any]:
    return dict(
        read_json(
            folder / "shards.json", field="token_shards", remedy="remove the folder, or run again: it is encoded anew"
        )
    )


def _encode_captions(
    split: Sequence[Pair], tokenizer: CaptionTokenizer, text_seq_len: int, *, strict: bool
) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    offsets = np.cumsum([0] + [len(pair.captions) for pair in split], dtype=np.int64)
    captions = [caption for pair in split for caption in pair.captions]
    encoded = tokenizer.encode(captions, text_seq_len, strict=strict)
    keys = [pair.key for pair in split for _ in pair.captions]
    cut: dict[str, int] = {}
    for key, count in zip(keys, encoded.cut, strict=True):
        if count:
            cut[key] = cut.get(key, 0) + count
    return encoded.tokens.numpy().astype(np.int32), offsets, cut


def _versions(images: np.ndarray, start: int, views: AugmentedViews) -> Iterator[np.ndarray]:
    """Each view of images `start`, start + 1, ... of the training split, (B, S, S, 3) uint8; the first as they are."""
    yield images
    if views.flip:
        yield images[:, :, ::-1]
    for view in range(views.count):
        generators = [np.random.Generator(np.random.Philox(key=[start + row, view])) for row in range(len(images))]
        augmented = [
            augment(*each, flip=views.flip, shift=views.shift) for each in zip(images, generators, strict=True)
        ]
        yield np.stack(augmented)


def _to_unit_floats(images: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255.0
