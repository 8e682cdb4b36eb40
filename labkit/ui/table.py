"""The table that views and lessons return; it needs no widgets, so it lives in :mod:`labkit.table`."""

from labkit.table import Table

__all__ = ["Table"]
