"""N:M sparsity: of every M neighbouring weights of a row at most N are kept, so positions take a fixed, small number of bits.

2:4 is what NVIDIA's sparse tensor cores multiply by (Mishra et al., "Accelerating Sparse Deep Neural Networks",
arXiv:2104.08378, section 3). Two kept values of 16 bits and two positions of 2 bits for every four weights: 9 bits per
weight, as much as a bitmask takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from labkit.formats import pack, unpack
from labkit.linear.sparse import kernels
from labkit.linear.sparse.base import Decoded, Sparse, check


@dataclass
class NM(Sparse):
    """``values``: (out, groups · n). ``positions``: uint8, the place of each in its group, packed at ceil(log2 m) bits.

    Groups lie along the inputs. Where m does not divide them the last group is shorter: of its ``rest`` columns
    ceil(n · rest / m) may be kept. It takes as many bytes as a full one. A group with fewer than n weights that are not
    zero stores zeros at free places, those from the n-th on first. For 2:4 these are the places that torch and CUTLASS
    choose, and two groups make a byte as theirs do: the lower position in the lower bits, the first group in the low
    nibble. Their tensor has the same 16-bit words in an order made for the GPU's tiles.
    """

    name: ClassVar[str] = "nm"
    stored: ClassVar[tuple[str, ...]] = ("positions", "values")

    positions: torch.Tensor
    values: torch.Tensor
    shape: tuple[int, int]
    n: int
    m: int

    @property
    def bits(self) -> int:
        """Bits per position."""
        return (self.m - 1).bit_length()

    @classmethod
    def from_dense(cls, weight: torch.Tensor, n: int = 2, m: int = 4) -> NM:
        """Raises ValueError, naming the first row and group, for a weight that does not fit the pattern."""
        return cls.of(weight, check(weight) != 0, n, m)

    @classmethod
    def of(cls, matrix: torch.Tensor, kept: torch.Tensor, n: int, m: int) -> NM:
        """Those entries of a matrix of any dtype where ``kept`` (out, in) is true; they must fit the pattern."""
        _check_pattern(n, m)
        _check_fits(kept, n, m)
        short = -matrix.shape[1] % m
        positions, values = [], []
        for part, where in zip(matrix.split(512), kept.split(512)):
            groups = nn.functional.pad(part, (0, short)).view(len(part), -1, m)
            places = _places(nn.functional.pad(where, (0, short)).view(len(part), -1, m), n)  # (rows, groups, n)
            values.append(groups.gather(-1, places).flatten(1))
            positions.append(pack(places.to(torch.uint8).flatten(1), (m - 1).bit_length()))
        return cls(torch.cat(positions), torch.cat(values), tuple(matrix.shape), n, m)

    def spec(self) -> dict:
        return super().spec() | {"n": self.n, "m": self.m}

    @classmethod
    def restore(cls, spec: dict, tensors: dict[str, torch.Tensor]) -> NM:
        return cls(shape=tuple(spec["shape"]), n=spec["n"], m=spec["m"], **tensors)

    def decode(self) -> torch.Tensor:
        return self._spread(self.values)

    def kept(self) -> torch.Tensor:
        """bool (out, in): where a value is stored, the zeros that fill a group up among them."""
        return self._spread(torch.ones_like(self.values, dtype=torch.bool))

    def _spread(self, values: torch.Tensor) -> torch.Tensor:
        """Stored entries (out, groups · n) -> (out, in)."""
        rows, columns = self.shape
        groups = -(-columns // self.m)
        places = unpack(self.positions, self.bits, groups * self.n).view(rows, groups, self.n)
        dense = values.new_zeros(rows, groups, self.m)
        for part, at, stored in zip(dense.split(512), places.split(512), values.view(rows, groups, -1).split(512)):
            part.scatter_(-1, at.long(), stored)
        return dense.view(rows, -1)[:, :columns]

    def product(self) -> Decoded:
        """The Numba kernel on a CPU; 2:4 at 16 bits on the sparse tensor cores of a GPU; else dense at every call."""
        on_cpu, loops = self.values.device.type == "cpu", kernels.loops()
        if on_cpu and loops is not None:
            rows, stored = self.values.shape
            settings, starts = (self.bits, self.n, self.m), torch.arange(rows + 1) * stored
            width = self.m * (stored // self.n)
            return kernels.Product(loops.nm, settings, self.positions, self.values.view(-1), starts, self.shape, width)
        return _TensorCores(self) if self._fits_tensor_cores() else Decoded(self)

    def _fits_tensor_cores(self) -> bool:
        if self.values.device.type != "cuda" or (self.n, self.m) != (2, 4) or self.values.dtype == torch.float32:
            return False
        tiles = self.shape[0] % 32 == 0 and self.shape[1] % 64 == 0
        return tiles and torch.cuda.get_device_capability(self.values.device) >= (8, 0)


class _TensorCores(Decoded):
    """``torch.sparse.to_sparse_semi_structured`` on an Ampere GPU or a newer one. *Unverified*: nobody has run it yet."""

    def __init__(self, sparse: NM):
        self.matrix = torch.sparse.to_sparse_semi_structured(sparse.decode().contiguous())
        self.nbytes = sparse.nbytes  # the same values and positions once more, in the order of its tiles

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x.to(self.matrix.dtype), self.matrix)


def _places(kept: torch.Tensor, n: int) -> torch.Tensor:
    """Which n places of each group are stored, in rising order: bool (rows, groups, m) -> int64 (rows, groups, n)."""
    m = kept.shape[-1]
    around = (torch.arange(m, device=kept.device) - n) % m  # fillers: from the n-th place on, then from the first
    order = torch.where(kept, -1, around).to(torch.int16).argsort(dim=-1, stable=True)
    return order[..., :n].sort(-1).values


def _check_pattern(n: int, m: int) -> None:
    whole = all(isinstance(v, int) and not isinstance(v, bool) for v in (n, m))
    if not whole or not 1 <= n < m <= 256:
        raise ValueError(f"The pattern {n}:{m} is not allowed: N:M needs whole numbers with 1 ≤ N < M ≤ 256.")


def _check_fits(kept: torch.Tensor, n: int, m: int) -> None:
    columns = kept.shape[1]
    counts = nn.functional.pad(kept, (0, -columns % m)).view(len(kept), -1, m).sum(-1)  # (out, groups)
    allowed = torch.full_like(counts[0], n)
    if columns % m:
        allowed[-1] = -(-n * (columns % m) // m)
    wrong = counts > allowed
    if wrong.any():
        row, group = divmod(int(wrong.flatten().to(torch.uint8).argmax()), counts.shape[1])
        first, last = group * m, min(group * m + m, columns) - 1
        raise ValueError(
            f"The weight does not fit {n}:{m}: row {row}, group {group} (columns {first} to {last}) has "
            f"{int(counts[row, group])} weights that are not zero, and {int(allowed[group])} are allowed."
        )
