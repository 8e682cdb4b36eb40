"""FP8, FP6 and FP4: small floats times a real-valued scale.

    weight ≈ value(code) * scale,  scale = max |weight| / largest value

One scale covers ``rows`` × ``group_size`` weights, None meaning all of them:

    Float8(group_size=128, rows=128)     a tile: the weights of DeepSeek-V3 (arXiv:2412.19437, section 3.3.2)
    Float8(group_size=128)               a group of one row, as DeepSeek-V3 scales activations
    Float8()                             a row: one scale per output channel
    Float8(rows=None)                    the whole tensor: Micikevicius et al., "FP8 Formats for Deep Learning",
                                         arXiv:2209.05433, section 3.3

FP6 and FP4 are the MX specification's element types under an fp16 scale: what a group loses by a shared scale of only
powers of two (``MXFP4``) is seen by comparing the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from labkit.formats.base import Params, check_group_size, scale_dtype, stored
from labkit.formats.minifloat import MINIFLOATS, Minifloat
from labkit.formats.small_floats import SmallFloats


class ScaledFloat(SmallFloats):
    """What FP8, FP6 and FP4 share. Subclasses have the fields ``group_size``, perhaps ``variant`` and ``rows``."""

    variant: ClassVar[str] = ""
    rows: ClassVar[int | None] = 1
    variants: ClassVar[tuple[str, ...]] = ()
    scale_dtype: ClassVar[torch.dtype] = torch.float16

    def __post_init__(self):
        if self.variant not in self.variants:
            allowed = " or ".join(map(repr, self.variants))
            raise ValueError(f"variant = {self.variant!r} is not allowed: it must be {allowed}.")
        check_group_size(self.group_size)
        if self.rows is not None and self.rows < 1:
            raise ValueError(f"rows = {self.rows!r} is not allowed: it must be 1 or more, or None (all rows).")

    @property
    def name(self) -> str:
        return f"fp{self.bits}_{self.variant}"

    @property
    def element(self) -> Minifloat:
        return MINIFLOATS[self.variant]

    @property
    def bits(self) -> int:
        return self.element.bits

    def fit(self, groups: torch.Tensor, shrink: float | torch.Tensor = 1.0, like: Params | None = None) -> Params:
        """The scale of each group: (out, groups, size) -> one tensor (out, groups). All rows of a tile have the same."""
        high = groups.abs().amax(-1) * shrink
        return (self._kept(self._spread(self._tiles(high), len(groups)) / self.element.largest),)

    def store(self, params: Params) -> dict[str, torch.Tensor]:
        """``scale``: (ceil(out / rows), groups), in ``scale_dtype``; in fp32 where fp16 has none that is small enough."""
        rows = self.rows or len(params[0])
        dtype = scale_dtype(params[0]) if self.scale_dtype == torch.float16 else self.scale_dtype
        return {"scale": params[0][::rows].to(dtype).contiguous()}

    def load(self, stored: dict[str, torch.Tensor], shape: tuple[int, int]) -> Params:
        return (self._spread(stored["scale"].float(), shape[0]),)

    def _tiles(self, high: torch.Tensor) -> torch.Tensor:
        """The largest of each tile's rows: (out, groups) -> (ceil(out / rows), groups)."""
        rows = min(self.rows or len(high), len(high))
        short = torch.nn.functional.pad(high, (0, 0, 0, -len(high) % rows))
        return short.view(-1, rows, high.shape[1]).amax(1)

    def _spread(self, tiles: torch.Tensor, out: int) -> torch.Tensor:
        """One scale per tile -> one per row."""
        return tiles.repeat_interleave(self.rows or out, 0)[:out]

    def _kept(self, scale: torch.Tensor) -> torch.Tensor:
        """The scale as it is stored, in fp32; weights beyond the reach of the largest scale saturate."""
        if self.scale_dtype == torch.float16:
            return stored(scale)
        return scale.clamp(min=torch.finfo(torch.float32).smallest_normal)


@dataclass(frozen=True)
class Float8(ScaledFloat):
    """FP8: ``variant`` "e4m3" (finer, up to 448) or "e5m2" (wider, up to 57344). The scale is kept in fp32."""

    variants: ClassVar[tuple[str, ...]] = ("e4m3", "e5m2")
    scale_dtype: ClassVar[torch.dtype] = torch.float32

    variant: str = "e4m3"
    group_size: int | None = None
    rows: int | None = 1


@dataclass(frozen=True)
class FP6(ScaledFloat):
    """FP6: ``variant`` "e2m3" (finer, up to 7.5) or "e3m2" (wider, up to 28). The scale is kept in fp16."""

    variants: ClassVar[tuple[str, ...]] = ("e2m3", "e3m2")

    variant: str = "e2m3"
    group_size: int | None = 64


@dataclass(frozen=True)
class FP4(ScaledFloat):
    """FP4, always E2M1: 0, ½, 1, 1½, 2, 3, 4, 6 and their negatives. The scale is kept in fp16."""

    variant: ClassVar[str] = "e2m1"
    variants: ClassVar[tuple[str, ...]] = ("e2m1",)
    name: ClassVar[str] = "fp4"

    group_size: int | None = 64
