"""Why a few windows of any text do for AWQ's search: searches and whole models with other windows, shipped.

few = few_windows.shipped()
few_windows.searches(few["searches"])   # what an exponent costs that a few windows of one text have chosen
few_windows.orders(few["trials"])       # KL on both texts, by the order of the calibration's windows

``benchmarks/calibration_order.py`` has measured them on the embedded model, and measures them again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from labkit import paths
from labkit.ui.table import Table

TEXTS = ("manual", "prose")
SOURCES = {"manual": "the manual", "self": "its own text"}


def shipped() -> dict[str, list[dict]]:
    """The "searches" and the "trials", as the script wrote them."""
    file = paths.data() / "calibration_order.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"searches": [], "trials": []}


def searches(found: Sequence[Mapping]) -> Table:
    """By the windows that a search saw: the output error at the exponent it chose, over the least, on each text.

    Means over all folds; the last row is plain rounding, exponent 0.
    """
    rows = []
    for source, words in SOURCES.items():
        same = [s for s in found if s["source"] == source]
        for count in sorted({s["windows"] for s in same}):
            mine = [s for s in same if s["windows"] == count]
            label = f"{count} window{'s' * (count != 1)} of {words}"
            rows.append((label, *(f"{_mean([s['cost'][t] for s in mine]):.3f}" for t in SOURCES)))
    if found:
        rows.append(("none: plain rounding", *(f"{_mean([s['gain'][t] for s in found]):.3f}" for t in SOURCES)))
    folds = len({(s["block"], s["fold"]) for s in found})
    head = ("the search saw", *(f"error on {words}" for words in SOURCES.values()))
    return Table(head, tuple(rows), f"Error of a module's output, best exponent = 1 (measured; {folds} places, means)")


def orders(trials: Sequence[Mapping]) -> Table:
    """KL on both texts for each method and order, means over draws of the calibration, with half the range of the draws."""
    by: dict[tuple[str, str], list[Mapping]] = {}
    for trial in trials:
        by.setdefault((trial["method"], trial["order"]), []).append(trial)
    rows = []
    for (method, order), same in by.items():
        cells = [_mean_and_range([_mean(t["kl"][text]) for t in same]) for text in TEXTS]
        rows.append((method, order, str(len(same)), *cells))
    head = ("method", "order of the 32 windows", "draws", *TEXTS)
    return Table(head, tuple(rows), "KL, nats per token (measured; ± half the range of the draws)")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _mean_and_range(values: Sequence[float]) -> str:
    mean = f"{_mean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ± {(max(values) - min(values)) / 2:.4f}"
