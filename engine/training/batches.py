"""Training batches as a function of their number: any worker can make any of them, and a resumed run goes on mid-way.

B images a micro batch and rank, S pixels, T text positions, N image tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from engine.config.run import DataConfig
from engine.data.augment import augment
from engine.data.bpe import BpeDropout
from engine.data.caption_fit import CaptionFit
from engine.data.near_central_crop import NearCentralCrop, load_photo, near_central_crop, without_uncropped
from engine.data.order import BatchOrder
from engine.data.pairs import Pair, Pairs, balance_weights, load_image, load_pairs
from engine.data.token_shards import TokenShard, TokenShards
from engine.data.tokenizer import CaptionTokenizer
from engine.data.wrong_captions import WrongCaptions
from engine.errors import InputError
from engine.training.process_group import World

Batch = dict[str, Tensor]
BatchSource = Callable[[int], Batch]


def read_pairs(data: DataConfig, seed: int) -> Pairs:
    """Training and validation pairs of a config's data section."""
    return load_pairs(data.pairs, validation_fraction=data.validation_fraction, seed=seed)


def read_croppable(data: DataConfig, seed: int, *, image_size: int, world: World) -> Pairs:
    """`read_pairs` without the images that `data.crop` cannot crop to `image_size`; a line says how many these are."""
    return without_uncropped(read_pairs(data, seed), near_central_crop(data.crop, image_size), note=world.note)


def training_order(pairs: Sequence[Pair], data: DataConfig, batch_size: int, *, seed: int, world: World) -> BatchOrder:
    """Order over the training split, resampled when `data.balance` names an attribute."""
    weights = None if data.balance is None else balance_weights(pairs, data.balance)
    return BatchOrder(len(pairs), batch_size, seed=seed, rank=world.rank, world_size=world.size, weights=weights)


def validation_order(num_pairs: int, batch_size: int, *, seed: int, world: World) -> BatchOrder:
    """A fixed shuffle: the same images at every validation, in batches no larger than the split."""
    return BatchOrder(num_pairs, min(batch_size, num_pairs), seed=seed + 1, rank=world.rank, world_size=world.size)


