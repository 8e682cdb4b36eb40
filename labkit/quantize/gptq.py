"""GPTQ: round column by column, and let the columns still to come make up for each rounding error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from labkit.formats import Encoded, Format
from labkit.method import Method, knob
from labkit.quantize.awq import best_shares, clipped
from labkit.quantize.common import BITS, FORMAT, GROUP_SIZE, SYMMETRIC, format_of
from labkit.walk import Prepare, Stats, walk

BLOCK = 128  # columns whose updates to the rest of the matrix are made in one product


@dataclass(frozen=True)
class GPTQ(Method):
    """Round column by column; the columns still to come make up for each rounding error.

    The layer's inputs X say how: H = 2XXᵀ over the calibration is the Hessian of the squared output error. The error of
    column j, divided by the j-th diagonal entry of the upper Cholesky factor of H⁻¹, is taken from the later columns in
    proportion to that factor's row j.

    Algorithm 1 of the paper goes from left to right and fits a group's grid when the group comes: ``act_order=False``.
    The default goes by size of the inputs, with all grids fitted beforehand. Both came later, in the authors' repository
    (``--act-order``, and ``--static-groups`` in July 2023), and act-order is what the field has used since: AutoGPTQ's
    ``desc_act``, and the GPTQ-R of AWQ's table 4. For AWQ's scaling and clipping before it see :class:`AWQGPTQ`.
    """

    kind: ClassVar[str] = "quantize"
    paper: ClassVar[str] = "Frantar et al., GPTQ, ICLR 2023, section 3 and algorithm 1"
    calibrated: ClassVar[bool] = True
    lossless: ClassVar[dict] = {"bits": 8, "group_size": 32}
    lossless_kl: ClassVar[float] = 2e-3

    bits: int = BITS
    group_size: int | None = GROUP_SIZE
    symmetric: bool = SYMMETRIC
    format: str = FORMAT
    act_order: bool = knob(
        True,
        help="Round the columns with the largest inputs first, with each group's grid fitted beforehand (static groups). "
        "Off: the paper's algorithm 1, left to right, with each grid fitted when its group comes.",
    )
    damp: float = knob(
        0.01, low=0.0001, high=1.0, stops=(0.001, 0.01, 0.03, 0.1, 0.3), help="Share of H's mean diagonal added to it."
    )
    compensate: bool = knob(True, help="Off: no column makes up for another, which leaves plain rounding.")

    def apply(self, lm, calib, progress: bool) -> str | None:
        return compress(self, lm, calib, progress)


def compress(method: GPTQ, lm, calib, progress: bool, prepare: Prepare | None = None, clip: bool = False) -> str | None:
    """Round every linear of ``lm`` as the knobs of ``method`` say; ``prepare`` and ``clip`` as in ``walk`` and :func:`gptq`.

    Returns what the walk says.
    """
    form = format_of(method)

    def solve(weight: torch.Tensor, stats: Stats, path: str) -> Encoded:
        if not method.compensate:
            return clipped(weight, stats.gram, form) if clip else form.encode(weight)
        return gptq(weight, stats, form, method.act_order, method.damp, clip)

    return walk(lm, calib, "hessian", solve, f"{type(method).__name__} to {form.bits} bits", progress, prepare)


def gptq(
    weight: torch.Tensor,
    stats: Stats,
    form: Format,
    act_order: bool = True,
    damp: float = 0.01,
    clip: bool = False,
    watch: Callable[[int, torch.Tensor], None] | None = None,
) -> Encoded:
    """Encode a weight (out, in) whose inputs had these statistics.

    With ``act_order`` the groups' grids come from the weights as they were ("static groups"), since neighbours are no
    longer rounded together; without it each grid is fitted to the updated weights when its group's turn comes.

    ``watch(done, columns)`` is called after each column, for views of the algorithm: how many are done, and all columns
    (in, out) in their order, the first ``done`` of them rounded. (Columns beyond the block of ``BLOCK`` lag behind.)
    """
    columns, size = weight.shape[1], form.size(weight.shape[1])
    order, factor, dead = stats.cholesky(damp, act_order)
    weight = weight.masked_fill(dead, 0)  # inputs that are always zero: their weights do not matter
    groups = form.groups(weight)
    params = form.fit(groups, best_shares(groups, stats.gram, form) if clip else 1.0)
    grids = [form.slice(params, g) for g in range(-(-columns // size))]
    todo = weight[:, order].T.contiguous()  # (in, out): a column of the weight is one run of memory
    values = torch.empty_like(todo)
    group_of = (order // size).tolist()
    width = BLOCK if size % BLOCK == 0 else size * max(1, BLOCK // size)  # whole groups
    for start in range(0, columns, width):
        block, rows = todo[start : start + width], factor[start : start + width, start : start + width]
        errors = torch.empty_like(block)
        for j, diagonal in enumerate(rows.diagonal().tolist()):
            group = group_of[start + j]
            if not act_order and (start + j) % size == 0:
                now = todo[start + j : start + j + size].T
                grids[group] = form.fit(now[:, None], like=grids[group])
            value = form.round(block[j, :, None, None], grids[group]).view(-1)
            values[start + j] = value
            errors[j] = (block[j] - value) / diagonal
            block[j + 1 :].addr_(rows[j, j + 1 :], errors[j], alpha=-1)
            if watch:
                done = start + j + 1
                watch(done, torch.cat([values[:done], todo[done:]]))
        todo[start + width :].addmm_(factor[start : start + width, start + width :].T, errors, alpha=-1)
    back = torch.empty_like(weight)
    back[:, order] = values.T
    params = form.join(grids)
    codes = form.quantize(form.groups(back), params).view(len(weight), -1)[:, :columns]
    return form.assemble(codes, params)
