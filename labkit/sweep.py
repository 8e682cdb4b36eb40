"""Fill the store: measure a model under many settings, skipping what is there, resumable at any point."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable

from labkit.measure.measurement import Measurement
from labkit.measure.reading import Reading
from labkit.method import Method
from labkit.progress import track
from labkit.results import Key, Store, calibrated


def sweep(
    lm,
    methods: Iterable[Method],
    store: Store | None = None,
    calib=None,
    texts: Iterable[str] = ("manual", "prose"),
    windows: int | None = None,
    length: int | None = None,
    latency: bool = True,
    progress: bool = True,
    measure: Callable[..., Measurement] | None = None,
    prompt: int | None = None,
    engine: bool = True,
) -> list[Measurement]:
    """Measure ``lm`` uncompressed, then under each method, against ``lm``; returns the measurements in that order.

    What ``store`` has under the same key is taken from there; everything else is stored the moment it is measured, so
    that an interrupt loses only the one in flight, and the same call resumes. Times that were taken while the machine was
    busy are not stored: the row goes in without them, and the next call takes them again. ``calib`` is a LongTensor
    (windows, length), by default ``text.calibration(lm)`` where a method needs it. ``windows``, ``length``, ``prompt``: as
    :func:`labkit.measure` chooses them for each method; the uncompressed model is measured for each choice. ``latency``,
    ``engine``: what :func:`labkit.measure` does with them.
    ``measure`` stands in for ``labkit.measure``.
    """
    texts = (texts,) if isinstance(texts, str) else tuple(texts)
    methods = list(methods)
    for method in methods:
        if not isinstance(method, Method):
            raise ValueError(f"sweep takes methods such as RTN(bits=4), not {method!r}.")
    if measure is None:
        from labkit.measure import measure
    store = Store() if store is None else store
    if calib is None and any(map(calibrated, methods)):
        from labkit import text

        calib = text.calibration(lm)

    how = {"texts": texts, "latency": latency, "progress": progress, "engine": engine}
    asked = [(m, Reading.of(lm, m, windows, length, prompt)) for m in methods]
    plain = list(dict.fromkeys(r for _, r in asked)) or [Reading.of(lm, None, windows, length, prompt)]
    hashes = {r: text_hashes(lm, texts, **vars(r)) for r in plain}
    todo = [*((None, r) for r in plain), *asked]
    results, skipped, busy, method = [], 0, 0, None
    try:
        for method, reading in track(todo, "sweep", show=progress):
            key = Key.of(lm, method, hashes[reading], calib)
            result = store.get(key)
            if result is None or (latency and result.latency is None):
                small = lm if method is None else method(lm, calib if calibrated(method) else None, progress)
                result = measure(small, against=None if method is None else lm, **how, **vars(reading))
                del small  # before the next one is made
                store.put(key, result)
                busy += result.kept() is not result
            else:
                skipped += 1
            results.append(result)
    except BaseException as error:
        what = "the uncompressed model" if method is None else repr(method)
        done = f"{len(results)} of {len(todo)} are in the store"
        _note(error, f"The sweep stopped at {what}; {done}. Run the same sweep again to go on from there.")
        raise
    if busy:
        print(f"{busy} without times, for other programs were busy: run the same sweep again on a quiet machine.")
    if progress:
        print(f"{len(results) - skipped} measured, {skipped} were in the store already ({store.path}).")
    return [results[0], *results[len(plain) :]]


def text_hashes(lm, texts: Iterable[str], windows: int = 8, length: int = 512, prompt: int = 0) -> dict[str, str]:
    """For each text the hash of the token ids that ``lm`` is scored on: the ``texts`` of a :class:`Key`."""
    reading = Reading(windows, length, prompt)
    return {str(name): reading.fingerprint(reading.ids(lm, name)) for name in texts}


def grid(method_class: type[Method], **lists) -> list[Method]:
    """Every combination of the given knob values, each checked; a single value stands for a list of one.

    >>> grid(RTN, bits=[3, 4], group_size=64)
    [RTN(bits=3, group_size=64, symmetric=False), RTN(bits=4, group_size=64, symmetric=False)]
    """
    for name, values in lists.items():
        _knob(method_class, name)
        lists[name] = [values] if isinstance(values, str) or not isinstance(values, Iterable) else list(values)
        if not lists[name]:
            raise ValueError(f"{method_class.__name__}.{name} has no values to try.")
    combinations = itertools.product(*lists.values())
    made = (method_class(**dict(zip(lists, values))) for values in combinations)
    return list({m.key(): m for m in made}.values())  # each setting once


def parse_grid(method_class: type[Method], words: dict[str, str]) -> list[Method]:
    """:func:`grid` from the command line: ``{"bits": "2,3,4", "group_size": "64,none"}``."""
    lists = {}
    for name, text in words.items():
        knob = _knob(method_class, name)
        lists[name] = [knob.parse(word) for word in text.split(",")]
    return grid(method_class, **lists)


def _knob(method_class: type[Method], name: str):
    knobs = method_class.knobs()
    if name not in knobs:
        raise ValueError(f"{method_class.__name__} has no knob {name!r}: it has {', '.join(knobs) or 'none'}.")
    return knobs[name]


def _note(error: BaseException, text: str) -> None:
    if hasattr(error, "add_note"):
        error.add_note(text)  # shown under the traceback
    else:  # Python 3.10
        print(text, file=sys.stderr)
