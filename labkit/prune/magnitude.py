"""Magnitude pruning: the smallest weights become zero, whatever their inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from labkit.method import knob
from labkit.prune.common import Pruner, keep_mask, parse_pattern
from labkit.prune.store import CONTAINER, stored
from labkit.walk import Stats, walk


@dataclass(frozen=True)
class Magnitude(Pruner):
    """Set the weights with the smallest |w| to zero, in each matrix or in each row."""

    paper: ClassVar[str] = "Han et al., Learning both Weights and Connections, NeurIPS 2015, section 3"

    per: str = knob("matrix", choices=("matrix", "row"), help="Where weights compete to be kept.")
    container: str = CONTAINER

    def apply(self, lm, calib, progress: bool) -> None:
        pattern = parse_pattern(self.pattern)

        def solve(weight: torch.Tensor, stats: Stats, path: str):
            mask = keep_mask(weight.abs(), self.sparsity, pattern, self.per)
            return stored(weight * mask, self.pattern, self.container)

        walk(lm, calib, "none", solve, f"magnitude, {self.sparsity:.0%} zeros", progress)
