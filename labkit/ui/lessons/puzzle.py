"""The 2:4 puzzle: of four neighbouring weights two may stay. Which two?

    puzzle = Puzzle(Inputs(lm, windows), block=3, kind="self_attn.q_proj")
    puzzle.errors(0)                        # pair -> (error as it is, error when the two are fitted again)
    explore(puzzle.view, **puzzle.settings())

The error is exact: ‖X(w - ŵ)‖² over the calibration inputs of these four channels, from their 4 × 4 matrix XᵀX.
"""

from __future__ import annotations

import itertools

import torch

from labkit.ui import heat, need, plots, theme, words
from labkit.ui.lessons.inputs import Inputs
from labkit.ui.theme import axis, layout

go = need("plotly.graph_objects")

PAIRS = tuple(itertools.combinations(range(4), 2))
NAMES = ("w1", "w2", "w3", "w4")
INPUTS = ("x1", "x2", "x3", "x4")


class Puzzle:
    """``count`` groups of one layer on which magnitude, Wanda and the exact error do not agree."""

    def __init__(self, inputs: Inputs, block: int = 3, kind: str | None = None, count: int = 8):
        self.kind, self.block = kind or inputs.kinds[0], block
        weight, x = inputs.weight(block, self.kind).double(), inputs.of(block, self.kind).double()
        whole = weight.shape[1] // 4
        self.weights = weight[:, : 4 * whole].view(len(weight), whole, 4)
        x = x[:, : 4 * whole].view(len(x), whole, 4)
        self.grams = torch.einsum("tgi,tgj->gij", x, x)
        plain, fitted = exact_errors(self.weights, self.grams)  # (out, groups, 6) each
        self.plain, self.fitted = plain, fitted
        self.choice = {
            "magnitude": picked(self.weights.abs()),
            "Wanda": picked(self.weights.abs() * self.grams.diagonal(dim1=1, dim2=2).sqrt()),
            "best": plain.argmin(-1),
            "best, fitted": fitted.argmin(-1),
        }
        # Hard: both scores are far from the best pair, and fitting the two again changes much.
        hard = (plain.amin(-1) / fitted.amin(-1).clamp(min=1e-30)).clamp(max=8)
        for method in ("Wanda", "magnitude"):
            hard = hard * _regret(plain, self.choice[method]).clamp(max=4)
        order = hard.amax(0).argsort(descending=True)[:count]  # the hardest row of each group of channels
        self.groups = [(int(hard[:, g].argmax()), int(g)) for g in order]

    def settings(self) -> dict:
        """The controls of :meth:`view`, for ``explore``: the puzzle, four ticks, and the answer."""
        ticks = dict(zip(NAMES, (True, True, False, False)))
        return {"puzzle": list(range(1, len(self.groups) + 1)), **ticks, "answer": False}

    def errors(self, number: int) -> dict[tuple[int, int], tuple[float, float]]:
        """pair kept -> squared error as a share of the group's own output: as it is, and with the two fitted again."""
        row, group = self.groups[number]
        w, gram = self.weights[row, group], self.grams[group]
        total = float(w @ gram @ w)
        return {
            p: (float(self.plain[row, group, i]) / total, float(self.fitted[row, group, i]) / total)
            for i, p in enumerate(PAIRS)
        }

    def right(self, method: str) -> float:
        """In which share of all groups of the layer a score picks the best of the six pairs, as the weights are."""
        return float((self.choice[method] == self.choice["best"]).double().mean())

    def view(self, puzzle: int, w1: bool, w2: bool, w3: bool, w4: bool, answer: bool):
        """The four weights and their inputs; the error of the two that are ticked; all six pairs with ``answer``."""
        row, group = self.groups[puzzle - 1]
        ticked = tuple(i for i, tick in enumerate((w1, w2, w3, w4)) if tick)
        errors = self.errors(puzzle - 1)
        shown = errors if answer else {p: e for p, e in errors.items() if p == ticked}
        figures = (self._four(row, group, ticked), self._together(group), pairs(shown))
        head = f"{self.kind} of block {self.block}, row {row}, columns {4 * group} to {4 * group + 3}. "
        return figures, head + self._said(puzzle - 1, ticked, errors, answer)

    def _said(self, number: int, ticked: tuple, errors: dict, answer: bool) -> str:
        if len(ticked) != 2:
            text = f"You have ticked {len(ticked)}: 2:4 keeps exactly two. "
        else:
            plain, fitted = errors[ticked]
            text = f"Keeping {_name(ticked)}, the squared error is {_percent(plain)} of the group's output"
            text += f", or {_percent(fitted)} when the two are fitted again. "
        if not answer:
            return text + "Tick the answer to see all six."
        row, group = self.groups[number]
        pair = {name: _name(PAIRS[int(choice[row, group])]) for name, choice in self.choice.items()}
        text += (
            f"Magnitude keeps {pair['magnitude']}, Wanda {pair['Wanda']}. Best as the weights are is {pair['best']}, "
        )
        text += (
            f"and with the two fitted again {pair['best, fitted']}. These puzzles are the hard ones: over all groups "
        )
        shares = [f"{name} finds the best pair in {words.percent(self.right(name))}" for name in ("magnitude", "Wanda")]
        return text + f"of this layer, {words.listed(shares)}."

    def _four(self, row: int, group: int, ticked: tuple) -> go.Figure:
        w, norm = self.weights[row, group], self.grams[group].diagonal().sqrt()
        data = []
        for values, suffix in ((w, ""), (norm, "2")):
            colors = [theme.BLUE if i in ticked else "#c8c8c8" for i in range(4)]
            for i, (v, color) in enumerate(zip(values.tolist(), colors)):  # a trace each, so that each has its colour
                bar = {"x": [NAMES[i]], "y": [float(f"{v:.4g}")], "marker_color": color, "showlegend": False}
                data.append(go.Bar(xaxis="x" + suffix, yaxis="y" + suffix, **bar))
        return go.Figure(
            data,
            layout(
                "The four weights and the norms ‖x‖ of their inputs; blue = kept (measured)",
                260,
                barmode="overlay",
                xaxis=axis("weights", domain=[0, 0.44]),
                yaxis=axis("weight"),
                xaxis2=axis("inputs", domain=[0.56, 1], anchor="y2"),
                yaxis2=axis("‖x‖", anchor="x2", rangemode="tozero"),
            ),
        )

    def _together(self, group: int) -> go.Figure:
        gram = self.grams[group]
        scale = gram.diagonal().sqrt().clamp(min=1e-30)
        table = (gram / scale[:, None] / scale).flip(0)
        data = [heat.heat(table.tolist(), -1, 1, heat.SIGNED, "cosine", "%{z:.2f}<extra></extra>")]
        place = {"showarrow": False, "xref": "x", "yref": "y", "yanchor": "middle", "font": {"size": 11}}
        notes = [place | {"x": j, "y": i, "text": f"{table[i, j]:+.2f}"} for i in range(4) for j in range(4)]
        span = {"range": [-0.5, 3.5], "showgrid": False, "tickvals": list(range(4))}
        return go.Figure(
            data,
            layout(
                "How far the inputs rise and fall together: their cosines (measured)",
                260,
                xaxis=axis(**span, ticktext=list(INPUTS)),
                yaxis=axis(**span, ticktext=list(reversed(INPUTS))),
                annotations=notes,
            ),
        )


