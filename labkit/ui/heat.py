"""Heat maps: plotly's for live pages, and the same cells as SVG paths for pages that run no script."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from labkit.ui import need, theme

go = need("plotly.graph_objects")

SHADES = 16  # colours of the static twin
SIGNED = ((0.0, theme.BLUE), (0.5, "#f4f4f4"), (1.0, theme.VERMILION))  # below zero, zero, above
GROWING = ((0.0, "#f4f4f4"), (0.35, theme.SKY), (0.7, theme.BLUE), (1.0, "#1b1b3a"))


def heat(
    z: Sequence[Sequence[float]],
    low: float,
    high: float,
    colors=GROWING,
    unit: str = "",
    hover: str = "%{x}, %{y}: %{z:.3g}<extra></extra>",
    suffix: str = "",
    bar: bool = True,
) -> go.Heatmap:
    """One heat map from rows of numbers; values beyond ``low`` and ``high`` get the end's colour. ``suffix``: its subplot."""
    rows = [[None if v is None or not math.isfinite(v) else float(f"{v:.3g}") for v in row] for row in z]
    return go.Heatmap(
        x=list(range(len(rows[0]))),
        y=list(range(len(rows))),
        z=rows,
        zmin=low,
        zmax=high,
        colorscale=[list(c) for c in colors],
        showscale=bar,
        colorbar={"title": {"text": unit, "side": "right"}, "thickness": 10, "len": 0.9} if bar else None,
        hovertemplate=hover,
        xaxis="x" + suffix,
        yaxis="y" + suffix,
    )


def mark(x: Sequence[float], y: Sequence[float], width: float = 3) -> go.Scatter:
    """An orange line over a heat map, between the points (x[i], y[i]): where the view is now."""
    line = {"color": theme.ORANGE, "width": width}
    return go.Scatter(x=list(x), y=list(y), mode="lines", line=line, showlegend=False, hoverinfo="skip")


def cells(trace, px, py) -> str:
    """A heat map's cells as one SVG path for each shade; ``px`` and ``py`` map data to pixels."""
    paths: dict[int, list[str]] = {}
    for y, row in zip(trace.y, trace.z):
        top, bottom = sorted((py(y - 0.5), py(y + 0.5)))
        shades = [None if z is None else _shade((z - trace.zmin) / ((trace.zmax - trace.zmin) or 1.0)) for z in row]
        for shade, run in itertools.groupby(zip(trace.x, shades), key=lambda pair: pair[1]):
            xs = [x for x, _ in run]  # neighbours of one shade are one box
            left, right = px(xs[0] - 0.5), px(xs[-1] + 0.5)
            if shade is not None:
                paths.setdefault(shade, []).append(f"M{left:.1f} {top:.1f}H{right:.1f}V{bottom:.1f}H{left:.1f}")
    scale = [tuple(c) for c in trace.colorscale]
    return "".join(f"<path fill='{mix(scale, s / (SHADES - 1))}' d='{''.join(d)}'/>" for s, d in sorted(paths.items()))


def _shade(share: float) -> int:
    return round(min(max(share, 0.0), 1.0) * (SHADES - 1))


def mix(scale: Sequence[tuple[float, str]], at: float) -> str:
    """The colour at a share of a scale of (share, "#rrggbb")."""
    for (a, first), (b, last) in itertools.pairwise(scale):
        if at <= b:
            t = (at - a) / ((b - a) or 1.0)
            parts = (round((1 - t) * int(first[i : i + 2], 16) + t * int(last[i : i + 2], 16)) for i in (1, 3, 5))
            return "#" + "".join(f"{p:02x}" for p in parts)
    return scale[-1][1]
