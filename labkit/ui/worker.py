"""Background work for widgets: only the newest job runs, and it can be cancelled.

A student who drags a slider over six positions wants the last one. ``Latest`` waits until the hand rests, stops the
job that is running at its next progress step, and starts the newest; the notebook's own thread never waits.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from labkit.measure.alone import alone
from labkit.progress import Cancelled, listen


class Latest:
    """Runs the newest job handed to :meth:`submit` in a background thread.

    Parameters
    ----------
    wait : float
        Seconds to wait for a newer job before starting (debounce).
    exclusive : bool
        Measure :func:`~labkit.measure.alone.alone`: not while another worker, the notebook itself, or another process on
        this machine does.
    """

    def __init__(self, wait: float = 0.3, exclusive: bool = True):
        self.wait = wait
        self._exclusive = exclusive
        self._ticket = 0
        self._lock = threading.Lock()
        self._threads: set[threading.Thread] = set()

    @property
    def busy(self) -> bool:
        """Whether a job is waiting or running (one that was told to stop counts until it has stopped)."""
        return bool(self._threads)

    def submit(
        self,
        job: Callable[[], Any],
        done: Callable[[Any], None],
        failed: Callable[[Exception], None],
        progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        """Run ``job`` unless a newer one comes; then ``done(result)`` or ``failed(error)``, in the job's thread.

        Neither is called for a job that was cancelled or overtaken.
        """
        with self._lock:
            self._ticket += 1
            mine = self._ticket
            thread = threading.Thread(target=self._run, args=(mine, job, done, failed, progress), daemon=True)
            self._threads.add(thread)
        thread.start()

    def cancel(self) -> None:
        """Stop: a waiting job never starts, a running one ends at its next progress step."""
        with self._lock:
            self._ticket += 1

    def join(self, timeout: float = 60.0) -> bool:
        """Wait until nothing runs; False when the timeout ends first."""
        end = time.monotonic() + timeout
        for thread in list(self._threads):
            thread.join(max(0.0, end - time.monotonic()))
        return not any(t.is_alive() for t in list(self._threads))

    def _run(self, mine, job, done, failed, progress) -> None:
        def step(what: str, at: int, total: int) -> None:
            if mine != self._ticket:
                raise Cancelled
            if progress:
                progress(what, at, total)

        try:
            end = time.monotonic() + self.wait
            while (left := end - time.monotonic()) > 0:
                if mine != self._ticket:
                    return
                time.sleep(min(0.02, left))
            with listen(step), alone("a panel in the background") if self._exclusive else nullcontext():
                if mine != self._ticket:
                    return
                result = job()
            if mine == self._ticket:
                done(result)
        except Cancelled:
            pass
        except Exception as error:  # shown to the student by `failed`; a thread has nobody else to tell
            if mine == self._ticket:
                failed(error)
        finally:
            self._threads.discard(threading.current_thread())


def explain(error: BaseException) -> str:
    """An exception as one sentence: its message alone where it is meant for people, else its type too."""
    text = " ".join(str(error).split())
    if isinstance(error, (ValueError, RuntimeError, OSError, ImportError)) and text:
        return text if text.endswith((".", "!", "?")) else text + "."
    return f"{type(error).__name__}: {text or 'no message'}."
