"""Real deliveries: what repeats, contradicts or is missing in them is counted by kind, with examples, and none of it is lost."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from engine.commands.data import app
from engine.data.pairs import load_image, load_pairs
from engine.data.prepare import PrepareReport, prepare
from engine.data.sources import PrepareOptions
from engine.errors import InputError
from tests.deliveries import STYLES, delivery, label_path, photo_path, write_label
from tests.label_trees import BOX, TOP, photo

BLACK = {**TOP, "색상": "블랙"}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return delivery(tmp_path / "source")


def run(source: Path, **options: Any) -> PrepareReport:
    sizes: dict[str, Any] = {"image_size": 8, "max_bad": 0.5, "validation_fraction": 0}
    return prepare(source, source.parent / "out", PrepareOptions(**(sizes | options)))


def causes(report: PrepareReport) -> dict[str, int]:
    """Set aside, and also each one in set_aside.jsonl with what is used: nothing is lost."""
    assert len(report.skipped) == sum(report.causes.values())
    assert len(load_pairs(report.folder)) == report.used
    files = {path.stem for path in (report.folder / "images").iterdir()}
    assert files == {pair.key for pair in load_pairs(report.folder).all}
    return report.causes


def found(report: PrepareReport) -> dict[str, int]:
    return {kind: examples.count for kind, examples in report.found.items()}


def test_a_whole_delivery(source: Path) -> None:
    """Names repeat between styles and between the sides; each label has the photograph of its own folder."""
    report = run(source)
    assert (report.train, report.validation, report.split) == (6, 2, "source folders")
    assert causes(report) == {}
    assert found(report) == {"repeated_name": 5}
    pairs = {pair.photo: pair for pair in load_pairs(report.folder).all}
    assert sorted(pairs) == [str(number) for number in range(1001, 1009)]
    for style, identifier in zip(STYLES, ("1001", "1004"), strict=True):
        expected = photo(source.parent / "again" / f"{identifier}.png", int(identifier) - 1000)
        write_label(expected.with_suffix(".json"), identifier)
        alone = prepare(expected.parent, source.parent / f"alone-{style}", PrepareOptions(image_size=8, max_bad=1))
        (pair,) = (pair for pair in load_pairs(alone.folder).all if pair.photo == identifier)
        # JPEG and PNG of one noise: near, and far from any other's
        difference = load_image(pair, 8).astype(int) - load_image(pairs[identifier], 8)
        assert abs(difference).mean() < 20, style


def test_a_delivery_in_a_folder_of_its_own(source: Path) -> None:
    (source / "K-Fashion 이미지").mkdir()
    for side in ("Training", "Validation"):
        (source / side).rename(source / "K-Fashion 이미지" / side)
    report = run(source)
    assert (report.train, report.validation, report.split) == (6, 2, "source folders")


def test_labels_that_state_the_name_of_their_photograph(source: Path) -> None:
    for path in list(source.rglob("*.json")):
        path.rename(path.with_name(f"{json.loads(path.read_text())['이미지 정보']['이미지 식별자']}.json"))
    report = run(source)
    assert (report.used, causes(report)) == (8, {})
    assert found(report) == {"repeated_name": 5, "stated_name": 8}


def test_ids_that_repeat(source: Path) -> None:
    """Two photographs, two pairs under two keys."""
    write_label(label_path(source, "(117)IMG_2"), 1001, 상의=[BLACK])
    report = run(source)
    assert (report.used, causes(report), found(report)["repeated_id"]) == (8, {}, 1)
    keys = [pair.key for pair in load_pairs(report.folder).all if pair.photo == "1001"]
    assert len(set(keys)) == 2
    assert all(key.startswith("1001-") for key in keys)


def test_keys_that_would_collide(tmp_path: Path) -> None:
    for number, identifier in enumerate(
        ("写真一", "写真二", "IMG (1)", "IMG [1]", "a b", "a-b", "a/b", "A b", "가" * 82)
    ):
        write_label(tmp_path / "source" / f"{number}.json", identifier)
        photo(tmp_path / "source" / f"{number}.png", number)
    report = run(tmp_path / "source")
    assert (report.used, causes(report)) == (9, {})
    assert len({pair.key.casefold() for pair in load_pairs(report.folder).all}) == 9


def test_exact_duplicates_of_labels(source: Path) -> None:
    """One label is used, its copy in the same folder (which states the photograph's name) is named."""
    original = label_path(source, "(116)IMG_1")
    copy = original.with_name("copy of (116)IMG_1.json")
    shutil.copy(original, copy)
    shutil.move(original, original.with_name("original.json"))
    report = run(source)
    assert (report.used, causes(report), found(report)["several_labels"]) == (8, {"duplicate_label": 1}, 1)
    assert report.bad == 0


def test_copies_of_labels_beside_them(source: Path) -> None:
    """`X (1).json` beside `X.json`: the photograph is the other's, and what the copy says decides what it is."""
    original = label_path(source, "(116)IMG_1")
    path = original.rename(original.with_name("1001.json"))
    photo_path(source, "(116)IMG_1").rename(photo_path(source, "1001"))
    shutil.copy(path, path.with_name("1001 (1).json"))
    write_label(path.with_name("1001 (2).json"), 1001, 상의=[{"색상": "그린"}])
    report = run(source)
    assert (report.used, causes(report)) == (8, {"duplicate_label": 1, "label_without_photo": 1})
    reasons = {item.record.rpartition("/")[2]: item.reason for item in report.skipped}
    assert "says what Training/라벨링데이터/레트로/1001.json says" in reasons["1001 (1).json"]
    assert "has a label file of its own" in reasons["1001 (2).json"]


def test_labels_that_contradict_each_other(source: Path) -> None:
    """Nothing tells which of them is right: neither is used."""
    path = label_path(source, "(116)IMG_1")
    path.unlink()
    for name, top in (("a", TOP), ("b", BLACK)):
        write_label(path.with_name(f"{name}.json"), name, image="(116)IMG_1.jpg", 상의=[top])
    report = run(source)
    assert (report.used, causes(report), report.bad) == (7, {"contradicting_labels": 2}, 2)
    one, two = report.skipped
    assert "a.json: 상의 0 says something else" in two.reason
    assert "b.json: 상의 0 says something else" in one.reason
    with pytest.raises(InputError, match=r"2 of 9 .*contradicting_labels 2"):
        prepare(source, source.parent / "out2", PrepareOptions(image_size=8))


def test_labels_of_different_garments_of_one_photograph(source: Path) -> None:
    path = label_path(source, "(116)IMG_1")
    path.unlink()
    write_label(path.with_name("a.json"), 1, image="(116)IMG_1.jpg", 상의=[TOP])
    write_label(path.with_name("b.json"), 2, image="(116)IMG_1.jpg", 하의=[{"색상": "블랙"}])
    there = {**BOX, "X좌표": 25.0, "가로": 10}
    write_label(path.with_name("c.json"), 3, image="(116)IMG_1.jpg", boxes={"상의": [there]}, 상의=[BLACK])
    report = run(source)
    assert (report.used, causes(report)) == (10, {})


@pytest.mark.parametrize("top", [TOP, BLACK])
def test_photographs_on_both_sides_of_the_split(source: Path, top: dict[str, str]) -> None:
    """Whatever their labels say, the held-out copy alone stays."""
    shutil.copy(photo_path(source, "(116)IMG_1", side="Validation"), photo_path(source, "(116)IMG_1"))
    write_label(label_path(source, "(116)IMG_1"), 1001, 상의=[top])
    report = run(source)
    assert (report.train, report.validation, causes(report)) == (5, 2, {"in_both_splits": 1})
    (item,) = report.skipped
    assert item.record == "Training/라벨링데이터/레트로/(116)IMG_1.json: 상의 0"
    assert "Validation/라벨링데이터" in item.reason


def test_photographs_that_are_there_twice(source: Path) -> None:
    """In two styles of one side: once if the labels agree, not at all if they contradict each other."""
    for name, top in (("(116)IMG_1", TOP), ("(117)IMG_2", BLACK)):
        shutil.copy(photo_path(source, name), photo_path(source, name, style=STYLES[1]))
        write_label(label_path(source, name), f"{name}-0", 상의=[TOP])
        write_label(label_path(source, name, style=STYLES[1]), f"{name}-1", 상의=[top])
    assert causes(run(source)) == {"contradicting_labels": 2, "duplicate_photo": 1}


def test_equal_photographs_stay_on_one_side_without_a_split(tmp_path: Path) -> None:
    for number in range(40):
        path = photo(tmp_path / "source" / f"{number}.png", number // 2)
        path.with_suffix(".txt").write_text(f"caption {number}", encoding="utf-8")
    report = run(tmp_path / "source", validation_fraction=0.5)
    assert report.used == 40
    splits: dict[str, set[str]] = {}
    for pair in load_pairs(report.folder).all:
        splits.setdefault(str(int(pair.key) // 2), set()).add(pair.split)
    assert all(len(sides) == 1 for sides in splits.values())
    assert report.validation > 0


def test_far_more_labels_than_photographs(source: Path) -> None:
    """Photographs that were not delivered are counted, and are no fault."""
    for number in range(60):
        write_label(label_path(source, f"({number})IMG_{number}", style="스포티"), 5000 + number)
    report = run(source, max_bad=0.0)
    assert (report.used, causes(report), report.bad) == (8, {"label_without_photo": 60}, 0)
    tree = json.loads((report.folder / "report.json").read_text(encoding="utf-8"))
    assert tree["set_aside"] == {"label_without_photo": 60}
    assert len(tree["examples"]["label_without_photo"]) == 20
    assert len((report.folder / "set_aside.jsonl").read_text(encoding="utf-8").splitlines()) == 60


def test_suffixes_in_both_cases(source: Path) -> None:
    path = photo_path(source, "(116)IMG_1")
    path.rename(path.with_suffix(".JPG"))
    shutil.copy(photo_path(source, "(117)IMG_2"), photo_path(source, "(117)IMG_2", suffix=".JPEG"))
    report = run(source)
    assert (report.used, causes(report)) == (8, {"equal_stems": 1})
    assert {name: report.notes[name] for name in report.notes if name.startswith("image")} == {
        "image files: *.JPEG": 1,
        "image files: *.JPG": 1,
        "image files: *.jpg": 7,
    }


def test_names_in_cp949(source: Path) -> None:
    """As some unpackers leave a whole delivery: read, with names that people can read in all reports."""
    for folder, folders, files in os.walk(source, topdown=False):
        for name in (*folders, *files):
            raw = os.fsdecode(name.replace("IMG", "셔츠").encode("cp949"))
            os.rename(os.path.join(folder, name), os.path.join(folder, raw))
    for path in source.rglob("*.json"):
        tree = json.loads(path.read_text(encoding="utf-8"))
        del tree["이미지 정보"]["이미지 식별자"]  # the file's name stands in for it
        path.write_text(json.dumps(tree, ensure_ascii=False), encoding="utf-8")
    write_label(label_path(source, "없음", style="스포티"), 7)
    report = run(source)
    assert (report.used, report.validation, causes(report)) == (8, 2, {"label_without_photo": 1})
    assert {pair.photo for pair in load_pairs(report.folder).all} == {"(116)셔츠_1", "(117)셔츠_2", "(118)셔츠_3"}
    assert "Training/원천데이터/레트로/(117)셔츠_2" in str(report.to_json()["found"]["repeated_name"])


def test_archives_are_named_with_the_remedy(source: Path, tmp_path: Path) -> None:
    (source / "Training" / "[원천]스포티.zip").write_bytes(b"PK")
    report = run(source)
    ((record, reason),) = report.found["archive_not_read"].first
    assert record == "Training/[원천]스포티.zip"
    assert "unzip -O cp949 '[원천]스포티.zip' -d '[원천]스포티'" in reason
    shutil.rmtree(source / "Training" / "원천데이터")
    shutil.rmtree(source / "Validation")
    with pytest.raises(
        InputError, match=r"nothing to train on \(label_without_photo 6\): .*원천\]스포티.zip is an archive: .*unzip"
    ):
        prepare(source, tmp_path / "out3")
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "[라벨]레트로.zip").write_bytes(b"PK")
    with pytest.raises(InputError, match=r"1 archives, .*unzip -O cp949 '\[라벨\]레트로.zip'"):
        prepare(tmp_path / "packed", tmp_path / "out2")


def test_each_kind_is_on_the_screen(source: Path, tmp_path: Path) -> None:
    write_label(label_path(source, "(117)IMG_2"), 1001, 상의=[BLACK])
    write_label(label_path(source, "IMG_9", style="스포티"), 7)
    shutil.copy(photo_path(source, "(116)IMG_1", side="Validation"), photo_path(source, "(116)IMG_1"))
    (source / "[라벨]모던.zip").write_bytes(b"PK")
    result = CliRunner().invoke(
        app, ["prepare", str(source), str(tmp_path / "out"), "--image-size", "8", "--workers", "1"]
    )
    assert result.exit_code == 0, result.output
    for line in (
        "in_both_splits: 1, the first: Training/라벨링데이터/레트로/(116)IMG_1.json",
        "label_without_photo: 1, the first: Training/라벨링데이터/스포티/IMG_9.json",
        "repeated_id: 1, the first: Training/라벨링데이터/레트로/(117)IMG_2.json",
        "archive_not_read: 1, the first: [라벨]모던.zip",
        "repeated_name: 5",
    ):
        assert line in result.stdout


def test_work_grows_as_the_faults_do(tmp_path: Path) -> None:
    """Function calls for four times as many bad records are four times as many, not sixteen."""

    def calls(count: int) -> int:
        source, number = tmp_path / str(count), 0
        for index in range(count):
            path = photo(source / f"{index}.png", index)
            path.with_suffix(".txt").write_text("옷", encoding="utf-8")
            if index:
                path.write_bytes(b"broken")

        def trace(*_: object) -> None:
            nonlocal number
            number += 1

        sys.setprofile(trace)
        try:
            prepare(source, tmp_path / f"out-{count}", PrepareOptions(image_size=8, max_bad=1, validation_fraction=0))
        finally:
            sys.setprofile(None)
        return number

    calls(3)  # imports
    assert calls(160) < 4.5 * calls(40)
