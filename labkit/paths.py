"""Where labkit reads its shipped data and keeps its cache."""

from __future__ import annotations

import functools
import os
import tempfile
from pathlib import Path


def data() -> Path:
    """The shipped ``data/`` folder: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "data"
    return inside if inside.is_dir() else package.parent / "data"


def cache() -> Path:
    """The cache folder: ``$LABKIT_CACHE``, else ``$XDG_CACHE_HOME/labkit``, else ``~/.cache/labkit``. Created when missing."""
    path = Path(os.environ.get("LABKIT_CACHE") or _home()).expanduser()
    path.mkdir(parents=True, exist_ok=True)
    return path


def own() -> Path:
    """Where this user's own files go: the cache folder, or ``~/.cache/labkit`` beside a class's cache that is read-only.

    A teacher fetches the model into a shared folder once and points ``LABKIT_CACHE`` of everyone at it; results, engines
    and texts are each student's own. Where the home folder is read-only too, a temporary folder serves this process.
    """
    for path in (cache(), _home()):
        try:
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):
                return path
        except OSError:
            continue
    return _temporary()


def _home() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "labkit"


@functools.cache
def _temporary() -> Path:
    return Path(tempfile.mkdtemp(prefix="labkit-"))
