"""Token shards: complete or absent, made again when what they depend on changes."""

import dataclasses
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.data.order import BatchOrder
from engine.data.pairs import Pairs, load_image, load_pairs
from engine.data.token_encoding import Encoding, begin_shards, encode_shards, finish_shards, write_shards
from engine.data.token_shards import (
    AugmentedViews,
    TokenShard,
    TokenShards,
    captions_cut,
    check_shards,
    open_shards,
    shard_identity,
    shards_fault,
)
from engine.data.tokenizer import CaptionTokenizer, train_tokenizer
from engine.errors import InputError
from engine.training.batches import token_source
from engine.training.report.figures import code_use

T = 10


@pytest.fixture(scope="module")
def pairs(pairs_folder: Path) -> Pairs:
    return load_pairs(pairs_folder)


@pytest.fixture(scope="module")
def tokenizer(pairs: Pairs) -> CaptionTokenizer:
    return train_tokenizer([caption for pair in pairs.all for caption in pair.captions], vocab_size=60)


def _encode(images: Tensor) -> Tensor:
    """Stands for a VQGAN: four tokens that encode each quarter's mean red."""
    return torch.nn.functional.adaptive_avg_pool2d(images[:, :1], 2).flatten(1).mul(255).long()


def _open(folder: Path, split: str = "train") -> TokenShards:
    return open_shards(folder, split, image_vocab_size=256, text_vocab_size=60)


def _whole(folder: Path, split: str = "train") -> TokenShard:
    """All shards of a split as one."""
    shards = list(_open(folder, split))
    lengths = np.concatenate([np.diff(shard.text_offsets) for shard in shards])
    return TokenShard(
        np.concatenate([shard.image_tokens for shard in shards]),
        np.concatenate([shard.text_tokens for shard in shards]),
        np.concatenate([[0], np.cumsum(lengths)]),
    )


@pytest.fixture
def encoding(pairs: Pairs, tokenizer: CaptionTokenizer) -> Callable[..., Encoding]:
    def make(some: Pairs = pairs, *, text_seq_len: int = T, **options: Any) -> Encoding:
        views = options.pop("views", AugmentedViews())
        identity = shard_identity(some, tokenizer, vqgan_digest="v", text_seq_len=text_seq_len, views=views)
        settings = {
            "encode": _encode,
            "identity": identity,
            "image_size": 32,
            "batch_size": 7,
            "views": views,
        } | options
        return Encoding(some, tokenizer, text_seq_len=text_seq_len, **settings)

    return make


@pytest.fixture
def write(tmp_path: Path, encoding: Callable[..., Encoding]) -> Callable[..., Path]:
    def make(some: Pairs | None = None, **options: Any) -> Path:
        views = AugmentedViews(**{name: options.pop(name) for name in ("flip", "count", "shift") if name in options})
        made = encoding(views=views, **options) if some is None else encoding(some, views=views, **options)
        write_shards(tmp_path / "shards", made)
        return tmp_path / "shards"

    return make


def test_shards_hold_what_the_pairs_state(
    write: Callable[..., Path], pairs: Pairs, tokenizer: CaptionTokenizer
) -> None:
    folder = write(flip=True)
    for name, split in (("train", pairs.train), ("validation", pairs.validation)):
        shard = _whole(folder, name)
        assert len(shard) == len(split)
        assert shard.image_tokens.shape == (len(split), 2 if name == "train" else 1, 4)
        for index, pair in enumerate(split):
            image = torch.from_numpy(load_image(pair, 32)).permute(2, 0, 1)[None].float() / 255
            assert np.array_equal(shard.image_tokens[index, 0], _encode(image)[0])
            if name == "train":
                assert np.array_equal(shard.image_tokens[index, 1], _encode(image.flip(-1))[0])
            own = shard.text_tokens[shard.text_offsets[index] : shard.text_offsets[index + 1]]
            assert np.array_equal(own, tokenizer.encode(pair.captions, T).tokens)


def test_pick_samples_all_captions_and_views(write: Callable[..., Path]) -> None:
    shard = _whole(write(flip=True))
    seen = set()
    for number in range(60):
        text, image = shard.pick(0, np.random.default_rng(number))
        seen.add((text.tobytes(), image.tobytes()))
    captions = int(shard.text_offsets[1])
    views = len({view.tobytes() for view in shard.image_tokens[0]})
    assert captions == 2
    assert len(seen) == captions * views


