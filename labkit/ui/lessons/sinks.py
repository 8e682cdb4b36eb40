"""Attention sinks switched off: perplexity over a long text with a sliding window, with and without the first tokens.

sinks = Sinks(lm, ids, budget=256)
sinks.perplexity(0), sinks.perplexity(1)    # the newest 256 tokens; the first token and the newest 255
explore(sinks.view, slow=sinks.unread, **sinks.settings())
"""

from __future__ import annotations

import math
import threading

import torch

from labkit.cache import StreamingLLM
from labkit.measure.long_text import token_losses
from labkit.ui import need, plots, theme, words
from labkit.ui.lessons.kept_tokens import under
from labkit.ui.table import Table

go = need("plotly.graph_objects")

COUNTS = (0, 1, 2, 4, 8)
SMOOTH = 64  # tokens whose losses are averaged for the curve


class Sinks:
    """One long text, ids (1, tokens), read ``chunk`` tokens at a time; each number of sinks when it is first asked for."""

    def __init__(self, lm, ids: torch.Tensor, budget: int = 256, chunk: int = 8, counts=COUNTS):
        self.lm, self.ids, self.budget, self.chunk, self.counts = lm, ids, budget, chunk, list(counts)
        if ids.shape[1] < budget + SMOOTH:
            raise ValueError(
                f"The text has {ids.shape[1]} tokens: with budget = {budget} it must have {budget + SMOOTH} or more."
            )
        self._known: dict[int | None, torch.Tensor] = {}
        self._lock = threading.RLock()  # a slider's worker and the notebook's own thread may ask at once

    def settings(self) -> dict:
        """The controls of :meth:`view`, for ``explore``."""
        return {"sinks": self.counts}

    def unread(self, sinks: int) -> bool:
        """Whether the text has still to be read with so many sinks, without any, or with the full cache."""
        return any(count not in self._known for count in (None, 0, sinks))

    def losses(self, sinks: int | None) -> torch.Tensor:
        """Loss of each token but the first, in nats; None: the full cache."""
        with self._lock:
            if sinks not in self._known:
                method = None if sinks is None else StreamingLLM(budget=self.budget, sinks=sinks)
                small = self.lm if method is None else under(self.lm, method)
                self._known[sinks] = token_losses(small, self.ids, self.chunk)
            return self._known[sinks]

    def perplexity(self, sinks: int | None) -> float:
        """Over the tokens that come after the budget is full: before, all caches are the same."""
        return math.exp(self.losses(sinks)[self.budget :].double().mean())

    def view(self, sinks: int):
        """The loss along the text with the full cache, without sinks and with some, and the perplexities in words."""
        names = {"full cache": None, "no sinks": 0, f"{sinks} sink{'s' * (sinks > 1)}": sinks}
        return curve({name: self.losses(count) for name, count in names.items()}, self.budget), self._sentence(sinks)

    def _sentence(self, sinks: int) -> str:
        full, none, some = (self.perplexity(count) for count in (None, 0, sinks))
        text = (
            f"Perplexity after the first {self.budget} tokens, with {self.budget} tokens in the cache (measured): full cache "
            f"{words.short(full)}, the newest alone {words.short(none)}"
        )
        if sinks == 0:
            return text + "."
        back = (math.log(none) - math.log(some)) / (math.log(none) - math.log(full))
        return text + (
            f", the first {sinks if sinks > 1 else 'one'} and the newest {words.short(some)}: "
            f"{100 * back:.0f} % of the loss that the window had added is gone."
        )

    def table(self) -> Table:
        """Every number of sinks, measured."""
        rows = [("full cache", words.short(self.perplexity(None)), "")]
        for count in self.counts:
            mine = self.perplexity(count)
            rows.append(
                (f"{count} + {self.budget - count}", words.short(mine), words.ratio(mine / self.perplexity(None)))
            )
        caption = f"Perplexity of {self.ids.shape[1]:,} tokens after the first {self.budget} (measured)"
        return Table(("sinks + newest", "perplexity", "full cache = 1"), tuple(rows), caption)


def curve(losses: dict[str, torch.Tensor], budget: int) -> go.Figure:
    """The loss along the text, the mean over the last ``SMOOTH`` tokens."""
    series = {}
    for name, loss in losses.items():
        mean = loss.unfold(0, SMOOTH, SMOOTH // 8).mean(-1)
        places = [SMOOTH + i * (SMOOTH // 8) for i in range(len(mean))]
        series[name] = (places, [float(f"{v:.4g}") for v in mean])
    figure = plots.lines(
        series,
        "tokens read",
        f"loss, nats (mean over {SMOOTH})",
        "Loss along the text (measured)",
        markers=False,
        colors=(theme.GREY, theme.VERMILION, theme.BLUE),
    )
    lowest, highest = min(min(y) for _, y in series.values()), max(max(y) for _, y in series.values())
    edge = go.Scatter(
        x=[budget] * 2,
        y=[lowest, highest],
        mode="lines",
        line={"color": theme.ORANGE, "width": 1.5, "dash": "dot"},
        name="the budget is full",
    )
    return figure.add_trace(edge)
