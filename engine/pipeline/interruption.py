"""How callers end what takes long before it is finished: a function that is called before each part of it, and may raise.

The server's looks at a request's deadline and whether its client is still there (serve/worker/request_state.py).
"""

from collections.abc import Callable

BeforePart = Callable[[], None]
"""Called before each part of the work. To end it, raise: the exception passes through."""


def uninterrupted() -> None:
    """Lets everything be finished."""
