"""A tiny model folder, and the same with its ONNX files."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.codec import onnx_export
from engine.codec.onnx_export import export_model
from engine.config.codec import VqganConfig
from engine.config.ranker import KoclipConfig
from engine.config.transformer import TransformerConfig
from engine.data.tokenizer import train_tokenizer
from engine.models.folder import Part, write_model_folder
from engine.models.koclip import KoClip
from engine.models.transformer import KoDalle
from engine.models.vqgan import Vqgan

CAPTIONS = ["빨강 바탕에 파랑 네모", "초록 네모"]


@pytest.fixture(scope="session")
def model(run_tree: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model folder with random weights, an attention block in its decoder and images that are not flat."""
    folder = tmp_path_factory.mktemp("onnx") / "model"
    tree = {stage: run_tree(stage, folder)["model"] for stage in ("vqgan", "koclip", "kodalle")}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vqgan = Vqgan(VqganConfig(**(tree["vqgan"] | {"attention_resolutions": [8]})))
        torch.nn.init.normal_(vqgan.quantize.embedding.weight)
        koclip = KoClip(KoclipConfig(**tree["koclip"]))
        transformer = KoDalle(TransformerConfig(**tree["kodalle"]))
    parts = {
        "vqgan": Part(vqgan.config, vqgan.state_dict()),
        "koclip": Part(koclip.config, koclip.state_dict()),
        "transformer": Part(transformer.config, transformer.state_dict()),
    }
    write_model_folder(folder, parts, card="", tokenizer=train_tokenizer(CAPTIONS, vocab_size=60))  # type: ignore[arg-type]
    return folder


@pytest.fixture(scope="session")
def exported(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with its ONNX files. Read it, never write there."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    folder = shutil.copytree(model, tmp_path_factory.mktemp("exported") / "model")
    export_model(folder, folder)
    return folder


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_export, "_MOST_ROUNDS", 1)
