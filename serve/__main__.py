"""`kodalle serve` and `python -m serve`: see serve/command.py.

Imports nothing when it is imported itself: `kodalle --help` reads the help of `main` from here.
"""


def main(arguments: list[str] | None = None) -> None:
    """Serves a model: the designers' page and an API compatible with OpenAI's."""
    from engine.commands.error_lines import error_lines

    with error_lines():
        from serve import command
    command.main(arguments)


if __name__ == "__main__":
    main()