def pairs(errors: dict) -> go.Figure:
    """The squared error of each pair that is shown."""
    names = {p: _name(p) for p in errors}
    series = {
        "as they are": {names[p]: float(f"{100 * e[0]:.4g}") for p, e in errors.items()},
        "the two fitted again": {names[p]: float(f"{100 * e[1]:.4g}") for p, e in errors.items()},
    }
    title = "Squared error of what is kept (measured)" if errors else "Tick two to see the error"
    return plots.bars(series, "% of the group's output, squared", title, height=280)


def exact_errors(weights: torch.Tensor, grams: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For weights (out, groups, 4) and XᵀX (groups, 4, 4): ‖X(w - ŵ)‖² of the six pairs, (out, groups, 6), twice.

    First with the kept weights as they are, then with their least-squares fit: the Schur complement of the kept inputs.
    """
    plain, fitted = [], []
    for pair in PAIRS:
        kept = list(pair)
        gone = [i for i in range(4) if i not in pair]
        w, own = weights[..., gone], grams[:, gone][:, :, gone]
        plain.append(torch.einsum("ogi,gij,ogj->og", w, own, w))
        across, base = grams[:, kept][:, :, gone], grams[:, kept][:, :, kept]
        left = own - across.mT @ (torch.linalg.pinv(base, hermitian=True) @ across)
        fitted.append(torch.einsum("ogi,gij,ogj->og", w, left, w).clamp(min=0))
    return torch.stack(plain, -1), torch.stack(fitted, -1)


def picked(scores: torch.Tensor) -> torch.Tensor:
    """The pair of the two highest of scores (out, groups, 4), as its place in ``PAIRS``."""
    table = torch.zeros(4, 4, dtype=torch.long)
    for place, (i, j) in enumerate(PAIRS):
        table[i, j] = table[j, i] = place
    top = scores.topk(2, -1).indices
    return table[top[..., 0], top[..., 1]]


def _regret(errors: torch.Tensor, choice: torch.Tensor) -> torch.Tensor:
    """How many times the best pair's error a choice has, (out, groups)."""
    return errors.gather(-1, choice[..., None])[..., 0] / errors.amin(-1).clamp(min=1e-30)


def _name(pair: tuple) -> str:
    return f"{NAMES[pair[0]]} and {NAMES[pair[1]]}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