@pytest.mark.parametrize("flip", [False, True])
def test_augmented_views_are_shifted_images(write: Callable[..., Path], pairs: Pairs, flip: bool) -> None:
    """Each is what some translation (and mirror image) encodes to, they differ, and batch borders change none."""
    shard = _whole(write(flip=flip, count=3, shift=2))
    plain = 2 if flip else 1
    assert shard.image_tokens.shape == (len(pairs.train), plain + 3, 4)
    for index, pair in enumerate(pairs.train):
        image = load_image(pair, 32)
        possible = set()
        for version in [image, image[:, ::-1]] if flip else [image]:
            padded = np.pad(version, ((2, 2), (2, 2), (0, 0)), mode="edge")
            shifted = np.stack([padded[y : y + 32, x : x + 32] for y in range(5) for x in range(5)])
            possible |= {
                tuple(tokens)
                for tokens in _encode(torch.from_numpy(shifted).permute(0, 3, 1, 2).float() / 255).tolist()
            }
        found = {tuple(view.tolist()) for view in shard.image_tokens[index, plain:]}
        assert found <= possible
    # these images are their own mirror images
    assert len({shard.image_tokens[:, view].tobytes() for view in (0, *range(plain, plain + 3))}) == 4
    before = shard.image_tokens.tobytes()
    again = write(flip=flip, count=3, shift=2, batch_size=4)
    assert _whole(again).image_tokens.tobytes() == before
    held_out = _whole(again, "validation")
    assert held_out.image_tokens.shape == (len(pairs.validation), 1, 4)


def test_no_validation_pairs(write: Callable[..., Path], pairs: Pairs) -> None:
    folder = write(Pairs(pairs.train))
    assert len(_open(folder)) == len(pairs.train)
    with pytest.raises(InputError, match="no such file"):
        _open(folder, "validation")


def test_identity_covers_what_the_shards_depend_on(
    write: Callable[..., Path], pairs: Pairs, tokenizer: CaptionTokenizer, tmp_path: Path
) -> None:
    def identity(
        some: Pairs = pairs, words: CaptionTokenizer = tokenizer, **more: str | int | bool
    ) -> dict[str, object]:
        views = {name: more.pop(name) for name in ("flip", "count", "shift") if name in more}
        settings = {"vqgan_digest": "v", "text_seq_len": T, "views": AugmentedViews(**views)} | more  # type: ignore[arg-type]
        return shard_identity(some, words, **settings)  # type: ignore[arg-type]

    folder = write()
    assert shards_fault(folder, identity()) is None
    first, *rest = pairs.all
    shifted = replace(first, captions=("다른 말",))
    other_words = train_tokenizer(["다른 말"], vocab_size=60)
    for changed, name in (
        (identity(vqgan_digest="w"), "vqgan"),
        (identity(text_seq_len=T + 1), "text_seq_len"),
        (identity(flip=True), "views"),
        (identity(count=1, shift=2), "views"),
        (identity(words=other_words), "tokenizer"),
        (identity(Pairs((shifted, *rest))), "training_captions"),
        (identity(Pairs(tuple(rest))), "training_captions"),
        (identity(Pairs((replace(first, split="validation"), *rest))), "training_captions"),
    ):
        assert shards_fault(folder, changed) == f"were made from another {name}"
    assert shards_fault(tmp_path / "none", identity()) == "are not there"
    (folder / "shards.json").write_text("{}")
    assert shards_fault(folder, identity()) == "do not state their format"


def test_two_images_of_equal_size_swapped(
    write: Callable[..., Path], pairs: Pairs, tokenizer: CaptionTokenizer, tmp_path: Path
) -> None:
    """Sizes and times of files say nothing about their content."""
    one, other = pairs.train[0], pairs.train[1]
    paths = []
    for pair in (one, other):
        paths.append(tmp_path / f"{pair.key}.png")
        paths[-1].write_bytes(pair.image_path.read_bytes().ljust(1000, b"\0"))

    def identity(first: Path, second: Path) -> dict[str, object]:
        some = Pairs((replace(one, image_path=first), replace(other, image_path=second), *pairs.all[2:]))
        views = AugmentedViews()
        return shard_identity(some, tokenizer, vqgan_digest="v", text_seq_len=T, views=views)

    assert paths[0].stat().st_size == paths[1].stat().st_size
    before, after = identity(*paths), identity(*paths[::-1])
    assert {name for name in before if before[name] != after[name]} == {"training_images"}
    moved = paths[0].rename(tmp_path / "elsewhere.png")  # where they lie does not matter
    assert identity(moved, paths[1]) == before


