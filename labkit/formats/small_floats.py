"""What all formats of scaled small floats share: a code is an element, and its value the element's times a step."""

from __future__ import annotations

import torch

from labkit.formats.base import Format, Params
from labkit.formats.minifloat import Minifloat


class SmallFloats(Format):
    """weight ≈ element(code) * step. Subclasses have ``element``, and ``step`` where it is not the group's scale alone."""

    element: Minifloat

    def step(self, params: Params) -> torch.Tensor:
        """What one unit of the element is worth, (out, groups, 1)."""
        return params[0][..., None]

    def quantize(self, x: torch.Tensor, params: Params) -> torch.Tensor:
        return self.element.encode(x / self.step(params))

    def dequantize(self, codes: torch.Tensor, params: Params) -> torch.Tensor:
        return self.element.decode(codes) * self.step(params)

    def round(self, x: torch.Tensor, params: Params) -> torch.Tensor:
        step = self.step(params)
        return self.element.round(x / step) * step

    def levels(self) -> torch.Tensor:
        return self.element.levels()
