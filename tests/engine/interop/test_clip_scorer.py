"""CLIPs by path for the CLIP score: transformers' own scores from its folders, the ranker of a model folder, and what is refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config.ranker import KoclipConfig
from engine.data.tokenizer import train_tokenizer
from engine.errors import InputError
from engine.interop.clip_scorer import open_clip_scorer
from engine.interop.importing import import_checkpoint
from engine.models.folder import Part, write_model_folder
from engine.models.koclip import KoClip
from tests.engine.interop.test_importing_clip import CAPTIONS, _clip_folder, _images, _scores, _tokenizer

CPU = torch.device("cpu")


def test_scores_of_a_folder_are_transformers_own_and_those_of_the_imported_one(tmp_path: Path) -> None:
    original = _clip_folder(tmp_path / "clip")
    scorer = open_clip_scorer(tmp_path / "clip", CPU)
    images = _images()
    for caption in CAPTIONS[:3]:
        ids = torch.tensor([_tokenizer()(caption)["input_ids"]])
        plain = 100 * _scores(original, images, ids)[0].clamp(min=0)
        assert scorer.scores(caption, images) == pytest.approx(plain.tolist(), abs=1e-3)
    assert scorer.name == "clip"
    import_checkpoint(tmp_path / "clip", tmp_path / "imported")
    imported = open_clip_scorer(tmp_path / "imported", CPU)
    assert imported.scores(CAPTIONS[0], images) == pytest.approx(scorer.scores(CAPTIONS[0], images), abs=1e-4)
    assert (len(scorer.weights), len(imported.weights)) == (16, 16)


def test_refused_folders(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"--clip: .*empty: holds no CLIP"):
        open_clip_scorer(tmp_path / "empty", CPU)
    _clip_folder(tmp_path / "clip")
    file = tmp_path / "clip" / "model.safetensors"
    weights = load_file(file)
    save_file({name: value for name, value in weights.items() if name != "logit_scale"}, file)
    with pytest.raises(InputError, match="logit_scale: missing"):
        open_clip_scorer(tmp_path / "clip", CPU)
    config = KoclipConfig(
        image_size=32, image_width=0.1, image_depth=0.1, image_hidden_dim=128, text_vocab_size=64, text_seq_len=8,
        text_dim=32, text_layers=1, text_heads=2, text_ff_dim=64, text_position_rows=10, embed_dim=16, similarity="published",
    )  # fmt: skip
    tokenizer = train_tokenizer(["빨강", "파랑"], vocab_size=60)
    write_model_folder(
        tmp_path / "published", {"koclip": Part(config, KoClip(config).state_dict())}, card="tiny", tokenizer=tokenizer
    )
    with pytest.raises(InputError, match="which are no cosines"):
        open_clip_scorer(tmp_path / "published", CPU)
