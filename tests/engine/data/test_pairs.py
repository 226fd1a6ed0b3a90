import json
import logging
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from engine.data.pairs import (
    Pair,
    balance_weights,
    known_attributes,
    load_image,
    load_pairs,
    split_of,
)
from engine.errors import InputError


def image(path: Path, size: tuple[int, int] = (8, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(path)
    return path


def plain(folder: Path, *names: str, caption: str = "빨간 옷") -> Path:
    for name in names:
        image(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(caption, encoding="utf-8")
    return folder


def prepared(folder: Path, *lines: Any) -> Path:
    image(folder / "images" / "1_top_0.png")
    image(folder / "images" / "2_top_0.png")
    folder.joinpath("pairs.jsonl").write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines),
        encoding="utf-8",
    )
    return folder


LINE = {
    "key": "1_top_0",
    "image": "images/1_top_0.png",
    "caption": "상의에서 색상은 레드이다.",
    "photo": "1",
    "split": "train",
    "attributes": {"garment": "상의", "색상": "레드", "소재": ["면", "린넨"]},
}
OTHER = {**LINE, "key": "2_top_0", "image": "images/2_top_0.png", "photo": "2", "split": "validation"}


# ---------------------------------------------------------------------------------------------- prepared folders


def test_prepared_folder_keeps_its_split(tmp_path: Path) -> None:
    pairs = load_pairs(prepared(tmp_path, OTHER, "", LINE), validation_fraction=0.9, seed=5)
    assert [pair.key for pair in pairs.all] == ["1_top_0", "2_top_0"]  # sorted, whatever the file's order
    assert [pair.key for pair in pairs.train] == ["1_top_0"]
    assert [pair.key for pair in pairs.validation] == ["2_top_0"]
    first = pairs.train[0]
    assert first.image_path == tmp_path / "images" / "1_top_0.png"
    assert first.captions == ("상의에서 색상은 레드이다.",)
    assert first.attributes == LINE["attributes"]
    assert (first.photo, first.split, len(pairs)) == ("1", "train", 2)
    assert len({pair.key for pair in set(pairs.all)}) == 2  # hashable in spite of its attributes


def test_several_captions(tmp_path: Path) -> None:
    line = {**LINE, "captions": [LINE["caption"], "빨간 셔츠"]}
    assert load_pairs(prepared(tmp_path, line)).train[0].captions == ("상의에서 색상은 레드이다.", "빨간 셔츠")


def test_texts_of_prepared_folders_are_read_in_their_normal_form(tmp_path: Path) -> None:
    nfd = unicodedata.normalize("NFD", "빨간 셔츠")
    line = {**LINE, "caption": f"\u200b{nfd}", "photo": unicodedata.normalize("NFD", "옷"), "attributes": {nfd: [nfd]}}
    pair = load_pairs(prepared(tmp_path / "a", line)).train[0]
    assert (pair.captions, pair.photo, pair.attributes) == (("빨간 셔츠",), "옷", {"빨간 셔츠": ["빨간 셔츠"]})
    with_mark = prepared(tmp_path / "b", OTHER, LINE) / "pairs.jsonl"
    with_mark.write_text("\ufeff" + with_mark.read_text(encoding="utf-8").replace("\n", "\r\n"), encoding="utf-8")
    assert len(load_pairs(tmp_path / "b")) == 2


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({**LINE, "caption": "a\0"}, "control character"),
        (json.dumps({**LINE, "caption": "a\ud800"}), "half a character"),
        ({**LINE, "caption": "\u200b"}, "no text under `caption`"),
        ({**LINE, "captions": [LINE["caption"], "\u2800"]}, "nothing is visible"),
        ('{"n": ' + "1" * 5000 + "}", "not JSON"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_texts_that_are_none_are_named_with_their_line(tmp_path: Path, line: Any, reason: str) -> None:
    with pytest.raises(InputError, match=f"pairs.jsonl:2: .*{reason}"):
        load_pairs(prepared(tmp_path, OTHER, line))


def test_line_separators_inside_captions_do_not_split_lines(tmp_path: Path) -> None:
    assert load_pairs(prepared(tmp_path, {**LINE, "caption": "a\u2028b"})).train[0].captions == ("a b",)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"image": "images/none.png"}, "none.png"),
        ({"image": "elsewhere/none.png"}, "none.png"),
        ({"image": "../1.png"}, "outside"),
        ({"image": "/etc/1.png"}, "outside"),
        ({"caption": " "}, "caption"),
        ({"caption": None}, "caption"),
        ({"split": "test"}, "test"),
        ({"captions": []}, "captions"),
        ({"captions": ["another"]}, "captions"),
        ({"attributes": {"색상": 3}}, "attributes"),
        ({"attributes": []}, "attributes"),
        ({"key": 1}, "key"),
    ],
)
def test_faulty_lines_are_named(tmp_path: Path, change: dict[str, Any], word: str) -> None:
    folder = prepared(tmp_path, OTHER, {**LINE, **change})
    with pytest.raises(InputError, match=word) as caught:
        load_pairs(folder)
    assert "pairs.jsonl:2" in str(caught.value)


