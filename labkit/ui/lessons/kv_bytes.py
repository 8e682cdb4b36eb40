"""The bytes meter: what the KV cache holds against the length of the text, and where it outweighs the weights.

    meter = Meter(lm)
    meter.measured("KIVI 4 bits", 2048)          # bytes that a real cache of 2,048 tokens holds
    explore(meter.view, **meter.settings())

Dots are measured on real caches; the lines through them, and other models, are modelled from shapes.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping

import torch

from labkit.cache import KIVI, SnapKV, StreamingLLM, install
from labkit.measure.memory import cache_bytes
from labkit.method import Method, Recipe
from labkit.ui import need, theme, words
from labkit.ui.table import Table
from labkit.ui.theme import axis, layout
from labkit.walk import blocks

go = need("plotly.graph_objects")

FULL = "full"
METHODS: Mapping[str, Method | None] = {
    FULL: None,
    "KIVI, 8 bits": KIVI(bits=8),
    "KIVI, 4 bits": KIVI(bits=4),
    "KIVI, 2 bits": KIVI(bits=2),
    "StreamingLLM, 256 tokens": StreamingLLM(budget=256),
    "SnapKV, 256 tokens": SnapKV(budget=256),
    "SnapKV, 256 tokens, and KIVI, 4 bits": Recipe(SnapKV(budget=256), KIVI(bits=4)),
}
CONTEXTS = (128, 256, 512, 1024, 2048)
FAR = tuple(2**i for i in range(7, 21))  # tokens, up to a million


class Meter:
    """Measures caches of one model: those of its first block, times its number of blocks, for all blocks hold the same.

    ``weights``: name -> bytes, to compare the cache with; by default those of ``lm`` as they are held.
    """

    def __init__(self, lm, weights: Mapping[str, int] | None = None, contexts=CONTEXTS, methods=METHODS):
        self.lm, self.contexts, self.methods = lm, list(contexts), dict(methods)
        self.weights = dict(weights or {"weights": lm.nbytes})
        self.measured = functools.lru_cache(None)(self._measured)

    def settings(self) -> dict:
        """The controls of :meth:`view`, for ``explore``."""
        return {"cache": list(self.methods), "texts": [1, 2, 4, 8, 16, 32, 64]}

    def _measured(self, name: str, tokens: int) -> int:
        return measured(self.lm, self.methods[name], tokens)

    def modelled(self, name: str, tokens: int) -> float:
        """Bytes at any length: straight lines through what was measured, the last one drawn on."""
        known = [0, *self.contexts]
        a, b = next((pair for pair in itertools.pairwise(known) if tokens <= pair[1]), known[-2:])
        low, high = (self.measured(name, t) if t else 0 for t in (a, b))
        return low + (high - low) * (tokens - a) / (b - a)

    def crossing(self, name: str, weights: int, texts: int = 1) -> int | None:
        """The shortest context at which ``texts`` caches outweigh ``weights`` bytes; None: not at any below a billion."""
        low, high = 0, 10**9
        if texts * self.modelled(name, high) <= weights:
            return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if texts * self.modelled(name, middle) > weights else (middle, high)
        return high

    def view(self, cache: str, texts: int):
        """Bytes against context, the full cache beside the chosen one, and where they cross the weights."""
        return self.figure(cache, texts), self.sentence(cache, texts)

    def figure(self, cache: str, texts: int) -> go.Figure:
        data = []
        for name, color in ((FULL, theme.GREY), (cache, theme.BLUE))[: 1 + (cache != FULL)]:
            line = [texts * self.modelled(name, t) / 1e6 for t in FAR]
            dots = [texts * self.measured(name, t) / 1e6 for t in self.contexts]
            data.append(_line(f"{name} (modelled)", FAR, line, color))
            data.append(
                _line(f"{name} (measured)", self.contexts, dots, color) | {"mode": "markers", "showlegend": False}
            )
        for (name, held), dash, color in zip(
            self.weights.items(), ("dash", "dot", "dashdot"), (theme.VERMILION, theme.ORANGE, theme.GREEN)
        ):
            line = _line(name, (FAR[0], FAR[-1]), [held / 1e6] * 2, color)
            data.append(line | {"line": {"color": color, "width": 2, "dash": dash}})
        return go.Figure(
            data,
            layout(
                f"KV cache of {texts} text{'s' * (texts > 1)} at once: dots measured, lines modelled",
                400,
                xaxis=axis("tokens of each text", True, dtick=1),
                yaxis=axis("MB", True, dtick=1),
            ),
        )

    def sentence(self, cache: str, texts: int) -> str:
        last = self.contexts[-1]
        share = self.measured(cache, last) / self.measured(FULL, last)
        text = f"At {last:,} tokens the cache holds {words.short(texts * self.measured(cache, last) / 1e6)} MB"
        text += "." if cache == FULL else f", {words.percent(share)} of the full one's (measured)."
        for name, held in self.weights.items():
            at = self.crossing(cache, held, texts)
            weights = f"the {name} ({words.short(held / 1e6)} MB)"
            text += (
                f" It never outweighs {weights}." if at is None else f" It outweighs {weights} from {at:,} tokens on."
            )
        return text

    def table(self) -> Table:
        """Every cache at every measured length, in MB, and its share of the full one at the longest."""
        rows = []
        for name in self.methods:
            held = [self.measured(name, t) for t in self.contexts]
            share = held[-1] / self.measured(FULL, self.contexts[-1])
            rows.append((name, *(words.short(b / 1e6) for b in held), words.percent(share)))
        head = ("cache", *(f"{t:,} tokens" for t in self.contexts), "share")
        return Table(head, tuple(rows), "MB of the KV cache, one text, measured")


def measured(lm, method: Method | None, tokens: int) -> int:
    """Bytes that the cache of one text holds: measured on the first block, times the number of blocks."""
    depth = len(blocks(lm.model))
    first = lm.copy()
    del blocks(first.model)[1:]
    first.model.config.num_hidden_layers = 1
    if getattr(first.model.config, "layer_types", None):
        first.model.config.layer_types = first.model.config.layer_types[:1]
    for each in () if method is None else getattr(method, "methods", (method,)):
        install(first.model, each)
    ids = (torch.arange(tokens, device=lm.device) * 7 % lm.model.get_input_embeddings().weight.shape[0])[None]
    with torch.inference_mode():
        return depth * cache_bytes(first.model(ids, use_cache=True, logits_to_keep=1).past_key_values)


def _line(name: str, x, y, color: str) -> dict:
    return {
        "type": "scatter",
        "name": name,
        "x": [float(v) for v in x],
        "y": [float(f"{v:.4g}") for v in y],
        "mode": "lines",
        "line": {"color": color, "width": 2},
        "marker": {"color": color, "size": 8},
    }
