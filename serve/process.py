"""Process-wide settings of a server's processes: their names in metrics, logging, thread priorities.

No torch, no ray.
"""

import logging
import os
import socket
import sys
import threading

_COMPUTE_NICENESS = 10  # the default increment of nice(1)


def process_name(kind: str) -> str:
    """The `replica` label of a process's metrics; its last part is the process id."""
    return f"{kind}-{socket.gethostname()}-{os.getpid()}"


def log_to_stderr() -> None:
    """Logs the package `serve` to standard error: one line per request (serve/api/middleware.py), and warnings.

    In a Ray replica, standard error is a file of Ray's session, which Ray prints where the server was started. Ray Serve
    replaces `sys.stderr` by a logger whose level hides everything, so the original stream is used.
    """
    handler = logging.StreamHandler(sys.__stderr__)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("serve")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def lower_thread_priority() -> None:
    """Lowers the scheduling priority of the calling thread and of the threads that it will start.

    For threads that compute on the CPU for seconds: event loops, Ray's proxy and API servers share the cores with them,
    need microseconds, and have clients waiting. On Linux a thread has a nice value of its own, and the OpenMP threads of
    its first parallel operation inherit it; on other systems nothing happens.
    """
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _COMPUTE_NICENESS)
