"""How many threads? A small product is done before a second thread has woken; a large one takes half the time on two.

So it is measured: a decode step on one thread, on half of the cores and on all, once per machine and size of model, and
remembered in the cache folder.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from labkit.measure.machine import cores, machine
from labkit.paths import cache

LENGTHS = (16, 64, 256, 512)  # of the prompts that the crossover to dense weights is looked for with


def fastest(build: Callable, nbytes: int):
    """``build(threads)`` with the best number of threads for a model of that many bytes."""
    key = f"{machine()}, onnxruntime {_version()}, 2^{max(nbytes, 1).bit_length()} bytes"
    known = _read()
    best = known.get(key)
    if isinstance(best, int) and 1 <= best <= cores():
        return build(best)
    times, model = {}, None
    for threads in sorted({1, max(1, cores() // 2), cores()}):
        model = None  # one at a time in memory
        model = build(threads)
        times[threads] = _step(model)
    best = min(times, key=times.get)
    _write(_read() | {key: best})
    return model if model.threads == best else build(best)


def crossover(model, reader, nbytes: int) -> int | None:
    """From how many tokens on ``reader``, a session of dense weights, reads a prompt faster; None: at none that was tried.

    Measured once per machine and size of model, and remembered.
    """
    key = (
        f"dense prefill, {machine()}, onnxruntime {_version()}, 2^{max(nbytes, 1).bit_length()} bytes, {model.threads}"
    )
    known = _read()
    if key not in known:
        lengths = [n for n in LENGTHS if n <= model.context]
        faster = {n: _prompt(model, reader, n) < _prompt(model, None, n) for n in lengths}
        slower = [n for n in lengths if not faster[n]]
        found = next((n for n in lengths if n > max(slower, default=0)), None)
        _write(_read() | {key: found})
        return found
    return known[key] if isinstance(known[key], int) else None


def _prompt(model, reader, tokens: int, repeats: int = 3) -> float:
    """Seconds to read a prompt, the best of some."""
    model.reader, model.reads_from = reader, 0
    ids, found = torch.zeros(1, tokens, dtype=torch.long), []
    try:
        for _ in range(repeats + 1):  # the first touches memory
            start = time.perf_counter()
            model.prefill(ids)
            found.append(time.perf_counter() - start)
    finally:
        model.reader = None
        model.rewind(0)
    return min(found[1:])


def _step(model, steps: int = 24) -> float:
    """Seconds per decode step, the best of some: what others do to the machine meanwhile must not be remembered."""
    model.prefill(torch.zeros(1, 4, dtype=torch.long))
    steps = min(steps, model.context - 4)
    found = []
    for _ in range(steps):
        start = time.perf_counter()
        model.decode(0)
        found.append(time.perf_counter() - start)
    model.rewind(0)
    return min(found, default=0.0)


def _version() -> str:
    import onnxruntime

    return onnxruntime.__version__


def _path() -> Path:
    return cache() / "engine-threads.json"


def _read() -> dict:
    """What was measured before; nothing when the file is missing or damaged, for it is quickly measured again."""
    try:
        known = json.loads(_path().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _write(known: dict) -> None:
    handle, temporary = tempfile.mkstemp(dir=_path().parent, suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(known, file, indent=1)
        os.replace(temporary, _path())
    except BaseException:
        os.unlink(temporary)
        raise
