"""What sizes are chosen from: the captioned images, and the machine.

Nothing here trains. Headers of a sample are enough for the images' size; of it those with an alpha channel are decoded, to know
whether they are cut-outs.
"""

import os
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from engine.data.crops import ImageFault, open_layered, read_header
from engine.data.cut_out import outline_extent
from engine.data.ground import DEFAULT_GROUND
from engine.data.pairs import load_pairs, split_of
from engine.data.sources import Crop, CropJob, PrepareOptions, SourceListing, list_source
from engine.data.wrong_captions import wrong_captions
from engine.errors import InputError
from engine.files import read_json

Item = TypeVar("Item")

LEAST_PAIRS = 10
_SAMPLED_IMAGES = 200  # headers that are read for the median size
_SAMPLED_CAPTIONS = 200_000  # distinct ones that the vocabulary is counted from
_MOSTLY_OUTLINED = 0.8  # of the objects, from which they are cut out, and the others left out
_SEEDS = range(42, 142)  # tried until the split holds out about as many photos as wanted
# A mirrored image contradicts a caption with one of these.
_SIDES = re.compile(
    r"\b(?:left|right|links|rechts|gauche|droite|izquierda|derecha)\b|왼쪽|오른쪽|좌측|우측|左|右", re.IGNORECASE
)


@dataclass(frozen=True, kw_only=True)
class DatasetFacts:
    """A set of captioned images.

    train, validation: pairs of each side.
    captions: distinct ones of the training side.
    vocabulary: entries of a tokenizer that has every word whole, or as many as it may have at most.
    longest_tokens: text tokens of the longest caption with that tokenizer, [CLS] and [SEP] among them.
    side: median over the images of the shorter side, in pixels.
    mentions_sides: some caption says left or right.
    states_facts: captions can be made wrong about their images in one fact (engine.data.wrong_captions).
    ground: `#rrggbb` around the objects, if they are cut out; background: why they are, or are not.
    split_fraction, split_seed: of the split, for the preparation.
    """

    train: int
    validation: int
    captions: int
    vocabulary: int
    longest_tokens: int
    side: int
    mentions_sides: bool
    states_facts: bool = False
    ground: str | None = None
    background: str = "no outlines and no transparency to cut along"
    split_fraction: float = 0.05
    split_seed: int = 42


@dataclass(frozen=True, kw_only=True)
class MachineFacts:
    """What trainings may use. Memory is of one GPU, or of the machine."""

    device: str
    name: str
    cores: int
    memory_bytes: int
    gpus: int = 0
    has_bf16: bool = False  # the GPU
    multiplies_bf16: bool = False  # the CPU, in hardware


def most_entries(pairs: int) -> int:
    """The largest vocabulary that a set of this size can fill with something to learn."""
    return 2048 if pairs < 1000 else 8192 if pairs < 50_000 else 32_000


def dataset_facts(photos: Path, *, start_from: Path | None = None, cut_out: bool | None = None) -> DatasetFacts:
    """Facts of a source folder (labels, or name.jpg + name.txt) or of a prepared one.

    Args:
        start_from: model folder whose tokenizer counts the captions' tokens, extended by their new words, and whose
            ground objects are cut out on, if it has one.
        cut_out: whether objects are; None: where the model was trained on cut-outs, or, without a model, where most have
            an outline.

    Raises:
        InputError: nothing usable in it, fewer than `LEAST_PAIRS` pairs, or nothing to cut out along.
    """
    if (photos / "pairs.jsonl").is_file():
        pairs = load_pairs(photos)
        train = [caption for pair in pairs.train for caption in pair.captions]
        sides = [_image_side(pair.image_path) for pair in _sample(pairs.all)]
        background = "as the folder was prepared"
        return _facts(
            photos, len(pairs.train), len(pairs.validation), train, sides, 0.05, 42, start_from, pairs.ground, background
        )  # fmt: skip
    listing, ground, background = source_as_prepared(photos, start_from, cut_out)
    crops = [crop for job in listing.jobs for crop in job.crops]
    fraction, seed = 0.05, 42
    if listing.has_sides:
        held = [crop.split == "validation" for crop in crops]
    else:
        names = sorted({crop.photo for crop in crops})
        fraction, seed = choose_split(names)
        held = [split_of(crop.photo, fraction, seed) == "validation" for crop in crops]
    train = [caption for crop, out in zip(crops, held, strict=True) if not out for caption in crop.captions]
    sides = [side for job in _sample(listing.jobs) for side in _crop_sides(job)]
    counts = len(crops) - sum(held), sum(held)
    return _facts(photos, *counts, train, sides, fraction, seed, start_from, ground, background)


def source_as_prepared(
    photos: Path, start_from: Path | None, cut_out: bool | None
) -> tuple[SourceListing, str | None, str]:
    """The source as it will be prepared; the ground of cut-outs, or None; and why."""
    ground, wanted, reason = DEFAULT_GROUND, cut_out, "as --cut-out states" if cut_out else "as --no-cut-out states"
    if start_from is not None:
        theirs = read_json(start_from / "config.json", field="--from", remedy="give a model folder").get("ground")
        ground = theirs or ground
        if wanted is None:
            wanted, reason = theirs is not None, f"as in {start_from}"
    if wanted is False:
        return list_source(photos, PrepareOptions(), strict=False), None, reason
    listing = list_source(photos, PrepareOptions(cut_out=True, keep_uncut=True), strict=False)
    share = _outlined_share(listing)
    if wanted and not share:
        raise InputError(
            "--cut-out" if cut_out else "--from",
            photos if cut_out else start_from,
            "no object has an outline or a transparent background to cut it out along: leave --cut-out out"
            if cut_out
            else f"was trained on cut-outs, and {photos} has no outlines: give --no-cut-out to train on whole images",
        )
    if wanted or share >= _MOSTLY_OUTLINED:
        if listing.form == "labels":
            listing.jobs = [_outlined(job) for job in listing.jobs]
        reason = reason if wanted else f"{share:.0%} have an outline: backgrounds need not be learnt then"
        return listing, ground, reason
    if share:
        reason = f"only {share:.0%} have an outline; --cut-out takes these alone"
        return list_source(photos, PrepareOptions(), strict=False), None, reason
    return listing, None, "no outlines and no transparency to cut along"


