"""One measurement at a time on this machine: two that overlap would time each other.

    with alone("a sweep"):      # waits until no other thread, kernel or terminal measures
        ...

Everything in labkit that times something does it inside :func:`alone`: ``timing.compare``, ``timing.time_one``, the
roofline, the engine's choice of threads, a panel's work in the background. The lock is one of the operating system's, so
it goes with the process that holds it, however that ends.
"""

from __future__ import annotations

import os
import platform
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from labkit.paths import cache
from labkit.progress import tell

EVERY = 0.05  # seconds between two tries
SAY_AFTER = 3.0  # seconds of waiting after which it is said

_now = time.monotonic
_inherited = []  # file locks of the process that this one was forked from: never touched again


class _State:
    """Who measures in this process, and who is next."""

    def __init__(self):
        self.turn, self.lock = threading.Lock(), threading.Lock()
        self.owner: int | None = None  # the thread that measures
        self.what = ""
        self.files: list = []


_state = _State()


@contextmanager
def alone(what: str, timeout: float | None = None) -> Iterator[None]:
    """Measure while nobody else does: no other thread, and no other process with the same cache folder.

    A thread that holds it already goes on at once, so calls nest. Waiting is said after three seconds, on stderr or to
    the listener of :func:`labkit.progress.listen`, who may cancel it; those who wait are served in turn.
    Where the cache folder cannot be written to, it holds within this process alone. Take it before any lock of your own
    that a background worker's job takes too: the worker holds this one already.

    Parameters
    ----------
    what : str
        What is measured, for the message of those who wait.
    timeout : float, optional
        Seconds after which to give up with a TimeoutError; None waits as long as it takes.
    """
    if _state.owner == threading.get_ident():
        yield
        return
    state, waiting = _state, _Waiting(timeout)
    with ExitStack() as held:
        # Who waits holds the turn. Who has just measured and wants to again must take it first: nobody starves.
        with ExitStack() as turn:
            waiting.take(turn, _Thread(state.turn))
            waiting.take(turn, _File("next"))
            waiting.take(held, _Thread(state.lock))
            waiting.take(held, _File("now", state))
        held.callback(setattr, state, "owner", None)
        state.owner, state.what = threading.get_ident(), what
        with suppress(OSError):
            _path("who").write_text(f"{what} (process {os.getpid()})", encoding="utf-8")
        yield


def _holder() -> str:
    """What the one who measures has said of it."""
    if _state.owner is not None:
        return _state.what
    try:
        return _path("who").read_text(encoding="utf-8")[:200] or "it has not said what"
    except (OSError, ValueError):
        return "it has not said what"


class _Waiting:
    """The patience of one who waits: tries again and again, says so, and can be cancelled."""

    def __init__(self, timeout: float | None):
        self.start, self.timeout, self.said = _now(), timeout, False

    def take(self, stack: ExitStack, lock) -> None:
        """Acquire a lock, which ``stack`` releases."""
        while not lock.acquire():
            self._wait()
        stack.callback(lock.release)

    def _wait(self) -> None:
        waited, text = _now() - self.start, f"waiting for another measurement on this machine: {_holder()}"
        if self.timeout is not None and waited >= self.timeout:
            raise TimeoutError(f"{text} has not ended within {self.timeout:g} s.")
        if not tell(text) and waited > SAY_AFTER and not self.said:
            print(f"labkit: {text}", file=sys.stderr, flush=True)
            self.said = True
        time.sleep(EVERY)


class _Thread:
    """A lock between the threads of this process."""

    def __init__(self, lock: threading.Lock):
        self._lock, self.release = lock, lock.release

    def acquire(self) -> bool:
        return self._lock.acquire(blocking=False)


class _File:
    """A lock between processes; one that cannot be had, as in a read-only folder, counts as taken."""

    def __init__(self, name: str, state: _State | None = None):
        from filelock import FileLock

        self._lock, self._files = None, [] if state is None else state.files
        with suppress(OSError):
            self._lock = FileLock(_path(name), mode=0o666)  # a shared cache has several users

    def acquire(self) -> bool:
        from filelock import Timeout

        try:
            if self._lock is not None:
                self._lock.acquire(timeout=0)
        except Timeout:
            return False
        except (OSError, NotImplementedError):  # not writable, or a file system without locks
            self._lock = None
        if self._lock is not None:
            self._files.append(self._lock)
        return True

    def release(self) -> None:
        if self._lock is not None:
            self._files.remove(self._lock)
            self._lock.release()


def _path(name: str) -> Path:
    """A file of this machine in the cache folder, which several machines may share."""
    host = re.sub(r"[^\w.-]", "_", platform.node())[:60]
    return cache() / f"measuring-{host}.{name}"


def _forked() -> None:
    """A forked process holds nothing: it must neither go on as if it did, nor release what its parent holds."""
    global _state
    _inherited.extend(_state.files)
    _state = _State()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
