"""The loops themselves, compiled by Numba when this module is imported and kept on disk for the next process.

Each row goes in two steps. First its positions become a list of column numbers: a byte of the mask is looked up in a table
of 256 lists, and all eight numbers are written, however many are meant. A processor cannot guess a random mask, and a wrong
guess costs it more than numbers too many. Then the kept values are multiplied by the inputs at those columns. A dense
product reads its inputs in order, eight or sixteen at a time; here positions are unpacked and each input looked up, and so
half of the products do not take half of the time.
"""

from __future__ import annotations

import numpy as np
from numba import njit

# Sums may be reordered, so that they fill the vector registers; NaN and infinity stay what they are.
FAST = {"reassoc", "contract", "nsz"}

# Indices are unsigned: a signed one may count from the end, and would be tested for that at every access.
ONE, THREE, FOUR, SEVEN, EIGHT = (np.uint64(n) for n in (1, 3, 4, 7, 8))
SPARE = 4  # room after the last column: the last byte may be half full
SET = np.array([sorted(range(8), key=lambda k: not byte >> k & 1) for byte in range(256)], np.uint32)  # set bits first
COUNT = np.array([byte.bit_count() for byte in range(256)], np.uint64)
QUARTERS = np.array([[byte >> shift & 3 for shift in (0, 2, 4, 6)] for byte in range(256)], np.uint32)  # (256, 4)


@njit("f4(f4[::1], u4[::1], f4[::1])", nogil=True, cache=True, fastmath=FAST)
def dot(values, columns, x):
    """Σ_k values[k] · x[columns[k]]."""
    total = np.float32(0)
    for k in range(values.size):
        total += values[k] * x[columns[k]]
    return total


@njit("void(f4[::1], u4[::1], f4[:, ::1], f4[::1])", nogil=True, cache=True, fastmath=FAST)
def dots(values, columns, x, y):
    """The same for a batch: y[b] = Σ_k values[k] · x[columns[k], b]."""
    y[:] = 0
    last = values.size - values.size % 4
    for k in range(0, last, 4):  # four weights for each time that y is read and written
        a, b, c, d = x[columns[k]], x[columns[k + 1]], x[columns[k + 2]], x[columns[k + 3]]
        p, q, r, s = values[k], values[k + 1], values[k + 2], values[k + 3]
        for i in range(y.size):
            y[i] += p * a[i] + q * b[i] + r * c[i] + s * d[i]
    for k in range(last, values.size):
        a, p = x[columns[k]], values[k]
        for i in range(y.size):
            y[i] += p * a[i]


@njit("u8(u1[::1], u4[::1])", nogil=True, cache=True)
def set_bits(mask, columns):
    """Write the columns of one row's set bits, and return how many they are."""
    kept = np.uint64(0)
    for byte in range(np.uint64(mask.size)):
        bits, first = mask[byte], np.uint32(EIGHT * byte)
        if bits == 0:  # all eight are gone: common where few are kept, and never seen where many are
            continue
        for k in range(EIGHT):  # the next byte's columns overwrite those that are too many
            columns[kept + k] = first + SET[bits, k]
        kept += COUNT[bits]
    return kept


@njit("void(u1[:, ::1], f4[::1], f4[:, ::1], f4[:, ::1])", nogil=True, cache=True, fastmath=FAST)
def bitmask(mask, values, x, y):
    """Rows of a bitmask: mask uint8 (rows, bytes), their values fp32 one after the other, x (in, batch), y (rows, batch)."""
    columns = np.empty(8 * mask.shape[1] + 8, np.uint32)
    flat, single = x.reshape(-1), x.shape[1] == 1
    begin = 0
    for row in range(mask.shape[0]):
        end = begin + np.int64(set_bits(mask[row], columns))
        if single:  # decided here and not in a function of its own: a slice of y for each row costs as much as the row
            y[row, 0] = dot(values[begin:end], columns, flat)
        else:
            dots(values[begin:end], columns, x, y[row])
        begin = end


@njit("void(i8, u1[::1], u4[::1], u4[::1])", nogil=True, cache=True)
def places(bits, packed, firsts, columns):
    """Write the columns of one row's values: each is its group's first column and its place, of ``bits`` bits, in it."""
    if bits == 2:  # four to a byte, as in 2:4
        for byte in range(np.uint64(packed.size)):
            for k in range(FOUR):
                columns[FOUR * byte + k] = QUARTERS[packed[byte], k] + firsts[FOUR * byte + k]
        return
    bits, last = np.uint64(bits), np.uint64(packed.size - 1)
    below = (ONE << bits) - ONE
    for k in range(np.uint64(columns.size - SPARE)):
        byte, shift = k * bits >> THREE, k * bits & SEVEN
        word = np.uint64(packed[byte]) | np.uint64(packed[min(byte + ONE, last)]) << EIGHT
        columns[k] = firsts[k] + np.uint32(word >> shift & below)


@njit("void(i8, i8, i8, u1[:, ::1], f4[::1], f4[:, ::1], f4[:, ::1])", nogil=True, cache=True, fastmath=FAST)
def nm(bits, n, m, positions, values, x, y):
    """Rows of an N:M matrix: positions uint8 (rows, bytes) at ``bits`` each; the rest as for a bitmask."""
    kept = values.size // positions.shape[0]
    room = kept + SPARE
    firsts, columns = np.empty(room, np.uint32), np.empty(room, np.uint32)
    flat, single = x.reshape(-1), x.shape[1] == 1
    for k in range(room):
        firsts[k] = k // n * m
    for row in range(positions.shape[0]):
        places(bits, positions[row], firsts, columns)
        if single:
            y[row, 0] = dot(values[row * kept : (row + 1) * kept], columns, flat)
        else:
            dots(values[row * kept : (row + 1) * kept], columns, x, y[row])
