"""Needles in a haystack, as maps of depth × length: what each cache policy still finds, and what the full cache finds.

needles = NeedleMap(lm, lengths=(256, 512), depths=(0.1, 0.5, 0.9))
needles.recall("SnapKV", "after", 0.25)     # share of needles found; every cell is measured once
explore(needles.view, slow=needles.unmeasured, **needles.settings())
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

from labkit.cache import H2O, CachePolicy, RandomKV, RecentKV, Scissorhands, SnapKV, StreamingLLM
from labkit.measure.needles import Cell, grid
from labkit.progress import track
from labkit.ui import heat, need, theme
from labkit.ui.lessons.kept_tokens import under
from labkit.ui.table import Table
from labkit.ui.theme import axis, layout

go = need("plotly.graph_objects")

FULL = "full cache"
POLICIES: Mapping[str, Callable[[float], CachePolicy]] = {
    "recent only": lambda share: RecentKV(share=share),
    "random": lambda share: RandomKV(share=share),
    "StreamingLLM": lambda share: StreamingLLM(share=share),
    "H2O": lambda share: H2O(share=share),
    "Scissorhands": lambda share: Scissorhands(share=share, drop=0.0),
    "SnapKV": lambda share: SnapKV(share=share, window=8),
}
FOUND = ((0.0, theme.VERMILION), (0.5, "#f4f4f4"), (1.0, theme.BLUE))
WHEN = {"before": "the question is known before eviction", "after": "the question comes after eviction"}


class NeedleMap:
    """Recall of each policy at a share of the prompt; a cell is measured when it is first asked for.

    ``policies``: name -> the policy at a share, or the names of some that are known here.
    """

    def __init__(
        self, lm, lengths=(256, 512, 1024), depths=(0.1, 0.3, 0.5, 0.7, 0.9), needles: int = 1, policies=POLICIES
    ):
        self.lm, self.lengths, self.depths, self.needles = lm, list(lengths), list(depths), needles
        self.policies = {name: POLICIES[name] for name in policies} if isinstance(policies, tuple) else dict(policies)
        self._known: dict[tuple, Cell] = {}
        self._lock = threading.RLock()  # a slider's worker and the notebook's own thread may ask at once

    def settings(self) -> dict:
        """The controls of :meth:`view`, for ``explore``."""
        return {"question": list(WHEN), "share": [0.1, 0.25, 0.5], "kind": ["food", "number"]}

    def unmeasured(self, question: str, share: float, kind: str = "food") -> bool:
        """Whether some cell of this setting has still to be measured."""
        return any(key not in self._known for key in self._keys(question, share, kind))

    def cells(self, policy: str, question: str, share: float, kind: str = "food") -> list[list[Cell]]:
        """A row of cells for each depth, one for each length."""
        keys = [key for key in self._keys(question, share, kind) if key[0] == policy]
        self._measure(keys)
        rows = [self._known[key] for key in keys]
        return [rows[i : i + len(self.lengths)] for i in range(0, len(rows), len(self.lengths))]

    def recall(self, policy: str, question: str, share: float, kind: str = "food") -> float:
        """Share of all needles that this policy finds."""
        cells = [c for row in self.cells(policy, question, share, kind) for c in row]
        return sum(c.found for c in cells) / sum(c.tried for c in cells)

    def begun(self, policy: str, question: str, share: float, kind: str = "food") -> float:
        """Share of the answers' tokens that are right before the first wrong one, mean over the needles."""
        cells = [c for row in self.cells(policy, question, share, kind) for c in row]
        return sum(c.begun for c in cells) / len(cells)

    def view(self, question: str, share: float, kind: str = "food"):
        """A map for the full cache and one for each policy, and the recall of all in words."""
        names = [FULL, *self.policies]
        self._measure(self._keys(question, share, kind))
        figures = tuple(picture(name, self.cells(name, question, share, kind)) for name in names)
        found = ", ".join(f"{name} {100 * self.recall(name, question, share, kind):.0f} %" for name in names)
        kept = f"{100 * share:.0f} % of the prompt kept"
        return figures, f"{kept}, {WHEN[question]}. Needles found (measured): {found}."

    def table(self, share: float = 0.25, kind: str = "food") -> Table:
        """Each policy, with the question known before eviction and with one that comes later: answers, and their tokens."""
        rows = []
        for name in (FULL, *self.policies):
            both = [(self.recall(name, q, share, kind), self.begun(name, q, share, kind)) for q in WHEN]
            rows.append((name, *(f"{100 * value:.0f} %" for pair in both for value in pair)))
        tried = len(self.lengths) * len(self.depths) * self.needles
        kept = f"{100 * share:.0f} % of the prompt kept (measured)"
        caption = f"Needles found of {tried}, and the answers' tokens before the first wrong one; {kept}"
        heads = [head for when in ("question known", "question comes later") for head in (when, "tokens of the answer")]
        return Table(("policy", *heads), tuple(rows), caption)

    def _keys(self, question: str, share: float, kind: str) -> list[tuple]:
        """(policy, question, share, kind, depth, length); nothing is evicted from the full cache, so it has one of each."""
        keys = []
        for name in (FULL, *self.policies):
            how = ("before", 1.0) if name == FULL else (question, share)
            keys += [(name, *how, kind, depth, length) for depth in self.depths for length in self.lengths]
        return keys

    def _measure(self, keys: list[tuple]) -> None:
        with self._lock:
            for key in track([k for k in keys if k not in self._known], "hiding needles", show=False):
                name, question, share, kind, depth, length = key
                small = self.lm if name == FULL else under(self.lm, self.policies[name](share))
                self._known[key] = grid(small, [length], [depth], kind, question, needles=self.needles)[0]


def picture(name: str, cells: list[list[Cell]]) -> go.Figure:
    """Recall by depth and length: blue is found, red is lost."""
    recall = [[c.recall for c in row] for row in cells]
    trace = heat.heat(recall, 0.0, 1.0, FOUND, hover="%{z:.0%} found<extra></extra>", bar=False)
    centre = {"showarrow": False, "yanchor": "middle"}
    notes = [{"x": j, "y": i, "text": f"{c.found}/{c.tried}"} for i, row in enumerate(cells) for j, c in enumerate(row)]
    # Labels of rows and columns as notes, since the static twin numbers its ticks.
    notes += [{"x": j, "y": -0.09, "yref": "paper", "text": f"{c.length:,}"} for j, c in enumerate(cells[0])]
    notes += [
        {"x": -0.02, "xref": "paper", "xanchor": "right", "y": i, "text": f"{row[0].depth:g}"}
        for i, row in enumerate(cells)
    ]
    bare = {"showgrid": False, "showticklabels": False, "ticks": ""}
    total = sum(c.found for row in cells for c in row), sum(c.tried for row in cells for c in row)
    return go.Figure(
        [trace],
        layout(
            f"{name}: {total[0]} of {total[1]}",
            260,
            xaxis=axis(range=[-0.5, len(cells[0]) - 0.5], **bare) | {"title": {"text": "tokens", "standoff": 24}},
            yaxis=axis(range=[len(cells) - 0.5, -0.5], **bare) | {"title": {"text": "depth", "standoff": 30}},
            annotations=[centre | note for note in notes],
        ),
    )
