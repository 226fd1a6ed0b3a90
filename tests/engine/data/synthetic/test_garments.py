import hashlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engine.data.kfashion.labels import GARMENT_TYPES
from engine.data.label_format import Attributes
from engine.data.synthetic.drawing import COLOURS, draw_garment
from engine.data.synthetic.garments import (
    CATEGORIES,
    DemoReport,
    Triple,
    all_choices,
    held_out_triples,
    make_demo,
    triple_of,
)
from engine.errors import InputError
from tests.paths import REPOSITORY

TRAIN, HELD_OUT, SEED = 300, 72, 5


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DemoReport]:
    folder = tmp_path_factory.mktemp("demo") / "garments"
    return folder, make_demo(folder, count=TRAIN, seed=SEED, held_out=HELD_OUT)


def _labels(folder: Path, split: str) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text("utf-8")) for path in sorted((folder / split / "labels").iterdir())}


def _garment(label: dict[str, Any]) -> tuple[str, Attributes]:
    labelling = label["데이터셋 정보"]["데이터셋 상세설명"]["라벨링"]
    ((garment, attributes),) = [(each, labelling[each][0]) for each in GARMENT_TYPES if labelling[each][0]]
    return garment, attributes


def _triples(folder: Path, split: str) -> list[Triple]:
    return [triple_of(_garment(label)[1]) for label in _labels(folder, split).values()]


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".png":
            digest.update(Image.open(path).tobytes())
        elif path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()


@pytest.mark.slow
def test_files_pair_up_and_the_report_counts_them(demo: tuple[Path, DemoReport]) -> None:
    folder, report = demo
    for split, count in (("train", TRAIN), ("validation", HELD_OUT)):
        images = {path.stem for path in (folder / split / "images").glob("*.png")}
        assert images == set(_labels(folder, split))
        assert len(images) == count
    assert (report.train, report.validation) == (TRAIN, HELD_OUT)
    assert report.destination == folder
    assert not set(_labels(folder, "train")) & set(_labels(folder, "validation"))


@pytest.mark.slow
def test_labels_have_the_published_structure(demo: tuple[Path, DemoReport]) -> None:
    folder, _ = demo
    order = ["기장", "색상", "카테고리", "옷깃", "디테일", "소매기장", "프린트", "넥라인"]
    for stem, label in _labels(folder, "validation").items():
        assert list(label) == ["이미지 정보", "데이터셋 정보"]
        info, data = label["이미지 정보"], label["데이터셋 정보"]
        assert list(info) == ["이미지 식별자", "이미지 높이", "이미지 파일명", "이미지 너비"]
        assert list(data) == ["파일 생성일자", "데이터셋 상세설명", "파일 번호", "파일 이름"]
        assert info["이미지 식별자"] == data["파일 번호"] == int(stem)
        assert (info["이미지 너비"], info["이미지 높이"]) == (64, 64)
        detail = data["데이터셋 상세설명"]
        assert list(detail) == ["렉트좌표", "폴리곤좌표", "라벨링"]
        assert list(detail["라벨링"]) == ["스타일", *GARMENT_TYPES]
        assert detail["라벨링"]["스타일"] == [{}]
        garment, attributes = _garment(label)
        assert [key for key in order if key in attributes] == list(attributes)
        assert all(isinstance(attributes[key], list) == (key in ("디테일", "프린트")) for key in attributes)
        for part in ("렉트좌표", "폴리곤좌표"):
            assert list(detail[part]) == list(GARMENT_TYPES)
            assert [each for each in GARMENT_TYPES if detail[part][each] != [{}]] == [garment]


def test_boxes_and_polygons_fit_the_drawn_pixels(demo: tuple[Path, DemoReport]) -> None:
    folder, _ = demo
    for stem, label in _labels(folder, "validation").items():
        garment, _ = _garment(label)
        detail = label["데이터셋 정보"]["데이터셋 상세설명"]
        box, polygon = detail["렉트좌표"][garment][0], detail["폴리곤좌표"][garment][0]
        assert list(box) == ["X좌표", "Y좌표", "가로", "세로"]
        left, top = box["X좌표"], box["Y좌표"]
        right, bottom = left + box["가로"], top + box["세로"]
        pixels = np.asarray(Image.open(folder / "validation" / "images" / f"{stem}.png")).astype(int)
        differs = np.abs(pixels - pixels[0, 0]).max(axis=2) > 40
        rows, columns = np.flatnonzero(differs.any(axis=1)), np.flatnonzero(differs.any(axis=0))
        seen = np.asarray([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
        assert np.abs(seen - [left, top, right, bottom]).max() <= 1, (stem, seen, box)
        assert box["가로"] >= 0.55 * 64
        assert box["세로"] >= 0.55 * 64
        xs = [value for key, value in polygon.items() if key.startswith("X")]
        ys = [value for key, value in polygon.items() if key.startswith("Y")]
        assert min(xs) >= left
        assert max(xs) <= right
        assert (min(ys), max(ys)) == (top, bottom - 1)


def test_equal_seeds_give_equal_files_in_any_process(tmp_path: Path) -> None:
    make_demo(tmp_path / "here", count=20, seed=3, held_out=5)
    script = (
        "import sys, pathlib; from engine.data.synthetic.garments import make_demo;"
        "make_demo(pathlib.Path(sys.argv[1]), count=20, seed=3, held_out=5)"
    )
    subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "there")],
        check=True,
        env={"PYTHONHASHSEED": "77"},
        cwd=REPOSITORY,
    )
    make_demo(tmp_path / "other", count=20, seed=4, held_out=5)
    assert _digest(tmp_path / "here") == _digest(tmp_path / "there")
    assert _digest(tmp_path / "here") != _digest(tmp_path / "other")


