"""Magnitude pruning: the smallest weights become zero, whatever their inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from labkit.method import Method, knob
from labkit.prune.common import PATTERN, SPARSITY, check_pattern, keep_mask, parse_pattern
from labkit.prune.store import CONTAINER, stored
from labkit.walk import Stats, walk


@dataclass(frozen=True)
class Magnitude(Method):
    """Set the weights with the smallest |w| to zero, in each matrix or in each row."""

    kind: ClassVar[str] = "prune"
    paper: ClassVar[str] = "Han et al., Learning both Weights and Connections, NeurIPS 2015, section 3"
    lossless: ClassVar[dict] = {"sparsity": 0.0}
    lossless_kl: ClassVar[float] = 1e-6

    sparsity: float = SPARSITY
    pattern: str = PATTERN
    per: str = knob("matrix", choices=("matrix", "row"), help="Where weights compete to be kept.")
    container: str = CONTAINER

    def __post_init__(self):
        super().__post_init__()
        check_pattern(self)

    def apply(self, lm, calib, progress: bool) -> None:
        pattern = parse_pattern(self.pattern)

        def solve(weight: torch.Tensor, stats: Stats, path: str):
            mask = keep_mask(weight.abs(), self.sparsity, pattern, self.per)
            return stored(weight * mask, self.pattern, self.container)

        walk(lm, calib, "none", solve, f"magnitude, {self.sparsity:.0%} zeros", progress)
