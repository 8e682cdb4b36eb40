"""Accuracy, memory and latency of a model, as one Measurement."""

from __future__ import annotations

import os

from labkit import heap, text
from labkit.measure import memory, roofline, timing
from labkit.measure.latency import latency as _latency
from labkit.measure.measurement import Latency, Measurement, Memory, Quality
from labkit.measure.quality import Divergence, divergence, perplexity, quality
from labkit.method import brief, check_model

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
    windows: int = 8,
    length: int = 512,
    latency: bool = True,
    progress: bool = True,
    engine: bool = True,
) -> Measurement:
    """Measure a model on this machine, now.

    ``against``: the uncompressed model, for KL, agreement and interleaved speed ratios. ``texts``: corpora or paths,
    each cut into ``windows`` of ``length`` tokens. ``latency=False`` leaves the timing out, and ``engine=False`` that of
    the compiled model (see :func:`labkit.compile`), which is also left out where there is none for this model.
    """
    check_model(lm)
    texts = (texts,) if isinstance(texts, (str, os.PathLike)) else texts
    if not isinstance(texts, (tuple, list)) or not texts or not all(isinstance(t, (str, os.PathLike)) for t in texts):
        raise ValueError(
            f"texts = {brief(texts)} is not allowed: it must be one or more corpora or paths of text files."
        )
    found, hashes = {}, {}
    heap.trim()
    with memory.peak(lm.device) as peak:
        for name in texts:
            ids = text.evaluation(lm, windows, length, name)
            found[str(name)] = quality(lm, ids, against, progress, f"quality on {name}")
            hashes[str(name)] = text.fingerprint(ids)
        graph = compiled(lm) if latency and engine else None
        eager, as_graph = _latency(lm, against, graph) if latency else (None, None)
    return Measurement(
        model=lm.name,
        method=" -> ".join(lm.history) or "uncompressed",
        quality=found,
        memory=Memory(
            weights=lm.nbytes,
            linears=sum(memory.held(m) for m in memory.linear_layers(lm)),
            bits_per_weight=memory.bits_per_weight(lm),
            kv_per_token=memory.kv_per_token(lm),
            peak=peak.bytes,
            engine=None if graph is None else graph.nbytes,
        ),
        latency=eager,
        engine=as_graph,
        device=str(lm.device),
        texts=hashes,
    )


def compiled(lm, kv_bits: int | None = None):
    """The model as one graph, or None where it cannot be one: another family, another device, no onnxruntime."""
    if lm.device.type not in ("cpu", "cuda"):
        return None
    try:
        from labkit.engine import NotCompilable, compile
    except ImportError:
        return None
    try:
        return compile(lm, kv_bits=kv_bits)
    except NotCompilable:
        return None
