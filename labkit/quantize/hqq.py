"""HQQ: no calibration; each group's zero point is moved to where its weights, rounded with it, fit best.

The error that is meant is Σ|w - ŵ|^p with p = 0.7, which a few large weights hardly raise. It is split in two
(half-quadratic): an auxiliary error e, which takes over what is large in w - ŵ, and the zero point, which is then the mean
of the rest. e is a shrinkage in closed form, and it is zero wherever |w - ŵ| < β^(-1/(2 - p)): below 0.170 at the authors'
β = 10. Residuals are half a step at most, so it depends on the bits and on the size of the weights whether anything is
shrunk. First step, groups of 64, share of the residuals with e ≠ 0 (measured):

    weights                               2 bits    3 bits    4 bits
    SmolLM2-135M, all linears (σ 0.20)     4.3 %     0.03 %    0.001 %
      the one with the largest weights      44 %       5 %      0.1 %
    normal, σ 0.1                          0         0         0
    normal, σ 1                            76 %      47 %      1.8 %

So at 3 bits and more, on weights of the usual size, e is zero: the zero point is the mean of w - code · scale, which is
plain least squares, and the exponent plays no part. The authors' code has the same constants and also works on weights
that are not normalised, so that this holds for it too. See :func:`shrunk`, and notebook 03 for the picture.
"""

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
    """Round without calibration, with a real-valued zero point per group that is fitted to the group's weights.

    Codes and zero point are found in turns, the scale stays that of the group's range. The error is meant to be one that
    outliers hardly raise; at 3 bits and more the part that does so is idle, and the fit is one of least squares (see the
    module). It stops when the mean |w - ŵ| no longer falls, as the authors' code does, and keeps the best zero point,
    where theirs keeps the last.
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


def hqq(weight: torch.Tensor, form: Affine, steps: int = 20, beta: float = BETA) -> Encoded:
    """Encode a weight (out, in): the scale is the range's, the minimum is solved for. ``beta=0``: by least squares alone."""
    groups = form.groups(weight)  # (out, groups, size)
    scale, minimum = form.fit(groups)
    least, best = torch.inf, minimum
    for _ in range(steps + 1):
        codes = form.quantize(groups, (scale, minimum))
        error = groups - form.dequantize(codes, (scale, minimum))
        now = error.abs().mean().item()
        if now >= least:
            break
        least, best = now, minimum
        minimum = (groups - shrunk(error, beta) - codes * scale[..., None]).mean(-1)
        minimum = form.kept(minimum, scale)
        beta *= KAPPA
    codes = form.quantize(groups, (scale, best)).view(len(weight), -1)[:, : weight.shape[1]]
    return form.assemble(codes, (scale, best))


def shrunk(error: torch.Tensor, beta: float = BETA, p: float = P) -> torch.Tensor:
    """The auxiliary error e of the residuals w - ŵ, of the same shape: sign(x) · max(0, |x| - |x|^(p-1) / β).

    The authors' approximate solution of min |e|^p + β/2 (e - x)². Zero wherever |x| < β^(-1/(2 - p)).
    """
    size = error.abs()
    if not beta:
        return torch.zeros_like(error)
    return error.sign() * (size - size.clamp(min=1e-12).pow(p - 1) / beta).clamp(min=0)
