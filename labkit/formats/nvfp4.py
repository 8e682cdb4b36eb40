"""NVFP4: blocks of 16 E2M1 values, an E4M3 scale per block, an fp32 scale per tensor.

    weight ≈ value(code) * (scale * tensor_scale)

The tensor's scale puts the largest block's scale at 448, the top of E4M3. Against MXFP4 the block is half as long and its
scale no power of two, so the block's largest weight lands close to 6: above it in half of the blocks, where the scale was
rounded down, but by a sixteenth at most (6.375). It costs a quarter of a bit more.

NVIDIA, "Pretraining Large Language Models with NVFP4", arXiv:2509.25149, section 2 and appendix on quantization.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from labkit.formats.base import Params
from labkit.formats.minifloat import E2M1, E4M3, Minifloat
from labkit.formats.small_floats import SmallFloats


@dataclass(frozen=True)
class NVFP4(SmallFloats):
    """NVFP4: 4.5 bits per weight, and 4 bytes per tensor."""

    name: ClassVar[str] = "nvfp4"
    bits: ClassVar[int] = 4
    group_size: ClassVar[int] = 16
    element: ClassVar[Minifloat] = E2M1

    def fit(self, groups: torch.Tensor, shrink: float | torch.Tensor = 1.0, like: Params | None = None) -> Params:
        """The blocks' scales (out, groups) and the tensor's (), which ``like`` fixes.

        A block's scale is never zero, whatever the tensor's largest weight: the least one is 2^-9.
        """
        high = groups.abs().amax(-1) * shrink
        if like is None:
            tensor_scale = (high.amax() / (E2M1.largest * E4M3.largest)).clamp(
                min=torch.finfo(high.dtype).smallest_normal
            )
        else:
            tensor_scale = like[1]
        scale = E4M3.round(high / E2M1.largest / tensor_scale)
        return scale.clamp_(min=E4M3.smallest), tensor_scale

    def step(self, params: Params) -> torch.Tensor:
        return (params[0] * params[1])[..., None]

    def store(self, params: Params) -> dict[str, torch.Tensor]:
        """``scale``: E4M3 as uint8 (out, groups). ``tensor_scale``: fp32 ()."""
        return {"scale": E4M3.encode(params[0]), "tensor_scale": params[1]}

    def load(self, stored: dict[str, torch.Tensor], shape: tuple[int, int]) -> Params:
        return E4M3.decode(stored["scale"]), stored["tensor_scale"].float()
