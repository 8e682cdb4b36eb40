"""Freed memory goes back to the system only when somebody asks: glibc keeps hundreds of MB after long work."""

from __future__ import annotations

import ctypes
from contextlib import suppress


def trim() -> None:
    """Give memory that was freed back to the system, where the C library can (glibc alone)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
