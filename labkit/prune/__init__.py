"""Pruners: methods that set weights to zero."""

from labkit.prune.magnitude import Magnitude
from labkit.prune.sparsegpt import SparseGPT
from labkit.prune.wanda import Wanda

__all__ = ["Magnitude", "SparseGPT", "Wanda"]
