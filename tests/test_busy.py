"""labkit.measure.busy: what others use of the machine, from made-up counters; and what compare() does about it."""

from __future__ import annotations

import sys
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labkit.measure import busy, timing
from labkit.progress import Cancelled, listen


class Machine:
    """A machine with counters and a clock that move only when told to."""

    def __init__(self, cores: int = 2):
        self.now, self.used, self.own, self.count = 50.0, 1000.0, 7.0, cores
        self.limit: float | None = None  # of the control group, cores' worth of time
        self.group = 300.0  # CPU seconds used in it
        self.hog = 0.0  # cores' worth of time that others take, as long as it lasts
        self.calls: list[str] = []

    def go(self, seconds: float, own: float = 0.0, others: float = 0.0, others_in_group: float = 0.0) -> None:
        """Time passes: CPU seconds of this process, and of others."""
        self.now += seconds
        self.used += own + others + self.hog * seconds
        self.own += own
        self.group += own + others_in_group

    def work(self, cost: float, name: str = "", then=lambda: None):
        """A callable that takes ``cost`` seconds on one core."""

        def fn():
            self.calls.append(name)
            self.go(cost, own=cost)
            then()

        return fn


@pytest.fixture
def box(monkeypatch) -> Machine:
    box = Machine()
    monkeypatch.setattr(busy, "_now", lambda: box.now)
    monkeypatch.setattr(busy, "_sleep", box.go)
    monkeypatch.setattr(busy, "machine_seconds", lambda: box.used)
    monkeypatch.setattr(busy.time, "process_time", lambda: box.own)
    monkeypatch.setattr(busy, "cores", lambda: box.count)
    monkeypatch.setattr(busy, "_limit", lambda: None if box.limit is None else (box.limit, None))
    monkeypatch.setattr(busy, "_group_seconds", lambda: None if box.limit is None else box.group)
    monkeypatch.setattr(timing, "_now", lambda: box.now)
    monkeypatch.setattr(timing, "_sleep", box.go)
    return box


# The share that others take


@given(
    seconds=st.floats(0.5, 1000), own=st.floats(0, 1), others=st.floats(0, 1), cores=st.integers(1, 64)
)  # own and others: shares of the machine
def test_the_share_is_what_others_took_of_the_cores(seconds, own, others, cores):
    with pytest.MonkeyPatch.context() as patch:
        box = Machine(cores)
        patch.setattr(busy, "_now", lambda: box.now)
        patch.setattr(busy, "machine_seconds", lambda: box.used)
        patch.setattr(busy.time, "process_time", lambda: box.own)
        patch.setattr(busy, "cores", lambda: cores)
        patch.setattr(busy, "_limit", lambda: None)
        watch = busy.Watch()
        box.go(seconds, own=own * cores * seconds, others=others * cores * seconds)
        exact = max(others - busy.RESOLUTION / (cores * seconds), 0)
        assert watch.share() == pytest.approx(exact, abs=1e-9)
        assert watch.seconds == pytest.approx(seconds)
        both = max(own + others - busy.RESOLUTION / (cores * seconds), 0)
        assert watch.share(own=True) == pytest.approx(min(both, 1), abs=1e-9)


def test_ticks_that_the_counters_cannot_resolve_are_nothing(box):
    watch = busy.Watch()
    box.go(0.001, others=0.02)
    assert watch.share() == 0
    assert not busy.is_busy(None) and not busy.is_busy(busy.BUSY) and busy.is_busy(busy.BUSY + 0.001)


def test_unknown_where_the_system_does_not_count(box, monkeypatch):
    watch = busy.Watch()
    box.now += 10
    box.own += 8  # this process worked, but the counters of the machine stand still
    assert watch.share() is None
    monkeypatch.setattr(busy, "machine_seconds", lambda: None)
    assert busy.Watch().share() is None and busy.others_seconds() is None


def test_with_a_limit_others_disturb_only_beyond_the_free_cores(box):
    """A container with 2 cores' worth of time on a host of 16: others may take 14 cores before it is disturbed."""
    box.count, box.limit = 16, 2.0
    watch = busy.Watch()
    box.go(10, own=20, others=100)
    assert watch.share() == 0
    watch = busy.Watch()
    box.go(10, own=10, others=150)
    assert watch.share() == pytest.approx((150 - 140 - busy.RESOLUTION) / 20)


def test_with_a_limit_the_others_of_the_same_group_disturb(box):
    box.count, box.limit = 16, 2.0
    watch = busy.Watch()
    box.go(10, own=10, others=5, others_in_group=5)
    assert watch.share() == pytest.approx((5 - busy.RESOLUTION) / 20)


