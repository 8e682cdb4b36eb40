"""GPTQ column by column, on a slice of a real layer: what is rounded, what still makes up for it, and what it buys.

    stepper = Stepper(Inputs(lm, windows))
    run = stepper.run(block=0, kind="mlp.down_proj", bits=3, act_order=True)
    run.gptq[24], run.rtn[24]           # relative squared output error after 24 columns
    explore(stepper.view, **stepper.settings())

The algorithm is :func:`labkit.quantize.gptq.gptq` itself, watched; nothing is computed a second way.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from labkit.formats import Integer
from labkit.quantize.gptq import gptq
from labkit.ui import heat, need, theme, words
from labkit.ui.lessons.inputs import Inputs
from labkit.ui.theme import axis, layout
from labkit.walk import Stats

go = need("plotly.graph_objects")

COLUMNS, ROWS = 48, 16
REACH = 1.5  # grid steps at which the heat map's colours end


@dataclass(frozen=True)
class Run:
    """GPTQ over one slice. ``states[j]``: the weights (rows, columns), in the order they are visited, after j columns."""

    columns: torch.Tensor  # the layer's columns in the order in which they are rounded
    states: list[torch.Tensor]
    step: torch.Tensor  # (rows, columns): the distance between two values of each weight's grid
    gptq: list[float]  # relative squared error of the slice's output after j columns
    rtn: list[float]  # the same when nothing makes up for anything
    moved: float  # RMS distance of the final weights from the original ones, in grid steps
    rounding: float  # that of plain rounding


class Stepper:
    """GPTQ on ``columns`` of a layer's inputs, those with the largest mean square, and ``rows`` of its outputs.

    Rows do not depend on each other in GPTQ. Leaving out columns makes a smaller problem of the same kind.
    """

    def __init__(self, inputs: Inputs, columns: int = COLUMNS, rows: int = ROWS):
        self.inputs, self.columns, self.rows = inputs, columns, rows
        self.run = functools.lru_cache(64)(self._run)

    def settings(self) -> dict:
        """The controls of :meth:`view`, for ``explore``."""
        return {
            "column": list(range(self.columns + 1)),
            "act_order": [True, False],
            "bits": [2, 3, 4],
            "kind": list(self.inputs.kinds),
            "block": list(range(len(self.inputs.stack))),
        }

    def _run(self, block: int, kind: str, bits: int, act_order: bool) -> Run:
        x, weight = self.inputs.of(block, kind), self.inputs.weight(block, kind)
        picked = x.square().mean(0).argsort(descending=True)[: self.columns].sort().values
        weight = weight[:: max(1, len(weight) // self.rows)][: self.rows, picked]
        stats = Stats()
        stats.add(x[:, picked], "hessian")
        form = Integer(bits, max(1, self.columns // 3))
        order, _, dead = stats.cholesky(0.01, act_order)
        weight = weight.masked_fill(dead, 0)
        states = [weight[:, order]]
        gptq(weight, stats, form, act_order, watch=lambda done, columns: states.append(columns.T.clone()))
        rounded = form.encode(weight).decode()[:, order]
        gram = stats.gram[order][:, order]
        energy = _energy(states[0], gram)
        step = form.fit(form.groups(weight))[0].repeat_interleave(form.size(weight.shape[1]), 1)[:, order]
        half = [torch.cat([rounded[:, :j], states[0][:, j:]], 1) for j in range(len(states))]
        return Run(
            picked[order],
            states,
            step,
            [_energy(s - states[0], gram) / energy for s in states],
            [_energy(s - states[0], gram) / energy for s in half],
            float(((states[-1] - states[0]) / step).square().mean().sqrt()),
            float(((rounded - states[0]) / step).square().mean().sqrt()),
        )

    def view(self, column: int, act_order: bool, bits: int, kind: str, block: int):
        """The slice after ``column`` columns: its change so far, the output error so far, and both in words."""
        run = self.run(block, kind, bits, act_order)
        return (change(run, column), errors(run, column)), sentence(run, column, kind, block)


def change(run: Run, column: int) -> go.Figure:
    """How far each weight is from where it was, in grid steps; left of the line it is rounded, right of it it makes up."""
    z = ((run.states[column] - run.states[0]) / run.step).tolist()
    rows, columns = run.step.shape
    hover = "column %{x} in the order, row %{y}: %{z:+.2f} steps<extra></extra>"
    line = heat.mark([column - 0.5] * 2, [-0.5, rows - 0.5])
    return go.Figure(
        [heat.heat(z, -REACH, REACH, heat.SIGNED, "grid steps", hover), line],
        layout(
            "Change of each weight so far, in grid steps (measured)",
            340,
            xaxis=axis("columns, in the order in which they are rounded", range=[-0.5, columns - 0.5], showgrid=False),
            yaxis=axis("rows of the layer", range=[-0.5, rows - 0.5], showgrid=False),
        ),
    )


def errors(run: Run, column: int) -> go.Figure:
    """The output error so far, with and without compensation."""
    x = list(range(len(run.states)))
    data = [
        go.Scatter(
            name=name, x=x, y=[float(f"{100 * v:.4g}") for v in values], mode="lines", line={"color": color, "width": 2}
        )
        for name, values, color in (("plain rounding", run.rtn, theme.GREY), ("GPTQ", run.gptq, theme.BLUE))
    ]
    data.append(
        go.Scatter(
            x=[column] * 2,
            y=[float(f"{100 * v[column]:.4g}") for v in (run.rtn, run.gptq)],
            mode="markers",
            marker={"color": theme.ORANGE, "size": 9},
            showlegend=False,
            hoverinfo="skip",
        )
    )
    top = 105 * max(*run.rtn, *run.gptq)
    return go.Figure(
        data,
        layout(
            "Squared error of the layer's output (measured)",
            340,
            xaxis=axis("columns rounded"),
            yaxis=axis("% of the output's square", range=[0, top or 1.0]),
        ),
    )


def sentence(run: Run, column: int, kind: str, block: int) -> str:
    rows, columns = run.step.shape
    text = (
        f"{kind} of block {block}, {rows} of its rows and the {columns} columns with the largest inputs. "
        f"{column} of {columns} columns are rounded: the squared output error is {_percent(run.gptq[column])} of the "
        f"output's, against {_percent(run.rtn[column])} when nothing makes up for it."
    )
    if 0 < column < columns:
        left = ((run.states[column] - run.states[0]) / run.step)[:, column:]
        text += (
            f" The {columns - column} columns still to come have moved by {words.short(float(left.abs().max()))} grid "
            f"steps at most to do so."
        )
    if column == columns:
        text += (
            f" GPTQ ends {words.short(run.moved)} steps (RMS) from the original weights, plain rounding "
            f"{words.short(run.rounding)}: farther from the weights, yet {words.ratio(run.gptq[-1] / run.rtn[-1])} the "
            "squared error of the output."
            if run.moved > run.rounding and run.gptq[-1] < run.rtn[-1]
            else f" GPTQ ends {words.short(run.moved)} steps (RMS) from the original weights, plain rounding "
            f"{words.short(run.rounding)}; the output's squared error is {words.ratio(run.gptq[-1] / run.rtn[-1])} that "
            "of plain rounding."
        )
    return text


def _energy(weight: torch.Tensor, gram: torch.Tensor) -> float:
    """‖X wᵀ‖² for weights (rows, in), from gram = XᵀX."""
    return float(((weight @ gram) * weight).sum().clamp(min=0))


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
