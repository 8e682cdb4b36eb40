"""NF4: sixteen values at the quantiles of a normal distribution, times the block's largest magnitude ("absmax").

    weight ≈ NF4[code] * absmax,    absmax ≈ DYNAMIC[scale] * block_scale + offset

With double quantization the absmaxes themselves become 8-bit codes: less their mean, in blocks of 256, in a format whose
steps are fine around zero. That brings the price of a block of 64 from 0.5 to 0.127 bits per weight.

The quantiles are those of one normal weight, but a block is scaled by the largest of its 64, and how large that is
depends on the block. So the codes are not used equally often, not even by exactly normal weights: from 1.7 % to 9.2 % of
the time, 3.88 bits of information in 4 (Yoshida, "NF4 Isn't Information Theoretically Optimal (and that's Good)",
arXiv:2306.06965).

Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", NeurIPS 2023, section 3 (both ideas) and appendix E (the
values); the 8-bit format: Dettmers et al., "8-bit Optimizers via Block-wise Quantization", ICLR 2022, section 2.
Encodes and decodes as bitsandbytes does, bit for bit, wherever ``group_size`` divides the columns. (Otherwise its blocks
run on from one row into the next, and ours do not.)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch

from labkit.formats.base import Format, Params, check_group_size

BLOCK = 256  # absmaxes that share a block_scale, counted row by row over the whole matrix

# Quantiles of N(0, 1), scaled to [-1, 1]: seven below zero, zero, and eight above. (The paper takes 8 quantiles for the
# lower half and 9 for the upper, each with a zero, and drops one of the two zeros.)
NORMAL = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@dataclass(frozen=True)
class NF4(Format):
    """NF4 in blocks of ``group_size`` columns; ``double_quant`` also quantizes the absmaxes (4.127 bits per weight at 64)."""

    name: ClassVar[str] = "nf4"
    bits: ClassVar[int] = 4

    group_size: int | None = 64
    double_quant: bool = True

    def __post_init__(self):
        check_group_size(self.group_size)

    def fit(self, groups: torch.Tensor, shrink: float | torch.Tensor = 1.0, like: Params | None = None) -> Params:
        """The absmaxes (out, groups); with double quantization also their codes, block scales (both (out, groups)), offset ().

        The absmax that chooses the codes is the exact one, as in bitsandbytes; the one that decodes them is the stored.
        """
        absmax = groups.abs().amax(-1) * shrink
        if not self.double_quant:
            return (absmax,)
        if like is not None:
            block_scale, offset = like[2:]
        else:
            offset = absmax.mean()
            if not torch.isfinite(offset):  # the sum of huge absmaxes overflows
                offset = (absmax / absmax.numel()).sum()
            flat = torch.nn.functional.pad((absmax - offset).flatten(), (0, -absmax.numel() % BLOCK))
            block_scale = self._spread(flat.view(-1, BLOCK).abs().amax(1), absmax.shape)
        return absmax, dynamic_code(absmax - offset, block_scale), block_scale, offset

    def quantize(self, x: torch.Tensor, params: Params) -> torch.Tensor:
        inverse = 1 / params[0].clamp(min=1e-38)  # the reciprocal first: the last bit decides some codes
        _, middles = _normal(x.device)
        return torch.bucketize(x * inverse[..., None], middles, out_int32=True).to(torch.uint8)

    def dequantize(self, codes: torch.Tensor, params: Params) -> torch.Tensor:
        values, _ = _normal(codes.device)
        return values[codes.int()] * self._absmax(params)[..., None]

    def levels(self) -> torch.Tensor:
        return torch.tensor(NORMAL)

    def store(self, params: Params) -> dict[str, torch.Tensor]:
        """``scale``: the absmaxes, fp32 or with double quantization uint8; then also ``block_scale`` and ``offset``, fp32."""
        if not self.double_quant:
            return {"scale": params[0]}
        _, code, block_scale, offset = params
        return {"scale": code, "block_scale": block_scale.flatten()[::BLOCK].contiguous(), "offset": offset}

    def load(self, stored: dict[str, torch.Tensor], shape: tuple[int, int]) -> Params:
        scale = stored["scale"]
        if not self.double_quant:
            return (scale.float(),)
        block_scale, offset = self._spread(stored["block_scale"].float(), scale.shape), stored["offset"].float()
        params = (scale, scale, block_scale, offset)
        return (self._absmax(params), *params[1:])

    def _absmax(self, params: Params) -> torch.Tensor:
        """The absmaxes as stored, (out, groups)."""
        if not self.double_quant:
            return params[0]
        _, code, block_scale, offset = params
        values, _ = _dynamic(code.device)
        return values[code.int()] * block_scale + offset

    @staticmethod
    def _spread(block_scale: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """One scale per block of 256 -> one per absmax, (out, groups)."""
        return block_scale.repeat_interleave(BLOCK)[: shape.numel()].view(shape)


def dynamic_code(x: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
    """The 8-bit dynamic code of x / absmax, uint8, as bitsandbytes' CPU library finds it.

    It looks codes up in a table of 2^16 evenly spaced ratios, so a ratio very close to the middle between two values may get
    the farther one. (A GPU compares exactly.) An absmax of 0 gives code 0.
    """
    _, middles = _dynamic(x.device)
    ratio = (x * (1 / absmax.clamp(min=1e-38))).clamp(-1, 1) + 1
    index = (ratio.double() * 0.5 * 65535 + 0.5).float().floor()
    code = torch.bucketize(-1 + 2 * index / 65535, middles, out_int32=True)
    return torch.where(absmax > 0, code, 0).to(torch.uint8)


def dynamic_values() -> torch.Tensor:
    """The 256 values of the dynamic 8-bit format, sorted, fp32.

    Every decade up to 1 is cut into equal steps, twice as many as the decade below: 1 from 1e-7 to 1e-6, 64 from 0.1 to
    1. The values are the middles of the steps, with both signs; 0 and 1 fill up to 256.
    """
    positive = []
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        positive += (10 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
    return torch.tensor(sorted([*positive, *(-p for p in positive), 0.0, 1.0]))


@lru_cache
def _normal(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    return _with_middles(torch.tensor(NORMAL), device)


@lru_cache
def _dynamic(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    return _with_middles(dynamic_values(), device)


def _with_middles(values: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Values, and the middles between neighbours, on a device."""
    with torch.inference_mode(False):  # a cached tensor may later be used under autograd
        values = values.clone().to(device)
        return values, (values[:-1] + values[1:]) / 2
