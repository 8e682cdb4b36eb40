"""SmoothQuant: move the outliers of the activations into the weights, then multiply integers by integers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from labkit.fold import Places, folds, head_dim_of
from labkit.linear import W8A8Linear
from labkit.method import Method, both, knob
from labkit.walk import Flow, Stats, is_linear, walk, weight_of


@dataclass(frozen=True)
class SmoothQuant(Method):
    """Divide large activation channels by s, multiply the weights that read them by s, then compute in int8 × int8.

    s = max|x|^α / max|w|^(1-α) per channel, joint over all linears that read the channel, folded into the norm before
    them. Weights get one scale per row, activations one per token or one per layer. Where nothing can be folded (what
    feeds o and down is no norm) the layer is quantized as it is.

    The paper's levels (table 2) have one weight scale per matrix, which is coarser than here; its O1 has activation scales
    per token as "dynamic", its O3 one per layer from calibration as "static". Smoothing helps against channels that are
    large in every token, not against massive activations, single values at a text's first token that small models have
    too (Sun et al., arXiv:2402.17762): static scales break at them, smoothed or not.
    """

    kind: ClassVar[str] = "quantize"
    paper: ClassVar[str] = "Xiao et al., SmoothQuant, ICML 2023, section 4, equation 4"
    calibrated: ClassVar[bool] = True
    lossless: ClassVar[dict] = {"activations": "dynamic"}
    lossless_kl: ClassVar[float] = 3e-2  # it always rounds activations to 8 bits

    alpha: float = knob(
        0.5, low=0.0, high=1.0, step=0.1, help="How much of the difficulty moves to the weights: 0 none, 1 all."
    )
    activations: str = knob(
        "dynamic",
        choices=("dynamic", "static"),
        help="A scale per token at run time, or one per layer from calibration.",
    )
    smooth: bool = knob(True, help="Off: activations are rounded as they are (plain W8A8).")

    def apply(self, lm, calib, progress: bool) -> str | None:
        places = Places("smoothed")

        def prepare(block: nn.Module, flow: Flow, index: int) -> None:
            stats, hidden = flow.gather(index, "channel_max"), flow.few(1)
            found = folds(block, lambda block: flow.run(index, hidden, block), head_dim_of(lm))
            norms = [f for f in found if not is_linear(block.get_submodule(f.source))]  # no others, as in the paper
            places.count(norms)
            for fold in norms:
                readers = [weight_of(block.get_submodule(name)) for name in fold.readers]
                fold.apply(block, smoothing(stats[fold.readers[0]].peak, readers, self.alpha))

        def solve(weight: torch.Tensor, stats: Stats, path: str) -> nn.Module:
            known = self.activations == "static" and stats.count  # an input never seen has no range: a scale per token
            static = stats.peak.max() / 127 if known else None
            return W8A8Linear(weight, activation_scale=static)

        prepare = prepare if self.smooth else None
        return both(walk(lm, calib, "channel_max", solve, "SmoothQuant", progress, prepare), places.said())


def smoothing(peak: torch.Tensor, readers: list[torch.Tensor], alpha: float) -> torch.Tensor:
    """s (in,) from the channels' largest activations (in,) and the weights (out, in) that read them. Dead channels: 1.

    Columns of zeros count as a hundred-thousandth of the largest weight.
    """
    largest = torch.stack([w.float().abs().amax(0) for w in readers]).amax(0)
    floor = max(1e-5 * largest.max().item(), torch.finfo(torch.float32).tiny)
    s = peak.pow(alpha) / largest.clamp(min=floor).pow(1 - alpha)
    return torch.where(peak > 0, s.clamp(min=1e-5), 1.0)
