"""Checkpoints that the originals wrote, and what the originals computed from them (benchmarks/parity.py).

They are no part of this repository: KODALLE_FIXTURES is the folder that holds them. Everything they show is also shown by
checkpoints that the other tests make themselves, against the arithmetic written a second time.
"""

import importlib
import os
from pathlib import Path
from types import ModuleType

import pytest

from engine.errors import InputError
from engine.interop.importing import import_checkpoint
from tests.paths import REPOSITORY

FIXTURES = Path(os.environ.get("KODALLE_FIXTURES", "fixtures-are-not-here"))
pytestmark = pytest.mark.skipif(
    not FIXTURES.is_dir(), reason="KODALLE_FIXTURES names no folder of original checkpoints"
)

READ = [
    "taming-vqmodel", "taming-gumbelvq", "dalle-vae-plain", "dalle-vae-resnet", "openai-dvae", "koclip-linear", "koclip-mlp",
    "kodalle-plain", "dalle-1.1.6-plain", "dalle-1.6.6-plain", "dalle-1.6.6-axial-names", "dalle-1.6.6-trained-state",
    "dalle-1.6.6-share-emb", "dalle-1.6.6-shared-layers", "dalle-1.6.6-reversible", "dalle-1.6.6-sandwich-stable", "kodalle-yaml-recipe", "dalle-1.1.6-reversible-shift", "dalle-1.2.2-shift-rotary", "dalle-1.6.6-rotary-shift", "dalle-1.6.6-reversible-rotary-shift", "dalle-1.6.6-conv", "dalle-1.6.6-attn-mix", "dalle-1.6.6-attn-mix-share-emb-stable",
    "mindalle", "mindalle-clscond", "mindalle-uncond",
]  # fmt: skip
REFUSED = {"dalle-deepspeed-auxiliary": "holds the weights"}


@pytest.fixture(scope="module")
def parity() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(REPOSITORY / "benchmarks")
        return importlib.import_module("parity")


@pytest.mark.parametrize("name", READ)
def test_the_same_is_computed(name: str, parity: ModuleType) -> None:
    row = parity.compare(FIXTURES / name)
    assert "refused" not in row, row
    assert row.get("tokens_equal", True)
    assert row.get("prompt_tokens_equal", True)
    for key in ("logits", "losses", "code_scores", "embeddings", "scores"):
        assert row.get(key, 0.0) <= 1e-5, row
    assert row.get("pixels", 0.0) <= 1e-4, row


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused_by_name(name: str, parity: ModuleType) -> None:
    assert REFUSED[name] in parity.compare(FIXTURES / name)["refused"]


def test_settings_of_deepspeed_are_refused(tmp_path: Path) -> None:
    folder = FIXTURES / "dalle-deepspeed-auxiliary" / "dalle-ds-cp"
    for source in (folder, folder / "auxiliary.pt"):
        with pytest.raises(InputError, match="weights"):
            import_checkpoint(source, tmp_path / "model")


def test_every_original_is_in_one_of_the_lists() -> None:
    held = {path.name for path in FIXTURES.iterdir() if (path / "expected.safetensors").is_file()}
    assert held <= set(READ) | set(REFUSED)
