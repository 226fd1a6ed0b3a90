"""The demo from the data set to the report at a tiny size."""

import json
from pathlib import Path

import pytest
from PIL import Image

from engine.commands import demo
from engine.errors import InputError
from engine.models.folder_config import has_part
from tests.paths import REPOSITORY

CONFIGS = REPOSITORY / "configs" / "demo"
SHORT = [
    "vqgan.loop.steps=4",
    "vqgan.codebook_reset.start_step=2",
    "vqgan.codebook_reset.reset_every=2",
    "vqgan.deepspeed.train_micro_batch_size_per_gpu=2",
    "vqgan.loop.validation_batches=1",
    "koclip.loop.steps=2",
    "koclip.deepspeed.train_micro_batch_size_per_gpu=4",
    "koclip.loop.validation_batches=1",
    "kodalle.loop.steps=2",
    "kodalle.deepspeed.train_micro_batch_size_per_gpu=4",
    "kodalle.loop.validation_batches=1",
    "kodalle.augmented_views=0",
    "kodalle.model.num_layers=1",
    "vqgan.model.codebook_size=64",
    "kodalle.model.image_vocab_size=64",
]


@pytest.mark.slow
def test_demo_end_to_end(tmp_path: Path, trained: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    sizes = {"images": 24, "held_out": 4, "candidates": 2}
    report = demo.run_demo(out, CONFIGS, **sizes, overrides=SHORT)

    assert trained == ["vqgan", "koclip", "kodalle"]
    assert report == json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert report["held_out_captions"] == 4
    # The oracle reads the data set as it is prepared; else its word on generated images would be worth nothing.
    assert report["share_right"]["real"] == {"colour": 1, "category": 1, "sleeve": 1, "all": 1}
    for shares in report["share_right"].values():
        assert set(shares) == {"colour", "category", "sleeve", "all"}
        assert all(0 <= share <= 1 for share in shares.values())
    assert report["share_right"] == json.loads((out / "evaluation.json").read_text())["generations"]["oracle"]
    model = out / "model"
    assert all(has_part(model, part) for part in ("vqgan", "transformer", "koclip"))
    assert not list(model.glob("*.p[kt]*"))

    # It ends as `kodalle train PHOTOS` does: page, card, verdicts with the oracle's.
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count('class="pair"') == 4
    assert "A model of drawn garments" in page
    assert "held-out captions have colour, category, sleeve right" in (out / "report.md").read_text(encoding="utf-8")
    printed = capsys.readouterr().out
    assert f"kodalle serve {model} --port 8000" in printed
    assert Image.open(out / "evaluation.png").size[0] > 48

    # A second call finds every step done: nothing is trained again, and the report is the same.
    again = demo.run_demo(out, CONFIGS, **sizes, overrides=SHORT)
    assert again["share_right"] == report["share_right"]
    assert len(trained) == 3


def test_demo_names_a_missing_config(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no vqgan"):
        demo.run_demo(tmp_path / "demo", tmp_path)
    assert not (tmp_path / "demo").exists()
