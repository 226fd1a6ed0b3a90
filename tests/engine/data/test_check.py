import json
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from engine.data import crops
from engine.data.check import DEFECTS, CheckReport, check
from engine.data.prepare import prepare
from engine.data.sources import PrepareOptions
from engine.errors import InputError
from tests.deliveries import delivery, photo_path
from tests.label_trees import BOX, HEIGHT, TOP, WIDTH, label_tree, photo, polygon


def tree(
    identifier: Any,
    box: dict[str, Any] | None = None,
    top: dict[str, Any] | None = None,
    outline: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """A label of one top; `{}` leaves its box or its attributes out."""
    boxes, polygons = {"상의": [BOX if box is None else box]}, {"상의": [outline or {}]}
    return label_tree(identifier, boxes=boxes, polygons=polygons, 상의=[TOP if top is None else top])


def outlined(*points: tuple[float, float]) -> dict[str, Any]:
    return tree(2, outline=polygon(*points))


def write(path: Path, content: Any, encoding: str = "utf-8") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(json.dumps(content, ensure_ascii=False).encode(encoding))


def animation(path: Path) -> None:
    pictures = [Image.new("RGB", (WIDTH, HEIGHT), color) for color in ("red", "blue")]
    pictures[0].save(path, save_all=True, append_images=pictures[1:])


def in_cp949(source: Path) -> None:
    """One label is called 옷, and so is its id; its photo keeps a UTF-8 name."""
    name = "옷".encode("cp949").decode("utf-8", "surrogateescape")
    (source / LABEL).unlink()
    (source / PHOTO).rename(source / "images" / "옷.png")
    write(source / "labels" / f"{name}.json", tree("옷"))


def with_a_line_end(path: Path) -> None:
    path.with_suffix(".txt").unlink()
    path.rename(path.with_name(f"{path.stem}\n{path.suffix}"))


def link_to_nothing(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere.png")


def write_escaped(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))  # what has no encoding stands there as \uD800


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    for identifier in range(1, 5):
        photo(tmp_path / "s" / "images" / f"{identifier}.png", identifier)
        write(tmp_path / "s" / "labels" / f"{identifier}.json", tree(identifier))
    return tmp_path / "s"


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    for seed, name in enumerate("abcd"):
        photo(tmp_path / "p" / f"{name}.png", seed).with_suffix(".txt").write_text("흰 셔츠", encoding="utf-8")
    return tmp_path / "p"


def found(report: CheckReport) -> dict[str, str]:
    return {finding.record: finding.defect for finding in report.findings}


def test_clean_folders_have_no_findings(labelled: Path, plain: Path, tmp_path: Path) -> None:
    report = check(labelled)
    assert (report.form, report.labels, report.images, report.findings) == ("labels", 4, 4, ())
    report = check(plain)
    assert (report.form, report.labels, report.images, report.findings) == ("plain", 4, 4, ())
    prepare(labelled, tmp_path / "out", PrepareOptions(image_size=32, validation_fraction=0))
    assert check(tmp_path / "out").findings == ()


# ---------------------------------------------------------------------- one planted defect, one finding that names it

LABEL, PHOTO = "labels/2.json", "images/2.png"
GARMENT = "labels/2.json: 상의 0"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


LABELLED_DEFECTS: list[tuple[str, str, Callable[[Path], Any]]] = [
    ("empty_file", LABEL, lambda s: (s / LABEL).write_bytes(b"")),
    ("empty_file", PHOTO, lambda s: (s / PHOTO).write_bytes(b"")),
    ("broken_json", LABEL, lambda s: cut(s / LABEL)),
    ("wrong_structure", LABEL, lambda s: write(s / LABEL, {"label": "shirt"})),
    ("wrong_encoding", LABEL, lambda s: write(s / LABEL, tree(2), "cp949")),
    ("replacement_characters", LABEL, lambda s: write(s / LABEL, tree(2, top={"색상": "화\ufffd"}))),
    ("bad_characters", LABEL, lambda s: write_escaped(s / LABEL, tree(2, top={"색상": "화이트\ud800"}))),
    ("bad_characters", LABEL, lambda s: write_escaped(s / LABEL, tree(2, top={"색상": "화이트\0"}))),
    ("broken_json", LABEL, lambda s: (s / LABEL).write_text('{"a": ' + "7" * 5000 + "}")),
    ("name_not_utf8", "labels/\\xbf\\xca.json", lambda s: in_cp949(s)),
    ("label_without_photo", LABEL, lambda s: (s / PHOTO).unlink()),
    ("photo_without_label", PHOTO, lambda s: (s / LABEL).unlink()),
    ("label_without_object", LABEL, lambda s: write(s / LABEL, tree(2, {}, {}))),
    ("broken_box", GARMENT, lambda s: write(s / LABEL, tree(2, {**BOX, "가로": "wide"}))),
    ("broken_box", GARMENT, lambda s: write(s / LABEL, tree(2, {**BOX, "X좌표": float("nan")}))),
    ("negative_box", GARMENT, lambda s: write(s / LABEL, tree(2, {**BOX, "가로": -3}))),
    ("zero_area_box", GARMENT, lambda s: write(s / LABEL, tree(2, {**BOX, "세로": 0}))),
    ("box_outside_image", GARMENT, lambda s: write(s / LABEL, tree(2, {**BOX, "X좌표": 500}))),
    ("size_mismatch", LABEL, lambda s: photo(s / PHOTO, 9, (60, 40))),
    ("not_an_image", PHOTO, lambda s: (s / PHOTO).write_text("<html>404</html>")),
    ("broken_image", PHOTO, lambda s: cut(s / PHOTO)),
    ("object_without_box", GARMENT, lambda s: write(s / LABEL, tree(2, {}))),
    ("object_without_label", GARMENT, lambda s: write(s / LABEL, tree(2, top={}))),
    ("box_over_edge", GARMENT, lambda s: write(s / LABEL, tree(2, {**BOX, "세로": 100}))),
    ("broken_outline", GARMENT, lambda s: write(s / LABEL, tree(2, outline=polygon((4, 6), (24, 36))))),
    ("outline_outside_image", GARMENT, lambda s: write(s / LABEL, outlined((4, 6), (24, 6), (24, 99)))),
    ("zero_area_outline", GARMENT, lambda s: write(s / LABEL, outlined((4, 6), (24, 36), (14, 21)))),
    ("crossed_outline", GARMENT, lambda s: write(s / LABEL, outlined((4, 6), (24, 36), (24, 6), (4, 36)))),
    (
        "long_outline",
        GARMENT,
        lambda s: write(s / LABEL, outlined(*[(4 + n % 20, 6 + n / 400) for n in range(10_001)])),
    ),
    ("outline_off_box", GARMENT, lambda s: write(s / LABEL, outlined((20, 30), (40, 30), (40, 60), (20, 60)))),
    ("unknown_value", LABEL, lambda s: write(s / LABEL, tree(2, top={"색상": "무지개"}))),
    ("unread_content", LABEL, lambda s: write(s / LABEL, tree(2, top={"색상": 3, "핏": "루즈"}))),
    ("id_differs", LABEL, lambda s: write(s / LABEL, tree(77))),
    ("duplicate_image", "images/3.png", lambda s: (s / "images/3.png").write_bytes((s / PHOTO).read_bytes())),
]


@pytest.mark.parametrize(("defect", "record", "plant"), LABELLED_DEFECTS)
def test_planted_label_defects_are_named(
    labelled: Path, defect: str, record: str, plant: Callable[[Path], Any]
) -> None:
    plant(labelled)
    report = check(labelled)
    assert found(report) == {record: defect}  # this record, and no other
    assert bool(report.errors) == (DEFECTS[defect][0] == "error")


def test_sound_outlines_are_no_findings(labelled: Path) -> None:
    write(labelled / LABEL, outlined((4, 6), (24, 7), (23, 36), (5, 35)))
    assert check(labelled).findings == ()


def test_ids_and_names_that_repeat(labelled: Path) -> None:
    write(labelled / "labels" / "5.json", tree(2))
    photo(labelled / "images" / "5.png", 5)
    write(labelled / "more" / "labels" / "3.json", tree(30))  # as its photo does, in a folder of its own
    photo(labelled / "more" / "images" / "3.png", 30)
    photo(labelled / "images" / "1.jpg", 6)
    report = check(labelled)
    details = {(f.record, f.defect): f.detail for f in report.findings}
    assert "labels/2.json" in details["labels/5.json", "duplicate_id"]
    assert "images/1.jpg" in details["images/1.png", "equal_stems"]
    assert {finding.defect for finding in report.errors} == {"equal_stems"}


def test_oversize_image(labelled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crops, "MAX_PIXELS", WIDTH * HEIGHT)  # the header alone decides: see test_crops
    photo(labelled / PHOTO, 9, (WIDTH + 1, HEIGHT))
    assert found(check(labelled)) == {PHOTO: "oversize_image"}


def test_tiny_image(labelled: Path) -> None:
    content = tree(2)
    content["이미지 정보"] |= {"이미지 너비": 20, "이미지 높이": 40}
    write(labelled / LABEL, content)
    photo(labelled / PHOTO, 9, (20, 40))
    assert found(check(labelled))[PHOTO] == "tiny_image"


PLAIN_DEFECTS: list[tuple[str, str, Callable[[Path], Any]]] = [
    ("empty_caption", "b.txt", lambda s: (s / "b.txt").write_text(" \n\n")),
    ("empty_caption", "b.txt", lambda s: (s / "b.txt").write_bytes(b"")),
    ("wrong_encoding", "b.txt", lambda s: (s / "b.txt").write_bytes("흰 셔츠".encode("cp949"))),
    ("replacement_characters", "b.txt", lambda s: (s / "b.txt").write_text("흰 \ufffd", encoding="utf-8")),
    ("bad_characters", "b.txt", lambda s: (s / "b.txt").write_bytes(b"red\0 shirt")),
    ("too_long", "b.txt", lambda s: (s / "b.txt").write_text("red " * 5000)),
    ("too_long", "b.txt", lambda s: (s / "b.txt").write_text("red\n" * 500_000)),
    ("empty_caption", "b.txt", lambda s: (s / "b.txt").write_text("\ufeff\u200b\n\u3164", encoding="utf-8")),
    ("other_form", "b.txt", lambda s: (s / "b.txt").write_text("흰\u00ad 셔츠", encoding="utf-8")),
    ("caption_without_photo", "b.txt", lambda s: (s / "b.png").unlink()),
    ("photo_without_caption", "b.png", lambda s: (s / "b.txt").unlink()),
    ("broken_image", "b.png", lambda s: cut(s / "b.png")),
    ("empty_file", "b.png", lambda s: (s / "b.png").write_bytes(b"")),
    ("transparent_image", "b.png", lambda s: Image.new("RGBA", (WIDTH, HEIGHT)).save(s / "b.png")),
    ("equal_stems", "b.png", lambda s: photo(s / "b.jpg", 8)),
    ("unread_format", "b.heic", lambda s: (s / "b.png").rename(s / "b.heic")),
    ("bad_name", "b\\n.png", lambda s: with_a_line_end(s / "b.png")),
    ("missing_image", "b.png", lambda s: link_to_nothing(s / "b.png")),
    ("animated_image", "b.png", lambda s: animation(s / "b.png")),
    (
        "other_form",
        "b.txt",
        lambda s: (s / "b.txt").write_text(unicodedata.normalize("NFD", "흰 셔츠"), encoding="utf-8"),
    ),
]


@pytest.mark.parametrize(("defect", "record", "plant"), PLAIN_DEFECTS)
def test_planted_caption_defects_are_named(plain: Path, defect: str, record: str, plant: Callable[[Path], Any]) -> None:
    plant(plain)
    assert found(check(plain)) == {record: defect}


def test_same_name_in_two_plain_folders_is_a_warning(plain: Path) -> None:
    photo(plain / "more" / "b.png", 9).with_suffix(".txt").write_text("흰 셔츠", encoding="utf-8")
    report = check(plain)
    assert found(report) == {"more/b.txt": "same_name"}
    assert report.errors == ()


def test_prepared_folder_with_a_missing_image(labelled: Path, tmp_path: Path) -> None:
    prepare(labelled, tmp_path / "out", PrepareOptions(image_size=32, validation_fraction=0))
    (tmp_path / "out" / "images" / "2_top_0.png").unlink()
    assert found(check(tmp_path / "out")) == {
        "pairs.jsonl": "broken_pairs",
        "images/2_top_0.txt": "caption_without_photo",
    }


def test_several_defects_are_counted(labelled: Path) -> None:
    (labelled / "labels" / "1.json").write_text("{")
    (labelled / "images" / "2.png").write_bytes(b"x")
    (labelled / "images" / "3.png").unlink()
    report = check(labelled)
    assert report.counts == {"broken_json": 1, "label_without_photo": 1, "not_an_image": 1}
    assert report.to_json()["errors"] == 3


def test_check_names_photographs_on_both_sides(tmp_path: Path) -> None:
    source = delivery(tmp_path / "s")
    copy = photo_path(source, "(116)IMG_1", side="Validation")
    shutil.copy(photo_path(source, "(117)IMG_2"), copy)
    (found,) = (finding for finding in check(source).errors if finding.defect == "in_both_splits")
    assert found.record == copy.relative_to(source).as_posix()
    assert found.detail == "same as Training/원천데이터/레트로/(117)IMG_2.jpg"


@pytest.mark.parametrize(("colour", "defect"), [("화이트", "duplicate_label"), ("블랙", "contradicting_labels")])
def test_two_labels_of_one_photograph(labelled: Path, colour: str, defect: str) -> None:
    (labelled / LABEL).unlink()
    for name, top in (("2a", TOP), ("2b", {**TOP, "색상": colour})):
        write(labelled / "labels" / f"{name}.json", tree(2, top=top))
    report = check(labelled)
    found = {finding.record for finding in report.findings if finding.defect == defect}
    both = {"labels/2a.json: 상의 0", "labels/2b.json: 상의 0"}
    assert found == (both if defect == "contradicting_labels" else {"labels/2b.json: 상의 0"})
    assert bool(report.errors) == (defect == "contradicting_labels")


def test_copies_of_a_label_beside_it(labelled: Path) -> None:
    write(labelled / "labels" / "2 (1).json", tree(2))
    write(labelled / "labels" / "2 (2).json", tree(2, top={**TOP, "색상": "블랙"}))
    found = {(finding.record, finding.defect) for finding in check(labelled).findings}
    assert ("labels/2 (1).json", "duplicate_label") in found
    assert ("labels/2 (2).json", "label_without_photo") in found


def test_labels_of_equal_photographs_that_contradict_each_other(labelled: Path) -> None:
    (labelled / "images/3.png").write_bytes((labelled / PHOTO).read_bytes())
    write(labelled / "labels" / "3.json", tree(3, top={**TOP, "색상": "블랙"}))
    assert {(finding.record, finding.defect) for finding in check(labelled).findings} == {
        ("images/3.png", "duplicate_image"),
        (GARMENT, "contradicting_labels"),
        ("labels/3.json: 상의 0", "contradicting_labels"),
    }


def test_every_defect_has_a_test() -> None:
    tested = {defect for defect, _, _ in [*LABELLED_DEFECTS, *PLAIN_DEFECTS]}
    tested |= {"duplicate_id", "oversize_image", "tiny_image", "same_name", "broken_pairs", "in_both_splits"}
    tested |= {"contradicting_labels", "duplicate_label"}
    # files that vanish or lose their permissions while they are read: cannot be planted as root
    assert set(DEFECTS) - tested == {"unreadable_label", "unreadable_caption"}


def test_nothing_to_check_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        check(tmp_path / "none")
    with pytest.raises(InputError, match="neither label"):
        check(tmp_path)
