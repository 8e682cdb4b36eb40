"""Outliers in the activations, token by channel, and what SmoothQuant's α does about them.

    outliers = Outliers(Inputs(lm, calibration), Inputs(lm, text))
    outliers.error(block=2, kind="mlp.down_proj", alpha=0.5, static=True)   # relative RMS error of a real W8A8 layer
    outliers.table()                                                        # every place in a block, over all blocks
    explore(outliers.view, **outliers.settings())

Largest values and fixed scales come from the calibration, maps and errors from a text that it has not seen. Errors are
measured: int8 times int8 (``labkit.linear.W8A8Linear``) against the product in full precision.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import nn

from labkit.linear import W8A8Linear
from labkit.quantize.smoothquant import smoothing
from labkit.ui import heat, need, theme, words
from labkit.ui.lessons.inputs import Inputs
from labkit.ui.table import Table
from labkit.ui.theme import axis, layout
from labkit.walk import is_linear

go = need("plotly.graph_objects")

ALPHAS = [round(0.1 * i, 1) for i in range(11)]
TOKENS, CELLS = (
    40,
    64,
)  # tokens that the map shows, and cells across: each is the largest of several neighbouring channels
LOW, HIGH = -2.0, 2.0  # powers of ten at which the map's colours end


class Outliers:
    """The inputs of a model's linear layers, and W8A8 of each with and without smoothing."""

    def __init__(self, calibration: Inputs, seen: Inputs):
        self.calibration, self.seen = calibration, seen
        self.kinds = seen.kinds
        self.peak = functools.lru_cache(512)(self._peak)
        self.error = functools.lru_cache(4096)(self._error)

    def settings(self) -> dict:
        """The controls of :meth:`view`, for ``explore``."""
        return {"alpha": ALPHAS, "kind": list(self.kinds), "block": list(range(len(self.seen.stack)))}

    def readers(self, kind: str) -> tuple[str, ...] | None:
        """The layers whose inputs can be smoothed together with this one's, since a norm makes them; else None."""
        for fold in self.calibration.folds(0):  # the blocks of a decoder are alike
            source = self.calibration.stack[0].get_submodule(fold.source)
            if kind in fold.readers and not is_linear(source):
                return tuple(reader for reader in fold.readers if reader in self.kinds)
        return None

    def factors(self, block: int, kind: str, alpha: float) -> torch.Tensor:
        """SmoothQuant's s of this layer (in,); ones where nothing can be folded."""
        peak, readers = self.peak(block, kind), self.readers(kind)
        if readers is None:
            return torch.ones_like(peak)
        return smoothing(peak, [self.seen.weight(block, r) for r in readers], alpha)

    def _peak(self, block: int, kind: str) -> torch.Tensor:
        """The largest |x| of each channel over the calibration, (in,)."""
        return self.calibration.of(block, kind).abs().amax(0)

    @torch.no_grad()
    def _error(self, block: int, kind: str, alpha: float | None, static: bool) -> float:
        """‖W8A8(x) - xWᵀ‖ / ‖xWᵀ‖; ``alpha=None`` is without smoothing, ``static`` takes one fixed scale."""
        if alpha is not None and self.readers(kind) is None:
            return self.error(block, kind, None, static)
        x, weight = self.seen.of(block, kind), self.seen.weight(block, kind)
        peak = self.peak(block, kind)
        s = torch.ones_like(peak) if alpha is None else self.factors(block, kind, alpha)
        layer = W8A8Linear(weight * s, activation_scale=(peak / s).max() / 127 if static else None)
        truth = x @ weight.T
        return float((layer(x / s) - truth).norm() / truth.norm())

    def view(self, alpha: float, kind: str, block: int):
        """The map before and after, the channels' largest values, the error over α, and all of it in words."""
        s = self.factors(block, kind, alpha)
        return (
            self._map(block, kind, s),
            self._channels(block, kind, s),
            self._curve(block, kind, alpha),
        ), self._sentence(block, kind, alpha, s)

    def table(self, alpha: float = 0.5) -> Table:
        """For each place in a block: its outliers, and W8A8's error with a scale per token and with one per layer."""
        rows = []
        found: dict[str, list] = {kind: [] for kind in self._places()}
        for block in range(len(self.seen.stack)):
            for kind, row in found.items():
                peak = self.peak(block, kind)
                errors = [self.error(block, kind, a, static) for static in (False, True) for a in (None, alpha)]
                row.append([float(peak.max() / peak.median().clamp(min=1e-9)), *errors])
        for kind, row in found.items():
            worst = max(range(len(row)), key=lambda b, row=row: row[b][0])
            middle = torch.tensor(row).median(0).values.tolist()
            readers = self.readers(kind)
            cells = [", ".join(readers or (kind,)), f"{middle[0]:.0f}", f"{row[worst][0]:,.0f} (block {worst})"]
            for plain, smooth in (middle[1:3], middle[3:5]):
                cells += [f"{100 * plain:.2f}", "as it is" if readers is None else f"{100 * smooth:.2f}"]
            rows.append(tuple(cells))
        head = ("input of", "largest channel, median channel = 1", "worst block")
        head += (
            "error, %: scale per token",
            f"smoothed, α = {alpha:g}",
            "error, %: one scale",
            f"smoothed, α = {alpha:g}",
        )
        return Table(head, tuple(rows), "medians over all blocks; relative RMS error of int8 × int8: measured")

    def _places(self) -> list[str]:
        """One layer for each different input of a block."""
        shown, taken = [], set()
        for kind in self.kinds:
            if kind not in taken:
                shown.append(kind)
                taken.update(self.readers(kind) or (kind,))
        return shown

    def _map(self, block: int, kind: str, s: torch.Tensor) -> go.Figure:
        x = self.seen.of(block, kind)[1 : TOKENS + 1].abs()  # the first token of a window has outliers of its own
        width = math.ceil(x.shape[1] / CELLS)
        data = []
        for values, suffix in ((x, ""), (x / s, "2")):
            short = -values.shape[1] % width
            cells = nn.functional.pad(values, (0, short)).view(len(values), -1, width).amax(-1)
            z = cells.clamp(min=1e-6).log10().tolist()
            hover = f"token %{{y}}, channels from {width}·%{{x}}: 10^%{{z:.2f}}<extra></extra>"
            data.append(heat.heat(z, LOW, HIGH, unit="log₁₀ |x|", hover=hover, suffix=suffix, bar=bool(suffix)))
        across, down = [-0.5, len(z[0]) - 0.5], [-0.5, len(z) - 0.5]
        label = f"channels, {width} to a cell"
        return go.Figure(
            data,
            layout(
                "Activations |x| before smoothing (left) and after (right), measured",
                340,
                xaxis=axis(label, domain=[0, 0.46], range=across, showgrid=False),
                yaxis=axis("tokens", range=down, showgrid=False),
                xaxis2=axis(label, domain=[0.54, 1], range=across, showgrid=False, anchor="y2"),
                yaxis2=axis(range=down, showgrid=False, anchor="x2", showticklabels=False),
            ),
        )

    def _channels(self, block: int, kind: str, s: torch.Tensor) -> go.Figure:
        """The largest values of each channel, activations and weights, sorted by the activations as they were."""
        peak, weight = self.peak(block, kind), self.seen.weight(block, kind).abs().amax(0)
        order = peak.argsort(descending=True)
        every = max(1, len(order) // 192)
        ranks = [r for r in range(len(order)) if r < 24 or r % every == 0]
        lines = (
            ("activations before", peak, theme.VERMILION, "dot"),
            ("activations after", peak / s, theme.VERMILION, None),
            ("weights before", weight, theme.BLUE, "dot"),
            ("weights after", weight * s, theme.BLUE, None),
        )
        data = [
            go.Scatter(
                name=name,
                x=[r + 1 for r in ranks],
                y=[float(f"{max(values[order[r]].item(), 1e-6):.4g}") for r in ranks],
                mode="lines",
                line={"color": color, "width": 2 if dash is None else 1.5, "dash": dash},
            )
            for name, values, color, dash in lines
        ]
        return go.Figure(
            data,
            layout(
                "Largest value of each channel (measured)",
                340,
                xaxis=axis("channels, the largest activation first", True),
                yaxis=axis("largest |value|", True),
            ),
        )

    def _curve(self, block: int, kind: str, alpha: float) -> go.Figure:
        data = []
        for name, static, color in (
            ("one scale for the layer", True, theme.ORANGE),
            ("a scale per token", False, theme.BLUE),
        ):
            y = [100 * self.error(block, kind, a, static) for a in ALPHAS]
            data.append(
                go.Scatter(name=name, x=ALPHAS, y=[float(f"{v:.4g}") for v in y], mode="lines", line_color=color)
            )
        data.append(
            go.Scatter(
                name="this α",
                x=[alpha] * 2,
                y=[t.y[ALPHAS.index(alpha)] for t in data],
                mode="markers",
                marker={"color": theme.VERMILION, "size": 10},
            )
        )
        return go.Figure(
            data,
            layout(
                "Error of this layer in W8A8 (measured)",
                340,
                xaxis=axis("α: 0 all to the activations, 1 all to the weights"),
                yaxis=axis("relative RMS error of the output, %", True),
            ),
        )

    def _sentence(self, block: int, kind: str, alpha: float, s: torch.Tensor) -> str:
        peak = self.peak(block, kind)
        spread = peak.max() / peak.median().clamp(min=1e-9)
        text = (
            f"{kind}, block {block}: its largest channel reaches {words.short(float(peak.max()))}, "
            f"{words.short(float(spread))} times the median channel. "
        )
        plain = [self.error(block, kind, None, static) for static in (False, True)]
        now = [self.error(block, kind, alpha, static) for static in (False, True)]
        if self.readers(kind) is None:
            return text + (
                "No norm feeds this layer, so SmoothQuant leaves its input as it is, whatever α: in int8 its output is "
                f"off by {_percent(now[0])} with a scale per token, and by {_percent(now[1])} with one scale for the layer."
            )
        after = peak / s
        return text + (
            f"With α = {alpha:g} that is {words.short(float(after.max() / after.median().clamp(min=1e-9)))} times. The int8 "
            f"product's error goes from {_percent(plain[0])} to {_percent(now[0])} with a scale per token, and from "
            f"{_percent(plain[1])} to {_percent(now[1])} with one scale for the layer."
        )


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
