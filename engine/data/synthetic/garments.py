"""The demo data set: drawn garments with labels in the K-Fashion format, so that everything runs without real data.

`make_demo` chooses attributes, draws them and writes `<destination>/{train,validation}/{images,labels}/<id>`.
Validation shows what training does not: 28 of the 144 triples (category, colour, sleeve), or (category, colour, length)
for categories whose sleeve says nothing, occur only there, while every value and every pair of values is plentiful in
training. A model that generates them rightly combines what it has learnt, and does not merely remember.
"""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.kfashion.labels import GARMENT_TYPES
from engine.data.label_format import Attributes
from engine.data.synthetic.drawing import COLOURS, PRINTS, DrawnGarment, draw_garment
from engine.errors import InputError
from engine.files import atomic_folder
from engine.progress import ProgressBar

Triple = tuple[str, str, str]

SLEEVES = ("민소매", "반팔", "긴팔")
SMALLEST_IMAGE = 32
PLAIN_SHARE = 0.7
_FIRST_ID = {"train": 1_000_001, "validation": 2_000_001}
_STREAM = {"train": 0, "validation": 1}


@dataclass(frozen=True)
class DrawnCategory:
    """A category of the demo set and its attributes' values. `sleeves` is empty where a sleeve says nothing."""

    garment: str
    category: str
    lengths: tuple[str, str, str]
    sleeves: tuple[str, ...] = ()
    necklines: tuple[str, ...] = ()
    collar: str | None = None
    details: tuple[str, ...] = ()

    @property
    def third(self) -> tuple[str, ...]:
        """The values that make a triple with category and colour: sleeves, else lengths."""
        return self.sleeves or self.lengths


CATEGORIES = (
    DrawnCategory("상의", "티셔츠", ("크롭", "노멀", "롱"), sleeves=SLEEVES[1:], necklines=("라운드넥", "브이넥")),
    DrawnCategory("상의", "후드티", ("크롭", "노멀", "롱"), sleeves=SLEEVES[1:], necklines=("후드",)),
    DrawnCategory("상의", "셔츠", ("크롭", "노멀", "롱"), sleeves=SLEEVES[1:], collar="셔츠칼라", details=("단추",)),
    DrawnCategory("원피스", "드레스", ("미니", "미디", "맥시"), sleeves=SLEEVES, necklines=("라운드넥", "브이넥")),
    DrawnCategory(
        "아우터", "코트", ("하프", "롱", "맥시"), collar="테일러칼라", details=("싱글브레스티드", "더블브레스티드")
    ),
    DrawnCategory("하의", "팬츠", ("미니", "니렝스", "발목")),
    DrawnCategory("하의", "스커트", ("미니", "미디", "맥시")),
)


@dataclass(frozen=True)
class DemoReport:
    """What `make_demo` wrote: numbers of photos, and of distinct captions and triples in each part."""

    destination: Path
    train: int
    validation: int
    train_captions: int
    validation_captions: int
    train_triples: int
    held_out_triples: int


def make_demo(
    destination: Path, *, count: int, seed: int, image_size: int = 64, held_out: int = 72, progress: bool = False
) -> DemoReport:
    """Draws the demo data set; equal arguments give equal pixels and labels, in any process.

    Args:
        destination: a folder that is new or empty; it appears only once complete.
        count: photos for training.
        seed: of the images and of the triples that are held out.
        image_size: side of the square PNG images in pixels.
        held_out: photos for validation, all of unseen triples and with distinct labels.
        progress: show a progress bar.

    Raises:
        InputError: a number out of range, or a destination in use.
    """
    triples = held_out_triples(seed)
    unseen = _validation_choices(triples, held_out=held_out, seed=seed)
    if count < 1:
        raise InputError("count", count, "must be at least 1")
    if image_size < SMALLEST_IMAGE:
        raise InputError("image_size", image_size, f"must be at least {SMALLEST_IMAGE} pixels, to show a garment")
    shown = _training_choices(triples, count=count, seed=seed)
    bar = ProgressBar("garments", total=len(shown) + len(unseen), enabled=progress)
    with atomic_folder(destination) as folder, bar:
        done = 0
        for split, choices in (("train", shown), ("validation", unseen)):
            for name in ("images", "labels"):
                (folder / split / name).mkdir(parents=True)
            for index, (garment, attributes) in enumerate(choices):
                identifier = _FIRST_ID[split] + index
                generator = np.random.default_rng([seed, _STREAM[split], index])
                drawing = draw_garment(attributes, generator=generator, image_size=image_size)
                drawing.image.save(folder / split / "images" / f"{identifier}.png")
                label = label_of(garment, attributes, drawing, identifier=identifier)
                path = folder / split / "labels" / f"{identifier}.json"
                # One line, like the real labels; written in place, because the folder as a whole appears at once.
                path.write_text(json.dumps(label, ensure_ascii=False), encoding="utf-8")
                done += 1
                bar.update(done)
    return DemoReport(
        destination=destination,
        train=len(shown),
        validation=len(unseen),
        train_captions=len({_key(*choice) for choice in shown}),
        validation_captions=len({_key(*choice) for choice in unseen}),
        train_triples=len({triple_of(attributes) for _, attributes in shown}),
        held_out_triples=len({triple_of(attributes) for _, attributes in unseen}),
    )