def _outlined(job: CropJob) -> CropJob:
    """The job without the objects that have no outline."""
    return replace(job, crops=tuple(crop for crop in job.crops if crop.outline is not None))


def _outlined_share(listing: SourceListing) -> float:
    """Of the objects those with an outline; of images without labels, from a sample, those with a transparent part."""
    if listing.form == "labels":
        crops = [crop for job in listing.jobs for crop in job.crops]
        return sum(crop.outline is not None for crop in crops) / max(1, len(crops))
    sample = _sample(listing.jobs)
    return sum(_is_transparent(job.image_path) for job in sample) / max(1, len(sample))


def _is_transparent(path: Path) -> bool:
    """Whether an image is in part; those that cannot be read are named by the preparation."""
    header = read_header(path)
    if header is None or not header.may_be_transparent:
        return False
    try:
        return bool(open_layered(path).image.getchannel("A").getextrema()[0] != 255)
    except ImageFault:
        return False


def choose_split(photos: Sequence[str]) -> tuple[float, int]:
    """Share of photos to hold out, and the first seed with which about as many are (a small split is left to chance).

    15 % of fewer than 100, 10 % of fewer than 1,000, else 5 %, and 2,000 at most.
    """
    count = len(photos)
    fraction = 0.15 if count < 100 else 0.1 if count < 1000 else min(0.05, 2000 / count)
    wanted = max(1, round(fraction * count))
    if count >= 1000:
        return fraction, _SEEDS[0]

    def miss(seed: int) -> int:
        return abs(sum(split_of(photo, fraction, seed) == "validation" for photo in photos) - wanted)

    return fraction, min(_SEEDS, key=lambda seed: (miss(seed) > wanted // 10, miss(seed) if wanted < 10 else 0, seed))


def machine_facts() -> MachineFacts:
    """This machine as trainings will see it."""
    import torch  # seconds to import, and the tests of the choices need none of it

    from engine.device import cpu_capabilities, fit_to_machine

    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") != "cpu":
        properties = torch.cuda.get_device_properties(0)
        return MachineFacts(
            device="cuda", name=properties.name, cores=fit_to_machine(), memory_bytes=properties.total_memory,
            gpus=torch.cuda.device_count(), has_bf16=torch.cuda.get_device_capability(0) >= (8, 0),
        )  # fmt: skip
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cpu = cpu_capabilities()
    return MachineFacts(
        device="cpu",
        name=cpu.name,
        cores=fit_to_machine(),
        memory_bytes=memory,
        multiplies_bf16=cpu.multiplies_bfloat16,
    )


def _facts(
    photos: Path,
    train: int,
    validation: int,
    captions: list[str],
    sides: list[int],
    fraction: float,
    seed: int,
    start_from: Path | None,
    ground: str | None,
    background: str,
) -> DatasetFacts:
    if train + validation < LEAST_PAIRS:
        raise InputError("PHOTOS", photos, f"{train + validation} captioned images: give {LEAST_PAIRS} or more")
    if not train or not validation:
        side = "train on" if not train else "hold out"
        raise InputError("PHOTOS", photos, f"its own split leaves no image to {side}: move some, or merge the folders")
    distinct = sorted(set(captions))
    vocabulary, longest = _count_tokens(distinct[:_SAMPLED_CAPTIONS], most_entries(train + validation), start_from)
    return DatasetFacts(
        train=train,
        validation=validation,
        captions=len(distinct),
        vocabulary=vocabulary,
        longest_tokens=longest,
        side=round(statistics.median(sides)) if sides else 0,
        mentions_sides=any(_SIDES.search(caption) for caption in distinct),
        states_facts=wrong_captions(distinct[:_SAMPLED_CAPTIONS]) is not None,
        ground=ground,
        background=background,
        split_fraction=fraction,
        split_seed=seed,
    )


def _count_tokens(captions: list[str], most: int, start_from: Path | None) -> tuple[int, int]:
    """(entries, tokens of the longest caption), counted with the tokenizer that the ranker's training will make."""
    from engine.data.tokenizer import extend_tokenizer, load_tokenizer, train_tokenizer  # imports torch

    if start_from is None:
        tokenizer = train_tokenizer(captions, vocab_size=most)
    else:
        tokenizer = extend_tokenizer(load_tokenizer(str(start_from)), captions, vocab_size=most)
    cut = tokenizer.encode(sorted(captions, key=len)[-1000:], 2).cut
    return tokenizer.vocab_size, 2 + max(cut)


def _sample(items: Sequence[Item]) -> list[Item]:
    """Some of many, evenly spread."""
    return list(items[:: max(1, len(items) // _SAMPLED_IMAGES)])


def _image_side(path: Path) -> int:
    """The shorter side from the file's header; 0 where it has none (the preparation names such a file)."""
    header = read_header(path)
    return 0 if header is None else min(header.width, header.height)


def _crop_sides(job: CropJob) -> list[int]:
    def side(crop: Crop) -> int:
        if crop.box is not None:
            return round(min(crop.box.width, crop.box.height))
        if crop.outline is not None:
            left, top, right, bottom = outline_extent(crop.outline)
            return round(min(right - left, bottom - top))
        return _image_side(job.image_path)

    return [side(crop) for crop in job.crops]
