"""Progress of long work, for a terminal, a notebook, or a listener that may cancel it.

Everything long in labkit loops over ``track(items, "what it does")``. By default that is a tqdm bar. Inside
``with listen(callback)`` the callback gets ``(what, done, total)`` instead, and may raise :class:`Cancelled`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar


class Cancelled(Exception):
    """Raised by a listener to stop the work at the next step; what was finished before stays."""


_listener: ContextVar[Callable[[str, int, int], None] | None] = ContextVar("labkit_progress", default=None)


@contextmanager
def listen(callback: Callable[[str, int, int], None]) -> Iterator[None]:
    """Send progress to ``callback(what, done, total)`` in this thread instead of drawing bars."""
    token = _listener.set(callback)
    try:
        yield
    finally:
        _listener.reset(token)


def tell(what: str) -> bool:
    """Tell the listener, who may raise :class:`Cancelled`, what is waited for; False where nobody listens."""
    callback = _listener.get()
    if callback is not None:
        callback(what, 0, 0)
    return callback is not None


def track(items: Iterable, what: str, show: bool = True, total: int | None = None) -> Iterator:
    """Yield the items, reporting progress before each and at the end."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    callback = _listener.get()
    if callback is None:
        from tqdm.auto import tqdm

        static = os.environ.get("LABKIT_STATIC", "") not in ("", "0")  # a bar in a kept page would be a dead widget
        yield from tqdm(items, desc=what, total=total, disable=static or not show, leave=False)
        return
    done = 0
    for item in items:
        callback(what, done, total or 0)
        yield item
        done += 1
    callback(what, done, total or done)
