"""SparseGPT block of columns by block: what is dropped, what the others are asked to repair, and what that buys.

    stepper = Stepper(Inputs(lm, windows))
    run = stepper.run(block=3, kind="mlp.down_proj", sparsity=0.5, pattern="unstructured")
    run.errors["SparseGPT"][2], run.errors["Wanda"][2]     # squared output error after two blocks of columns
    explore(stepper.view, **stepper.settings())

The algorithm is :func:`labkit.prune.sparsegpt.sparsegpt` itself, watched; nothing is computed a second way.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from labkit.prune.common import parse_pattern
from labkit.prune.sparsegpt import BLOCK, sparsegpt
from labkit.ui import heat, need, theme, words
from labkit.ui.lessons.inputs import Inputs
from labkit.ui.lessons.masks import METHODS, PATTERNS, output_error, prune
from labkit.ui.theme import axis, layout
from labkit.walk import Stats

go = need("plotly.graph_objects")

ROWS, CELLS = 24, 72  # rows of the slice, and cells across the map: each stands for several neighbouring columns
REACH = 0.6  # RMS weights at which the map's colours end
COLORS = dict(zip(METHODS, (theme.GREY, theme.ORANGE, theme.BLUE)))


@dataclass(frozen=True)
class Run:
    """SparseGPT over some rows of a layer. ``states[i]``: the weights (rows, in) when the first ``done[i]`` columns are."""

    done: list[int]
    states: list[torch.Tensor]
    keep: torch.Tensor  # (rows, in): what is kept in the end
    errors: dict[
        str, list[float]
    ]  # method -> squared output error when those columns are pruned, the others as they were


class Stepper:
    """SparseGPT on ``rows`` evenly spaced rows of each layer, as if they were all of it."""

    def __init__(self, inputs: Inputs, rows: int = ROWS):
        self.inputs, self.rows = inputs, rows
        self.run = functools.lru_cache(12)(self._run)

    def settings(self) -> dict:
        """The controls of :meth:`view`, for ``explore``."""
        widest = max(self.inputs.weight(0, kind).shape[1] for kind in self.inputs.kinds)
        return {
            "columns": [min(at, widest) for at in range(0, widest + BLOCK, BLOCK)],
            "sparsity": [0.3, 0.5, 0.7, 0.9],
            "pattern": list(PATTERNS),
            "kind": list(self.inputs.kinds),
            "block": list(range(len(self.inputs.stack))),
        }

    @torch.no_grad()
    def _run(self, block: int, kind: str, sparsity: float, pattern: str) -> Run:
        weight, stats = self.inputs.weight(block, kind), Stats()
        stats.add(self.inputs.of(block, kind), "hessian")
        weight = weight[:: max(1, len(weight) // self.rows)][: self.rows]
        done, states, form = [0], [weight], parse_pattern(pattern)

        def watch(stop: int, columns: torch.Tensor, keep: torch.Tensor) -> None:
            done.append(stop)
            states.append(columns.T.clone())

        _, keep, _ = sparsegpt(weight, stats, sparsity, form, watch=watch)
        errors = {}
        for method in METHODS[:2]:
            pruned, _ = prune(weight, stats, method, sparsity, form)
            half = [torch.cat([pruned[:, :j], weight[:, j:]], 1) for j in done]
            errors[method] = [output_error(h - weight, weight, stats.gram) for h in half]
        errors["SparseGPT"] = [output_error(s - weight, weight, stats.gram) for s in states]
        return Run(done, states, keep, errors)

    def view(self, columns: int, sparsity: float, pattern: str, kind: str, block: int):
        """The slice when ``columns`` of its columns are pruned: dropped, repaired, the error so far, and it in words."""
        run = self.run(block, kind, sparsity, pattern)
        step = max(i for i, done in enumerate(run.done) if done <= columns)
        return (repairs(run, step), dropped(run, step), errors(run, step)), sentence(run, step, kind, block)


def repairs(run: Run, step: int) -> go.Figure:
    """How far the weights that are there have moved, in cells of a few columns; dropped ones are left out."""
    width, done = _width(run), run.done[step]
    rms = float(run.states[0].square().mean().sqrt())
    there = run.keep | (torch.arange(run.keep.shape[1]) >= done)  # nothing is dropped yet of the columns to come
    moved = (run.states[step] - run.states[0]).square() * there
    z = (_cells(moved, width).sum(-1) / _cells(there.float(), width).sum(-1).clamp(min=1)).sqrt() / rms
    rows, across = z.shape
    hover = f"columns from {width}·%{{x}} on, row %{{y}}: moved by %{{z:.2f}} (RMS)<extra></extra>"
    line = heat.mark([done / width - 0.5] * 2, [-0.5, rows - 0.5])
    return go.Figure(
        [heat.heat(z.tolist(), 0, REACH, heat.GROWING, "RMS weights", hover), line],
        layout(
            "How far the weights that remain have moved (measured)",
            320,
            xaxis=axis(
                f"columns, {width} to a cell; pruned left of the line", range=[-0.5, across - 0.5], showgrid=False
            ),
            yaxis=axis("rows of the slice", range=[-0.5, rows - 0.5], showgrid=False),
        ),
    )


def dropped(run: Run, step: int) -> go.Figure:
    """Which share of each cell of columns is dropped so far."""
    width = _width(run)
    gone = ~run.keep & (torch.arange(run.keep.shape[1]) < run.done[step])
    cells = _cells(gone.float(), width)
    counts = _cells(torch.ones_like(run.keep, dtype=torch.float32), width).sum((0, 2))
    share = (100 * cells.sum((0, 2)) / counts).tolist()
    bars = go.Bar(
        x=list(range(len(share))), y=[float(f"{s:.4g}") for s in share], marker_color=theme.GREY, showlegend=False
    )
    return go.Figure(
        [bars],
        layout(
            "What is dropped so far (measured)",
            240,
            bargap=0.1,
            xaxis=axis(f"columns, {width} to a cell", range=[-0.5, len(share) - 0.5]),
            yaxis=axis("% of the weights", range=[0, 100]),
        ),
    )


def errors(run: Run, step: int) -> go.Figure:
    """The output error over the columns that are pruned, for the three methods."""
    data = [
        go.Scatter(
            name=name,
            x=run.done,
            y=[float(f"{100 * v:.4g}") for v in values],
            mode="lines+markers",
            line={"color": COLORS[name], "width": 2},
        )
        for name, values in run.errors.items()
    ]
    data.append(
        go.Scatter(
            x=[run.done[step]] * len(run.errors),
            y=[float(f"{100 * values[step]:.4g}") for values in run.errors.values()],
            mode="markers",
            marker={"color": theme.VERMILION, "size": 10},
            showlegend=False,
            hoverinfo="skip",
        )
    )
    return go.Figure(
        data,
        layout(
            "Squared error of the layer's output (measured)",
            320,
            xaxis=axis("columns that are pruned"),
            yaxis=axis("% of the output's square", rangemode="tozero"),
        ),
    )


def sentence(run: Run, step: int, kind: str, block: int) -> str:
    done, columns = run.done[step], run.keep.shape[1]
    told = words.listed([f"{100 * values[step]:.3g} % with {name}" for name, values in run.errors.items()])
    text = f"{kind} of block {block}, {len(run.keep)} of its rows: {done} of {columns} columns are pruned. "
    if not step:
        return text + "The next block is ranked by w²/U_jj², and its cheapest weights go."
    text += f"The squared output error so far is {told}."
    rms = float(run.states[0].square().mean().sqrt())
    moved = run.states[step] - run.states[0]
    if done < columns:
        left = float(moved[:, done:].square().mean().sqrt()) / rms
        return (
            text
            + f" The {columns - done} columns to come have moved by {words.percent(left)} of a weight (RMS) to repair it."
        )
    kept = float(moved[run.keep].square().mean().sqrt()) / rms
    return (
        text
        + f" What is kept ends {words.percent(kept)} of a weight (RMS) from where it was: the mask is half of the method."
    )


def _width(run: Run) -> int:
    """Columns to a cell: a power of two, so that a block of columns is a whole number of cells."""
    width = 1
    while run.keep.shape[1] > CELLS * width:
        width *= 2
    return width


def _cells(values: torch.Tensor, width: int) -> torch.Tensor:
    """(rows, in) -> (rows, cells, width); the last cell is filled up with zeros."""
    return torch.nn.functional.pad(values, (0, -values.shape[1] % width)).unflatten(1, (-1, width))
