"""Why a few windows of any text do for AWQ's search: trials with the same calibration in other orders, shipped.

trials = few_windows.shipped()
few_windows.table(trials)       # KL on both texts by method and by which windows the search sees
few_windows.sentence(trials)    # how far the chosen exponents agree

``benchmarks/calibration_order.py`` has measured them on the embedded model, and measures them again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence

from labkit import paths
from labkit.ui import words
from labkit.ui.table import Table

TEXTS = ("manual", "prose")
ORDERS = ("manual first", "in turns")  # the two that are compared


def shipped() -> list[dict]:
    """The trials: "method" as one types it, "order", "seed", "kl" of each window by text, "chosen" by the search."""
    file = paths.data() / "calibration_order.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else []


def table(trials: Sequence[Mapping]) -> Table:
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


def pairs(trials: Sequence[Mapping]) -> Iterator[tuple[Mapping, Mapping]]:
    """Trials of the same method and draw, in the two orders."""
    known = {(t["method"], t["seed"], t["order"]): t for t in trials}
    for (method, seed, order), one in known.items():
        if order == ORDERS[0] and (other := known.get((method, seed, ORDERS[1]))):
            yield one, other


def agreement(one: Mapping, other: Mapping) -> dict[str, float]:
    """Shares over the folds of all blocks: "same" exponent, and the other's exponent "near" enough for 1 % of the loss.

    "apart": the mean distance of the exponents; "left": the mean share of the error that the chosen ones leave.
    """
    both = list(zip(one["chosen"], other["chosen"], strict=True))
    return {
        "same": _mean([a[1] == b[1] for a, b in both]),
        "near": _mean([a[3] <= b[1] <= a[4] for a, b in both]),
        "apart": _mean([abs(a[1] - b[1]) for a, b in both]),
        "left": _mean([a[2] for a, _ in both]),
    }


def sentence(trials: Sequence[Mapping]) -> str:
    """How far the search agrees with itself when its windows are of the manual alone or of both texts, in words."""
    found = [agreement(*pair) for pair in pairs(trials)]
    if not found:
        return "No such trials are here yet: benchmarks/calibration_order.py measures them."
    mean = {name: _mean([f[name] for f in found]) for name in found[0]}
    return (
        f"In {words.percent(mean['same'])} of the searches windows of the manual alone choose the same exponent as windows of both "
        f"texts, and in {words.percent(mean['near'])} one that costs less than 1 % more error; on average the two are "
        f"{mean['apart']:.2f} apart. The best exponent leaves {words.percent(mean['left'])} of plain rounding's error."
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _mean_and_range(values: Sequence[float]) -> str:
    mean = f"{_mean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ± {(max(values) - min(values)) / 2:.4f}"
