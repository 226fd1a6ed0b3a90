"""Whether a model folder holds what was written: digests, weights that are numbers.

`SHA256SUMS` is written with the folder, in the form of `sha256sum -c`. Each file is compared with it when it is loaded; folders
without it load as they are. Left out is what people edit or measure later: generation_config.json, captions.json,
real_scores.json, model_card.md. It tells damage and mix-ups, not malice: who can change a file can change its digest.

After a change that is meant, in the folder:

    sha256sum config.json tokenizer*.json *.safetensors > SHA256SUMS      (and ranker_tokenizer/* if there is one)
"""

import re
from pathlib import Path

from torch import Tensor

from engine.errors import InputError
from engine.files import file_digest

SUMS_FILE = "SHA256SUMS"
_EDITED = frozenset(("generation_config.json", "captions.json", "real_scores.json", "model_card.md", SUMS_FILE))
_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")
_RENEW = "renew SHA256SUMS (`sha256sum config.json tokenizer*.json *.safetensors > SHA256SUMS` in the folder)"


def write_sums(folder: Path) -> None:
    """Writes `SHA256SUMS` over all files of a folder but those that people edit."""
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    lines = [f"{file_digest(folder / path).sha256}  {path.as_posix()}\n" for path in files if path.name not in _EDITED]
    (folder / SUMS_FILE).write_text("".join(lines), encoding="utf-8")


def check_sums(folder: Path, *names: str) -> None:
    """Compares files of a folder with its `SHA256SUMS`, if it has one.

    Raises:
        InputError: a file that was changed or is not listed, by name; a list that is none.
    """
    path = folder / SUMS_FILE
    if not path.is_file():
        return
    sums = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        found = _LINE.fullmatch(line)
        if found is None:
            raise InputError(str(path), line[:80], f"is no line of sha256sum: fetch the model again, or {_RENEW}")
        sums[found[2]] = found[1]
    for name in names:
        if not (folder / name).is_file():
            continue  # it is named where it is read
        if name not in sums:
            raise InputError("model folder", folder / name, f"is not in SHA256SUMS: remove it, or {_RENEW}")
        if file_digest(folder / name).sha256 != sums[name]:
            remedy = f"is not what was exported: fetch the model again, or, if you changed it, {_RENEW}"
            raise InputError("model folder", folder / name, remedy)


def check_weight(value: Tensor, expected: Tensor, *, field: str) -> None:
    """Raises InputError for integers in place of fractions or the other way, and for values that are no finite numbers."""
    if value.is_floating_point() != expected.is_floating_point():
        wanted = "floating-point numbers" if expected.is_floating_point() else "integers"
        raise InputError(field, str(value.dtype).removeprefix("torch."), f"must hold {wanted}: export the model again")
    if value.is_floating_point() and not bool(value.isfinite().all()):
        raise InputError(field, "NaN or infinite", "a weight must be a finite number: export the model again")
