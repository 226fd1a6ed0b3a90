"""A lock that lets one process at a time write a folder, and names the one that does."""

import contextlib
import errno
import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from engine.errors import InputError

_HELD = (errno.EACCES, errno.EAGAIN)


@contextlib.contextmanager
def hold_lock(path: Path, *, field: str, wait: bool = False) -> Iterator[None]:
    """Holds a lock file within the block.

    The system frees it when this process ends, however that happens: what a killed one left does not block. Processes
    forked from this one do not hold it. It is freed as well when this process closes the same file elsewhere: leave the
    lock file alone. On file systems without locks a note is printed instead.

    Args:
        path: the lock file; it states its holder, and stays.
        field: what the folder is called in the error.
        wait: until another process has freed it, instead of an error.

    Raises:
        InputError: another process holds it; names its process id and host.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _HELD:
                print(f"note: {path.parent} cannot be locked ({error.strerror}): start nothing else there", flush=True)
                yield
                return
            file.seek(0)
            holder = file.read().strip() or "another process"
            if not wait:
                raise InputError(
                    field, path.parent, f"{holder} works there: wait until it ends, stop it, or choose another folder"
                ) from error
            print(f"waiting for {holder}, which works in {path.parent}", file=sys.stderr, flush=True)
            fcntl.lockf(file, fcntl.LOCK_EX)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
