"""Integers of 2 to 8 bits with a scale, and for asymmetric ones a zero point, per group of a row.

    weight ≈ (code - zero) * scale

Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", CVPR 2018.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from labkit.formats.pack import pack, unpack


@dataclass
class Quantized:
    """An encoded weight matrix: what is stored, and nothing else.

    ``packed``: uint8 (out, ceil(in * bits / 8)). ``scale``: fp16 (out, groups). ``zero``: uint8, packed at ``bits``,
    (out, ceil(groups * bits / 8)), or None for symmetric formats, whose zero point is the middle code.
    """

    packed: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    bits: int
    group_size: int  # columns that share a scale; a row's last group may be shorter
    columns: int

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.packed, self.scale, self.zero) if t is not None)

    @property
    def bits_per_weight(self) -> float:
        """True bits per weight, scales and zeros counted."""
        return 8 * self.nbytes / (self.packed.shape[0] * self.columns)

    def codes(self) -> torch.Tensor:
        """uint8 (out, in)."""
        return unpack(self.packed, self.bits, self.columns)

    def zeros(self) -> torch.Tensor:
        """uint8 (out, groups)."""
        if self.zero is None:
            return torch.full(self.scale.shape, 1 << (self.bits - 1), dtype=torch.uint8, device=self.scale.device)
        return unpack(self.zero, self.bits, self.scale.shape[1])

    def decode(self) -> torch.Tensor:
        """The weight that these codes stand for, fp32 (out, in)."""
        groups, size = self.scale.shape[1], self.group_size
        codes = self.codes()
        if groups * size != self.columns:
            codes = torch.nn.functional.pad(codes, (0, groups * size - self.columns))
        grid = codes.view(len(codes), groups, size).float()
        grid = grid.sub_(self.zeros().float()[..., None]).mul_(self.scale.float()[..., None])
        return grid.view(len(codes), -1)[:, : self.columns]


@dataclass(frozen=True)
class Integer:
    """The format: ``bits`` wide, one scale per ``group_size`` columns (None: per row), symmetric or with a zero point."""

    bits: int
    group_size: int | None = None
    symmetric: bool = False

    def __post_init__(self):
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits = {self.bits!r} is not allowed: it must be from 2 to 8.")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(
                f"group_size = {self.group_size!r} is not allowed: it must be 1 or more, or None (per row)."
            )

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    def groups(self, weight: torch.Tensor) -> torch.Tensor:
        """(out, in) -> (out, groups, size); a shorter last group is filled with its row's last value, which moves no range."""
        size = min(self.group_size or weight.shape[1], weight.shape[1])
        short = -weight.shape[1] % size
        if short:
            weight = torch.cat([weight, weight[:, -1:].expand(-1, short)], 1)
        return weight.reshape(len(weight), -1, size)

    def grid(self, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale (as fp16 stores it) and integer zero point of each group: (out, groups, size) -> two of (out, groups)."""
        if self.symmetric:
            scale = groups.abs().amax(-1) / (self.top / 2)
            zero = torch.full_like(scale, 1 << (self.bits - 1))
        else:
            low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
            scale = (high - low) / self.top
            zero = torch.zeros_like(scale)
        scale = stored(scale)
        if not self.symmetric:
            zero = (-low / scale).round().clamp(0, self.top)
        return scale, zero

    def encode(self, weight: torch.Tensor) -> Quantized:
        """Round a weight (out, in) to the nearest code of its group's grid."""
        groups = self.groups(weight.float())
        scale, zero = self.grid(groups)
        codes = (groups / scale[..., None] + zero[..., None]).round().clamp(0, self.top)
        codes = codes.view(len(weight), -1)[:, : weight.shape[1]]
        return self.assemble(codes, scale, zero)

    def assemble(self, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> Quantized:
        """Pack codes (out, in), scales (out, groups) and zeros (out, groups) that a method has chosen."""
        size = min(self.group_size or codes.shape[1], codes.shape[1])
        packed_zero = None if self.symmetric else pack(zero.to(torch.uint8), self.bits)
        packed = pack(codes.to(torch.uint8).contiguous(), self.bits)
        return Quantized(packed, scale.to(torch.float16), packed_zero, self.bits, size, codes.shape[1])


def stored(scale: torch.Tensor) -> torch.Tensor:
    """A scale as fp16 keeps it, in fp32: never zero (an all-zero group), never infinite."""
    half = torch.finfo(torch.float16)
    return scale.clamp(half.smallest_normal, half.max).to(torch.float16).float()
