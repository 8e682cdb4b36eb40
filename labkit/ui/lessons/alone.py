"""Each block pruned alone, all others as they are: what its zeros cost the whole model.

    found = Alone(Inputs(lm, calibration), {"manual": ids, "prose": ids}).measure(sparsity=0.5)
    bars(found); table(found)

Damage is KL to the uncompressed model in nats per token; measured with :class:`labkit.probe.Probe`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from labkit.probe import Probe
from labkit.progress import track
from labkit.ui import need, plots, words
from labkit.ui.lessons.inputs import Inputs
from labkit.ui.lessons.masks import prune
from labkit.ui.table import Table
from labkit.walk import Stats

go = need("plotly.graph_objects")

TEXTS = ("manual", "prose")


@dataclass(frozen=True)
class Cost:
    """One block, pruned alone by one method."""

    block: int
    method: str
    damage: dict[str, float]  # text -> KL


class Alone:
    """Prunes one block at a time, for token windows ``texts``: name -> (windows, length)."""

    def __init__(self, inputs: Inputs, texts: Mapping[str, torch.Tensor]):
        self.inputs = inputs
        self.probes = {name: Probe(inputs.lm, ids) for name, ids in texts.items()}

    @torch.no_grad()
    def measure(
        self,
        sparsity: float = 0.5,
        blocks: Sequence[int] | None = None,
        methods: Sequence[str] = ("magnitude", "Wanda"),
    ) -> list[Cost]:
        """One Cost for each block and method; ``blocks=None``: every block of the model."""
        found = []
        for block in track(range(len(self.inputs.stack)) if blocks is None else blocks, "blocks", show=False):
            layers = {kind: self.inputs.stack[block].get_submodule(kind) for kind in self.inputs.read(block)}
            for method in methods:
                pruned = {}
                for kind, layer in layers.items():
                    stats = Stats()
                    stats.add(self.inputs.of(block, kind), "hessian" if method == "SparseGPT" else "channel_norm")
                    pruned[layer], _ = prune(self.inputs.weight(block, kind), stats, method, sparsity)
                with self.inputs.lock:
                    damage = {name: probe.cost(pruned) for name, probe in self.probes.items()}
                found.append(Cost(block, method, damage))
        return found


def bars(found: Sequence[Cost], text: str = "manual") -> go.Figure:
    """KL on one text, a bar for each block and method."""
    series: dict[str, dict[str, float]] = {}
    for cost in found:
        series.setdefault(cost.method, {})[f"{cost.block}"] = float(f"{cost.damage[text]:.4g}")
    figure = plots.bars(series, "KL, nats per token", f"Each block pruned alone, KL on {words.the(text)} (measured)")
    figure.layout.xaxis.update({"type": "category", "title": {"text": "block"}})
    return figure


def view(found: Sequence[Cost], text: str = "manual") -> tuple[go.Figure, str]:
    """The bars, and which block costs most."""
    told = []
    for method in dict.fromkeys(c.method for c in found):
        mine = sorted((c.damage[text], c.block) for c in found if c.method == method)
        (worst, block), (middle, _) = mine[-1], mine[(len(mine) - 1) // 2]
        told.append(
            f"with {method} block {block} costs most, {words.short(worst)}, {worst / max(middle, 1e-12):.1f} times the middle "
            f"one of {len(mine)}"
        )
    return bars(found, text), words.sentence(f"On {words.the(text)}, {words.listed(told)}")


def table(found: Sequence[Cost]) -> Table:
    """All of it: a row for each block."""
    methods, texts = list(dict.fromkeys(c.method for c in found)), list(found[0].damage)
    at = {(c.block, c.method): c.damage for c in found}
    rows = [
        (f"{b}", *(words.short(at[b, m][t]) for m in methods for t in texts))
        for b in dict.fromkeys(c.block for c in found)
    ]
    head = ("block", *(f"{m}, {t}" for m in methods for t in texts))
    return Table(head, tuple(rows), "KL in nats per token with that block alone pruned: measured")
