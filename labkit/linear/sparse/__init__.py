"""Sparse weights as they are really stored, and products that pass over what is not there.

    small = store(weight, "2:4")          # or "unstructured", "4:8", …: the container that such a mask asks for
    small.bits_per_weight, small.decode(), small.matmul(x)
    SparseLinear(small, bias)             # a layer that a model runs, saves and loads

Positions cost bytes, and lookups cost time: whether zeros save anything is what the containers' ``nbytes`` and
``labkit.measure.sparse_speed`` are there to tell.
"""

from __future__ import annotations

import re

import torch

from labkit.linear.sparse.base import Sparse
from labkit.linear.sparse.bitmask import Bitmask
from labkit.linear.sparse.csr import CSR
from labkit.linear.sparse.dense import Dense
from labkit.linear.sparse.layer import SparseLinear
from labkit.linear.sparse.nm import NM
from labkit.linear.sparse.quantized import SparseQuantized

CONTAINERS = {cls.name: cls for cls in (Dense, Bitmask, CSR, NM, SparseQuantized)}


def restore(spec: dict, tensors: dict[str, torch.Tensor]) -> Sparse:
    """A container from its ``spec()`` and ``tensors()``."""
    return CONTAINERS[spec["container"]].restore(spec, tensors)


def store(weight: torch.Tensor, pattern: str = "unstructured") -> Sparse:
    """The smallest container for a pruned weight (out, in): a bitmask for "unstructured", NM for "N:M"."""
    if pattern == "unstructured":
        return Bitmask.from_dense(weight)
    found = re.fullmatch(r"(\d+):(\d+)", pattern) if isinstance(pattern, str) else None
    if not found:
        raise ValueError(f"pattern = {pattern!r} is not allowed: it must be 'unstructured' or like '2:4'.")
    return NM.from_dense(weight, int(found[1]), int(found[2]))


__all__ = [
    "CONTAINERS",
    "CSR",
    "NM",
    "Bitmask",
    "Dense",
    "Sparse",
    "SparseLinear",
    "SparseQuantized",
    "restore",
    "store",
]