@pytest.mark.parametrize("name", ["image_tokens", "text_tokens", "text_offsets"])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_flipped_bit_is_seen(write: Callable[..., Path], name: str, split: str) -> None:
    folder = write()
    identity = json.loads((folder / "shards.json").read_text(encoding="utf-8"))["identity"]
    assert shards_fault(folder, identity) is None
    path = folder / split / f"{name}-00000.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert shards_fault(folder, identity) == f"are damaged: {split}/{name}-00000.npy has other bytes than were written"
    path.unlink()
    assert shards_fault(folder, identity) is not None


def test_cut_captions_are_counted_by_name_or_refused(write: Callable[..., Path], pairs: Pairs) -> None:
    assert captions_cut(write()) == {}
    cut = captions_cut(write(text_seq_len=4))
    assert set(cut) == {pair.key for pair in pairs.all}
    assert min(cut.values()) >= 1
    folder = write(text_seq_len=4)
    before = (folder / "shards.json").read_bytes()
    with pytest.raises(InputError, match=r"caption: .* is \d+ tokens, \d+ more than the model's 4"):
        write(text_seq_len=4, strict=True)
    assert (folder / "shards.json").read_bytes() == before  # the old ones stay until new ones are whole


@pytest.mark.parametrize(("name", "sizes"), [("image_tokens", (10, 60)), ("text_tokens", (256, 5))])
def test_tokens_outside_the_models_tables(write: Callable[..., Path], name: str, sizes: tuple[int, int]) -> None:
    with pytest.raises(InputError, match=rf"token_shards {name}: \d+: exceeds the model's vocabulary"):
        open_shards(write(), "train", image_vocab_size=sizes[0], text_vocab_size=sizes[1])


def test_damaged_array_is_named(write: Callable[..., Path]) -> None:
    folder = write()
    path = folder / "train" / "image_tokens-00000.npy"
    for size in (0, 20, path.stat().st_size - 3):
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(InputError, match=r"image_tokens-00000\.npy: is damaged"):
            _open(folder)


def test_largest_code_fits_16_bits(tmp_path: Path, pairs: Pairs, encoding: Callable[..., Encoding]) -> None:
    few, most = Pairs(pairs.train[:2]), 65535
    write_shards(tmp_path / "s", encoding(few, encode=lambda images: torch.full((len(images), 4), most)))
    (shard,) = open_shards(tmp_path / "s", "train", image_vocab_size=65536, text_vocab_size=60)
    assert shard.image_tokens.max() == most


def test_another_folder_is_never_overwritten(tmp_path: Path, write: Callable[..., Path]) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="holds something else than token shards"):
        write()
    assert (tmp_path / "shards" / "thesis.txt").read_text() == "precious"


def test_index_is_readable(write: Callable[..., Path]) -> None:
    index = json.loads((write() / "shards.json").read_text(encoding="utf-8"))
    assert index["pairs"] == 30
    assert index["identity"]["format"] == 2


# ------------------------------------------------------------------------------------------------------ several shards


def _same(one: TokenShard, other: TokenShard) -> bool:
    return all(np.array_equal(getattr(one, array), getattr(other, array)) for array in one.__dataclass_fields__)


