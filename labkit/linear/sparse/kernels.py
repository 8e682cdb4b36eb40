"""Products on a CPU that pass over what is not stored: loops that Numba compiles, where it is installed (labkit[lab])."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor

import torch

from labkit.linear.sparse.base import Decoded

PIECE = 256  # rows of 16-bit values that are widened at a time: few enough that they stay in the cache


@functools.cache
def loops():
    """The module with the compiled loops, or None without Numba. Imported when a product is first needed: it takes a second."""
    try:
        from labkit.linear.sparse import numba_loops
    except ImportError:
        return None
    return numba_loops


class Product(Decoded):
    """One matrix, ready to multiply on a CPU: ``product(x)`` for x (rows, in) gives (rows, out), computed in fp32.

    ``loop(*settings, positions, values, x, y)`` multiplies some rows of the matrix. ``starts``: int64 (out + 1,), where
    each row's values begin. Rows are shared out over torch's number of threads, and the loops let go of Python's lock.
    """

    def __init__(self, loop, settings: tuple, positions, values, starts, shape: tuple[int, int], width: int):
        """``width``: the columns that positions may name; those past the matrix's own are stored as zeros."""
        self.loop, self.settings = loop, settings
        self.positions, self.values, self.starts = positions, values, starts
        self.shape, self.width = shape, width
        self.nbytes = starts.numel() * starts.element_size()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.pad(x.detach().float(), (0, self.width - self.shape[1])).T.contiguous()  # (in, rows)
        y = torch.empty(self.shape[0], x.shape[1])
        threads = torch.get_num_threads()
        step = PIECE if self.values.element_size() == 2 else -(-self.shape[0] // threads)
        run = functools.partial(self._piece, x.numpy(), y, step)
        begins = range(0, self.shape[0], step)
        list(map(run, begins) if threads == 1 or len(begins) == 1 else _pool(threads).map(run, begins))
        return y.T

    def _piece(self, x, y: torch.Tensor, step: int, begin: int) -> None:
        end = min(begin + step, self.shape[0])
        values = self.values[int(self.starts[begin]) : int(self.starts[end])].float()
        self.loop(*self.settings, self.positions[begin:end].numpy(), values.numpy(), x, y[begin:end].numpy())


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="sparse")
