"""The loops themselves, compiled by Numba at their first call and kept on disk for the next process.

Each row goes in two steps. First its positions become a list of column numbers, without a branch that depends on the
mask: a processor cannot guess a random mask, and every wrong guess costs it as much as a dozen products. Then the kept
values are multiplied by the inputs at those columns. A dense product reads its inputs in order, eight or sixteen at a time;
here each must be looked up, and that is why half of the multiplications do not take half of the time.
"""

from __future__ import annotations

import numpy as np
from numba import njit

# Sums may be reordered, so that they fill the vector registers; NaN and infinity stay what they are.
FAST = {"reassoc", "contract", "nsz"}

BITS = [[b for b in range(8) if byte >> b & 1] for byte in range(256)]
COUNTS = np.array([len(b) for b in BITS], np.int64)
PLACES = np.array([b + [0] * (8 - len(b)) for b in BITS], np.uint32)  # (256, 8): the set bits of a byte, then zeros


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


@njit(nogil=True, cache=True, fastmath=FAST)
def bitmask(mask, values, x, y):
    """Rows of a bitmask: mask uint8 (rows, bytes), their values fp32 one after the other, x (in, batch), y (rows, batch)."""
    columns = np.empty(8 * mask.shape[1] + 8, np.uint32)
    begin = 0
    for row in range(mask.shape[0]):
        kept = 0
        for byte in range(mask.shape[1]):
            bits = mask[row, byte]
            for k in range(8):  # always eight, of which the next byte overwrites what is too much
                columns[kept + k] = PLACES[bits, k] + 8 * byte
            kept += COUNTS[bits]
        row_product(values[begin : begin + kept], columns, x, y[row])
        begin += kept


@njit(nogil=True, cache=True, fastmath=FAST)
def nm(bits, n, m, positions, values, x, y):
    """Rows of an N:M matrix: positions uint8 (rows, bytes) at ``bits`` each; the rest as for a bitmask."""
    kept = values.size // positions.shape[0]
    columns = np.empty(kept, np.uint32)
    for row in range(positions.shape[0]):
        for group in range(kept // n):
            for k in range(group * n, group * n + n):
                byte, shift = (k * bits) // 8, (k * bits) % 8
                word = np.int64(positions[row, byte])
                if shift + bits > 8:
                    word |= np.int64(positions[row, byte + 1]) << 8
                columns[k] = group * m + ((word >> shift) & ((1 << bits) - 1))
        row_product(values[row * kept : (row + 1) * kept], columns, x, y[row])
