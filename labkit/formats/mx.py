"""MXFP4, MXFP6 and MXFP8: blocks of 32 small floats under one shared power of two.

    weight ≈ value(code) * 2^(scale - 127)

The scale is an E8M0 byte: an exponent and nothing else. It is the exponent of the block's largest weight, less the
exponent of the element type's largest value; what then still lies above that value saturates (for E2M1 that is
everything between 6 and 8 times the scale). That is common: the largest weight of 44 % of this model's MXFP4 blocks and of
30 % of normal ones lies above 6, of 21 % and 17 % so far above that it loses more than half a step (measured).

Open Compute Project, "OCP Microscaling Formats (MX) Specification v1.0", September 2023: section 5.2 for the formats,
5.4.1 for E8M0, 6.3 for the conversion. Rouhani et al., "Microscaling Data Formats for Deep Learning", arXiv:2310.10537.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from labkit.formats.base import Params
from labkit.formats.minifloat import E2M1, MINIFLOATS, Minifloat
from labkit.formats.small_floats import SmallFloats

BIAS = 127  # of E8M0; its codes 0 … 254 are 2^-127 … 2^127, and 255 is NaN, which is never written


class Microscaling(SmallFloats):
    """What the MX formats share. Subclasses have ``element``, the small float."""

    group_size: ClassVar[int] = 32

    @property
    def bits(self) -> int:
        return self.element.bits

    def fit(self, groups: torch.Tensor, shrink: float | torch.Tensor = 1.0, like: Params | None = None) -> Params:
        """The scale of each block, a power of two: (out, groups, size) -> one tensor (out, groups)."""
        high = groups.abs().amax(-1) * shrink
        exponent = torch.frexp(high).exponent - 1 - self.element.emax
        exponent = torch.where(high > 0, exponent, -BIAS).clamp(-BIAS, BIAS)
        return (torch.ldexp(torch.ones_like(high), exponent),)

    def store(self, params: Params) -> dict[str, torch.Tensor]:
        """``scale``: E8M0 as uint8 (out, groups)."""
        return {"scale": (torch.frexp(params[0]).exponent - 1 + BIAS).to(torch.uint8)}

    def load(self, stored: dict[str, torch.Tensor], shape: tuple[int, int]) -> Params:
        exponent = stored["scale"].int() - BIAS
        return (torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent),)


@dataclass(frozen=True)
class MXFP4(Microscaling):
    """MXFP4: E2M1 elements, 4.25 bits per weight. Expert weights of gpt-oss are stored like this."""

    name: ClassVar[str] = "mxfp4"
    element: ClassVar[Minifloat] = E2M1


class _Variants(Microscaling):
    variants: ClassVar[tuple[str, ...]]

    def __post_init__(self):
        if self.variant not in self.variants:
            allowed = " or ".join(map(repr, self.variants))
            raise ValueError(f"variant = {self.variant!r} is not allowed: it must be {allowed}.")

    @property
    def element(self) -> Minifloat:
        return MINIFLOATS[self.variant]


@dataclass(frozen=True)
class MXFP6(_Variants):
    """MXFP6: ``variant`` "e2m3" or "e3m2" elements, 6.25 bits per weight."""

    name: ClassVar[str] = "mxfp6"
    variants: ClassVar[tuple[str, ...]] = ("e2m3", "e3m2")

    variant: str = "e2m3"


@dataclass(frozen=True)
class MXFP8(_Variants):
    """MXFP8: ``variant`` "e4m3" or "e5m2" elements, 8.25 bits per weight."""

    name: ClassVar[str] = "mxfp8"
    variants: ClassVar[tuple[str, ...]] = ("e4m3", "e5m2")

    variant: str = "e4m3"
