"""Mixed precision: spend a budget of bits on the layers where they save most."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from labkit.fold import Places
from labkit.formats import Encoded, Integer
from labkit.method import Method, both, knob
from labkit.probe import Probe
from labkit.progress import track
from labkit.quantize.awq import WINDOWS, scaling
from labkit.quantize.common import GROUP_SIZE, rounded
from labkit.quantize.gptq import gptq
from labkit.walk import Stats, linears, path_of, unpack, walk, weight_of
from labkit.walk import blocks as blocks_of

WIDTHS = (2, 3, 4, 5, 6, 8)  # bits that a layer may get
PROBE = 3  # bits at which each layer is tried alone
PROBE_TOKENS = 256  # of each window: two halves hold both texts of the mixed calibration, and cost no more than a whole
BUDGET = (
    "Bits per weight code, on average over all linears. As with the other quantizers, each group's scale and zero point "
    "come on top: (16 + bits) / group_size per weight, so that 3.5 is 3.8 held at groups of 64."
)


@dataclass(frozen=True)
class MixedPrecision(Method):
    """AWQGPTQ with a budget of bits on average, spent layer by layer where it lowers the KL divergence most.

    Each linear is rounded to 3 bits alone, and the KL divergence this costs is measured. At other widths it is taken to
    grow with the squared error of the weights. Starting from 2 bits everywhere, the layer that gains most per bit spent
    is widened, again and again, while the budget lasts. AWQ's scales are searched once, at :func:`middle_width`.
    """

    kind: ClassVar[str] = "quantize"
    paper: ClassVar[str] = "after Dong et al., HAWQ-V2, NeurIPS 2020; the rounding is AWQ's and GPTQ's, see AWQGPTQ"
    calibrated: ClassVar[bool] = True
    lossless: ClassVar[dict] = {"bits": 8.0, "group_size": 32}
    lossless_kl: ClassVar[float] = 2e-3

    bits: float = knob(3.5, low=2.0, high=8.0, step=0.25, help=BUDGET)
    group_size: int | None = GROUP_SIZE
    probe: int = knob(
        2,
        low=1,
        high=32,
        stops=(1, 2, 4),
        help="Calibration windows on which each layer is tried alone, 256 tokens of each.",
    )

    def apply(self, lm, calib, progress: bool) -> str | None:
        for block in blocks_of(lm.model):
            unpack(block)
        damage, errors, sizes = sensitivity(lm, calib[: self.probe, :PROBE_TOKENS], self.group_size, progress)
        width = allocate(damage, errors, sizes, self.bits)

        def solve(weight: torch.Tensor, stats: Stats, path: str) -> Encoded:
            return gptq(weight, stats, Integer(width[path], self.group_size), clip=True)

        places = Places()
        prepare = scaling(lm, Integer(middle_width(self.bits), self.group_size), WINDOWS, places)
        what = f"AWQGPTQ to {self.bits:g} bits on average"
        return both(walk(lm, calib, "hessian", solve, what, progress, prepare), places.said())


def middle_width(bits: float) -> int:
    """The whole width nearest to an average of bits, a half upwards: 2.5 to 3, 3.25 to 3, 3.5 to 4."""
    return math.floor(bits + 0.5)


@torch.no_grad()
def sensitivity(lm, ids: torch.Tensor, group_size: int | None, progress: bool = True):
    """What rounding each linear alone costs: three dictionaries by path.

    The KL divergence per token (nats) at 3 bits, measured on windows ``ids``; the squared error of the weights at each
    of the widths, {bits: error}; the number of weights.
    """
    stack = blocks_of(lm.model)
    prefix = path_of(stack, lm.model)
    layers = {f"{prefix}.{i}.{n}": m for i, block in enumerate(stack) for n, m in linears(block)}
    probe, damage, errors, sizes = Probe(lm, ids), {}, {}, {}
    for path, layer in track(layers.items(), "trying each layer at 3 bits", progress, total=len(layers)):
        weight = weight_of(layer).float()
        tried = {bits: rounded(weight, Integer(bits, group_size)) for bits in WIDTHS}
        errors[path] = {bits: (weight - w).square().sum().item() for bits, w in tried.items()}
        sizes[path] = weight.numel()
        damage[path] = probe.cost({layer: tried[PROBE]})
    return damage, errors, sizes


def allocate(damage: dict, errors: dict, sizes: dict, budget: float) -> dict[str, int]:
    """Bits for each layer, ``budget`` on average over all weights at most; arguments as :func:`sensitivity` gives them."""
    cost = {
        path: {bits: damage[path] * errors[path][bits] / max(errors[path][PROBE], 1e-30) for bits in WIDTHS}
        for path in damage
    }
    width = dict.fromkeys(damage, WIDTHS[0])
    left = (budget - WIDTHS[0]) * sum(sizes.values())
    while True:
        best, most = None, 0.0
        for path, bits in width.items():
            for wider in WIDTHS[WIDTHS.index(bits) + 1 :]:
                price = (wider - bits) * sizes[path]
                gain = (cost[path][bits] - cost[path][wider]) / price
                if price <= left and gain > most:
                    best, most = (path, wider, price), gain
        if best is None:
            break
        path, wider, price = best
        width[path], left = wider, left - price
    for path, bits in sorted(width.items(), key=lambda item: sizes[item[0]]):  # what is left widens harmless layers
        for wider in WIDTHS:
            if wider > bits and (wider - width[path]) * sizes[path] <= left:
                left -= (wider - width[path]) * sizes[path]
                width[path] = wider
    return width
