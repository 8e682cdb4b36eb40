"""What every container of a sparse matrix has, and three helpers that they share.

A weight that is zero is not stored, whether a method pruned it or it happened to be 0 (also -0.0, which comes back as
0): nothing that multiplies by it can tell. A kept weight that is exactly 0 is therefore dropped too.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS = 512  # rows that are looked at together: torch picks by a mask through several int64 copies of it


class Sparse:
    """One weight matrix (out, in) as it is stored, and a product with it.

    Subclasses are dataclasses with ``shape`` (out, in) and their tensors as fields; ``stored`` names those tensors.
    """

    name: ClassVar[str]
    stored: ClassVar[tuple[str, ...]]
    shape: tuple[int, int]

    def tensors(self) -> dict[str, torch.Tensor]:
        """The stored tensors by name, and nothing else is stored."""
        return {name: getattr(self, name) for name in self.stored}

    def spec(self) -> dict:
        """What :func:`labkit.linear.sparse.restore` needs beside the tensors; it goes through JSON unchanged."""
        return {"container": self.name, "shape": list(self.shape)}

    @classmethod
    def restore(cls, spec: dict, tensors: dict[str, torch.Tensor]) -> Sparse:
        """The inverse of :meth:`spec` and :meth:`tensors`."""
        return cls(shape=tuple(spec["shape"]), **tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight of the dense matrix: values, positions and all padding."""
        return 8 * self.nbytes / (self.shape[0] * self.shape[1])

    def decode(self) -> torch.Tensor:
        """The dense matrix, exactly: (out, in), in the dtype of its values."""
        raise NotImplementedError

    def product(self) -> Decoded:
        """A callable x (rows, in) -> x Wᵀ (rows, out) whose ``nbytes`` is what it holds beside the stored tensors.

        Here it makes the matrix dense at every call: correct, and slower than a dense matrix would be.
        """
        return Decoded(self)

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        """x Wᵀ for x (…, in) -> (…, out), in x's dtype."""
        y = self.product()(x.reshape(-1, self.shape[1]))
        return y.to(x.dtype).view(*x.shape[:-1], self.shape[0])


class Decoded:
    """The product of a container that no kernel multiplies by: make it dense, then multiply."""

    nbytes = 0

    def __init__(self, sparse: Sparse):
        self.sparse = sparse

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.sparse.decode().to(x.dtype))

    def __deepcopy__(self, memo) -> Decoded:
        return self  # it never changes


def check(weight: torch.Tensor) -> torch.Tensor:
    """The weight, or a ValueError: not a matrix, empty, of another dtype, or holding NaN or infinity."""
    if weight.ndim != 2 or not weight.numel():
        raise ValueError(f"A weight of shape {tuple(weight.shape)} cannot be stored: it must be a matrix (out, in).")
    if weight.dtype not in DTYPES:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise ValueError(f"A weight of dtype {weight.dtype} cannot be stored: it must be one of {allowed}.")
    bad = weight.numel() - int(torch.isfinite(weight).sum())
    if bad:
        raise ValueError(f"The weight holds {bad} NaN or infinite values: only finite numbers can be stored.")
    return weight.detach()


def pick(matrix: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The entries where ``mask`` (out, in) is true, row after row: (kept,). ``matrix`` may be a row for all, (1, in)."""
    rows = zip(matrix.expand_as(mask).split(ROWS), mask.split(ROWS))
    return torch.cat([torch.masked_select(m, kept) for m, kept in rows])


def scatter(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`pick`: (out, in), zero where the mask is false."""
    return values.new_zeros(mask.shape).masked_scatter_(mask, values)
