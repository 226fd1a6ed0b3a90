"""Which files of a plain folder are a pair, under which key, and how the others are named."""

import json
import os
import random
import unicodedata
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from engine.cli import app
from engine.data.check import check
from engine.data.pairs import load_pairs
from engine.data.plain_folder import find_plain
from engine.data.prepare import prepare
from engine.data.source_files import paths_under
from engine.data.source_listing import source_listing
from engine.data.sources import PrepareOptions
from engine.errors import InputError

NFD = unicodedata.normalize("NFD", "빨간 옷")


def add(folder: Path, image: str, text: str | None = None, *, seed: int = 0) -> None:
    """An image of its own and its caption; names may have bytes that are not UTF-8."""
    path = folder / image
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (seed % 256, 7, 9)).save(path, "AVIF" if image.endswith("avif") else "PNG")
    text = f"{os.path.splitext(image)[0]}.txt" if text is None else text
    (folder / text).write_text(f"옷 {seed}", encoding="utf-8")


def filled(folder: Path, count: int = 40) -> Path:
    for number in range(count):
        add(folder, f"n{number}.png", seed=100 + number)
    return folder


def cp949(name: str) -> str:
    return name.encode("cp949").decode("utf-8", "surrogateescape")


# ------------------------------------------------------------------------------------------------------------- names


def test_decomposed_and_composed_names_are_one(tmp_path: Path) -> None:
    add(tmp_path, f"{NFD}.png", "빨간 옷.txt")
    add(tmp_path, "치마.png", f"{unicodedata.normalize('NFD', '치마')}.txt")
    matched, unmatched = find_plain(tmp_path)
    assert [pair.key for pair in matched] == ["빨간 옷", "치마"]
    assert not unmatched
    assert load_pairs(tmp_path, validation_fraction=0).all[0].photo == "빨간 옷"
    report = prepare(tmp_path, tmp_path.with_name("out"), PrepareOptions(image_size=8, validation_fraction=0))
    assert report.used == 2
    assert (tmp_path.with_name("out") / "images" / "빨간 옷.png").is_file()


def test_names_that_are_not_utf8_are_named_and_set_aside(tmp_path: Path) -> None:
    source = filled(tmp_path / "s")
    add(source, cp949("옷.png"), seed=1)
    report = check(source)
    assert report.counts == {"bad_name": 2, "tiny_image": 40}
    found = [finding for finding in report.findings if finding.defect == "bad_name"]
    assert [finding.record for finding in found] == ["\\xbf\\xca.png", "\\xbf\\xca.txt"]
    assert "in cp949 it reads 옷.png" in found[0].detail
    assert "convmv" in found[0].detail
    pairs = load_pairs(source)
    assert len(pairs.all) == 40
    assert [name for name, _ in pairs.set_aside] == ["\\xbf\\xca.png", "\\xbf\\xca.txt"]
    assert prepare(source, tmp_path / "out", PrepareOptions(image_size=8)).causes == {"bad_name": 2}
    source_listing(source).encode("utf-8")

    ran = CliRunner().invoke(
        app, ["data", "check", str(source), "--json", str(tmp_path / "check.json"), "--workers", "1"]
    )
    assert (ran.exit_code, ran.exception is None or isinstance(ran.exception, SystemExit)) == (1, True)
    assert "\\xbf\\xca.png" in ran.output
    assert json.loads((tmp_path / "check.json").read_text(encoding="utf-8"))["counts"]["bad_name"] == 2


def test_a_folder_of_such_names_alone_says_what_to_do(tmp_path: Path) -> None:
    add(tmp_path / "s", cp949("옷.png"))
    with pytest.raises(InputError, match=r"not UTF-8.*convmv"):
        load_pairs(tmp_path / "s")
    with pytest.raises(InputError, match=r"not UTF-8.*convmv"):
        prepare(tmp_path / "s", tmp_path / "out")
    assert check(tmp_path / "s").counts == {"bad_name": 2}


def test_names_with_line_ends_are_named(tmp_path: Path) -> None:
    add(filled(tmp_path), "a\nb.png")
    assert [finding.record for finding in check(tmp_path).errors] == ["a\\nb.png", "a\\nb.txt"]
    assert len(source_listing(tmp_path).splitlines()) == 82


COLLIDING = [
    "IMG (1)",
    "IMG [1]",
    "a b",
    "a-b",
    "A B",
    "写真一",
    "写真二",
    "x",
    "X",
    "x\u200b",
    NFD,
    "빨간 옷",
    "가" * 82,
    "con",
]


