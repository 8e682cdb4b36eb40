"""Freed memory goes back to the system only when somebody asks: glibc keeps hundreds of MB after long work."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable


def trim() -> None:
    """Give memory that was freed back to the system, where the C library can (glibc alone). Never raises."""
    if give_back := _malloc_trim():
        give_back(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    """glibc's function; None on macOS and with musl, which have none, and on Windows, which has no such library."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # in this order; ctypes wants a name on Windows
        return None