@pytest.mark.parametrize("line", ["{", "[]", "\ufffd"])
def test_lines_that_are_no_objects(tmp_path: Path, line: str) -> None:
    with pytest.raises(InputError, match=r"pairs\.jsonl:1"):
        load_pairs(prepared(tmp_path, line))


def test_key_given_twice_and_wrong_encoding(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="twice"):
        load_pairs(prepared(tmp_path, LINE, LINE))
    (tmp_path / "pairs.jsonl").write_bytes("상의".encode("cp949"))
    with pytest.raises(InputError, match="UTF-8"):
        load_pairs(tmp_path)


def test_empty_and_all_validation(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no pairs"):
        load_pairs(prepared(tmp_path))
    with pytest.raises(InputError, match="none is left to train on"):
        load_pairs(prepared(tmp_path, OTHER))


# ------------------------------------------------------------------------------------------------- plain folders


def test_plain_folder_is_recursive_and_keys_keep_equal_stems_apart(tmp_path: Path) -> None:
    pairs = load_pairs(plain(tmp_path, "a/x", "b/x", "y"), validation_fraction=0)
    assert [pair.key for pair in pairs.all] == ["a/x", "b/x", "y"]
    assert [pair.photo for pair in pairs.all] == ["x", "x", "y"]  # one photo name, one side
    assert pairs.all[0].attributes == {}


def test_plain_captions_keep_all_lines(tmp_path: Path) -> None:
    pairs = load_pairs(plain(tmp_path, "x", caption="\ufeff하나\n\n 둘 \r\n"), validation_fraction=0)
    assert pairs.all[0].captions == ("하나", "둘")


def test_plain_folder_with_its_own_split(tmp_path: Path) -> None:
    pairs = load_pairs(plain(tmp_path, "train/x", "train/y", "val/z"), validation_fraction=0.9)
    assert [pair.key for pair in pairs.validation] == ["val/z"]


def test_few_unusable_files_are_set_aside_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain(tmp_path, *map(str, range(80)))
    (tmp_path / "README.txt").write_text("read me")
    image(tmp_path / "cover.jpg")
    (tmp_path / "7.txt").write_text(" \n")
    image(tmp_path / "8.jpg")
    with caplog.at_level(logging.WARNING):
        pairs = load_pairs(tmp_path, validation_fraction=0.1)
    assert sorted(name for name, _ in pairs.set_aside) == ["7.txt", "8.png", "README.txt", "cover.jpg"]
    assert len(pairs) == 79
    assert "4 of 83" in caplog.text


def test_many_unusable_files_stop(tmp_path: Path) -> None:
    plain(tmp_path, "a", "b")
    (tmp_path / "b.txt").write_bytes("빨강".encode("cp949"))
    with pytest.raises(InputError, match="UTF-8"):
        load_pairs(tmp_path)


def test_no_folder_and_nothing_in_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        load_pairs(tmp_path / "none")
    with pytest.raises(InputError, match="no pairs"):
        load_pairs(tmp_path)


# -------------------------------------------------------------------------------------------------------- split


@settings(max_examples=60, deadline=None)
@given(st.text(), st.floats(0, 0.99), st.floats(0, 0.99), st.integers(0, 99))
def test_a_larger_fraction_only_adds_to_validation(photo: str, one: float, other: float, seed: int) -> None:
    small, large = sorted((one, other))
    assert split_of(photo, 0, seed) == "train"
    if split_of(photo, small, seed) == "validation":
        assert split_of(photo, large, seed) == "validation"


def test_split_is_fixed_for_all_time_and_near_its_fraction() -> None:
    assert [split_of(str(n), 0.3, 42) for n in range(6)] == [split_of(str(n), 0.3, 42) for n in range(6)]
    held = sum(split_of(str(n), 0.1, 42) == "validation" for n in range(10_000))
    assert abs(held - 1000) < 120  # four standard deviations
    other = sum(split_of(str(n), 0.1, 42) != split_of(str(n), 0.1, 43) for n in range(10_000))
    assert abs(other - 1800) < 160  # 2 * 0.1 * 0.9: seeds are independent


# ------------------------------------------------------------------------------------------------------ weights


def pairs_of(*values: Any) -> list[Pair]:
    return [
        Pair(str(n), Path("x"), ("c",), str(n), "train", {} if value is None else {"색상": value})
        for n, value in enumerate(values)
    ]


def test_balance_is_inverse_square_root_with_mean_one() -> None:
    weights = balance_weights(pairs_of("a", "a", "a", "a", "b"), "색상")
    assert weights[4] / weights[0] == pytest.approx(2)  # sqrt(4 / 1)
    assert sum(weights) / 5 == pytest.approx(1)


def test_full_inverse_weighs_classes_equally() -> None:
    weights = balance_weights(pairs_of("a", "a", "a", "b", None, None), "색상", inverse="full")
    assert sum(weights[:3]) == pytest.approx(weights[3])
    assert sum(weights[4:]) == pytest.approx(weights[3])  # missing is a class of its own


def test_lists_are_classes_and_equal_counts_weigh_alike() -> None:
    assert balance_weights(pairs_of(["x", "y"], ["x"], "x", ["x", "y"]), "색상") == pytest.approx([1.0] * 4)


def test_unknown_attribute_is_an_input_error() -> None:
    with pytest.raises(InputError, match="색상"):
        balance_weights(pairs_of("a"), "카테고리")


# -------------------------------------------------------------------------------------------------------- images


def test_load_image_as_stored_and_resized(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    pair = Pair("x", tmp_path / "x.png", ("c",), "x", "train")
    assert np.array_equal(load_image(pair, 8), pixels)
    resized = load_image(pair, 5)
    assert (resized.shape, resized.dtype) == ((5, 5, 3), np.dtype(np.uint8))
    resized[0, 0] = 0  # writable


def test_load_image_names_a_broken_file(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"\x89PNG")
    with pytest.raises(InputError, match=r"x\.png"):
        load_image(Pair("x", tmp_path / "x.png", ("c",), "x", "train"), 8)


def test_known_attributes_are_counted_by_subject() -> None:
    def pair(key: str, **attributes: str | list[str]) -> Pair:
        return Pair(key, Path(key), ("상의에서 색상은 레드이다.",), key, "train", attributes)

    some = [
        pair("a", garment="상의", 색상="레드", 소재=["면", "린넨"]),
        pair("b", garment="상의", 색상="블랙", 소재=["린넨"]),
        pair("c", garment="상의", 색상="블랙"),
        pair("d", garment="하의", 색상="레드"),
        pair("e", 색상="블루"),
    ]
    assert known_attributes(some) == {
        "상의": {"색상": ["블랙", "레드"], "소재": ["린넨", "면"]},
        "하의": {"색상": ["레드"]},
    }
    assert list(known_attributes(some)) == ["상의", "하의"]
    assert known_attributes(some[4:]) == {}


def test_no_attributes_are_known_without_a_caption_grammar() -> None:
    assert known_attributes(pairs_of("레드", "블루")) == {}
