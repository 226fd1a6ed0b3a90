"""Error reports of commands: bad input as one line, `error: field: value: remedy`, on stderr, with exit code 2.

Typer draws a box of three lines round it, under two more about usage.
"""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

import typer

from engine.commands.missing_packages import as_input_error
from engine.errors import InputError

# The base of Typer's errors about a command line. Typer has click's exceptions, newer ones a copy of its own.
_UsageError: Any = typer.BadParameter.__mro__[1]


def run_app(app: typer.Typer, arguments: list[str] | None = None, *, prog_name: str) -> NoReturn:
    """Runs a command and leaves the program.

    Args:
        arguments: default: the program's own.
        prog_name: how the command is called in its help and in remedies.
    """
    with error_lines(prog_name):
        code = app(arguments, prog_name=prog_name, standalone_mode=False)
    sys.exit(code if isinstance(code, int) else 0)


@contextlib.contextmanager
def error_lines(prog_name: str = "") -> Iterator[None]:
    """Turns what the user can mend into one line on stderr and exit code 2: bad input, a package that is not installed."""
    try:
        yield
    except InputError as error:
        _fail(f"error: {error}")
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