class Images:
    """Decoded images of a split.

    Args:
        cache: keep them in memory as uint8; with `crop` as large as they are stored.
        crop: None: images of another shape are stretched.
        held_out: crop without chance.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        image_size: int,
        *,
        cache: bool,
        crop: NearCentralCrop | None = None,
        held_out: bool = False,
    ) -> None:
        self._pairs = pairs
        self._image_size = image_size
        self._crop = crop
        self._held_out = held_out
        self._cache: Sequence[np.ndarray] | np.ndarray | None = None
        if cache and pairs:
            images = [self._read(pair) for pair in pairs]
            self._cache = np.stack(images) if crop is None else images  # (N, S, S, 3), or N of any shape

    def __getitem__(self, index: int) -> np.ndarray:
        """(S, S, 3) uint8, always the same."""
        image = self._stored(index)
        return image if self._crop is None else self._crop.central(image)

    def random(self, index: int, generator: np.random.Generator) -> np.ndarray:
        """(S, S, 3) uint8 of one visit: cropped at random where images are cropped."""
        if self._crop is None or self._held_out:
            return self[index]
        return self._crop.random(self._stored(index), generator)

    def _stored(self, index: int) -> np.ndarray:
        return self._cache[index] if self._cache is not None else self._read(self._pairs[index])

    def _read(self, pair: Pair) -> np.ndarray:
        return load_image(pair, self._image_size) if self._crop is None else load_photo(pair)


class Reconstructions:
    """Reconstructions of a split by a codec, in memory as uint8: what a ranker sees of generated images.

    Args:
        reconstruct: (B, 3, S', S') float in [0, 1] to the same shape.
        codec_size: S', the codec's image size in pixels.
        crop: to S'; images are reconstructed as they are cropped without chance.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        image_size: int,
        *,
        codec_size: int,
        reconstruct: Callable[[Tensor], Tensor],
        crop: NearCentralCrop | None = None,
    ) -> None:
        source = Images(pairs, codec_size, cache=False, crop=crop)
        parts = []
        for start in range(0, len(pairs), 32):
            rows = np.stack([source[index] for index in range(start, min(start + 32, len(pairs)))])
            images = reconstruct(torch.from_numpy(rows).permute(0, 3, 1, 2).float() / 255)
            if codec_size != image_size:
                size = (image_size, image_size)
                images = F.interpolate(images, size=size, mode="bilinear", antialias=True)
            parts.append((images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy())
        self._images = np.concatenate(parts)  # (N, S, S, 3)

    def random(self, index: int, generator: np.random.Generator) -> np.ndarray:
        """(S, S, 3) uint8, without chance: as `Images.random` is called."""
        return self._images[index]


def image_sources(
    pairs: Pairs, data: DataConfig, image_size: int, batch_size: int, *, seed: int, world: World,
    shift: int = 0, noise_seeds: bool = False,
) -> tuple[BatchSource, BatchSource | None]:  # fmt: skip
    """`image_source` of the training split, augmented, and of the held-out one as it is; None where nothing is held out."""
    crop = near_central_crop(data.crop, image_size)
    train = Images(pairs.train, image_size, cache=data.cache_images, crop=crop)
    order = training_order(pairs.train, data, batch_size, seed=seed, world=world)
    source = image_source(train, order, flip=data.flip, shift=shift, noise_seeds=noise_seeds)
    if not pairs.validation:
        return source, None
    held_out = Images(pairs.validation, image_size, cache=data.cache_images, crop=crop, held_out=True)
    held_out_order = validation_order(len(pairs.validation), batch_size, seed=seed, world=world)
    return source, image_source(held_out, held_out_order, flip=False)


def image_source(
    images: Images,
    order: BatchOrder,
    *,
    flip: bool,
    shift: int = 0,
    reconstructions: Reconstructions | None = None,
    spliced: float = 0.0,
    noise_seeds: bool = False,
) -> BatchSource:
    """`images`: (B, 3, S, S) uint8; mirrored with probability 1/2, moved by up to `shift` pixels (edges repeated).

    Args:
        noise_seeds: adds `noise_seeds`, (B,) int64: a seed for each visit's own noise.
        reconstructions: half of the visits take the image from there.
        spliced: share of the images, for `spliced`, (B * share, 3, S, S): each with a rectangle of the next one pasted in.
    """

    def make(number: int) -> Batch:
        augmented, generators = [], []
        for position in order.positions(number):
            generator = order.generator(position)
            use = reconstructions if reconstructions is not None and generator.random() < 0.5 else images
            augmented.append(augment(use.random(order.index(position), generator), generator, flip=flip, shift=shift))
            generators.append(generator)
        batch = {"images": torch.from_numpy(np.stack(augmented)).permute(0, 3, 1, 2)}
        if noise_seeds:
            batch["noise_seeds"] = torch.tensor([int(one.integers(2**63)) for one in generators], dtype=torch.int64)
        if num_spliced := round(spliced * len(augmented)):
            with_splices = [
                _splice(augmented[i], augmented[(i + 1) % len(augmented)], generators[i]) for i in range(num_spliced)
            ]
            batch["spliced"] = torch.from_numpy(np.stack(with_splices)).permute(0, 3, 1, 2)
        return batch

    return make


def captioned_image_source(
    images: Images,
    pairs: Sequence[Pair],
    order: BatchOrder,
    tokenizer: CaptionTokenizer,
    text_seq_len: int,
    *,
    flip: bool,
    shift: int = 0,
    reconstructions: Reconstructions | None = None,
    spliced: float = 0.0,
    bpe_dropout: BpeDropout | None = None,
    fit: CaptionFit | None = None,
    wrong: WrongCaptions | None = None,
    num_wrong: int = 0,
) -> BatchSource:
    """`images` as `image_source`; `text_tokens`: (B, T) of one caption each, chosen anew at each visit.

    Args:
        bpe_dropout: leaves merges of the captions out, others at each visit.
        fit: of `pairs`; adds `fits`, (B, ranks * B) bool: whether an image of any rank fits one of these captions.
        wrong: with `num_wrong` K > 0 adds `wrong_text_tokens`, (B, K, T): versions of each caption that are wrong
            about its image, and `has_wrong`, (B,) bool: where there are none, these are of the empty caption.
    """
    image_batches = image_source(
        images, order, flip=flip, shift=shift, reconstructions=reconstructions, spliced=spliced
    )

    def make(number: int) -> Batch:
        captions = []
        for position in order.positions(number):
            index = order.index(position)
            choices = pairs[index].captions
            # + 2**63: another stream than the augmentation of the same visit
            pick = order.generator(position + 2**63).integers(len(choices)) if len(choices) > 1 else 0
            captions.append((index, choices[pick]))
        batch = image_batches(number)
        visits = [_dropout_generator(order, position) for position in order.positions(number)]
        tokens = tokenizer.encode([caption for _, caption in captions], text_seq_len).tokens
        batch["text_tokens"] = _with_dropout(tokens, visits, bpe_dropout)
        if wrong is not None and num_wrong:
            # + 2**62: another stream than the augmentation and the choice of the caption
            generators = [order.generator(position + 2**62) for position in order.positions(number)]
            versions = [
                wrong.sample(caption, generator)
                for (_, caption), generator in zip(captions, generators, strict=True)
                for _ in range(num_wrong)
            ]
            tokens = tokenizer.encode([version or "" for version in versions], text_seq_len).tokens
            # With dropout as the right ones: whole words would give a wrong caption away.
            tokens = _with_dropout(tokens, [each for each in visits for _ in range(num_wrong)], bpe_dropout)
            batch["wrong_text_tokens"] = tokens.unflatten(0, (len(captions), num_wrong))
            batch["has_wrong"] = torch.tensor([version is not None for version in versions[::num_wrong]])
        if fit is not None:
            images_of_all = [order.index(position) for position in order.positions_of_all_ranks(number)]
            batch["fits"] = torch.from_numpy(fit.matrix(captions, images_of_all))
        return batch

    return make


def token_source(
    shards: TokenShard | TokenShards,
    order: BatchOrder,
    *,
    empty: Tensor,
    caption_dropout: float = 0.0,
    input_token_noise: float = 0.0,
    image_vocab_size: int = 0,
    random_orders: bool = False,
    bpe_dropout: BpeDropout | None = None,
) -> BatchSource:
    """`text_tokens` (B, T), `image_tokens` (B, N) and, with noise, `noisy_image_tokens` (B, N); int64.

    With random orders also what `engine.training.order_annealing` chooses from: `random_orders` (B, N) int64, a
    permutation of the cells for each sequence, and `order_draws` (B,) float64, uniform in [0, 1).

    Args:
        empty: (1, T) tokens of the empty caption, which replaces a share `caption_dropout` of the captions.
        input_token_noise: an image's share of random tokens is uniform from 0 to this. A model that sees only correct
            tokens learns to continue from the preceding ones instead of following the caption, and then reproduces its
            own mistakes in generation.
        image_vocab_size: random tokens are below it.
        random_orders: as above; they leave everything else in the batch as it is without.
        bpe_dropout: leaves merges of the captions out, others at each visit; it leaves everything else as it is, too.
    """
    assert input_token_noise == 0 or image_vocab_size > 0, (input_token_noise, image_vocab_size)

    def make(number: int) -> Batch:
        texts, images, noisy, orders, draws = [], [], [], [], []
        for position in order.positions(number):
            generator = order.generator(position)
            text, image = shards.pick(order.index(position), generator)
            dropped = caption_dropout > 0 and generator.random() < caption_dropout
            if bpe_dropout is not None and not dropped:
                text = bpe_dropout(text, _dropout_generator(order, position))
            texts.append(empty[0].numpy() if dropped else text)
            images.append(image)
            if input_token_noise:
                is_replaced = generator.random(image.shape) < generator.uniform(0, input_token_noise)
                noisy.append(np.where(is_replaced, generator.integers(image_vocab_size, size=image.shape), image))
            if random_orders:
                # + 2**63: another stream than the other randomness of the same visit
                order_generator = order.generator(position + 2**63)
                draws.append(order_generator.random())
                orders.append(order_generator.permutation(len(image)))
        columns = {
            "text_tokens": texts, "image_tokens": images, "noisy_image_tokens": noisy, "random_orders": orders,
        }  # fmt: skip
        batch = {name: torch.from_numpy(np.stack(rows).astype(np.int64)) for name, rows in columns.items() if rows}
        return {**batch, "order_draws": torch.tensor(draws, dtype=torch.float64)} if draws else batch

    return make


def _with_dropout(tokens: Tensor, generators: Sequence[np.random.Generator], bpe_dropout: BpeDropout | None) -> Tensor:
    """(B, T) tokens with merges left out, a generator for each row."""
    if bpe_dropout is None:
        return tokens
    return torch.from_numpy(np.stack([bpe_dropout(*row) for row in zip(tokens.numpy(), generators, strict=True)]))


def _dropout_generator(order: BatchOrder, position: int) -> np.random.Generator:
    """+ 2**61: another stream than the other randomness of the same visit (+ 0, + 2**62, + 2**63)."""
    return order.generator(position + 2**61)


def stream(source: BatchSource, start: int, stop: int, *, num_workers: int) -> Iterator[Batch]:
    """Batches start … stop - 1, prefetched by worker processes if there are any."""
    if num_workers == 0:
        return (source(number) for number in range(start, stop))
    loader: DataLoader[Any] = DataLoader(
        _Numbered(source), batch_size=None, sampler=range(start, stop), num_workers=num_workers, prefetch_factor=4
    )
    return map(_raise_error, loader)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of a batch on the device. From pinned memory the host does not wait for the copy to a GPU."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def to_unit_floats(images: Tensor, world: World) -> Tensor:
    """(B, 3, S, S) uint8 -> float32 in [0, 1] on the device."""
    return to_device(images, world.device).float().div_(255.0)


class _Numbered(Dataset[Batch | InputError]):
    def __init__(self, source: BatchSource) -> None:
        self._source = source

    def __getitem__(self, number: int) -> Batch | InputError:
        try:
            return self._source(number)
        except InputError as error:  # returned: raised, it would become a RuntimeError of the DataLoader
            return error


def _raise_error(batch: Batch | InputError) -> Batch:
    if isinstance(batch, InputError):
        raise batch
    return batch


def _splice(image: np.ndarray, other: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """A copy of `image` with a rectangle of `other`, a quarter to three quarters as wide and as high, at its place."""
    size = image.shape[0]
    height, width = generator.integers(size // 4, 3 * size // 4 + 1, size=2)
    top, left = generator.integers(0, size - height + 1), generator.integers(0, size - width + 1)
    spliced = image.copy()
    spliced[top : top + height, left : left + width] = other[top : top + height, left : left + width]
    return spliced
