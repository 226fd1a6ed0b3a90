import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engine import cli
from engine.commands.error_lines import run_app
from engine.data.ground import DEFAULT_GROUND
from engine.data.pairs import Pair, load_image, load_pairs
from engine.data.partial_captions import with_partial_captions
from engine.data.prepare import PrepareReport, prepare
from engine.data.sources import PrepareOptions
from engine.errors import InputError
from tests.label_trees import BOX, HEIGHT, TOP, WIDTH, label_tree, photo, polygon

GROUND = (238, 238, 236)
CORNERS = ((4, 6), (24, 6), (24, 36), (4, 36))  # of BOX
DIAMOND = ((14, 6), (24, 21), (14, 36), (4, 21))  # in BOX


def add(root: Path, identifier: int, outline: dict[str, Any] | None = None, box: dict[str, Any] | None = None) -> None:
    """One labelled photo of noise; its label's outline, if any, is `outline`."""
    photo(root / "images" / f"{identifier}.png", identifier)
    boxes, polygons = {"상의": [BOX if box is None else box]}, {"상의": [outline or {}]}
    write(root, identifier, label_tree(identifier, boxes=boxes, polygons=polygons, 상의=[TOP]))


def write(root: Path, identifier: int, content: dict[str, Any]) -> None:
    path = root / "labels" / f"{identifier}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def cut(source: Path, destination: Path, **options: Any) -> PrepareReport:
    size: dict[str, Any] = {"image_size": 32, "validation_fraction": 0, "cut_out": True}
    return prepare(source, destination, PrepareOptions(**(size | options)))


def is_ground(pair: Pair, ground: tuple[int, int, int] = GROUND) -> np.ndarray:
    """(size, size) bool."""
    with Image.open(pair.image_path) as image:
        whole: np.ndarray = (np.asarray(image.convert("RGB")) == ground).all(axis=2)
    return whole


