"""The one exception for what a user can get wrong.

Entry points turn it into a single line on stderr and exit code 2, without a traceback; everything else is a bug and
keeps its traceback.
"""

from typing import Any

BYTES = range(0xDC80, 0xDD00)  # where Python keeps the bytes of a file name that is not UTF-8


class InputError(ValueError):
    """Bad input, stated as field, value and remedy; its text is one line that every terminal takes.

    Args:
        field: what was wrong, as the user wrote it (config key, file, option).
        value: what stood there.
        remedy: what to do about it, as an instruction.
    """

    def __init__(self, field: str, value: object, remedy: str) -> None:
        self.field = field
        self.value = value
        self.remedy = remedy
        super().__init__(printable(f"{field}: {value}: {remedy}".replace("\n", " ")))

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions are unpickled by calling the class with its message alone, which fits neither this nor its kin.
        return _restored, (type(self), self.args, self.__dict__)


def printable(text: str) -> str:
    """A text that every UTF-8 file and terminal takes: bytes of no UTF-8 as `\\xb0`, controls and what is invisible escaped."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else _escape(letter) for letter in text)


def _escape(letter: str) -> str:
    number = ord(letter)
    if number in BYTES:
        return f"\\x{number - 0xDC00:02x}"
    return letter.encode("unicode_escape").decode("ascii")


def _restored(kind: type[InputError], arguments: tuple[Any, ...], attributes: dict[str, Any]) -> InputError:
    error = kind.__new__(kind, *arguments)
    error.__dict__.update(attributes)
    return error
