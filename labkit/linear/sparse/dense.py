"""A pruned matrix as most software holds it: dense, with zeros in it. Nothing is saved; everything else is held against it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from labkit.linear.sparse.base import Sparse, check


@dataclass
class Dense(Sparse):
    """``values``: (out, in)."""

    name: ClassVar[str] = "dense"
    stored: ClassVar[tuple[str, ...]] = ("values",)

    values: torch.Tensor
    shape: tuple[int, int]

    @classmethod
    def from_dense(cls, weight: torch.Tensor) -> Dense:
        return cls(check(weight), tuple(weight.shape))

    def decode(self) -> torch.Tensor:
        return self.values
