"""A folder that is made over hours: it appears only once complete, and a run that was stopped goes on where it was.

The work lies in a hidden folder beside the destination, or inside it where that exists already (a mount point, `.`, a link to
another disk); `.journal` in it holds what the work needs, and nothing afterwards. Bad input removes it all. A signal, a full
disk or a power failure leaves it for the same command with the same input; other input starts anew.
"""

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from engine.errors import InputError
from engine.files import DiskFault, held_names, is_there, named_disk_faults, sync, write_json
from engine.folder_lock import hold_lock

JOURNAL = ".journal"
_INSIDE = ".preparing"


@contextlib.contextmanager
def work_folder(destination: Path, identity: object, *, made: tuple[str, ...]) -> Iterator[Path]:
    """Yields the folder to work in; it is `destination` when the block ends without an exception.

    Args:
        destination: new, or an empty folder.
        identity: JSON of all that the content depends on; compared with that of an unfinished run.
        made: names in the folder when it is complete; the last one tells that it is.

    Raises:
        InputError: the destination holds something, or another process works there.
    """
    destination = Path(os.path.realpath(destination))
    with named_disk_faults(destination):
        is_inside = is_there(destination)
    work = destination / _INSIDE if is_inside else destination.with_name(f"{_INSIDE}-{destination.name}")
    if is_inside:
        _take_back(destination, work, made)
    try:
        with named_disk_faults(work, kept="run the same command to go on"):
            (work / JOURNAL).mkdir(parents=True, exist_ok=True)
        with (
            named_disk_faults(work, kept="run the same command to go on"),
            hold_lock(work / JOURNAL / "lock", field="destination"),
        ):
            _keep_if_same(work, identity)
            yield work
            os.sync()
    except InputError as error:
        if not isinstance(error, DiskFault) and error.value != work / JOURNAL:  # a full disk, or another one's work
            shutil.rmtree(work, ignore_errors=True)
        raise
    except (KeyboardInterrupt, SystemExit):
        print("stopped: run the same command to go on", file=sys.stderr, flush=True)
        raise
    if is_inside:
        for name in made:
            (work / name).replace(destination / name)
        shutil.rmtree(work)
    else:
        work.replace(destination)
        sync(destination.parent)
        shutil.rmtree(destination / JOURNAL)


def _take_back(destination: Path, work: Path, made: tuple[str, ...]) -> None:
    """Refuses a folder that holds something else than unfinished work; its parts that were moved already return to it."""
    if not destination.is_dir():
        raise InputError("destination", destination, "is a file: choose another folder")
    found = held_names(destination)
    moved = found - {work.name}
    if moved and not (work.is_dir() and moved <= set(made[:-1])):
        raise InputError("destination", destination, "exists already: choose another folder, or remove it first")
    for name in moved:
        (destination / name).replace(work / name)


def _keep_if_same(work: Path, identity: object) -> None:
    file = work / JOURNAL / "identity.json"
    with contextlib.suppress(OSError, ValueError, RecursionError):  # missing, or damaged: then it is of no known work
        if json.loads(file.read_bytes()) == identity:
            return
    if file.is_file():
        print("note: other files or options than before: preparing starts anew", file=sys.stderr, flush=True)
    for path in (*work.iterdir(), *(work / JOURNAL).iterdir()):
        if path.name not in (JOURNAL, "lock"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    write_json(file, identity)
