"""The commands as a shell sees them: exit codes, one line for what the user got wrong, help from anywhere."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from engine import cli
from engine.sampling_params import FIELDS, INIT_IMAGE_FIELDS


@pytest.mark.slow
def test_generate_from_another_folder(
    kodalle_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--candidates", "3", "--top", "2", "--seed", "7", "--top-k", "9", "--out", "그림", "--device", "cpu"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["kodalle", "generate", str(kodalle_run / "model"), "빨강 바탕에 파랑 네모", *options]
    )
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    result = json.loads((tmp_path / "그림" / "result.json").read_text(encoding="utf-8"))
    assert result["caption"] == "빨강 바탕에 파랑 네모"
    assert len(result["candidates"]) == 3
    assert result["candidates"][0]["provenance"]["sampling_params"]["top_k"] == 9
    assert "그림/sheet.png" in capsys.readouterr().out
    assert not (tmp_path / "generations").exists()


def test_missing_model_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["kodalle", "generate", "missing-folder", "x"])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines() == [
        "error: model folder: missing-folder: no such folder: train first, or give the folder of a trained model"
    ]
    assert list(tmp_path.iterdir()) == []


def _commands(command: Any, name: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield name
    for child, inner in getattr(command, "commands", {}).items():
        yield from _commands(inner, (*name, child))


@pytest.mark.parametrize("command", list(_commands(typer.main.get_command(cli.app))), ids=" ".join)
def test_help_of_every_command(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["kodalle", *command, "--help"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert f"Usage: {' '.join(['kodalle', *command])} [" in " ".join(printed.split())
    assert "<bool>" not in printed  # a flag takes no value
    assert list(tmp_path.iterdir()) == []


def test_commands_are_there() -> None:
    found = {" ".join(command) for command in _commands(typer.main.get_command(cli.app))}
    assert found >= {
        "generate",
        "continue",
        "evaluate",
        "demo",
        "data",
        "data captions",
        "data prepare",
        "data check",
        "data make-demo",
    }


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "model", "caption", "--candidates", "1025"],
        ["generate", "model", "caption", "--candidates", "many"],
        ["generate", "model", "caption", "--seed", "1.5"],
        ["generate", "model", "caption", "--colour", "red"],
        ["generate", "model", "caption", "--image", "photo.png", "--keep-rows", "many"],
        ["continue", "model"],
        ["continue", "model", "beginning", "--count", "0"],
        ["paint"],
    ],
)
def test_usage_errors_are_exit_code_2(arguments: list[str]) -> None:
    assert CliRunner().invoke(cli.app, arguments).exit_code == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--candidates", "0"], "--candidates: 0"),
        (["--codec-backend", "auto"], "--codec-backend: auto: write torch or onnx"),
        (["--seed", "-1"], "--seed: -1"),
        (["--seed", str(2**64)], "--seed: "),
        (["--temperature", "-1"], "--temperature: -1"),
        (["--temperature", "1e-40"], "--temperature: 1e-40: must be a number, 0.01 to 100, or 0"),
        (["--temperature", "nan"], "--temperature: nan"),
        (["--top-k", "0"], "--top-k: 0"),
        (["--top-p", "1.5"], "--top-p: 1.5"),
        (["--guidance-scale", "inf"], "--guidance-scale: inf"),
        (["--candidates", "2", "--top", "3"], "--top: 3: is more than the 2 candidates"),
        (["--device", "gpu"], "--device: gpu"),
        (["--mask", "mask.png"], "--mask: mask.png: give the image too: --image FILE"),
        (["--keep-rows", "3"], "--keep-rows: 3: give the image too"),
        (["--strength", "0.3"], "--strength: 0.3: give the image too"),
        (["--changed-from", "빨강"], "--changed-from: 빨강: give the image too"),
        (["--no-paste"], "--no-paste: without an image: give the image too"),
        (["--image", "no.png"], "--image: no.png: no such file"),
        (["--rank-by", "beauty"], "--rank-by: beauty: write koclip or log_likelihood"),
        (["--rank-by", "log_likelihood"], "--rank-by: log_likelihood: is for inpainting"),
    ],
)
def test_bad_values_are_one_line(
    options: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["kodalle", "generate", "missing-folder", "caption", *options])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"error: {message}")


def test_help_states_the_bounds_of_every_sampling_parameter() -> None:
    options = {option.name: option for option in typer.main.get_command(cli.app).commands["generate"].params}  # type: ignore[attr-defined]
    for name, spec in (FIELDS | INIT_IMAGE_FIELDS).items():
        assert spec.description in options[name].help
        if name != "candidates":
            assert spec.range_text in options[name].help
    assert "; 1 to 1024; default: 16" in options["candidates"].help
