"""How many threads? A small product is done before a second thread has woken; a large one takes half the time on two.

So it is measured: decode steps on one thread, on half of the cores and on all, in turns, once per machine and size of
model. All cores are the default; fewer must win by a margin. The choice is remembered in the cache folder, and heals:

- it is measured alone and on a quiet machine only; where that cannot be had, the default is taken and nothing remembered;
- fewer threads than all, which one busy moment could have chosen, count only when a second measurement says the same;
- it is measured again when it is some weeks old, and after :func:`contradict` has found steps of another length;
- ``labkit doctor`` shows it, and ``labkit doctor --forget-choices`` throws it away.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from datetime import date, timedelta
from pathlib import Path

import torch

from labkit._files import write_text
from labkit.measure.alone import alone
from labkit.measure.busy import Watch, available, is_busy, quiet
from labkit.measure.machine import machine
from labkit.paths import cache

LENGTHS = (16, 64, 256, 512)  # of the prompts that the crossover to dense weights is looked for with
MARGIN = 0.05  # by so much must another choice than the default be faster
ROUNDS, STEPS = 12, 4  # of decoding: short ones, so that all choices meet the same moments
PROMPTS = 5  # rounds of reading a prompt: the first touches memory, which a median does not mind
SMALL = 250e6  # bytes: models of up to this size are held two at a time while they are compared
OLD = timedelta(weeks=4)
FAR = 1.25  # a step this many times as long as remembered, or as short, contradicts it
NEAR = 64  # tokens: the longest context at which steps are compared with the remembered ones
PATIENCE = 3.0  # seconds to wait for others; then the default is taken
AGAIN = 600.0  # seconds after which one that did not get its quiet moment tries again

_now = time.perf_counter
_tried: dict[str, float] = {}  # key -> when the machine was last too busy to measure


@dataclass(frozen=True)
class Choice:
    """What was found to be fastest, and what it was compared with. ``ms``: choice -> median milliseconds of a step."""

    what: str  # "threads", or "dense prefill from" how many tokens on (None: never)
    choice: int | None
    default: int | None
    ms: dict[str, float]
    nbytes: int  # of the model that was measured
    when: str  # the day, ISO 8601
    agreed: int = 1  # measurements in a row that said so

    @property
    def settled(self) -> bool:
        """Whether it need not be measured again."""
        age = date.today() - date.fromisoformat(self.when)
        return timedelta(0) <= age < OLD and (self.choice == self.default or self.agreed >= 2)

    def __str__(self) -> str:
        size = f"{self.nbytes / 1e6:.0f} MB" if self.nbytes >= 1e6 else f"{self.nbytes / 1e3:.0f} kB"
        if self.what != "threads":
            found = "never faster" if self.choice is None else f"from {self.choice} tokens on"
            return f"prompts with dense weights beside a model of {size}: {found}, measured {self.when}"
        mine, others = self.ms.get(str(self.choice)), {n: t for n, t in self.ms.items() if n != str(self.choice)}
        text = f"model of {size}: {self.choice} thread{'s' * (self.choice != 1)}"
        if mine is not None and others:
            text += f" ({mine:.2f} ms a step against {', '.join(f'{t:.2f} on {n}' for n, t in others.items())})"
        return f"{text}, measured {self.when}"


def cores() -> int:
    """Threads that can really run at once here: the cores of this process, less where a container has a limit."""
    return max(1, int(available()))


def fastest(build: Callable, nbytes: int):
    """``build(threads)`` with the best number of threads for a model of that many bytes.

    ``build`` gives a model with ``threads``, ``prefill``, ``decode``, ``rewind`` and ``context``.
    """
    candidates = sorted({1, max(1, cores() // 2), cores()})
    if len(candidates) == 1:
        return build(1)
    models = _Models(build, at_once=nbytes <= SMALL)

    def measure() -> tuple[int, dict[str, float]]:
        if not models.at_once:
            return _compare(lambda n: _step(models(n), 3 * STEPS), candidates, ROUNDS // 4)
        return _compare(lambda n: _step(models(n), STEPS), candidates, ROUNDS)

    return models(_chosen("threads", nbytes, cores(), candidates, measure, f"{cores()} available"))


def crossover(model, reader, nbytes: int) -> int | None:
    """From how many tokens on ``reader``, a session of dense weights, reads a prompt faster; None: at none that was tried."""
    lengths = [n for n in LENGTHS if n <= model.context]

    def measure() -> tuple[int | None, dict[str, float]]:
        least, ms = None, {}
        for n in reversed(lengths):  # every longer one must be faster as well
            best, found = _compare(lambda way, n=n: _prompt(model, reader if way else None, n), (1, 0), PROMPTS)
            ms |= {f"{n} {'dense' if way == '1' else 'packed'}": t for way, t in found.items()}
            if best == 0:
                break
            least = n
        return least, ms

    return _chosen("dense prefill from", nbytes, None, [None, *lengths], measure, f"{model.threads} threads")


def contradict(model, seconds: float, context: int, disturbed: bool = False) -> bool:
    """Compare a decode step, timed later, with what the choice of threads was made on. Returns whether that is forgotten now.

    Parameters
    ----------
    model : CompiledModel
        Whose ``threads`` were chosen here.
    seconds : float
        Of one step.
    context : int
        Tokens in its cache; at more than 64 a step is longer for that, and nothing is concluded.
    disturbed : bool
        Whether the machine was busy (``Comparison.disturbed``): then nothing is concluded either.
    """
    key = _key("threads", model.nbytes, f"{cores()} available")
    known = _read()
    kept = known.get(key)
    then = kept and kept.ms.get(str(model.threads))
    if disturbed or context > NEAR or not then or not seconds > 0:
        return False
    if abs(model.nbytes / kept.nbytes - 1) > 0.05:  # of the same class of sizes, but not comparable
        return False
    if 1 / FAR <= 1e3 * seconds / then <= FAR:
        return False
    _write({k: v for k, v in known.items() if k != key})
    return True


def choices() -> list[Choice]:
    """All that is remembered for this machine."""
    return [choice for key, choice in _read().items() if f", {machine()}, " in key]


def forget() -> int:
    """Throw away what was remembered; returns how many choices that were."""
    count = len(_read())
    _tried.clear()
    with suppress(OSError):
        _path().unlink(missing_ok=True)
    return count


# Measuring


def _chosen(what: str, nbytes: int, default, allowed: Sequence, measure: Callable, of: str):
    """The remembered choice; where there is none that can be trusted, the one that ``measure()`` finds, or the default."""
    key = _key(what, nbytes, of)
    known = _read().get(key)
    if known is not None and known.choice not in allowed:
        known = None
    if known is not None and known.settled:
        return known.choice
    found = None
    if key not in _tried or _now() - _tried[key] > AGAIN:
        found = _quietly(f"the engine's {what}", measure)
        if found is None:
            _tried[key] = _now()
    if found is None:  # an old choice that was settled is still better than none
        return known.choice if known is not None and known.agreed >= 2 else default
    best, ms = found
    agreed = known.agreed + 1 if known is not None and known.choice == best else 1
    _write(_read() | {key: Choice(what, best, default, ms, nbytes, date.today().isoformat(), agreed)})
    return best


def _quietly(what: str, measure: Callable):
    """``measure()`` alone and on a quiet machine; None where others work."""
    try:
        with alone(what, timeout=PATIENCE):
            for _ in range(2):
                if not quiet(PATIENCE):
                    return None
                watch = Watch()
                found = measure()
                if not is_busy(watch.share()):
                    return found
    except TimeoutError:
        pass
    return None


def _compare(seconds: Callable, candidates: Sequence[int], rounds: int) -> tuple[int, dict[str, float]]:
    """(the best candidate, median ms of each): in turns, by the median of the ratios within a round.

    The last candidate is the default: another one must be faster by the margin.
    """
    taken = {n: [] for n in candidates}
    order = list(candidates)
    for _ in range(rounds):
        for n in order:
            taken[n].append(seconds(n))
        order.reverse()  # A B, B A: nobody is always first
    default = candidates[-1]
    gains = {n: statistics.median(d / t for d, t in zip(taken[default], taken[n]) if t > 0) for n in candidates}
    best = max(gains, key=gains.get)
    best = best if gains[best] > 1 + MARGIN else default
    return best, {str(n): round(1e3 * statistics.median(t), 4) for n, t in taken.items()}


class _Models:
    """Models by their number of threads, built when they are asked for; large ones are held one at a time."""

    def __init__(self, build: Callable, at_once: bool):
        self.build, self.at_once, self.built = build, at_once, {}

    def __call__(self, threads: int):
        if threads not in self.built:
            if not self.at_once:
                self.built.clear()
            self.built[threads] = self.build(threads)
        return self.built[threads]


def _step(model, steps: int) -> float:
    """Seconds per decode step, the median of some."""
    model.prefill(torch.zeros(1, 4, dtype=torch.long))
    found = []
    for _ in range(max(1, min(steps, model.context - 4))):
        start = _now()
        model.decode(0)
        found.append(_now() - start)
    model.rewind(0)
    return statistics.median(found)


def _prompt(model, reader, tokens: int) -> float:
    """Seconds to read a prompt."""
    model.reader, model.reads_from = reader, 0
    ids = torch.zeros(1, tokens, dtype=torch.long)
    try:
        start = _now()
        model.prefill(ids)
        return _now() - start
    finally:
        model.reader = None
        model.rewind(0)


# Remembering


def _key(what: str, nbytes: int, of: str) -> str:
    """What a choice depends on: the machine, its runtime, the cores it may use, and the size of the model."""
    import onnxruntime

    return f"{what}, {machine()}, {of}, onnxruntime {onnxruntime.__version__}, 2^{max(nbytes, 1).bit_length()} bytes"


def _path() -> Path:
    return cache() / "engine-threads.json"


def _read() -> dict[str, Choice]:
    """What was measured before. What is damaged, or of an older form, is left out: it is quickly measured again."""
    try:
        rows = json.loads(_path().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    found = {key: _choice(row) for key, row in rows.items()} if isinstance(rows, dict) else {}
    return {key: choice for key, choice in found.items() if choice is not None}


def _choice(row) -> Choice | None:
    """A row of the file; None where anything about it is wrong."""

    def whole(value, low: int) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= low

    if not isinstance(row, dict) or set(row) != {f.name for f in fields(Choice)} or not isinstance(row["ms"], dict):
        return None
    try:
        date.fromisoformat(row["when"])
    except (ValueError, TypeError):
        return None
    good = isinstance(row["what"], str) and whole(row["nbytes"], 1) and whole(row["agreed"], 1)
    good = good and all(row[name] is None or whole(row[name], 1) for name in ("choice", "default"))
    good = good and all(isinstance(t, (int, float)) and not isinstance(t, bool) and t >= 0 for t in row["ms"].values())
    return Choice(**row) if good else None


def _write(known: dict[str, Choice]) -> None:
    """All of the file or nothing. Where it cannot be written, it is measured again the next time."""
    with suppress(OSError):
        write_text(_path(), json.dumps({key: asdict(choice) for key, choice in known.items()}, indent=1))
