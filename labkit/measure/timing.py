"""How long does it take? One stopwatch for CPU and GPU, and fair comparisons.

    timing.time_one(lambda: x @ w)                              # Timing: median and quartiles, in seconds
    timing.compare({"fp32": dense, "4-bit": packed})            # Comparison: paired ratios to the first one

Four things go wrong when people time by hand, and this module is about them:

- **The machine drifts** (clocks, neighbours, heat). ``compare`` therefore runs A B B A … and takes the ratio inside
  each round, so that a slow second slows both sides: the median of those ratios is steadier than the ratio of medians.
- **The cache lies.** A small matrix that is multiplied a thousand times in a row stays in the cache; in a real decode
  step every layer's weights come from memory. ``flush=True`` empties the caches before every sample.
- **Somebody else works here.** Timings wait for each other (:func:`alone`), and what other programs took of the cores
  meanwhile is part of the result (``busy``); rounds that they disturbed are timed again.
- **A GPU returns before it is done.** A call only queues work. Here CUDA events are recorded on the GPU's own
  timeline and waited for; :func:`without_synchronize` shows what a plain stopwatch reads instead.

The CUDA and MPS paths are *unverified*: written for real, but nobody has run them on a GPU yet.
"""

from __future__ import annotations

import gc
import html
import math
import numbers
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch

from labkit.measure.alone import alone
from labkit.measure.busy import BUSY, Watch, is_busy, others_seconds, quiet
from labkit.progress import track

__all__ = [
    "BUSY",
    "Comparison",
    "Timing",
    "Unsynchronized",
    "Watch",
    "alone",
    "cache_note",
    "compare",
    "duration",
    "fits_cache",
    "is_busy",
    "last_level_cache",
    "others_seconds",
    "quartiles",
    "quiet",
    "stopwatch",
    "threads",
    "time_one",
    "without_synchronize",
]

_now, _sleep = time.perf_counter, time.sleep  # the CPU's clock, in seconds; the tests put fake ones here
_MOST_CALLS = 1_000_000  # calls per sample, for a callable too fast for the clock to see
_REST = 0.005  # seconds between two samples of different callables
_STRETCH = 0.25  # seconds of rounds that are judged, and thrown away, together: the system counts in ticks of 0.01


@dataclass(frozen=True)
class Timing:
    """Seconds per call. ``low`` and ``high`` are the quartiles, ``iqr`` is their distance."""

    median: float
    iqr: float
    low: float
    high: float
    samples: tuple[float, ...]  # seconds per call, in the order they were taken
    device: str
    threads: int  # torch's CPU threads while timing
    calls: int = 1  # calls per sample: each sample is the mean of that many
    flushed: bool = False  # whether the caches were emptied before every sample
    busy: float | None = None  # share of the cores that others took meanwhile, 0 to 1; None: the system does not say

    @classmethod
    def of(
        cls,
        samples,
        device: str = "cpu",
        threads: int = 1,
        calls: int = 1,
        flushed: bool = False,
        busy: float | None = None,
    ) -> Timing:
        """Summarize samples (seconds per call)."""
        low, median, high = quartiles(samples)
        return cls(median, high - low, low, high, tuple(samples), device, threads, calls, flushed, busy)

    @property
    def disturbed(self) -> bool:
        """Whether others took more than ``BUSY`` of the cores: too much for a time that is kept."""
        return is_busy(self.busy)

    def __str__(self) -> str:
        cold = ", caches flushed" if self.flushed else ""
        return (
            f"{duration(self.median)} ({duration(self.low)} to {duration(self.high)}) on {self.device}, "
            f"{_count(self.threads, 'thread')}, {len(self.samples)} x {_count(self.calls, 'call')}{cold}"
            f"{_disturbance(self.busy)}"
        )


