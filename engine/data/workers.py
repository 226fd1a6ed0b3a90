"""Runs a function over many files in processes, in order, with a progress bar.

Results come in the order of the jobs whatever the number of workers, so that what is written does not depend on it.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from engine.errors import InputError

Job = TypeVar("Job")
Result = TypeVar("Result")

AHEAD = 16  # jobs submitted per worker: keeps all busy, few results in memory


def ordered_map(
    function: Callable[[Job], Result],
    jobs: Iterable[Job],
    *,
    workers: int,
    title: str = "",
    progress: bool = False,
    total: int | None = None,
) -> Generator[tuple[Job, Result], None, None]:
    """Yields (job, function(job)) in order; jobs are taken a few ahead of the results.

    Args:
        function: picklable when workers > 1.
        jobs: picklable when workers > 1.
        workers: processes; 1 works in this one.
        title: beside the bar.
        progress: show a bar with the time left, on stderr, if that is a terminal.
        total: number of jobs, where they are not a sequence.

    Raises:
        InputError: workers < 1, or a worker process died (usually out of memory).
    """
    if workers < 1:
        raise InputError("workers", workers, "must be at least 1")
    if isinstance(jobs, Sequence):
        total = len(jobs)
        workers = min(workers, total)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with (
        contextlib.closing(_in_order(function, jobs, workers)) as results,
        Progress(*columns, console=console, disable=not (progress and console.is_terminal)) as bar,
    ):
        yield from bar.track(results, total=total, description=title)


def _in_order(
    function: Callable[[Job], Result], jobs: Iterable[Job], workers: int
) -> Generator[tuple[Job, Result], None, None]:
    if workers <= 1:
        for job in jobs:
            yield job, function(job)
        return
    # spawn: forking a process that has threads (the progress bar's, a tokenizer's) may deadlock the child
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_stay_with_parent)
    waiting: deque[tuple[Job, Future[Result]]] = deque()
    try:
        for job in jobs:
            waiting.append((job, pool.submit(function, job)))
            if len(waiting) >= AHEAD * workers:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    except BrokenProcessPool as error:
        raise InputError("workers", workers, "a worker process died, likely out of memory: use fewer") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _stay_with_parent() -> None:
    """In a worker: it ends with the process that started it, however that ends, and not by a terminal's Ctrl-C before."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # without waiting for the job at hand
