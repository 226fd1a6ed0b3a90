"""Subcommands from packages above `engine`, which `engine` never imports: the entry-point group `kodalle.commands`.

An entry point names a function of the command's arguments. Its module is imported for the help, so it imports nothing
heavy itself; the first line of the function's docstring is the help.
"""

from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points

import typer

GROUP = "kodalle.commands"

# Everything after the name, `--help` included, goes to the function.
_PASS_ALL = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


def add_plugin_commands(app: typer.Typer) -> None:
    """Registers every installed entry point as a subcommand."""
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        _add(app, point)


def _add(app: typer.Typer, point: EntryPoint) -> None:
    run: Callable[[list[str]], None] = point.load()

    def command(context: typer.Context) -> None:
        run(context.args)

    help_line = (run.__doc__ or "").partition("\n")[0]
    app.command(point.name, help=help_line, add_help_option=False, context_settings=_PASS_ALL)(command)
