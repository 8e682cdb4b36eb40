"""labkit.measure.timing: the arithmetic against a fake clock, the settings on the real one."""

from __future__ import annotations

import gc
import math
import time
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from labkit.measure import busy, timing
from labkit.progress import Cancelled, listen

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


class Clock:
    """A clock that only moves when a callable says that it worked."""

    def __init__(self):
        self.now = 100.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def work(self, cost, name: str = ""):
        """A callable that takes ``cost`` seconds, or ``cost()`` seconds."""

        def fn():
            self.calls.append(name)
            self.now += cost() if callable(cost) else cost

        return fn


@pytest.fixture
def clock(monkeypatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(timing, "_now", fake)
    monkeypatch.setattr(timing, "_sleep", lambda seconds: None)
    monkeypatch.setattr(busy, "machine_seconds", lambda: None)  # real neighbours mean nothing to it
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return fake


# --- time_one ------------------------------------------------------------------------------------


def test_a_known_cost_is_read_exactly(clock):
    t = timing.time_one(clock.work(0.5), repeats=7)
    assert t.median == pytest.approx(0.5) and t.iqr == pytest.approx(0)
    assert len(t.samples) == 7 and t.calls == 1
    assert (t.device, t.threads, t.flushed) == ("cpu", torch.get_num_threads(), False)


def test_a_short_callable_is_timed_over_enough_calls(clock):
    t = timing.time_one(clock.work(1e-6), repeats=10, min_seconds=0.1)
    assert t.median == pytest.approx(1e-6)
    assert 10_000 <= t.calls <= 12_000  # a sample lasts 0.01 s or a little more
    assert sum(t.samples) * t.calls >= 0.1


def test_calibration_survives_a_first_call_that_looks_instant(clock):
    costs = iter([0.0, 0.0])
    t = timing.time_one(clock.work(lambda: next(costs, 1e-3)), warmup=0, repeats=5, min_seconds=0.05)
    assert t.median == pytest.approx(1e-3) and t.calls * 1e-3 >= 0.01


def test_a_callable_below_the_clocks_resolution_still_ends(clock, monkeypatch):
    monkeypatch.setattr(timing, "_MOST_CALLS", 500)
    t = timing.time_one(clock.work(0.0), repeats=3)
    assert t.calls == 500 and t.median == 0


def test_warm_up_is_not_timed(clock):
    costs = iter([50.0, 20.0, 10.0])
    t = timing.time_one(clock.work(lambda: next(costs, 0.3)), warmup=3, repeats=4)
    assert t.high == pytest.approx(0.3)


def test_flush_comes_before_every_sample_and_is_not_timed(clock, monkeypatch):
    monkeypatch.setattr(timing._Cpu, "flush", lambda self: clock.work(40.0, "flush")())
    t = timing.time_one(clock.work(1e-6, "fn"), warmup=0, repeats=5, flush=True)
    assert clock.calls == ["flush", "fn"] * 5  # one call per sample: a second one would be warm
    assert t.median == pytest.approx(1e-6) and t.calls == 1 and t.flushed
    assert "flushed" in str(t)


def test_the_cpu_flush_reads_more_than_the_last_level_cache():
    watch = timing._Cpu()
    watch.flush()
    assert watch._junk.nbytes >= min(2 * timing.last_level_cache(), 1 << 30)
    assert (watch._junk == 1).all()  # written once, so that its pages are real and its own


@given(st.lists(st.floats(1e-9, 1e3), min_size=1, max_size=40))
def test_quartiles_are_numpys(samples):
    assert timing.quartiles(samples) == pytest.approx(tuple(np.percentile(samples, [25, 50, 75])), rel=1e-12)


def test_quartiles_of_nothing_are_refused():
    with pytest.raises(ValueError, match="no samples"):
        timing.quartiles([])


def test_no_garbage_is_collected_while_the_clock_runs():
    seen = []
    timing.time_one(lambda: seen.append(gc.isenabled()), warmup=0, repeats=3, min_seconds=0)
    assert seen and not any(seen) and gc.isenabled()


def test_an_error_passes_through_and_leaves_nothing_behind():
    def broken():
        raise KeyError("broken on purpose")

    with pytest.raises(KeyError, match="on purpose"):
        timing.time_one(broken, warmup=0)
    assert gc.isenabled()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"repeats": 0}, "repeats = 0"),
        ({"repeats": 2.5}, "repeats = 2.5"),
        ({"repeats": True}, "repeats = True"),
        ({"warmup": -1}, "warmup = -1"),
        ({"min_seconds": -0.1}, "min_seconds = -0.1"),
        ({"min_seconds": math.nan}, "min_seconds = nan"),
        ({"min_seconds": "fast"}, "min_seconds = 'fast'"),
        ({"flush": "yes"}, "flush = 'yes'"),
        ({"graph": True}, "graph = True needs a CUDA device"),
        ({"device": "gpu"}, "device = 'gpu' is not a device"),
        ({"device": 3.5}, "device = 3.5"),
        ({"device": "meta"}, "device = 'meta' cannot be timed"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        timing.time_one(lambda: None, **settings)


def test_what_cannot_be_called_is_refused():
    with pytest.raises(ValueError, match=r"fn = 3 cannot be called"):
        timing.time_one(3)


@no_gpu
def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="torch sees 0 CUDA devices"):
        timing.time_one(lambda: None, device="cuda")


