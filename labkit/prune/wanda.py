"""Wanda: weigh each weight by how large its input is, and drop the least in every row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from labkit.method import knob
from labkit.prune.allocate import ALLOCATION, allocated
from labkit.prune.common import Pruner, keep_mask, parse_pattern
from labkit.prune.repair import repaired
from labkit.prune.store import CONTAINER, stored
from labkit.walk import Stats, walk


@dataclass(frozen=True)
class Wanda(Pruner):
    """Set the weights with the smallest |w|·‖x‖ in each row to zero; x is the weight's input over the calibration.

    A small weight on a large input matters more than a large one on a small input. Rows are compared within
    themselves, since each of them is one output. Nothing else is changed, unless ``repair`` is on.
    """

    paper: ClassVar[str] = "Sun et al., Wanda, ICLR 2024, section 3 and algorithm 1"
    calibrated: ClassVar[bool] = True

    per: str = knob("row", choices=("row", "matrix"), help="Where weights compete to be kept; the paper's is the row.")
    allocation: str = ALLOCATION
    repair: bool = knob(False, help="Fit the kept weights again by least squares (not in the paper).")
    container: str = CONTAINER

    def apply(self, lm, calib, progress: bool) -> str | None:
        pattern = parse_pattern(self.pattern)
        sparsity = allocated(lm, calib, self, progress)

        def solve(weight: torch.Tensor, stats: Stats, path: str):
            mask = keep_mask(weight.abs() * stats.channel_norm, sparsity(path), pattern, self.per)
            weight = repaired(weight, mask, stats.hessian) if self.repair else weight * mask
            return stored(weight, self.pattern, self.container)

        statistic = "hessian" if self.repair else "channel_norm"
        return walk(lm, calib, statistic, solve, f"Wanda, {self.sparsity:.0%} zeros", progress)
