"""KIVI: why keys are rounded in groups of tokens and values in groups of channels, and what both cost.

cached = Cached(lm, ids)                       # the keys and values of one prompt, as the cache holds them
explore(cached.view, **cached.settings())
found = compare(lm, windows)                   # KL and bytes of each setting, measured
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from labkit.cache import KIVI
from labkit.measure import divergence
from labkit.ui import heat, need, plots, theme, words
from labkit.ui.lessons.kv_bytes import measured
from labkit.ui.table import Table
from labkit.ui.theme import axis, layout

go = need("plotly.graph_objects")

SETTINGS: Mapping[str, KIVI] = {
    "8 bits": KIVI(bits=8),
    "4 bits": KIVI(bits=4),
    "2 bits": KIVI(bits=2),
    "2 bits, keys per token": KIVI(bits=2, keys="token"),
}


class Cached:
    """Keys and values after the prompt ids (1, tokens), (layers that have them, kv_heads, tokens, head_dim), fp32."""

    def __init__(self, lm, ids: torch.Tensor):
        with torch.inference_mode():
            cache = lm.model(ids.to(lm.device), use_cache=True, logits_to_keep=1).past_key_values
        self.keys, self.values = (
            torch.stack([getattr(x, n)[0].float() for x in cache.layers if hasattr(x, n)]) for n in ("keys", "values")
        )

    def settings(self) -> dict:
        """The controls of :meth:`view`, for ``explore``."""
        layers, heads = self.keys.shape[:2]
        return {"bits": [2, 4, 8], "layer": list(range(layers)), "head": list(range(heads))}

    def error(self, what: str, by_channel: bool, bits: int, layer: int, head: int, group_size: int = 32) -> float:
        """‖x - rounded‖² / ‖x‖² of the "keys" or "values" of one head, by KIVI's own store; whole groups of tokens count."""
        x = getattr(self, what)[layer, head][None, None]
        x = x[:, :, : x.shape[2] // group_size * group_size]
        store = KIVI(bits=bits, group_size=group_size, residual=group_size).stores()[0]
        store.by_channel, store.residual = by_channel, group_size if by_channel else 0
        store.append(x)
        store.settle(None)
        return float((store.read() - x).square().sum() / x.square().sum())

    def view(self, bits: int, layer: int, head: int):
        """Keys and values of one head as heat maps, and what rounding them either way costs."""
        maps = tuple(
            magnitudes(getattr(self, what)[layer, head], f"{what.title()}, layer {layer}, KV head {head}")
            for what in ("keys", "values")
        )
        errors = {(w, c): self.error(w, c, bits, layer, head) for w in ("keys", "values") for c in (True, False)}
        said = [
            f"{what} {words.percent(errors[what, True])} in groups of tokens per channel, "
            f"{words.percent(errors[what, False])} in groups of channels per token"
            for what in ("keys", "values")
        ]
        peak = self.keys[layer, head].abs().mean(0)
        return maps, (
            f"Squared error of {bits} bits, groups of 32 (measured): {'; '.join(said)}. The largest channel of these keys is "
            f"{words.short(float(peak.max() / peak.median()))} times the median one."
        )


def magnitudes(x: torch.Tensor, title: str) -> go.Figure:
    """|x| of (tokens, channels): a stripe is a channel that is large for every token."""
    x = x.abs()[:: max(1, len(x) // 48)]
    high = float(x.flatten().quantile(0.995))
    hover = "channel %{x}, row %{y}: %{z:.2f}<extra></extra>"
    return go.Figure(
        [heat.heat(x.tolist(), 0.0, high or 1.0, unit="|x|", hover=hover)],
        layout(
            title,
            320,
            xaxis=axis("channel", range=[-0.5, x.shape[1] - 0.5], showgrid=False),
            yaxis=axis("token, evenly spaced", range=[len(x) - 0.5, -0.5], showgrid=False),
        ),
    )


@dataclass(frozen=True)
class Found:
    """One setting of KIVI, measured: KL to the full cache in nats per token, and bytes over those of a bf16 cache."""

    name: str
    kl: float
    kl_se: float
    top1: float
    share: float


def compare(lm, windows: torch.Tensor, residual: int = 128, tokens: int = 2048, settings=SETTINGS) -> list[Found]:
    """Each setting on windows (windows, length), of which half is the prompt; bytes of a cache of ``tokens`` tokens."""
    found = []
    half = 2 / lm.model.get_output_embeddings().weight.element_size()  # a bf16 cache, of the one that the model has
    for name, method in settings.items():
        method = replace(method, residual=residual)
        d = divergence(method(lm, progress=False), lm, windows)
        share = measured(lm, method, tokens) / measured(lm, None, tokens) / half
        found.append(Found(name, d.kl, d.kl_se, d.top1, share))
    return found


def table(found: Sequence[Found], caption: str = "") -> Table:
    rows = []
    for f in found:
        kl = f"{words.short(f.kl)} ± {words.short(f.kl_se)}" if f.kl_se else words.short(f.kl)  # one window: no spread
        rows.append((f.name, kl, words.percent(f.top1), f"{f.share:.2f}"))
    head = ("KIVI", "KL, nats per token", "same top token", "bytes, bf16 cache = 1")
    return Table(head, tuple(rows), caption or "Rounded caches against the full one (measured)")


def bars(found: Sequence[Found]) -> go.Figure:
    return plots.bars(
        {"KL": {f.name: float(f"{f.kl:.4g}") for f in found}},
        "KL, nats per token",
        "What rounding the cache costs (measured)",
        {"KL": {f.name: f.kl_se for f in found}},
        colors=(theme.BLUE,),
    )