# --- compare -------------------------------------------------------------------------------------


def test_ratios_are_baseline_over_own_time(clock):
    fns = {"a": clock.work(0.4), "twice as fast": clock.work(0.2), "slow": clock.work(1.6)}
    c = timing.compare(fns, rounds=5)
    assert c.baseline == "a"
    assert c.ratio == pytest.approx({"a": 1.0, "twice as fast": 2.0, "slow": 0.25})
    assert c.spread["slow"] == pytest.approx((0.25, 0.25))
    assert [len(r) for r in c.rounds.values()] == [5, 5, 5]
    other = timing.compare(fns, rounds=4, baseline="slow")
    assert other.ratio["a"] == pytest.approx(4) and other.timings["a"].median == pytest.approx(0.4)


def test_pairing_cancels_a_drifting_machine(clock):
    """A machine that slows down all the time: paired ratios stay right where one after the other goes wrong."""

    def drifting(cost):
        return lambda: cost * (1 + (clock.now - start) / 10)

    fns = {"a": clock.work(drifting(0.2)), "b": clock.work(drifting(0.1))}
    start = clock.now
    paired = timing.compare(fns, rounds=20, warmup=0).ratio["b"]
    start = clock.now
    alone = [timing.time_one(fns[n], repeats=20, warmup=0).median for n in "ab"]
    assert paired == pytest.approx(2.0, rel=0.02)
    assert alone[0] / alone[1] < 1.7


def test_one_slow_round_does_not_move_the_median(clock):
    costs = iter([0.1] * 9 + [5.0])
    c = timing.compare({"a": clock.work(0.1), "b": clock.work(lambda: next(costs, 0.1))}, rounds=11)
    assert c.ratio["b"] == pytest.approx(1.0)
    assert min(c.rounds["b"]) < 0.05  # the disturbed round is kept, and seen


def test_the_order_is_drawn_then_reversed(clock):
    names = ["a", "b", "c"]
    fns = {n: clock.work(1.0, n) for n in names}
    timing.compare(fns, rounds=40, warmup=0, min_seconds=0)
    taken = clock.calls[3:]  # the first three calls calibrate
    rounds = [taken[i : i + 3] for i in range(0, len(taken), 3)]
    assert len(rounds) == 40 and all(sorted(r) == names for r in rounds)
    assert all(rounds[i + 1] == rounds[i][::-1] for i in range(0, 40, 2))
    assert len({tuple(r) for r in rounds}) == 6  # every order comes up
    clock.calls.clear()
    timing.compare(fns, rounds=40, warmup=0, min_seconds=0)
    assert clock.calls[3:] == taken  # the same seed, the same order
    clock.calls.clear()
    timing.compare(fns, rounds=40, warmup=0, min_seconds=0, seed=1)
    assert clock.calls[3:] != taken