@pytest.mark.parametrize("views", [{}, {"flip": True, "count": 2, "shift": 2}])
def test_several_shards_hold_what_one_holds(write: Callable[..., Path], views: dict[str, int]) -> None:
    one = {split: _whole(write(**views), split) for split in ("train", "validation")}
    folder = write(shard_pairs=7, **views)
    assert len(list((folder / "train").glob("image_tokens-*.npy"))) == 4
    for split, shard in one.items():
        assert _same(_whole(folder, split), shard)
        shards, generators = _open(folder, split), [np.random.default_rng(3) for _ in range(2)]
        for index in range(len(shard)):
            for array, expected in zip(
                shards.pick(index, generators[0]), shard.pick(index, generators[1]), strict=True
            ):
                assert np.array_equal(array, expected)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_see_the_batches_of_one_process(write: Callable[..., Path], world_size: int) -> None:
    """Each its own pairs, in the order of the single file, and none opens a shard that it needs nothing of."""
    one = _whole(write())
    folder = write(shard_pairs=7)
    batch, steps = 6 // world_size, 3
    empty = torch.zeros(1, T, dtype=torch.int64)

    def batches(shards: TokenShard | TokenShards, rank: int, world_size: int) -> list[Tensor]:
        order = BatchOrder(len(one), 6 // world_size, seed=5, rank=rank, world_size=world_size)
        source = token_source(shards, order, empty=empty)
        return [torch.cat(list(source(step).values()), dim=1) for step in range(steps)]

    expected = batches(one, 0, 1)
    ranks = [_open(folder) for _ in range(world_size)]
    found = [batches(shards, rank, world_size) for rank, shards in enumerate(ranks)]
    for step in range(steps):
        assert torch.equal(torch.cat([own[step] for own in found]), expected[step])
    for rank, shards in enumerate(ranks):
        order = BatchOrder(len(one), batch, seed=5, rank=rank, world_size=world_size)
        wanted = {order.index(position) // 7 for step in range(steps) for position in order.positions(step)}
        assert shards.opened == sorted(wanted)


def test_a_shard_that_is_not_wanted_is_not_read(write: Callable[..., Path]) -> None:
    folder = write(shard_pairs=7)
    shards = _open(folder)
    for path in folder.glob("train/*-00002.npy"):
        path.write_bytes(b"")
    assert shards.pick(0, np.random.default_rng(0))[0].shape == (T,)
    with pytest.raises(InputError, match=r"-00002\.npy: is damaged"):
        shards.pick(15, np.random.default_rng(0))
    with pytest.raises(InputError, match=r"-00002\.npy has other bytes"):
        check_shards(folder)


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_several_processes_encode_what_one_does(
    tmp_path: Path, encoding: Callable[..., Encoding], world_size: int
) -> None:
    made = encoding(shard_pairs=7)
    write_shards(tmp_path / "one", made)
    begin_shards(tmp_path / "several", made)
    for rank in range(world_size):
        encode_shards(tmp_path / "several", made, rank=rank, world_size=world_size)
    finish_shards(tmp_path / "several", made)
    assert _files(tmp_path / "several") == _files(tmp_path / "one")


def test_processes_that_do_not_share_a_disk(tmp_path: Path, encoding: Callable[..., Encoding]) -> None:
    made = encoding(shard_pairs=7)
    begin_shards(tmp_path / "s", made)
    encode_shards(tmp_path / "s", made, rank=0, world_size=2)
    with pytest.raises(InputError, match="on a disk that all hosts share"):
        finish_shards(tmp_path / "s", made)


def _files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class _Stopping:
    """An encoder that is stopped at one of its batches."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at, self.done = stop_at, 0

    def __call__(self, images: Tensor) -> Tensor:
        if self.done == self.stop_at:
            raise KeyboardInterrupt
        self.done += 1
        return _encode(images)


@pytest.mark.parametrize("stop_at", [0, 1, 3, 4])
def test_a_stopped_encoding_goes_on(tmp_path: Path, encoding: Callable[..., Encoding], stop_at: int) -> None:
    """No batch is encoded twice, and the bytes are those of an encoding that was not stopped."""
    every, stopping, rest = _Stopping(), _Stopping(stop_at), _Stopping()
    write_shards(tmp_path / "whole", encoding(encode=every, shard_pairs=14))
    with pytest.raises(KeyboardInterrupt):
        write_shards(tmp_path / "s", encoding(encode=stopping, shard_pairs=14))
    assert not (tmp_path / "s").exists()
    write_shards(tmp_path / "s", encoding(encode=rest, shard_pairs=14))
    assert stopping.done + rest.done == every.done
    assert _files(tmp_path / "s") == _files(tmp_path / "whole")
    assert not (tmp_path / ".encoding-s").exists()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: content[:-3],
        lambda content: content[:-30] + bytes(30),
        lambda content: bytes(len(content)),
        lambda content: content + b"\0" * 11,
        lambda content: content[:60] + bytes([content[60] ^ 1]) + content[61:],
    ],
)
@pytest.mark.parametrize(
    "name",
    [
        "image_tokens-00001.partial",
        "image_tokens-00000.npy",
        "text_tokens-00000.npy",
        "shard-00000.json",
        "../identity.json",
    ],
)
def test_damaged_work_is_encoded_again(
    tmp_path: Path, encoding: Callable[..., Encoding], spoil: Callable[[bytes], bytes], name: str
) -> None:
    write_shards(tmp_path / "whole", encoding(shard_pairs=14))
    with pytest.raises(KeyboardInterrupt):
        write_shards(tmp_path / "s", encoding(encode=_Stopping(3), shard_pairs=14))
    file = tmp_path / ".encoding-s" / "train" / name
    file.write_bytes(spoil(file.read_bytes()))
    write_shards(tmp_path / "s", encoding(shard_pairs=14))
    assert _files(tmp_path / "s") == _files(tmp_path / "whole")


def test_other_inputs_start_anew(tmp_path: Path, encoding: Callable[..., Encoding]) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_shards(tmp_path / "s", encoding(encode=_Stopping(3), shard_pairs=14))
    other = encoding(text_seq_len=T + 1, shard_pairs=14)
    write_shards(tmp_path / "s", other)
    write_shards(tmp_path / "whole", other)
    assert _files(tmp_path / "s") == _files(tmp_path / "whole")


def test_a_folder_of_the_version_before_is_still_read(
    write: Callable[..., Path], pairs: Pairs, tokenizer: CaptionTokenizer
) -> None:
    """One file a split, without a number and without the largest tokens; a million images need not be encoded again."""
    folder = write()
    expected = {split: _whole(folder, split) for split in ("train", "validation")}
    index = json.loads((folder / "shards.json").read_text(encoding="utf-8"))
    for path in list(folder.glob("*/*.npy")):
        path.rename(path.with_name(path.name.replace("-00000", "")))
    files = {name.replace("-00000", ""): digest for name, digest in index["files"].items()}
    before = {name: index[name] for name in ("identity", "pairs", "captions_cut")} | {"files": files}
    (folder / "shards.json").write_text(json.dumps(before), encoding="utf-8")
    views = AugmentedViews()
    identity = shard_identity(pairs, tokenizer, vqgan_digest="v", text_seq_len=T, views=views)
    assert shards_fault(folder, identity) is None
    for split, shard in expected.items():
        assert _same(_whole(folder, split), shard)
    with pytest.raises(InputError, match="exceeds the model's vocabulary of 10"):
        open_shards(folder, "train", image_vocab_size=10, text_vocab_size=60)


def test_the_number_of_shards_is_bounded(pairs: Pairs, encoding: Callable[..., Encoding]) -> None:
    """A shard has whole batches, about 16,384 images of one view, and a split no more than 256 shards."""
    made = encoding(batch_size=32)
    for count, views, expected in ((10, 1, 16_384), (10**6, 1, 16_384), (10**6, 15, 3_936), (10**7, 1, 39_072)):
        size = made._shard_pairs(count, views)
        assert size == expected
        assert size % 32 == 0
        assert -(-count // size) <= 256


def test_the_report_counts_the_codes_of_all_shards(write: Callable[..., Path]) -> None:
    one = code_use(write(), 256)
    assert code_use(write(shard_pairs=7), 256) == one
    assert one.used > 1


@pytest.mark.parametrize("is_stopped", [False, True])
def test_a_mount_point_stays(
    tmp_path: Path, encoding: Callable[..., Encoding], monkeypatch: pytest.MonkeyPatch, is_stopped: bool
) -> None:
    """It cannot be renamed: what was encoded for hours would be stuck beside it."""
    write_shards(tmp_path / "whole", encoding(shard_pairs=14))
    disk = tmp_path / "disk"
    (disk / "lost+found").mkdir(parents=True)
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == disk)
    for made in (encoding(text_seq_len=T + 1), encoding(shard_pairs=14)):
        if is_stopped:
            with pytest.raises(KeyboardInterrupt):
                write_shards(disk, dataclasses.replace(made, encode=_Stopping(3)))
        before = disk.stat().st_ino
        write_shards(disk, made)
        assert disk.stat().st_ino == before
    assert _files(disk) == _files(tmp_path / "whole")
    assert {path.name for path in disk.iterdir()} == {"lost+found", "shards.json", "train", "validation"}