# Where the counters come from


def test_linux_counts_all_programs_the_kernel_and_steal_on_our_cores(tmp_path, monkeypatch):
    stat = "cpu  9 9 9 9 9 9 9 9 9 9\ncpu0 100 20 30 5000 70 1 2 3 0 0\ncpu1 1 1 1 1 1 1 1 1 0 0\nintr 5\n"
    (tmp_path / "stat").write_text(stat)
    monkeypatch.setattr(busy, "_PROC", tmp_path)
    monkeypatch.setattr(busy.os, "sched_getaffinity", lambda pid: {0}, raising=False)
    monkeypatch.setattr(busy.os, "sysconf", lambda name: 100, raising=False)
    monkeypatch.setattr(busy.time, "process_time", lambda: 0.5)
    assert busy.machine_seconds() == pytest.approx((100 + 20 + 30 + 1 + 2 + 3) / 100)
    assert busy.others_seconds() == pytest.approx(1.56 - 0.5)


@pytest.mark.parametrize("stat", [None, "not what we know", "cpu0 x y z\n"])
def test_elsewhere_psutil_counts_where_it_is_installed(tmp_path, monkeypatch, stat):
    if stat is not None:
        (tmp_path / "stat").write_text(stat)
    monkeypatch.setattr(busy, "_PROC", tmp_path)
    times = types.SimpleNamespace(user=10.0, system=5.0, idle=100.0, interrupt=1.0, dpc=1.0)  # as on Windows
    monkeypatch.setitem(sys.modules, "psutil", types.SimpleNamespace(cpu_times=lambda: times))
    assert busy.machine_seconds() == 15.0
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert busy.machine_seconds() is None


def test_this_machine_counts():
    """For real: this test's own work is counted, and is not somebody else's."""
    first, watch = busy.machine_seconds(), busy.Watch()
    if first is None:
        pytest.skip("this system has no counters")
    end = busy.time.process_time() + 0.3
    while busy.time.process_time() < end:
        pass
    assert busy.machine_seconds() - first > 0.2
    assert watch.share() is None or 0 <= watch.share() <= 1
    assert watch.share(own=True) >= watch.share()


