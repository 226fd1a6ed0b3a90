"""The one exception: one line, and the same one after a trip between processes."""

import pickle
from pathlib import Path

from engine.data.pairs import CaptionFault
from engine.errors import InputError


def test_one_line() -> None:
    error = InputError("seed", "a\nb", "give\none")
    assert str(error) == "seed: a b: give one"
    assert (error.field, error.value, error.remedy) == ("seed", "a\nb", "give\none")


def test_travels_between_processes() -> None:
    for error in (InputError("seed", -1, "give 0"), CaptionFault("empty_caption", Path("a.txt"), "is empty")):
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error)
        assert str(again) == str(error)
        assert again.__dict__ == error.__dict__


def test_every_terminal_takes_the_line() -> None:
    name = "옷\x1b[2J\u200b.jpg".encode("cp949", "replace").decode("utf-8", "surrogateescape")
    line = str(InputError("image", Path(name), "rename it"))
    assert line == "image: \\xbf\\xca\\x1b[2J?.jpg: rename it"
