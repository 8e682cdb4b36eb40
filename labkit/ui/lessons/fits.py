"""Whoever repairs, learns: a layer's error on the text that a pruner has seen, and on one that it has not.

    fits = Fits(Inputs(lm, calibration), Inputs(lm, passage))
    fits.errors(tokens=384, kind="mlp.down_proj", block=3)["SparseGPT"]    # (seen, unseen), shares of the output's square
    explore(fits.view, **fits.settings())

"Fitted" is the exact least-squares optimum on the calibration for the mask it is given (``labkit.prune.repair``): nothing that
keeps the same weights can have a smaller error there.
"""

from __future__ import annotations

import functools

import torch

from labkit.prune.repair import repaired
from labkit.ui import need, plots, words
from labkit.ui.lessons.inputs import Inputs
from labkit.ui.lessons.masks import METHODS, output_error, prune
from labkit.walk import Stats

go = need("plotly.graph_objects")

ROWS = 24
REPAIRED = ", fitted"  # by least squares, for the same mask


class Fits:
    """Prunes ``rows`` evenly spaced rows of a layer, as if they were all of it, from some tokens of the calibration."""

    def __init__(self, seen: Inputs, unseen: Inputs, rows: int = ROWS):
        self.seen, self.unseen, self.rows = seen, unseen, rows
        self.errors = functools.lru_cache(256)(self._errors)

    def settings(self) -> dict:
        """The controls of :meth:`view`, for ``explore``: each number of tokens is twice the one before."""
        total, tokens = len(self.seen.of(0, self.seen.kinds[0])), []
        while total >= 48 or not tokens:
            tokens.insert(0, total)
            total //= 2
        return {"tokens": tokens, "kind": list(self.seen.kinds), "block": list(range(len(self.seen.stack)))}

    @torch.no_grad()
    def _errors(self, tokens: int, kind: str, block: int, sparsity: float = 0.5) -> dict[str, tuple[float, float]]:
        """method -> (error on the calibration, error on the unseen text), squared, as shares of the output's square."""
        x, stats = self.seen.of(block, kind), Stats()
        stats.add(x[:: max(1, len(x) // tokens)][:tokens], "hessian")
        other = self.unseen.of(block, kind)
        other = other.T @ other
        weight = self.seen.weight(block, kind)
        weight = weight[:: max(1, len(weight) // self.rows)][: self.rows]
        pruned = {method: prune(weight, stats, method, sparsity) for method in METHODS}
        tried = {method: value for method, (value, _) in pruned.items()}
        for method in METHODS[1:]:
            tried[method + REPAIRED] = repaired(weight, pruned[method][1], stats.hessian)
        return {n: tuple(output_error(v - weight, weight, g) for g in (stats.gram, other)) for n, v in tried.items()}

    def view(self, tokens: int, kind: str, block: int) -> tuple[go.Figure, str]:
        """Both errors of each method as bars, and what the difference means."""
        found = self.errors(tokens, kind, block)
        series = {
            text: {name: float(f"{100 * both[i]:.4g}") for name, both in found.items()}
            for i, text in enumerate(("on the calibration", "on a text that it has not seen"))
        }
        title = f"Squared error of {kind} in block {block}, half of the weights dropped (measured)"
        figure = plots.bars(series, "% of the output's square", title, height=340)
        text = f"Calibrated on {tokens:,} tokens, {self.seen.weight(block, kind).shape[1]:,} inputs to the layer. "
        told = [
            f"{name} {100 * found[name][0]:.3g} % there and {100 * found[name][1]:.3g} % elsewhere"
            for name in ("Wanda", "SparseGPT", "SparseGPT" + REPAIRED)
        ]
        ends = [min(found, key=lambda n, i=i: found[n][i]) for i in (0, 1)]
        return figure, f"{text}{words.sentence(words.listed(told))} Best there: {ends[0]}; best elsewhere: {ends[1]}."
