"""Integers with a scale and a real-valued minimum per group: the shape of GGUF's Q4_1, and what HQQ writes.

    weight ≈ code * scale + minimum

The minimum is any fp16 number, where :class:`labkit.formats.Integer` has a zero point that is itself a code. It costs
16 bits per group in place of ``bits``, and zero need not be on the grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from labkit.formats.base import FINE, Encoded, Format, Params, check_group_size, scale_dtype, stored
from labkit.formats.integer import Quantized
from labkit.formats.pack import pack


@dataclass(frozen=True)
class Affine(Format):
    """The format: codes of ``bits`` (2 to 8), fp16 scale and minimum per ``group_size`` columns (None: per row)."""

    name: ClassVar[str] = "affine"

    bits: int
    group_size: int | None = None

    def __post_init__(self):
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits = {self.bits!r} is not allowed: it must be from 2 to 8.")
        check_group_size(self.group_size)

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    def fit(self, groups: torch.Tensor, shrink: float | torch.Tensor = 1.0, like: Params | None = None) -> Params:
        """Scale and minimum of each group, as they are stored: (out, groups, size) -> two of (out, groups)."""
        low, high = groups.amin(-1), groups.amax(-1)
        middle, half = (low + high) / 2, (high - low) / 2 * shrink
        scale = stored(2 * half / self.top)
        return scale, self.kept(middle - half, scale)

    @staticmethod
    def kept(minimum: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Minima as they are stored beside these scales, in fp32: in fp16 as well, never infinite, where the scale is."""
        most = torch.finfo(torch.float16).max
        return torch.where(scale < FINE, minimum, minimum.clamp(-most, most).to(torch.float16).float())

    def quantize(self, x: torch.Tensor, params: Params) -> torch.Tensor:
        scale, minimum = params
        return ((x - minimum[..., None]) / scale[..., None]).round_().clamp_(0, self.top).to(torch.uint8)

    def dequantize(self, codes: torch.Tensor, params: Params) -> torch.Tensor:
        scale, minimum = params
        return codes.float() * scale[..., None] + minimum[..., None]

    def levels(self) -> torch.Tensor:
        """0 … 2^bits - 1; a group's minimum shifts them."""
        return torch.arange(self.top + 1).float()

    def store(self, params: Params) -> dict[str, torch.Tensor]:
        scale, minimum = params
        dtype = scale_dtype(scale)
        return {"scale": scale.to(dtype), "minimum": minimum.to(dtype)}

    def load(self, stored: dict[str, torch.Tensor], shape: tuple[int, int]) -> Params:
        return stored["scale"].float(), stored["minimum"].float()


def integers(weight: Encoded) -> tuple[Quantized, torch.Tensor | None] | None:
    """A weight as kernels for integers can take it: with whole zero points, and what is left to add; None for a foreign format.

    For an affine weight, code * scale + minimum = (code - zero) * scale + rest, with the whole zero that is nearest to
    the real one. A kernel computes the first term; ``rest``, fp32 (out, groups), times the sum of a group's inputs is
    the second. Integers have no rest (None).
    """
    if isinstance(weight, Quantized):
        return weight, None
    if not isinstance(weight.form, Affine):
        return None
    scale, minimum = weight.params()
    form, columns = weight.form, weight.shape[1]
    zero = (-minimum / scale).round().clamp(0, form.top)
    kept, zeros = weight.tensors(), pack(zero.to(torch.uint8), form.bits)
    whole = Quantized(kept["packed"], kept["scale"], zeros, form.bits, form.size(columns), columns)
    return whole, minimum + zero * scale
