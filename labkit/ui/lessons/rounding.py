"""Notebook 02's views: a model's weights on the grid of a number format, and what the rounding costs.

    rounding = Rounding(lm)
    rounding.error(NF4())                    # root mean square error over all layers, as a share of the weights'
    rounding.bits(NF4())                     # true bits per weight, metadata counted
    explore(rounding.view, **rounding.settings())

Errors and bits are measured: weights are really rounded and really encoded.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from labkit import formats
from labkit.formats import FP4, MXFP4, NF4, NVFP4, Affine, Float8, Format, Integer
from labkit.progress import track
from labkit.quantize import RTN
from labkit.quantize.common import format_of
from labkit.ui import need, theme, words
from labkit.ui.lessons.inputs import kinds_of
from labkit.ui.table import Table
from labkit.ui.theme import axis, layout
from labkit.walk import blocks, is_linear, weight_of

go = need("plotly.graph_objects")

ROWS = 16  # of each layer, evenly spread: what errors over all layers are measured on
SIZES = (16, 32, 64, 96, 192, None)  # group sizes that divide 576 columns; None: the whole row

FOUR_BITS: dict[str, Format] = {
    "int4": Integer(4, 64),
    "affine 4": Affine(4, 64),
    "fp4": FP4(64),
    "mxfp4": MXFP4(),
    "nvfp4": NVFP4(),
    "nf4": NF4(),
}
OTHERS = {name: FOUR_BITS[name] for name in ("fp4", "mxfp4", "nvfp4", "nf4")}
EIGHT_BITS: dict[str, Format] = {
    "int8": Integer(8, None, symmetric=True),
    "fp8 e4m3": Float8("e4m3"),
    "fp8 e5m2": Float8("e5m2"),
}


@dataclass(frozen=True)
class Rounded:
    """One weight matrix in one format."""

    params: formats.Params  # of each group, as stored
    error: float  # ‖w - ŵ‖ / ‖w‖
    clipped: float  # share of weights more than half a step beyond the ends of their grid


@dataclass(frozen=True)
class Point:
    """One setting of a format over the whole model."""

    name: str
    bits: float  # true bits per weight
    error: float


class Rounding:
    """A model's linear layers under any number format. What was computed for a format is remembered.

    ``kinds``: the layers that all blocks have, which errors are measured on; bits are counted over all layers.
    """

    def __init__(self, lm, rows: int = ROWS):
        self.lm = lm
        self._blocks = [{name: m for name, m in block.named_modules() if is_linear(m)} for block in blocks(lm.model)]
        self.kinds = kinds_of(blocks(lm.model))
        self._some = [
            {kind: w[:: max(1, len(w) // rows)][:rows].clone() for kind, w in self._weights(b)}
            for b in range(len(self._blocks))
        ]
        self.round = functools.lru_cache(64)(self._round)
        self.errors = functools.lru_cache(256)(self._errors)
        self.bits = functools.lru_cache(256)(self._bits)

    @property
    def blocks(self) -> int:
        return len(self._blocks)

    def weight(self, block: int, kind: str) -> torch.Tensor:
        """A layer's weight, fp32 (out, in), on the CPU."""
        return weight_of(self._blocks[block][kind]).detach().float().cpu()

    def group(self, block: int, kind: str, row: int, column: int, form: Format) -> torch.Tensor:
        """The weights of the group that holds a place, (size,)."""
        weight = self.weight(block, kind)
        size = form.size(weight.shape[1])
        first = column // size * size
        return weight[row, first : first + size].contiguous()

    def sample(self) -> list[torch.Tensor]:
        """``ROWS`` rows of every linear layer, each (rows, in): what errors are measured on."""
        return [weight for some in self._some for weight in some.values()]

    def error(self, form: Format) -> float:
        """‖w - ŵ‖ / ‖w‖ over all linear layers together (``ROWS`` rows of each)."""
        squares = [s for row in self.errors(form).values() for s in row]
        return math.sqrt(sum(a for a, _ in squares) / sum(b for _, b in squares))

    def settings(self) -> dict:
        """The controls of :meth:`view`, for ``explore``."""
        rows = min(len(self.weight(0, k)) for k in self.kinds)
        columns = min(self.weight(0, k).shape[1] for k in self.kinds)
        return {
            "format": ["int", "affine", "nf4", "fp4", "mxfp4", "nvfp4", "fp8_e4m3"],
            "bits": [2, 3, 4, 5, 6, 8],
            "group_size": {"16": 16, "32": 32, "64": 64, "128": 128, "per row": None},
            "kind": list(self.kinds),
            "block": list(range(len(self._blocks))),
            "row": list(range(0, rows, max(1, rows // 32))),
            "column": list(range(0, columns, max(1, columns // 36))),
        }

    def view(self, format: str, bits: int, group_size: int | None, kind: str, block: int, row: int, column: int):
        """A layer's histogram with one group's grid over it, the error of every layer, and both in words."""
        form = format_of(RTN(bits=bits, group_size=group_size, format=format))
        done = self.round(form, block, kind)
        group = self.group(block, kind, row, column, form)
        values = grid(form, done.params, row, column // form.size(self.weight(block, kind).shape[1]))
        figures = (
            histogram(self.weight(block, kind), values, group, f"{kind}, block {block}"),
            self._lines(form, kind, block),
        )
        return figures, self._sentence(form, format, kind, block, row, column, done, group, values)

    def sweep(self, bits: Sequence[int] = (2, 3, 4), sizes: Sequence[int | None] = SIZES) -> list[Point]:
        """Integers of these widths in groups of these sizes: true bits and error over all layers."""
        forms = [Integer(b, size) for b in bits for size in sizes]
        return [
            Point(f"{f.bits} bits, {_groups(f)}", self.bits(f), self.error(f))
            for f in track(forms, "rounding", show=False)
        ]

    def points(self, forms: Mapping[str, Format]) -> list[Point]:
        """Any formats: true bits and error over all layers."""
        return [Point(name, self.bits(f), self.error(f)) for name, f in forms.items()]

    def _weights(self, block: int):
        return ((kind, self.weight(block, kind)) for kind in self.kinds if kind in self._blocks[block])

    def _round(self, form: Format, block: int, kind: str) -> Rounded:
        weight = self.weight(block, kind)
        groups = form.groups(weight)
        params = form.fit(groups)
        left = groups - form.round(groups, params)
        return Rounded(params, float(left.norm() / weight.norm()), clipped(form, groups, params))

    def _errors(self, form: Format) -> dict[str, list[tuple[float, float]]]:
        """Of each kind of layer and each block: (‖w - ŵ‖², ‖w‖²) over the rows that are looked at."""
        found: dict[str, list] = {kind: [] for kind in self.kinds}
        for some in self._some:
            for kind, weight in some.items():
                groups = form.groups(weight)
                left = groups - form.round(groups, form.fit(groups))
                found[kind].append((float(left.square().sum()), float(weight.square().sum())))
        return found

    def _bits(self, form: Format) -> float:
        """True bits per weight of the whole model: one layer of each shape is encoded, and its bytes counted."""
        total = weights = 0
        known: dict[torch.Size, int] = {}
        for block in self._blocks:
            for module in block.values():
                weight = weight_of(module)
                if weight.shape not in known:
                    known[weight.shape] = form.encode(weight.detach()).nbytes
                total += 8 * known[weight.shape]
                weights += weight.numel()
        return total / weights

    def _lines(self, form: Format, chosen: str, block: int) -> go.Figure:
        """The error of every layer: one line for each kind over the blocks, the chosen one in colour."""
        data = []
        for kind, row in sorted(self.errors(form).items(), key=lambda item: item[0] == chosen):
            mine = kind == chosen
            data.append(
                go.Scatter(
                    name=kind if mine else "the other layers",
                    legendgroup="" if mine else "others",
                    showlegend=mine or not any(t.name == "the other layers" for t in data),
                    x=list(range(len(row))),
                    y=[round(100 * math.sqrt(a / b), 4) for a, b in row],
                    mode="lines",
                    line={"color": theme.BLUE if mine else theme.GREY, "width": 3 if mine else 1},
                    hovertemplate=f"{kind}, block %{{x}}: %{{y:.2f}} %<extra></extra>",
                )
            )
        dot = data[-1]
        data.append(
            go.Scatter(x=[block], y=[dot.y[block]], mode="markers", marker={"color": theme.VERMILION, "size": 10})
        )
        data[-1].update(name="this layer", hoverinfo="skip")
        return go.Figure(
            data,
            layout(
                "Rounding error of every layer (measured)",
                300,
                xaxis=axis("block"),
                yaxis=axis("relative RMS error, %", range=[0, 1.1 * max(y for t in data for y in t.y)]),
            ),
        )

    def _sentence(self, form, format, kind, block, row, column, done, group, values) -> str:
        own = [s for s in ("bits", "group_size") if s not in formats.settings(format)]
        note = f" ({format} decides its {' and '.join(w.replace('_', ' ') for w in own)} itself.)" if own else ""
        size = form.size(self.weight(block, kind).shape[1])
        first = column // size * size
        used = len(set(nearest(values, group).tolist()))
        return (
            f"{kind} of block {block} as {format}: {form.bits}-bit codes, {_groups(form)}.{note} "
            f"Its relative error is {_percent(done.error)} (RMS), {_percent(done.clipped)} of its weights are clipped. "
            f"All layers: {_percent(self.error(form))} at {self.bits(form):.3f} bits per weight, metadata included. "
            f"The group shown is row {row}, columns {first} to {first + len(group) - 1}: {len(values)} values from "
            f"{words.short(float(values[0]))} to {words.short(float(values[-1]))}, of which its weights use {used}."
        )


# --- grids -----------------------------------------------------------------------------------------


def grid(form: Format, params: formats.Params, row: int, group: int) -> torch.Tensor:
    """The values that one group of a matrix can take, sorted, fp32: every code decoded with the group's parameters."""
    mine = tuple(p[row : row + 1, group : group + 1] if p.ndim else p for p in params)
    codes = torch.arange(1 << form.bits, dtype=torch.int32).to(torch.uint8).view(1, 1, -1)
    values = form.dequantize(codes, mine).flatten()
    return values[values.isfinite()].unique()


def nearest(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The index of the nearest of sorted values, for each x."""
    return torch.bucketize(x, (values[1:] + values[:-1]) / 2)


def clipped(form: Format, groups: torch.Tensor, params: formats.Params) -> float:
    """The share of weights that lie more than half a step beyond the ends of their group's grid.

    Half a step is what rounding costs anywhere; a weight that loses more was cut off. groups: (out, groups, size).
    """
    codes = torch.arange(1 << form.bits, dtype=torch.int32).to(torch.uint8)
    first = form.dequantize(codes.view(1, 1, -1), tuple(p[:1, :1] if p.ndim else p for p in params)).flatten()
    order = first.sort().indices  # the same in every group, since scales are positive
    order = order[first[order].isfinite()]
    ends = codes[order[[0, 1, -2, -1]]].expand(*groups.shape[:2], 4)
    low, above, below, high = form.dequantize(ends, params).split(1, -1)
    down, up = above - low, high - below
    slack = 0.5 + 2e-3  # scales are stored in fp16, which moves the ends a little
    return float(((groups > high + slack * up) | (groups < low - slack * down)).float().mean())


def levels(form: Format) -> torch.Tensor:
    """A format's value table, scaled so that its largest magnitude is 1; one that starts at 0 is centred."""
    values = form.levels()
    if values[0] >= 0:  # affine: each group's minimum shifts it
        values = values - values[-1] / 2
    return values / values.abs().max()


# --- figures ---------------------------------------------------------------------------------------


def combs(forms: Mapping[str, Format], group: torch.Tensor | None = None, title: str = "") -> go.Figure:
    """Every value of each format as a tooth of a comb, all on one axis.

    Without ``group``: the value tables, scaled to the same largest value. With it, (size,): each format fitted to these
    weights, or to as many of them as it keeps in a group; they are drawn as dots under it.
    """
    data, notes = [], []
    reach = 1.0 if group is None else 1.3 * float(group.abs().max())
    for i, ((name, form), color) in enumerate(zip(forms.items(), theme.SERIES * 3)):
        y = len(forms) - 1 - i
        if group is None:
            values = levels(form)
        else:
            groups = form.groups(group[None])
            values = grid(form, form.fit(groups), 0, 0)
            data.append(_dots(groups[0, 0], y - 0.12, color))
        data.append(_comb(values, y, 0.55, color, name))
        notes.append(_name(name, y + 0.25))
    return go.Figure(
        [t.update(showlegend=False) for t in data],
        layout(
            title or "The values of each format" + ("" if group is None else ", fitted to one group of weights"),
            60 + 56 * len(forms),
            xaxis=axis(
                "value, as a share of the largest" if group is None else "weight", range=[-1.3 * reach, 1.04 * reach]
            ),
            yaxis=axis(range=[-0.3, len(forms) - 0.05], showticklabels=False, showgrid=False, zeroline=False),
            annotations=notes,
            showlegend=False,
            margin={"l": 24, "r": 12, "t": 40, "b": 44},
        ),
    )


def spans(forms: Mapping[str, Format]) -> go.Figure:
    """The positive values of each format on a logarithmic axis: where the largest is 1, how far down do they reach?"""
    data, notes, low = [], [], 0.0
    for i, ((name, form), color) in enumerate(zip(forms.items(), theme.SERIES * 3)):
        y = len(forms) - 1 - i
        values = levels(form)
        logs = values[values > 0].log2()
        low = min(low, float(logs[0]))
        data.append(_comb(logs, y, 0.55, color, name))
        notes.append(_name(name, y + 0.25))
    return go.Figure(
        [t.update(showlegend=False) for t in data],
        layout(
            "Positive values, in powers of two below the largest",
            60 + 56 * len(forms),
            xaxis=axis("log₂(value / largest value)", range=[1.25 * low, -0.02 * low]),
            yaxis=axis(range=[-0.3, len(forms) - 0.05], showticklabels=False, showgrid=False, zeroline=False),
            annotations=notes,
            showlegend=False,
            margin={"l": 24, "r": 12, "t": 40, "b": 44},
        ),
    )


def histogram(weight: torch.Tensor, values: torch.Tensor, group: torch.Tensor, title: str) -> go.Figure:
    """A layer's weights as a histogram, one group's grid as a comb over it, and that group's weights as dots under it."""
    reach = max(4 * float(weight.square().mean().sqrt()), float(values.abs().max()), float(group.abs().max()))
    counts = torch.histc(weight.flatten(), 80, -reach, reach) / weight.numel()
    wide = 2 * reach / 80
    top = float(counts.max())
    outside = 1 - float(counts.sum())
    data = [
        go.Bar(
            name="layer",
            x=[float(f"{-reach + (i + 0.5) * wide:.5g}") for i in range(80)],
            y=[float(f"{c:.4g}") for c in counts.tolist()],
            marker_color=theme.GREY,
            opacity=0.55,
            hoverinfo="skip",
        ),
        _comb(values, 0.0, 0.55 * top, theme.BLUE, "group's grid"),
        _dots(group, -0.06 * top, theme.VERMILION, "group's weights"),
    ]
    more = f"; {100 * outside:.2g} % of the weights lie outside" if outside > 5e-5 else ""
    return go.Figure(
        data,
        layout(
            f"{title} (measured)",
            320,
            bargap=0,
            barmode="overlay",
            xaxis=axis(f"weight{more}", range=[-reach, reach]),
            yaxis=axis("share of weights", range=[-0.13 * top, 1.08 * top]),
        ),
    )


def front(points: Iterable[Point]) -> list[Point]:
    """The points that no other beats in both bits and error, from few bits to many."""
    best: list[Point] = []
    for p in sorted(points, key=lambda p: (p.bits, p.error)):
        if not best or p.error < best[-1].error:
            best.append(p)
    return best


def tradeoff(points: Sequence[Point], others: Sequence[Point] = ()) -> go.Figure:
    """Error against true bits: a line for each code width over group sizes, and the Pareto front."""
    data = []
    widths: dict[str, list[Point]] = {}
    for p in points:
        widths.setdefault(p.name.split(",")[0], []).append(p)
    for (name, row), color in zip(widths.items(), theme.SERIES):
        row = sorted(row, key=lambda p: p.bits)
        data.append(
            go.Scatter(
                name=f"{name}, by group size",
                x=[round(p.bits, 4) for p in row],
                y=[round(100 * p.error, 4) for p in row],
                mode="lines+markers",
                line={"color": color, "width": 2},
                hovertext=[f"{p.name}: {p.bits:.3f} bits per weight, error {_percent(p.error)}" for p in row],
                hoverinfo="text",
            )
        )
    best = front([*points, *others])
    data.append(
        go.Scatter(
            name="Pareto front",
            x=[round(p.bits, 4) for p in best],
            y=[round(100 * p.error, 4) for p in best],
            mode="lines",
            line={"color": theme.INK, "width": 1.5, "dash": "dot"},
            hoverinfo="skip",
        )
    )
    if others:
        data.append(_named(others, [100 * p.error for p in others], "other formats", theme.PURPLE))
    return go.Figure(
        data,
        layout(
            "Rounding error against true bits (measured)",
            400,
            xaxis=axis("bits per weight, metadata included"),
            yaxis=axis("relative RMS error, %", True),
        ),
    )


def _named(points, ys, name: str, color: str) -> go.Scatter:
    return go.Scatter(
        name=name,
        x=[round(p.bits, 4) for p in points],
        y=[float(f"{y:.4g}") for y in ys],
        mode="markers+text",
        text=[p.name for p in points],
        textposition="bottom right",
        textfont={"size": 10},
        marker={"color": color, "size": 9},
    )


def _comb(values: torch.Tensor, y: float, height: float, color: str, name: str) -> go.Scatter:
    """One line that goes up and down once at every value: teeth on a spine."""
    xs, ys = [], []
    for v in values.tolist():
        v = float(f"{v:.5g}")
        xs += [v, v, v]
        ys += [y, y + height, y]
    return go.Scatter(
        name=name,
        x=xs,
        y=ys,
        mode="lines",
        line={"color": color, "width": 1.5},
        hovertemplate=f"{name}: %{{x:.4g}}<extra></extra>",
    )


def _dots(values: torch.Tensor, y: float, color: str, name: str = "") -> go.Scatter:
    xs = [float(f"{v:.5g}") for v in values.tolist()]
    marker = {"color": color, "size": 5, "opacity": 0.6}
    return go.Scatter(
        name=name, x=xs, y=[y] * len(xs), mode="markers", marker=marker, hovertemplate="weight %{x:.4g}<extra></extra>"
    )


def _name(text: str, y: float) -> dict:
    """A comb's name at the left edge."""
    place = {"x": 0.0, "xref": "paper", "xanchor": "left", "y": y, "yref": "y", "yanchor": "middle"}
    return place | {"text": text, "showarrow": False, "font": {"size": 12}}


# --- tables ----------------------------------------------------------------------------------------


def anatomy(forms: Mapping[str, Format], weight: torch.Tensor) -> Table:
    """What each format stores for one real matrix (out, in), by tensor, in bits per weight, and what that adds up to."""
    rows = []
    for name, form in forms.items():
        encoded = form.encode(weight)
        stored = encoded.tensors()
        parts = {k: 8 * t.numel() * t.element_size() / weight.numel() for k, t in stored.items()}
        beside = [f"{k.replace('_', ' ')} {v:.4g}" for k, v in parts.items() if k != "packed"]
        values = form.levels()
        positive = values[values > 0]
        span = math.log2(float(positive[-1]) / float(positive[0]))
        rows.append(
            (
                name,
                f"{len(values)}",
                f"{span:.1f}",
                f"{form.size(weight.shape[1])}",
                f"{parts['packed']:.2f}",
                ", ".join(beside),
                f"{encoded.bits_per_weight:.3f}",
            )
        )
    head = ("format", "values", "log₂ largest/smallest", "group", "codes", "stored beside them", "bits per weight")
    return Table(
        head, tuple(rows), f"bits per weight of one real matrix, {weight.shape[0]} × {weight.shape[1]}: measured"
    )


def _groups(form: Format) -> str:
    if getattr(form, "rows", 1) is None:
        return "one scale for all"
    return f"groups of {form.group_size}" if form.group_size else "per row"


def _percent(share: float) -> str:
    return "0 %" if share == 0 else "under 0.01 %" if share < 1e-4 else f"{100 * share:.3g} %"
