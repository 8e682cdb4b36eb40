"""HQQ: no calibration; each group's zero point is moved until most weights fit well and a few outliers do not matter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from labkit.formats import Affine, Encoded
from labkit.method import Method, knob
from labkit.quantize.common import BITS, GROUP_SIZE
from labkit.walk import walk

P, BETA, KAPPA = 0.7, 10.0, 1.01  # the norm below 1, the penalty's start and its growth, as the authors chose them


@dataclass(frozen=True)
class HQQ(Method):
    """Round without calibration, with a real-valued zero point that minimizes an outlier-proof error of the weights.

    The error is Σ|w - ŵ|^p with p = 0.7, which a few large weights hardly raise. It is split in two (half-quadratic):
    an auxiliary error e that is shrunk in closed form, and the zero point, which is then a mean.
    """

    kind: ClassVar[str] = "quantize"
    paper: ClassVar[str] = "Badri and Shaji, Half-Quadratic Quantization of Large Machine Learning Models, 2023"
    lossless: ClassVar[dict] = {"bits": 8, "group_size": 32}
    lossless_kl: ClassVar[float] = 2e-3

    bits: int = BITS
    group_size: int | None = GROUP_SIZE
    steps: int = knob(
        20, low=0, high=200, stops=(0, 1, 5, 20, 50), help="Most iterations; it stops where the error grows."
    )

    def apply(self, lm, calib, progress: bool) -> None:
        form = Affine(self.bits, self.group_size)
        what = f"HQQ to {self.bits} bits"
        walk(lm, calib, "none", lambda weight, stats, path: hqq(weight, form, self.steps), what, progress)


def hqq(weight: torch.Tensor, form: Affine, steps: int = 20) -> Encoded:
    """Encode a weight (out, in): the scale is the range's, the minimum is solved for."""
    groups = form.groups(weight)  # (out, groups, size)
    scale, minimum = form.fit(groups)
    beta, least, best = BETA, torch.inf, minimum
    for _ in range(steps + 1):
        codes = form.quantize(groups, (scale, minimum))
        error = groups - form.dequantize(codes, (scale, minimum))
        now = error.abs().pow(P).mean().item()
        if now >= least:
            break
        least, best = now, minimum
        shrunk = error.sign() * (error.abs() - error.abs().clamp(min=1e-12).pow(P - 1) / beta).clamp(min=0)
        minimum = (groups - shrunk - codes * scale[..., None]).mean(-1).half().float()  # as it will be stored
        beta *= KAPPA
    codes = form.quantize(groups, (scale, best)).view(len(weight), -1)[:, : weight.shape[1]]
    return form.assemble(codes, (scale, best))
