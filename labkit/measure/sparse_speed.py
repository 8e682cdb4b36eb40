"""From which sparsity on do zeros save time? The same product from every container, against the share of zeros.

    rows = time_against_sparsity((4096, 4096), batch=1)
    crossover(rows, "bitmask")                              # the sparsity from which on it beats dense, or None

The weights are random, and so are the places of the zeros: what matters here is how many there are. Accuracy is another
matter. All contestants multiply fp32 inputs; caches are flushed before every sample, for in a model each layer's weights
come from memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import torch

from labkit.formats import Integer
from labkit.linear import PackedLinear
from labkit.linear.sparse import CSR, NM, Bitmask, Dense, Sparse, kernels
from labkit.measure import timing
from labkit.method import brief

SPARSITIES = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
BASELINE = "dense"


@dataclass(frozen=True)
class SpeedRow:
    """One way of storing a matrix of one sparsity, and what multiplying by it took. ``ratio`` above 1 is faster than dense."""

    name: str
    sparsity: float
    seconds: float  # median of one product
    ratio: float  # dense time / own time, paired
    spread: tuple[float, float]  # quartiles of that ratio
    nbytes: int
    bits_per_weight: float


def time_against_sparsity(
    shape: tuple[int, int],
    batch: int = 1,
    sparsities=SPARSITIES,
    rounds: int = 11,
    min_seconds: float = 0.2,
    seed: int = 0,
    flush: bool = True,
) -> list[SpeedRow]:
    """Time x Wᵀ for W of ``shape`` (out, in) and x (batch, in) from each container, at each sparsity, on this CPU.

    Contestants: "dense" fp32 with its zeros; "csr"; "bitmask", where Numba is installed; "N:M" at the smallest N:M of that
    sparsity (2:4 for one half); and "4-bit", all weights as packed codes in groups of 64, which no zero makes faster.
    They take turns, each from cold caches; ``flush=False`` leaves them warm, which saves the memory that empties them
    (twice the last-level cache). Raises ValueError for a sparsity that is not a whole percentage from 0 up to less than 1.
    """
    patterns = {sparsity: pattern_of(sparsity) for sparsity in sparsities}
    draw = torch.Generator().manual_seed(seed)
    weight, x = torch.randn(shape, generator=draw), torch.randn(batch, shape[1], generator=draw)
    packed, rows = PackedLinear(Integer(4, 64).encode(weight)), []
    for sparsity, pattern in patterns.items():
        sparse = scattered(weight, sparsity, draw)
        containers: dict[str, Sparse] = {BASELINE: Dense.from_dense(sparse), "csr": CSR.from_dense(sparse)}
        if kernels.loops():
            containers["bitmask"] = Bitmask.from_dense(sparse)
            if pattern:
                containers["N:M"] = NM.from_dense(grouped(weight, *pattern, draw), *pattern)
        products: dict[str, Callable] = {name: c.product() for name, c in containers.items()} | {"4-bit": packed}
        sizes = {name: c.nbytes for name, c in containers.items()} | {"4-bit": packed.stored_nbytes}
        with torch.inference_mode():
            calls = {name: lambda p=p, x=x: p(x) for name, p in products.items()}
            timed = timing.compare(
                calls, baseline=BASELINE, rounds=rounds, warmup=2, device="cpu", flush=flush, min_seconds=min_seconds
            )
        for name, t in timed.timings.items():
            bits = 8 * sizes[name] / weight.numel()
            rows.append(SpeedRow(name, sparsity, t.median, timed.ratio[name], timed.spread[name], sizes[name], bits))
    return rows


def crossover(rows: list[SpeedRow], name: str) -> float | None:
    """The lowest measured sparsity from which on ``name`` is faster than dense; None when it never is."""
    found = None
    for row in sorted((r for r in rows if r.name == name), key=lambda r: -r.sparsity):
        if row.ratio <= 1:
            break
        found = row.sparsity
    return found


def pattern_of(sparsity: float) -> tuple[int, int] | None:
    """The smallest N:M with that share of zeros, 2:4 for one half; None where nothing is zero."""
    real = isinstance(sparsity, (int, float)) and not isinstance(sparsity, bool)
    percent = 100 * sparsity if real else -1
    if not 0 <= percent < 100 or abs(percent - round(percent)) > 1e-6:
        shown = brief(sparsity)
        raise ValueError(f"sparsity = {shown} is not allowed: it must be 0, 0.01, … 0.99, a whole percentage.")
    if round(percent) == 50:
        return 2, 4
    kept = Fraction(100 - round(percent), 100)
    return None if kept == 1 else (kept.numerator, kept.denominator)


def scattered(weight: torch.Tensor, sparsity: float, draw: torch.Generator) -> torch.Tensor:
    """The weight with that share of each row zeroed, at random places."""
    zeros = round(sparsity * weight.shape[1])
    order = torch.rand(weight.shape, generator=draw).argsort(1)[:, :zeros]
    return weight.scatter(1, order, 0.0)


def grouped(weight: torch.Tensor, n: int, m: int, draw: torch.Generator) -> torch.Tensor:
    """The weight with n of every m neighbours kept, at random places; of a shorter last group ceil(n · rest / m)."""
    short = -weight.shape[1] % m
    chance = torch.nn.functional.pad(torch.rand(weight.shape, generator=draw), (0, short), value=-1.0)
    rank = chance.view(len(weight), -1, m).argsort(-1, descending=True).argsort(-1)
    allowed = torch.full((rank.shape[1], 1), n)
    if short:
        allowed[-1] = -(-n * (m - short) // m)
    return weight * (rank < allowed).view(len(weight), -1)[:, : weight.shape[1]]
