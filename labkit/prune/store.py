"""How a pruned weight is kept: zeros that are not stored, or all of them."""

from __future__ import annotations

import torch
from torch import nn

from labkit.formats import Encoded, Integer, Params
from labkit.linear.sparse import CSR, SparseLinear, SparseQuantized, store
from labkit.method import knob
from labkit.prune.common import parse_pattern

CONTAINER = knob(
    "auto",
    choices=("auto", "csr", "dense"),
    help="auto: values and a bit for each position (N:M: a place in each group). csr: values and columns. dense: zeros too.",
)


def stored(weight: torch.Tensor, pattern: str, container: str) -> torch.Tensor | nn.Module:
    """What the walk puts in the place of a linear for a pruned weight (out, in)."""
    if container == "dense":
        return weight
    return SparseLinear(CSR.from_dense(weight) if container == "csr" else store(weight, pattern))


def stored_codes(
    weight: torch.Tensor, form: Integer, grid: Params, pattern: str, container: str
) -> Encoded | nn.Module:
    """The same for a weight (out, in) that lies on a grid. "dense" gives codes for zeros too, which a kernel can run on."""
    codes = form.quantize(form.groups(weight), grid).view(len(weight), -1)[:, : weight.shape[1]]
    if container == "dense":
        return form.assemble(codes, grid)
    return SparseLinear(SparseQuantized.assemble(codes, grid, form, parse_pattern(pattern)))
