"""What HQQ's shrinkage does: the share of a block's residuals that it touches, against its constant β.

shrink = Shrinkage(Inputs(lm, windows))
explore(shrink.view, **shrink.settings())
"""

from __future__ import annotations

import functools

import torch

from labkit.formats import Affine
from labkit.quantize.hqq import BETA, P, hqq, shrunk
from labkit.ui import need, plots, theme, words
from labkit.ui.lessons.inputs import Inputs

go = need("plotly.graph_objects")

GROUP = 64
BITS = (2, 3, 4)
BETAS = tuple(round(10 ** (i / 4), 4) for i in range(17))  # 1 to 10,000
ROWS = 32  # of each linear of the block, evenly spread


class Shrinkage:
    """HQQ on the linears of one block. It needs no text: of the inputs only the model's weights are used."""

    def __init__(self, inputs: Inputs):
        self.inputs = inputs
        self.residuals = functools.lru_cache(16)(self._residuals)
        self.errors = functools.lru_cache(16)(self._errors)

    def settings(self) -> dict:
        """The controls of :meth:`view`, for ``explore``."""
        return {"block": list(range(len(self.inputs.stack)))}

    def share(self, block: int, bits: int, beta: float) -> float:
        """The share of the residuals that are shrunk, so that e ≠ 0, in the first step; measured."""
        return float((shrunk(self.residuals(block, bits), beta) != 0).float().mean())

    def view(self, block: int):
        """The share against β at 2, 3 and 4 bits; what it is at the authors' β, and what the shrinkage is worth."""
        series = {f"{bits} bits": (BETAS, [round(100 * self.share(block, bits, b), 4) for b in BETAS]) for bits in BITS}
        figure = plots.lines(
            series, "β", "residuals that are shrunk, %", f"HQQ on block {block} (measured)", logx=True, markers=False
        )
        figure.add_vline(x=BETA, line={"color": theme.INK, "dash": "dot", "width": 1.5})
        parts = [f"{100 * self.share(block, bits, BETA):.2g} % at {bits} bits" for bits in BITS]
        worth = []
        for bits in BITS:
            plain, squares, all_of_it = self.errors(block, bits)
            worth.append(f"{bits} bits: {squares / plain:.3f} and {all_of_it / plain:.3f}")
        return figure, (
            f"Dotted: the authors' β = {BETA:g}, which shrinks residuals above {BETA ** (-1 / (2 - P)):.3f}: "
            f"{words.listed(parts)}. Mean |w - ŵ| as a share of plain rounding's, without the shrinkage and with it: "
            f"{'; '.join(worth)}."
        )

    def _weights(self, block: int) -> list[torch.Tensor]:
        weights = (self.inputs.weight(block, kind) for kind in self.inputs.kinds)
        return [w[:: max(1, len(w) // ROWS)][:ROWS].cpu() for w in weights]

    def _residuals(self, block: int, bits: int) -> torch.Tensor:
        """w - ŵ of plain rounding, all linears in one row."""
        form = Affine(bits, GROUP)
        return torch.cat([(w - form.encode(w).decode()).flatten() for w in self._weights(block)])

    def _errors(self, block: int, bits: int) -> tuple[float, float, float]:
        """Mean |w - ŵ| of plain rounding, of HQQ without its shrinkage (β = 0), and of HQQ."""
        form, lost, count = Affine(bits, GROUP), [0.0, 0.0, 0.0], 0
        for w in self._weights(block):
            ways = (form.encode(w), hqq(w, form, beta=0), hqq(w, form))
            lost = [sum_ + float((w - way.decode()).abs().sum()) for sum_, way in zip(lost, ways)]
            count += w.numel()
        return tuple(x / count for x in lost)
