"""The commands of docs/generation.md run, in order, as they stand there but for a tiny model and its sizes."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from engine import cli

PAGE = Path(__file__).resolve().parents[3] / "docs" / "generation.md"
# Of the shipped model and of the tests' one, which has 32 x 32 pixels in 8 x 8 tokens.
SMALLER = {"192x128": "48x32", "--keep-rows 6": "--keep-rows 4", "--refine 10": "--refine 2"}


def _commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def test_the_recipes_run(kodalle_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    commands = _commands()
    assert len(commands) == 4
    for command in commands:
        for theirs, ours in SMALLER.items():
            command = command.replace(theirs, ours)
        words = shlex.split(command.replace("models/clothing", str(kodalle_run / "model")))
        words = [str(next(tmp_path.glob(word))) if "*" in word else word for word in words]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert not caught.value.code, command
    stated = {
        folder: json.loads((tmp_path / folder / "result.json").read_text(encoding="utf-8"))
        for folder in ("larger", "given", "redrawn", "refined")
    }
    assert stated["larger"]["candidates"][0]["provenance"]["size"] == {"width": 48, "height": 32}
    assert stated["redrawn"]["init_tokens"] == 32
    assert stated["refined"]["candidates"][0]["provenance"]["refinement"]["steps"] == 2