def held_out_triples(seed: int) -> frozenset[Triple]:
    """The 28 (category, colour, sleeve or length) triples that only validation shows.

    Every other (category, colour) pair, as on a chessboard, gives up one of its two or three triples, and these go
    round the third values in turn: so each (category, colour) keeps at least one triple, each (category, third value)
    at least six of eight colours, and each (colour, sleeve) at least one category, most of them two or more.
    """
    if seed < 0:
        raise InputError("seed", seed, "must not be negative")
    generator = np.random.default_rng([seed, len(_STREAM)])
    colours = [list(COLOURS)[index] for index in generator.permutation(len(COLOURS))]
    turn = int(generator.integers(3))
    triples = set()
    for row, drawn in enumerate(CATEGORIES):
        # A sleeve that one category alone has stays: without it (colour, sleeve) would never be seen at all.
        given_up = [third for third in drawn.third if not drawn.sleeves or _num_categories_with(third) > 1]
        for column, colour in enumerate(colours):
            if (row + column) % 2 == 0:
                triples.add((drawn.category, colour, given_up[(column // 2 + row // 2 + turn) % len(given_up)]))
    return frozenset(triples)


def _num_categories_with(sleeve: str) -> int:
    return sum(sleeve in drawn.sleeves for drawn in CATEGORIES)


def triple_of(attributes: Attributes) -> Triple:
    """(category, colour, sleeve), or (category, colour, length) where the category's sleeve says nothing."""
    third = attributes.get("소매기장", attributes["기장"])
    return str(attributes["카테고리"]), str(attributes["색상"]), str(third)


def all_choices(drawn: DrawnCategory, colour: str, third: str) -> list[tuple[str, Attributes]]:
    """Every full set of attributes of one triple, keys in the order of the real labels."""
    choices: list[tuple[str, Attributes]] = []
    lengths = drawn.lengths if drawn.sleeves else (third,)
    for length, print_name, neckline, detail in itertools.product(
        lengths, PRINTS, drawn.necklines or (None,), drawn.details or (None,)
    ):
        attributes: dict[str, str | list[str]] = {"기장": length, "색상": colour, "카테고리": drawn.category}
        if drawn.collar:
            attributes["옷깃"] = drawn.collar
        if detail:
            attributes["디테일"] = [detail]
        if drawn.sleeves:
            attributes["소매기장"] = third
        attributes["프린트"] = [print_name]
        if neckline:
            attributes["넥라인"] = neckline
        choices.append((drawn.garment, attributes))
    return choices


def _training_choices(held: frozenset[Triple], *, count: int, seed: int) -> list[tuple[str, Attributes]]:
    """Goes round all shown triples in a shuffled order, so that each is as frequent as any other."""
    generator = np.random.default_rng([seed, len(_STREAM) + 1])
    pools = [
        all_choices(drawn, colour, third)
        for drawn in CATEGORIES
        for colour in COLOURS
        for third in drawn.third
        if (drawn.category, colour, third) not in held
    ]
    choices: list[tuple[str, Attributes]] = []
    while len(choices) < count:
        for index in generator.permutation(len(pools)):
            pool = pools[int(index)]
            choices.append(pool[int(generator.choice(len(pool), p=_frequencies(pool)))])
    return choices[:count]


def _validation_choices(held: frozenset[Triple], *, held_out: int, seed: int) -> list[tuple[str, Attributes]]:
    """Goes round the held-out triples and takes a set of attributes not taken yet from each."""
    generator = np.random.default_rng([seed, len(_STREAM) + 2])
    categories = {drawn.category: drawn for drawn in CATEGORIES}
    pools = []
    for category, colour, third in sorted(held):
        pool = all_choices(categories[category], colour, third)
        order = generator.choice(len(pool), size=len(pool), replace=False, p=_frequencies(pool))
        pools.append([pool[int(index)] for index in order[::-1]])  # the first chosen is taken first, from the end
    most = sum(len(pool) for pool in pools)
    if not 1 <= held_out <= most:
        raise InputError("held_out", held_out, f"choose 1 to {most}: there are that many distinct labels to hold out")
    choices: list[tuple[str, Attributes]] = []
    while len(choices) < held_out:
        filled = [pool for pool in pools if pool]
        choices += [filled[int(index)].pop() for index in generator.permutation(len(filled))]
    return choices[:held_out]


def _frequencies(pool: list[tuple[str, Attributes]]) -> np.ndarray:
    """How often each set of attributes occurs: most clothes are plain, here as in shops."""
    is_plain = np.array([attributes["프린트"] == ["무지"] for _, attributes in pool])
    weights = np.where(is_plain, PLAIN_SHARE / is_plain.sum(), (1 - PLAIN_SHARE) / (~is_plain).sum())
    return weights / weights.sum()


def _key(garment: str, attributes: Attributes) -> tuple[str, ...]:
    values = (",".join(value) if isinstance(value, list) else value for value in attributes.values())
    return garment, *values


def label_of(garment: str, attributes: Attributes, drawing: DrawnGarment, *, identifier: int) -> dict[str, Any]:
    """A label in the K-Fashion format; box and polygon are measured from the drawn pixels."""
    name = f"{identifier}.png"
    width, height = drawing.image.size
    box, polygon = _box(drawing.coverage), _polygon(drawing.coverage)
    return {
        "이미지 정보": {
            "이미지 식별자": identifier,
            "이미지 높이": height,
            "이미지 파일명": name,
            "이미지 너비": width,
        },
        "데이터셋 정보": {
            "파일 생성일자": "2026-01-01 00:00:00",
            "데이터셋 상세설명": {
                "렉트좌표": {each: [box if each == garment else {}] for each in GARMENT_TYPES},
                "폴리곤좌표": {each: [polygon if each == garment else {}] for each in GARMENT_TYPES},
                "라벨링": {"스타일": [{}], **{each: [attributes if each == garment else {}] for each in GARMENT_TYPES}},
            },
            "파일 번호": identifier,
            "파일 이름": name,
        },
    }


def _box(coverage: np.ndarray) -> dict[str, float | int]:
    """The smallest box round all pixels that are at least half covered: left, top, width, height in pixels."""
    covered = coverage >= 128
    columns, rows = np.flatnonzero(covered.any(axis=0)), np.flatnonzero(covered.any(axis=1))
    return {
        "X좌표": float(columns[0]),
        "Y좌표": float(rows[0]),
        "가로": int(columns[-1] - columns[0] + 1),
        "세로": int(rows[-1] - rows[0] + 1),
    }


def _polygon(coverage: np.ndarray, *, rows: int = 16) -> dict[str, float]:
    """The garment's envelope: down its right edge and up its left edge, in pixels."""
    covered = coverage >= 128
    filled = np.flatnonzero(covered.any(axis=1))
    right, left = [], []
    for y in filled[np.linspace(0, len(filled) - 1, min(rows, len(filled))).round().astype(int)]:
        columns = np.flatnonzero(covered[y])
        right.append((float(columns[-1] + 1), float(y)))
        left.append((float(columns[0]), float(y)))
    polygon: dict[str, float] = {}
    for number, (x, y) in enumerate([*right, *reversed(left)], start=1):
        polygon[f"X좌표{number}"] = x
        polygon[f"Y좌표{number}"] = y
    return polygon