def test_every_callable_gets_the_calls_it_needs(clock):
    c = timing.compare({"short": clock.work(1e-5), "long": clock.work(1.0)}, rounds=10, min_seconds=0.1)
    assert 1000 <= c.timings["short"].calls <= 1200 and c.timings["long"].calls == 1
    assert c.ratio["long"] == pytest.approx(1e-5)


def test_a_comparison_can_be_read(clock):
    c = timing.compare({"dense": clock.work(0.003), "<4-bit>": clock.work(0.001)}, rounds=3)
    text = str(c)
    assert "above 1 is faster than dense" in text and "3 interleaved rounds" in text
    assert "3 ms" in text and "3.00x" in text and "1 ms" in text and "baseline" in text
    page = c._repr_html_()
    assert "&lt;4-bit&gt;" in page and "<4-bit>" not in page and page.count("<tr>") == 3


def test_a_listener_sees_the_rounds_and_may_stop_them(clock):
    heard = []

    def stop_at_three(what, done, total):
        heard.append((done, total))
        if done == 3:
            raise Cancelled

    with listen(stop_at_three), pytest.raises(Cancelled):
        timing.compare({"a": clock.work(0.1)}, rounds=9)
    assert heard == [(0, 9), (1, 9), (2, 9), (3, 9)] and gc.isenabled()


def test_sleeps_of_known_length_come_out_right():
    c = timing.compare({"2 ms": lambda: time.sleep(2e-3), "8 ms": lambda: time.sleep(8e-3)}, rounds=5, min_seconds=0)
    assert c.timings["2 ms"].median >= 2e-3 and c.timings["8 ms"].median >= 8e-3
    assert (
        c.ratio["8 ms"] == timing.quartiles(c.rounds["8 ms"])[1] > 0
    )  # a busy machine may sleep longer, never shorter


@pytest.mark.parametrize(
    "callables, settings, message",
    [
        ({}, {}, "at least one entry"),
        ([print], {}, "dict of name -> callable"),
        ({"a": 1}, {}, "'a' = 1 cannot be called"),
        ({1: print}, {}, "named 1 needs a string"),
        ({"a": print}, {"baseline": "b"}, "baseline = 'b' is not one of the callables: 'a'"),
        ({"a": print}, {"baseline": ["a"]}, "is not one of the callables"),
        ({"a": print}, {"rounds": 0}, "rounds = 0"),
        ({"a": print}, {"warmup": None}, "warmup = None"),
        ({"a": print}, {"seed": "x"}, "seed = 'x'"),
    ],
)
def test_bad_comparisons_are_refused(callables, settings, message):
    with pytest.raises(ValueError, match=message):
        timing.compare(callables, **settings)


# --- threads, words, caches ----------------------------------------------------------------------


def test_threads_are_pinned_and_put_back():
    before = torch.get_num_threads()
    with timing.threads(before + 1):
        assert torch.get_num_threads() == before + 1
        assert timing.time_one(lambda: None, repeats=1, min_seconds=0).threads == before + 1
    assert torch.get_num_threads() == before
    with pytest.raises(KeyError), timing.threads(before + 1):
        raise KeyError
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("count", [0, -1, 1.5, "2", None, True])
def test_a_bad_thread_count_is_refused(count):
    with pytest.raises(ValueError, match="threads = "), timing.threads(count):
        pass


@pytest.mark.parametrize(
    "seconds, text",
    [
        (2.5, "2.5 s"),
        (123.4, "123 s"),
        (0.0123, "12.3 ms"),
        (2e-4, "200 µs"),
        (1.5e-6, "1.5 µs"),
        (3e-9, "3 ns"),
        (0, "0 ns"),
    ],
)
def test_durations_are_written_in_the_unit_people_read(seconds, text):
    assert timing.duration(seconds) == text


def test_cache_sizes_are_read_from_sysfs(tmp_path):
    for text, size in (("32768K", 32 << 20), ("4M\n", 4 << 20), ("512", 512), ("", 0), ("lots", 0)):
        (tmp_path / "size").write_text(text)
        assert timing._size(tmp_path / "size") == size
    assert timing._size(tmp_path / "none") == 0
    assert timing.last_level_cache() >= 1 << 18


