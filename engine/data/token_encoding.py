"""Encoding of a data set into token shards, by one or more processes; a stopped one goes on where it was.

The work lies in `.encoding-<name>` beside the shard folder, or inside it where that is a mount point. Process r of R encodes
the shards r, r + R, …; each batch of image tokens is appended to `image_tokens-<p>.partial` with a digest before it, and the
whole shard's file is written from these at its end, then its record, with a digest of its own. What is damaged is encoded anew.
Batches are the same ones whichever process encodes them and wherever it was stopped, and so are the bytes. The first process
then puts the shards together: the folder appears only when complete, and an older one stays until then.
"""

import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from engine.data.augment import augment
from engine.data.near_central_crop import NearCentralCrop, load_photo, near_central_crop
from engine.data.pairs import Pair, Pairs, load_image
from engine.data.token_shards import ARRAYS, INDEX_FILE, AugmentedViews, shard_name
from engine.data.tokenizer import CaptionTokenizer
from engine.errors import InputError
from engine.files import FileDigest, VerifiedFile, file_digest, replace_folder, write_json

SHARD_PAIRS = 16_384  # of one view: 8 MB of tokens
MOST_SHARDS = 256  # a split; each has three files open
_DIGEST_BYTES = 16
_READERS = 4  # threads
_SPLITS = ("train", "validation")


