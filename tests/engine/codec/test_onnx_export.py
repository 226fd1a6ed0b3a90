"""ONNX export: what is written, and that a failing one changes nothing."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import cli
from engine.codec import onnx_export
from engine.codec.onnx_backend import (
    NETWORKS,
    onnx_file,
)
from engine.codec.onnx_export import MEASUREMENT_FILE, export_model
from engine.errors import InputError
from engine.models.folder import read_part, write_model_folder
from engine.models.folder_config import weights_digest

FILES = {f"{name}.onnx" for name in NETWORKS} | {MEASUREMENT_FILE}


@pytest.fixture
def copied(exported: Path, tmp_path: Path) -> Path:
    return shutil.copytree(exported, tmp_path / "copied")


def test_what_is_written(model: Path, exported: Path) -> None:
    assert {path.name for path in exported.iterdir()} == {path.name for path in model.iterdir()} | FILES
    report = json.loads((exported / MEASUREMENT_FILE).read_text(encoding="utf-8"))
    assert report["files"].keys() == NETWORKS.keys()
    for name, file in report["files"].items():
        assert file["bytes"] == onnx_file(exported, name).stat().st_size
        assert file["source"] == weights_digest(exported, NETWORKS[name].part)
        assert 0 <= file["max_abs_error"] <= 1e-4
    measured = report["measured"]["cpu"]
    assert (measured["threads"], measured["provider"]) == (torch.get_num_threads(), "CPUExecutionProvider")
    for part in ("vqgan", "koclip"):
        assert measured[part]["torch_ms"] > 0
        assert measured[part]["onnx_ms"] > 0
    assert report["facts"]["versions"]["torch"] == torch.__version__


@pytest.mark.slow
@pytest.mark.usefixtures("quick", "exported")
def test_export_command(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    before = sorted(model.iterdir())
    out = tmp_path / "그림" / "onnx"
    out.mkdir(parents=True)
    (out / ".partial-vqgan_decoder.onnx-killed").write_bytes(b"half a file")
    monkeypatch.setattr(sys, "argv", ["kodalle", "export", str(model), "--out", str(out)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 0
    assert {path.name for path in out.iterdir()} == FILES
    assert sorted(model.iterdir()) == before
    printed = capsys.readouterr()
    assert printed.err == ""
    lines = printed.out.splitlines()
    progress = [line for line in lines if line.startswith("export ")]  # a slow machine prints more than the last
    assert progress[-1].startswith("export 4/4")
    lines = lines[len(progress) :]
    for name, line in zip(NETWORKS, lines[:3], strict=True):
        assert line.startswith(f"{onnx_file(out, name)}  {onnx_file(out, name).stat().st_size:,} bytes  max abs error")
    assert lines[3].startswith(f"cpu, {torch.get_num_threads()} threads: VQGAN decoder: torch ")
    assert "; KoCLIP images: torch " in lines[3]


@pytest.mark.usefixtures("quick", "exported")
def test_folder_of_a_codec_alone(model: Path, tmp_path: Path) -> None:
    write_model_folder(tmp_path / "m", {"vqgan": read_part(model, "vqgan")}, card="")
    report = export_model(tmp_path / "m", tmp_path / "m")
    assert report.files.keys() == {"vqgan_decoder"}
    assert report.measured["cpu"].koclip is None
    assert not onnx_file(tmp_path / "m", "koclip_text").exists()
    write_model_folder(tmp_path / "t", {"transformer": read_part(model, "transformer")}, card="")
    with pytest.raises(InputError, match="has neither a vqgan nor a koclip"):
        export_model(tmp_path / "t", tmp_path / "t")


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_export_that_fails_changes_nothing(copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in copied.iterdir()}
    monkeypatch.setattr(onnx_export, "_WORST_ERROR", -1.0)
    with pytest.raises(RuntimeError, match=r"vqgan_decoder exported to ONNX is .* from torch's output"):
        export_model(copied, copied)
    assert {path.name: path.read_bytes() for path in copied.iterdir()} == before
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--out: .*is a file"):
        export_model(copied, tmp_path / "file")


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_export_without_a_package_is_exit_code_2(
    package: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("onnx", "onnxruntime"):
        if name != package:
            pytest.importorskip(name)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(sys, "argv", ["kodalle", "export", str(model), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: package {package}: needed for")
    assert f"install it with `pip install {package}" in line
    assert list(tmp_path.iterdir()) == []
