"""What a notebook needs on Google Colab, and nowhere else.

Every notebook begins with ``FIRST_CELL``. On Colab its first line installs labkit; elsewhere that line does nothing.
"""

from __future__ import annotations

import functools
import sys

FIRST_CELL = """\
!test -z "$COLAB_RELEASE_TAG" || pip install -q "labkit[lab] @ git+https://github.com/labkit-lab/labkit"
import labkit"""


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
