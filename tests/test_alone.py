"""labkit.measure.alone: one measurement at a time, between threads and processes, cancellable, and gone with its holder."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time

import pytest

from labkit.measure import roofline, timing
from labkit.measure.alone import EVERY, alone
from labkit.progress import Cancelled, listen
from labkit.ui.worker import Latest

module = sys.modules[alone.__module__]  # labkit.measure.alone itself: the package shows the function by that name
LONG = 60  # seconds: nothing here takes as long, however busy the machine

HOLDER = """\
import sys, time
from labkit.measure.alone import EVERY, alone
with alone("a sweep in a terminal"):
    print("held", flush=True)
    sys.stdin.readline()
print("free", flush=True)
"""


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def elsewhere():
    """Another process that holds the lock until it gets a line."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def held_by_another_thread() -> bool:
    """Whether somebody holds the lock, seen from a thread of its own."""
    found = []

    def look():
        try:
            with alone("a look", timeout=0):
                found.append(False)
        except TimeoutError:
            found.append(True)

    thread = threading.Thread(target=look)
    thread.start()
    thread.join(LONG)
    return found[0]


def test_it_nests_in_one_thread_and_is_free_afterwards():
    with alone("outer"):
        with alone("inner", timeout=0):
            assert held_by_another_thread()
        assert held_by_another_thread(), "the inner end frees nothing"
    assert not held_by_another_thread()


def test_an_error_frees_it():
    with pytest.raises(KeyError), alone("x"):
        raise KeyError
    assert not held_by_another_thread()


def test_two_threads_never_overlap_and_both_get_their_turn():
    """The turn is passed on: one that measures again and again does not starve the one that waits."""
    log, ready = [], threading.Event()

    def work(name: str):
        ready.wait(LONG)
        for _ in range(5):
            with alone(name):
                log.append((name, "in"))
                time.sleep(3 * EVERY)  # the other one looks in the meantime
                log.append((name, "out"))

    threads = [threading.Thread(target=work, args=(n,)) for n in "ab"]
    for t in threads:
        t.start()
    ready.set()
    for t in threads:
        t.join(LONG)
    assert len(log) == 20
    assert all(log[i][0] == log[i + 1][0] and log[i][1] == "in" for i in range(0, 20, 2)), "nobody came between"
    turns = [name for name, what in log if what == "in"]
    assert turns not in (list("aaaaabbbbb"), list("bbbbbaaaaa"))


def test_another_process_is_waited_for_and_named(elsewhere, capsys, monkeypatch):
    monkeypatch.setattr(module, "SAY_AFTER", 0.1)
    threading.Timer(0.5, lambda: (elsewhere.stdin.write("\n"), elsewhere.stdin.flush())).start()
    with alone("here"):
        assert elsewhere.stdout.readline() == "free\n"
    said = capsys.readouterr().err
    assert (
        said
        == f"labkit: waiting for another measurement on this machine: a sweep in a terminal (process {elsewhere.pid})\n"
    )


def test_a_timeout_names_who_is_in_the_way(elsewhere):
    with (
        pytest.raises(TimeoutError, match="a sweep in a terminal.* has not ended within 0 s"),
        alone("here", timeout=0),
    ):
        pass
    assert module._state.owner is None


def test_a_killed_holder_frees_it(elsewhere):
    elsewhere.kill()
    with alone("here", timeout=LONG):
        pass


def test_waiting_can_be_cancelled_and_blocks_nobody_afterwards(elsewhere):
    heard = []

    def listener(what, done, total):
        heard.append(what)
        if len(heard) == 3:
            raise Cancelled

    with listen(listener), pytest.raises(Cancelled), alone("here"):
        pass
    assert "a sweep in a terminal" in heard[0]
    elsewhere.communicate("\n")
    assert not held_by_another_thread()


def test_a_background_worker_waits_can_be_cancelled_and_runs_afterwards(elsewhere):
    worker, told, ran = Latest(wait=0.0), [], []
    worker.submit(lambda: ran.append(1), told.append, told.append, lambda what, *_: told.append(what))
    deadline = time.monotonic() + LONG
    while not told and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "waiting for another measurement" in told[0]
    worker.cancel()
    assert worker.join(LONG) and ran == []
    worker.submit(lambda: ran.append(2), lambda _: None, told.append)
    elsewhere.communicate("\n")
    assert worker.join(LONG) and ran == [2]


def test_the_notebook_and_a_background_worker_exclude_each_other():
    worker, ran = Latest(wait=0.0), []
    with alone("the cell"):
        worker.submit(lambda: ran.append(1), lambda _: None, ran.append)
        time.sleep(0.2)
        assert ran == []
    assert worker.join(LONG) and ran == [1]


def test_a_worker_may_measure_and_its_answer_is_drawn_unlocked():
    """The job's own timings nest in the worker's lock, and ``done`` may take other locks: it is called without this one."""
    worker, seen = Latest(wait=0.0), []
    worker.submit(
        lambda: timing.time_one(lambda: None, repeats=1, min_seconds=0),
        lambda found: seen.append((found.calls, held_by_another_thread())),
        seen.append,
    )
    assert worker.join(LONG) and seen == [(1, False)]


@pytest.mark.parametrize(
    "measure",
    [
        lambda fn: timing.compare({"a": fn}, rounds=1, min_seconds=0),
        lambda fn: timing.time_one(fn, repeats=1, min_seconds=0),
    ],
)
def test_every_timing_is_alone(measure):
    seen = []
    measure(lambda: seen.append(held_by_another_thread()))
    assert seen and all(seen) and not held_by_another_thread()


def test_the_roofline_is_measured_alone(monkeypatch):
    seen = []

    def measured(*args):
        seen.append(held_by_another_thread())
        raise KeyError

    monkeypatch.setattr(roofline, "_measure", measured)
    with pytest.raises(KeyError):
        roofline.measure(device="cpu", progress=False)
    assert seen == [True]


@pytest.mark.parametrize("broken", [PermissionError(13, "read-only"), NotImplementedError("no locks here")])
def test_without_file_locks_it_still_holds_between_threads(monkeypatch, broken):
    def refuse(*args, **kwargs):
        raise broken

    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    with alone("here"):
        assert held_by_another_thread()
    assert not held_by_another_thread()


def test_a_cache_folder_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path / "file"))
    with alone("here"):
        assert held_by_another_thread()
    assert not held_by_another_thread()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_holds_nothing_and_frees_nothing():
    with alone("the parent"):
        pid = os.fork()
        if pid == 0:
            status = 1
            with contextlib.suppress(BaseException):
                try:
                    with alone("the child", timeout=0):
                        pass
                except TimeoutError:
                    status = 0
            os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert held_by_another_thread()
    assert not held_by_another_thread()


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_the_lock_can_be_taken_by_every_user_of_a_shared_cache(home):
    with alone("here"):
        pass
    for path in home.glob("measuring-*.n*"):
        assert path.stat().st_mode & 0o666 == 0o666, path
