"""Products on a CPU that pass over what is not stored: loops that Numba compiles, where it is installed (the extra `lab`)."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor

import torch

from labkit.linear.sparse.base import Decoded

SMALL = 1 << 18  # products that one thread has done before another is awake
PIECE = 256  # rows of 16-bit values that are widened at a time: few enough that they stay in the cache


@functools.cache
def loops():
    """The module with the compiled loops, or None without Numba. Imported when a product is first needed: it takes a second."""
    try:
        from numba import config
    except ImportError:
        return None
    before, config.SLP_VECTORIZE = config.SLP_VECTORIZE, 1  # eight neighbours are stored at once: a third of the time
    try:
        from labkit.linear.sparse import numba_loops
    finally:
        config.SLP_VECTORIZE = before
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
        x = x.detach().float()
        if self.width > x.shape[1]:
            x = torch.nn.functional.pad(x, (0, self.width - x.shape[1]))
        x, y = x.T.contiguous(), torch.empty(self.shape[0], x.shape[0])  # x: (in, rows)
        threads = torch.get_num_threads() if self.values.numel() * x.shape[1] > SMALL else 1
        step = PIECE if self.values.element_size() == 2 else -(-self.shape[0] // threads)
        run = functools.partial(self._piece, x.numpy(), y, step)
        mine, *others = (range(0, self.shape[0], step)[i::threads] for i in range(threads))
        waiting = [_pool(threads).submit(lambda own=own: [run(begin) for begin in own]) for own in others]
        for begin in mine:  # this thread is awake: another would have to be woken for its share
            run(begin)
        for other in waiting:
            other.result()
        return y.T.contiguous()  # as nn.Linear's is: Llama 4 reads neighbouring channels as complex numbers

    def _piece(self, x, y: torch.Tensor, step: int, begin: int) -> None:
        end = min(begin + step, self.shape[0])
        values = self.values[int(self.starts[begin]) : int(self.starts[end])].float()
        self.loop(*self.settings, self.positions[begin:end].numpy(), values.numpy(), x, y[begin:end].numpy())


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="sparse")