@dataclass(frozen=True)
class Comparison:
    """Several callables timed in turns. Ratios are the baseline's time over theirs: **above 1 is faster**."""

    baseline: str
    timings: dict[str, Timing]
    rounds: dict[str, tuple[float, ...]]  # name -> the paired ratio of every round
    ratio: dict[str, float]  # name -> median of the paired ratios
    spread: dict[str, tuple[float, float]]  # name -> quartiles of the paired ratios
    busy: float | None = None  # share of the cores that others took meanwhile, 0 to 1; None: the system does not say
    repeated: int = 0  # rounds that others disturbed, and that were thrown away and timed again

    @property
    def disturbed(self) -> bool:
        """Whether others took more than ``BUSY`` of the cores, in the rounds that were kept: do not store such times."""
        return is_busy(self.busy)

    def table(self) -> list[tuple[str, str, str, str, str]]:
        """Rows of (name, median, middle half, times the baseline's speed, middle half of that), as text."""
        rows = []
        for name, t in self.timings.items():
            low, high = self.spread[name]
            rows.append(
                (
                    name,
                    duration(t.median),
                    f"{duration(t.low)} to {duration(t.high)}",
                    "baseline" if name == self.baseline else f"{self.ratio[name]:.2f}x",
                    "" if name == self.baseline else f"{low:.2f} to {high:.2f}",
                )
            )
        return rows

    @property
    def caption(self) -> str:
        """How it was measured, in one line."""
        t = self.timings[self.baseline]
        cold = ", caches flushed before every sample" if t.flushed else ""
        again = f" ({self.repeated} timed again, for others were busy)" if self.repeated else ""
        return (
            f"measured on {t.device}, {_count(t.threads, 'thread')}, {len(t.samples)} interleaved rounds{again}{cold}; "
            f"ratios are paired, above 1 is faster than {self.baseline}{_disturbance(self.busy)}"
        )

    def __str__(self) -> str:
        rows = [_HEAD, *self.table()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
        lines = [self.caption]
        for name, *cells in rows:
            lines.append(f"  {name:<{widths[0]}}" + "".join(f"  {c:>{w}}" for c, w in zip(cells, widths[1:])))
        return "\n".join(line.rstrip() for line in lines)

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{html.escape(c)}</th>" for c in _HEAD)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in self.table())
        caption = f"<caption style='text-align:left'>{html.escape(self.caption)}</caption>"
        return f"<table>{caption}<tr>{head}</tr>{body}</table>"


_HEAD = ("", "median", "middle half", "speed", "middle half")


@dataclass(frozen=True)
class Unsynchronized:
    """What a stopwatch reads that does not wait for the GPU, beside the truth. Seconds for one call."""

    returned: float  # until Python had control back: all that a naive stopwatch sees
    finished: float  # until the result was really there
    device: str

    def __str__(self) -> str:
        text = f"the call returned after {duration(self.returned)}, its work was done after {duration(self.finished)}"
        if self.device.startswith("cpu"):
            text += "; on a CPU torch works while you wait, so the two agree"
        return text


def time_one(
    fn: Callable[[], object],
    *,
    device: str | torch.device | None = None,
    repeats: int = 20,
    warmup: int = 3,
    min_seconds: float = 0.2,
    flush: bool = False,
    graph: bool = False,
) -> Timing:
    """Time ``fn()``: ``repeats`` samples after ``warmup`` calls.

    A callable much shorter than the clock can resolve is called many times per sample, so that all samples together
    last ``min_seconds`` or more. With ``flush`` a sample is one call on cold caches, since a second call in a row
    would find them warm.

    ``device``: "cpu", "cuda", "cuda:1", "mps", or None for the GPU where there is one. ``graph`` (CUDA only) captures
    ``fn`` in a CUDA graph and times the replay, which leaves out the CPU's cost of launching each kernel.

    Raises ValueError, naming the value, for anything out of range and for a device that is not there.
    """
    _check_callable("fn", fn)
    _check_settings(warmup=warmup, min_seconds=min_seconds, flush=flush)
    _whole("repeats", repeats, 1)
    watch = stopwatch(device)
    with alone("timing a callable"):
        fn = watch.prepare(fn, warmup, graph)
        with _undisturbed():
            calls = 1 if flush else _calibrate(watch, fn, min_seconds / repeats)
            others = Watch()
            samples = [watch.sample(fn, calls, flush) for _ in range(repeats)]
            busy = others.share()
    return Timing.of(samples, watch.name, torch.get_num_threads(), calls, flush, busy)


def compare(
    callables: Mapping[str, Callable[[], object]],
    *,
    baseline: str | None = None,
    rounds: int = 21,
    warmup: int = 3,
    device: str | torch.device | None = None,
    flush: bool = False,
    graph: bool = False,
    min_seconds: float = 0.2,
    seed: int = 0,
    progress: bool = False,
) -> Comparison:
    """Time callables in turns, and compare each with the baseline (the first one by default).

    In every round each callable gives one sample; the order is drawn at random and reversed in the next round, so that
    nobody always runs first or after the same neighbour. ``seed`` fixes the order. Ratios are taken within a round,
    baseline time over own time, so above 1 is faster; their median and quartiles are reported.

    Rounds during which others took more than a tenth of the cores are thrown away and timed again, once; what the rounds
    that were kept still met is in ``busy``. Nothing else is timed on this machine meanwhile: see :func:`alone`.

    ``min_seconds`` is the least time that each callable's samples last together; the other arguments are those of
    :func:`time_one`. Raises ValueError, naming the value, for anything that does not fit.
    """
    if not isinstance(callables, Mapping) or not callables:
        raise ValueError(f"compare needs a dict of name -> callable with at least one entry, not {callables!r}.")
    for name, fn in callables.items():
        if not isinstance(name, str):
            raise ValueError(f"the callable named {name!r} needs a string as its name.")
        _check_callable(repr(name), fn)
    names = list(callables)
    baseline = names[0] if baseline is None else baseline
    if baseline not in names:
        raise ValueError(f"baseline = {baseline!r} is not one of the callables: {', '.join(map(repr, names))}.")
    _check_settings(warmup=warmup, min_seconds=min_seconds, flush=flush)
    _whole("rounds", rounds, 1)
    _whole("seed", seed, 0)

    watch = stopwatch(device)
    with alone(f"timing {', '.join(names)}"[:120]):
        ready = {name: watch.prepare(fn, warmup, graph) for name, fn in callables.items()}
        with _undisturbed():
            calls = {n: 1 if flush else _calibrate(watch, fn, min_seconds / rounds) for n, fn in ready.items()}
            orders = _orders(names, 2 * rounds, seed)

            def sample(name: str) -> float:
                if len(names) > 1:
                    watch.rest()
                return watch.sample(ready[name], calls[name], flush)

            first = _take(orders, rounds, sample, "timing", progress)
            kept = [s for s in first if not is_busy(s.share)]
            repeated = rounds - sum(len(s.rounds) for s in kept)
            if repeated:
                kept += _take(orders, repeated, sample, "timing again, for others were busy", progress)
    threads, busy = torch.get_num_threads(), _share(kept)
    taken = {n: [times[n] for s in kept for times in s.rounds] for n in names}
    timings = {n: Timing.of(taken[n], watch.name, threads, calls[n], flush, busy) for n in names}
    ratios = {n: tuple(_ratio(b, t) for b, t in zip(taken[baseline], taken[n])) for n in names}
    middle = {n: quartiles(r) for n, r in ratios.items()}
    return Comparison(
        baseline=baseline,
        timings=timings,
        rounds=ratios,
        ratio={n: m for n, (_, m, _) in middle.items()},
        spread={n: (low, high) for n, (low, _, high) in middle.items()},
        busy=busy,
        repeated=repeated,
    )


@dataclass
class _Stretch:
    """Some rounds in a row, and the share of the cores that others took meanwhile."""

    rounds: list[dict[str, float]] = field(default_factory=list)  # seconds of each callable
    watch: Watch = field(default_factory=Watch)
    seconds: float = 0.0
    share: float | None = None

    def close(self) -> None:
        self.seconds, self.share = self.watch.seconds, self.watch.share()


def _take(orders, count: int, sample: Callable[[str], float], what: str, progress: bool) -> list[_Stretch]:
    """Time that many rounds, in stretches that are long enough for the system's counters."""
    found = [_Stretch()]
    for order in track(islice(orders, count), what, show=progress, total=count):
        if found[-1].watch.seconds >= _STRETCH:
            found[-1].close()
            found.append(_Stretch())
        found[-1].rounds.append({name: sample(name) for name in order})
    found[-1].close()
    return found


def _share(stretches: list[_Stretch]) -> float | None:
    """The share of the cores that others took in all of these together."""
    known = [(s.share, s.seconds) for s in stretches if s.share is not None]
    total = sum(seconds for _, seconds in known)
    return sum(share * seconds for share, seconds in known) / total if total > 0 else None


def without_synchronize(fn: Callable[[], object], device: str | torch.device | None = None) -> Unsynchronized:
    """The classic mistake, on purpose: stop the clock when the call returns, and again when the device is done.

    On a GPU the first number is only the time to queue the work, far below the second. On a CPU the two agree.
    """
    _check_callable("fn", fn)
    watch = stopwatch(device)
    watch.prepare(fn, warmup=2, graph=False)
    watch.wait()
    start = _now()
    fn()
    returned = _now() - start
    watch.wait()
    return Unsynchronized(returned, _now() - start, watch.name)


@contextmanager
def threads(count: int) -> Iterator[int]:
    """Pin torch to ``count`` CPU threads inside the block, and put the old number back after it.

    It rules torch's own pool only: an onnxruntime session has a pool of its own, set when it is created.
    """
    _whole("threads", count, 1)
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield count
    finally:
        torch.set_num_threads(before)


def quartiles(samples) -> tuple[float, float, float]:
    """The 25th, 50th and 75th percentile, linear between samples (numpy's default)."""
    values = [float(s) for s in samples]
    if not values:
        raise ValueError("quartiles of no samples")
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, statistics.median(values), high


def duration(seconds: float) -> str:
    """Seconds in the unit that people read: ``0.0123`` -> ``"12.3 ms"``."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if abs(seconds) >= scale:
            return f"{seconds / scale:.3g} {unit}" if abs(seconds) < 100 * scale else f"{seconds / scale:.0f} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def last_level_cache() -> int:
    """Bytes of the largest CPU cache that the system reports; 32 MiB where it reports none."""
    sizes = [_size(p) for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]  # Linux
    if not sizes:
        for key in ("hw.l3cachesize", "hw.perflevel0.l2cachesize", "hw.l2cachesize"):  # macOS
            try:
                sizes.append(int(subprocess.run(["sysctl", "-n", key], capture_output=True, timeout=5).stdout or 0))
            except (OSError, ValueError, subprocess.SubprocessError):
                continue
    return max([s for s in sizes if s > 0], default=32 << 20)


def fits_cache(nbytes: int) -> bool:
    """Whether that many bytes stay in the largest CPU cache from one decode step to the next."""
    return nbytes <= last_level_cache()


def cache_note(nbytes: int, what: str = "weights") -> str:
    """What to say beside a decode time of so many bytes of weights; empty where they have to come from memory."""
    if not fits_cache(nbytes):
        return ""
    size = f"{nbytes / 1e6:.0f} MB" if nbytes >= 1e6 else f"{nbytes / 1e3:.0f} kB"
    return (
        f"The {what} ({size}) fit the CPU's last-level cache ({last_level_cache() / 1e6:.0f} MB): from one step to the next "
        "they need not come from memory, so decoding can be faster than the memory roof."
    )


def _size(path: Path) -> int:
    """``"32768K"`` in a sysfs file -> bytes; 0 when unreadable."""
    try:
        text = path.read_text().strip()
        scale = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 1)
        return int(text.rstrip("KMG")) * scale
    except (OSError, ValueError):
        return 0


# --- stopwatches: one per kind of device ---------------------------------------------------------


class _Cpu:
    """``perf_counter`` around the calls."""

    name = "cpu"
    _junk: torch.Tensor | None = None

    def wait(self) -> None:
        """Until all queued work is done: on a CPU it always is."""

    def rest(self) -> None:
        """Let the threads of the callable before go to sleep: a pool spins on for a while when its work is done."""
        _sleep(_REST)

    def prepare(self, fn, warmup: int, graph: bool):
        if graph:
            raise ValueError(f"graph = True needs a CUDA device; this is {self.name}.")
        for _ in range(warmup):
            fn()
        self.wait()
        return fn

    def sample(self, fn, calls: int, flush: bool) -> float:
        if flush:
            self.flush()
        self.wait()
        start = _now()
        for _ in range(calls):
            fn()
        self.wait()
        return (_now() - start) / calls

    def flush(self) -> None:
        """Read through a buffer of twice the last-level cache, on all threads, so that every line gives way.

        Reading and not writing: lines that were written would have to travel back to memory during the sample.
        """
        if self._junk is None:
            size = min(max(2 * last_level_cache(), 128 << 20), 1 << 30)
            self._junk = torch.ones(size // 4)  # ones, not zeros: untouched zero pages all share one physical page
        self._junk.sum()


class _Mps(_Cpu):
    """Apple's GPU, *unverified*: ``perf_counter`` around work that is waited for."""

    name = "mps"

    def wait(self) -> None:
        torch.mps.synchronize()

    def flush(self) -> None:
        if self._junk is None:
            self._junk = torch.ones(256 << 18, device="mps")  # 256 MiB, well above any M-series cache
        self._junk.sum()


class _Cuda:
    """CUDA events on the current stream, *unverified*: the GPU itself notes when it starts and when it is done."""

    def __init__(self, device: torch.device):
        self.device = device
        self.name = str(device)
        self._junk: torch.Tensor | None = None

    def wait(self) -> None:
        torch.cuda.synchronize(self.device)

    def rest(self) -> None:
        """Nothing of the GPU's spins on."""

    def prepare(self, fn, warmup: int, graph: bool):
        with torch.cuda.device(self.device):
            if graph:
                fn = self._capture(fn, warmup)
            for _ in range(warmup):
                fn()
        self.wait()
        return fn

    def _capture(self, fn, warmup: int):
        """Record ``fn`` once. Warm-up runs on a side stream, as capture asks: libraries allocate on the first call."""
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(max(warmup, 1)):
                fn()
        torch.cuda.current_stream(self.device).wait_stream(side)
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded):
            fn()
        return recorded.replay

    def sample(self, fn, calls: int, flush: bool) -> float:
        with torch.cuda.device(self.device):
            self.wait()  # nothing from before is still running
            if flush:
                self.flush()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(calls):
                fn()
            end.record()
            end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls  # elapsed_time is in milliseconds

    def flush(self) -> None:
        """Overwrite twice the L2 cache. Queued before the first event, so it is not part of the sample."""
        if self._junk is None:
            l2 = getattr(torch.cuda.get_device_properties(self.device), "L2_cache_size", 0) or 64 << 20
            self._junk = torch.empty(2 * l2, dtype=torch.int8, device=self.device)
        self._junk.zero_()


