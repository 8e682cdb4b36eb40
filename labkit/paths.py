"""Where labkit reads its shipped data and keeps its cache."""

from __future__ import annotations

import os
from pathlib import Path


def data() -> Path:
    """The shipped ``data/`` folder: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "data"
    return inside if inside.is_dir() else package.parent / "data"


def cache() -> Path:
    """The cache folder: ``$LABKIT_CACHE``, else ``$XDG_CACHE_HOME/labkit``, else ``~/.cache/labkit``. Created when missing."""
    home = os.environ.get("LABKIT_CACHE")
    if not home:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "labkit"
    path = Path(home).expanduser()
    path.mkdir(parents=True, exist_ok=True)
    return path
