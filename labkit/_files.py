"""Files and folders that are there as a whole or not at all, and that others may read.

Each is written under a name of its own beside its place, then renamed. Python's ``tempfile`` is for secrets: what it
makes only its owner can read, so a cache that a class shares would be closed to all but the first. Here everything
gets the permissions of any other new file (those that the umask leaves).

    write_text(path, text)                    # one small file
    with whole_file(path) as part: ...        # write to part; it becomes path when the block ends well
    with whole_folder(path) as part: ...      # the same for a folder; one that stood there is replaced
    with alone(path, "..."): ...              # one process at a time makes what belongs at path
"""

from __future__ import annotations

import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file in UTF-8 with Unix line ends, all of it or nothing; folders that are missing are made."""
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8", newline="\n")


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """A new empty file beside ``path`` that takes its place when the block ends well, and goes when it does not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _beside(path)
    part.touch(exist_ok=False)
    mode = part.stat().st_mode
    try:
        yield part
        os.chmod(part, mode)  # safetensors renames a file of its own over it, which only its owner may read
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A new empty folder beside ``path`` that takes its place when the block ends well, and goes when it does not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _beside(path)
    part.mkdir()
    mode = part.stat().st_mode
    try:
        yield part
        for inside in part.rglob("*"):  # what libraries have made there, as above
            os.chmod(inside, mode if inside.is_dir() else mode & 0o666)
        replace_folder(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def replace_folder(made: Path, target: Path) -> None:
    """Move the folder ``made`` to ``target``. A folder that stood there goes; it comes back when the move fails.

    Not in one step, for no system renames a folder over a full one, and Windows not even over an empty one.
    """
    if not target.exists():
        os.rename(made, target)
        return
    old = _beside(target)
    os.rename(target, old)
    try:
        os.rename(made, target)
    except BaseException:
        os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def set_aside(path: Path, why: str) -> Path:
    """Rename a file or folder to ``<name>.<why>-<time>``, so that its name is free and nothing is lost."""
    aside = path.with_name(f"{path.name}.{why}-{datetime.now():%Y%m%d-%H%M%S-%f}")
    os.rename(path, aside)
    return aside


@contextmanager
def alone(path: Path, waiting: str = "") -> Iterator[None]:
    """Hold the lock that belongs to ``path``; ``waiting`` is printed to stderr where another process holds it.

    The system drops the lock when the process ends, however it ends; the lock's empty file stays.
    """
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if waiting:
            print(waiting, file=sys.stderr, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _beside(path: Path) -> Path:
    """A name in the same folder that nobody else has, and that an interrupted run leaves recognizable."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(3)}.part")
