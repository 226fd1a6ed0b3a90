"""What one process of a server is called, and where it writes its log.

No torch, no ray.
"""

import logging
import os
import socket
import sys
import threading

_DRAWING_NICE = 10  # what nice(1) adds


def process_name(kind: str) -> str:
    """The `replica` label of a process's figures; its last part is the process id."""
    return f"{kind}-{socket.gethostname()}-{os.getpid()}"


def log_to_stderr() -> None:
    """One line a request (serve/api/middleware.py), and warnings of everything else.

    In a Ray replica, standard error is a file of Ray's session, which Ray prints where the server was started. Ray Serve
    puts a logger of its own in the place of `sys.stderr`, whose level hides everything: the real one is written to.
    """
    handler = logging.StreamHandler(sys.__stderr__)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("serve")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def step_behind() -> None:
    """Lets every other thread of the machine go before the calling one, and before those that it will start.

    For threads that compute on the CPU for seconds: what they share the cores with (event loops, Ray's proxy and edge)
    has microseconds to do, and somebody waits for it. On Linux a thread has a nice value of its own, and the OpenMP
    threads of its first parallel product inherit it; elsewhere nothing happens.
    """
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _DRAWING_NICE)
