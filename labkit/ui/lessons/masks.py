"""Which weights a pruner drops: a slice of a real layer under its mask, and what the choice costs at the layer's output.

    masks = Masks(Inputs(lm, windows))
    masks.error(block=3, kind="mlp.down_proj", method="Wanda", sparsity=0.5, pattern="2:4")   # share of the output's square
    explore(masks.view, **masks.settings())

What the inputs say (XᵀX and its factor) is computed once for each layer; a moved slider only prunes the slice again.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from labkit.prune.common import keep_mask, parse_pattern
from labkit.prune.sparsegpt import sparsegpt
from labkit.ui import heat, need, theme, words
from labkit.ui.lessons.inputs import Inputs
from labkit.ui.theme import axis, layout
from labkit.walk import Stats

go = need("plotly.graph_objects")

METHODS = ("magnitude", "Wanda", "SparseGPT")
PATTERNS = ("unstructured", "2:4", "4:8")
SPARSITIES = [round(0.1 * i, 1) for i in range(1, 10)]
ROWS, COLUMNS = 64, 576  # of the slice that is pruned
SHOWN, ACROSS = 24, 64  # rows and columns of it that the picture shows
KEPT = (
    (0.0, theme.BLUE),
    (0.4999, "#bcdcf0"),
    (0.5001, "#f7d3b8"),
    (1.0, theme.VERMILION),
)  # no white: kept is coloured
DROPPED = ((0.0, "#dcdcdc"), (1.0, "#4a4a4a"))  # the darker, the larger was the weight that is gone
BINS, DECADES = 48, 3.0  # of a histogram; it shows this many powers of ten on either side of the median


@dataclass(frozen=True)
class Slice:
    """Some rows of a layer, neighbouring columns of it with the largest input among them, and what these inputs say."""

    weight: torch.Tensor  # (rows, columns)
    stats: Stats
    start: int  # the layer's column with which the slice starts
    first: int  # the slice's column with which the picture starts


class Masks:
    """Prunes a slice of each layer as if it were all of it: ``rows`` evenly spaced rows, and ``columns`` neighbours."""

    def __init__(self, inputs: Inputs, rows: int = ROWS, columns: int = COLUMNS):
        self.inputs, self.rows, self.columns = inputs, rows, columns
        self.slice = functools.lru_cache(8)(self._slice)
        self.pruned = functools.lru_cache(96)(self._pruned)
        self.error = functools.lru_cache(4096)(self._error)

    def settings(self) -> dict:
        """The controls of :meth:`view`, for ``explore``."""
        return {
            "sparsity": SPARSITIES,
            "pattern": list(PATTERNS),
            "method": list(METHODS),
            "row": list(range(min(SHOWN, self.rows))),
            "kind": list(self.inputs.kinds),
            "block": list(range(len(self.inputs.stack))),
        }

    def _slice(self, block: int, kind: str) -> Slice:
        x, weight, stats = self.inputs.of(block, kind), self.inputs.weight(block, kind), Stats()
        start = _window(int(x.square().sum(0).argmax()), self.columns, x.shape[1])
        stats.add(x[:, start : start + self.columns], "hessian")
        weight = weight[:: max(1, len(weight) // self.rows)][: self.rows, start : start + self.columns]
        largest = int(stats.channel_norm.argmax())
        return Slice(weight, stats, start, _window(largest, ACROSS, weight.shape[1]))

    def _pruned(self, block: int, kind: str, method: str, sparsity: float, pattern: str):
        part = self.slice(block, kind)
        return prune(part.weight, part.stats, method, sparsity, parse_pattern(pattern))

    def _error(self, block: int, kind: str, method: str, sparsity: float, pattern: str) -> float:
        part = self.slice(block, kind)
        weight, _ = self.pruned(block, kind, method, sparsity, pattern)
        return output_error(weight - part.weight, part.weight, part.stats.gram)

    def view(self, sparsity: float, pattern: str, method: str, row: int, kind: str, block: int):
        """The slice under the mask, one row under three masks, the scores, and what it costs in words."""
        part = self.slice(block, kind)
        masks = {m: self.pruned(block, kind, m, sparsity, pattern)[1] for m in METHODS}
        figures = (picture(part, masks[method], method), one_row(part, masks, row), scores(part, sparsity, pattern))
        errors = {m: self.error(block, kind, m, sparsity, pattern) for m in METHODS}
        return figures, sentence(part, masks, errors, method, pattern, kind, block)


@torch.no_grad()
def prune(weight: torch.Tensor, stats: Stats, method: str, sparsity: float, pattern: tuple[int, int] | None = None):
    """(pruned weight, mask of what is kept), both (out, in), by one of ``METHODS`` as its paper defines it."""
    if method == "SparseGPT":
        return sparsegpt(weight, stats, sparsity, pattern)[:2]
    if method == "Wanda":
        keep = keep_mask(weight.abs() * stats.channel_norm, sparsity, pattern, "row")
    elif method == "magnitude":
        keep = keep_mask(weight.abs(), sparsity, pattern, "matrix")
    else:
        raise ValueError(f"method = {method!r} is not allowed: it must be one of {', '.join(METHODS)}.")
    return weight * keep, keep


def output_error(change: torch.Tensor, weight: torch.Tensor, gram: torch.Tensor) -> float:
    """‖X Δᵀ‖² / ‖X Wᵀ‖² for a change and a weight (out, in), from gram = XᵀX (in, in)."""
    energy, total = (float(((w @ gram) * w).sum().clamp(min=0)) for w in (change, weight))
    return energy / max(total, 1e-30)


def picture(part: Slice, keep: torch.Tensor, method: str) -> go.Figure:
    """The weights of the first rows: kept ones in colour, dropped ones in grey."""
    columns = slice(part.first, part.first + ACROSS)
    weight, keep = part.weight[:SHOWN, columns], keep[:SHOWN, columns]
    reach = 2.5 * float(part.weight.square().mean().sqrt())
    hover = "column %{x}, row %{y}: %{z:.3g}<extra></extra>"
    rows, across = weight.shape
    return go.Figure(
        [*_two(weight, keep, reach, hover)],
        layout(
            f"Weights under the mask of {method}: colour = kept, grey = dropped (measured)",
            360,
            xaxis=axis(_columns(part), range=[-0.5, across - 0.5], showgrid=False),
            yaxis=axis("rows of the slice", range=[-0.5, rows - 0.5], showgrid=False),
        ),
    )


def one_row(part: Slice, masks: dict[str, torch.Tensor], row: int) -> go.Figure:
    """The same columns of one row under each mask, and below them how large the inputs are."""
    columns = slice(part.first, part.first + ACROSS)
    weight = part.weight[row, columns].repeat(len(masks), 1)
    keep = torch.stack([mask[row, columns] for mask in masks.values()]).flip(0)
    reach = 2.5 * float(part.weight.square().mean().sqrt())
    norm = part.stats.channel_norm[columns].clamp(min=1e-9)
    blank = torch.full_like(weight, torch.nan)
    nan = torch.full((1, weight.shape[1]), torch.nan)
    strip = torch.cat([(norm / norm.median()).log2()[None], nan, blank]).tolist()
    data = [
        heat.heat(strip, -3, 3, heat.GROWING, hover="column %{x}: ‖x‖ 2^%{z:.1f} medians<extra></extra>", bar=False)
    ]
    for trace in _two(
        torch.cat([nan, nan, weight]), torch.cat([nan > 0, nan > 0, keep]), reach, "%{z:.3g}<extra></extra>"
    ):
        trace.showscale = False
        data.append(trace)
    names = ["‖x‖", "", *reversed(masks)]
    notes = [
        {"x": -0.005, "y": y, "xref": "paper", "yref": "y", "text": name, "showarrow": False}
        | {"xanchor": "right", "yanchor": "middle", "font": {"size": 9.5}}
        for y, name in enumerate(names)
        if name
    ]
    return go.Figure(
        data,
        layout(
            f"Row {row} of the slice under the three masks (measured)",
            250,
            xaxis=axis(_columns(part), range=[-0.5, weight.shape[1] - 0.5], showgrid=False),
            yaxis=axis(range=[-0.5, len(names) - 0.5], showgrid=False, showticklabels=False),
            annotations=notes,
            margin={"l": 80, "r": 12, "t": 40, "b": 44},
        ),
    )


def scores(part: Slice, sparsity: float, pattern: str) -> go.Figure:
    """Histograms of |w| and of |w|·‖x‖ over the slice, with what is dropped to the left of the line."""
    found = {"|w|": part.weight.abs(), "|w|·‖x‖": part.weight.abs() * part.stats.channel_norm}
    data = []
    for (name, values), suffix, color in zip(found.items(), ("", "2"), (theme.ORANGE, theme.BLUE)):
        log = (values / values.median().clamp(min=1e-30)).clamp(min=1e-9).log10()
        counts = torch.histc(log.clamp(-DECADES, DECADES), BINS, -DECADES, DECADES) / log.numel()
        step = 2 * DECADES / BINS
        middles = [round(-DECADES + (i + 0.5) * step, 4) for i in range(BINS)]
        shares = [float(f"{100 * c:.4g}") for c in counts.tolist()]
        where = {"xaxis": "x" + suffix, "yaxis": "y" + suffix}
        data.append(go.Bar(name=name, x=middles, y=shares, marker_color=color, showlegend=False, **where))
        if pattern != "unstructured":
            continue
        # One threshold for |w| in the whole slice; one in each row for |w|·‖x‖, of which the outermost are dotted.
        rows = log.flatten()[None] if name == "|w|" else log
        at = rows.sort(1).values[:, min(int(sparsity * rows.shape[1] + 1e-9), rows.shape[1] - 1)]
        lines = [(float(at.median()), None)] if len(rows) == 1 else [(float(at.min()), "dot"), (float(at.max()), "dot")]
        lines = lines if len(rows) == 1 else [(float(at.median()), None), *lines]
        top = 1.05 * max(shares)
        for x, dash in lines:
            style = {"color": theme.VERMILION, "width": 2 if dash is None else 1, "dash": dash}
            line = {"x": [round(x, 4)] * 2, "y": [0, top], "mode": "lines", "line": style, "showlegend": False}
            data.append(go.Scatter(name="threshold", hoverinfo="skip", **line, **where))
    label = " in medians, powers of ten"
    span = [-DECADES, DECADES]
    return go.Figure(
        data,
        layout(
            "The two scores; left of the line is dropped (measured)"
            if pattern == "unstructured"
            else f"The two scores; with {pattern} every group has a threshold of its own (measured)",
            300,
            barmode="group",
            bargap=0,
            xaxis=axis(f"|w|{label}", domain=[0, 0.46], range=span),
            yaxis=axis("% of the weights", rangemode="tozero"),
            xaxis2=axis(f"|w|·‖x‖{label}", domain=[0.54, 1], range=span, anchor="y2"),
            yaxis2=axis(anchor="x2", rangemode="tozero"),
        ),
    )


def sentence(
    part: Slice, masks: dict, errors: dict[str, float], method: str, pattern: str, kind: str, block: int
) -> str:
    keep = masks[method]
    dropped = float((~keep).float().mean())
    rows, columns = keep.shape
    text = f"{kind} of block {block}, {rows} of its rows and {columns} of its columns. {method} drops {words.percent(dropped)}"
    text += f", as {pattern} demands. " if pattern != "unstructured" else " of the weights. "
    told = words.listed([f"{_percent(e)} by {name}" for name, e in errors.items()])
    text += (
        f"The layer's output changes by {told} (squared error on the calibration, as a share of the output's square)."
    )
    both = masks["magnitude"] & masks["Wanda"]
    same = float(both.sum() / masks["magnitude"].sum().clamp(min=1))
    return text + f" Of what magnitude keeps, Wanda keeps {words.percent(same)}."


def _two(weight: torch.Tensor, keep: torch.Tensor, reach: float, hover: str):
    """Two heat maps on top of each other: what is kept, and what is dropped by its size."""
    gone = weight.abs().masked_fill(keep, torch.nan).tolist()
    yield heat.heat(weight.masked_fill(~keep, torch.nan).tolist(), -reach, reach, KEPT, "weight", hover)
    yield heat.heat(gone, 0, reach, DROPPED, hover=hover.replace("%{z", "dropped, |w| %{z"), bar=False)


def _window(around: int, width: int, total: int) -> int:
    """Where ``width`` of ``total`` neighbours start that have ``around`` in their middle; whole groups of 2:4 and 4:8."""
    return min(max(around - width // 2, 0), max(total - width, 0)) // 8 * 8


def _columns(part: Slice) -> str:
    largest = int(part.stats.channel_norm.argmax()) - part.first
    return f"columns from {part.start + part.first} on; number {largest} here has the largest input"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
