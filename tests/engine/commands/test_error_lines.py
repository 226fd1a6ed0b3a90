"""Bad command lines: one line on stderr, exit code 2, wherever the fault is found."""

import errno
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import pytest
import typer

from engine import cli
from engine.commands.error_lines import error_lines, run_app
from engine.errors import InputError
from serve import command


@pytest.fixture(autouse=True)
def _own_signals() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def ended(capsys: pytest.CaptureFixture[str], app: typer.Typer, *arguments: str) -> tuple[object, str]:
    """Exit code, stderr."""
    with pytest.raises(SystemExit) as left:
        run_app(app, list(arguments), prog_name="it")
    output = capsys.readouterr()
    return left.value.code, output.err


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("generate", "x", "y", "--seed", "-1"), "error: --seed: -1: must be a whole number, 0 to "),
        (("continue", "x", "y", "--count", "0"), "error: --count: 0: Input should be greater than or equal to 1; see"),
        (("generate", "x", "y", "--top", "many"), "error: --top: many: Input should be a valid integer"),
        (("continue", "x"), "error: Missing argument 'beginning'; see `it continue --help`"),
        (("genrate",), "error: No such command 'genrate'. Did you mean 'generate'?; see `it --help`"),
        (("generate", "x", "y", "--sed", "1"), "error: No such option: --sed"),
        (("generate", "x", "y", "z"), "error: Got unexpected extra argument"),
        (("generate", "x", "y", "--seed"), "error: Option '--seed' requires an argument"),
        (("data", "prepre"), "error: No such command 'prepre'"),
        (("generate", "nowhere", "y"), "error: model folder: nowhere: no such folder"),
    ],
)
def test_kodalle_reports_bad_input_in_one_line(
    arguments: tuple[str, ...], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, stderr = ended(capsys, cli.app, *arguments)
    assert code == 2
    assert stderr.startswith(line)
    assert stderr.count("\n") == 1


def test_the_server_reports_bad_input_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    code, stderr = ended(capsys, command.app, "--port", "70000")
    assert (code, stderr.count("\n")) == (2, 1)
    assert stderr.startswith("error: --port: 70000: Input should be less than or equal to 65535; see `it --help`")


@pytest.mark.parametrize(
    ("field", "arguments", "shown"),
    [
        ("top_k", ["--top-k", "0"], "--top-k"),
        ("top_k", ["--top-k=0"], "--top-k"),
        ("keys_file", ["x", "--keys", "k.yaml"], "--keys"),
        ("mask_image", ["--mask", "m.png"], "--mask"),
        ("top_k", ["--top", "4"], "top_k"),  # the model's own
        ("data.pairs", ["run.yaml", "data.pairs=nowhere"], "data.pairs"),
    ],
)
def test_a_field_is_called_by_the_option_that_set_it(
    field: str, arguments: list[str], shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit), error_lines(arguments=arguments):
        raise InputError(field, "a value", "mend it")
    assert capsys.readouterr().err == f"error: {shown}: a value: mend it\n"


def test_disk_faults_are_one_line_and_home_is_found(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    app = typer.Typer()

    @app.command()
    def some(out: Annotated[Path, typer.Option()], number: Annotated[int, typer.Option()] = 0) -> None:
        if number:
            raise OSError(number, os.strerror(number), str(out))
        print(out)

    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(SystemExit):
        run_app(app, ["--out=~/x"], prog_name="it")
    assert capsys.readouterr().out == f"{tmp_path}/x\n"
    code, stderr = ended(capsys, app, "--out=/there", f"--number={errno.ENOSPC}")
    assert (code, stderr) == (2, "error: disk: /there: No space left on device: make room\n")
    code, stderr = ended(capsys, app, "--out=/there", f"--number={errno.EACCES}")
    assert (code, stderr.count("\n")) == (2, 1)
    with pytest.raises(ConnectionResetError):
        run_app(app, ["--out=/there", f"--number={errno.ECONNRESET}"], prog_name="it")


def test_exit_codes_stop_signals_and_bugs(capsys: pytest.CaptureFixture[str]) -> None:
    app = typer.Typer()

    @app.command()
    def some(what: Annotated[str, typer.Argument()]) -> None:
        if what == "exit":
            raise typer.Exit(3)
        if what == "interrupt":
            raise KeyboardInterrupt
        if what == "bug":
            raise ZeroDivisionError
        if what == "input":
            raise InputError("colour", "rd", "did you mean red?")

    assert ended(capsys, app, "fine") == (0, "")
    assert ended(capsys, app, "exit") == (3, "")
    assert ended(capsys, app, "interrupt")[0] == 130
    assert ended(capsys, app, "input") == (2, "error: colour: rd: did you mean red?\n")
    with pytest.raises(ZeroDivisionError):
        run_app(app, ["bug"], prog_name="it")


def test_a_group_alone_shows_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        run_app(cli.app, [], prog_name="it")
    assert left.value.code == 2
    output = capsys.readouterr()
    assert "evaluate" in output.out + output.err
