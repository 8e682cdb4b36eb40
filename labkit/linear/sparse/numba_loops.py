"""The loops themselves, compiled by Numba at their first call and kept on disk for the next process.

Each row goes in two steps. First its positions become a list of column numbers, with the same steps for a weight that is
kept and one that is not: a processor cannot guess a random mask, and a wrong guess costs it more than the step. Then the
kept values are multiplied by the inputs at those columns. A dense product reads its inputs in order, eight or sixteen at a
time; here positions are unpacked and each input looked up, and so half of the products do not take half of the time.
"""

from __future__ import annotations

import numpy as np
from numba import njit

# Sums may be reordered, so that they fill the vector registers; NaN and infinity stay what they are.
FAST = {"reassoc", "contract", "nsz"}

# Indices are unsigned: a signed one may count from the end, and would be tested for that at every access.
ONE, EIGHT, FOUR = np.uint64(1), np.uint64(8), np.uint64(4)
QUARTERS = np.array([[byte >> shift & 3 for shift in (0, 2, 4, 6)] for byte in range(256)], np.uint32)  # (256, 4)


@njit(nogil=True, cache=True, fastmath=FAST)
def row_product(values, columns, x, y):
    """y[b] = Σ_k values[k] · x[columns[k], b]."""
    batch = x.shape[1]
    if batch == 1:
        flat, total = x.reshape(-1), np.float32(0)
        for k in range(values.size):
            total += values[k] * flat[columns[k]]
        y[0] = total
        return
    y[:] = 0
    last = values.size - values.size % 4
    for k in range(0, last, 4):  # four weights for each time that y is read and written
        a, b, c, d = x[columns[k]], x[columns[k + 1]], x[columns[k + 2]], x[columns[k + 3]]
        p, q, r, s = values[k], values[k + 1], values[k + 2], values[k + 3]
        for i in range(batch):
            y[i] += p * a[i] + q * b[i] + r * c[i] + s * d[i]
    for k in range(last, values.size):
        a, p = x[columns[k]], values[k]
        for i in range(batch):
            y[i] += p * a[i]


@njit(nogil=True, cache=True)
def set_bits(mask, columns):
    """Write the columns of one row's set bits, and return how many they are."""
    kept = np.uint64(0)
    for byte in range(np.uint64(mask.size)):
        bits = np.uint64(mask[byte])
        if bits == 0:  # all eight are gone: common where few are kept, and never seen where many are
            continue
        for k in range(EIGHT):
            columns[kept] = EIGHT * byte + k  # the next column overwrites it, unless its bit is set
            kept += (bits >> k) & ONE
    return kept


@njit(nogil=True, cache=True, fastmath=FAST)
def bitmask(mask, values, x, y):
    """Rows of a bitmask: mask uint8 (rows, bytes), their values fp32 one after the other, x (in, batch), y (rows, batch)."""
    columns = np.empty(8 * mask.shape[1] + 1, np.uint32)
    begin = 0
    for row in range(mask.shape[0]):
        end = begin + np.int64(set_bits(mask[row], columns))
        row_product(values[begin:end], columns, x, y[row])
        begin = end


@njit(nogil=True, cache=True)
def places(bits, packed, firsts, columns):
    """Write the columns of one row's values: each is its group's first column and its place, of ``bits`` bits, in it."""
    if bits == 2:  # four to a byte, as in 2:4
        for byte in range(np.uint64(packed.size)):
            for k in range(FOUR):
                columns[FOUR * byte + k] = QUARTERS[packed[byte], k] + firsts[FOUR * byte + k]
        return
    last, below = packed.size - 1, (1 << bits) - 1
    for k in range(columns.size):
        byte, shift = k * bits >> 3, k * bits & 7
        if byte <= last:
            word = np.int64(packed[byte]) | np.int64(packed[min(byte + 1, last)]) << 8
            columns[k] = firsts[k] + ((word >> shift) & below)


@njit(nogil=True, cache=True, fastmath=FAST)
def nm(bits, n, m, positions, values, x, y):
    """Rows of an N:M matrix: positions uint8 (rows, bytes) at ``bits`` each; the rest as for a bitmask."""
    kept = values.size // positions.shape[0]
    room = kept + 4  # the last byte may be half full
    firsts, columns = np.empty(room, np.uint32), np.empty(room, np.uint32)
    for k in range(room):
        firsts[k] = k // n * m
    for row in range(positions.shape[0]):
        places(bits, positions[row], firsts, columns)
        row_product(values[row * kept : (row + 1) * kept], columns, x, y[row])