# --- what goes wrong without synchronizing -------------------------------------------------------


class Queue(timing._Cpu):
    """A device that takes work and does it only when waited for, as a GPU does."""

    name = "queue"

    def __init__(self, clock):
        self.clock, self.pending = clock, 0.0

    def push(self, seconds):
        self.clock.now += 1e-5  # the launch
        self.pending += seconds

    def wait(self):
        self.clock.now += self.pending
        self.pending = 0.0


def test_without_synchronizing_only_the_launch_is_seen(clock, monkeypatch):
    queue = Queue(clock)
    monkeypatch.setattr(timing, "stopwatch", lambda device: queue)
    seen = timing.without_synchronize(lambda: queue.push(0.25))
    assert seen.returned == pytest.approx(1e-5) and seen.finished == pytest.approx(0.25 + 1e-5)
    assert "10 µs" in str(seen) and "250 ms" in str(seen)
    # the stopwatch that waits gets it right on the same device
    assert timing.time_one(lambda: queue.push(0.25), repeats=3).median == pytest.approx(0.25 + 1e-5)


def test_on_a_cpu_both_clocks_agree(clock):
    seen = timing.without_synchronize(clock.work(0.1), device="cpu")
    assert seen.returned == seen.finished == pytest.approx(0.1)
    assert "the two agree" in str(seen)


# --- CUDA ----------------------------------------------------------------------------------------


class FakeEvent:
    """Stands in for torch.cuda.Event: writes down what is done, and reads a fake GPU clock."""

    log: list[str] = []
    gpu_ms = 0.0

    def __init__(self, enable_timing=False):
        assert enable_timing

    def record(self):
        FakeEvent.log.append("record")
        self.at = FakeEvent.gpu_ms

    def synchronize(self):
        FakeEvent.log.append("wait for event")

    def elapsed_time(self, other):
        return other.at - self.at


def test_a_cuda_sample_waits_flushes_and_records_in_that_order(monkeypatch):
    """The order of the CUDA path without a GPU: nothing pending, flush outside the events, the end waited for."""
    log = FakeEvent.log
    log.clear()
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: log.append("wait for device"))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(timing._Cuda, "flush", lambda self: log.append("flush"))

    def fn():
        log.append("fn")
        FakeEvent.gpu_ms += 2.0

    watch = timing._Cuda(torch.device("cuda:0"))
    assert watch.sample(fn, 3, True) == pytest.approx(2e-3)
    assert log == ["wait for device", "flush", "record", "fn", "fn", "fn", "record", "wait for event"]


@pytest.mark.cuda
@gpu
def test_cuda_events_agree_with_a_waiting_stopwatch():
    x = torch.randn(4096, 4096, device="cuda")
    t = timing.time_one(lambda: x @ x, device="cuda")
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(20):
        x @ x
    torch.cuda.synchronize()
    assert t.median == pytest.approx((time.perf_counter() - start) / 20, rel=0.3)


@pytest.mark.cuda
@gpu
def test_cuda_returns_before_it_is_done():
    x = torch.randn(8192, 8192, device="cuda")
    seen = timing.without_synchronize(lambda: x @ x)
    assert seen.returned < seen.finished / 5


@pytest.mark.cuda
@gpu
def test_cuda_flush_makes_a_small_read_slower():
    x = torch.randn(1 << 20, device="cuda")  # 4 MiB: stays in the L2 otherwise
    warm = timing.time_one(lambda: x.sum(), device="cuda", graph=True)
    cold = timing.time_one(lambda: x.sum(), device="cuda", graph=True, flush=True)
    assert cold.median > warm.median


@pytest.mark.cuda
@gpu
def test_a_cuda_graph_replays_the_work():
    x, y = torch.zeros(8, device="cuda"), torch.ones(8, device="cuda")
    t = timing.time_one(lambda: x.add_(y), device="cuda", graph=True, repeats=3, min_seconds=0)
    torch.cuda.synchronize()
    assert x[0].item() > 3 and t.median > 0
