"""What a notebook needs on Google Colab, and nowhere else. Every notebook begins with ``FIRST_CELL``."""

from __future__ import annotations

import functools
import sys

from labkit.links import first_cell

FIRST_CELL = first_cell()


def here() -> bool:
    """Whether this is Colab: its kernel has imported google.colab before the first cell runs."""
    return "google.colab" in sys.modules


@functools.cache
def setup() -> bool:
    """Let Colab show widgets that it does not ship itself; elsewhere nothing. Returns whether this is Colab."""
    if not here():
        return False
    from google.colab import output

    output.enable_custom_widget_manager()
    return True
