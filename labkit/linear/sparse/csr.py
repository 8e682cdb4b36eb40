"""Compressed sparse rows: the kept values, the column of each, and where every row begins.

A column takes 32 bits whatever a value takes. At 16 bits a kept weight costs 48, so below two thirds of zeros the matrix
has grown; at 32 bits it costs 64, and half of them must go before anything is saved.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar

import torch

from labkit.linear.sparse.base import Decoded, Sparse, check, pick


@dataclass
class CSR(Sparse):
    """torch's ``sparse_csr``. ``starts``: int32 (out + 1,). ``columns``: int32 (kept,). ``values``: (kept,)."""

    name: ClassVar[str] = "csr"
    stored: ClassVar[tuple[str, ...]] = ("starts", "columns", "values")

    starts: torch.Tensor
    columns: torch.Tensor
    values: torch.Tensor
    shape: tuple[int, int]

    @classmethod
    def from_dense(cls, weight: torch.Tensor) -> CSR:
        mask = check(weight) != 0
        starts = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).to(torch.int32)
        columns = torch.arange(weight.shape[1], dtype=torch.int32, device=weight.device)
        return cls(starts, pick(columns[None], mask), pick(weight, mask), tuple(weight.shape))

    def decode(self) -> torch.Tensor:
        counts = self.starts.diff().long()
        rows = torch.arange(self.shape[0], device=counts.device).repeat_interleave(counts)
        dense = self.values.new_zeros(self.shape)
        dense[rows, self.columns.long()] = self.values
        return dense

    def product(self) -> Decoded:
        """torch's own: MKL on x86 CPUs, which multiplies in fp32; cuSPARSE on NVIDIA GPUs (*unverified*)."""
        return _Product(self)


class _Product(Decoded):
    def __init__(self, sparse: CSR):
        values, on_cpu = sparse.values, sparse.values.device.type == "cpu"
        if on_cpu and values.dtype != torch.float32:
            values = values.float()  # MKL has no 16-bit product; the copy is counted
            self.nbytes = 4 * values.numel()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            self.matrix = torch.sparse_csr_tensor(
                sparse.starts, sparse.columns, values, sparse.shape, check_invariants=False
            )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.matrix.dtype)
        return (self.matrix @ x[0])[None] if len(x) == 1 else (self.matrix @ x.T).T