def test_validation_shows_only_triples_that_training_never_does(demo: tuple[Path, DemoReport]) -> None:
    folder, report = demo
    shown, wanted, held = _triples(folder, "train"), _triples(folder, "validation"), held_out_triples(SEED)
    assert not set(shown) & held
    assert set(wanted) == held
    assert (len(set(shown)), len(held)) == (116, 28) == (report.train_triples, report.held_out_triples)
    captions = {json.dumps(_garment(label), ensure_ascii=False) for label in _labels(folder, "validation").values()}
    assert len(captions) == HELD_OUT == report.validation_captions
    # Every triple about equally often, so every value is plentiful.
    assert max(Counter(shown).values()) - min(Counter(shown).values()) <= 1


@pytest.mark.parametrize("seed", range(30))
def test_every_pair_of_values_stays_in_training(seed: int) -> None:
    held = held_out_triples(seed)
    shown = [
        (drawn, colour, third)
        for drawn in CATEGORIES
        for colour in COLOURS
        for third in drawn.third
        if (drawn.category, colour, third) not in held
    ]
    by_colour = Counter((drawn.category, colour) for drawn, colour, _ in shown)
    by_third = Counter((drawn.category, third) for drawn, _, third in shown)
    colour_sleeve = Counter((colour, third) for drawn, colour, third in shown if drawn.sleeves)
    assert len(by_colour) == len(CATEGORIES) * len(COLOURS)
    assert min(by_colour.values()) >= 1
    assert len(by_third) == sum(len(drawn.third) for drawn in CATEGORIES)
    assert min(by_third.values()) >= 6
    assert len(colour_sleeve) == len(COLOURS) * 3
    assert min(colour_sleeve.values()) >= 1


def test_held_out_triples_depend_on_the_seed() -> None:
    assert held_out_triples(0) == held_out_triples(0)
    assert len({held_out_triples(seed) for seed in range(10)}) > 1


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"count": 0}, "count"),
        ({"seed": -1}, "seed"),
        ({"image_size": 8}, "image_size"),
        ({"held_out": 0}, "held_out"),
        ({"held_out": 100_000}, "held_out"),
    ],
)
def test_numbers_out_of_range_are_named(tmp_path: Path, arguments: dict[str, int], field: str) -> None:
    numbers: dict[str, Any] = {"count": 4, "seed": 0, "held_out": 4, **arguments}
    with pytest.raises(InputError) as error:
        make_demo(tmp_path / "demo", **numbers)
    assert error.value.field == field
    assert not (tmp_path / "demo").exists()


def test_a_destination_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError):
        make_demo(tmp_path, count=4, seed=0, held_out=4)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(("attribute", "value"), [("카테고리", "청바지"), ("색상", "카키")])
def test_what_is_not_drawn_is_refused(attribute: str, value: str) -> None:
    attributes: dict[str, str | list[str]] = {"카테고리": "팬츠", "색상": "블루", "기장": "발목", attribute: value}
    with pytest.raises(InputError) as error:
        draw_garment(attributes, generator=None)
    assert error.value.field == attribute


def test_every_attribute_shows_in_the_image() -> None:
    for drawn in CATEGORIES:
        choices = [choice for third in drawn.third for _, choice in all_choices(drawn, "블루", third)]
        images = {draw_garment(choice, generator=None).image.tobytes() for choice in choices}
        assert len(images) == len(choices), drawn


@pytest.mark.parametrize("image_size", [32, 64, 96])
def test_sizes(image_size: int) -> None:
    attributes: Attributes = {"카테고리": "코트", "색상": "퍼플", "기장": "맥시"}
    drawing = draw_garment(attributes, generator=np.random.default_rng(0), image_size=image_size)
    assert drawing.image.size == (image_size, image_size)
    assert drawing.coverage.shape == (image_size, image_size)
    assert drawing.coverage.dtype == np.uint8
    # Never cut off: the border is background.
    for edge in (drawing.coverage[0], drawing.coverage[-1], drawing.coverage[:, 0], drawing.coverage[:, -1]):
        assert edge.max() < 128
