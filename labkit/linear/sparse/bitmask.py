"""One bit per weight says whether it is kept; the kept values follow one another, row after row.

At 16 bits and half of the weights kept that is 1 + 16 / 2 = 9 bits per weight, and 1 + 32 / 2 = 17 at 32 bits. Where a
row's values begin is not stored: it is the number of bits set before it, and counted when the product is first needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from labkit.formats import pack, unpack
from labkit.linear.sparse import kernels
from labkit.linear.sparse.base import Decoded, Sparse, check, pick, scatter


@dataclass
class Bitmask(Sparse):
    """``mask``: uint8 (out, ceil(in / 8)), the first column in the lowest bit. ``values``: (kept,)."""

    name: ClassVar[str] = "bitmask"
    stored: ClassVar[tuple[str, ...]] = ("mask", "values")

    mask: torch.Tensor
    values: torch.Tensor
    shape: tuple[int, int]

    @classmethod
    def from_dense(cls, weight: torch.Tensor) -> Bitmask:
        return cls.of(weight, check(weight) != 0)

    @classmethod
    def of(cls, matrix: torch.Tensor, kept: torch.Tensor) -> Bitmask:
        """Those entries of a matrix of any dtype where ``kept`` (out, in) is true."""
        return cls(pack(kept.to(torch.uint8), 1), pick(matrix, kept), tuple(matrix.shape))

    def kept(self) -> torch.Tensor:
        """bool (out, in): where a value is stored."""
        return unpack(self.mask, 1, self.shape[1]).bool()

    def decode(self) -> torch.Tensor:
        return scatter(self.values, self.kept())

    def product(self) -> Decoded:
        """The Numba kernel on a CPU where Numba is installed; without it the matrix is made dense at every call."""
        loops = kernels.loops()
        if loops is None or self.mask.device.type != "cpu":
            return Decoded(self)
        counts = torch.cat([unpack(m, 1, self.shape[1]).sum(1) for m in self.mask.split(1024)])
        starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        return kernels.Product(loops.bitmask, (), self.mask, self.values, starts, self.shape, self.shape[1])