@dataclass(frozen=True)
class Encoding:
    """What is encoded, and how.

    Args:
        encode: images (B, 3, H, W) float in [0, 1] to image tokens (B, S).
        identity: of the shards, as `shard_identity` gives it.
        strict: refuse captions longer than `text_seq_len` instead of cutting (the number cut goes to shards.json).
        shard_pairs: pairs of a shard; default: as many as `SHARD_PAIRS` and `MOST_SHARDS` say.
    """

    pairs: Pairs
    tokenizer: CaptionTokenizer
    encode: Callable[[Tensor], Tensor]
    identity: dict[str, Any]
    image_size: int
    text_seq_len: int
    views: AugmentedViews = field(default_factory=AugmentedViews)
    strict: bool = False
    batch_size: int = 32
    shard_pairs: int | None = None

    def shards(self) -> list["_Shard"]:
        """The shards of both splits, in order."""
        found = []
        for split, pairs in (("train", self.pairs.train), ("validation", self.pairs.validation)):
            views = self.views if split == "train" else AugmentedViews(crop=self.views.crop)
            size = self._shard_pairs(len(pairs), 1 + views.flip + views.count)
            found += [
                _Shard(split, number, start, pairs[start : start + size], views)
                for number, start in enumerate(range(0, len(pairs), size))
            ]
        return found

    def num_images(self, rank: int, world_size: int) -> int:
        """Images that one of several processes encodes."""
        return sum(len(shard.pairs) for shard in self.shards()[rank::world_size])

    def _shard_pairs(self, pairs: int, views: int) -> int:
        size = self.shard_pairs or max(SHARD_PAIRS // views, -(-pairs // MOST_SHARDS))
        return -(-size // self.batch_size) * self.batch_size  # whole batches: cutting changes none of them


@dataclass(frozen=True)
class _Shard:
    split: str
    number: int
    start: int  # of its first pair in the split
    pairs: Sequence[Pair]
    views: AugmentedViews

    def path(self, work: Path, array: str) -> Path:
        return work / shard_name(self.split, self.number).format(array)

    @property
    def record(self) -> str:
        return f"{self.split}/shard-{self.number:05d}.json"


def write_shards(folder: Path, encoding: Encoding, *, on_progress: Callable[[int, int], None] | None = None) -> None:
    """Encodes every pair in this process; see `encode_shards` and `finish_shards`."""
    begin_shards(folder, encoding)
    encode_shards(folder, encoding, on_progress=on_progress)
    finish_shards(folder, encoding)


def begin_shards(folder: Path, encoding: Encoding) -> None:
    """Makes room for the work, or keeps what an earlier process has encoded of the same; by one process, before the others.

    Raises:
        InputError: `folder` holds something else.
    """
    work = _work_folder(folder)
    held = {path.name for path in folder.iterdir()} - {work.name, "lost+found"} if folder.is_dir() else set()
    is_half_moved = work.parent == folder and work.is_dir() and held <= set(_SPLITS)
    is_taken = (folder.exists() and not folder.is_dir()) or (
        bool(held) and INDEX_FILE not in held and not is_half_moved
    )
    if is_taken:
        raise InputError("token_shards", folder, "holds something else than token shards: choose another folder")
    # batches decide the bits of tokens where a codec's arithmetic depends on them
    identity = {
        **encoding.identity,
        "batch_size": encoding.batch_size,
        "shards": [len(s.pairs) for s in encoding.shards()],
    }
    file = work / "identity.json"
    if _json_of(file) != identity:
        shutil.rmtree(work, ignore_errors=True)
        for split in _SPLITS:
            (work / split).mkdir(parents=True)
        write_json(file, identity)


def encode_shards(
    folder: Path,
    encoding: Encoding,
    *,
    rank: int = 0,
    world_size: int = 1,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Encodes this process's shards, except what is encoded already.

    Args:
        folder: of all shards, which the processes share.
        on_progress: called with (pairs done, pairs in all) of this process.

    Raises:
        InputError: a caption too long with `strict`; an image that cannot be read.
    """
    work = _work_folder(folder)
    own = encoding.shards()[rank::world_size]
    total = sum(len(shard.pairs) for shard in own)
    done = 0
    unfinished = []
    for shard in own:
        if _is_whole(work, shard):
            done += len(shard.pairs)
        else:  # all captions first: a strict one is refused before hours of encoding
            unfinished.append((shard, _write_captions(work, shard, encoding)))
    for shard, record in unfinished:
        for count in _write_images(work, shard, encoding, record):
            done += count
            if on_progress is not None:
                on_progress(done, total)


def finish_shards(folder: Path, encoding: Encoding) -> None:
    """Puts the shards of all processes together; by one process, after all have encoded theirs.

    Raises:
        InputError: a shard is missing: the processes do not see the same folder.
    """
    work = _work_folder(folder)
    index: dict[str, Any] = {
        "identity": encoding.identity, "pairs": len(encoding.pairs), "captions_cut": {}, "shards": {}, "largest": {},
        "files": {},
    }  # fmt: skip
    for shard in encoding.shards():
        if not _is_whole(work, shard):
            remedy = "is not whole: put token_shards on a disk that all hosts share, and run again"
            raise InputError("token_shards", work / shard.record, remedy)
        record = _read_record(work, shard) or {}
        index["files"] |= record["files"]
        index["captions_cut"] |= record["cut"]
        index["shards"].setdefault(shard.split, []).append(len(shard.pairs))
        largest = index["largest"].setdefault(shard.split, record["largest"])
        index["largest"][shard.split] = {name: max(size, record["largest"][name]) for name, size in largest.items()}
    for path in (*work.glob("*/*.json"), *work.glob("*/*.partial")):
        path.unlink()
    write_json(work / INDEX_FILE, index)
    if work.parent != folder:
        (work / "identity.json").unlink()
        replace_folder(work, folder)
        return
    (folder / INDEX_FILE).unlink(missing_ok=True)  # without it older shards count as none
    for name in (*_SPLITS, INDEX_FILE):
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
        (work / name).replace(folder / name)
    shutil.rmtree(work)


def _work_folder(folder: Path) -> Path:
    return folder / ".encoding" if os.path.ismount(folder) else folder.with_name(f".encoding-{folder.name}")


def _is_whole(work: Path, shard: _Shard) -> bool:
    record = _read_record(work, shard)
    if record is None:
        return False
    files = record["files"]
    return all((work / name).is_file() and file_digest(work / name) == FileDigest(**files[name]) for name in files)


def _read_record(work: Path, shard: _Shard) -> dict[str, Any] | None:
    """The record of a shard; None where there is none, or where it is not as it was written: the shard is then encoded anew."""
    found = _json_of(work / shard.record)
    if not isinstance(found, dict) or found.get("digest") != _digest_of_record(found.get("record")):
        return None
    return dict(found["record"])


def _write_record(work: Path, shard: _Shard, record: dict[str, Any]) -> None:
    write_json(work / shard.record, {"record": record, "digest": _digest_of_record(record)})


def _digest_of_record(record: object) -> str:
    return _digest(json.dumps(record, sort_keys=True).encode()).hex()


def _json_of(file: Path) -> Any:
    """The content of a file of the work; None where it is missing or damaged."""
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def _write_captions(work: Path, shard: _Shard, encoding: Encoding) -> dict[str, Any]:
    """Writes the captions of a shard; returns its record, which lacks the images."""
    offsets = np.cumsum([0] + [len(pair.captions) for pair in shard.pairs], dtype=np.int64)
    captions = [caption for pair in shard.pairs for caption in pair.captions]
    encoded = encoding.tokenizer.encode(captions, encoding.text_seq_len, strict=encoding.strict)
    keys = [pair.key for pair in shard.pairs for _ in pair.captions]
    cut: dict[str, int] = {}
    for key, count in zip(keys, encoded.cut, strict=True):
        if count:
            cut[key] = cut.get(key, 0) + count
    record: dict[str, Any] = {"files": {}, "cut": cut, "largest": {}}
    _save(work, shard, "text_tokens", encoded.tokens.numpy().astype(np.int32), record)
    _save(work, shard, "text_offsets", offsets, record)
    return record


def _write_images(work: Path, shard: _Shard, encoding: Encoding, record: dict[str, Any]) -> Iterator[int]:
    """Encodes the images of a shard behind those that are there; yields the number of each batch, read or encoded."""
    starts = range(0, len(shard.pairs), encoding.batch_size)
    partial = shard.path(work, "image_tokens").with_suffix(".partial")
    partial.touch()
    batches: list[np.ndarray] = []
    with partial.open("r+b") as file:
        for content in _whole_batches(file):
            batches.append(content)
            yield len(content)
        for start, batch in _loaded(shard, starts[len(batches) :], encoding):
            versions = _versions(batch, shard.start + start, shard.views)
            encoded = torch.stack([encoding.encode(_to_unit_floats(version)) for version in versions], dim=1)
            tokens = encoded.to(torch.int32).cpu().numpy().astype(np.uint16)  # (B, views, S)
            file.write(_as_record(tokens))
            file.flush()
            batches.append(tokens)
            yield len(tokens)
    _save(work, shard, "image_tokens", np.concatenate(batches), record)
    _write_record(work, shard, record)
    partial.unlink()


def _loaded(shard: _Shard, starts: Sequence[int], encoding: Encoding) -> Iterator[tuple[int, np.ndarray]]:
    """Batches of images (B, S, S, 3) with their places, each read while the one before it is encoded.

    Where images are cropped, (B, views, S, S, 3): photographs are not kept as large as they are stored.
    """
    crop = near_central_crop(shard.views.crop, encoding.image_size)

    def read(place: int) -> np.ndarray:
        pair = shard.pairs[place]
        if crop is None:
            return load_image(pair, encoding.image_size)
        return np.stack([*_views(load_photo(pair), shard.start + place, shard.views, crop)])

    with ThreadPoolExecutor(_READERS) as pool:  # decoding leaves Python's lock

        def submit(start: int) -> list[Future[np.ndarray]]:
            places = range(start, min(start + encoding.batch_size, len(shard.pairs)))
            return [pool.submit(read, place) for place in places]

        waiting = deque((start, submit(start)) for start in starts[:1])
        for following in [*starts[1:], None]:
            if following is not None:
                waiting.append((following, submit(following)))
            if waiting:
                start, images = waiting.popleft()
                yield start, np.stack([image.result() for image in images])


def _as_record(tokens: np.ndarray) -> bytes:
    content = np.array(tokens.shape, dtype=np.int64).tobytes() + tokens.tobytes()
    return len(content).to_bytes(8, "little") + _digest(content) + content


def _whole_batches(file: BinaryIO) -> Iterator[np.ndarray]:
    """The batches of a file of records up to the first that is not whole, and cuts the file there."""
    end = 0
    while True:
        head = file.read(8 + _DIGEST_BYTES)
        length = int.from_bytes(head[:8], "little")
        content = file.read(length) if len(head) == 8 + _DIGEST_BYTES and 24 < length < 2**40 else b""
        if not content or _digest(content) != head[8:]:
            break
        shape = np.frombuffer(content[:24], dtype=np.int64)
        end = file.tell()
        yield np.frombuffer(content[24:], dtype=np.uint16).reshape(shape)
    file.truncate(end)
    file.seek(end)


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_DIGEST_BYTES).digest()


def _save(work: Path, shard: _Shard, array_name: str, array: np.ndarray, record: dict[str, Any]) -> None:
    assert array_name in ARRAYS, array_name
    path = shard.path(work, array_name)
    with VerifiedFile(path) as file:
        np.save(file, array)
    record["files"][path.relative_to(work).as_posix()] = asdict(file.digest)
    if array_name != "text_offsets":
        record["largest"][array_name] = int(array.max()) if array.size else -1


def _versions(batch: np.ndarray, start: int, views: AugmentedViews) -> Iterator[np.ndarray]:
    """Each view of images `start`, start + 1, ... of a split, (B, S, S, 3) uint8; of `batch` as `_loaded` gives it."""
    if views.crop is not None:
        yield from batch.swapaxes(0, 1)
        return
    by_image = [_views(image, start + row, views, None) for row, image in enumerate(batch)]
    for version in zip(*by_image, strict=True):
        yield np.stack(version)


def _views(image: np.ndarray, place: int, views: AugmentedViews, crop: NearCentralCrop | None) -> Iterator[np.ndarray]:
    """The views of the image at a place of its split, (S, S, 3) uint8 each: as it is, mirrored, then by chance."""
    plain = image if crop is None else crop.central(image)
    yield plain
    if views.flip:
        yield plain[:, ::-1]
    for view in range(views.count):
        generator = np.random.Generator(np.random.Philox(key=[place, view]))
        cropped = image if crop is None else crop.random(image, generator)
        yield augment(cropped, generator, flip=views.flip, shift=views.shift)


def _to_unit_floats(images: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255.0
