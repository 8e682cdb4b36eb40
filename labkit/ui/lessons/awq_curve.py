"""AWQ's search, seen: the error of a module's output at each exponent of its 20-point grid.

curves = Curves(Inputs(lm, windows))
curves.search(block=3, bits=4)["mlp.down_proj"].losses
explore(curves.view, **curves.settings())
"""

from __future__ import annotations

import functools

import torch

from labkit.fold import in_float32
from labkit.formats import Integer
from labkit.linear import exact
from labkit.quantize.awq import WINDOWS, Search, best_factors
from labkit.ui import need, theme, words
from labkit.ui.lessons.inputs import Inputs
from labkit.ui.theme import axis, layout

go = need("plotly.graph_objects")

GROUP = 64


class Curves:
    """The searches of :func:`labkit.quantize.awq.best_factors`, for every fold of a block, on an uncompressed model."""

    def __init__(self, inputs: Inputs, windows: int = WINDOWS):
        self.inputs, self.windows = inputs, windows
        self.search = functools.lru_cache(128)(self._search)

    def settings(self) -> dict:
        """The controls of :meth:`view`, for ``explore``."""
        return {"block": list(range(len(self.inputs.stack))), "bits": [2, 3, 4]}

    @exact()
    @torch.no_grad()
    def _search(self, block: int, bits: int) -> dict[str, Search]:
        """By the layers that read the scaled input: "self_attn.q_proj, self_attn.k_proj, self_attn.v_proj"."""
        form, module = Integer(bits, GROUP), in_float32(self.inputs.stack[block])
        with self.inputs.lock:

            def run() -> torch.Tensor:
                return self.inputs.run(block, self.windows, module)

            return {", ".join(fold.readers): best_factors(module, fold, run, form) for fold in self.inputs.folds(block)}

    def view(self, block: int, bits: int):
        """The curves of one block, as shares of the error at exponent 0, which is plain rounding; and what they say."""
        found = self.search(block, bits)
        data, parts = [], []
        for (name, search), color in zip(found.items(), theme.SERIES):
            shares = [loss / max(search.losses[0], 1e-30) for loss in search.losses]
            best = shares.index(min(shares))
            label = ", ".join(n.rsplit(".", 1)[-1] for n in name.split(", "))
            data.append(
                go.Scatter(
                    name=label,
                    x=search.exponents,
                    y=[float(f"{s:.4g}") for s in shares],
                    mode="lines+markers",
                    line_color=color,
                )
            )
            parts.append(
                f"{label} at r = {search.exponents[best]:g}, where {words.percent(shares[best])} of the error is left"
            )
        figure = go.Figure(
            data,
            layout(
                f"Error of the module's output, block {block}, {bits} bits (measured)",
                380,
                xaxis=axis("exponent r of the factors mean|x|^r; 0 is plain rounding"),
                yaxis=axis("squared error, exponent 0 = 1", True),
            ),
        )
        return figure, f"Block {block} at {bits} bits, groups of {GROUP}. The best exponents: {words.listed(parts)}."