def test_names_that_look_alike_keep_all_their_images(tmp_path: Path) -> None:
    """Under keys that any file system takes, the same ones whatever the order and in every run."""
    made: list[dict[str, tuple[str, ...]]] = []
    for order in (COLLIDING, random.Random(3).sample(COLLIDING, len(COLLIDING))):
        source = tmp_path / f"s{len(made)}"
        for name in order:
            add(source, f"{name}.png", seed=COLLIDING.index(name))
        out = tmp_path / f"out{len(made)}"
        report = prepare(source, out, PrepareOptions(image_size=8, validation_fraction=0))
        assert (report.used, report.causes) == (len(COLLIDING), {})
        pairs = load_pairs(out).all
        assert len({pair.key.casefold() for pair in pairs}) == len(COLLIDING)
        assert all(len(path.name.encode()) <= 200 for path in (out / "images").iterdir())
        for pair in pairs:
            with Image.open(pair.image_path) as image:
                assert pair.captions == (f"옷 {image.getpixel((0, 0))[0]}",)  # type: ignore[index]
        made.append({pair.key: pair.captions for pair in pairs})
        assert {pair.key for pair in load_pairs(source, validation_fraction=0).all} == made[0].keys()
    assert made[0] == made[1]


# -------------------------------------------------------------------------------------------------- folders and formats


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    source = tmp_path / "s"
    add(source, "a.png")
    add(tmp_path / "elsewhere", "in/b.png", seed=1)
    add(source, "own/c.png", seed=2)
    (source / "linked").symlink_to(tmp_path / "elsewhere")
    (source / "twice").symlink_to(tmp_path / "elsewhere")
    (source / "within").symlink_to(source / "own")
    (source / "own" / "around").symlink_to(tmp_path)
    (source / "self").symlink_to(source)
    (tmp_path / "elsewhere" / "back").symlink_to(source)
    assert [path for path in paths_under(source) if path.endswith(".png")] == ["a.png", "linked/in/b.png", "own/c.png"]
    assert len(load_pairs(source, validation_fraction=0).all) == 3
    assert prepare(source, tmp_path / "out", PrepareOptions(image_size=8, validation_fraction=0)).used == 3


@pytest.mark.parametrize("suffix", ["jfif", "jpe", "JPG", "bmp", "gif", "tif", "tiff", "avif", "apng", "webp", "mpo"])
def test_what_pillow_reads_is_read(tmp_path: Path, suffix: str) -> None:
    form = {"jfif": "JPEG", "jpe": "JPEG", "jpg": "JPEG", "mpo": "JPEG", "apng": "PNG", "tif": "TIFF"}
    Image.new("RGB", (40, 40), "red").save(tmp_path / f"a.{suffix}", form.get(suffix.lower(), suffix.upper()))
    (tmp_path / "a.txt").write_text("red")
    assert load_pairs(tmp_path, validation_fraction=0).all[0].key == "a"
    assert check(tmp_path).findings == ()


@pytest.mark.parametrize("suffix", ["heic", "HEIC", "jxl", "dng", "psd"])
def test_pictures_that_are_not_read_are_named_once(tmp_path: Path, suffix: str) -> None:
    source = filled(tmp_path / "s")
    (source / f"a.{suffix}").write_bytes(b"\0\0\0\x18ftypheic")
    (source / "a.txt").write_text("red")
    assert [(item.record, item.defect) for item in check(source).errors] == [(f"a.{suffix}", "unread_format")]
    assert prepare(source, tmp_path / "out", PrepareOptions(image_size=8)).causes == {"unread_format": 1}


def test_a_caption_says_what_lies_beside_it(tmp_path: Path) -> None:
    source = filled(tmp_path)
    (source / "a.xyz").write_bytes(b"x")
    (source / "a.txt").write_text("red")
    assert "and a.xyz is none that is read" in check(source).errors[0].detail


# ------------------------------------------------------------------------------------------------------ broken images


def truncated(path: Path) -> None:
    Image.effect_noise((64, 64), 90).convert("RGB").save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:-200])


BROKEN = {
    "truncated": truncated,
    "empty": lambda path: path.write_bytes(b""),
    "a text": lambda path: path.write_text("no image"),
    "a bomb": lambda path: Image.new("1", (7072, 7072)).save(path, "PNG"),  # more than MAX_PIXELS
    "floating-point": lambda path: Image.new("F", (8, 8)).save(path, "TIFF"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_image_is_found_before_the_first_step(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    source = filled(tmp_path / "s", 30)
    (source / "a.txt").write_text("red")
    BROKEN[kind](source / "a.jpg")
    pairs = load_pairs(source)
    assert (len(pairs.all), [name for name, _ in pairs.set_aside]) == (30, ["a.jpg"])
    assert "1 of 31 records set aside, the first: a.jpg" in caplog.text
    for number in range(5):
        (source / f"b{number}.txt").write_text("red")
        BROKEN[kind](source / f"b{number}.jpg")
    with pytest.raises(InputError, match=r"6 of 36 records set aside, the first: a.jpg: .*data check"):
        load_pairs(source)
    prepare(source, tmp_path / "out", PrepareOptions(image_size=8, max_bad=0.5))
