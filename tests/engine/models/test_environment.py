"""A torchvision that does not import is named with its remedy, and our models never need one."""

import subprocess
import sys
from pathlib import Path

import pytest

from engine.errors import InputError
from engine.models.environment import check_torchvision
from tests.paths import REPOSITORY


def _install(folder: Path, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package = folder / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(code)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)


@pytest.mark.parametrize("fault", ["RuntimeError('operator torchvision::nms does not exist')", "ImportError('no .so')"])
def test_a_broken_torchvision_is_named(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _install(tmp_path, f"raise {fault}", monkeypatch)
    with pytest.raises(InputError, match="pip uninstall torchvision"):
        check_torchvision()


def test_a_working_one_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _install(tmp_path, "", monkeypatch)
    check_torchvision()
    monkeypatch.delitem(sys.modules, "torchvision")


def test_an_absent_one_passes_without_an_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("importlib.import_module", lambda name: pytest.fail("imported"))
    check_torchvision()


@pytest.mark.slow
def test_our_models_import_neither_torchvision_nor_lightning() -> None:
    code = """
import sys
import engine.models.koclip, engine.models.vqgan, engine.models.vqgan_loss
import engine.models.transformer
assert "transformers" not in sys.modules, "importing koclip must stay cheap and safe"
assert "torch._dynamo" not in sys.modules, "torch's compiler takes seconds to import"
from pathlib import Path
from engine.models.folder import load_part
for part in ("transformer", "vqgan"):
    load_part(Path("models/clothing"), part)
assert not {"torch._dynamo", "sympy"} & set(sys.modules), "random weights on the meta device import the compiler"
from transformers import EfficientNetModel, RobertaModel
loaded = {name.split(".")[0] for name in sys.modules}
print(sorted(loaded & {"torchvision", "pytorch_lightning", "lightning", "omegaconf", "timm"}))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
