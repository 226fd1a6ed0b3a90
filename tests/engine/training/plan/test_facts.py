"""What is read of a folder of captioned images: numbers, words, sizes, and whether objects are cut out."""

from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from engine.data.pairs import split_of
from engine.errors import InputError
from engine.files import write_json
from engine.training.plan.facts import choose_split, dataset_facts, source_as_prepared
from engine.training.plan.sizes import choose_sizes
from tests.engine.commands.test_train_pictures import draw
from tests.engine.data.test_prepare_cut_outs import DIAMOND, add
from tests.engine.training.plan.test_sizes import CPU
from tests.label_trees import polygon


def test_the_split_holds_out_about_as_many_as_wanted(tmp_path: Path) -> None:
    for count in (10, 24, 40, 99, 100, 500, 5000):
        photos = [f"photo-{number}" for number in range(count)]
        fraction, seed = choose_split(photos)
        held = sum(split_of(photo, fraction, seed) == "validation" for photo in photos)
        wanted = fraction * count
        assert max(1, 0.8 * wanted - 1) <= held <= 1.2 * wanted + 1, (count, held, wanted)


def test_facts_of_a_folder(tmp_path: Path) -> None:
    photos = draw(tmp_path / "photos", 24)
    facts = dataset_facts(photos)
    assert (facts.train + facts.validation, facts.captions, facts.side) == (24, 6, 32)
    assert facts.validation >= 2
    assert facts.longest_tokens == 5  # [CLS] a red square [SEP]
    assert not facts.mentions_sides
    (photos / "00.txt").write_text("a square on the left of a very red circle", encoding="utf-8")
    changed = dataset_facts(photos)
    assert changed.mentions_sides
    assert changed.longest_tokens == 12
    assert changed.vocabulary > facts.vocabulary


def _draw_transparent(folder: Path, *, transparent: int, opaque: int) -> Path:
    folder.mkdir()
    for number in range(transparent + opaque):
        image = Image.new("RGBA", (40, 32), (255, 255, 255, 0 if number < transparent else 255))
        ImageDraw.Draw(image).ellipse([8, 6, 28, 26], fill=(200, 30, 30, 255))
        image.save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text("a red circle\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("transparent", "stated", "ground", "reason"),
    [
        (20, None, "#eeeeec", "100% have an outline"),
        (18, None, "#eeeeec", "90% have an outline"),
        (20, False, None, "as --no-cut-out states"),
        (6, None, None, "only 30% have an outline; --cut-out takes these alone"),
        (6, True, "#eeeeec", "as --cut-out states"),
        (0, None, None, "no outlines and no transparency"),
    ],
)
def test_objects_are_cut_out_where_most_have_an_outline(
    transparent: int, stated: bool | None, ground: str | None, reason: str, tmp_path: Path
) -> None:
    photos = _draw_transparent(tmp_path / "photos", transparent=transparent, opaque=20 - transparent)
    facts = dataset_facts(photos, cut_out=stated)
    assert facts.ground == ground
    value, why = choose_sizes(facts, CPU).reasons["background"]
    assert reason in why
    assert value == (f"cut out, {ground} instead" if ground else "kept")


def test_objects_are_cut_out_along_the_polygons_of_labels(tmp_path: Path) -> None:
    for number in range(12):
        add(tmp_path / "photos", number + 1, polygon(*DIAMOND) if number else None)
    facts = dataset_facts(tmp_path / "photos")
    assert (facts.ground, facts.train + facts.validation) == ("#eeeeec", 11)  # without an outline: left out
    assert facts.side == 20
    assert dataset_facts(tmp_path / "photos", cut_out=False).ground is None


def test_nothing_to_cut_out_is_said(tmp_path: Path) -> None:
    photos = draw(tmp_path / "photos", 12)
    with pytest.raises(InputError, match=r"--cut-out: .*no object has an outline"):
        dataset_facts(photos, cut_out=True)
    trained_on_cut_outs = tmp_path / "model"
    trained_on_cut_outs.mkdir()
    write_json(trained_on_cut_outs / "config.json", {"ground": "#ffffff"})
    with pytest.raises(InputError, match=r"--from: .*was trained on cut-outs"):
        dataset_facts(photos, start_from=trained_on_cut_outs)
    transparent = _draw_transparent(tmp_path / "transparent", transparent=20, opaque=0)
    assert source_as_prepared(transparent, trained_on_cut_outs, None)[1] == "#ffffff"
    write_json(trained_on_cut_outs / "config.json", {})
    assert source_as_prepared(transparent, trained_on_cut_outs, None)[1:] == (None, f"as in {trained_on_cut_outs}")