@pytest.mark.parametrize(
    ("files", "cores", "usage"),
    [
        ({}, None, None),
        ({"cpu.max": "max 100000\n"}, None, None),
        ({"cpu.max": "150000 100000\n", "cpu.stat": "usage_usec 2500000\nuser_usec 1\n"}, 1.5, 2.5),
        ({"cpu.max": "nonsense"}, None, None),
        ({"cpu.max": "150000 100000\n"}, 1.5, None),  # a limit without a counter
        ({"me": "0::/a/b\n", "a/cpu.max": "200000 100000", "a/cpu.stat": "usage_usec 7000000"}, 2.0, 7.0),
        (
            {"me": "0::/a\n", "cpu.max": "300000 100000", "a/cpu.max": "max 100000", "cpu.stat": "usage_usec 1"},
            3.0,
            1e-6,
        ),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None, None),
        (
            {
                "me": "4:cpu,cpuacct:/box\n9:memory:/else\n",
                "cpu/box/cpu.cfs_quota_us": "50000\n",
                "cpu/box/cpu.cfs_period_us": "100000\n",
                "cpuacct/box/cpuacct.usage": "4000000000\n",
            },
            0.5,
            4.0,
        ),
    ],
)
def test_limits_of_containers(tmp_path, monkeypatch, files, cores, usage):
    """Version 2 and version 1 of control groups, the process's own group and those above it."""
    for name, text in files.items():
        path = tmp_path / ("proc/self/cgroup" if name == "me" else f"sys/{name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(busy, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(busy, "_CGROUP", tmp_path / "sys")
    monkeypatch.setattr(busy, "cores", lambda: 8)
    assert busy.available() == (8.0 if cores is None else cores)
    assert busy._group_seconds() == (None if usage is None else pytest.approx(usage))


# Waiting for a quiet machine


def test_a_quiet_machine_is_seen_at_once_and_a_busy_one_is_waited_for(box):
    assert busy.quiet() and box.now == pytest.approx(50 + busy.WINDOW)
    box.hog, start = 1.0, box.now
    sleep = box.go

    def until(seconds):
        box.hog = 1.0 if box.now < start + 1 else 0.0
        sleep(seconds)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(busy, "_sleep", until)
        assert busy.quiet(patience=3) and 1 <= box.now - start <= 1.6
    box.hog, start = 1.0, box.now
    assert not busy.quiet(patience=3) and 3 <= box.now - start <= 3.3


def test_work_of_this_process_is_no_quiet_machine_either(box, monkeypatch):
    monkeypatch.setattr(busy, "_sleep", lambda seconds: box.go(seconds, own=seconds))  # another thread's
    assert not busy.quiet(patience=1)


def test_waiting_for_quiet_can_be_cancelled(box):
    box.hog = 2.0

    def stop(what, done, total):
        assert what == "waiting for a quiet machine"
        raise Cancelled

    with listen(stop), pytest.raises(Cancelled):
        busy.quiet(patience=1e9)


# What compare() does about it


def test_a_quiet_comparison_repeats_nothing(box):
    c = timing.compare({"a": box.work(0.1, "a"), "b": box.work(0.2, "b")}, rounds=9, warmup=0, min_seconds=0)
    assert c.busy == 0 and c.repeated == 0 and not c.disturbed
    assert len(c.timings["a"].samples) == 9 and c.ratio["b"] == pytest.approx(0.5)
    assert box.calls.count("a") == 9 + 1  # one to see how long it takes


def test_disturbed_rounds_are_timed_again_and_leave_no_trace(box):
    """Others take a core for a while, and what is timed meanwhile takes three times as long."""
    done = []

    def cost():
        box.hog = 1.0 if 4 <= len(done) < 8 else 0.0
        done.append(1)
        return 0.3 if box.hog else 0.1

    def fn():
        seconds = cost()
        box.go(seconds, own=0.1)

    c = timing.compare({"a": fn}, rounds=10, warmup=0, min_seconds=0)
    assert 4 <= c.repeated <= 8  # whole stretches of 0.25 s
    assert len(done) == 1 + 10 + c.repeated
    assert len(c.timings["a"].samples) == 10 and max(c.timings["a"].samples) == pytest.approx(0.1)
    assert not c.disturbed and f"({c.repeated} timed again, for others were busy)" in c.caption


def test_a_machine_that_stays_busy_is_said(box):
    box.hog = 1.0
    c = timing.compare({"a": box.work(0.1), "b": box.work(0.1)}, rounds=10, warmup=0, min_seconds=0)
    assert c.repeated == 10 and len(c.timings["b"].samples) == 10, "no more than twice the rounds"
    assert c.disturbed and 0.4 < c.busy <= 0.5 and c.timings["a"].disturbed
    assert "other programs took" in c.caption and "do not trust it" in str(c.timings["a"])


def test_rounds_that_are_shorter_than_the_counters_are_judged_together(box):
    box.hog = 1.0
    c = timing.compare({"a": box.work(0.001)}, rounds=100, warmup=0, min_seconds=0)
    assert c.disturbed and c.repeated == 100
    assert box.calls.count("") == 200 + 1


def test_unknown_stays_unknown(box, monkeypatch):
    monkeypatch.setattr(busy, "machine_seconds", lambda: None)
    c = timing.compare({"a": box.work(0.1)}, rounds=3, warmup=0)
    assert c.busy is None and not c.disturbed and c.repeated == 0
    t = timing.time_one(box.work(0.1), repeats=3)
    assert t.busy is None and not t.disturbed


def test_one_callable_alone_says_what_others_took(box):
    box.hog = 1.0
    t = timing.time_one(box.work(0.5), repeats=4)
    assert t.busy == pytest.approx((4 * 0.5 - busy.RESOLUTION) / (2 * 4 * 0.5)) and t.disturbed


def test_progress_counts_the_repeated_rounds_apart(box):
    box.hog, heard = 1.0, []
    with listen(lambda *step: heard.append(step)):
        timing.compare({"a": box.work(0.3)}, rounds=2, warmup=0, min_seconds=0)
    again = "timing again, for others were busy"
    assert heard == [("timing", n, 2) for n in range(3)] + [(again, n, 2) for n in range(3)]


# Weights that fit the cache


def test_weights_that_fit_the_cache_are_told(monkeypatch):
    monkeypatch.setattr(timing, "last_level_cache", lambda: 64_000_000)
    assert timing.fits_cache(64_000_000) and not timing.fits_cache(64_000_001)
    note = timing.cache_note(50_000_000)
    assert "The weights (50 MB) fit" in note and "(64 MB)" in note and "memory roof" in note
    assert timing.cache_note(100_000_000) == "" and "(5 kB)" in timing.cache_note(5_000)
