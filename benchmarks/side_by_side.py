"""A method of labkit beside a plain port of the paper's procedure: what bench_gptq and bench_prune measure."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

from report import Row

import labkit
from labkit import heap
from labkit.measure import memory

FASTER = 0.65  # the share of the port's time that labkit may take


def side_by_side(lm, ways: dict[str, Callable], quick: bool) -> list[Row]:
    """Rows of time, peak memory and KL on both texts for {name: make}, the port first, then labkit."""
    port, ours = ways
    texts = {t: labkit.text.evaluation(lm, 2 if quick else 8, 512, t) for t in ("manual", "prose")}
    seconds, peaks, kl = {n: [] for n in ways}, {}, {}
    for turn in range(1 if quick else 2):  # A B B A
        for name in list(ways) if turn % 2 == 0 else list(ways)[::-1]:
            gc.collect()
            heap.trim()
            before, start = memory.resident(), time.perf_counter()
            with memory.peak(lm.device) as peak:
                small = ways[name]()
            seconds[name].append(time.perf_counter() - start)
            peaks[name] = peak.bytes - before
            if name not in kl:
                kl[name] = {t: labkit.divergence(small, lm, ids).kl for t, ids in texts.items()}
            del small
    rows = []
    for name in ways:
        mean = sum(seconds[name]) / len(seconds[name])
        share = mean / (sum(seconds[port]) / len(seconds[port]))
        wanted = {"target": f"at most {FASTER}x", "ok": share <= FASTER} if name == ours else {}
        rows.append(Row(f"time, {name}", mean, "s", port, share, **wanted))
        share = peaks[name] / peaks[port]
        wanted = {"target": "no more than the port", "ok": share <= 1.05} if name == ours else {}
        rows.append(Row(f"peak memory above the model, {name}", peaks[name] / 1e6, "MB", port, share, **wanted))
        for text in texts:
            share = kl[name][text] / kl[port][text]
            wanted = {"target": "equal within 5 %, or lower", "ok": share <= 1.05} if name == ours else {}
            rows.append(Row(f"KL on {text}, {name}", kl[name][text], "nats per token", port, share, **wanted))
    return rows