def causes(report: PrepareReport) -> dict[str, str]:
    return {item.record.removeprefix("labels/"): item.cause for item in report.skipped}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two tops with an outline, one without."""
    add(tmp_path / "source", 1, polygon(*DIAMOND))
    add(tmp_path / "source", 2)
    add(tmp_path / "source", 3, polygon(*CORNERS))
    return tmp_path / "source"


# ------------------------------------------------------------------------------------------------------------ labels


def test_outlines_are_cut_out_and_the_rest_is_named(source: Path, tmp_path: Path) -> None:
    report = cut(source, tmp_path / "out", box_margin=0.1)
    assert (report.used, report.cut_outs, report.bad) == (2, 2, 0)  # incomplete labels are normal
    assert report.causes == {"no_outline": 1}
    assert causes(report) == {"2.json: 상의 0": "no_outline"}
    written = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert (written["cut_outs"], written["set_aside"]) == (2, {"no_outline": 1})
    assert written["options"]["ground"] == DEFAULT_GROUND
    assert (written["options"]["cut_out"], written["options"]["keep_uncut"]) == (True, False)
    diamond, square = load_pairs(tmp_path / "out").all
    for pair in (diamond, square):
        assert is_ground(pair)[[0, -1]].all()
        assert is_ground(pair)[:, [0, -1]].all()
        assert not is_ground(pair)[15:17, 15:17].any()
    assert is_ground(diamond)[5, 9]  # inside the box, outside the outline
    assert not is_ground(square)[5, 12]


def test_a_wide_margin_does_not_count_as_the_box(source: Path, tmp_path: Path) -> None:
    report = cut(source, tmp_path / "out", box_margin=0.5)
    assert (report.cut_outs, report.bad) == (2, 0)
    assert is_ground(load_pairs(tmp_path / "out").all[1])[:7].all()


def test_a_rectangle_cut_out_shows_what_its_crop_shows(source: Path, tmp_path: Path) -> None:
    """Once the margin is one in proportion: a crop of 20 x 30 padded to a square is a cut-out along the box."""
    cut(source, tmp_path / "cut")
    cut(source, tmp_path / "cropped", cut_out=False, keep_aspect=True)
    one = load_image(load_pairs(tmp_path / "cut").all[1], 32).astype(float)
    other = load_image(load_pairs(tmp_path / "cropped").all[2], 32).astype(float)
    inner = np.s_[4:28, 9:23]
    assert np.corrcoef(one[inner].ravel(), other[inner].ravel())[0, 1] > 0.95  # two filters, one place


def test_keep_uncut_takes_the_box_as_without_cut_out(source: Path, tmp_path: Path) -> None:
    report = cut(source, tmp_path / "out", keep_uncut=True, box_margin=0.1, keep_aspect=True)
    assert (report.used, report.cut_outs, report.skipped) == (3, 2, ())
    cut(source, tmp_path / "plain", cut_out=False, box_margin=0.1, keep_aspect=True)
    cut(source, tmp_path / "cut", box_margin=0.1)
    kept = {pair.key: pair.image_path.read_bytes() for pair in load_pairs(tmp_path / "out").all}
    crops = {pair.key: pair.image_path.read_bytes() for pair in load_pairs(tmp_path / "plain").all}
    cut_outs = {pair.key: pair.image_path.read_bytes() for pair in load_pairs(tmp_path / "cut").all}
    assert kept == crops | cut_outs
    assert kept["1_top_0"] != crops["1_top_0"]


def test_without_cut_out_outlines_are_not_looked_at(source: Path, tmp_path: Path) -> None:
    add(source, 4, polygon((1, 1), (2, 2)))
    report = cut(source, tmp_path / "out", cut_out=False)
    assert (report.used, report.cut_outs, report.skipped) == (4, 0, ())
    assert json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))["options"]["ground"] is None
    assert load_pairs(tmp_path / "out").ground is None


def test_objects_without_a_box_are_cut_out_all_the_same(tmp_path: Path) -> None:
    add(tmp_path / "source", 1, polygon(*DIAMOND), box={})
    report = cut(tmp_path / "source", tmp_path / "out")
    assert (report.used, report.cut_outs) == (1, 1)
    with pytest.raises(InputError, match="object_without_box 1"):
        cut(tmp_path / "source", tmp_path / "crops", cut_out=False)


def test_an_outline_without_labels_makes_no_pair(source: Path, tmp_path: Path) -> None:
    write(source, 2, label_tree(2, boxes={}, polygons={"하의": [polygon(*DIAMOND)]}))
    assert causes(cut(source, tmp_path / "out")) == {"2.json: 하의 0": "object_without_label"}


def test_each_garment_has_its_own_outline(tmp_path: Path) -> None:
    boxes, low = {"상의": [BOX], "하의": [{**BOX, "Y좌표": 28.0}]}, ((4, 28), (24, 28), (24, 58), (4, 58))
    polygons = {"상의": [polygon(*CORNERS)], "하의": [polygon(*low)]}
    photo(tmp_path / "source" / "images" / "1.png", 1)
    content = label_tree(1, boxes=boxes, polygons=polygons, 상의=[TOP], 하의=[{"색상": "블랙"}])
    write(tmp_path / "source", 1, content)
    report = cut(tmp_path / "source", tmp_path / "out")
    assert (report.used, report.cut_outs) == (2, 2)
    bottom, top = (load_image(pair, 32) for pair in load_pairs(tmp_path / "out").all)
    assert not np.array_equal(bottom, top)


def test_photos_resized_after_labelling(source: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="scale_boxes"):
        cut(resized(source, tmp_path / "double", 2), tmp_path / "x")
    cut(source, tmp_path / "out")
    cut(tmp_path / "double", tmp_path / "scaled", scale_boxes=True)
    for one, other in zip(load_pairs(tmp_path / "out").all, load_pairs(tmp_path / "scaled").all, strict=True):
        assert (is_ground(one) != is_ground(other)).mean() < 0.1  # the same outline
        assert not is_ground(other).all()


def resized(source: Path, copy: Path, times: int) -> Path:
    """A copy of a labelled folder whose photos are `times` larger than its labels say."""
    for path in source.rglob("*.json"):
        target = copy / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    for path in source.rglob("*.png"):
        target = copy / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(path) as image:
            image.resize((WIDTH * times, HEIGHT * times), Image.Resampling.NEAREST).save(target)
    return copy


@pytest.mark.slow
def test_same_bytes_with_any_number_of_workers(source: Path, tmp_path: Path) -> None:
    add(source, 4, polygon((4, 6), (24, 36), (14, 21)))
    options = PrepareOptions(image_size=32, validation_fraction=0, cut_out=True, keep_uncut=True, max_bad=0.5)
    for workers in (1, 2):
        prepare(source, tmp_path / str(workers), options, workers=workers)
    one, two = (
        {path.relative_to(tmp_path / n): path.read_bytes() for path in (tmp_path / n).rglob("*") if path.is_file()}
        for n in "12"
    )
    for files in (one, two):
        del files[Path("prepare.log")]  # which has times
    assert one == two
    assert len(one) == 3 * 2 + 3


def test_outlines_that_cross_themselves_are_used_and_counted(source: Path, tmp_path: Path) -> None:
    add(source, 4, polygon((4, 6), (24, 36), (24, 6), (4, 36)))
    report = cut(source, tmp_path / "out")
    assert causes(report) == {"2.json: 상의 0": "no_outline"}
    assert report.found["crossed_outline"].first[0][0] == "labels/4.json: 상의 0"
    assert "crossed_outline" not in cut(source, tmp_path / "uncut", cut_out=False).found


BAD_OUTLINES = [
    (polygon((4, 6), (24, 36)), "2 different points"),
    ({**polygon(*CORNERS), "X좌표2": "24"}, "not a number"),
    ({**polygon(*CORNERS), "X좌표6": 1, "Y좌표6": 1}, "X좌표5 is missing"),
    ({name: value for name, value in polygon(*CORNERS).items() if name != "Y좌표4"}, "Y좌표4 is missing"),
    ({**polygon(*CORNERS), "Y좌표1": float("inf")}, "no position"),
    (polygon((4, 6), (24, 6), (24, 99)), "is outside the image of 40 x 60"),
    (polygon((4, 6), (24, 36), (14, 21)), "is a line"),
    (polygon((20, 30), (40, 30), (40, 60), (20, 60)), "overlap by"),
]


@pytest.mark.parametrize(("outline", "word"), BAD_OUTLINES)
@pytest.mark.parametrize("keep_uncut", [False, True])
def test_faulty_outlines_are_set_aside_by_name(
    source: Path, tmp_path: Path, outline: dict[str, Any], word: str, keep_uncut: bool
) -> None:
    add(source, 3, outline)
    report = cut(source, tmp_path / "out", max_bad=0.5, keep_uncut=keep_uncut)
    (fault,) = [item for item in report.skipped if item.is_bad]
    assert (fault.record, fault.cause) == ("labels/3.json: 상의 0", "bad_outline")
    assert fault.reason.startswith("outline: ")
    assert word in fault.reason
    assert report.used == 1 + keep_uncut
    with pytest.raises(InputError, match=r"1 of 3 records are bad \(bad_outline 1\), the first: labels/3.json"):
        cut(source, tmp_path / "strict", keep_uncut=keep_uncut)


def test_a_faulty_box_is_no_cut_out(source: Path, tmp_path: Path) -> None:
    add(source, 3, polygon(*CORNERS), box={**BOX, "가로": 0})
    assert causes(cut(source, tmp_path / "out", max_bad=0.5))["3.json: 상의 0"] == "bad_box"


def test_the_box_is_read_by_its_origin(source: Path, tmp_path: Path) -> None:
    """Boxes that mean their centre agree with the outline only if they are read so."""
    add(source, 3, polygon(*CORNERS), box={**BOX, "X좌표": 14.0, "Y좌표": 21.0})
    assert causes(cut(source, tmp_path / "a", max_bad=0.5))["3.json: 상의 0"] == "bad_outline"
    for identifier in (1, 2):
        (source / "labels" / f"{identifier}.json").unlink()
        (source / "images" / f"{identifier}.png").unlink()
    assert cut(source, tmp_path / "b", box_origin="center").cut_outs == 1


# ------------------------------------------------------------------------------------------------------------- alpha


def plain(root: Path, name: str, image: Image.Image) -> None:
    root.mkdir(parents=True, exist_ok=True)
    image.save(root / name)
    (root / name).with_suffix(".txt").write_text("빨간 네모", encoding="utf-8")


def square_on_nothing(mode: str = "RGBA") -> Image.Image:
    """60 x 40, a red square of 20 in it; black hides under the transparency."""
    image = Image.new("RGBA", (60, 40), (0, 0, 0, 0))
    image.paste((200, 30, 40, 255), (30, 10, 50, 30))
    return image.convert(mode)


@pytest.mark.parametrize(("name", "mode"), [("a.png", "RGBA"), ("a.webp", "RGBA"), ("a.png", "LA"), ("a.png", "P")])
def test_the_alpha_of_a_plain_image_is_its_outline(tmp_path: Path, name: str, mode: str) -> None:
    image = square_on_nothing(mode)
    plain(tmp_path / "source", name, image)
    if name.endswith(".webp"):
        image.save(tmp_path / "source" / name, lossless=True)
    report = cut(tmp_path / "source", tmp_path / "out", image_size=60, box_margin=0.25)
    assert (report.form, report.used, report.cut_outs) == ("plain", 1, 1)
    ground = is_ground(load_pairs(tmp_path / "out").all[0])
    assert not ground[13:47, 13:47].any()  # 20 pixels of 30: 40 of 60, in the middle
    assert ground[:8].all()
    assert ground[:, 52:].all()


def test_opaque_images_have_no_outline(tmp_path: Path) -> None:
    plain(tmp_path / "source", "a.png", square_on_nothing())
    plain(tmp_path / "source", "b.png", Image.new("RGBA", (60, 40), (9, 9, 9, 255)))
    photo(tmp_path / "source" / "c.jpg", 1).with_suffix(".txt").write_text("옷", encoding="utf-8")
    report = cut(tmp_path / "source", tmp_path / "out")
    assert causes(report) == {"b.png": "no_outline", "c.jpg": "no_outline"}
    assert (report.used, report.bad) == (1, 0)
    kept = cut(tmp_path / "source", tmp_path / "kept", keep_uncut=True)
    assert (kept.used, kept.cut_outs) == (3, 1)
    cut(tmp_path / "source", tmp_path / "plain", cut_out=False)
    for name in ("b.png", "c.png"):
        written = [(tmp_path / folder / "images" / name).read_bytes() for folder in ("kept", "plain")]
        assert written[0] == written[1]


def test_a_transparent_image_is_a_fault(tmp_path: Path) -> None:
    plain(tmp_path / "source", "a.png", square_on_nothing())
    plain(tmp_path / "source", "b.png", Image.new("RGBA", (60, 40)))
    report = cut(tmp_path / "source", tmp_path / "out", max_bad=0.5)
    assert [(item.record, item.cause, item.is_bad) for item in report.skipped] == [("b.png", "bad_outline", True)]
    (tmp_path / "source" / "b.png").write_bytes(b"broken")
    assert causes(cut(tmp_path / "source", tmp_path / "broken", max_bad=0.5)) == {"b.png": "not_an_image"}


# ---------------------------------------------------------------------------------------------------- ground, options


def test_another_ground(source: Path, tmp_path: Path) -> None:
    cut(source, tmp_path / "out", ground="#0A64ff", box_margin=0.1)
    pairs = load_pairs(tmp_path / "out")
    assert pairs.ground == "#0a64ff"
    assert is_ground(pairs.all[0], (10, 100, 255))[0].all()
    assert with_partial_captions(pairs, 2, 0).ground == "#0a64ff"  # what training works with


def test_the_ground_is_read_back(source: Path, tmp_path: Path) -> None:
    cut(source, tmp_path / "out")
    assert load_pairs(tmp_path / "out").ground == DEFAULT_GROUND
    assert load_pairs(tmp_path / "out" / "images").ground is None  # a plain folder has no report
    report = tmp_path / "out" / "report.json"
    for content, ground in (("{}", None), ("[]", None), ('{"options": []}', None)):
        report.write_text(content)
        assert load_pairs(tmp_path / "out").ground is ground
    for content in ('{"options": {"ground": "grey"}}', '{"options": {"ground": 7}}', "{"):
        report.write_text(content)
        with pytest.raises(InputError):
            load_pairs(tmp_path / "out")
    report.unlink()
    assert load_pairs(tmp_path / "out").ground is None


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--ground", "#eeeeec"), "error: --ground: #eeeeec: is the colour around cut-outs: add cut_out"),
        (("--keep-uncut",), "error: --keep-uncut: True: is about what has no outline"),
        (("--cut-out", "--ground", "grey"), 'error: --ground: grey: must be a colour as "#rrggbb"'),
    ],
)
def test_options_that_do_not_fit_are_refused_in_one_line(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], line: str
) -> None:
    with pytest.raises(SystemExit) as left:
        run_app(cli.app, ["data", "prepare", str(source), str(tmp_path / "out"), *options], prog_name="kodalle")
    stderr = capsys.readouterr().err
    assert left.value.code == 2
    assert stderr.startswith(line)
    assert stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_command_prints_what_it_cut_out(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["data", "prepare", str(source), str(tmp_path / "out"), "--cut-out", "--ground", "#dddddd"]
    with pytest.raises(SystemExit) as left:
        run_app(
            cli.app, [*arguments, "--image-size", "32", "--validation-fraction", "0", "--workers", "1"], prog_name="it"
        )
    stdout = capsys.readouterr().out
    assert not left.value.code
    assert "2 of the used are cut out, on a ground of #dddddd" in stdout
    assert "no_outline: 1, the first: labels/2.json: 상의 0" in stdout
