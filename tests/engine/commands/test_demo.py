"""The demo's whole path at a tiny size: every step real, only shorter."""

import json
from pathlib import Path

import pytest
from PIL import Image

from engine.commands.demo import MEASURES, run_demo
from engine.errors import InputError
from engine.models.folder import has_part
from tests.paths import REPOSITORY

CONFIGS = REPOSITORY / "configs" / "demo"
SHORT = [
    "vqgan.loop.steps=8",
    "vqgan.codebook_reset.start_step=4",
    "vqgan.codebook_reset.reset_every=2",
    "vqgan.loop.validation_batches=1",
    "koclip.loop.steps=4",
    "koclip.deepspeed.train_micro_batch_size_per_gpu=8",
    "koclip.loop.validation_batches=1",
    "kodalle.loop.steps=4",
    "kodalle.deepspeed.train_micro_batch_size_per_gpu=8",
    "kodalle.loop.validation_batches=1",
]


@pytest.mark.slow
def test_demo_end_to_end(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    report = run_demo(out, CONFIGS, pictures=120, held_out=9, candidates=3, overrides=SHORT)

    assert report == json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert report["held_out_captions"] == 9
    for shares in report["share_right"].values():
        assert set(shares) == set(MEASURES)
        assert all(0 <= share <= 1 for share in shares.values())
    model = out / "kodalle" / "model"
    assert all(has_part(model, part) for part in ("vqgan", "transformer", "koclip"))
    assert not list(model.glob("*.p[kt]*"))
    for number in (1, 2, 3):
        folder = out / "drawings" / str(number)
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        assert [one["rank"] for one in result["candidates"]] == [1, 2, 3]
        best = Image.open(folder / result["candidates"][0]["file"])
        assert best.size == (48, 48)
        assert best.info["caption"] == result["caption"]
        assert Image.open(folder / "sheet.png").width > 3 * 48
    assert Image.open(out / "evaluation.png").size[0] > 48

    # A second call finds every step done: nothing is trained again, and the report says the same.
    log = (out / "kodalle" / "log.jsonl").read_bytes()
    again = run_demo(out, CONFIGS, pictures=120, held_out=9, candidates=3, overrides=SHORT)
    assert again["share_right"] == report["share_right"]
    assert (out / "kodalle" / "log.jsonl").read_bytes() == log


def test_demo_names_a_missing_config(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no vqgan"):
        run_demo(tmp_path / "demo", tmp_path)
    assert not (tmp_path / "demo").exists()
