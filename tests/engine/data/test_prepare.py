import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engine.data.kfashion.label_format import KFashionLabels
from engine.data.kfashion.labels import GARMENT_TYPES
from engine.data.pairs import load_image, load_pairs, split_of
from engine.data.prepare import PrepareReport, prepare
from engine.data.sources import PrepareOptions
from engine.errors import InputError
from tests.label_trees import BOX, HEIGHT, TOP, WIDTH, label_tree, photo


def add(root: Path, identifier: Any, content: dict[str, Any] | None = None) -> Path:
    """One good record (or `content`) with its photo; returns the label's path."""
    content = content or label_tree(identifier, boxes={"상의": [BOX]}, 상의=[TOP])
    photo(root / "images" / f"{identifier}.png", int(identifier))
    path = root / "labels" / f"{identifier}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for identifier in range(100, 125):
        add(tmp_path / "source", identifier)
    return tmp_path / "source"


def files_of(folder: Path) -> dict[str, bytes]:
    """All files but the log, which has the time in it."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "prepare.log")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def causes(report: PrepareReport) -> dict[str, str]:
    return {item.record: item.cause for item in report.skipped}


def nothing_left(tmp_path: Path) -> bool:
    return [path.name for path in tmp_path.iterdir()] == ["source"]


# ------------------------------------------------------------------------------------------------- what is written


def test_the_prepared_folder_is_what_load_pairs_reads(source: Path, tmp_path: Path) -> None:
    report = prepare(source, tmp_path / "out", PrepareOptions(image_size=16, validation_fraction=0.3))
    pairs = load_pairs(tmp_path / "out")
    assert report.records == report.used == len(pairs) == 25
    assert (report.train, report.validation) == (len(pairs.train), len(pairs.validation))
    first = pairs.all[0]
    assert first.key == "100_top_0"
    assert first.captions == ("상의에서 색상은 화이트이다. 상의에서 카테고리는 티셔츠이다.",)
    assert first.attributes == {"garment": "상의", "색상": "화이트", "카테고리": "티셔츠"}
    with Image.open(source / "images" / "100.png") as image:
        expected = image.crop((4, 6, 24, 36)).resize((16, 16), Image.Resampling.LANCZOS)
    assert np.array_equal(load_image(first, 16), np.asarray(expected))
    assert all(pair.split == split_of(pair.photo, 0.3, 42) for pair in pairs.all)


def test_images_folder_is_a_plain_folder_too(source: Path, tmp_path: Path) -> None:
    prepare(source, tmp_path / "out", PrepareOptions(image_size=16))
    plain, full = load_pairs(tmp_path / "out" / "images", validation_fraction=0), load_pairs(tmp_path / "out")
    assert [(pair.key, pair.captions) for pair in plain.all] == [(pair.key, pair.captions) for pair in full.all]


def test_report_on_disk(source: Path, tmp_path: Path) -> None:
    report = prepare(source, tmp_path / "out", PrepareOptions(image_size=16, seed=7))
    written = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(report.to_json()))
    assert written["format_version"] == 1
    assert written["options"]["seed"] == 7
    assert written["options"]["list_values"] == "all"  # of the label format


@pytest.mark.slow
def test_same_bytes_with_any_number_of_workers(source: Path, tmp_path: Path) -> None:
    (source / "images" / "107.png").write_bytes(b"broken")
    prepare(source, tmp_path / "one", PrepareOptions(image_size=16), workers=1)
    prepare(source, tmp_path / "two", PrepareOptions(image_size=16), workers=2)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_all_crops_of_a_photo_are_on_one_side(tmp_path: Path) -> None:
    for identifier in range(100, 130):
        boxes = {"상의": [BOX, BOX], "하의": [BOX]}
        add(tmp_path / "s", identifier, label_tree(identifier, boxes=boxes, 상의=[TOP, TOP], 하의=[{"색상": "블랙"}]))
    prepare(tmp_path / "s", tmp_path / "out", PrepareOptions(image_size=8, validation_fraction=0.5))
    pairs = load_pairs(tmp_path / "out")
    assert len(pairs) == 90
    assert pairs.validation
    assert not {pair.photo for pair in pairs.train} & {pair.photo for pair in pairs.validation}
    assert [pair.key for pair in pairs.all[:3]] == ["100_bottom_0", "100_top_0", "100_top_1"]


@pytest.mark.parametrize("names", [("train", "validation"), ("Training", "Validation")])
def test_the_sources_own_split_is_taken(tmp_path: Path, names: tuple[str, str]) -> None:
    add(tmp_path / "s" / names[0], 1)
    add(tmp_path / "s" / names[0], 2)
    add(tmp_path / "s" / names[1], 3)
    report = prepare(tmp_path / "s", tmp_path / "out", PrepareOptions(image_size=8, validation_fraction=0.99))
    assert (report.train, report.validation, report.split) == (2, 1, "source folders")
    assert load_pairs(tmp_path / "out").validation[0].photo == "3"


# ---------------------------------------------------------------------------------------------------------- options


def one(tmp_path: Path, **labelling: Any) -> Path:
    boxes = {name: [BOX] for name in labelling if name in GARMENT_TYPES}
    add(tmp_path / "source", 1, label_tree(1, boxes=boxes, **labelling))
    return tmp_path / "source"


def first_caption(folder: Path) -> str:
    return load_pairs(folder).all[0].captions[0]


def test_caption_options(tmp_path: Path) -> None:
    source = one(tmp_path, 스타일=[{"스타일": "모던"}], 상의=[{**TOP, "소재": ["면", "린넨"]}], 하의=[{"색상": "블랙"}])
    prepare(source, tmp_path / "a", PrepareOptions(image_size=8, validation_fraction=0))
    assert first_caption(tmp_path / "a") == "하의에서 색상은 블랙이다."
    prepare(
        source,
        tmp_path / "b",
        PrepareOptions(image_size=8, validation_fraction=0, label_format=KFashionLabels(style=True)),
    )
    assert first_caption(tmp_path / "b") == "스타일에서 스타일은 모던이다. 하의에서 색상은 블랙이다."
    options = PrepareOptions(
        image_size=8,
        validation_fraction=0,
        label_format=KFashionLabels(caption_scope="photo", subject_once=True, list_values="first"),
    )
    prepare(source, tmp_path / "c", options)
    whole = "하의에서 색상은 블랙이다. 상의에서 색상은 화이트이다. 카테고리는 티셔츠이다. 소재에는 면이다."
    assert {pair.captions for pair in load_pairs(tmp_path / "c").all} == {(whole,)}


def test_image_options(tmp_path: Path) -> None:
    source = one(tmp_path, 상의=[TOP])
    prepare(source, tmp_path / "jpg", PrepareOptions(image_size=24, image_format="jpg", validation_fraction=0))
    path = load_pairs(tmp_path / "jpg").all[0].image_path
    assert path.suffix == ".jpg"
    with Image.open(path) as image:
        assert (image.format, image.size) == ("JPEG", (24, 24))
    seen = {
        "plain": {},
        "aspect": {"keep_aspect": True},
        "margin": {"box_margin": 0.2},
        "center": {"box_origin": "center"},
    }
    pixels = []
    for name, options in seen.items():
        prepare(source, tmp_path / name, PrepareOptions(image_size=8, validation_fraction=0, **options))  # type: ignore[arg-type]
        pixels.append(load_image(load_pairs(tmp_path / name).all[0], 8).tobytes())
    assert len(set(pixels)) == 4


def test_photos_resized_after_labelling(tmp_path: Path) -> None:
    source = one(tmp_path, 상의=[TOP])
    half = tmp_path / "half"
    add(half, 1)
    with Image.open(source / "images" / "1.png") as image:
        image.resize((WIDTH * 2, HEIGHT * 2), Image.Resampling.NEAREST).save(half / "images" / "1.png")
    with pytest.raises(InputError, match="scale_boxes"):
        prepare(half, tmp_path / "x", PrepareOptions(image_size=8))
    prepare(half, tmp_path / "b", PrepareOptions(image_size=20, validation_fraction=0, scale_boxes=True))
    prepare(source, tmp_path / "a", PrepareOptions(image_size=20, validation_fraction=0))
    a, b = (load_image(load_pairs(tmp_path / name).all[0], 20).astype(float) for name in "ab")
    assert np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.9  # the same piece of the photo


@pytest.mark.parametrize(
    "options",
    [
        {"image_size": 4},
        {"image_size": 10_000},
        {"box_margin": -0.1},
        {"validation_fraction": 1.0},
        {"max_bad": 1.5},
    ],
)
def test_options_out_of_range_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        PrepareOptions(**options)


def test_no_options_are_the_defaults(source: Path, tmp_path: Path) -> None:
    assert prepare(source, tmp_path / "out").options == PrepareOptions()


def test_no_workers_is_an_input_error(source: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="workers"):
        prepare(source, tmp_path / "out", workers=0)
    assert nothing_left(tmp_path)


def test_odd_photo_ids_make_safe_file_names(tmp_path: Path) -> None:
    content = label_tree("../../etc/x y", boxes={"상의": [BOX]}, 상의=[TOP])
    add(tmp_path / "source", 1, content)
    prepare(tmp_path / "source", tmp_path / "out", PrepareOptions(image_size=8, validation_fraction=0))
    (pair,) = load_pairs(tmp_path / "out").all
    assert "/" not in pair.key
    assert pair.image_path.parent == tmp_path / "out" / "images"
    assert pair.photo == "../../etc/x y"


# ----------------------------------------------------------------------------------------------------------- faults


def test_every_record_is_used_or_named(source: Path, tmp_path: Path) -> None:
    (source / "images" / "100.png").write_bytes((source / "images" / "100.png").read_bytes()[:500])
    (source / "labels" / "101.json").write_text("{")
    (source / "images" / "102.png").unlink()
    (source / "labels" / "103.json").unlink()
    add(source, 104, label_tree(105, boxes={"상의": [BOX]}, 상의=[TOP]))
    add(source, 106, label_tree(106, boxes={"상의": [{**BOX, "가로": 0}]}, 상의=[TOP]))
    add(source, 107, label_tree(107, boxes={"상의": [{"X좌표": 1}]}, 상의=[TOP]))
    add(source, 108, label_tree(108, boxes={}))
    add(source, 109, label_tree(109, boxes={"상의": [BOX]}))
    add(source, 110, label_tree(110, boxes={}, 상의=[TOP]))
    photo(source / "images" / "111.png", 0, (9, 9))
    (source / "notes.md").write_text("about")
    report = prepare(source, tmp_path / "out", PrepareOptions(image_size=8, max_bad=0.5))
    assert causes(report) == {
        "labels/100.json: 상의 0": "broken_image",
        "labels/101.json": "broken_json",
        "labels/102.json": "label_without_photo",
        "images/103.png": "photo_without_label",
        "labels/106.json: 상의 0": "bad_box",
        "labels/107.json: 상의 0": "bad_box",
        "labels/108.json": "label_without_object",
        "labels/109.json: 상의 0": "object_without_label",
        "labels/110.json: 상의 0": "object_without_box",
        "labels/111.json: 상의 0": "size_mismatch",
    }
    assert report.records == 25
    assert report.used + len(report.skipped) == report.records
    assert report.bad == 6  # four causes are normal in incomplete labels
    assert report.notes["ignored files: *.md"] == 1
    assert len(load_pairs(tmp_path / "out")) == report.used


def test_a_few_broken_images_do_not_stop_the_run(source: Path, tmp_path: Path) -> None:
    (source / "images" / "112.png").write_bytes(b"")
    report = prepare(source, tmp_path / "out", PrepareOptions(image_size=8))
    assert causes(report) == {"labels/112.json: 상의 0": "empty_file"}
    assert report.used == 24


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_strict_stops_at_the_first_fault_and_leaves_nothing(source: Path, tmp_path: Path, workers: int) -> None:
    (source / "images" / "112.png").write_bytes(b"")
    with pytest.raises(InputError, match="112"):
        prepare(source, tmp_path / "out", PrepareOptions(image_size=8), strict=True, workers=workers)
    assert nothing_left(tmp_path)


def test_strict_takes_what_is_normal(source: Path, tmp_path: Path) -> None:
    add(source, 109, label_tree(109, boxes={"상의": [BOX]}))
    assert prepare(source, tmp_path / "out", PrepareOptions(image_size=8), strict=True).used == 24


def test_too_many_faults_stop_and_leave_nothing(source: Path, tmp_path: Path) -> None:
    for identifier in (101, 102):
        (source / "images" / f"{identifier}.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"2 of 25.*empty_file 2.*101"):
        prepare(source, tmp_path / "out", PrepareOptions(image_size=8))
    assert nothing_left(tmp_path)
    assert prepare(source, tmp_path / "out", PrepareOptions(image_size=8, max_bad=0.08)).used == 23


def test_places(source: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        prepare(source, tmp_path / "full")
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine"
    with pytest.raises(InputError, match="inside the source"):
        prepare(source, source / "out")
    with pytest.raises(InputError, match="no such folder"):
        prepare(tmp_path / "none", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="neither label"):
        prepare(tmp_path / "empty", tmp_path / "out")
    prepare(source, tmp_path / "out", PrepareOptions(image_size=8))
    with pytest.raises(InputError, match="prepared folder already"):
        prepare(tmp_path / "out", tmp_path / "out2")


def test_nothing_usable_is_an_input_error(tmp_path: Path) -> None:
    add(tmp_path / "source", 1, label_tree(1, boxes={}))
    with pytest.raises(InputError, match="label_without_object 1"):
        prepare(tmp_path / "source", tmp_path / "out")
    assert nothing_left(tmp_path)


# ----------------------------------------------------------------------------------------------------- plain sources


def test_plain_source(tmp_path: Path) -> None:
    for seed, name in enumerate(("a/x", "b/x", "y")):
        path = photo(tmp_path / "source" / f"{name}.png", seed)
        path.with_suffix(".txt").write_text(
            "빨간 옷\n\n붉은 스타일 옷. 하나\n" if name == "y" else "옷", encoding="utf-8"
        )
    report = prepare(tmp_path / "source", tmp_path / "out", PrepareOptions(image_size=16, validation_fraction=0))
    assert (report.form, report.used, report.skipped) == ("plain", 3, ())
    pairs = load_pairs(tmp_path / "out")
    assert [pair.key for pair in pairs.all] == ["a/x", "b/x", "y"]
    assert pairs.all[2].captions == ("빨간 옷", "붉은 스타일 옷. 하나")  # as they stand
    assert pairs.all[2].attributes == {}
    line = json.loads((tmp_path / "out" / "pairs.jsonl").read_text(encoding="utf-8").splitlines()[2])
    assert (line["caption"], line["captions"]) == ("빨간 옷", ["빨간 옷", "붉은 스타일 옷. 하나"])
    assert load_image(pairs.all[0], 16).shape == (16, 16, 3)


def test_plain_faults_are_named(tmp_path: Path) -> None:
    for seed, name in enumerate("abcdefgh"):
        photo(tmp_path / "source" / f"{name}.png", seed).with_suffix(".txt").write_text("옷", encoding="utf-8")
    source = tmp_path / "source"
    (source / "a.txt").write_text("\n")
    (source / "b.txt").write_bytes("빨강".encode("cp949"))
    (source / "c.txt").unlink()
    (source / "d.png").unlink()
    (source / "e.png").write_bytes(b"x")
    (source / "f.txt").write_text("빨\ufffd", encoding="utf-8")
    report = prepare(source, tmp_path / "out", PrepareOptions(image_size=8, max_bad=1, validation_fraction=0))
    assert causes(report) == {
        "a.png": "empty_caption",
        "b.png": "wrong_encoding",
        "c.png": "photo_without_caption",
        "d.txt": "caption_without_photo",
        "e.png": "not_an_image",
        "f.png": "replacement_characters",
    }
    assert report.records == 8