def stopwatch(device: str | torch.device | None) -> _Cpu | _Cuda:
    """The stopwatch of a device; None takes the GPU where there is one (CPU work timed by it reads right too)."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        where = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device = {device!r} is not a device: use 'cpu', 'cuda', 'cuda:0' or 'mps'.") from error
    if where.type == "cpu":
        return _Cpu()
    if where.type == "mps":
        if not torch.backends.mps.is_available():
            raise ValueError(f"device = {device!r}, but this machine has no Apple GPU that torch can use.")
        return _Mps()
    if where.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (where.index or 0) >= count:
            raise ValueError(f"device = {device!r}, but torch sees {_count(count, 'CUDA device')} on this machine.")
        return _Cuda(where)
    raise ValueError(f"device = {device!r} cannot be timed: use 'cpu', 'cuda', 'cuda:0' or 'mps'.")


# --- small parts ---------------------------------------------------------------------------------


def _calibrate(watch, fn, target: float) -> int:
    """The calls per sample that make a sample last ``target`` seconds."""
    calls = 1
    while calls < _MOST_CALLS:
        elapsed = watch.sample(fn, calls, False) * calls
        if elapsed >= target:
            break
        # Overshoot a little, and never grow more than a hundredfold on the word of one short sample.
        wanted = math.ceil(1.1 * calls * target / elapsed) if elapsed > 0 else 100 * calls
        calls = min(max(wanted, calls + 1), 100 * calls, _MOST_CALLS)
    return calls


def _orders(names: list[str], rounds: int, seed: int) -> Iterator[list[str]]:
    """An order per round: drawn at random, then the same reversed, then drawn anew."""
    draw = random.Random(seed)
    order = list(names)
    for i in range(rounds):
        if i % 2 == 0:
            draw.shuffle(order)
        else:
            order.reverse()
        yield list(order)


def _ratio(baseline: float, own: float) -> float:
    if own > 0:
        return baseline / own
    return 1.0 if baseline == own else math.inf  # both below what the clock can see


@contextmanager
def _undisturbed() -> Iterator[None]:
    """No garbage collection while the clock runs."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _disturbance(busy: float | None) -> str:
    return f"; other programs took {100 * busy:.0f} % of the cores meanwhile: do not trust it" if is_busy(busy) else ""


def _count(n: int, what: str) -> str:
    return f"{n} {what}" + ("" if n == 1 else "s")


def _check_callable(name: str, fn) -> None:
    if not callable(fn):
        raise ValueError(f"{name} = {fn!r} cannot be called: pass a function without arguments, such as lambda: x @ w.")


def _check_settings(warmup, min_seconds, flush) -> None:
    _whole("warmup", warmup, 0)
    real = isinstance(min_seconds, numbers.Real) and not isinstance(min_seconds, bool)
    if not real or not math.isfinite(min_seconds) or min_seconds < 0:
        raise ValueError(f"min_seconds = {min_seconds!r} is not allowed: it must be a number, 0 or more.")
    if not isinstance(flush, bool):
        raise ValueError(f"flush = {flush!r} is not allowed: it must be True or False.")


def _whole(name: str, value, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < low:
        raise ValueError(f"{name} = {value!r} is not allowed: it must be a whole number, {low} or more.")
