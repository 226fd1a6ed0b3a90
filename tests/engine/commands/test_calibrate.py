"""`kodalle calibrate` renews what a model folder says of its captions and scores, from the pairs that it was trained on."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from engine.cli import app
from engine.data.caption_guide import read_guide, write_guide
from engine.data.pairs import load_pairs
from engine.errors import InputError
from engine.models.folder import own_real_scores
from engine.models.real_scores import REAL_SCORES_FILE
from engine.pipeline.pipeline import Pipeline


@pytest.fixture
def model(kodalle_run: Path, tmp_path: Path) -> Path:
    """A model folder with a synonym of its own, and without words and scores of real pairs."""
    folder = Path(shutil.copytree(kodalle_run / "model", tmp_path / "model"))
    (folder / REAL_SCORES_FILE).unlink(missing_ok=True)
    write_guide(folder, read_guide(folder).model_copy(update={"words": (), "synonyms": {"진홍": "빨강"}}))
    return folder


def test_words_come_from_captions_and_scores_from_held_out_pairs(model: Path, pairs_folder: Path) -> None:
    result = CliRunner().invoke(app, ["calibrate", str(model), str(pairs_folder), "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "6 real pairs" in result.output
    pairs = load_pairs(pairs_folder)
    guide = read_guide(model)
    assert set(guide.words) == {word for pair in pairs.train for text in pair.captions for word in text.split()}
    assert guide.synonyms["진홍"] == "빨강", "those that were there stay"
    scores = own_real_scores(model)
    assert scores is not None, "they are this ranker's"
    pipeline = Pipeline.from_pretrained(model)
    captions = pipeline.embed_captions([pair.captions[0] for pair in pairs.validation]).vectors
    pixels = np.stack([np.asarray(Image.open(pair.image_path)) for pair in pairs.validation])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    wanted = np.percentile((captions * pipeline.embed_images(images)).sum(1).numpy(), (0, 50, 100))
    assert [scores.percentiles[place] for place in (0, 50, 100)] == pytest.approx(wanted, abs=1e-4)


def test_pairs_of_which_none_is_held_out_are_refused(model: Path, pairs_folder: Path, tmp_path: Path) -> None:
    pairs = Path(shutil.copytree(pairs_folder, tmp_path / "pairs")) / "pairs.jsonl"
    lines = [json.loads(line) | {"split": "train"} for line in pairs.read_text(encoding="utf-8").splitlines()]
    pairs.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    before = (model / "captions.json").read_bytes()
    refused = CliRunner().invoke(app, ["calibrate", str(model), str(pairs.parent)]).exception
    assert isinstance(refused, InputError)
    assert "none of them is held out" in str(refused)
    assert (model / "captions.json").read_bytes() == before
