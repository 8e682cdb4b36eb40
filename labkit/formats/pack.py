"""Codes of 1 to 8 bits, really packed into bytes, row by row.

Little-endian bit order: code i of a row starts at bit ``i * bits``. For 4 bits the first code is the low nibble.
"""

from __future__ import annotations

import torch


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
    if 8 % bits == 0:  # whole codes per byte: 1, 2 and 4 bits
        per_byte = 8 // bits
        padded = torch.nn.functional.pad(codes, (0, -columns % per_byte)).view(rows, -1, per_byte)
        shifts = torch.arange(per_byte, device=codes.device, dtype=torch.int32) * bits
        return (padded.int() << shifts).sum(-1).to(torch.uint8)
    stream = (codes[..., None] >> torch.arange(bits, device=codes.device, dtype=torch.uint8)) & 1
    stream = torch.nn.functional.pad(stream.view(rows, -1), (0, -columns * bits % 8)).view(rows, -1, 8)
    return (stream.int() << torch.arange(8, device=codes.device, dtype=torch.int32)).sum(-1).to(torch.uint8)


def unpack(packed: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """The inverse of :func:`pack`: uint8 bytes (rows, bytes) -> uint8 codes (rows, columns)."""
    rows = packed.shape[0]
    if bits == 8:
        return packed
    if 8 % bits == 0:
        shifts = torch.arange(8 // bits, device=packed.device, dtype=torch.uint8) * bits
        codes = (packed[..., None] >> shifts) & ((1 << bits) - 1)
        return codes.view(rows, -1)[:, :columns]
    # Eight codes fill `bits` whole bytes; code j lies in at most two neighbouring bytes of its group.
    padded = torch.nn.functional.pad(packed, (0, -packed.shape[1] % bits)).view(rows, -1, bits).int()
    codes = []
    for j in range(8):
        byte, offset = divmod(j * bits, 8)
        word = padded[..., byte]
        if offset + bits > 8:
            word = word | padded[..., byte + 1] << 8
        codes.append((word >> offset) & ((1 << bits) - 1))
    return torch.stack(codes, -1).view(rows, -1)[:, :columns].to(torch.uint8)
