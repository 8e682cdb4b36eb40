"""Integers of 2 to 8 bits with a scale, and for asymmetric ones a zero point, per group of a row.

    weight ≈ (code - zero) * scale

The symmetric format has scale = max|w| / 7.5 at 4 bits (half the largest code), as in GPTQ's code. The codes reach from -8
to 7 steps and ±max|w| lies 7.5 steps out, so the largest weight of a group always errs by half a step, whichever its
sign; in return all codes are used and no weight errs by more. GGUF's Q4_0 divides the largest weight, sign and all, by
-8: it is then exact, but a weight of nearly that size and the other sign errs by almost a whole step.

Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", CVPR 2018.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from labkit.formats.base import Encoded, Format, Params, check_group_size, scale_dtype, stored
from labkit.formats.pack import pack, unpack


@dataclass
class Quantized(Encoded):
    """A weight matrix encoded as integers.

    ``packed``: uint8 (out, ceil(in * bits / 8)). ``scale``: (out, groups), fp16, or fp32 where weights are very small.
    ``zero``: uint8, packed at ``bits``, (out, ceil(groups * bits / 8)), or None for symmetric formats, whose zero point is
    the middle code.
    """

    packed: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    bits: int
    group_size: int  # columns that share a scale; a row's last group may be shorter
    columns: int

    @property
    def form(self) -> Integer:
        return Integer(self.bits, self.group_size, self.zero is None)

    @property
    def shape(self) -> tuple[int, int]:
        return self.packed.shape[0], self.columns

    def tensors(self) -> dict[str, torch.Tensor]:
        found = {"packed": self.packed, "scale": self.scale, "zero": self.zero}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def zeros(self) -> torch.Tensor:
        """uint8 (out, groups)."""
        if self.zero is None:
            return torch.full(self.scale.shape, 1 << (self.bits - 1), dtype=torch.uint8, device=self.scale.device)
        return unpack(self.zero, self.bits, self.scale.shape[1])

    def params(self) -> Params:
        """Scale and zero point as :meth:`Integer.dequantize` takes them: fp32 (out, groups) each."""
        return self.scale.float(), self.zeros().float()


@dataclass(frozen=True)
class Integer(Format):
    """The format: ``bits`` wide, one scale per ``group_size`` columns (None: per row), symmetric or with a zero point."""

    name: ClassVar[str] = "int"

    bits: int
    group_size: int | None = None
    symmetric: bool = False

    def __post_init__(self):
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits = {self.bits!r} is not allowed: it must be from 2 to 8.")
        check_group_size(self.group_size)

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    def fit(self, groups: torch.Tensor, shrink: float | torch.Tensor = 1.0, like: Params | None = None) -> Params:
        """Scale (as it is stored) and integer zero point of each group: (out, groups, size) -> two of (out, groups)."""
        if self.symmetric:  # the largest weight errs by half a step: see the module
            scale = stored(groups.abs().amax(-1) * shrink / (self.top / 2))
            return scale, torch.full_like(scale, 1 << (self.bits - 1))
        low, high = groups.amin(-1).clamp(max=0) * shrink, groups.amax(-1).clamp(min=0) * shrink
        scale = stored((high - low) / self.top)
        return scale, (-low / scale).round().clamp(0, self.top)

    grid = fit

    def quantize(self, x: torch.Tensor, params: Params) -> torch.Tensor:
        return self._nearest(x, params).to(torch.uint8)

    def dequantize(self, codes: torch.Tensor, params: Params) -> torch.Tensor:
        scale, zero = params
        return (codes.float() - zero[..., None]).mul_(scale[..., None])

    def round(self, x: torch.Tensor, params: Params) -> torch.Tensor:
        scale, zero = params
        return self._nearest(x, params).sub_(zero[..., None]).mul_(scale[..., None])

    def _nearest(self, x: torch.Tensor, params: Params) -> torch.Tensor:
        scale, zero = params
        return (x / scale[..., None]).add_(zero[..., None]).round_().clamp_(0, self.top)

    def levels(self) -> torch.Tensor:
        """-2^(bits-1) … 2^(bits-1) - 1; an asymmetric format shifts them by its zero point."""
        return torch.arange(self.top + 1).float() - (1 << (self.bits - 1))

    def store(self, params: Params) -> dict[str, torch.Tensor]:
        scale, zero = params
        kept = {"scale": scale.to(scale_dtype(scale))}
        return kept if self.symmetric else kept | {"zero": pack(zero.to(torch.uint8), self.bits)}

    def wrap(self, tensors: dict[str, torch.Tensor], shape: tuple[int, int]) -> Quantized:
        packed, scale, zero = tensors["packed"], tensors["scale"], tensors.get("zero")
        return Quantized(packed, scale, zero, self.bits, self.size(shape[1]), shape[1])
