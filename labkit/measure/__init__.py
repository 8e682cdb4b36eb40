"""Accuracy, memory and latency of a model, as one Measurement."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from labkit import coverage, heap
from labkit.measure import memory, roofline, timing
from labkit.measure.alone import alone
from labkit.measure.busy import is_busy
from labkit.measure.latency import engine_latency
from labkit.measure.latency import latency as _latency
from labkit.measure.measurement import Latency, Measurement, Memory, Quality
from labkit.measure.quality import Divergence, divergence, perplexity, quality
from labkit.measure.reading import Reading
from labkit.method import brief, check_model, reason_of

__all__ = [
    "Divergence",
    "Latency",
    "Measurement",
    "Memory",
    "Quality",
    "divergence",
    "measure",
    "perplexity",
    "roofline",
    "timing",
]


def measure(
    lm,
    against=None,
    texts=("manual", "prose"),
    windows: int | None = None,
    length: int | None = None,
    latency: bool = True,
    progress: bool = True,
    engine: bool = True,
    prompt: int | None = None,
) -> Measurement:
    """Measure a model on this machine, now.

    ``against``: the uncompressed model, for KL, agreement and interleaved speed ratios. ``texts``: corpora or paths,
    each cut into ``windows`` of ``length`` tokens, of which those after the first ``prompt`` are scored: 8 of 512, all
    scored, or 4 of 1,024 with 512 as the prompt where ``lm`` is under methods for the KV cache (give these three when you
    measure the uncompressed model beside it, so that both are scored on the same tokens). ``latency=False`` leaves the
    timing out, and ``engine=False`` all that needs the compiled model (see :func:`labkit.compile`): its time, and the KL
    of what it computes. Both are left out, with a note, where a graph would not hold the weights packed. So is what cannot
    be timed or weighed of a model of another kind, such as one without attention.
    """
    check_model(lm)
    texts = (texts,) if isinstance(texts, (str, os.PathLike)) else texts
    if not isinstance(texts, (tuple, list)) or not texts or not all(isinstance(t, (str, os.PathLike)) for t in texts):
        raise ValueError(
            f"texts = {brief(texts)} is not allowed: it must be one or more corpora or paths of text files."
        )
    reading = Reading.of(lm, None, windows, length, prompt)
    found, hashes = {}, {}
    heap.trim()
    with alone(f"measuring {lm.name}"), memory.peak(lm.device) as peak:
        graph, notes = compiled(lm) if engine else (None, ())
        run = graph if hasattr(graph, "read") else None  # a CUDA graph replays the very modules that are read eagerly
        for name in texts:
            ids = reading.ids(lm, name)
            what = f"quality on {name}"
            found[str(name)] = quality(lm, ids, against, progress, what, reading.prompt, run)
            hashes[str(name)] = reading.fingerprint(ids)
        notes, eager, as_graph = list(notes), None, None
        with _or_a_note(notes, "Eager times are"):
            eager = _latency(lm, against) if latency else None
        with _or_a_note(notes, "Times as one graph are"):
            as_graph = _as_graph(lm, graph, against) if latency and graph is not None else None
        notes.extend(_on_times(eager, as_graph, graph))
        cached = tokens = 0
        with _or_a_note(notes, "The cache's bytes are"):
            cached, tokens = memory.kv_bytes(lm)
        if tokens and not cached:
            again = " Each decoded token is timed with the whole text read again." if eager else ""
            notes.append(f"{type(lm.model).__name__} hands back no cache, so that none is weighed.{again}")
    held = None if graph is None else graph.nbytes
    del graph, run
    heap.trim()
    return Measurement(
        model=lm.name,
        method=" -> ".join(lm.history) or "uncompressed",
        quality=found,
        memory=Memory(
            weights=lm.nbytes,
            linears=coverage.nbytes(lm),
            bits_per_weight=coverage.bits_per_weight(lm),
            kv_bytes=cached,
            kv_tokens=tokens,
            peak=peak.bytes,
            engine=held,
            compressed=lm.coverage.share,
            left=lm.coverage.left,
            bits_before=8 * (lm if against is None else against).model.dtype.itemsize,
        ),
        latency=eager,
        engine=as_graph,
        device=str(lm.device),
        notes=notes,
        texts=hashes,
    )


@contextmanager
def _or_a_note(notes: list[str], what: str) -> Iterator[None]:
    """Where something inside cannot be measured on this model, say so and go on: the rest was long in the making."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a family's own code makes of a call that others take
        why = f"{type(error).__name__}: {brief(reason_of(error))}"
        notes.append(f"{what} left out: this model cannot be measured so ({why}).")


def _on_times(eager: Latency | None, as_graph: Latency | None, graph) -> Iterator[str]:
    """What to know about the times, in sentences."""
    busy = max((t.busy or 0.0 for t in (eager, as_graph) if t), default=0.0)
    if is_busy(busy):
        yield f"Other programs took {coverage.percent(busy)} of the cores while it was timed: these times are not kept."
    if as_graph and (note := timing.cache_note(graph.nbytes, "weights of the graph")):
        yield note


def _as_graph(lm, graph, against):
    """Its latency in turns with the uncompressed model as a graph, on as many threads as are best for each."""
    baseline = None if against is None else compiled(against)[0]
    found = engine_latency(lm, graph, baseline)
    del baseline
    heap.trim()
    if lm.device.type == "cpu":
        from labkit.engine.threads import contradict

        contradict(graph, found.decode_ms / 1e3, found.context, is_busy(found.busy))
    return found


def compiled(lm, kv_bits: int | None = None) -> tuple[object | None, tuple[str, ...]]:
    """(The model as one graph, notes on it), or (None, why not).

    There is none for other families and devices and without onnxruntime; and none for weights that the graph's operators
    do not read packed, for it would be a dense fp32 graph under the method's name.
    """
    if lm.device.type not in ("cpu", "cuda"):
        return None, (f"There is no graph on {lm.device.type}.",)
    try:
        from labkit.engine import NotCompilable, compile
        from labkit.engine.weights import unpacked
    except ImportError as error:
        return None, (f"There is no graph without {error.name}.",)
    if lm.device.type == "cpu" and (dense := unpacked(memory.linear_layers(lm))):
        kinds = ", ".join(f"{count} linears of {kind}" for kind, count in dense.items())
        return None, (f"Not run as one graph: its operators would hold {kinds} as dense fp32.",)
    try:
        graph = compile(lm, kv_bits=kv_bits)
    except NotCompilable as error:
        return None, (str(error),)
    return graph, graph.notes
