"""Does a cache of fewer bits make a step faster? It does where the kernel itself reads the codes: the engine's cache.

found = compare(lm, contexts=(16, 512, 1024))  # one graph with an fp32 cache, one with 8-bit codes, in turns
table(found)
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from labkit import engine, heap, text
from labkit.measure import timing
from labkit.measure.latency import engine_decode_run, engine_prefill_run
from labkit.measure.quality import token_kl
from labkit.ui import words
from labkit.ui.table import Table

STEPS = 8  # decoded in a row, per sample
KL_TOKENS = 256  # logits of more would take more memory than the models
SLICE = 32  # of them compared at once


@dataclass(frozen=True)
class Found:
    """One context: seconds of a decode step and of a prompt, and bytes of the cache, each (fp32, codes); all measured."""

    context: int
    decode: tuple[float, float]
    prefill: tuple[float, float]
    nbytes: tuple[int, int]
    kl: float  # nats per token, of the codes' logits from fp32's, over at most KL_TOKENS of the prose


def compare(lm, contexts: Sequence[int] = (16, 512, 1024), kv_bits: int = 8, rounds: int = 7) -> list[Found]:
    """``lm`` as one graph with an fp32 cache and with codes of ``kv_bits``, timed in turns at each context (tokens).

    Of a model that has no single graph, nothing; a warning says why.
    """
    try:
        found = _measured(lm, contexts, kv_bits, rounds)
    except engine.NotCompilable as error:
        warnings.warn(str(error), stacklevel=2)
        return []
    heap.trim()  # the two graphs were here
    return found


def _measured(lm, contexts: Sequence[int], kv_bits: int, rounds: int) -> list[Found]:
    room = max(contexts) + STEPS
    graphs = [engine.compile(lm, context=room, kv_bits=bits) for bits in (None, kv_bits)]
    ids = text.evaluation(lm, windows=1, length=min(max(contexts), KL_TOKENS), source="prose")
    found = []
    for context in contexts:
        two = lambda run, *more: {str(i): run(g, lm, context, *more) for i, g in enumerate(graphs)}  # noqa: B023, E731
        steps = timing.compare(two(engine_decode_run, STEPS), rounds=rounds, warmup=1, min_seconds=0).timings
        reads = timing.compare(two(engine_prefill_run), rounds=3, warmup=1, min_seconds=0).timings
        plain, codes = (g.logits(ids[:, :context])[0] for g in graphs)
        found.append(
            Found(
                context,
                tuple(t.median / STEPS for t in steps.values()),
                tuple(t.median for t in reads.values()),
                tuple(g.kv_nbytes * context // g.context for g in graphs),
                _kl(plain, codes),
            )
        )
    return found


def _kl(plain: torch.Tensor, codes: torch.Tensor) -> float:
    """Mean divergence of logits (tokens, vocabulary) from others, some tokens at a time."""
    pairs = zip(plain.split(SLICE), codes.split(SLICE))
    return float(torch.cat([token_kl(p.log_softmax(-1), q.log_softmax(-1)) for p, q in pairs]).mean())


def table(found: Sequence[Found]) -> Table:
    """A row for each context: bytes, a step's and a prompt's milliseconds, as fp32 → as codes, and the damage."""
    arrow = lambda pair, unit: " → ".join(words.short(x * unit) for x in pair)  # noqa: E731
    rows = [
        (
            f"{f.context:,}",
            arrow(f.nbytes, 1e-6),
            arrow(f.decode, 1e3),
            words.ratio(f.decode[0] / f.decode[1]),
            arrow(f.prefill, 1e3),
            words.short(f.kl),
        )
        for f in found
    ]
    head = ("tokens", "cache, MB", "one step, ms", "step faster", "prompt, ms", "KL, nats per token")
    return Table(head, tuple(rows), "One graph: a cache of fp32 → of codes that its attention reads (measured)")
