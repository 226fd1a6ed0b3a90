"""The example of minDALL-E's sampling, run at a tiny size, with a CLIP that ranks."""

import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

from engine.interop.importing import import_checkpoint
from tests.engine.interop.test_importing_clip import _clip_folder
from tests.engine.interop.test_importing_mindalle import write
from tests.paths import REPOSITORY


@pytest.mark.slow
def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import_checkpoint(write(tmp_path / "theirs", "text"), tmp_path / "model")
    _clip_folder(tmp_path / "clip-files")
    import_checkpoint(tmp_path / "clip-files", tmp_path / "clip")
    script = REPOSITORY / "examples" / "mindalle_sampling.py"
    arguments = [
        "--prompt",
        "a b c",
        "--clip",
        str(tmp_path / "clip"),
        "--figures",
        str(tmp_path / "figures"),
        "--seed",
        "3",
    ]
    monkeypatch.setattr(sys, "argv", [str(script), str(tmp_path / "model"), "-n", "96", *arguments])
    runpy.run_path(str(script), run_name="__main__")
    rank = capsys.readouterr().out
    assert rank.rstrip().endswith("96")
    assert sorted(map(int, rank[1 : rank.index("]")].split(","))) == list(range(96))
    assert rank != f"{list(range(96))} 96\n"  # ranked
    names = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert names == sorted(f"a b c_{number}.png" for number in range(16))
    assert Image.open(tmp_path / "figures" / "a b c_0.png").size == (32, 32)
