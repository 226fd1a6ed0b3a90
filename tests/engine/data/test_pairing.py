"""Labels find their photographs by place first, then by name."""

import json
import os
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.data.kfashion.label_format import KFashionLabels
from engine.data.names import readable_name
from engine.data.pairing import Pairing, pair_files
from engine.data.source_files import scan, side_of, source_sides
from tests.deliveries import delivery
from tests.label_trees import label_tree


def label(path: Path, identifier: Any = 7, file_name: str = "") -> Path:
    content = label_tree(identifier, boxes={})
    content["이미지 정보"]["이미지 파일명"] = file_name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return path


def image(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()  # names alone matter here
    return path


def pairing(root: Path) -> Pairing:
    return pair_files(scan(root), lambda name: KFashionLabels().read(root / name).image_names)


def found(root: Path, path: Path) -> Path | None:
    name = pairing(root).image_of.get(path.relative_to(root).as_posix())
    return None if name is None else root / name


def test_labels_and_images_folders_with_splits(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        path = label(tmp_path / split / "labels" / "7.json")
        expected = image(tmp_path / split / "images" / "7.jpg")
        assert found(tmp_path, path) == expected


@pytest.mark.parametrize("suffix", [".jpg", ".JPG", ".jpeg", ".PNG", ".Jpeg"])
def test_beside_the_label(tmp_path: Path, suffix: str) -> None:
    path = label(tmp_path / "Training" / "아우터 01" / "7.json")
    expected = image(tmp_path / "Training" / "아우터 01" / f"7{suffix}")
    image(tmp_path / "Training" / "아우터 02" / "7.jpg")
    assert found(tmp_path, path) == expected


@pytest.mark.parametrize(
    ("of_labels", "of_photos"),
    [
        ("Training/라벨링데이터/레트로", "Training/원천데이터/레트로"),
        ("1.Training/02.라벨링데이터/레트로", "1.Training/01.원천데이터/레트로"),
        ("Training/[라벨]레트로", "Training/[원천]레트로"),
        ("Training/라벨링데이터/TL_레트로", "Training/원천데이터/TS_레트로"),
        ("레트로/json", "레트로/images"),
        ("labels/a/레트로", "a/images/레트로"),
    ],
)
def test_names_that_repeat_between_parallel_folders(tmp_path: Path, of_labels: str, of_photos: str) -> None:
    expected = {}
    for style in ("레트로", "모던"):
        path = label(tmp_path / of_labels.replace("레트로", style) / "(116)IMG_1.json")
        expected[path] = image(tmp_path / of_photos.replace("레트로", style) / "(116)IMG_1.jpg")
    assert {path: found(tmp_path, path) for path in expected} == expected


def test_a_stated_name_in_the_parallel_folder_comes_before_the_own_name_elsewhere(tmp_path: Path) -> None:
    path = label(tmp_path / "라벨링데이터" / "레트로" / "IMG_1.json", 5, "(116)IMG_1.jpg")
    expected = image(tmp_path / "원천데이터" / "레트로" / "(116)IMG_1.jpg")
    image(tmp_path / "원천데이터" / "모던" / "IMG_1.jpg")
    assert found(tmp_path, path) == expected
    assert pairing(tmp_path).stated == ("라벨링데이터/레트로/IMG_1.json",)


def test_a_label_without_photo_takes_none_of_another_style(tmp_path: Path) -> None:
    """Names repeat: the photograph of one style and the label of another do not belong together."""
    without = label(tmp_path / "라벨링데이터" / "레트로" / "IMG_1.json")
    image(tmp_path / "원천데이터" / "레트로" / "IMG_2.jpg")
    label(tmp_path / "라벨링데이터" / "모던" / "IMG_1.json")
    image(tmp_path / "원천데이터" / "스포티" / "IMG_1.jpg")
    assert found(tmp_path, without) is None


def test_elsewhere_only_if_it_is_the_only_one(tmp_path: Path) -> None:
    path = label(tmp_path / "Training" / "labels-zip" / "7.json")
    expected = image(tmp_path / "Training" / "photos-zip" / "7.jpg")
    image(tmp_path / "Validation" / "7.jpg")  # the other side never counts
    assert found(tmp_path, path) == expected
    other = label(tmp_path / "labels-zip" / "9.json", 9)
    beside = image(tmp_path / "photos-zip" / "9.jpg")
    assert found(tmp_path, other) == beside
    image(tmp_path / "Training" / "more" / "7.jpg")
    assert found(tmp_path, path) is None


def test_stem_first_then_id_then_file_name(tmp_path: Path) -> None:
    path = label(tmp_path / "a.json", 7, "shop (3).jpg")
    by_name = image(tmp_path / "shop (3).jpg")
    assert found(tmp_path, path) == by_name
    by_id = image(tmp_path / "7.jpg")
    assert found(tmp_path, path) == by_id
    by_stem = image(tmp_path / "a.jpg")
    assert found(tmp_path, path) == by_stem


def test_a_name_never_leads_to_another_labels_photo(tmp_path: Path) -> None:
    path = label(tmp_path / "7.json", 7, "8.jpg")  # the shop's name, by chance the id of another photo
    label(tmp_path / "8.json", 8)
    image(tmp_path / "8.jpg")
    assert found(tmp_path, path) is None


def test_images_of_one_name_with_two_suffixes(tmp_path: Path) -> None:
    label(tmp_path / "labels" / "7.json")
    image(tmp_path / "images" / "7.JPG")
    image(tmp_path / "images" / "7.jpg")
    assert pairing(tmp_path).image_of == {"labels/7.json": "images/7.JPG"}
    assert pairing(tmp_path).alike == {"images/7.jpg": "images/7.JPG"}


def test_several_labels_of_one_photograph(tmp_path: Path) -> None:
    for number in (1, 2):
        label(tmp_path / "labels" / f"7_{number}.json", 7)
    image(tmp_path / "images" / "7.jpg")
    assert pairing(tmp_path).photos() == [("images/7.jpg", ["labels/7_1.json", "labels/7_2.json"])]


def _as_cp949(name: str) -> str:
    return os.fsdecode(name.encode("cp949"))


def _as_cp437(name: str) -> str:
    """As an unpacker writes it that takes cp949 for cp437."""
    return name.encode("cp949").decode("cp437")


@pytest.mark.parametrize(
    "written", [lambda name: unicodedata.normalize("NFD", name), _as_cp949, _as_cp437], ids=["NFD", "cp949", "cp437"]
)
def test_names_in_two_encodings(tmp_path: Path, written: Callable[[str], str]) -> None:
    path = label(tmp_path / "라벨링데이터" / "레트로" / "셔츠 1.json")
    expected = image(tmp_path / written("원천데이터") / written("레트로") / f"{written('셔츠 1')}.jpg")
    image(tmp_path / "원천데이터" / "모던" / "셔츠 1.jpg")
    assert found(tmp_path, path) == expected
    assert readable_name(written("원천데이터/레트로")) == "원천데이터/레트로"


@pytest.mark.parametrize("name", ["IMG_1", "crème brûlée", "Ærø", "写真一", "Straße", "éé"])
def test_other_names_stay_as_they_are(name: str) -> None:
    assert readable_name(name) == name


def test_bytes_of_no_known_encoding_are_shown() -> None:
    assert readable_name(os.fsdecode(b"a\xff\xfe")) == "a\\xff\\xfe"


@pytest.mark.parametrize("around", ["", "K-Fashion 이미지/", "01.데이터/K-Fashion/"])
@pytest.mark.parametrize("names", [("Training", "Validation"), ("train", "val"), ("1.Training", "2.Validation")])
def test_the_split_of_a_delivery(tmp_path: Path, around: str, names: tuple[str, str]) -> None:
    for name in names:
        image(tmp_path / around / name / "images" / "1.jpg")
    sides = source_sides(tmp_path)
    assert sides == {f"{around}{names[0]}": "train", f"{around}{names[1]}": "validation"}
    assert side_of(f"{around}{names[1]}/images/1.jpg", sides) == "validation"
    assert side_of("notes.txt", sides) is None


def test_one_side_alone_is_no_split(tmp_path: Path) -> None:
    image(tmp_path / "train" / "1.jpg")
    assert source_sides(tmp_path) == {}


def test_scan_is_sorted_and_ignores_hidden_files(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        label(tmp_path / f"{name}.json")
    label(tmp_path / "._a.json")
    image(tmp_path / "__MACOSX" / ".a.jpg")
    folder = scan(tmp_path)
    assert folder.labels == ("a.json", "b.json", "c.json")
    assert folder.images == ()


def test_work_grows_as_the_files_do(tmp_path: Path) -> None:
    """Function calls for four times the delivery are four times as many, not sixteen."""

    def calls(photos: int) -> int:
        root = delivery(tmp_path / str(photos), photos=photos)
        folder, count = scan(root), 0

        def trace(*_: object) -> None:
            nonlocal count
            count += 1

        sys.setprofile(trace)
        try:
            pair_files(folder, lambda name: ())
        finally:
            sys.setprofile(None)
        return count

    assert calls(40) < 5 * calls(10)
