"""Small plotly figures, each a pure function that returns a ``go.Figure``.

Data are plain lists, so that a figure stays a few KB of JSON in a saved notebook.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from labkit.ui import need, theme
from labkit.ui.theme import axis, layout

go = need("plotly.graph_objects")


def bars(
    values: Mapping[str, Mapping[str, float]],
    unit: str,
    title: str = "",
    errors: Mapping[str, Mapping[str, float]] | None = None,
    log: bool = False,
    stacked: bool = False,
    colors: Sequence[str] = theme.SERIES,
    height: int = 300,
) -> go.Figure:
    """Grouped or stacked bars from ``{series: {category: value}}``; ``errors`` has the same shape.

    >>> bars({"fp32": {"decode": 55.0}, "4-bit": {"decode": 21.0}}, unit="ms per token")
    """
    data = []
    for (name, row), color in zip(values.items(), _cycle(colors, len(values))):
        band = (errors or {}).get(name)
        data.append(
            go.Bar(
                name=name,
                x=list(row),
                y=[float(v) for v in row.values()],
                error_y={"type": "data", "array": [float(band.get(c, 0)) for c in row]} if band else None,
                marker_color=color,
            )
        )
    return go.Figure(
        data,
        layout(title, height, barmode="stack" if stacked else "group", xaxis=axis(), yaxis=axis(unit, log)),
    )


def lines(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    x: str,
    y: str,
    title: str = "",
    logx: bool = False,
    logy: bool = False,
    markers: bool = True,
    colors: Sequence[str] = theme.SERIES,
    height: int = 340,
) -> go.Figure:
    """Lines from ``{name: (xs, ys)}``; ``x`` and ``y`` are axis titles with units."""
    data = [
        go.Scatter(
            name=name, x=_floats(xs), y=_floats(ys), mode="lines+markers" if markers else "lines", line_color=color
        )
        for (name, (xs, ys)), color in zip(series.items(), _cycle(colors, len(series)))
    ]
    return go.Figure(data, layout(title, height, xaxis=axis(x, logx), yaxis=axis(y, logy)))


def histogram(
    series: Mapping[str, Sequence[float]],
    x: str,
    title: str = "",
    bins: int = 60,
    log: bool = False,
    height: int = 300,
) -> go.Figure:
    """Histograms of ``{name: numbers}`` over common bins, as shares of each series; counted here, not in the page.

    A weight matrix holds millions of numbers: the figure keeps ``bins`` of them.
    """
    import numpy as np

    arrays = {name: np.asarray(values, dtype=np.float64).ravel() for name, values in series.items()}
    if not arrays or any(a.size == 0 for a in arrays.values()):
        raise ValueError("histogram needs at least one series, and no series may be empty.")
    finite = {name: a[np.isfinite(a)] for name, a in arrays.items()}
    edges = np.histogram_bin_edges(np.concatenate(list(finite.values())), bins=bins)
    middle = (edges[:-1] + edges[1:]) / 2
    data = [
        go.Bar(
            name=name,
            x=[float(f"{m:.6g}") for m in middle],
            y=[float(f"{c / max(values.size, 1):.4g}") for c in np.histogram(values, edges)[0]],
            marker_color=color,
            opacity=0.6 if len(finite) > 1 else 1.0,
        )
        for (name, values), color in zip(finite.items(), _cycle(theme.SERIES, len(finite)))
    ]
    return go.Figure(
        data,
        layout(title, height, barmode="overlay", bargap=0, xaxis=axis(x), yaxis=axis("share of values", log)),
    )


def roofline(
    roof,
    points: Mapping[str, tuple[float, float]] | Sequence[Mapping] = (),
    catalogue: Mapping[str, object] | None = None,
    title: str = "",
    dtypes: Sequence[str] | None = None,
    height: int = 460,
) -> go.Figure:
    """The roofline of a machine (Williams, Waterman and Patterson, 2009, CACM 52(4)) with measured dots under it.

    ``roof``: a ``labkit.measure.roofline.Roofline``.
    ``points``: ``{name: (intensity, speed)}``, FLOP per byte and FLOP/s; or dicts with ``name``, ``intensity``,
    ``speed`` and, if wanted, ``dtype`` (the peak it is held against), ``group`` (a colour and legend entry each, such
    as "prefill" and "decode") and ``note`` (shown when hovering).
    ``catalogue``: other machines by name (``labkit.measure.roofline.catalogue()`` or part of it), thin and dashed.
    ``dtypes``: which of the machine's peaks to draw; all of them by default.
    """
    if isinstance(points, Mapping):
        points = [{"name": name, "intensity": i, "speed": s} for name, (i, s) in points.items()]
    names = list(dtypes or roof.peaks)
    low = min([0.1, *(p["intensity"] / 2 for p in points)])
    high = max([1000.0, *(4 * roof.ridge(d) for d in names), *(2 * p["intensity"] for p in points)])
    data, labels = [], {}
    for other in (catalogue or {}).values():
        dtype = next((d for d in (*names, "bf16", "fp16", *other.peaks) if d in other.peaks), None)
        label = f"{other.name}, {dtype or 'bandwidth alone'}"
        line = _roof(other, dtype, f"{label} ({other.label})", low, high, theme.GREY, 1.2, "dash")
        data.append(line | {"name": f"others ({other.label})", "legendgroup": "others", "showlegend": not labels})
        labels[label] = line["y"][-1]
    for dtype, color in zip(names, _cycle((theme.BLUE, theme.SKY, theme.GREEN), len(names))):
        data.append(_roof(roof, dtype, f"{dtype} ({roof.label})", low, high, color, 3, "solid"))
    groups = list(dict.fromkeys(p.get("group", "measured") for p in points))
    for group, color in zip(groups, _cycle((theme.VERMILION, theme.ORANGE, theme.PURPLE), len(groups))):
        mine = [p for p in points if p.get("group", "measured") == group]
        data.append(
            {
                "type": "scatter",
                "name": group,
                "x": [float(p["intensity"]) for p in mine],
                "y": [float(p["speed"]) / 1e9 for p in mine],
                "mode": "markers+text",
                "text": [p["name"] for p in mine],
                "textposition": "bottom right",
                "textfont": {"size": 11},
                "hovertext": [_hover(roof, p, names) for p in mine],
                "hoverinfo": "text",
                "marker": {"color": color, "size": 10, "line": {"width": 1, "color": "white"}},
            }
        )
    speeds = [y for trace in data for y in trace["y"] if y > 0] or [1.0]
    span = [math.log10(min(speeds)) - 0.1, math.log10(max(speeds)) + 0.3]
    room = height - 84 - 48
    notes = []
    # Named beside the plot and pushed apart: a legend could not tell ten grey lines from each other.
    for label, y in _apart(labels, 13 * (span[1] - span[0]) / room, span[1]).items():
        notes.append(_note(label, 1.005, y, "left") | {"xref": "paper", "yanchor": "middle"})
    if names:
        ridge, peak = roof.ridge(names[0]), roof.peak(names[0])
        notes.append(_note(f"ridge: {ridge:.3g} FLOP/byte", math.log10(ridge), math.log10(peak / 1e9), "left"))
    return go.Figure(
        data,
        layout(
            title or f"Roofline of {roof.name}: {roof.bandwidth / 1e9:.1f} GB/s",
            height,
            xaxis=axis("arithmetic intensity, FLOP per byte", True, range=[math.log10(low), math.log10(high)], dtick=1),
            yaxis=axis("speed, GFLOP/s", True, range=span, dtick=1),
            annotations=notes,
            margin={"l": 64, "r": 16 + round(5.4 * max(map(len, labels), default=0)), "t": 84, "b": 48},
        ),
    )


def _roof(machine, dtype: str | None, label: str, low: float, high: float, color: str, width: float, dash: str) -> dict:
    """A roof: the bandwidth slope up to the ridge, then the flat peak; hovering says what limits there."""
    ridge = machine.ridge(dtype) if dtype else math.inf
    xs = sorted({low, high, *(x for x in (1.0, 10.0, 100.0, ridge) if low < x < high)})
    ys = [machine.attainable(x, dtype) / 1e9 for x in xs]
    limits = ["memory bandwidth" if x < ridge else "arithmetic" for x in xs]
    return {
        "type": "scatter",
        "name": label,
        "x": xs,
        "y": ys,
        "mode": "lines",
        "line": {"color": color, "width": width, "dash": dash},
        "hovertext": [
            f"{label}<br>at {x:.3g} FLOP/byte: {y:,.1f} GFLOP/s<br>limited by {limit}"
            for x, y, limit in zip(xs, ys, limits)
        ],
        "hoverinfo": "text",
    }


def _note(text: str, x: float, y: float, xanchor: str) -> dict:
    """A small text; plotly places annotations on log axes by their exponent."""
    place = {"x": x, "y": y, "xref": "x", "yref": "y", "xanchor": xanchor, "yanchor": "bottom"}
    return place | {"text": text, "showarrow": False, "font": {"size": 10}}


def _apart(labels: Mapping[str, float], gap: float, top: float) -> dict[str, float]:
    """Heights in powers of ten for labels at these values, in their order, at least ``gap`` apart, none over ``top``."""
    places, ceiling = {}, top
    for label, value in sorted(labels.items(), key=lambda item: -item[1]):
        places[label] = min(math.log10(value), ceiling)
        ceiling = places[label] - gap
    return places


def _hover(roof, point: Mapping, dtypes: Sequence[str]) -> str:
    dtype = point.get("dtype") or (dtypes[0] if dtypes else None)
    best = roof.attainable(point["intensity"], dtype)
    rows = [
        f"<b>{point['name']}</b>",
        f"{point['intensity']:.3g} FLOP/byte, {point['speed'] / 1e9:,.1f} GFLOP/s",
        f"{100 * point['speed'] / best:.0f} % of what the roof allows" + (f" ({dtype})" if dtype else ""),
    ]
    return "<br>".join(rows + ([point["note"]] if point.get("note") else []))


def _floats(values) -> list[float]:
    return [float(v) for v in values]


def _cycle(colors: Sequence[str], count: int) -> list[str]:
    return [colors[i % len(colors)] for i in range(count)]
