"""The independent classifier learns classes that can be learnt, says how good it is, and is refused when it does not fit."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from engine.cli import app
from engine.data.caption_classes import CaptionClasses, find_caption_classes
from engine.data.pairs import Pair, Pairs, load_pairs
from engine.errors import InputError
from engine.metrics.classifier_training import fit, train_classifier, view_of
from engine.metrics.independent_classifier import (
    LEAST_ACCURACY,
    IndependentClassifier,
    agreement,
    load_classifier,
    save_classifier,
)
from engine.metrics.lite0_features import NUM_FEATURES

CAPTIONS = {
    "셔츠": "상의에서 색상은 레드이다. 상의에서 카테고리는 셔츠이다.",
    "팬츠": "하의에서 색상은 레드이다. 하의에서 카테고리는 팬츠이다.",
}
CPU = torch.device("cpu")


def classes_of(*captions: str) -> CaptionClasses:
    found = find_caption_classes(
        Pairs(tuple(Pair(str(n), Path("x.png"), (text,), str(n), "train") for n, text in enumerate(captions)))
    )
    assert found is not None
    return found


def separable(count: int, *, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of two classes, nine of the second for one of the first, which one feature in a hundred separates."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(count, generator=generator) < 0.9).long()
    features = torch.randn(count, 100, generator=generator)
    features[:, 7] = features[:, 7] / 10 + labels * 4.0
    return features * 3 + 5, labels


def write_stripes(folder: Path, *, telling: bool) -> Path:
    """Shirts with upright stripes and trousers with level ones; without `telling` all of them have upright ones."""
    (folder / "images").mkdir(parents=True)
    lines = []
    for number in range(28):
        name = list(CAPTIONS)[number % 2]
        pixels = np.full((32, 32, 3), 235, np.uint8)
        width = 3 + number % 3
        stripes = np.arange(32) // width % 2 == 0
        pixels[stripes if telling and number % 2 else slice(None), :] = (180, 30, 40)
        if not (telling and number % 2):
            pixels[:, ~stripes] = 235
        Image.fromarray(pixels).save(folder / f"images/{number:02d}.png")
        lines.append({
            "key": f"{number:02d}", "image": f"images/{number:02d}.png", "photo": f"{number:02d}",
            "caption": CAPTIONS[name], "split": "train" if number < 16 else "validation", "attributes": {"색상": "레드"},
        })  # fmt: skip
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (folder / "pairs.jsonl").write_text(text, encoding="utf-8")
    return folder


def test_a_separable_set_is_learnt_and_a_random_one_is_not() -> None:
    facts = classes_of(*CAPTIONS.values()).facts
    features, labels = separable(300, seed=0)
    unseen, right = separable(300, seed=1)
    found = agreement(fit(features, labels, facts).classify(unseen), right.tolist())
    assert found["usable"]
    assert found["accuracy"] > 0.98
    assert found["balanced_accuracy"] > 0.95
    assert found["majority"] == pytest.approx(0.9, abs=0.05)
    shuffled = labels[torch.randperm(300, generator=torch.Generator().manual_seed(2))]
    nothing = agreement(fit(features, shuffled, facts).classify(unseen), right.tolist())
    assert nothing["balanced_accuracy"] < 0.7


def test_agreement_by_hand() -> None:
    found = agreement([0, 0, 0, 1, 0], [0, 0, 0, 1, 1])
    assert found == {
        "images": 5, "accuracy": 0.8, "balanced_accuracy": pytest.approx((1 + 0.5) / 2), "majority": 0.6, "usable": True,
    }  # fmt: skip
    assert LEAST_ACCURACY == 0.8
    assert not agreement([0, 0, 0, 0, 0], [0, 0, 0, 1, 1])["usable"]


def test_views_differ_and_keep_shape_and_colour() -> None:
    image = np.full((64, 64, 3), 235, np.uint8)
    image[16:48, 20:40] = (180, 30, 40)
    views = [view_of(image, np.random.default_rng([1, number])) for number in range(20)]
    assert all(view.shape == image.shape and view.dtype == np.uint8 for view in views)
    assert len({view.tobytes() for view in views}) == 20
    assert np.array_equal(views[3], view_of(image, np.random.default_rng([1, 3])))
    assert all(np.abs(view.mean(axis=(0, 1)) - image.mean(axis=(0, 1))).max() < 20 for view in views)


def test_a_folder_gives_the_classifier_back(tmp_path: Path) -> None:
    shirts_first = classes_of(*CAPTIONS.values())
    random = torch.Generator().manual_seed(0)
    classifier = IndependentClassifier(
        shirts_first.facts, torch.zeros(NUM_FEATURES), torch.ones(NUM_FEATURES),
        torch.randn(NUM_FEATURES, 2, generator=random), torch.zeros(2),
    )  # fmt: skip
    save_classifier(tmp_path / "c", classifier, {"seed": 1})
    save_classifier(tmp_path / "c", classifier, {"seed": 2})  # replaced
    assert json.loads((tmp_path / "c" / "classifier.json").read_text(encoding="utf-8"))["seed"] == 2
    loaded = load_classifier(tmp_path / "c")
    features = torch.randn(20, NUM_FEATURES, generator=random)
    numbers = classifier.classify(features)
    assert set(numbers) == {0, 1}
    assert loaded.classify(features) == numbers
    # classes in another order are the same classes
    trousers_first = classes_of(CAPTIONS["팬츠"], *CAPTIONS.values())
    assert trousers_first.facts == shirts_first.facts[::-1]
    turned = loaded.for_classes(trousers_first, folder=tmp_path)
    assert turned.classify(features) == [1 - number for number in numbers]


def test_folders_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="train-classifier"):
        load_classifier(tmp_path / "none")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "photo.png").write_bytes(b"x")
    two = classes_of(*CAPTIONS.values())
    classifier = IndependentClassifier(
        two.facts, torch.zeros(NUM_FEATURES), torch.ones(NUM_FEATURES), torch.zeros(NUM_FEATURES, 2), torch.zeros(2)
    )
    with pytest.raises(InputError, match="holds something other"):
        save_classifier(tmp_path / "other", classifier, {})
    three = classes_of(*CAPTIONS.values(), "하의에서 카테고리는 스커트이다.")
    with pytest.raises(InputError, match=r"스커트.*knows 2 classes, the pairs have 3"):
        classifier.for_classes(three, folder=tmp_path)
    save_classifier(tmp_path / "c", classifier, {})
    tree = json.loads((tmp_path / "c" / "classifier.json").read_text(encoding="utf-8"))
    (tmp_path / "c" / "classifier.json").write_text(json.dumps(tree | {"classes": tree["classes"][:1]}))
    with pytest.raises(InputError, match="has tensors"):
        load_classifier(tmp_path / "c")
    (tmp_path / "c" / "classifier.json").write_text(json.dumps(tree | {"features": "other"}))
    with pytest.raises(InputError, match="is not of format 1"):
        load_classifier(tmp_path / "c")
    (tmp_path / "c" / "classifier.json").write_text(json.dumps(tree))
    (tmp_path / "c" / "classifier.safetensors").unlink()
    with pytest.raises(InputError, match="is not complete"):
        load_classifier(tmp_path / "c")


@pytest.mark.slow
def test_training_sees_what_images_show_and_says_when_they_show_nothing(tmp_path: Path) -> None:
    stripes = write_stripes(tmp_path / "stripes", telling=True)
    done = CliRunner().invoke(app, ["train-classifier", str(stripes), "--out", str(tmp_path / "c"), "--views", "2"])
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "c" / "classifier.json").read_text(encoding="utf-8"))
    assert record["held_out"]["accuracy"] == 1.0
    assert record["trained_on"] == {"images": 16, "views": 2, "seed": 1}
    assert "names 100.0% of 12 held-out photographs rightly" in done.output
    assert "worth nothing" not in done.output
    again, _ = train_classifier(load_pairs(stripes), views=2, seed=1, device=CPU)
    assert torch.equal(again.weight, load_classifier(tmp_path / "c").weight)
    alike = write_stripes(tmp_path / "alike", telling=False)
    done = CliRunner().invoke(app, ["train-classifier", str(alike), "--out", str(tmp_path / "d"), "--views", "1"])
    assert done.exit_code == 0, done.output
    assert "worth nothing" in done.output


def test_training_needs_classes_and_held_out_photographs(tmp_path: Path) -> None:
    pairs = load_pairs(write_stripes(tmp_path / "stripes", telling=True))
    with pytest.raises(InputError, match="fewer than two classes"):
        train_classifier(Pairs(pairs.all[:1]), views=1, seed=1, device=CPU)
    with pytest.raises(InputError, match="no photograph of a known class"):
        train_classifier(Pairs(pairs.train), views=1, seed=1, device=CPU)
