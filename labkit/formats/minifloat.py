"""Floating point numbers of a few bits: a sign, an exponent, a mantissa.

    normal      (-1)^sign · 2^(exponent - bias) · (1 + mantissa / 2^mantissa_bits)
    subnormal   (-1)^sign · 2^(1 - bias)        · (mantissa / 2^mantissa_bits)         exponent field 0

Rounding is to nearest, ties to the even code. What is too large saturates: it becomes the largest finite value, as in
Open Compute Project, "Microscaling Formats (MX) Specification v1.0", 2023, sections 5.3 and 6.3. (A cast in torch gives
NaN or infinity there, and is the same everywhere else.)

Sources: the MX specification, section 5.3, for E2M1, E2M3, E3M2, E4M3 and E5M2; Micikevicius et al., "FP8 Formats for Deep
Learning", arXiv:2209.05433, section 3, for the special codes of E4M3 and E5M2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True)
class Minifloat:
    """One such format. ``largest``: its greatest finite value; codes above that one's are infinity or NaN."""

    exponent_bits: int
    mantissa_bits: int
    largest: float

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def bias(self) -> int:
        return (1 << (self.exponent_bits - 1)) - 1

    @property
    def emax(self) -> int:
        """The exponent of the largest value: 2 for E2M1, whose largest value is 6 = 1.5 · 2²."""
        return math.frexp(self.largest)[1] - 1

    @property
    def smallest(self) -> float:
        """The least positive value."""
        return 2.0 ** (1 - self.bias - self.mantissa_bits)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """fp32 values -> uint8 codes. NaN has no code here: callers keep it out."""
        steps, exponent = self._steps(x)
        # A magnitude's code counts the values below it: those of all lower exponents, then the steps on this one.
        # A step count that was rounded up to a full 2^(mantissa_bits + 1) carries over into the exponent by itself.
        code = steps.abs().to(torch.int32) + ((exponent + (self.bias - 1)) << self.mantissa_bits)
        code = torch.where(steps == 0, 0, code)  # frexp gives zero the exponent of 1/2
        return (code | (torch.signbit(x).to(torch.int32) << (self.bits - 1))).to(torch.uint8)

    def round(self, x: torch.Tensor) -> torch.Tensor:
        """fp32 values -> the nearest representable ones."""
        steps, exponent = self._steps(x)
        return torch.ldexp(steps, exponent - self.mantissa_bits)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """uint8 codes -> fp32 values; infinities and NaNs included, where the format has them."""
        return self.table(codes.device)[codes.int()]

    def table(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """The value of every code, fp32 (2^bits,)."""
        return _table(self, torch.device(device))

    def levels(self) -> torch.Tensor:
        """The finite values, sorted, zero once."""
        return self.table()[self.table().isfinite()].unique()

    def _steps(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """How many steps of its own exponent's width each value is, rounded; and that exponent (int32)."""
        x = x.clamp(-self.largest, self.largest)
        exponent = (torch.frexp(x).exponent - 1).clamp_(min=1 - self.bias)
        return torch.ldexp(x, self.mantissa_bits - exponent).round_(), exponent


E2M1 = Minifloat(2, 1, 6.0)
E2M3 = Minifloat(2, 3, 7.5)
E3M2 = Minifloat(3, 2, 28.0)
E4M3 = Minifloat(4, 3, 448.0)  # no infinity; the last code of each sign is NaN
E5M2 = Minifloat(5, 2, 57344.0)  # infinity and NaN as in IEEE 754
MINIFLOATS = {"e2m1": E2M1, "e2m3": E2M3, "e3m2": E3M2, "e4m3": E4M3, "e5m2": E5M2}


@lru_cache
def _table(kind: Minifloat, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):  # a cached tensor may later be used under autograd
        codes = torch.arange(1 << kind.bits, dtype=torch.int32)
        mantissa = codes & ((1 << kind.mantissa_bits) - 1)
        exponent = (codes >> kind.mantissa_bits) & ((1 << kind.exponent_bits) - 1)
        normal = (exponent > 0).int()
        steps = mantissa + (normal << kind.mantissa_bits)
        value = torch.ldexp(steps.float(), exponent + (1 - normal) - kind.bias - kind.mantissa_bits)
        if kind == E5M2:
            value[(exponent == 31) & (mantissa == 0)] = torch.inf
        value[(value > kind.largest) & value.isfinite()] = torch.nan
        return torch.where(codes >> (kind.bits - 1) == 1, -value, value).to(device)
