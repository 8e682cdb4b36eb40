"""Codes of 1 to 8 bits, really packed into bytes, row by row.

Little-endian bit order: code i of a row starts at bit ``i * bits``. For 4 bits the first code is the low nibble.

Eight codes are eight bytes, one 64-bit word. Three moves close the gaps between them, in pairs, fours and eights; then
they fill the word's lowest ``bits`` bytes.
"""

from __future__ import annotations

import torch

# The lower half of every 16, 32 and 64 bits of a word.
LOWER = ((8, 0x00FF00FF00FF00FF), (16, 0x0000FFFF0000FFFF), (32, 0x00000000FFFFFFFF))


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes (rows, columns) -> uint8 bytes (rows, ceil(columns * bits / 8)).

    >>> pack(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 4).tolist()
    [[33, 3]]
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"bits = {bits!r} is not allowed: it must be from 1 to 8.")
    if codes.numel() and int(codes.max()) >= 1 << bits:
        raise ValueError(f"The code {int(codes.max())} does not fit into {bits} bits.")
    if bits == 8:
        return codes.clone()
    rows, columns = codes.shape
    word = torch.nn.functional.pad(codes, (0, -columns % 8)).contiguous().view(torch.int64)
    for half, lower in LOWER:
        used = bits * half // 8  # bits of each half that hold codes; the upper half moves down to there
        word = (word & lower) | ((word >> half & lower) << used)
    packed = word.view(torch.uint8).view(rows, -1, 8)[..., :bits]
    return packed.reshape(rows, -1)[:, : -(-columns * bits // 8)].contiguous()


def unpack(packed: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """The inverse of :func:`pack`: uint8 bytes (rows, bytes) -> uint8 codes (rows, columns)."""
    if bits == 8:
        return packed
    rows = packed.shape[0]
    if 8 % bits == 0:  # whole codes per byte: 1, 2 and 4 bits
        shifts = torch.arange(8 // bits, device=packed.device, dtype=torch.uint8) * bits
        codes = (packed[..., None] >> shifts) & ((1 << bits) - 1)
        return codes.view(rows, -1)[:, :columns]
    groups = torch.nn.functional.pad(packed, (0, -packed.shape[1] % bits)).view(rows, -1, bits)
    word = torch.nn.functional.pad(groups, (0, 8 - bits)).view(torch.int64)[..., 0]
    for half, lower in reversed(LOWER):
        used = bits * half // 8
        low = lower & (lower >> (half - used))  # the bits of each lower half that hold codes
        word = (word & low) | ((word >> used & low) << half)
    return word.contiguous().view(torch.uint8).view(rows, -1)[:, :columns]
