"""Token shards: complete or absent, made again when what they depend on changes."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.data.pairs import Pairs, load_image, load_pairs
from engine.data.token_shards import (
    AugmentedViews,
    captions_cut,
    open_shard,
    shard_identity,
    shards_fault,
    write_shards,
)
from engine.data.tokenizer import CaptionTokenizer, train_tokenizer
from engine.errors import InputError

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


@pytest.fixture
def write(tmp_path: Path, pairs: Pairs, tokenizer: CaptionTokenizer) -> Callable[..., Path]:
    def make(
        some: Pairs = pairs, *, strict: bool = False, text_seq_len: int = T, batch_size: int = 7, **views: int
    ) -> Path:
        some_views = AugmentedViews(**views)  # type: ignore[arg-type]
        identity = shard_identity(some, tokenizer, vqgan_digest="v", text_seq_len=text_seq_len, views=some_views)
        write_shards(
            tmp_path / "shards", some, tokenizer, _encode,
            identity=identity, image_size=32, text_seq_len=text_seq_len, views=some_views, strict=strict,
            batch_size=batch_size,
        )  # fmt: skip
        return tmp_path / "shards"

    return make


def test_shards_hold_what_the_pairs_state(
    write: Callable[..., Path], pairs: Pairs, tokenizer: CaptionTokenizer
) -> None:
    folder = write(flip=True)
    for name, split in (("train", pairs.train), ("validation", pairs.validation)):
        shard = open_shard(folder, name, image_vocab_size=256, text_vocab_size=60)
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
    shard = open_shard(write(flip=True), "train", image_vocab_size=256, text_vocab_size=60)
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
    shard = open_shard(write(flip=flip, count=3, shift=2), "train", image_vocab_size=256, text_vocab_size=60)
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
    assert open_shard(again, "train", image_vocab_size=256, text_vocab_size=60).image_tokens.tobytes() == before
    held_out = open_shard(again, "validation", image_vocab_size=256, text_vocab_size=60)
    assert held_out.image_tokens.shape == (len(pairs.validation), 1, 4)


def test_no_validation_pairs(write: Callable[..., Path], pairs: Pairs) -> None:
    folder = write(Pairs(pairs.train))
    assert len(open_shard(folder, "train", image_vocab_size=256, text_vocab_size=60)) == len(pairs.train)
    with pytest.raises(InputError, match="no such file"):
        open_shard(folder, "validation", image_vocab_size=256, text_vocab_size=60)


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
    path = folder / split / f"{name}.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert shards_fault(folder, identity) == f"are damaged: {split}/{name}.npy has other bytes than were written"
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
        open_shard(write(), "train", image_vocab_size=sizes[0], text_vocab_size=sizes[1])


def test_damaged_array_is_named(write: Callable[..., Path]) -> None:
    folder = write()
    path = folder / "train" / "image_tokens.npy"
    for size in (0, 20, path.stat().st_size - 3):
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(InputError, match=r"image_tokens\.npy: is damaged"):
            open_shard(folder, "train", image_vocab_size=256, text_vocab_size=60)


def test_largest_code_fits_16_bits(tmp_path: Path, pairs: Pairs, tokenizer: CaptionTokenizer) -> None:
    few = Pairs(pairs.train[:2])
    write_shards(
        tmp_path / "s", few, tokenizer, lambda images: torch.full((len(images), 4), 65535),
        identity={}, image_size=32, text_seq_len=T,
    )  # fmt: skip
    assert open_shard(tmp_path / "s", "train", image_vocab_size=65536, text_vocab_size=60).image_tokens.max() == 65535


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
