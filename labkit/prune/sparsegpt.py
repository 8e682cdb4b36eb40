"""SparseGPT: drop weights column by column, and let the columns still to come make up for each of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from labkit.formats import Integer
from labkit.method import knob
from labkit.prune.allocate import ALLOCATION, allocated
from labkit.prune.common import Pruner, keep_mask, nm_mask, parse_pattern
from labkit.prune.repair import repaired
from labkit.prune.store import CONTAINER, stored, stored_codes
from labkit.walk import Stats, walk

BLOCK = 128  # columns that share one choice of what is dropped


@dataclass(frozen=True)
class SparseGPT(Pruner):
    """Drop the weights whose loss the others can make up for best, and update the others.

    As in GPTQ, U is the upper Cholesky factor of H⁻¹. A weight's price is w²/U_jj²: the output error that is left when
    it is dropped and all later columns are adjusted. The cheapest of each 128 columns go (or M - N of each M
    neighbours), then those columns are taken in order: the error of a dropped weight is spread over the later ones. With
    ``bits`` the weights that stay are rounded in the same sweep.
    """

    paper: ClassVar[str] = "Frantar and Alistarh, SparseGPT, ICML 2023, section 3 and algorithm 1"
    calibrated: ClassVar[bool] = True

    bits: int | None = knob(
        None,
        low=2,
        high=8,
        stops=(None, 3, 4, 8),
        none="they stay as they are",
        help="Round what is kept to so many bits.",
    )
    group_size: int = knob(64, low=8, high=65536, stops=(32, 64, 128), help="Columns that share a scale, with bits.")
    damp: float = knob(
        0.01, low=0.0001, high=1.0, stops=(0.001, 0.01, 0.03, 0.1, 0.3), help="Share of H's mean diagonal added to it."
    )
    compensate: bool = knob(True, help="Off: the same choice of weights, but none makes up for another.")
    allocation: str = ALLOCATION
    repair: bool = knob(False, help="Then fit the kept weights again by least squares (not in the paper).")
    container: str = CONTAINER

    def __post_init__(self):
        super().__post_init__()
        if self.bits and self.container == "csr":
            raise ValueError(
                "SparseGPT.container = 'csr' is not allowed with bits: codes are stored with a mask, or densely."
            )
        if self.bits and self.repair:
            raise ValueError(
                "SparseGPT.repair = True is not allowed with bits: what is rounded cannot be fitted again."
            )

    def apply(self, lm, calib, progress: bool) -> str | None:
        pattern = parse_pattern(self.pattern)
        form = Integer(self.bits, self.group_size) if self.bits else None
        sparsity = allocated(lm, calib, self, progress)

        def solve(weight: torch.Tensor, stats: Stats, path: str):
            pruned, mask, grid = sparsegpt(weight, stats, sparsity(path), pattern, self.damp, form, self.compensate)
            if form:
                return stored_codes(pruned, form, grid, self.pattern, self.container)
            return stored(
                repaired(weight, mask, stats.hessian) if self.repair else pruned, self.pattern, self.container
            )

        return walk(lm, calib, "hessian", solve, f"SparseGPT, {self.sparsity:.0%} zeros", progress)


def sparsegpt(
    weight: torch.Tensor,
    stats: Stats,
    sparsity: float,
    pattern: tuple[int, int] | None = None,
    damp: float = 0.01,
    form: Integer | None = None,
    compensate: bool = True,
    watch: Callable[[int, torch.Tensor, torch.Tensor], None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, object]:
    """(the pruned weight, the mask of what is kept, the grids of ``form`` or None), from a weight (out, in).

    ``form`` rounds what is kept; each group's grid is fitted when its first column comes. ``watch(done, columns, keep)``
    is called after each block of columns, for views: how many are done, all columns (in, out) as they are now, and
    what is kept of them so far (in, out).
    """
    columns = weight.shape[1]
    _, factor, dead = stats.cholesky(damp, act_order=False)
    todo = weight.masked_fill(dead, 0).T.contiguous()  # (in, out): a column of the weight is one run of memory
    keep = torch.ones_like(todo, dtype=torch.bool)
    prices = factor.diagonal().square()[:, None]
    width, grids = _width(pattern, form, columns), []
    for start in range(0, columns, width):
        stop = min(start + width, columns)
        block, u, kept = todo[start:stop], factor[start:stop, start:stop], keep[start:stop]
        if not pattern:
            scores = block.square() / prices[start:stop]
            kept[:] = keep_mask(scores, sparsity, None, "matrix")
        errors = torch.zeros_like(block)
        for j, diagonal in enumerate(u.diagonal().tolist()):
            if pattern and j % pattern[1] == 0:  # the M columns that come now, as they have become
                near = slice(j, j + pattern[1])
                scores = block[near].square() / prices[start:stop][near]
                kept[near] = nm_mask(scores.T, *pattern).T
            if form and j % form.size(columns) == 0:
                near = slice(j, j + form.size(columns))
                grids.append(form.fit((block[near] * kept[near]).T[:, None]))
            value = block[j] * kept[j]
            if form:
                value = form.round(value[:, None, None], grids[-1]).view(-1) * kept[j]
            if compensate:
                errors[j] = (block[j] - value) / diagonal
                block[j + 1 :].addr_(u[j, j + 1 :], errors[j], alpha=-1)
            block[j] = value
        todo[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
        if watch:
            watch(stop, todo, keep)
    return todo.T.contiguous(), keep.T.contiguous(), form.join(grids) if form else None


def _width(pattern: tuple[int, int] | None, form: Integer | None, columns: int) -> int:
    """Columns of a block: about 128, with whole groups of both kinds."""
    least = math.lcm(pattern[1] if pattern else 1, form.size(columns) if form else 1)
    return least * max(1, round(BLOCK / least))
