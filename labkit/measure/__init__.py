"""Accuracy, memory and latency of a model, as one Measurement."""

from __future__ import annotations

from labkit import text
from labkit.measure import memory, roofline, timing
from labkit.measure.latency import latency as _latency
from labkit.measure.measurement import Latency, Measurement, Memory, Quality
from labkit.measure.quality import Divergence, divergence, perplexity, quality

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
) -> Measurement:
    """Measure a model on this machine, now.

    ``against``: the uncompressed model, for KL, agreement and interleaved speed ratios. ``texts``: corpora or paths,
    each cut into ``windows`` of ``length`` tokens. ``latency=False`` leaves the timing out.
    """
    found, hashes = {}, {}
    with memory.peak(lm.device) as peak:
        for name in texts:
            ids = text.evaluation(lm, windows, length, name)
            found[str(name)] = quality(lm, ids, against, progress, f"quality on {name}")
            hashes[str(name)] = text.fingerprint(ids)
        timed = _latency(lm, against) if latency else None
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
        ),
        latency=timed,
        device=str(lm.device),
        texts=hashes,
    )
