"""Error reports of commands: bad input as one line, `error: field: value: remedy`, on stderr, with exit code 2.

Typer draws a box of three lines round it, under two more about usage. A field that the user gave by an option is called
as it was typed: `--top-k`, not `top_k`.
"""

import contextlib
import io
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any, NoReturn

import typer

from engine.commands.missing_packages import as_input_error
from engine.errors import InputError
from engine.files import as_disk_fault

_HOME = re.compile(r"^(--[\w-]+=)(~.*)$")

# The base of Typer's errors about a command line. Typer has click's exceptions, newer ones a copy of its own.
_UsageError: Any = typer.BadParameter.__mro__[1]


# Options whose field has another name in engine and serve.
_FIELDS_OF_OPTIONS = {
    "--mask": ("mask_image",),
    "--int8": ("weights",),
    "--keys": ("keys_file",),
    "--file": ("keys_file",),
    "--workers": ("num_workers",),
}


def run_app(app: typer.Typer, arguments: list[str] | None = None, *, prog_name: str) -> NoReturn:
    """Runs a command and leaves the program.

    Args:
        arguments: default: the program's own.
        prog_name: how the command is called in its help and in remedies.
    """
    signal.signal(signal.SIGTERM, _end)
    print_anything()
    # A shell leaves `--out=~/x` alone, and no one wants a folder named ~.
    given = [_HOME.sub(_in_home, argument) for argument in (sys.argv[1:] if arguments is None else arguments)]
    with error_lines(prog_name, given):
        command = typer.main.get_command(app)
        _show_flags_without_a_type(command)
        code = command(given, prog_name=prog_name, standalone_mode=False)
    sys.exit(code if isinstance(code, int) else 0)


@contextlib.contextmanager
def error_lines(prog_name: str = "", arguments: Sequence[str] = ()) -> Iterator[None]:
    """Turns what the user can mend into one line on stderr and exit code 2: bad input, a package that is not installed.

    Args:
        arguments: of the command line, whose options name the fields that they set.
    """
    try:
        yield
    except InputError as error:
        _fail(f"error: {InputError(_as_typed(error.field, arguments), error.value, error.remedy)}")
    except OSError as error:
        fault = as_disk_fault(error)
        if fault is None:
            raise
        _fail(f"error: {fault}")
    except ModuleNotFoundError as error:
        missing = as_input_error(error)
        if missing is None:
            raise
        _fail(f"error: {missing}")
    except typer.Abort:
        _fail("stopped", code=130)  # as shells count SIGINT
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # a group that was called alone
            error.show()
            sys.exit(2)
        _fail(f"error: {_as_line(error, prog_name)}")


def print_anything() -> None:
    """Lets stdout and stderr escape what they cannot encode: a name that is not UTF-8, or Hangul on an ASCII terminal."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a test's may be something else
            stream.reconfigure(errors="backslashreplace")


def _in_home(found: re.Match[str]) -> str:
    return found[1] + os.path.expanduser(found[2])


def _end(number: int, _frame: FrameType | None) -> NoReturn:
    """SIGTERM ends a command as an exception does: what it started and its temporary files go with it."""
    sys.exit(128 + number)


def _as_typed(field: str, arguments: Sequence[str]) -> str:
    """The option that set a field, where the command line has one; else the field."""
    typed = {argument.partition("=")[0] for argument in arguments if argument.startswith("--")}
    options = [f"--{field.replace('_', '-')}", *(name for name, known in _FIELDS_OF_OPTIONS.items() if field in known)]
    return next((option for option in options if option in typed), field)


def _show_flags_without_a_type(command: Any) -> None:
    """Typer's help prints `<bool>` behind a flag, as if it took a value."""
    for option in [*command.params, command.get_help_option(typer.Context(command))]:
        if getattr(option, "is_bool_flag", False):
            option.metavar = ""
    for inner in getattr(command, "commands", {}).values():
        _show_flags_without_a_type(inner)


def _as_line(error: Any, prog_name: str) -> str:
    command = error.ctx.command_path if error.ctx is not None else prog_name
    remedy = f"see `{command} --help`"
    parameter = getattr(error, "param", None)
    # What pydantic, by which Typer checks values, was given.
    faults = error.__cause__.errors() if hasattr(error.__cause__, "errors") else []
    if parameter is not None and faults:
        names = [name for name in parameter.opts if name.startswith("--")]
        field = names[0] if names else parameter.name.upper()
        return str(InputError(field, faults[0]["input"], f"{faults[0]['msg']}; {remedy}"))
    return " ".join(f"{error.format_message().rstrip('.')}; {remedy}".split())


def _fail(line: str, *, code: int = 2) -> NoReturn:
    print(line, file=sys.stderr)
    sys.exit(code)
